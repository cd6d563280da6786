//! Whether guests run on KVM or by emulation.

use std::fmt;
use std::fs;
use std::io::Write;
use std::time::Duration;

use anyhow::Result;

use crate::image::{Image, cache_directory, replace};
use crate::qemu::{Guest, GuestConfig};

/// How QEMU runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By translation; needs nothing, and is 5 to 20 times slower.
    Tcg,
}

impl Accel {
    /// What QEMU calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `kvm` or `tcg`: decides in place of the probe.
const VARIABLE: &str = "MEMFERRY_ACCEL";
/// On a processor that runs Linux, it boots in well under a second.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// KVM where a Linux kernel really boots on it within ten seconds, else TCG. There are machines whose `/dev/kvm`
/// runs small programs and no Linux, so only booting one tells. The answer is kept in the cache for the host's
/// kernel release.
///
/// # Errors
/// If the image cannot be made or the cache not be written.
pub fn accel() -> Result<Accel> {
    match std::env::var(VARIABLE).as_deref() {
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("tcg") => return Ok(Accel::Tcg),
        _ => {}
    }
    // Without the device there is nothing to ask, and the answer may change when somebody adds it.
    let openable = fs::File::options().read(true).write(true).open("/dev/kvm");
    if openable.is_err() {
        return Ok(Accel::Tcg);
    }
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let answer = cache_directory()?.join(format!("accel-{release}"));
    if let Ok(known) = fs::read_to_string(&answer) {
        return Ok(if known.trim() == "kvm" {
            Accel::Kvm
        } else {
            Accel::Tcg
        });
    }
    let accel = probe(&Image::prepare()?);
    replace(&answer, |mut file| Ok(writeln!(file, "{accel}")?))?;
    Ok(accel)
}

/// Boots a small guest on KVM; never looks at the cache.
#[must_use]
pub fn probe(image: &Image) -> Accel {
    eprintln!("trying whether a guest boots on KVM");
    let config = GuestConfig {
        memory: 256 << 20,
        boot_limit: PROBE_LIMIT,
        ..GuestConfig::new(image.clone(), Accel::Kvm)
    };
    match Guest::boot(&config) {
        Ok(_guest) => Accel::Kvm,
        Err(reason) => {
            let first = reason.to_string();
            eprintln!(
                "it does not ({}): guests are emulated",
                first.lines().next().unwrap_or_default()
            );
            Accel::Tcg
        }
    }
}
