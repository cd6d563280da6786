//! A seeder, a leecher, a virtual link between them, and two virtual machines' memories: everything that an engine
//! does, in an order that chance decides.
//!
//! After every step the invariants of a session are checked; see [`Pair::check`].

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use std::println;

use super::chance::Chance;
use super::destination::{Access, Destination, Seen};
use super::link::{Lane, Payload};
use super::source::Source;
use crate::bitmap::ChunkBitmap;
use crate::chunk::{ChunkRun, ChunkSize, RegionDescriptor};
use crate::converge::{Budget, Micros, PostCopy};
use crate::error::{AbortCode, ProtocolError};
use crate::handover::{Ownership, Token};
use crate::hello::{Hello, Role, VERSIONS, Verify};
use crate::leecher::{self, Admission, Leecher, LeecherConfig, Part, ZERO_DIGEST};
use crate::limits::MAX_RUNS;
use crate::message::{Chunks, Content, Message, Run};
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
    pub(super) released: bool,
    pub(super) releases: u32,
    pub(super) seeder_end: Option<End>,
    pub(super) restored: ChunkBitmap,
    started: bool,

    pub(super) leecher: Leecher,
    pub(super) destination: Destination,
    later: VecDeque<leecher::Event>,
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
    pub(super) payload_bytes: u64,
}

/// A window of one chunk over the slowest link takes 60 000 steps for six rounds; what takes so many will never end.
const HANGS: u64 = 250_000;

const CONTROL: usize = 0;
const URGENT: usize = 1;

fn hello(plan: &Plan, role: Role) -> Hello {
    Hello {
        oldest: VERSIONS.0,
        newest: VERSIONS.1,
        required: 0,
        optional: 0,
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
            },
        );
        let leecher = Leecher::new(
            now,
            LeecherConfig {
                hello: hello(&plan, Role::Leecher),
                window: plan.window,
                lanes: plan.lanes,
                silence: plan.silence,
            },
        );
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
            released: false,
            releases: 0,
            seeder_end: None,
            restored: ChunkBitmap::empty(chunks),
            started: false,
            leecher,
            destination: Destination::new(chunks, 3),
            later: VecDeque::new(),
            loading: None,
            settled: false,
            receiving: (0..=bulk).map(|_| None).collect(),
            leecher_end: None,
            verdict: None,
            last_write: 1 << 40,
            down,
            up,
            payload_bytes: 0,
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
            && self.later.is_empty()
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
                    self.leecher_events();
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
                            self.leecher_events();
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
            self.leecher_events();
        }
    }

    /// What an engine at the source does.
    fn drive_source(&mut self) {
        while let Some(event) = self.seeder.poll_event() {
            self.log(|| format!("seeder: {event:?}"));
            self.todo.push_back(event);
        }
        if self.chance.one_in(3)
            && let Some(event) = self.todo.pop_front()
        {
            self.obey_seeder(event);
        }
        if let Some(steps) = self.saving {
            self.saving = steps.checked_sub(1);
            if steps == 0 {
                self.finish_saving();
            }
        }
        if self.chance.one_in(2) {
            self.send_control_down();
        }
        if self.chance.one_in(2)
            && let Some(batch) = self.seeder.poll_urgent()
        {
            self.fill_and_send(&batch);
        }
        for lane in 1..=self.plan.lanes {
            let slot = usize::from(lane);
            if let Some(batch) = self.filling[slot].take() {
                self.fill_and_send(&batch);
            } else if self.chance.one_in(2)
                && let Ok(Some(batch)) = self.seeder.poll_batch(self.now, lane)
            {
                if self.chance.one_in(2) {
                    self.fill_and_send(&batch);
                } else {
                    self.filling[slot] = Some(batch);
                }
            }
        }
    }

    fn send_control_down(&mut self) {
        while let Some(message) = self.seeder.poll_message() {
            self.log(|| format!("seeder sends {message:?}"));
            if matches!(message, Message::Release { .. }) {
                self.released = true;
                self.releases += 1;
                assert_eq!(self.seeder.ownership(), Ownership::There);
                self.check_hand_over();
            }
            self.down[CONTROL].send(self.now, &mut self.chance, &message, Payload::default());
            if self.chance.one_in(3) {
                break;
            }
        }
    }

    fn obey_seeder(&mut self, event: seeder::Event) {
        match event {
            seeder::Event::Start if self.plan.dry_run => {
                for _ in 0..3 {
                    let payload = Payload {
                        len: 5000,
                        contents: Vec::new(),
                    };
                    let probe = &Message::Probe;
                    self.down[CONTROL].send(self.now, &mut self.chance, probe, payload);
                }
                self.seeder.handle_measured();
            }
            seeder::Event::Start => {
                self.source.dirty.clear();
                self.started = true;
                let present = self.source.present(&mut self.chance);
                self.seeder.handle_started(self.now, &present);
            }
            seeder::Event::Take => {
                let dirty = self.source.take();
                self.seeder.handle_dirty(self.now, dirty);
            }
            seeder::Event::Suspend { .. } => {
                self.source.running = false;
                let dirty = self.source.take();
                self.seeder.handle_suspended(self.now, &dirty);
                self.saving = Some(self.chance.below(40));
            }
            seeder::Event::Released => assert!(self.released),
            seeder::Event::Running => assert!(self.destination.running),
            seeder::Event::Complete => self.check_complete(),
            seeder::Event::Compare => {
                let differ = |chunk: u64, theirs: u64| {
                    theirs != 0 && theirs != digest(self.source.content(chunk))
                };
                let compared = self.digests.iter().filter(|&&theirs| theirs != 0).count() as u64;
                let different = (0..)
                    .zip(&self.digests)
                    .filter(|&(chunk, &theirs)| differ(chunk, theirs))
                    .count() as u64;
                assert_eq!(different, 0, "the copies differ");
                self.seeder.handle_compared(compared, different);
            }
            seeder::Event::Done => {
                assert!(self.seeder_end.is_none());
                self.seeder_end = Some(End::Done);
            }
            seeder::Event::Aborted { error, restore } => {
                assert!(!self.released, "taken back after Release was sent");
                self.restored.union_with(&restore);
                self.source.dirty.union_with(&restore);
                self.source.running = true;
                self.saving = None;
                self.seeder_end.get_or_insert(End::Aborted(error));
                if self.todo.is_empty() {
                    self.check_restored();
                }
            }
            seeder::Event::Lost {
                missing, running, ..
            } => {
                assert!(self.released);
                self.seeder_end = Some(End::Lost { missing, running });
            }
        }
    }

    fn finish_saving(&mut self) {
        for _ in 0..self.chance.below(4) {
            self.source.write_somewhere(&mut self.chance);
        }
        // State follows what was said before it on the control lane.
        while let Some(message) = self.seeder.poll_message() {
            assert!(!matches!(message, Message::Release { .. }));
            self.down[CONTROL].send(self.now, &mut self.chance, &message, Payload::default());
        }
        for _ in 0..self.chance.below(4) {
            let len = self.chance.between(1, 3000);
            let message = Message::State {
                offset: self.state_sent,
            };
            let payload = Payload {
                len,
                contents: Vec::new(),
            };
            if self.seeder_end.is_none() {
                self.down[CONTROL].send(self.now, &mut self.chance, &message, payload);
            }
            self.state_sent += len;
        }
        let dirty = self.source.take();
        self.seeder
            .handle_saved(self.now, self.state_sent, 77, dirty);
    }

    /// Reads the chunks as they are now, and sends them.
    fn fill_and_send(&mut self, batch: &Batch) {
        let layout = self.seeder.agreement().unwrap().layout.clone();
        let mut chunks = Chunks {
            sequence: batch.sequence,
            round: batch.round,
            ..Chunks::default()
        };
        let mut payload = Payload::default();
        for run in &batch.runs {
            if batch.hole {
                chunks.runs.push(Run {
                    run: *run,
                    content: Content::Zero,
                });
                continue;
            }
            for chunk in run.range() {
                let content = self.source.content(chunk);
                let kind = if content == 0 {
                    Content::Zero
                } else {
                    payload.len += layout.bytes_in(ChunkRun::new(chunk, 1));
                    payload.contents.push(content);
                    chunks.digests.push(digest(content));
                    Content::Data
                };
                match chunks.runs.last_mut() {
                    Some(last) if last.content == kind && last.run.end() == chunk => {
                        last.run.count += 1;
                    }
                    _ => chunks.runs.push(Run {
                        run: ChunkRun::new(chunk, 1),
                        content: kind,
                    }),
                }
            }
        }
        assert!(chunks.runs.len() <= MAX_RUNS);
        self.seeder.handle_filled(self.now, batch, payload.len);
        self.payload_bytes += payload.len;
        let lane = usize::from(batch.lane) + 1;
        let message = Message::Chunks(chunks);
        self.down[lane].send(self.now, &mut self.chance, &message, payload);
    }

    /// Frames arrive at the leecher.
    fn carry_down(&mut self) {
        for index in 0..self.down.len() {
            let bulk = index.checked_sub(1);
            if bulk.is_some_and(|lane| self.receiving[lane].is_some()) {
                continue;
            }
            let Some(frame) = self.down[index].receive(self.now) else {
                continue;
            };
            match frame {
                Err(error) => self.leecher.abort(AbortCode::Protocol, format!("{error}")),
                Ok((Message::Chunks(chunks), payload)) => {
                    self.receiving[bulk.unwrap()] = Some(Receiving::Waiting(chunks, payload));
                }
                Ok((Message::State { offset }, payload)) => {
                    let _ = self.leecher.handle_state(self.now, offset, payload.len);
                }
                Ok((message, _)) => {
                    let result = self.leecher.handle_message(self.now, message);
                    self.check_honest(result);
                }
            }
            self.leecher_events();
        }
        for lane in 0..self.receiving.len() {
            if self.chance.one_in(2) {
                self.receive_chunks(lane);
                self.leecher_events();
            }
        }
    }

    /// Each step is a moment at which another thread may come between.
    fn receive_chunks(&mut self, index: usize) {
        let lane = u8::try_from(index).unwrap();
        self.receiving[index] = match self.receiving[index].take() {
            None => None,
            Some(Receiving::Waiting(chunks, payload)) => {
                match self.leecher.admit(self.now, lane, &chunks, payload.len) {
                    Ok(Admission::Install { parts, direct }) => {
                        Some(Receiving::Admitted(chunks, payload, parts, direct))
                    }
                    Ok(Admission::Wait) => Some(Receiving::Waiting(chunks, payload)),
                    Ok(Admission::Ignore) => None,
                    Err(error) => {
                        self.check_honest(Err(error));
                        None
                    }
                }
            }
            Some(Receiving::Admitted(chunks, payload, parts, direct)) => {
                if self.leecher_end.is_none() {
                    let mut contents = payload.contents.iter();
                    for part in &parts {
                        for chunk in part.run.range() {
                            let content = match part.content {
                                Content::Data => *contents.next().unwrap(),
                                Content::Zero => 0,
                            };
                            if part.install {
                                self.destination.install(chunk, content, direct);
                            }
                        }
                    }
                    assert_eq!(contents.next(), None);
                }
                Some(Receiving::Written(chunks, parts))
            }
            Some(Receiving::Written(chunks, parts)) => {
                self.leecher.handle_installed(lane, &chunks, &parts);
                None
            }
        };
    }

    /// What must be done before anything else happens is done at once; the rest when its time comes.
    fn leecher_events(&mut self) {
        while let Some(event) = self.leecher.poll_event() {
            self.log(|| format!("leecher: {event:?}"));
            match event {
                leecher::Event::Finalize { remote } => {
                    assert_eq!(remote.count(), self.leecher.missing());
                    for run in remote.runs() {
                        self.destination.discard(run);
                    }
                    self.destination.armed = true;
                }
                leecher::Event::Discard { stale } => {
                    for run in stale.runs() {
                        self.destination.discard(run);
                    }
                }
                event => {
                    self.settled |= matches!(event, leecher::Event::Load { .. });
                    self.later.push_back(event);
                }
            }
        }
    }

    /// What an engine and a guest at the destination do.
    fn drive_destination(&mut self) {
        if self.chance.one_in(3)
            && let Some(event) = self.later.pop_front()
        {
            self.obey_leecher(event);
        }
        self.look();
        if let Some(accesses) = self.loading
            && self.destination.viewers[0].wants.is_none()
        {
            if accesses == 0 {
                // A load may need what the stray thread holds.
                if self.destination.viewers[2].wants.is_none() {
                    self.loading = None;
                    self.leecher.handle_loaded();
                }
            } else {
                self.loading = Some(accesses - 1);
                self.want(0);
            }
        }
        if self.chance.one_in(2) {
            while let Some(message) = self.leecher.poll_message() {
                self.log(|| format!("leecher sends {message:?}"));
                let none = Payload::default();
                self.up[CONTROL].send(self.now, &mut self.chance, &message, none);
                if self.chance.one_in(3) {
                    break;
                }
            }
        }
        if self.chance.one_in(2)
            && let Some(message) = self.leecher.poll_urgent()
        {
            self.log(|| format!("leecher sends {message:?}"));
            self.up[URGENT].send(self.now, &mut self.chance, &message, Payload::default());
        }
        self.leecher_events();
    }

    /// The device load (viewer 0), the guest's processors (1) and a stray thread of the machine (2).
    fn look(&mut self) {
        if self.destination.running && self.leecher_end.is_none() && self.chance.one_in(3) {
            self.want(1);
        }
        let finalizing = self.leecher.phase() == "finalizing";
        if (finalizing || self.destination.running) && self.chance.one_in(6) {
            self.want(2);
        }
        for viewer in 0..self.destination.viewers.len() {
            let Some(access) = self.destination.viewers[viewer].wants else {
                continue;
            };
            let before = self.destination.written[usize::try_from(access.chunk).unwrap()];
            let seen = self.destination.step(viewer, &mut self.leecher);
            if let Seen::Value(value) = seen
                && self.settled
                && !self.source.running
                && self.leecher_end.is_none()
            {
                let expected = before.unwrap_or_else(|| self.source.content(access.chunk));
                assert_eq!(
                    value, expected,
                    "a look at chunk {} was stale",
                    access.chunk
                );
            }
            self.leecher_events();
        }
    }

    fn want(&mut self, viewer: usize) {
        if self.destination.viewers[viewer].wants.is_none() {
            self.last_write += 1;
            let write = viewer < 2 && self.chance.one_in(2);
            self.destination.viewers[viewer].wants = Some(Access {
                chunk: self.chance.below(self.source.chunks()),
                write: write.then_some(self.last_write),
            });
        }
    }

    fn obey_leecher(&mut self, event: leecher::Event) {
        match event {
            leecher::Event::Finalize { .. } | leecher::Event::Discard { .. } => {
                unreachable!("done at once")
            }
            leecher::Event::Prepare => self.leecher.handle_prepared(),
            leecher::Event::Digests => self.send_digests(),
            leecher::Event::Load { len, digest } => {
                assert_eq!((len, digest), (self.state_sent, 77));
                self.loading = Some(self.chance.below(5));
            }
            leecher::Event::Run => {
                if self.leecher.ownership() == Ownership::Here {
                    self.destination.running = true;
                    self.leecher.handle_running();
                }
            }
            leecher::Event::Drained => {
                assert_eq!(self.leecher.missing(), 0);
                self.leecher.handle_disarmed();
            }
            leecher::Event::Verdict {
                compared,
                different,
            } => self.verdict = Some((compared, different)),
            leecher::Event::Done => self.leecher_end = Some(End::Done),
            leecher::Event::Aborted { error } => self.leecher_end = Some(End::Aborted(error)),
            leecher::Event::Undecided { .. } => self.leecher_end = Some(End::Undecided),
            leecher::Event::Lost { missing, .. } => {
                let running = self.destination.running;
                self.leecher_end = Some(End::Lost { missing, running });
            }
        }
        self.leecher_events();
    }

    fn send_digests(&mut self) {
        let chunks = self.source.chunks();
        let step = self.chance.between(1, chunks);
        let mut first = 0;
        while first < chunks {
            let count = step.min(chunks - first);
            let digests = self.leecher.digests(ChunkRun::new(first, count)).to_vec();
            let payload = Payload {
                len: count * 8,
                contents: digests,
            };
            let message = Message::Digests { first };
            while let Some(message) = self.leecher.poll_message() {
                let none = Payload::default();
                self.up[CONTROL].send(self.now, &mut self.chance, &message, none);
            }
            self.up[CONTROL].send(self.now, &mut self.chance, &message, payload);
            first += count;
        }
        self.leecher.handle_digests_sent();
    }

    /// Frames arrive at the seeder.
    fn carry_up(&mut self) {
        for index in 0..self.up.len() {
            match self.up[index].receive(self.now) {
                None => {}
                Some(Err(error)) => self.seeder.abort(AbortCode::Protocol, format!("{error}")),
                Some(Ok((message, payload))) => {
                    if let Message::Digests { first } = message {
                        let first = usize::try_from(first).unwrap();
                        let count = payload.contents.len();
                        self.digests[first..first + count].copy_from_slice(&payload.contents);
                    }
                    let result = self.seeder.handle_message(self.now, message);
                    self.check_honest(result);
                }
            }
        }
    }

    /// Two honest sides never accuse each other.
    fn check_honest(&self, result: Result<(), ProtocolError>) {
        if let Err(error) = result {
            assert!(
                matches!(error, ProtocolError::PeerAborted { .. }),
                "an honest peer was accused: {error}"
            );
        }
    }

    /// What holds at every moment.
    fn check(&self) {
        let here = (
            self.seeder.ownership() == Ownership::Here,
            self.leecher.ownership() == Ownership::Here,
        );
        assert_ne!(here, (true, true), "two owners");
        assert!(
            !(self.source.running && self.destination.running),
            "the guest runs twice"
        );
        assert!(!here.1 || self.released, "owned before Release was sent");
        assert!(
            !(self.released && self.source.running),
            "the source runs after Release"
        );
        assert!(
            !self.destination.running || self.released,
            "the destination runs before Release"
        );
    }

    /// When the seeder lets go, the destination has what the source has, or knows that it has not.
    fn check_hand_over(&self) {
        assert!(self.source.dirty.is_empty(), "a write was never taken");
        for chunk in 0..self.source.chunks() {
            let written = self.destination.written[usize::try_from(chunk).unwrap()];
            if self.leecher.is_resident(chunk) && self.leecher_end.is_none() {
                let expected = written.unwrap_or_else(|| self.source.content(chunk));
                let is = self.destination.read(chunk);
                assert_eq!(is, expected, "chunk {chunk} at hand-over");
            }
        }
    }

    fn check_complete(&self) {
        for chunk in 0..self.source.chunks() {
            let written = self.destination.written[usize::try_from(chunk).unwrap()];
            let expected = written.unwrap_or_else(|| self.source.content(chunk));
            let is = self.destination.read(chunk);
            assert_eq!(is, expected, "chunk {chunk} at the end");
        }
    }

    /// What is neither restored nor dirty is at the destination: nothing that was taken is forgotten.
    fn check_restored(&self) {
        if !self.started {
            return;
        }
        for chunk in 0..self.source.chunks() {
            let written = self.destination.written[usize::try_from(chunk).unwrap()];
            if !self.source.dirty.contains(chunk) && written.is_none() {
                let is = self.destination.read(chunk);
                let expected = self.source.content(chunk);
                assert_eq!(is, expected, "chunk {chunk} was neither sent nor restored");
            }
        }
    }

    /// Both ends fit together.
    pub(super) fn check_ends(&self) {
        let (seeder, leecher) = (
            self.seeder_end.as_ref().unwrap(),
            self.leecher_end.as_ref().unwrap(),
        );
        match (seeder, leecher) {
            (End::Done, End::Done | End::Lost { missing: 0, .. }) => {}
            // Its Farewell was lost.
            (End::Done, End::Aborted(_)) if self.plan.dry_run => {}
            (End::Aborted(_), End::Aborted(_) | End::Undecided) => {
                assert!(self.source.running, "nobody runs the guest");
                assert!(!self.destination.running);
            }
            (End::Lost { running, .. }, End::Lost { .. } | End::Undecided) => {
                assert!(!self.source.running);
                assert!(!running || *leecher != End::Undecided);
            }
            ends => panic!("these ends do not fit: {ends:?}"),
        }
        if *seeder == End::Done && !self.plan.dry_run {
            assert_eq!(self.releases, 1);
            self.check_complete();
        }
        if self.plan.dry_run {
            assert!(self.source.running && !self.released);
            assert!(self.destination.memory.iter().all(Option::is_none));
        }
        assert_eq!(self.seeder.poll_timeout(), None);
        assert_eq!(self.leecher.poll_timeout(), None);
    }
}
