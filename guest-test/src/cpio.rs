//! The archive that a Linux kernel unpacks as its first file system: cpio in the `newc` format.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// Writes one archive, entry by entry; a directory comes before what is in it.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    sink: W,
    written: usize,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(sink: W) -> Self {
        Self {
            sink,
            written: 0,
            entries: 0,
        }
    }

    /// Adds a directory; `name` has no leading slash.
    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// Adds a file that may be run.
    pub(crate) fn program(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, content)
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, LINK, target.as_bytes())
    }

    /// Writes the end of the archive and yields what it was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.sink.flush()?;
        Ok(self.sink)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::other(format!("{name} does not fit into a cpio archive"));
        let length = u32::try_from(content.len()).map_err(too_long)?;
        let name_length = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.entries += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), device of a node (2), name length, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            0,
            0,
            name_length,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(content)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.sink.write_all(bytes)
    }

    /// Names and contents begin at multiples of four.
    fn align(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_begins_at_a_multiple_of_four() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.program("init", b"seven b").unwrap();
        let bytes = archive.finish().unwrap();
        let headers: Vec<usize> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, window)| window == b"070701")
            .map(|(position, _)| position)
            .collect();
        assert_eq!(headers.len(), 3);
        assert!(
            headers.iter().all(|position| position % 4 == 0),
            "{headers:?}"
        );
    }
}
