//! A seeder, a leecher, a virtual link between them, and two virtual machines' memories: everything that an engine
//! does, in an order that chance decides.
//!
//! After every step the invariants of a session are checked; see [`Pair::check`].

mod check;
mod origin;
mod target;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use std::println;

use super::chance::Chance;
use super::destination::Destination;
use super::link::{Lane, Payload};
use super::source::Source;
use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkSize, RegionDescriptor};
use crate::converge::{Budget, Micros, PostCopy};
use crate::error::{AbortCode, ProtocolError};
use crate::handover::Token;
use crate::hello::{Hello, Role, VERSIONS, Verify, capability};
use crate::leecher::{self, Leecher, LeecherConfig, Part, ZERO_DIGEST};
use crate::message::Chunks;
use crate::seeder::{self, Batch, Seeder, SeederConfig};

/// What a session is made of.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) regions: Vec<u64>,
    pub(super) lanes: u8,
    pub(super) window: u64,
    pub(super) batch: u32,
    pub(super) bandwidth: Option<u64>,
    pub(super) post_copy: PostCopy,
    pub(super) leecher_post_copy: bool,
    pub(super) verify: Verify,
    pub(super) dry_run: bool,
    pub(super) downtime: Micros,
    /// Whether the seeder and the leecher can keep what the leecher has.
    pub(super) keep: (bool, bool),
    /// Whether one of them waits to be asked for the cut-over, and when that is.
    pub(super) hold: Option<(Role, u64)>,
    /// The guest writes once in so many steps.
    pub(super) writes: u64,
    /// The slowest frame, in microseconds.
    pub(super) delay: u64,
    pub(super) twice: Option<u64>,
    pub(super) silence: Micros,
    pub(super) trouble: Trouble,
    /// The steps of the trouble count from here.
    pub(super) moment: Moment,
}

/// When trouble begins to brew: the interesting moments are short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Start,
    Suspending,
    Suspended,
    Loading,
    Ready,
    Released,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    Nothing,
    /// The link is cut at this step; each side hears of it after so many steps more, or never.
    Cut {
        step: u64,
        seeder: Option<u64>,
        leecher: Option<u64>,
    },
    /// A byte is damaged at this step, in a lane that chance picks.
    Damage {
        step: u64,
    },
    /// The user cancels.
    Cancel {
        step: u64,
        at: Role,
    },
}

/// How a side ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    Done,
    Aborted(ProtocolError),
    Undecided,
    Lost { missing: u64, running: bool },
}

/// A frame of chunks that a lane of the leecher works on.
#[derive(Debug)]
enum Receiving {
    /// Admitted later: its round has not begun.
    Waiting(Chunks, Payload),
    /// The payload is read next.
    Admitted(Chunks, Payload, Vec<Part>, bool),
    /// The bytes are in place; the leecher is told next.
    Written(Chunks, Vec<Part>),
}

pub(super) struct Pair {
    pub(super) now: Micros,
    pub(super) chance: Chance,
    pub(super) plan: Plan,
    pub(super) step: u64,
    trace: bool,
    /// The step at which the plan's moment came.
    moment: Option<u64>,

    pub(super) seeder: Seeder,
    pub(super) source: Source,
    todo: VecDeque<seeder::Event>,
    /// Steps until the state that is being saved is complete.
    saving: Option<u64>,
    state_sent: u64,
    filling: Vec<Option<Batch>>,
    digests: Vec<u64>,
    /// What the leecher has offered.
    offers: BTreeMap<u64, u64>,
    pub(super) kept: u64,
    pub(super) released: bool,
    pub(super) releases: u32,
    pub(super) seeder_end: Option<End>,
    pub(super) restored: ChunkBitmap,
    started: bool,

    pub(super) leecher: Leecher,
    pub(super) destination: Destination,
    /// What the thread at the destination works on; it polls the next event when this one is done.
    obeying: Option<leecher::Event>,
    /// The next chunk to be offered.
    offering: Option<u64>,
    loading: Option<u64>,
    /// Load was asked for: from here on nobody may see anything stale.
    settled: bool,
    receiving: Vec<Option<Receiving>>,
    pub(super) leecher_end: Option<End>,
    pub(super) verdict: Option<(u64, u64)>,
    last_write: u64,

    /// To the leecher: control, urgent, bulk lanes.
    pub(super) down: Vec<Lane>,
    /// To the seeder: control, urgent.
    pub(super) up: Vec<Lane>,
}

/// A window of one chunk over the slowest link takes 60 000 steps for six rounds; what takes so many will never end.
const HANGS: u64 = 250_000;

const CONTROL: usize = 0;
const URGENT: usize = 1;

fn hello(plan: &Plan, role: Role) -> Hello {
    let (seeder, leecher) = plan.keep;
    let keeps = if role == Role::Seeder {
        seeder
    } else {
        leecher
    };
    let holds = role == Role::Leecher && plan.hold.is_some_and(|(who, _)| who == role);
    Hello {
        oldest: VERSIONS.0,
        newest: VERSIONS.1,
        required: if holds { capability::CUT_OVER } else { 0 },
        optional: capability::CUT_OVER | if keeps { capability::KEEP } else { 0 },
        role,
        chunk_size: ChunkSize::PAGE,
        regions: (0..)
            .zip(&plan.regions)
            .map(|(index, &len)| RegionDescriptor {
                name: format!("ram{index}"),
                len,
            })
            .collect(),
        post_copy: role == Role::Seeder || plan.leecher_post_copy,
        verify: plan.verify,
        dry_run: plan.dry_run && role == Role::Seeder,
        kind: "test".into(),
        attributes: vec![("pages".into(), "4096".into())],
    }
}

pub(super) fn chunks_of(plan: &Plan) -> u64 {
    hello(plan, Role::Seeder).layout().unwrap().chunks()
}

fn digest(content: u64) -> u64 {
    if content == 0 {
        ZERO_DIGEST
    } else {
        crate::chunk_digest(&content.to_le_bytes())
    }
}

impl Pair {
    pub(super) fn new(plan: Plan, source: Source, mut chance: Chance, trace: bool) -> Self {
        let now = Micros(chance.below(1_000_000));
        let seeder = Seeder::new(
            now,
            SeederConfig {
                hello: hello(&plan, Role::Seeder),
                budget: Budget {
                    downtime: plan.downtime,
                    post_copy: plan.post_copy,
                    rounds: 6,
                },
                bandwidth: plan.bandwidth,
                batch: plan.batch,
                lanes: plan.lanes,
                token: Token([7; 16]),
                fixed_blackout: Micros(100),
                silence: plan.silence,
                hold: plan.hold.is_some_and(|(who, _)| who == Role::Seeder),
            },
        );
        let leecher = Leecher::new(
            now,
            LeecherConfig {
                hello: hello(&plan, Role::Leecher),
                window: plan.window,
                lanes: plan.lanes,
                silence: plan.silence,
                key: [9; 32],
            },
        );
        let destination = Destination::new(&source, &mut chance, 3);
        let mut lane = || {
            let mut lane = Lane::new(chance.below(plan.delay + 1));
            lane.twice = plan.twice;
            lane
        };
        let bulk = usize::from(plan.lanes);
        let down: Vec<_> = (0..bulk + 2).map(|_| lane()).collect();
        let up = vec![lane(), lane()];
        let chunks = source.chunks();
        Self {
            now,
            step: 0,
            trace,
            moment: None,
            seeder,
            todo: VecDeque::new(),
            saving: None,
            state_sent: 0,
            filling: vec![None; bulk + 1],
            digests: vec![0; usize::try_from(chunks).unwrap()],
            offers: BTreeMap::new(),
            kept: 0,
            released: false,
            releases: 0,
            seeder_end: None,
            restored: ChunkBitmap::empty(chunks),
            started: false,
            leecher,
            destination,
            obeying: None,
            offering: None,
            loading: None,
            settled: false,
            receiving: (0..=bulk).map(|_| None).collect(),
            leecher_end: None,
            verdict: None,
            last_write: 1 << 40,
            down,
            up,
            source,
            chance,
            plan,
        }
    }

    fn log(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>6} {:>10} {}", self.step, self.now.0, what());
        }
    }

    /// Runs the session to its end.
    pub(super) fn run(&mut self) {
        while !self.is_over() {
            self.advance();
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.seeder_end.is_some()
            && self.leecher_end.is_some()
            && self.todo.is_empty()
            && self.obeying.is_none()
    }

    /// A little time passes, and whoever may do something does so, or not.
    pub(super) fn advance(&mut self) {
        self.step += 1;
        assert!(
            self.step < HANGS,
            "the session hangs: seeder {} {:?}, leecher {} {:?}, {} chunks missing",
            self.seeder.phase(),
            self.seeder_end,
            self.leecher.phase(),
            self.leecher_end,
            self.leecher.missing()
        );
        self.now = self.now.plus(Micros(self.chance.below(60)));
        self.make_trouble();
        self.ask_for_the_cut_over();
        if self.source.running && self.chance.one_in(self.plan.writes) {
            self.source.write_somewhere(&mut self.chance);
        }
        self.drive_source();
        self.carry_down();
        self.drive_destination();
        self.carry_up();
        self.keep_time();
        self.check();
    }

    /// Whoever may be asked does not mind which side does.
    fn ask_for_the_cut_over(&mut self) {
        let Some((_, step)) = self.plan.hold else {
            return;
        };
        if self.step == step {
            assert!(
                self.seeder.is_held()
                    || self.seeder.agreement().is_none_or(|a| a.dry_run)
                    || self.is_over()
            );
            if self.chance.one_in(2) {
                self.seeder.cut_over(self.now);
            } else {
                self.leecher.cut_over();
            }
        } else if self.step < step {
            let decided = ["suspending", "suspended", "released"];
            assert!(!decided.contains(&self.seeder.phase()), "nobody asked");
        }
    }

    fn make_trouble(&mut self) {
        let fail = |side: &str| (AbortCode::Failed, format!("the lanes of the {side} broke"));
        let came = match self.plan.moment {
            Moment::Start => true,
            Moment::Suspending => self.seeder.phase() == "suspending",
            Moment::Suspended => self.seeder.phase() == "suspended",
            Moment::Loading => self.loading.is_some(),
            Moment::Ready => self.leecher.phase() == "ready",
            Moment::Released => self.released,
        };
        if self.moment.is_none() && came {
            self.moment = Some(self.step);
        }
        let Some(passed) = self.moment.map(|moment| self.step - moment) else {
            return;
        };
        match self.plan.trouble {
            Trouble::Nothing => {}
            Trouble::Cut {
                step,
                seeder,
                leecher,
            } => {
                if passed == step {
                    self.log(|| "the link is cut".into());
                    self.down.iter_mut().chain(&mut self.up).for_each(Lane::cut);
                }
                if seeder.is_some_and(|later| passed == step + later) {
                    let (code, reason) = fail("seeder");
                    self.seeder.abort(code, reason);
                }
                if leecher.is_some_and(|later| passed == step + later) {
                    let (code, reason) = fail("leecher");
                    self.leecher.abort(code, reason);
                }
            }
            Trouble::Damage { step } => {
                if passed == step {
                    let lanes = (self.down.len() + self.up.len()) as u64;
                    let lane = usize::try_from(self.chance.below(lanes)).unwrap();
                    let (down, up) = (&mut self.down, &mut self.up);
                    let lane = down.iter_mut().chain(up).nth(lane).unwrap();
                    lane.damage = true;
                }
            }
            Trouble::Cancel { step, at } => {
                if passed == step {
                    self.log(|| format!("the user cancels at the {at:?}"));
                    match at {
                        Role::Seeder => self.seeder.abort(AbortCode::Cancelled, "enough".into()),
                        Role::Leecher => {
                            self.leecher.abort(AbortCode::Cancelled, "enough".into());
                        }
                    }
                }
            }
        }
    }

    fn keep_time(&mut self) {
        if self
            .seeder
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.seeder.handle_timeout(self.now);
        }
        if self
            .leecher
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.leecher.handle_timeout(self.now);
        }
    }
}
