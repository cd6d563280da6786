//! Which modules of a kernel to load, in which order.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::kernel::Kernel;

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The modules of these names and those that they depend on, each after what it needs. Names that the kernel has no
/// module of are left out: it may have them built in, or be too old; a test that needs one sees that it is not there.
pub(super) fn load(kernel: &Kernel, names: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    find(&kernel.modules, &mut files)
        .with_context(|| format!("the modules in {}", kernel.modules.display()))?;
    let mut loaded = Vec::new();
    for name in names {
        add(name, &files, &mut loaded)?;
    }
    Ok(loaded)
}

/// Module files by name, with `_` for `-`: the kernel means the same by both.
fn find(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some((name, _)) = file_name(&path).split_once(".ko") {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn add(name: &str, files: &HashMap<String, PathBuf>, loaded: &mut Vec<Module>) -> Result<()> {
    let Some(path) = files.get(&name.replace('-', "_")) else {
        return Ok(());
    };
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let content = read(path).with_context(|| format!("the module {}", path.display()))?;
    for needed in depends(&content) {
        add(&needed, files, loaded)?;
    }
    loaded.push(Module {
        name: name.to_owned(),
        content,
    });
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if !file_name(path).ends_with(".xz") {
        return Ok(fs::read(path)?);
    }
    // A file, no pipe: the answer cannot block behind the question.
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .stdin(Stdio::from(fs::File::open(path)?))
        .output()
        .context("cannot start xz (Debian: apt-get install xz-utils)")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// What a module says of itself: `depends=a,b` among strings that end with a zero.
fn depends(content: &[u8]) -> Vec<String> {
    let key = b"depends=";
    let said = content
        .split(|&byte| byte == 0)
        .find_map(|text| text.strip_prefix(key));
    String::from_utf8_lossy(said.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_what_it_depends_on_and_once() {
        let modules = tempfile::tempdir().unwrap();
        let below = modules.path().join("kernel/net");
        fs::create_dir_all(&below).unwrap();
        for (file, needs) in [
            ("vsock_loopback.ko", "vmw-common,vsock"),
            ("vmw-common.ko", "vsock"),
            ("vsock.ko", ""),
        ] {
            fs::write(
                below.join(file),
                format!("\x7fELF\0alias=x\0depends={needs}\0"),
            )
            .unwrap();
        }
        let kernel = Kernel {
            release: "6.12".to_owned(),
            image: PathBuf::new(),
            modules: modules.path().to_owned(),
        };
        let loaded = load(&kernel, &["vsock_loopback", "vsock", "built_in"]).unwrap();
        let names: Vec<_> = loaded.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["vsock", "vmw-common", "vsock_loopback"]);
    }
}
