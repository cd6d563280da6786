//! `cargo lab`: runs tests and programs in a Linux that has what this machine lacks.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use guest_test::accel::accel;
use guest_test::lab::targets::{self, Tests};
use guest_test::lab::{Ended, Job, Lab};
use guest_test::{command, image, interrupt, packages};

/// Runs tests in a Linux guest that has what this machine lacks: NBD, ublk, netem, vsock, soft-dirty bits
///
/// Exit codes: that of the tests, or 1 where the lab itself failed.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo lab")]
struct Arguments {
    /// The tests' target (`lab`, `it`, or `memferry` for the unit tests), and a part of the tests' names
    #[arg(value_name = "TARGET[/FILTER]", required_unless_present_any = ["all", "shell", "program"])]
    tests: Option<String>,
    /// Every test of the workspace that is ignored because of this kernel's lack: `kernel: needs …`
    #[arg(long, conflicts_with = "tests")]
    all: bool,
    /// Of these, those whose reason contains this; without it, all that do not need an older kernel
    #[arg(long, value_name = "TEXT", requires = "all")]
    reason: Vec<String>,
    /// A program instead of tests
    #[arg(long, value_name = "PATH", conflicts_with_all = ["tests", "all", "shell"])]
    program: Option<PathBuf>,
    /// A shell
    #[arg(long, conflicts_with_all = ["tests", "all"])]
    shell: bool,
    /// The series of the kernel
    #[arg(long, value_name = "6.12|6.1", default_value = "6.12")]
    kernel: String,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
    /// The guest's processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// How long each of the programs may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
    /// One more program of this machine for the guest, by name or path, for example fio
    #[arg(long, value_name = "PROGRAM")]
    with: Vec<String>,
    /// The package of the tests, where several have such a target
    #[arg(long, value_name = "NAME")]
    package: Option<String>,
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Arguments of the program
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Installed where it is asked for by name.
const KNOWN: [packages::Needed; 2] = [
    packages::Needed {
        program: "fio",
        package: "fio",
    },
    packages::Needed {
        program: "nbdkit",
        package: "nbdkit",
    },
];

/// Tests of what happens on a kernel that lacks something need this.
const OLDER: &str = "an older kernel";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match interrupt::handle().and_then(|()| arguments.run()) {
        Ok(Ended::Exited(code)) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Ok(Ended::Killed(signal)) => {
            eprintln!("lab: it was ended by signal {signal}");
            ExitCode::FAILURE
        }
        Err(reason) => {
            eprintln!("lab: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    fn run(&self) -> Result<Ended> {
        let jobs = self.jobs()?;
        let mut lab = Lab::new(&self.kernel, accel()?)?;
        lab.memory = self.memory << 20;
        lab.processors = self.cpus;
        lab.limit = Duration::from_secs(self.limit);
        let mut worst = Ended::Exited(0);
        for job in &jobs {
            if self.shell {
                return lab.shell(job);
            }
            eprintln!(
                "running {} under Linux {}, {}",
                job.program.display(),
                lab.kernel.release,
                lab.accel
            );
            let ended = lab.run(job, io::stdout())?;
            if ended != Ended::Exited(0) {
                worst = ended;
            }
        }
        Ok(worst)
    }

    fn jobs(&self) -> Result<Vec<Job>> {
        let with = self.programs()?;
        if self.shell {
            return Ok(vec![shell(with)]);
        }
        if let Some(program) = &self.program {
            let program = program
                .canonicalize()
                .with_context(|| program.display().to_string())?;
            return Ok(vec![Job {
                program,
                arguments: self.arguments.clone(),
                environment: self.environment(),
                directory: "/tmp".into(),
                programs: with,
            }]);
        }
        let build: &[&str] = if self.release { &["--release"] } else { &[] };
        eprintln!("building the tests");
        if self.all {
            return self.all(&targets::build_all(build)?, &with);
        }
        let tests = self.tests.as_deref().unwrap_or_default();
        let (name, filter) = tests.split_once('/').unwrap_or((tests, ""));
        let tests = targets::build_one(name, self.package.as_deref(), build)?;
        let filter = (!filter.is_empty()).then(|| filter.to_owned());
        Ok(vec![self.job(&tests, filter.into_iter().collect(), &with)])
    }

    /// A job for each target that has tests for the lab.
    fn all(&self, built: &[Tests], with: &[PathBuf]) -> Result<Vec<Job>> {
        let wanted = |reason: &str| match (reason.strip_prefix("kernel: needs "), &self.reason[..])
        {
            (None, _) => false,
            (Some(need), []) => !need.contains(OLDER),
            (Some(need), parts) => parts.iter().any(|part| need.contains(part)),
        };
        let mut jobs = Vec::new();
        for tests in built {
            let names = tests.ignored_for(wanted)?;
            if !names.is_empty() {
                eprintln!("{}: {}", tests.name, names.join(", "));
                jobs.push(self.job(tests, [vec!["--exact".to_owned()], names].concat(), with));
            }
        }
        ensure!(!jobs.is_empty(), "no test is for the lab");
        Ok(jobs)
    }

    fn job(&self, tests: &Tests, mut arguments: Vec<String>, with: &[PathBuf]) -> Job {
        // One after the other: a name is printed before its test runs, so a test that hangs is known by name.
        let ordinary = ["--include-ignored", "--test-threads=1"].map(str::to_owned);
        arguments.extend(ordinary);
        arguments.extend(self.arguments.iter().cloned());
        Job {
            program: tests.program.clone(),
            arguments,
            environment: self.environment(),
            directory: tests.directory.clone(),
            programs: [&tests.programs, with].concat(),
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        vec![("MEMFERRY_LAB".to_owned(), self.kernel.clone())]
    }

    fn programs(&self) -> Result<Vec<PathBuf>> {
        let find = |name: &String| {
            let known: Vec<_> = KNOWN
                .into_iter()
                .filter(|known| known.program == name)
                .collect();
            packages::ensure(&known)?;
            let path = PathBuf::from(name);
            match command::find(name) {
                Some(found) => Ok(found),
                None if path.is_file() => Ok(path.canonicalize()?),
                None => bail!("there is no program {name}"),
            }
        };
        self.with.iter().map(find).collect()
    }
}

fn shell(programs: Vec<PathBuf>) -> Job {
    // A session of its own, with the port as its terminal: so that Ctrl-C reaches what runs there.
    let script = "echo 'the lab; leave with exit'; exec setsid -c sh";
    Job {
        programs,
        directory: image::workspace(),
        ..Job::script(script)
    }
}
