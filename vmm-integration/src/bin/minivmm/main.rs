//! `minivmm`: the reference VMM. It boots little guests and Linux, and live-migrates them.

mod args;
mod boot;
mod control;
mod desk;
mod machine;
mod migration;
mod state;
mod sys;

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use anyhow::{Context, Result};
use clap::Parser;

use args::{Arguments, Boot, Command, MachineArguments};
use boot::Program;
use control::Socket;
use desk::{Desk, End};
use machine::{Console, Ending, Machine, Request, Shape};

/// The guest ended otherwise than by asking for it.
const GUEST_FAILED: u8 = 3;

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Boot(boot) => boot_guest(boot),
        Command::Await(arguments) => make(&arguments.machine, None).and_then(|(desk, ends)| {
            anyhow::ensure!(
                arguments.machine.control.is_some(),
                "a machine that waits for a guest needs --control, to be told where"
            );
            serve(&arguments.machine, &desk, &ends)
        }),
        Command::Control(control) => {
            control::client::ask(&control.socket, control.command).map(|done| {
                if done {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::FAILURE
                }
            })
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("minivmm: {error:#}");
        ExitCode::FAILURE
    })
}

fn boot_guest(boot: Boot) -> Result<ExitCode> {
    let program = match (boot.flat, boot.kernel) {
        (Some(image), _) => Program::Flat {
            image,
            words: boot.words,
        },
        (None, Some(image)) => Program::Kernel {
            image,
            command_line: boot.command_line,
            initramfs: boot.initramfs,
        },
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let (desk, ends) = make(&boot.machine, Some(&program))?;
    if !boot.paused {
        desk.resume()?;
    }
    serve(&boot.machine, &desk, &ends)
}

type Ends = mpsc::Receiver<End>;

/// Makes a machine with a program, or one that waits for a guest.
fn make(arguments: &MachineArguments, program: Option<&Program>) -> Result<(Arc<Desk>, Ends)> {
    let (sender, ends) = mpsc::channel();
    let shape = Shape {
        memory: arguments.memory,
        cpus: arguments.cpus,
        tracking: arguments.tracker,
    };
    let console = console(&arguments.console)?;
    let machine = Machine::new(shape, console, tell(sender.clone()), |memory, tsc_khz| {
        let load = |program| boot::load(program, memory, arguments.cpus.into(), tsc_khz);
        program.map(load).transpose()
    })?;
    let desk = Desk::new(machine, program.is_some(), sender);
    Ok((Arc::new(desk), ends))
}

fn tell(ends: Sender<End>) -> impl Fn(usize, &Ending) + Send + Sync + 'static {
    move |cpu, ending| {
        // If nobody waits any more, it has ended already.
        let _ = ends.send(End::Guest {
            cpu,
            ending: ending.clone(),
        });
    }
}

/// Answers at the control socket until the machine ends.
fn serve(arguments: &MachineArguments, desk: &Arc<Desk>, ends: &Ends) -> Result<ExitCode> {
    let open = |path: &Path| {
        let socket = Socket::open(path, desk);
        socket.with_context(|| format!("the control socket {} cannot be opened", path.display()))
    };
    let _socket = arguments.control.as_deref().map(open).transpose()?;
    // Every sender is dropped only with the machine, which this function's caller holds.
    Ok(
        match ends
            .recv()
            .context("nothing can end this machine any more")?
        {
            End::Quit => ExitCode::SUCCESS,
            End::Guest {
                ending: Ending::Asked(Request::Exit(code)),
                ..
            } => code.into(),
            End::Guest { cpu, ending } => {
                eprintln!("minivmm: processor {cpu} ended: {ending}");
                GUEST_FAILED.into()
            }
        },
    )
}

fn console(path: &Path) -> Result<Console> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdout()));
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("the console {} cannot be opened", path.display()))?;
    Ok(Box::new(file))
}
