//! `cargo suite`: every check and test that this machine can run, and by name and reason what it could not.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest_test::lab;
use guest_test::lab::targets::{self, Tests};
use guest_test::{command, image, packages};

/// Runs every check and test that this machine can run.
#[derive(Debug, Parser)]
struct Arguments {
    /// Count what cannot run as failed, and install what is missing to run it.
    #[arg(long)]
    require_all: bool,
    /// Run only the steps whose names contain this.
    #[arg(long)]
    only: Option<String>,
}

/// One check.
struct Step {
    name: &'static str,
    plan: Plan,
    /// Looks at what the last command printed, too; it is then printed when the command has ended.
    judge: Option<fn(&str) -> Result<()>>,
}

/// The commands of a check, or why they cannot be run here.
type Plan = fn(&Machine) -> Result<Vec<Command>, String>;

/// Where a tool is to be had.
#[derive(Clone, Copy)]
enum Origin {
    /// The Python package index, compiled.
    Pip,
    /// crates.io, to be compiled, which takes minutes: what the Python package index has is years old.
    Cargo,
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// What the steps ask about this machine.
struct Machine {
    /// May install what is missing.
    install: bool,
    /// Where tools are installed that this machine does not have.
    tools: PathBuf,
    /// Names of the workspace's integration tests.
    tests: Vec<String>,
}

/// The slowest step compiles everything and boots guests; on two cores that is minutes.
const STEP_LIMIT: Duration = Duration::from_secs(1500);
const QUESTION_LIMIT: Duration = Duration::from_secs(60);
const INSTALL_LIMIT: Duration = Duration::from_secs(1200);
/// A target without an operating system: what compiles for it does no input or output.
const BARE: &str = "x86_64-unknown-none";
/// What is left out unless asked for, because a library's user does not need it.
const ALL: [&str; 2] = ["--features", "vmm-integration/minivmm"];

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let machine = Machine::look(arguments.require_all)?;
    let wanted = |step: &Step| {
        arguments
            .only
            .as_deref()
            .is_none_or(|part| step.name.contains(part))
    };
    let mut outcomes = Vec::new();
    for step in steps().iter().filter(|step| wanted(step)) {
        println!("\n=== {}", step.name);
        let began = Instant::now();
        let outcome = match (step.plan)(&machine) {
            Ok(commands) => run(commands, step.judge),
            Err(reason) => Outcome::Skipped(reason),
        };
        outcomes.push((step.name, outcome, began.elapsed()));
    }
    Ok(summarise(&outcomes, arguments.require_all))
}

fn steps() -> Vec<Step> {
    let step = |name, plan: Plan| Step {
        name,
        plan,
        judge: None,
    };
    vec![
        step("format", |_| {
            Ok(vec![
                cargo(&["fmt", "--all", "--", "--check"]),
                guests(cargo(&["fmt", "--all", "--", "--check"])),
            ])
        }),
        step("lint", |_| {
            let deny = ["--", "-D", "warnings"];
            Ok(vec![
                cargo(&[&["clippy", "--workspace", "--all-targets"], &ALL[..], &deny].concat()),
                guests(cargo(&[&["clippy"][..], &deny].concat())),
            ])
        }),
        step("without the default features", |_| {
            let clippy = ["clippy", "-p", "memferry", "--no-default-features"];
            let with =
                |more: &[&str]| cargo(&[&clippy[..], more, &["--", "-D", "warnings"]].concat());
            // The command shows regions in one way at least.
            Ok(vec![
                with(&["--lib"]),
                with(&["--lib", "--bins", "--features", "fuse"]),
                with(&["--lib", "--bins", "--features", "nbd-device"]),
                cargo(&[
                    "clippy",
                    "-p",
                    "vmm-integration",
                    "--no-default-features",
                    "--all-targets",
                    "--",
                    "-D",
                    "warnings",
                ]),
            ])
        }),
        step("spelling", |machine| {
            let typos = machine.tool("typos", Origin::Pip)?;
            let mut command = Command::new(typos);
            command.current_dir(image::workspace());
            Ok(vec![command])
        }),
        step("dependencies", |machine| {
            let mut command = Command::new(machine.tool("cargo-deny", Origin::Cargo)?);
            command.current_dir(image::workspace());
            command.args(["--workspace", "check", "bans", "licenses", "sources"]);
            Ok(vec![command])
        }),
        step("the protocol does no input or output", |machine| {
            machine.target(BARE)?;
            Ok(vec![cargo(&[
                "check",
                "-p",
                "migrate-proto",
                "--target",
                BARE,
            ])])
        }),
        step("documentation", |_| {
            let private = ["--no-deps", "--document-private-items"];
            let mut doc = cargo(&[&["doc", "--workspace"], &ALL[..], &private].concat());
            doc.env("RUSTDOCFLAGS", "-D warnings");
            Ok(vec![doc])
        }),
        step("tests", |_| {
            let nextest = command::find("cargo-nextest").is_some();
            Ok(vec![if nextest {
                cargo(&[&["nextest", "run", "--workspace"], &ALL[..]].concat())
            } else {
                let targets = ["--lib", "--bins", "--tests"];
                cargo(&[&["test", "--workspace"], &ALL[..], &targets].concat())
            }])
        }),
        step("every interleaving", |_| Ok(vec![loom()])),
        step("examples in the documentation", |_| {
            Ok(vec![cargo(&["test", "--workspace", "--doc"])])
        }),
        step("privileged tests of the library's insides", |_| {
            may_trace()?;
            unit_tests("privileged: ")
        }),
        step("privileged tests", |machine| {
            machine.test("privileged")?;
            may_trace()?;
            let one_at_a_time = ["--include-ignored", "--test-threads", "1"];
            let test = ["test", "--test", "privileged", "--"];
            let rest = ["--skip", "measure"];
            // A child that one test forks holds, until it is another program, the files that another test would unmount.
            Ok(vec![cargo(&[&test[..], &one_at_a_time, &rest].concat())])
        }),
        step("privileged tests of the integration with VMMs", |_| {
            may_trace()?;
            ignored_tests("privileged: ", |tests| {
                tests.directory.ends_with("vmm-integration")
            })
        }),
        step("guests of KVM", |_| {
            may_use_kvm()?;
            ignored_tests("kvm: ", |_| true)
        }),
        step("the reference VMM with tiny guests", |machine| {
            machine.test("minivmm")?;
            may_trace()?;
            may_use_kvm()?;
            let test = ["test", "-p", "vmm-integration", "--features", "minivmm"];
            let guests = ["--test", "minivmm", "--", "--include-ignored"];
            let rest = ["--test-threads", "1", "--skip", "measure"];
            Ok(vec![cargo(&[&test[..], &guests, &rest].concat())])
        }),
        step("guest tests", |machine| {
            machine.test("guest")?;
            packages::ensure(&[packages::QEMU]).map_err(|reason| format!("{reason:#}"))?;
            // Guests measure time: one at a time.
            Ok(vec![cargo(&[
                "test",
                "--workspace",
                "--test",
                "guest",
                "--",
                "--include-ignored",
                "--test-threads",
                "1",
            ])])
        }),
        step("tests with programs of others", |machine| {
            machine.test("foreign")?;
            packages::ensure(&packages::FOREIGN).map_err(|reason| format!("{reason:#}"))?;
            let ignored = ["--test", "foreign", "--", "--include-ignored"];
            let rest = ["--skip", "measure"];
            Ok(vec![cargo(&[&["test"], &ignored[..], &rest].concat())])
        }),
        step("lab tests", |_| lab(&["--all", "--with", "fio"])),
        // What is done where a kernel lacks something.
        step("lab tests on an older kernel", |_| {
            let reasons = ["CONFIG_MEM_SOFT_DIRTY", "an older kernel"];
            let reasons = reasons.map(|reason| ["--reason", reason]).concat();
            lab(&[&["--kernel", "6.1", "--all"], &reasons[..]].concat())
        }),
        step("the demo without QEMU", |_| Ok(vec![demo(&["--embedded"])])),
        step("the demo", |_| {
            packages::ensure(&[packages::QEMU]).map_err(|reason| format!("{reason:#}"))?;
            Ok(vec![demo(&[])])
        }),
        Step {
            judge: Some(measured_a_migration),
            ..step("a quick benchmark", |_| {
                packages::ensure(&[packages::QEMU]).map_err(|reason| format!("{reason:#}"))?;
                Ok(vec![bench(&["qemu", "--quick", "--json"])])
            })
        },
        Step {
            judge: Some(measured_everything),
            ..step("a quick benchmark of mounts", |_| {
                if !Path::new("/dev/fuse").exists() {
                    return Err("this machine has no /dev/fuse".into());
                }
                Ok(vec![bench(&["mount", "--quick", "--json"])])
            })
        },
        Step {
            judge: Some(measured_everything),
            ..step("a quick benchmark of embedding", |_| {
                may_use_kvm()?;
                may_trace()?;
                let example = ["run", "--release", "-p", "vmm-integration"];
                let quick = ["--example", "bench-embed", "--", "--quick", "--json"];
                Ok(vec![cargo(&[&example[..], &quick].concat())])
            })
        },
    ]
}

/// The tests that loom runs, with its own locks in place of the standard library's; compiled apart.
fn loom() -> Command {
    let mut command = cargo(&["test", "-p", "memferry", "--lib", "loom"]);
    command
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", image::workspace().join("target/loom"))
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        // Nearly every mistake shows with two, and each more takes many times as long.
        .env("LOOM_MAX_PREEMPTIONS", "2");
    command
}

/// The library's own tests that are ignored for a reason that begins so.
fn unit_tests(reason: &str) -> Result<Vec<Command>, String> {
    let name = "memferry";
    let tests = targets::build_one(name, Some(name), &[]).and_then(|tests| {
        let names = tests.ignored_for(|of_test| of_test.starts_with(reason))?;
        ensure!(!names.is_empty(), "no test is ignored because of {reason}");
        Ok((tests, names))
    });
    let (tests, names) = tests.map_err(|reason| format!("{reason:#}"))?;
    let mut command = Command::new(&tests.program);
    command.current_dir(&tests.directory);
    command.args(["--ignored", "--exact"]).args(names);
    Ok(vec![command])
}

/// The tests of those programs, of the workspace's, that are ignored for a reason that begins so.
fn ignored_tests(reason: &str, of: impl Fn(&Tests) -> bool) -> Result<Vec<Command>, String> {
    let built = targets::build_all(&[]).map_err(|reason| format!("{reason:#}"))?;
    let mut commands = Vec::new();
    for tests in built.into_iter().filter(of) {
        let names = tests.ignored_for(|of_test| of_test.starts_with(reason));
        let names = names.map_err(|reason| format!("{reason:#}"))?;
        if !names.is_empty() {
            let mut command = Command::new(&tests.program);
            command.current_dir(&tests.directory);
            command.args(["--ignored", "--exact"]).args(names);
            // A guest that is emulated keeps a core busy.
            command.args(["--test-threads", "1"]);
            commands.push(command);
        }
    }
    Ok(commands)
}

/// Runs in a Linux guest what this machine's kernel may lack.
fn lab(arguments: &[&str]) -> Result<Vec<Command>, String> {
    packages::ensure(&lab::TOOLS).map_err(|reason| format!("{reason:#}"))?;
    let lab = ["run", "-p", "guest-test", "--bin", "lab", "--"];
    Ok(vec![cargo(&[&lab[..], arguments].concat())])
}

fn demo(arguments: &[&str]) -> Command {
    let demo = [
        "run",
        "--release",
        "-p",
        "guest-test",
        "--bin",
        "demo",
        "--",
    ];
    cargo(&[&demo[..], arguments].concat())
}

fn bench(arguments: &[&str]) -> Command {
    let bench = ["run", "--release", "-p", "guest-test", "--bin"];
    cargo(&[&bench[..], &["memferry-bench", "--"], arguments].concat())
}

/// Whether a suite of benchmarks measured something and said how that compares with its goals. Whether they are met is
/// no matter on a machine that does other things.
fn goals(printed: &str) -> Result<Vec<serde_json::Value>> {
    let lines: Vec<serde_json::Value> = printed
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
        .collect::<Result<_>>()?;
    let is_goal = |line: &serde_json::Value| {
        let limit = line["at_most"].is_number() || line["at_least"].is_number();
        line["goal"].is_string() && limit && line["met"].is_boolean()
    };
    let goals = lines.into_iter().rev().take_while(is_goal);
    let goals: Vec<_> = goals.collect();
    ensure!(!goals.is_empty(), "it does not end with a goal");
    Ok(goals)
}

fn measured_a_migration(printed: &str) -> Result<()> {
    // QEMU's own modes may lose a guest; Memferry may not.
    let goals = goals(printed)?;
    let measured = goals
        .iter()
        .any(|goal| goal["goal"] == "resident_above_ram_mib" && goal["value"].is_number());
    ensure!(measured, "it measured no migration by Memferry");
    Ok(())
}

fn measured_everything(printed: &str) -> Result<()> {
    for goal in goals(printed)? {
        ensure!(goal["value"].is_number(), "it did not measure {goal}");
    }
    Ok(())
}

impl Machine {
    fn look(install: bool) -> Result<Self> {
        let mut question = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
        let metadata: serde_json::Value =
            serde_json::from_str(&command::output(&mut question, QUESTION_LIMIT)?)
                .context("cargo metadata")?;
        let lists = |value: &serde_json::Value, name: &str| {
            value[name].as_array().cloned().unwrap_or_default()
        };
        let tests = lists(&metadata, "packages")
            .iter()
            .flat_map(|package| lists(package, "targets"))
            .filter(|target| target["kind"][0] == "test")
            .filter_map(|target| target["name"].as_str().map(str::to_owned))
            .collect();
        Ok(Self {
            install,
            tools: image::cache_directory()?.join("tools"),
            tests,
        })
    }

    fn test(&self, name: &str) -> Result<(), String> {
        match self.tests.iter().any(|test| test == name) {
            true => Ok(()),
            false => Err(format!("the workspace has no test target named {name}")),
        }
    }

    /// A program that developers have or do not have; installed out of everybody's way, where that is wanted.
    fn tool(&self, program: &str, origin: Origin) -> Result<PathBuf, String> {
        let installed = self.tools.join("bin").join(program);
        let found =
            command::find(program).or_else(|| installed.is_file().then(|| installed.clone()));
        match found {
            Some(path) => Ok(path),
            None if self.install => match install(&self.tools, program, origin) {
                Ok(()) => Ok(installed),
                Err(reason) => Err(format!("cannot install {program}: {reason:#}")),
            },
            None => Err(format!(
                "{program} is not installed (cargo suite --require-all installs it)"
            )),
        }
    }

    fn target(&self, name: &str) -> Result<(), String> {
        let how = format!("rustup target add {name}");
        let mut question = Command::new("rustup");
        question
            .args(["target", "list", "--installed"])
            .current_dir(image::workspace());
        let installed = command::output(&mut question, QUESTION_LIMIT).map_err(|reason| {
            format!("cannot tell whether the target {name} is installed: {reason:#}")
        })?;
        if installed.lines().any(|line| line == name) {
            return Ok(());
        }
        if !self.install {
            return Err(format!("the target {name} is not installed ({how})"));
        }
        let mut add = Command::new("rustup");
        add.args(["target", "add", name])
            .current_dir(image::workspace());
        command::output(&mut add, INSTALL_LIMIT)
            .map(|_| ())
            .map_err(|reason| format!("{how}: {reason:#}"))
    }
}

fn install(tools: &Path, package: &str, origin: Origin) -> Result<()> {
    eprintln!("installing {package} into {}", tools.display());
    match origin {
        Origin::Pip => {
            let mut environment = Command::new("python3");
            environment.args(["-m", "venv"]).arg(tools);
            command::output(&mut environment, INSTALL_LIMIT)
                .context("Debian: apt-get install python3-venv")?;
            let mut pip = Command::new(tools.join("bin/pip"));
            command::output(pip.args(["install", "--quiet", package]), INSTALL_LIMIT)?;
        }
        Origin::Cargo => {
            let mut install = cargo(&["install", "--locked", "--quiet", package, "--root"]);
            command::output(install.arg(tools), INSTALL_LIMIT)?;
        }
    }
    Ok(())
}

/// Whether this machine has KVM. What it cannot run is for the tests to say.
fn may_use_kvm() -> Result<(), String> {
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    kvm.map(drop)
        .map_err(|reason| format!("cannot open /dev/kvm: {reason}"))
}

/// Whether this process may take hold of another one, as the tests that attach do.
fn may_trace() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root".to_owned());
    }
    // The kernel lets those write another's memory who may trace it; asking harms nobody.
    let mut other = Command::new("sleep")
        .arg("60")
        .spawn()
        .map_err(|reason| format!("cannot start a process to try it on: {reason}"))?;
    let memory = std::fs::File::options()
        .write(true)
        .open(format!("/proc/{}/mem", other.id()));
    let _ended = other.kill();
    let _reaped = other.wait();
    memory
        .map(|_| ())
        .map_err(|reason| format!("this system does not let root trace processes: {reason}"))
}

fn run(commands: Vec<Command>, judge: Option<fn(&str) -> Result<()>>) -> Outcome {
    let last = commands.len().saturating_sub(1);
    for (index, mut command) in commands.into_iter().enumerate() {
        println!("--- {}", shown(&command));
        if let Some(judge) = judge.filter(|_| index == last) {
            let judged = command::output(&mut command, STEP_LIMIT).and_then(|printed| {
                print!("{printed}");
                judge(&printed)
            });
            if let Err(reason) = judged {
                return Outcome::Failed(format!("{}: {reason:#}", shown(&command)));
            }
            continue;
        }
        match command::status(&mut command, STEP_LIMIT) {
            Ok(status) if status.success() => {}
            Ok(status) => {
                return Outcome::Failed(format!("{} ended with {status}", shown(&command)));
            }
            Err(reason) => return Outcome::Failed(format!("{reason:#}")),
        }
    }
    Outcome::Passed
}

fn summarise(outcomes: &[(&str, Outcome, Duration)], require_all: bool) -> ExitCode {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    println!("\n=== summary");
    for (name, outcome, took) in outcomes {
        let seconds = format!("{:.1} s", took.as_secs_f64());
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!("passed   {name} ({seconds})");
            }
            Outcome::Failed(reason) => {
                failed += 1;
                println!("FAILED   {name} ({seconds}): {reason}");
            }
            Outcome::Skipped(reason) if require_all => {
                failed += 1;
                println!("FAILED   {name}, which is required and could not run: {reason}");
            }
            Outcome::Skipped(reason) => {
                skipped += 1;
                println!("skipped  {name}: {reason}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(image::workspace());
    command
}

/// Has a cargo command look at the programs that run inside guests.
fn guests(mut command: Command) -> Command {
    command.current_dir(image::workspace().join("guest-test/guests"));
    command
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{"run":1,"mode":"memferry"}"#;
    const GOAL: &str = r#"{"goal":"resident_above_ram_mib","value":7.4,"at_most":64.0,"met":true}"#;

    #[test]
    fn a_benchmark_ends_with_goals_about_something_measured() {
        assert!(measured_a_migration(&format!("{RUN}\n{GOAL}\n")).is_ok());
        let nothing = GOAL.replace("7.4", "null");
        for wrong in [
            RUN.to_owned(),
            format!("{GOAL}\n{RUN}"),
            nothing,
            String::new(),
        ] {
            assert!(measured_a_migration(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_benchmark_of_mounts_has_measured_all_that_it_has_goals_for() {
        let read = r#"{"goal":"read","value":0.8,"at_least":0.9,"met":false}"#;
        assert!(measured_everything(&format!("{RUN}\n{read}\n{GOAL}")).is_ok());
        let nothing = read.replace("0.8", "null");
        assert!(measured_everything(&format!("{nothing}\n{GOAL}")).is_err());
    }
}
