//! Rules that hold for every file of the workspace.

use crate::sources::{self, Source};

/// A file beyond this many lines is read by nobody from top to bottom, and has come to hold more than one concept.
/// Most are at 150 to 450.
const LONGEST: usize = 700;

/// Files that are longer, and how long they may be. A number goes down and never up; a file that is no longer longer
/// leaves the list.
const TOO_LONG: [(&str, usize); 2] = [
    // Each is one state machine; its data has types of its own already.
    ("migrate-proto/src/leecher.rs", 782),
    ("migrate-proto/src/seeder.rs", 759),
];

fn rust() -> Vec<Source> {
    sources::below("", &[".rs"])
}

#[test]
fn no_file_is_too_long_to_be_read() {
    for source in rust() {
        let lines = source.text.lines().count();
        let listed = TOO_LONG.iter().find(|(path, _)| *path == source.path);
        let most = listed.map_or(LONGEST, |(_, most)| *most);
        assert!(
            lines <= most,
            "{} has {lines} lines, {most} at most: split it",
            source.path
        );
        assert!(
            listed.is_none() || lines > LONGEST,
            "{} has {lines} lines: take it off the list",
            source.path
        );
    }
}

#[test]
fn a_test_that_is_left_out_says_what_it_needs() {
    let kinds = [
        "privileged: needs ",
        "guest: needs ",
        "kvm: needs ",
        "kernel: needs ",
        "foreign: needs ",
    ];
    // Spelled so that this line is none.
    let ignore = concat!("#[", "ignore");
    for source in rust() {
        for line in source.text.lines().map(str::trim) {
            let Some(rest) = line.strip_prefix(ignore) else {
                continue;
            };
            let reason = rest
                .strip_prefix(" = \"")
                .and_then(|reason| reason.strip_suffix("\"]"))
                .unwrap_or_default();
            assert!(
                reason == "measurement" || kinds.iter().any(|kind| reason.starts_with(kind)),
                "{}: {line}: begin with one of {kinds:?}, or say \"measurement\"",
                source.path
            );
        }
    }
}

#[test]
fn a_suppressed_lint_says_why() {
    for source in rust() {
        let code = source.code();
        for word in ["allow(", "expect("] {
            for (at, _) in code.match_indices(word) {
                let before = code[..at].trim_end();
                if !before.ends_with("#[") && !before.ends_with("#![") {
                    continue;
                }
                let attribute = code[at..].split(")]").next().unwrap_or_default();
                assert!(
                    attribute.contains("reason"),
                    "{}, line {}: give a reason",
                    source.path,
                    before.lines().count()
                );
            }
        }
    }
}

#[test]
fn nothing_names_a_place_of_one_machine() {
    // Spelled so that this file is none of those that name them.
    let places = ["work", "root", "home", "Users"].map(|folder| format!("/{folder}/"));
    for source in sources::below("", &[".rs", ".toml", ".md", ".sh"]) {
        for place in &places {
            let at = source.text.find(place.as_str());
            let line = at.map(|at| source.text[..at].lines().count());
            assert_eq!(
                line, None,
                "{} names {place}, which other machines do not have",
                source.path
            );
        }
    }
}
