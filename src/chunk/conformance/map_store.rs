//! The plainest store: what layers over chunks are tried on.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chunk::{ChunkBitmap, ChunkIndex, ChunkRun, ChunkSize, ChunkStore};

/// Chunks in a map; counts what it is asked for.
#[derive(Debug)]
pub struct MapStore {
    chunk_size: ChunkSize,
    len: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    chunks: BTreeMap<u64, Vec<u8>>,
    calls: Calls,
}

/// What a [`MapStore`] was asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// Calls of `get`.
    pub gets: u64,
    /// Chunks in all of them.
    pub got: u64,
    /// Calls of `put`.
    pub puts: u64,
    /// Chunks in all of them.
    pub put: u64,
    /// Calls of `remove`.
    pub removes: u64,
}

impl MapStore {
    /// `len` bytes in chunks of `chunk_size`, all missing.
    #[must_use]
    pub fn new(chunk_size: ChunkSize, len: u64) -> Self {
        Self {
            chunk_size,
            len,
            state: Mutex::default(),
        }
    }

    /// What it was asked for since the last time.
    #[must_use]
    pub fn calls(&self) -> Calls {
        std::mem::take(&mut self.state().calls)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of the caller's `found` has changed nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long `chunk` is; an error if it does not exist.
    fn len_of(&self, chunk: ChunkIndex) -> io::Result<u64> {
        let size = u64::from(self.chunk_size.bytes());
        if chunk.0 >= self.chunk_size.chunks_in(self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(size.min(self.len - chunk.0 * size))
    }
}

impl ChunkStore for MapStore {
    fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn get(
        &self,
        chunks: &[ChunkIndex],
        found: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut state = self.state();
        state.calls.gets += 1;
        state.calls.got += chunks.len() as u64;
        for (place, &chunk) in chunks.iter().enumerate() {
            self.len_of(chunk)?;
            found(place, state.chunks.get(&chunk.0).map(|bytes| &bytes[..]));
        }
        Ok(())
    }

    fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()> {
        let mut state = self.state();
        state.calls.puts += 1;
        state.calls.put += chunks.len() as u64;
        for &(chunk, bytes) in chunks {
            if bytes.len() as u64 != self.len_of(chunk)? {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            state.chunks.insert(chunk.0, bytes.to_vec());
        }
        Ok(())
    }

    fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        let mut state = self.state();
        state.calls.removes += 1;
        for chunk in chunks {
            state.chunks.remove(&chunk.0);
        }
        Ok(())
    }

    fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap> {
        let mut present = ChunkBitmap::empty(self.chunk_size.chunks_in(self.len));
        let end = within.start.0.saturating_add(within.count);
        for (&chunk, _) in self.state().chunks.range(within.start.0..end) {
            present.insert(chunk);
        }
        Ok(present)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    crate::chunk::conformance::store_conformance!(|chunk_size, len| {
        Arc::new(MapStore::new(chunk_size, len)) as _
    });
}
