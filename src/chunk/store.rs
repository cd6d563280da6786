//! Whole chunks by number.

use std::fmt::Debug;
use std::io;

use super::{ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize};

/// Whole chunks by number, where nothing smaller can be read or written: files of a directory, keys of a database, objects of a store.
///
/// Calls take batches, so that a medium with round trips has many under way at once; one that is asynchronous runs a batch's
/// requests together on a runtime of its own and returns when all have been answered. All methods may be called from any
/// thread at any time and may block, but none for ever. What was never put is *missing*, which is not the same as being zero: the caller
/// decides what it means.
pub trait ChunkStore: Debug + Send + Sync {
    /// The size of a chunk.
    fn chunk_size(&self) -> ChunkSize;

    /// The length of all chunks in bytes; if it is no multiple of the chunk size, the last chunk is short.
    fn len(&self) -> u64;

    /// Whether there are no chunks at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads chunks. Calls `found` once for each, in any order, with its place in `chunks` and its bytes, all of them, or `None` if it is missing.
    ///
    /// # Errors
    /// What the medium says; `found` may have been called for some. [`io::ErrorKind::UnexpectedEof`] for a chunk that does not exist, and
    /// [`io::ErrorKind::InvalidData`] if the medium holds a chunk of another length.
    fn get(
        &self,
        chunks: &[ChunkIndex],
        found: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()>;

    /// Writes chunks, each as long as it is. A reader at the same time sees a chunk old or new, never a mixture.
    ///
    /// # Errors
    /// What the medium says; some may have been written. [`io::ErrorKind::InvalidInput`] for bytes of another length.
    fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()>;

    /// Makes chunks missing. One that is missing already is no error.
    ///
    /// # Errors
    /// What the medium says; some may have been removed.
    fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()>;

    /// The chunks of `within` that are not missing. The set's space is all chunks.
    ///
    /// # Errors
    /// What the medium says.
    fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap>;

    /// Returns when everything that was put before is durable.
    ///
    /// # Errors
    /// What the medium says; nothing put since the last good flush may be taken as durable then.
    fn flush(&self) -> io::Result<()>;
}
