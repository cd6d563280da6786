//! The workspace's programs and tests, as cargo builds them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command;
use crate::image;

/// A program that holds tests.
#[derive(Debug, Clone)]
pub struct Tests {
    /// Where it is.
    pub program: PathBuf,
    /// The name of its target: that of the library for unit tests.
    pub name: String,
    /// The directory of that package, in which cargo runs it.
    pub directory: PathBuf,
    /// The programs of that package, which integration tests may run.
    pub programs: Vec<PathBuf>,
}

/// Compiling everything on two busy processors.
const BUILD_LIMIT: Duration = Duration::from_secs(1500);
const QUESTION_LIMIT: Duration = Duration::from_secs(60);

/// Builds all tests of the workspace, and the programs that they run; `arguments` are more of cargo's own, for example
/// `--release`.
///
/// # Errors
/// If something does not compile.
pub fn build_all(arguments: &[&str]) -> Result<Vec<Tests>> {
    build(&[&["--workspace", "--lib", "--bins", "--tests"], arguments].concat())
}

/// Builds the tests of one target: the library of this name, else the integration test. `package` says whose, where
/// several have one.
///
/// # Errors
/// If there is none, or more than one, or it does not compile.
pub fn build_one(name: &str, package: Option<&str>, arguments: &[&str]) -> Result<Tests> {
    let mut question = cargo();
    question.args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata = command::output(&mut question, QUESTION_LIMIT)?;
    let all = targets(&serde_json::from_str(&metadata).context("cargo metadata")?);
    let of_package = |target: &&Target| package.is_none_or(|package| target.package == package);
    let found: Vec<_> = all
        .iter()
        .filter(|target| target.name == name)
        .filter(of_package)
        .collect();
    let target = match found[..] {
        [one] => one,
        [] => {
            let names: BTreeSet<_> = all.iter().map(|target| target.name.as_str()).collect();
            bail!("no tests named {name}; there are {names:?}")
        }
        _ => bail!("more than one package has tests named {name}: say which with --package"),
    };
    let which = match target.kind.as_str() {
        "lib" => vec!["--lib"],
        _ => vec!["--test", name],
    };
    let which = [&["--package", &target.package][..], &which, arguments].concat();
    build(&which)?
        .into_iter()
        .find(|tests| tests.name == name)
        .with_context(|| format!("cargo built no tests named {name}"))
}

fn build(arguments: &[&str]) -> Result<Vec<Tests>> {
    let mut build = cargo();
    build
        .args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .args(arguments);
    Ok(read(&command::output(&mut build, BUILD_LIMIT)?))
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(image::workspace());
    cargo
}

/// What can be tested, by name.
struct Target {
    name: String,
    kind: String,
    package: String,
}

fn targets(metadata: &Value) -> Vec<Target> {
    let list = |value: &Value, name: &str| value[name].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut targets = Vec::new();
    for package in list(metadata, "packages") {
        for target in list(&package, "targets") {
            let kind = text(&target["kind"][0]);
            if kind == "lib" || kind == "test" {
                targets.push(Target {
                    name: text(&target["name"]),
                    kind,
                    package: text(&package["name"]),
                });
            }
        }
    }
    targets
}

impl Tests {
    /// The names of its tests that are ignored for a reason that `wanted` accepts. The program tells what is ignored, and
    /// its source why.
    ///
    /// # Errors
    /// If the program does not run here, or a source cannot be read.
    pub fn ignored_for(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let mut listing = Command::new(&self.program);
        listing
            .args(["--ignored", "--list", "--format", "terse"])
            .current_dir(&self.directory);
        let listed = command::output(&mut listing, QUESTION_LIMIT)?;
        let mut functions = BTreeSet::new();
        sources(&self.directory, &mut |source| {
            functions.extend(
                ignored(source)
                    .filter(|(reason, _)| wanted(reason))
                    .map(|(_, name)| name.to_owned()),
            );
        })?;
        let names = listed
            .lines()
            .filter_map(|line| line.strip_suffix(": test"));
        let is_wanted = |name: &&str| functions.contains(name.rsplit("::").next().unwrap_or(name));
        Ok(names.filter(is_wanted).map(str::to_owned).collect())
    }
}

/// The tests in what cargo said.
fn read(messages: &str) -> Vec<Tests> {
    let messages: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let built = messages
        .iter()
        .filter_map(|message| Some((message, message["executable"].as_str()?)));
    let of = |message: &Value| message["manifest_path"].as_str().map(str::to_owned);
    let is_test = |message: &Value| message["profile"]["test"] == true;
    let tests = built.clone().filter(|(message, _)| is_test(message));
    tests
        .filter_map(|(message, program)| {
            let manifest = PathBuf::from(of(message)?);
            let programs = built
                .clone()
                .filter(|(other, _)| !is_test(other) && of(other) == of(message));
            Some(Tests {
                program: program.into(),
                name: message["target"]["name"].as_str()?.to_owned(),
                directory: manifest.parent()?.to_owned(),
                programs: programs.map(|(_, program)| program.into()).collect(),
            })
        })
        .collect()
}

/// Every source of a package, those of packages inside of it too.
fn sources(directory: &Path, read: &mut impl FnMut(&str)) -> Result<()> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, read)?;
        } else if name.ends_with(".rs") {
            read(&std::fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// The reasons in a source for which tests are ignored, each with the name of its function.
fn ignored(source: &str) -> impl Iterator<Item = (&str, &str)> {
    // Spelled so that this line is none.
    let attribute = concat!("#[", "ignore = \"");
    source.match_indices(attribute).filter_map(move |(at, _)| {
        let (reason, rest) = source[at + attribute.len()..].split_once("\"]")?;
        let (_, rest) = rest.split_once("fn ")?;
        Some((reason, rest.split(['(', '<']).next()?.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_test_is_found_with_its_name() {
        let source = concat!(
            "#[test]\n#[",
            "ignore = \"kernel: needs nbd\"]\nfn a_device_appears() {}\n#[test]\nfn another() {}\n#[",
            "ignore = \"measurement\"]\n    #[test]\nfn how_fast() {}"
        );
        let found: Vec<_> = ignored(source).collect();
        assert_eq!(
            found,
            [
                ("kernel: needs nbd", "a_device_appears"),
                ("measurement", "how_fast")
            ]
        );
    }

    #[test]
    fn a_test_has_the_programs_of_its_own_package() {
        let line = |test: bool, package: &str, name: &str| {
            format!(
                r#"{{"manifest_path":"/w/{package}/Cargo.toml","target":{{"name":"{name}"}},"profile":{{"test":{test}}},"executable":"/t/{name}"}}"#
            )
        };
        let said = [
            line(true, "ferry", "it"),
            line(false, "ferry", "memferry"),
            line(false, "guests", "demo"),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let tests = read(&said.join("\n"));
        let [it] = &tests[..] else {
            panic!("{tests:?}")
        };
        assert_eq!(
            (it.name.as_str(), it.directory.as_path()),
            ("it", Path::new("/w/ferry"))
        );
        assert_eq!(it.programs, [PathBuf::from("/t/memferry")]);
    }
}
