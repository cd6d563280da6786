//! Two sides without a link: a directed test carries each message by hand.

use alloc::vec;
use alloc::vec::Vec;

use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkRun, ChunkSize, RegionDescriptor};
use crate::converge::{Budget, Micros, PostCopy};
use crate::handover::Token;
use crate::hello::{Hello, Role, VERSIONS, Verify};
use crate::leecher::{self, Admission, Leecher, LeecherConfig, Part};
use crate::message::{Chunks, Content, Message, Run};
use crate::seeder::{self, Batch, Seeder, SeederConfig};

/// How many chunks a rig has.
pub(super) const CHUNKS: u64 = 10;
pub(super) const SILENCE: Micros = Micros::from_millis(1000);

pub(super) struct Rig {
    pub(super) now: Micros,
    pub(super) seeder: Seeder,
    pub(super) leecher: Leecher,
}

/// What a rig may differ in.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    pub(super) verify: Verify,
    pub(super) dry_run: bool,
    pub(super) post_copy: PostCopy,
    /// Capabilities of both sides.
    pub(super) optional: u64,
}

pub(super) fn hello(role: Role, options: Options) -> Hello {
    Hello {
        oldest: VERSIONS.0,
        newest: VERSIONS.1,
        required: 0,
        optional: options.optional,
        role,
        chunk_size: ChunkSize::PAGE,
        regions: vec![RegionDescriptor {
            name: "ram".into(),
            len: CHUNKS * 4096,
        }],
        post_copy: true,
        verify: options.verify,
        dry_run: options.dry_run,
        kind: "test".into(),
        attributes: Vec::new(),
    }
}

pub(super) fn seeder_with(hello: Hello, post_copy: PostCopy) -> Seeder {
    Seeder::new(
        Micros(0),
        SeederConfig {
            hello,
            budget: Budget {
                post_copy,
                ..Budget::default()
            },
            bandwidth: None,
            batch: 1 << 20,
            lanes: 1,
            token: Token([3; 16]),
            fixed_blackout: Micros(0),
            silence: SILENCE,
            hold: false,
        },
    )
}

pub(super) fn leecher_with(hello: Hello) -> Leecher {
    Leecher::new(
        Micros(0),
        LeecherConfig {
            hello,
            window: 1 << 20,
            lanes: 1,
            silence: SILENCE,
            key: [4; 32],
        },
    )
}

pub(super) fn set(chunks: &[u64]) -> ChunkBitmap {
    let mut set = ChunkBitmap::empty(CHUNKS);
    for &chunk in chunks {
        set.insert(chunk);
    }
    set
}

/// The frame of a batch whose chunks all hold data.
pub(super) fn frame(batch: &Batch) -> (Chunks, u64) {
    let runs = batch.runs.iter().map(|&run| Run {
        run,
        content: Content::Data,
    });
    let mut chunks = Chunks {
        sequence: batch.sequence,
        round: batch.round,
        runs: runs.collect(),
        digests: Vec::new(),
    };
    let count = chunks.data_chunks();
    chunks.digests = (0..count).map(|_| 9).collect();
    (chunks, count * 4096)
}

/// The chunks that are to be installed.
pub(super) fn wanted(parts: &[Part]) -> Vec<u64> {
    let wanted = parts.iter().filter(|part| part.install);
    wanted.flat_map(|part| part.run.range()).collect()
}

impl Rig {
    pub(super) fn new(options: Options) -> Self {
        let seeder = seeder_with(hello(Role::Seeder, options), options.post_copy);
        let leecher = leecher_with(Hello {
            dry_run: false,
            ..hello(Role::Leecher, options)
        });
        Self {
            now: Micros(0),
            seeder,
            leecher,
        }
    }

    /// The session has begun; the seeder waits to be started.
    pub(super) fn greeted(options: Options) -> Self {
        let mut rig = Self::new(options);
        rig.talk();
        assert_eq!(rig.leecher_events(), [leecher::Event::Prepare]);
        rig.leecher.handle_prepared();
        rig.talk();
        assert_eq!(rig.seeder_events(), [seeder::Event::Start]);
        rig
    }

    /// All chunks were sent once; the seeder waits for a dirty set.
    pub(super) fn prefetched(options: Options) -> Self {
        let mut rig = Self::greeted(options);
        rig.seeder
            .handle_started(rig.now, &ChunkBitmap::full(CHUNKS));
        rig.push();
        assert_eq!(rig.seeder_events(), [seeder::Event::Take]);
        rig
    }

    /// The guest is suspended for post-copy, `dirty` is remote.
    pub(super) fn finalized(verify: Verify, dirty: &[u64]) -> Self {
        let mut rig = Self::prefetched(Options {
            verify,
            post_copy: PostCopy::Always,
            ..Options::default()
        });
        rig.seeder.handle_dirty(rig.now, set(dirty));
        assert!(matches!(
            rig.seeder_events()[..],
            [seeder::Event::Suspend { .. }]
        ));
        rig.seeder.handle_suspended(rig.now, &set(&[]));
        rig.talk();
        let remote = set(dirty);
        assert_eq!(rig.leecher_events(), [leecher::Event::Finalize { remote }]);
        rig
    }

    /// The leecher is ready, and its Ready waits in its queue.
    pub(super) fn loaded(dirty: &[u64]) -> Self {
        let mut rig = Self::finalized(Verify::Off, dirty);
        rig.seeder.handle_saved(rig.now, 0, 0, set(&[]));
        rig.talk();
        let load = leecher::Event::Load { len: 0, digest: 0 };
        assert_eq!(rig.leecher_events(), [load]);
        rig.leecher.handle_loaded();
        rig
    }

    /// Carries every message of the control lanes; returns the names of the seeder's.
    pub(super) fn talk(&mut self) -> Vec<&'static str> {
        let mut said = Vec::new();
        loop {
            let (down, up) = (self.seeder.poll_message(), self.leecher.poll_message());
            if let Some(message) = &down {
                said.push(message.name());
            }
            if down.is_none() && up.is_none() {
                return said;
            }
            if let Some(message) = down {
                self.leecher.handle_message(self.now, message).unwrap();
            }
            if let Some(message) = up {
                self.seeder.handle_message(self.now, message).unwrap();
            }
        }
    }

    /// Carries all fetches.
    pub(super) fn ask(&mut self) -> Vec<ChunkRun> {
        let mut asked = Vec::new();
        while let Some(message) = self.leecher.poll_urgent() {
            if let Message::Fetch { run } = message {
                asked.push(run);
            }
            self.seeder.handle_message(self.now, message).unwrap();
        }
        asked
    }

    /// Sends and installs whatever the bulk lane has.
    pub(super) fn push(&mut self) {
        self.talk();
        while let Some(batch) = self.seeder.poll_batch(self.now, 1).unwrap() {
            let (chunks, payload) = frame(&batch);
            self.seeder.handle_filled(self.now, &batch, payload);
            self.install(1, &chunks, payload);
        }
        self.talk();
    }

    pub(super) fn admit(&mut self, lane: u8, chunks: &Chunks, payload: u64) -> Admission {
        self.leecher.admit(self.now, lane, chunks, payload).unwrap()
    }

    pub(super) fn install(&mut self, lane: u8, chunks: &Chunks, payload: u64) -> Vec<u64> {
        let Admission::Install { parts, .. } = self.admit(lane, chunks, payload) else {
            panic!("not admitted");
        };
        self.leecher.handle_installed(lane, chunks, &parts);
        wanted(&parts)
    }

    pub(super) fn seeder_events(&mut self) -> Vec<seeder::Event> {
        core::iter::from_fn(|| self.seeder.poll_event()).collect()
    }

    pub(super) fn leecher_events(&mut self) -> Vec<leecher::Event> {
        core::iter::from_fn(|| self.leecher.poll_event()).collect()
    }
}
