//! A storage and how a program sees it, let go of in the right order.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::managed::{CloseError, Managed};
use crate::backend::nbd::DoubtfulWrites;
use crate::chunk::{Ranges, Storage};
use crate::frontend::Slice;
#[cfg(feature = "nbd-device")]
use crate::frontend::nbd::{DetachError, Device};
#[cfg(feature = "fuse")]
use crate::frontend::{FuseFile, FuseUnmountError};

/// How a program sees a storage: as a file, a device or memory.
pub trait FrontEnd: Debug {
    /// Brings everything that programs have written to the storage, and flushes that.
    ///
    /// # Errors
    /// What the front end or the storage says; something may not be saved.
    fn sync(&self) -> io::Result<()>;

    /// Brings everything to the storage and takes it away from the programs: when this has returned, nothing reads or writes any more.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if programs use it until `deadline`; it goes on being served after any error.
    fn let_go(&mut self, deadline: Duration) -> io::Result<()>;
}

/// A storage that a mount shows.
pub trait Mounted: Storage {
    /// Makes everything that was written durable where it is kept.
    ///
    /// # Errors
    /// What the storage says.
    fn sync(&self) -> io::Result<()> {
        self.flush()
    }

    /// As [`sync`](Self::sync), for the last time: nothing is written afterwards.
    ///
    /// # Errors
    /// See [`CloseError`].
    fn close(&self, deadline: Duration) -> Result<(), CloseError>;
}

impl Mounted for Managed {
    fn sync(&self) -> io::Result<()> {
        self.sync()
    }

    fn close(&self, deadline: Duration) -> Result<(), CloseError> {
        self.close(deadline)
    }
}

/// A storage that is mounted as it is: what is read comes from it every time, and what is written goes to it at once.
///
/// What a flush could not make durable is remembered until it is written again: the storage says it once, and not at the end any more.
#[derive(Debug)]
pub struct Direct {
    storage: Arc<dyn Storage>,
    written: Mutex<Written>,
}

/// What came by way of a direct mount.
#[derive(Debug, Default)]
struct Written {
    /// And no flush has begun since.
    unflushed: Ranges,
    /// And a flush has failed since.
    doubtful: Ranges,
    /// How many flushes have failed.
    failures: u64,
}

impl Written {
    /// Says how many flushes have failed.
    fn add(&mut self, range: Range<u64>) -> u64 {
        self.unflushed.add(range);
        self.failures
    }
}

impl Direct {
    /// Mounts `storage` as it is.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self {
            storage,
            written: Mutex::default(),
        }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        // A set of ranges is right, or too large, after each of its steps.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `range` by `write`.
    fn write(&self, range: Range<u64>, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Before and after: a flush meanwhile may cover it or not.
        let failures = self.written().add(range.clone());
        write()?;
        let mut written = self.written();
        if written.add(range.clone()) == failures {
            written.doubtful.remove(range);
        }
        Ok(())
    }
}

impl Storage for Direct {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        // What reaches beyond the end is refused below.
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.write(range, || self.storage.write_all_at(buf, offset))
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.write(range.clone(), || self.storage.zero(range))
    }

    fn flush(&self) -> io::Result<()> {
        // Before the flush: what is written during it may not be covered by it.
        let unflushed = std::mem::take(&mut self.written().unflushed);
        self.storage.flush().inspect_err(|error| {
            let mut written = self.written();
            written.failures += 1;
            let doubtful = &mut written.doubtful;
            match named(error) {
                Some(ranges) => ranges.iter().for_each(|range| doubtful.add(range.clone())),
                None => doubtful.extend(unflushed),
            }
        })
    }

    fn data_ranges(&self, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.storage.data_ranges(within)
    }

    fn read_ahead_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_ahead_at(buf, offset)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        self.storage.is_at_hand(range)
    }
}

impl Mounted for Direct {
    /// Flushes, once: nothing here knows the bytes that a second attempt would need.
    fn close(&self, _deadline: Duration) -> Result<(), CloseError> {
        let flushed = self.flush();
        let ranges = self.written().doubtful.to_vec(self.len());
        match flushed {
            Err(source) => Err(CloseError::Lost { ranges, source }),
            Ok(()) if ranges.is_empty() => Ok(()),
            Ok(()) => {
                let source =
                    io::Error::other("a flush has failed, and they were not written again since");
                Err(CloseError::Lost { ranges, source })
            }
        }
    }
}

/// Which writes a flush says it has failed for, if it knows.
fn named(error: &io::Error) -> Option<&[Range<u64>]> {
    let doubtful = error.get_ref()?.downcast_ref::<DoubtfulWrites>()?;
    Some(&doubtful.ranges)
}

/// A storage and a front end that shows it.
///
/// Dropped, it takes the front end away and saves what that has; what a [`Managed`] has not pushed is lost then.
/// [`close`](Self::close) says if anything is.
#[derive(Debug)]
pub struct Mount<F, S> {
    /// Gone once programs have let go of it. Before the storage, so that it is dropped first.
    front_end: Option<F>,
    storage: Arc<S>,
}

/// Why a mount was not closed, or what was lost.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// The front end could not be taken away: it goes on being served, and closing can be tried again.
    #[error("the mount is still there: {0}")]
    InUse(#[source] io::Error),
    /// The front end is gone, and the storage did not close well.
    #[error(transparent)]
    Close(#[from] CloseError),
}

impl<F: FrontEnd, S: Mounted + 'static> Mount<F, S> {
    /// Shows `storage` by the front end that `show` makes of it.
    ///
    /// # Errors
    /// What `show` says.
    pub fn new<E>(
        storage: S,
        show: impl FnOnce(Arc<dyn Storage>) -> Result<F, E>,
    ) -> Result<Self, E> {
        let storage = Arc::new(storage);
        Ok(Self {
            front_end: Some(show(Arc::clone(&storage) as _)?),
            storage,
        })
    }

    /// How programs see it; `None` once it was taken away.
    #[must_use]
    pub fn front_end(&self) -> Option<&F> {
        self.front_end.as_ref()
    }

    /// What they see.
    #[must_use]
    pub fn storage(&self) -> &Arc<S> {
        &self.storage
    }

    /// Returns when everything is durable that programs had written before, whatever the kernel had cached of it.
    ///
    /// # Errors
    /// What the front end or the storage says; something may not be saved.
    pub fn sync(&self) -> io::Result<()> {
        if let Some(front_end) = &self.front_end {
            front_end.sync()?;
        }
        Mounted::sync(&*self.storage)
    }

    /// Takes the front end away, then saves everything and closes the storage. Neither takes longer than what is left of `deadline`.
    ///
    /// # Errors
    /// [`UnmountError::InUse`] if programs do not let go; [`UnmountError::Close`] with what is lost.
    pub fn close(&mut self, deadline: Duration) -> Result<(), UnmountError> {
        let until = Instant::now() + deadline;
        if let Some(front_end) = &mut self.front_end {
            front_end.let_go(deadline).map_err(UnmountError::InUse)?;
            self.front_end = None;
        }
        let left = until.saturating_duration_since(Instant::now());
        Ok(self.storage.close(left)?)
    }
}

#[cfg(feature = "fuse")]
impl FrontEnd for FuseFile {
    fn sync(&self) -> io::Result<()> {
        self.sync()
    }

    /// Does not wait for programs that have it open.
    fn let_go(&mut self, _deadline: Duration) -> io::Result<()> {
        self.unmount().map_err(|error| {
            let kind = match &error {
                FuseUnmountError::Busy { .. } => io::ErrorKind::ResourceBusy,
                FuseUnmountError::Failed { source, .. } => source.kind(),
            };
            io::Error::new(kind, error)
        })
    }
}

#[cfg(feature = "nbd-device")]
impl FrontEnd for Device {
    fn sync(&self) -> io::Result<()> {
        self.sync()
    }

    fn let_go(&mut self, deadline: Duration) -> io::Result<()> {
        let detached = self.detach(deadline);
        let Err(error) = detached else { return Ok(()) };
        let kind = match &error {
            // An earlier attempt got as far.
            DetachError::Detached { .. } => return Ok(()),
            DetachError::Busy { .. } | DetachError::Lingers { .. } => io::ErrorKind::ResourceBusy,
            DetachError::Unsaved { source, .. } | DetachError::Disconnect { source, .. } => {
                source.kind()
            }
        };
        Err(io::Error::new(kind, error))
    }
}

impl FrontEnd for Slice {
    fn sync(&self) -> io::Result<()> {
        self.sync()
    }

    /// Whoever borrows the memory borrows the mount, which is closed by its owner: nobody uses it.
    fn let_go(&mut self, _deadline: Duration) -> io::Result<()> {
        (*self).sync()
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::super::options::{ManagedOptions, Push};
    use super::*;
    use crate::backend::MemoryStorage;
    use crate::chunk::{Fault, Faulty, Operation};

    const LONG: Duration = Duration::from_secs(20);

    /// Keeps one write until it is synced, as a page cache does.
    #[derive(Debug)]
    struct Cache {
        storage: Arc<dyn Storage>,
        kept: Mutex<Option<u8>>,
        in_use: bool,
    }

    impl FrontEnd for Cache {
        fn sync(&self) -> io::Result<()> {
            if let Some(byte) = self.kept.lock().unwrap().take() {
                self.storage.write_all_at(&[byte], 0)?;
            }
            self.storage.flush()
        }

        fn let_go(&mut self, _: Duration) -> io::Result<()> {
            if std::mem::take(&mut self.in_use) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.sync()
        }
    }

    fn cache(storage: Arc<dyn Storage>) -> io::Result<Cache> {
        Ok(Cache {
            storage,
            kept: Mutex::new(Some(7)),
            in_use: true,
        })
    }

    fn managed(remote: Arc<dyn Storage>) -> Managed {
        let local = Arc::new(MemoryStorage::new(remote.len()));
        let options = ManagedOptions {
            push: Push::OnFlush,
            ..ManagedOptions::default()
        };
        Managed::open(remote, local, &options).unwrap()
    }

    fn first_byte(storage: &dyn Storage) -> u8 {
        let mut byte = [0];
        storage.read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    }

    #[test]
    fn what_a_front_end_has_cached_is_saved_by_a_sync() {
        let remote = Arc::new(MemoryStorage::new(10_000));
        let mount = Mount::new(managed(remote.clone()), cache).unwrap();
        mount.sync().unwrap();
        assert_eq!(first_byte(&*remote), 7);
    }

    #[test]
    fn a_mount_that_is_in_use_stays_and_can_be_closed_later() {
        let remote = Arc::new(MemoryStorage::new(10_000));
        let mut mount = Mount::new(managed(remote.clone()), cache).unwrap();
        assert!(matches!(mount.close(LONG), Err(UnmountError::InUse(_))));
        mount.storage().write_all_at(&[1], 5000).unwrap();
        assert_eq!(first_byte(&*remote), 0);
        mount.close(LONG).unwrap();
        assert!(mount.front_end().is_none());
        assert_eq!(first_byte(&*remote), 7);
        mount.close(LONG).unwrap();
    }

    #[test]
    fn a_direct_mount_whose_flush_fails_says_that_something_is_lost() {
        let faulty = Faulty::new(Arc::new(MemoryStorage::new(10_000)));
        let faults = faulty.faults();
        let mut mount = Mount::new(Direct::new(Arc::new(faulty)), |storage| {
            Ok::<_, io::Error>(Cache {
                storage,
                kept: Mutex::default(),
                in_use: false,
            })
        })
        .unwrap();
        faults.add(
            Fault::error(io::ErrorKind::Other)
                .on(Operation::Flush)
                .after(1),
        );
        assert!(matches!(
            mount.close(LONG),
            Err(UnmountError::Close(CloseError::Lost { .. }))
        ));
    }

    #[test]
    fn what_an_earlier_flush_has_failed_for_is_lost_at_the_end_unless_it_was_written_again() {
        let faulty = Faulty::new(Arc::new(MemoryStorage::new(10_000)));
        let faults = faulty.faults();
        let direct = Direct::new(Arc::new(faulty));
        direct.write_all_at(&[1; 100], 50).unwrap();
        direct.flush().unwrap();
        direct.write_all_at(&[1; 100], 1000).unwrap();
        faults.add(
            Fault::error(io::ErrorKind::Other)
                .on(Operation::Flush)
                .times(1),
        );
        direct.flush().unwrap_err();
        direct.write_all_at(&[1; 40], 1000).unwrap();
        let Err(CloseError::Lost { ranges, .. }) = direct.close(LONG) else {
            panic!("it was not told");
        };
        assert_eq!((ranges.len(), ranges[0].clone()), (1, 1040..1100));
        direct.zero(1000..1100).unwrap();
        direct.close(LONG).unwrap();
    }

    crate::chunk::conformance::storage_conformance!(|len| {
        Arc::new(Direct::new(Arc::new(MemoryStorage::new(len)))) as _
    });
}
