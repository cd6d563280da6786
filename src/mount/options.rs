//! How a managed mount behaves.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::chunk::{ChunkIndex, ChunkSize};

/// How a [`Managed`](super::Managed) mount behaves. The defaults fill a link of 1 Gbit/s at 30 ms.
#[derive(Debug, Clone)]
pub struct ManagedOptions {
    /// The unit of what is here or not. A write of a whole one fetches nothing, so it should be no larger than what programs write: 4 KiB,
    /// the page, which is the default. What is fetched at once does not depend on it.
    pub chunk_size: ChunkSize,
    /// Fetches everything in the background, until all is here.
    pub pull: bool,
    /// Opening returns when everything is here.
    pub pull_first: bool,
    /// What is pulled first; without it, from the beginning to the end. What is being read comes before it in any case.
    pub pull_priority: Option<Priority>,
    /// How many bytes are fetched at once in the background; without it, as many as the link carries in a round trip, measured as it goes.
    pub window: Option<u64>,
    /// Fetches what reads in sequence, or at equal distances, will ask for next.
    pub read_ahead: bool,
    /// When what is written goes to the remote end.
    pub push: Push,
    /// Refuses to write.
    pub read_only: bool,
    /// How long anything waits for what others do: a read for a chunk that is on its way, a flush for a push that makes no
    /// progress. What the remote end itself may take is for it to say.
    pub deadline: Duration,
    /// What is called when.
    pub hooks: Hooks,
}

impl Default for ManagedOptions {
    fn default() -> Self {
        Self {
            chunk_size: ChunkSize::PAGE,
            pull: true,
            pull_first: false,
            pull_priority: None,
            window: None,
            read_ahead: true,
            push: Push::default(),
            read_only: false,
            // As long as programs are patient; longer than a remote end's own deadline, whose error says more.
            deadline: Duration::from_secs(30),
            hooks: Hooks::default(),
        }
    }
}

/// When what is written goes to the remote end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Push {
    /// This long after the last time, and whenever somebody flushes.
    Every(Duration),
    /// When somebody flushes.
    OnFlush,
    /// Never: it stays in the local storage, which is what a flush makes durable.
    Never,
}

impl Default for Push {
    /// Every 20 s.
    fn default() -> Self {
        Self::Every(Duration::from_secs(20))
    }
}

/// The higher the number of a chunk, the sooner it is pulled; of equal ones, the lower chunk.
#[derive(Clone)]
pub struct Priority(Arc<dyn Fn(ChunkIndex) -> i64 + Send + Sync>);

impl Priority {
    /// As `priority` says; it is asked once for every chunk, by a thread of the mount, when pulling begins.
    pub fn new(priority: impl Fn(ChunkIndex) -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(priority))
    }

    pub(super) fn of(&self, chunk: u64) -> i64 {
        (self.0)(ChunkIndex(chunk))
    }
}

impl fmt::Debug for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Priority")
    }
}

/// A hook that can fail.
pub type Hook = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What is called when. An error of a hook aborts what called it.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Before [`sync`](super::Managed::sync) takes what is dirty: whoever keeps bytes that are not written yet writes them now.
    pub before_sync: Option<Hook>,
    /// Once, when [`close`](super::Managed::close) has synced and before nothing can be read or written any more: whoever uses the
    /// mount lets go of it.
    pub before_close: Option<Hook>,
    /// A chunk is here now, fetched or overwritten. Called by the thread that brought it, often a reader: it must not block.
    pub chunk_is_local: Option<Arc<dyn Fn(ChunkIndex) + Send + Sync>>,
}

impl Hooks {
    pub(super) fn call(hook: Option<&Hook>) -> io::Result<()> {
        hook.map_or(Ok(()), |hook| hook())
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("before_sync", &self.before_sync.is_some())
            .field("before_close", &self.before_close.is_some())
            .field("chunk_is_local", &self.chunk_is_local.is_some())
            .finish()
    }
}
