//! Two trackers as one.

use std::io;

use super::DirtyTracker;
use crate::chunk::ChunkBitmap;

/// Names what either of two trackers names: for memory that is written in two ways, each seen by one of them.
///
/// Both must be of the same region and chunk size.
#[derive(Debug)]
pub struct Union<A, B>(
    /// One of them; chunks that are put back go here.
    pub A,
    /// The other.
    pub B,
);

impl<A: DirtyTracker, B: DirtyTracker> DirtyTracker for Union<A, B> {
    fn start(&self) -> io::Result<()> {
        self.0.start()?;
        self.1.start().inspect_err(|_| {
            // Why the second did not start is what the caller has to know.
            let _ = self.0.stop();
        })
    }

    fn take(&self) -> io::Result<ChunkBitmap> {
        let mut taken = self.0.take()?;
        match self.1.take() {
            Ok(others) => {
                taken.union_with(&others);
                Ok(taken)
            }
            Err(error) => {
                self.0.restore(&taken)?;
                Err(error)
            }
        }
    }

    fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
        self.0.restore(chunks)
    }

    fn stop(&self) -> io::Result<()> {
        let (one, other) = (self.0.stop(), self.1.stop());
        one.and(other)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Names what was put into it; fails when it is told to.
    #[derive(Debug, Default)]
    struct Scripted {
        dirty: Mutex<Vec<u64>>,
        fails: bool,
    }

    impl DirtyTracker for Scripted {
        fn start(&self) -> io::Result<()> {
            Ok(())
        }

        fn take(&self) -> io::Result<ChunkBitmap> {
            if self.fails {
                return Err(io::Error::other("told to"));
            }
            let mut taken = ChunkBitmap::empty(10);
            for chunk in self.dirty.lock().unwrap().drain(..) {
                taken.insert(chunk);
            }
            Ok(taken)
        }

        fn restore(&self, chunks: &ChunkBitmap) -> io::Result<()> {
            let mut dirty = self.dirty.lock().unwrap();
            dirty.extend(chunks.runs().flat_map(|run| run.range()));
            Ok(())
        }

        fn stop(&self) -> io::Result<()> {
            if self.fails {
                return Err(io::Error::other("told to"));
            }
            self.dirty.lock().unwrap().clear();
            Ok(())
        }
    }

    fn scripted(dirty: &[u64], fails: bool) -> Scripted {
        Scripted {
            dirty: Mutex::new(dirty.to_vec()),
            fails,
        }
    }

    #[test]
    fn a_take_names_what_either_names() {
        let union = Union(scripted(&[1, 2], false), scripted(&[2, 7], false));
        let taken = union.take().unwrap();
        assert_eq!(taken.count(), 3);
        union.restore(&taken).unwrap();
        assert_eq!(union.take().unwrap(), taken);
    }

    #[test]
    fn what_one_named_is_kept_when_the_other_fails() {
        let union = Union(scripted(&[1, 2], false), scripted(&[], true));
        assert!(union.take().is_err());
        assert_eq!(union.0.take().unwrap().count(), 2);
    }

    #[test]
    fn both_are_stopped_even_if_one_fails() {
        let union = Union(scripted(&[], true), scripted(&[1], false));
        assert!(union.stop().is_err());
        assert!(union.1.take().unwrap().is_empty());
    }
}
