//! The layers of `src/`: which module may use which, and what belongs to one of them alone.
//!
//! This table and the picture in `docs/architecture.md` are the same. A new arrow is a decision: write it down first.

use std::collections::BTreeSet;

use crate::sources::{self, Source};

/// What may be used inside this crate by the code of a module, and besides by its tests.
struct Layer {
    name: &'static str,
    uses: &'static [&'static str],
    tests_use: &'static [&'static str],
}

const fn layer(name: &'static str, uses: &'static [&'static str]) -> Layer {
    Layer {
        name,
        uses,
        tests_use: &[],
    }
}

/// From the bottom up. `migrate_proto` is the crate of the protocol.
const LAYERS: [Layer; 12] = [
    // What is unsafe depends on nothing, so that it can be audited alone.
    layer("sys", &[]),
    // What is said to a network block device; both ends of it are built on this.
    layer("nbd", &[]),
    Layer {
        name: "chunk",
        uses: &["migrate_proto"],
        // A layer of the pipeline is tried over a storage in memory.
        tests_use: &["backend"],
    },
    layer("attach", &["sys"]),
    layer("backend", &["chunk", "nbd", "sys"]),
    Layer {
        name: "dirty",
        uses: &["chunk", "sys"],
        // A tracker is tried on a storage.
        tests_use: &["backend"],
    },
    // A front end shows what is kept somewhere: a guest's RAM is a file that is written and punched.
    layer("frontend", &["backend", "chunk", "nbd", "sys"]),
    layer("subject", &["attach"]),
    layer("transport", &["migrate_proto"]),
    // `sys`, because the device state is kept in a memfd while it comes in.
    Layer {
        name: "migrate",
        uses: &[
            "chunk",
            "dirty",
            "migrate_proto",
            "subject",
            "sys",
            "transport",
        ],
        // A region is tried on a storage.
        tests_use: &["backend"],
    },
    // A mount joins a back end and a front end.
    layer("mount", &["backend", "chunk", "dirty", "frontend", "sys"]),
    // The command is outside of the library: it uses its public interface, and its own modules.
    layer("bin", &["*"]),
];

/// The files of `src/NAME/`, and `src/NAME.rs`.
fn files_of(name: &str) -> Vec<Source> {
    let own = format!("src/{name}/");
    let file = format!("src/{name}.rs");
    sources::below("src", &[".rs"])
        .into_iter()
        .filter(|source| source.path.starts_with(&own) || source.path == file)
        .collect()
}

fn is_of_a_name(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// The places in `code` where `word` is a word of its own.
fn places_of<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let (before, after) = (&code[..at], &code[at + word.len()..]);
            !before.ends_with(is_of_a_name) && !after.starts_with(is_of_a_name)
        })
}

/// The words that follow `crate::`, those of a group included, and `migrate_proto` where that is used.
fn words_after_crate(code: &str) -> BTreeSet<String> {
    let name = |text: &str| -> String { text.chars().take_while(|&c| is_of_a_name(c)).collect() };
    let mut words = BTreeSet::new();
    for at in places_of(code, "crate") {
        let Some(path) = code[at + "crate".len()..].trim_start().strip_prefix("::") else {
            continue;
        };
        let path = path.trim_start();
        let Some(group) = path.strip_prefix('{') else {
            words.insert(name(path));
            continue;
        };
        let mut depth = 0;
        let mut part = String::new();
        for letter in group.chars() {
            match letter {
                '}' if depth == 0 => break,
                ',' if depth == 0 => {
                    words.insert(name(part.trim()));
                    part.clear();
                    continue;
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            part.push(letter);
        }
        words.insert(name(part.trim()));
    }
    if places_of(code, "migrate_proto").next().is_some() {
        words.insert("migrate_proto".to_owned());
    }
    words.remove("");
    words
}

/// The longest chain of `super::` in `code`.
fn longest_climb(code: &str) -> usize {
    places_of(code, "super")
        .map(|at| {
            let mut rest = &code[at..];
            let mut steps = 0;
            while let Some(more) = rest.strip_prefix("super::") {
                steps += 1;
                rest = more;
            }
            steps
        })
        .max()
        .unwrap_or(0)
}

/// How many modules lie between the root of the crate and a file.
fn depth_of(path: &str) -> usize {
    let folders = path.split('/').skip(1).count();
    if path.ends_with("/mod.rs") {
        folders - 1
    } else {
        folders
    }
}

#[test]
fn every_module_uses_only_those_below_it() {
    let mut wrong = Vec::new();
    for layer in &LAYERS {
        for source in files_of(layer.name) {
            let may = |word: &str, tests: bool| {
                word == layer.name
                    || layer.uses.contains(&"*")
                    || layer.uses.contains(&word)
                    || (tests && layer.tests_use.contains(&word))
            };
            for (code, tests) in [(source.production(), false), (source.tests(), true)] {
                let words = words_after_crate(&code);
                for word in words.iter().filter(|word| !may(word, tests)) {
                    wrong.push(format!("{}: {} → {word}", source.path, layer.name));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "arrows that are not in the table of tests/it/layers.rs:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_module_is_in_the_table() {
    let mut modules: BTreeSet<String> = sources::below("src", &[".rs"])
        .iter()
        .filter_map(|source| source.path.strip_prefix("src/"))
        .filter_map(|path| path.split(['/', '.']).next())
        .map(str::to_owned)
        .collect();
    modules.remove("lib");
    let table = LAYERS.iter().map(|layer| layer.name.to_owned()).collect();
    assert_eq!(modules, table);
}

#[test]
fn the_table_has_no_circle() {
    let mut below: Vec<&str> = vec!["migrate_proto"];
    for layer in &LAYERS {
        for used in layer.uses.iter().filter(|&&used| used != "*") {
            assert!(below.contains(used), "{} → {used} goes up", layer.name);
        }
        below.push(layer.name);
    }
}

#[test]
fn no_module_climbs_out_of_its_layer() {
    for layer in &LAYERS {
        for source in files_of(layer.name) {
            // A module of tests in the file is one deeper.
            for (code, more) in [(source.production(), 0), (source.tests(), 1)] {
                assert!(
                    longest_climb(&code) < depth_of(&source.path) + more,
                    "{}: write `crate::…` for what lies outside of {}",
                    source.path,
                    layer.name
                );
            }
        }
    }
}

#[test]
fn unsafe_is_in_sys_alone() {
    // In any crate: a module of that name. Besides: programs that tests attach to make raw system calls, as do the inits of guests.
    let is_sys = |path: &str| path.contains("/sys/") || path.ends_with("/sys.rs");
    let may = [
        "tests/privileged/",
        "guest-test/guests/lab-init/src/",
        "guest-test/guests/page-writer/src/",
    ];
    for source in sources::below("", &[".rs"]) {
        let path = &source.path;
        if is_sys(path) || may.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        let code = source.code();
        let line = places_of(&code, "unsafe")
            .next()
            .map(|at| code[..at].lines().count());
        assert_eq!(line, None, "{path}: unsafe outside of a module sys");
    }
}

#[test]
fn the_protocol_knows_neither_the_standard_library_nor_a_clock() {
    for source in sources::below("migrate-proto/src", &[".rs"]) {
        let mut code = source.production();
        // For its tests.
        if source.path == "migrate-proto/src/lib.rs" {
            code = code.replace("extern crate std;", "");
        }
        for word in ["std", "Instant", "SystemTime"] {
            assert_eq!(
                places_of(&code, word).next(),
                None,
                "{} names {word}",
                source.path
            );
        }
    }
}

#[test]
fn all_words_of_a_group_are_found() {
    let code = "use crate::{attach, chunk::{Place, Storage}, dirty::{self, Union}};\npub(in crate::sys) x: crate::backend::F; recreate::d";
    let words: Vec<String> = words_after_crate(code).into_iter().collect();
    assert_eq!(words, ["attach", "backend", "chunk", "dirty", "sys"]);
}
