//! What this workspace depends on: each has a reason, a licence that fits, and is not banned.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::sources;

/// The names in a table of the workspace's manifest.
fn named_in_manifest(table: &str) -> BTreeSet<String> {
    let manifest = sources::read("Cargo.toml");
    let (_, rest) = manifest.split_once(&format!("[{table}]\n")).unwrap();
    rest.lines()
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// The words in quotes of a list in `deny.toml`.
fn denied_or_allowed(list: &str) -> Vec<String> {
    let text = sources::read("deny.toml");
    let (_, rest) = text.split_once(&format!("\n{list} = [")).unwrap();
    let (inside, _) = rest.split_once(']').unwrap();
    inside
        .split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Every package that is built on this platform, from cargo.
fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(sources::root())
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{complaint}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let built: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|node| node["id"].as_str())
        .collect();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .filter(|package| built.contains(package["id"].as_str().unwrap()))
        .cloned()
        .collect()
}

/// Whether a licence expression can be satisfied with the licences of `allowed`.
fn fits(expression: &str, allowed: &[String]) -> bool {
    // The old way to write it.
    let expression = expression.replace('/', " OR ");
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    any_of(&mut words, allowed)
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>, allowed: &[String]) -> bool {
    let mut fits = all_of(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        fits |= all_of(words, allowed);
    }
    fits
}

fn all_of(words: &mut Words<'_>, allowed: &[String]) -> bool {
    let mut fits = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        fits &= one(words, allowed);
    }
    fits
}

fn one(words: &mut Words<'_>, allowed: &[String]) -> bool {
    match words.next() {
        Some("(") => {
            let fits = any_of(words, allowed);
            assert_eq!(words.next(), Some(")"));
            fits
        }
        Some(licence) if words.next_if_eq(&"WITH").is_some() => {
            let exception = words.next().unwrap();
            allowed.contains(&format!("{licence} WITH {exception}"))
        }
        licence => allowed
            .iter()
            .any(|allowed| Some(allowed.as_str()) == licence),
    }
}

#[test]
fn every_dependency_has_its_reason_in_the_table() {
    let page = sources::read("docs/dependencies.md");
    let explained: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"))
        .map(|(name, _)| name.to_owned())
        .collect();
    let mut named = named_in_manifest("workspace.dependencies");
    for own in ["memferry", "migrate-proto", "vmm-integration"] {
        named.remove(own);
    }
    assert_eq!(explained, named);
}

#[test]
fn every_licence_is_one_that_deny_toml_allows() {
    let allowed = denied_or_allowed("allow");
    let wrong: Vec<String> = packages()
        .iter()
        .filter(|package| {
            !package["license"]
                .as_str()
                .is_some_and(|licence| fits(licence, &allowed))
        })
        .map(|package| format!("{}: {}", package["name"], package["license"]))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?} need more than {allowed:?}");
}

#[test]
fn nothing_banned_is_in_the_lock_file() {
    let lock = sources::read("Cargo.lock");
    for name in denied_or_allowed("deny") {
        assert!(
            !lock.contains(&format!("name = \"{name}\"\n")),
            "{name} is banned by deny.toml"
        );
    }
}

#[test]
fn everything_comes_from_the_registry() {
    for line in sources::read("Cargo.lock").lines() {
        if let Some(source) = line.strip_prefix("source = ") {
            assert_eq!(
                source,
                "\"registry+https://github.com/rust-lang/crates.io-index\""
            );
        }
    }
}

#[test]
fn licence_expressions_are_read_as_they_are_meant() {
    let allowed = ["MIT".to_owned(), "Zlib".to_owned()];
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-2.0 OR MIT", true),
        ("MIT/Apache-2.0", true),
        ("(GPL-2.0 OR MIT) AND Unicode-3.0", false),
        ("(GPL-2.0 OR MIT) AND Zlib", true),
        ("MIT WITH LLVM-exception", false),
    ] {
        assert_eq!(fits(expression, &allowed), expected, "{expression}");
    }
}
