//! The first file system of the lab: our programs and their libraries at the places that they have here, busybox for all
//! the rest, and the job.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::Job;
use super::modules::Module;
use crate::command;
use crate::cpio::Archive;
use crate::image;
use crate::qemu;

/// What goes into it besides the job.
#[derive(Debug)]
pub(super) struct Plan {
    /// In the order in which they are loaded.
    pub(super) modules: Vec<Module>,
    pub(super) programs: Vec<PathBuf>,
    /// The program has a terminal.
    pub(super) terminal: bool,
}

/// A file system in a directory that goes away with it.
#[derive(Debug)]
pub(super) struct Initramfs {
    pub(super) file: PathBuf,
    pub(super) directory: TempDir,
}

/// Where the host's programs are; those of busybox come after them.
const PATH: [&str; 6] = [
    "/usr/local/bin",
    "/usr/local/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/bin",
    "/sbin",
];
const BUSYBOX: &str = "/bin/busybox";
const BUSYBOX_TOOLS: &str = "/lab/busybox";
const QUESTION_LIMIT: Duration = Duration::from_secs(60);

impl Plan {
    pub(super) fn build(&self, job: &Job) -> Result<Initramfs> {
        let files = closure(&self.programs)?;
        let size = files.iter().map(|file| Ok(fs::metadata(file)?.len()));
        let size = size.sum::<Result<u64>>()?;
        let directory = qemu::directory(size)?;
        let file = directory.path().join("initramfs");
        let mut tree = Tree {
            archive: Archive::new(BufWriter::new(File::create(&file)?)),
            made: BTreeSet::new(),
        };
        for empty in ["proc", "sys", "dev", "tmp", "run", "root"] {
            tree.directory(Path::new(empty))?;
        }
        tree.file("init", &lab_init()?)?;
        tree.busybox()?;
        for file in &files {
            // Read through links, so that every library has its content under each of its names.
            let content = fs::read(file).with_context(|| file.display().to_string())?;
            tree.file(&inside(file), &content)?;
        }
        for module in &self.modules {
            tree.file(&format!("lab/{}.ko", module.name), &module.content)?;
        }
        tree.directory(Path::new(&inside(&job.directory)))?;
        for (name, content) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("etc/group", "root:x:0:\n"),
            ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ] {
            tree.file(name, content.as_bytes())?;
        }
        tree.file("lab/job", &self.write(job)?)?;
        tree.archive.finish()?;
        Ok(Initramfs { file, directory })
    }

    /// The job as `lab-init` reads it.
    fn write(&self, job: &Job) -> Result<Vec<u8>> {
        let text = |path: &Path| {
            path.to_str()
                .map(str::to_owned)
                .context("a path that is no text")
        };
        let mut entries = Vec::new();
        for module in &self.modules {
            entries.push(format!("m/lab/{}.ko", module.name));
        }
        entries.push(format!("w{}", text(&job.program)?));
        entries.extend(job.arguments.iter().map(|argument| format!("w{argument}")));
        entries.push(format!("d{}", text(&job.directory)?));
        let path = job
            .programs
            .iter()
            .filter_map(|program| program.parent()?.to_str());
        let path: BTreeSet<&str> = path.chain(PATH).collect();
        let path: Vec<&str> = path.into_iter().chain([BUSYBOX_TOOLS]).collect();
        let path = path.join(":");
        let ordinary = [
            ("PATH", path.as_str()),
            ("HOME", "/root"),
            ("TERM", "linux"),
            ("RUST_BACKTRACE", "1"),
        ];
        let ordinary = ordinary.map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (name, value) in ordinary.iter().chain(&job.environment) {
            entries.push(format!("e{name}={value}"));
        }
        if self.terminal {
            entries.push("t".to_owned());
        }
        ensure!(
            entries.iter().all(|entry| !entry.contains('\0')),
            "arguments and variables hold no zero"
        );
        Ok(entries.join("\0").into_bytes())
    }
}

fn lab_init() -> Result<Vec<u8>> {
    let cache = image::cache_directory()?;
    let _lock = image::lock(&cache)?;
    image::guest_program(&cache, "lab-init")
}

/// Where a file of the host's is in the archive, which has no leading slashes.
fn inside(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// The programs, the libraries that they load, and the loader.
fn closure(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut files: BTreeSet<PathBuf> = programs.iter().cloned().collect();
    for program in programs {
        // It says so, and fails, where a program is linked statically.
        let Ok(listed) = command::output(Command::new("ldd").arg(program), QUESTION_LIMIT) else {
            continue;
        };
        for line in listed.lines() {
            ensure!(
                !line.contains("not found"),
                "{} needs a library that is not here: {line}",
                program.display()
            );
            // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`
            let place = line.split_whitespace().find(|word| word.starts_with('/'));
            files.extend(place.map(PathBuf::from));
        }
    }
    files.retain(|file| file != Path::new(BUSYBOX));
    Ok(files)
}

/// An archive that makes the directories of what is put into it.
struct Tree {
    archive: Archive<BufWriter<File>>,
    /// Everything that is there.
    made: BTreeSet<String>,
}

impl Tree {
    fn directory(&mut self, path: &Path) -> Result<()> {
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.reverse();
        for directory in above {
            let name = inside(directory);
            if !name.is_empty() && self.made.insert(name.clone()) {
                self.archive.directory(&name)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.directory(Path::new(name).parent().unwrap_or_else(|| Path::new("")))?;
        ensure!(self.made.insert(name.to_owned()), "{name} is there twice");
        self.archive.program(name, content)?;
        Ok(())
    }

    /// The shell and the tools of busybox.
    fn busybox(&mut self) -> Result<()> {
        let busybox = command::find("busybox").context("busybox is missing")?;
        self.file(&inside(Path::new(BUSYBOX)), &fs::read(&busybox)?)?;
        let tools = command::output(Command::new(&busybox).arg("--list"), QUESTION_LIMIT)?;
        self.directory(Path::new(BUSYBOX_TOOLS))?;
        for tool in tools.lines().filter(|tool| !tool.contains("busybox")) {
            let name = inside(&Path::new(BUSYBOX_TOOLS).join(tool));
            self.archive.link(&name, BUSYBOX)?;
        }
        // Scripts say where their shell is.
        self.archive.link("bin/sh", BUSYBOX)?;
        Ok(())
    }
}
