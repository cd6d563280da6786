//! The command for operators: turns arguments into calls of the library, and its answers into text or JSON.

mod args;
mod bench;
mod cache;
#[cfg(feature = "nbd-device")]
mod device;
mod exit;
mod list;
mod mount;
mod output;
mod qemu;
mod remote;
mod serve;
mod signals;
mod socket;
mod uffd_handler;

use clap::Parser;

use args::{Command, QemuCommand};
use output::Output;

fn main() -> std::process::ExitCode {
    let arguments = args::Arguments::parse();
    let (json, result) = match arguments.command {
        Command::Qemu(QemuCommand::Receive(receive)) => {
            let output = Output::new(receive.json);
            (receive.json, qemu::receive::run(&receive, output))
        }
        Command::Qemu(QemuCommand::Send(send)) => {
            let output = Output::new(send.json);
            (send.json, qemu::send::run(&send, output))
        }
        Command::Qemu(QemuCommand::Watch(watch)) => (false, qemu::watch::run(&watch)),
        Command::Serve(serve) => (serve.json, serve::run(&serve, Output::new(serve.json))),
        Command::List(list) => (list.json, list::run(&list, Output::new(list.json))),
        Command::Mount(mount) => (mount.json, mount::run(&mount, Output::new(mount.json))),
        Command::UffdHandler(handler) => (
            handler.json,
            uffd_handler::run(&handler, Output::new(handler.json)),
        ),
        Command::UffdWatch => (false, uffd_handler::watch()),
        #[cfg(feature = "nbd-device")]
        Command::Device(device) => (
            device.json(),
            device::run(&device, Output::new(device.json())),
        ),
        Command::Bench { arguments } => (false, bench::run(&arguments)),
    };
    exit::report(result, json)
}
