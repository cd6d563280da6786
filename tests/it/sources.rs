//! The source files of this workspace, as the tests of its rules read them.

use std::fs;
use std::path::{Path, PathBuf};

/// A file of the workspace.
#[derive(Debug)]
pub(crate) struct Source {
    /// From the root of the workspace, with slashes.
    pub(crate) path: String,
    /// All of it.
    pub(crate) text: String,
}

impl Source {
    /// Without comments, and without what strings say. As many lines as the file has.
    pub(crate) fn code(&self) -> String {
        without_words(&self.text)
    }

    /// [`code`](Self::code) up to the tests at its end; empty if the file is a test.
    pub(crate) fn production(&self) -> String {
        if self.is_test() {
            return String::new();
        }
        let mut code = self.code();
        code.truncate(beginning_of_tests(&code));
        code
    }

    /// What [`production`](Self::production) leaves out.
    pub(crate) fn tests(&self) -> String {
        let code = self.code();
        if self.is_test() {
            return code;
        }
        code[beginning_of_tests(&code)..].to_owned()
    }

    fn is_test(&self) -> bool {
        let mut folders = self.path.split('/');
        let file = folders.next_back();
        file == Some("tests.rs") || folders.any(|folder| folder == "tests")
    }
}

/// Where the workspace is.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of one file of the workspace.
pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file with one of these endings below `folder`, in order; build directories and what begins with a dot are left
/// out.
pub(crate) fn below(folder: &str, endings: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root().join(folder), endings, &mut found);
    assert!(!found.is_empty(), "there is nothing below {folder:?}");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(folder: &Path, endings: &[&str], found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            // A build directory says so in this file.
            let built = path.join("CACHEDIR.TAG").exists() || name == "target";
            if !built && !name.starts_with('.') {
                collect(&path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            let relative = path.strip_prefix(root()).unwrap();
            found.push(Source {
                path: relative.to_string_lossy().into_owned(),
                text: fs::read_to_string(&path).unwrap(),
            });
        }
    }
}

/// Tests come last in a file, in a module of their own.
fn beginning_of_tests(code: &str) -> usize {
    code.find("#[cfg(test)]\nmod tests {").unwrap_or(code.len())
}

/// Blanks comments, strings and characters; knows raw strings, and that a lifetime is no character.
fn without_words(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = word_len(rest, code.chars().next_back());
        let (word, more) = rest.split_at(len.unwrap_or_else(|| first.len_utf8()));
        if len.is_none() {
            code.push_str(word);
        } else {
            code.extend(
                word.chars()
                    .map(|letter| if letter == '\n' { '\n' } else { ' ' }),
            );
        }
        rest = more;
    }
    code
}

/// The length of the comment, string or character that `rest` begins with, if it does.
fn word_len(rest: &str, before: Option<char>) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(rest.find("*/").map_or(rest.len(), |end| end + 2));
    }
    let in_a_name = before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    if !in_a_name && (rest.starts_with("r\"") || rest.starts_with("r#")) {
        let hashes = rest[1..].bytes().take_while(|&byte| byte == b'#').count();
        if rest[1 + hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 2 + hashes;
            let at = rest[body..].find(&end);
            return Some(at.map_or(rest.len(), |at| body + at + end.len()));
        }
        return None;
    }
    match rest.as_bytes() {
        [b'"', ..] => Some(quoted_len(rest, b'"')),
        [b'\'', b'\\', ..] => Some(quoted_len(rest, b'\'')),
        [b'\'', ..] => {
            let mut letters = rest.char_indices().skip(2);
            let (at, letter) = letters.next()?;
            (letter == '\'').then_some(at + 1)
        }
        _ => None,
    }
}

fn quoted_len(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

#[test]
fn what_is_said_is_no_code() {
    let text = "a // unsafe\n\"unsafe \\\" b\" c 'd' '\\'' <'e> r#\"f \" g\"# h";
    let code = without_words(text);
    assert_eq!(code.len(), text.len());
    let words: Vec<&str> = code.split_whitespace().collect();
    assert_eq!(words, ["a", "c", "<'e>", "h"]);
}
