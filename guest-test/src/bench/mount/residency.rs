//! What a mount remembers of each chunk.

use std::fs;

use anyhow::{Context, Result};
use memferry::chunk::Residency;

/// So many that what else happens in this process is no matter: a tebibyte in pages.
const CHUNKS: u64 = 1 << 28;
const PAGE: u64 = 4096;

/// How much more memory this process has when a region of a tebibyte has come, in bits a chunk.
pub(super) fn bits_a_chunk() -> Result<f64> {
    let before = resident()?;
    let residency = Residency::new(CHUNKS);
    residency.fill(residency.all_chunks()).done();
    let grown = resident()?.saturating_sub(before);
    drop(residency);
    #[expect(clippy::cast_precision_loss, reason = "a figure to read")]
    let bits = (grown * 8) as f64 / CHUNKS as f64;
    Ok(bits)
}

/// What this process has in memory, in bytes.
fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/statm")?;
    let pages = status
        .split_whitespace()
        .nth(1)
        .context("/proc/self/statm")?;
    Ok(pages.parse::<u64>()? * PAGE)
}
