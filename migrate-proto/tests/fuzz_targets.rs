//! Every fuzz target on stable: over its corpus, and over some thousands of inputs that were made from it.

/// The targets themselves, which are a crate of their own for `cargo fuzz`.
#[path = "../fuzz/src/lib.rs"]
pub mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use targets::TARGETS;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

/// The committed inputs of `target`, in the order of their names.
fn inputs(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir(corpus(target))
        .expect("every target has a corpus")
        .map(|entry| entry.expect("the corpus can be read").path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).expect("the corpus can be read"))
        .collect()
}

/// Xorshift, seeded by the target and the number of the input.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).expect("below 256")
    }

    /// What a fuzzer does to an input, without its feedback.
    fn mutate(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut input = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(6) {
            let at = self.below(input.len() + 1);
            match self.below(5) {
                0 => input.insert(at, self.byte()),
                1 if at < input.len() => {
                    input.remove(at);
                }
                2 => input.truncate(at),
                3 => {
                    let other = &inputs[self.below(inputs.len())];
                    let from = self.below(other.len() + 1);
                    input.extend_from_slice(&other[from..]);
                }
                _ if at < input.len() => {
                    let edge = [0, 1, 0x7F, 0x80, 0xFF, self.byte()];
                    input[at] = edge[self.below(edge.len())];
                }
                _ => {}
            }
        }
        input.truncate(4096);
        input
    }
}

fn run(name: &str, target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        println!("{name} fails on {input:02x?}");
        resume_unwind(panic);
    }
}

#[test]
fn no_input_of_the_corpus_breaks_a_target() {
    for (name, target) in TARGETS {
        for input in inputs(name) {
            run(name, target, &input);
        }
    }
}

#[test]
fn no_input_that_is_made_from_the_corpus_breaks_a_target() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        for seed in 1..=4000 {
            let mut chance = Chance(seed * 0x9E37_79B9 + name.len() as u64);
            run(name, target, &chance.mutate(&inputs));
        }
    }
}

/// The seeds are made by the encoder: `MEMFERRY_WRITE_CORPUS=1` writes them anew.
#[test]
fn the_corpus_holds_what_the_encoder_writes() {
    let write = std::env::var_os("MEMFERRY_WRITE_CORPUS").is_some();
    for (target, name, bytes) in seeds() {
        let path = corpus(target).join(name);
        if write {
            std::fs::create_dir_all(corpus(target)).expect("a folder");
            std::fs::write(&path, &bytes).expect("a file");
        }
        let committed = std::fs::read(&path).unwrap_or_default();
        assert_eq!(committed, bytes, "{}", path.display());
    }
}

/// Each recorded frame of version 1 is an input, whole and as the body of its message; and the ways through a session.
fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let recorded = include_str!("../src/tests/recorded.rs");
    let lines = recorded.lines().map(str::trim);
    for (n, line) in lines
        .filter(|line| line.starts_with('"') && line.ends_with("\","))
        .enumerate()
    {
        let digits = line.trim_matches(['"', ',']);
        let frame: Vec<u8> = (0..digits.len() / 2)
            .map(|at| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).expect("hex"))
            .collect();
        let (tag, body) = (frame[0], &frame[16..]);
        let name = format!("recorded-{n:02}");
        seeds.push(("message", name.clone(), [&[tag], body].concat()));
        match tag {
            1 => seeds.push(("hello", name.clone(), body.to_vec())),
            5 => {
                let space = 33_334_u16.to_le_bytes();
                seeds.push(("dirty_page", name.clone(), [&space, body].concat()));
            }
            _ => {}
        }
        seeds.push(("frame", name, frame));
    }
    assert!(seeds.len() > 40, "the recorded bytes are found");
    let mut session = |target, name: &str, steps: &[&[u8]]| {
        seeds.push((target, name.to_string(), steps.concat()));
    };
    // Flags, then operations with their arguments; see the targets.
    let push = [
        [19_u8, 0, 21].repeat(26),
        vec![19, 1, 21, 2, 0, 255, 2, 1, 255, 2, 2, 255],
    ]
    .concat();
    let greeted: &[u8] = &[0, 0, 1, 100, 20, 12, 1, 0, 60];
    let dirty: &[u8] = &[13, 1, 3, 4, 22, 14, 1, 9, 1, 22];
    let saved: &[u8] = &[15, 0, 0, 7, 1, 20, 2, 22];
    let owned: &[u8] = &[4, 22, 5, 3, 3, 1, 20, 21];
    for (name, flags) in [
        ("auto", 0_u8),
        ("pre-copy", 16),
        ("post-copy", 32),
        ("verified", 34),
        ("after", 36),
        ("slow", 128),
    ] {
        let (before, after): (&[u8], &[u8]) = match flags & 6 {
            2 => (&[7, 0, 8, 16, 70, 0, 22], &[6, 22]),
            4 => (&[], &[6, 7, 0, 8, 16, 70, 0, 22]),
            _ => (&[], &[6, 22]),
        };
        let steps = [
            &[flags],
            greeted,
            &push,
            dirty,
            &push,
            saved,
            &push,
            &[22],
            before,
            owned,
            &push,
            after,
        ];
        session("seeder_ops", name, &steps);
    }
    let keeping: &[u8] = &[
        0, 48, 1, 100, 20, 24, 25, 0, 9, 12, 1, 0, 60, 25, 12, 40, 26,
    ];
    let asked: &[u8] = &[13, 1, 3, 4, 27, 1, 27, 0];
    let steps = [
        &[48 + 64],
        keeping,
        &push,
        asked,
        &push,
        saved,
        &push,
        owned,
    ];
    session("seeder_ops", "keep", &steps);
    session("seeder_ops", "dry-run", &[&[8], &[0, 8, 1, 1, 9, 17, 22]]);
    let greeted: &[u8] = &[0, 1, 18];
    let chunks: &[u8] = &[2, 1, 1, 0, 2, 0, 0, 40, 1, 41, 29, 0, 3, 1, 18];
    let last: &[u8] = &[2, 2, 1, 0, 1, 0, 40, 1, 0, 3, 2, 18];
    let round: &[u8] = &[4, 1, 1, 5, 3, 5, 1, 3, 6, 15, 6, 17];
    let loaded: &[u8] = &[7, 9, 0, 0, 4, 2, 1, 6, 1, 5, 2, 1, 8, 0];
    let digests: &[u8] = &[9, 10, 70, 0];
    let owned: &[u8] = &[
        11, 18, 12, 13, 18, 2, 0, 1, 2, 1, 0, 5, 3, 0, 3, 0, 14, 18, 9, 10, 1, 0, 20, 3,
    ];
    for (name, flags) in [("off", 0_u8), ("before", 2), ("after", 4)] {
        let steps = [&[0, 0, flags], &greeted[1..], chunks, last, round, loaded];
        let end: &[&[u8]] = if flags == 2 {
            &[digests, owned]
        } else {
            &[owned]
        };
        session("leecher_ops", name, &[&steps[..], end].concat());
    }
    let keeping: &[u8] = &[
        22, 0, 30, 24, 2, 1, 1, 0, 1, 3, 0, 20, 0, 3, 1, 25, 4, 23, 18,
    ];
    let steps = [
        &[16 + 32 + 64 + 4, 0, 48 + 4],
        &greeted[2..],
        &[1, 18],
        keeping,
    ];
    session(
        "leecher_ops",
        "keep",
        &[&steps[..], &[round, loaded, owned]].concat(),
    );
    session("leecher_ops", "dry-run", &[&[0, 0, 8, 1, 18, 20, 2, 20, 3]]);
    seeds
}
