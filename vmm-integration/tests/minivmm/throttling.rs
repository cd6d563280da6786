//! A guest that writes faster than the link moves is slowed down until it can leave, where that is asked for and post-copy is not allowed.

use guest_test::tiny::report::Logbook;
use guest_test::tiny::{FREE, TinyGuest};
use serde_json::{Value, json};

use crate::vmm::{Question, Shape, Vmm};

/// So much that what is written is neither sent within the longest blackout nor written altogether within a round.
const PAGES: u64 = 1024;

/// A machine whose guest writes page after page, one for a tick of its first processor, and one that waits.
struct Pair {
    source: Vmm,
    destination: Vmm,
    book: Logbook,
    /// Bytes a second.
    bandwidth: u64,
}

impl Pair {
    /// The link between them moves a quarter of what the guest writes, whatever that is on this machine.
    fn new(shape: Shape, guest: TinyGuest, every: u64) -> Self {
        let mut source = Vmm::boot(shape, guest, every);
        let destination = Vmm::awaiting(shape);
        let khz = source.status()["tsc_khz"].as_u64().unwrap();
        let mut book = Logbook::default();
        source.read_until(&mut book, "it has written everything", |book| {
            first(book).0 >= PAGES
        });
        let before = first(&book);
        source.read_until(&mut book, "it writes more", |book| {
            first(book).0 >= before.0 + PAGES
        });
        let now = first(&book);
        let millis = (now.1 - before.1) / khz;
        let written = (now.0 - before.0) * 4096 * 1000 / millis.max(1);
        Self {
            source,
            destination,
            book,
            bandwidth: written / 4,
        }
    }

    /// Migrates it without post-copy; tells `seen` of every status of the source meanwhile, one for each piece of news.
    fn migrate(&self, throttle: bool, mut seen: impl FnMut(&Value)) -> Result<Value, String> {
        let plan = json!({
            "post_copy": "never", "throttle": throttle, "bandwidth": self.bandwidth, "downtime": 20,
            // The more the guest is slowed down, the shorter they are.
            "rounds": if throttle { 60 } else { 3 },
        });
        let (pairing, receiving) = self.destination.receive("127.0.0.1:0");
        let sending = self.source.migrate(&pairing, &plan);
        let sent = sending.end(|_| seen(&self.source.status()));
        assert_eq!(sent.is_ok(), receiving.end(|_| {}).is_ok());
        sent
    }

    /// The guest goes on where it is, there or here, and its memory is right.
    fn runs_on(&mut self, there: bool) {
        self.source.read_console(&mut self.book);
        let vmm = if there {
            &mut self.destination
        } else {
            &mut self.source
        };
        let status = vmm.status();
        assert_eq!(status["stage"], "running");
        assert_eq!(throttles(&status), vec![0; throttles(&status).len()]);
        assert_eq!(status["dirty_rate"], Value::Null);
        let ticks = first(&self.book).0;
        vmm.read_until(&mut self.book, "it runs on", |book| {
            first(book).0 >= ticks + 2 * PAGES
        });
    }
}

/// The ticks of the first processor, as it said last, and its clock.
fn first(book: &Logbook) -> (u64, u64) {
    let report = book.last().find(|report| report.cpu == 0);
    report.map_or((0, 0), |report| (report.ticks, report.tsc))
}

fn throttles(status: &Value) -> Vec<u64> {
    let percent = status["throttle"].as_array().unwrap().iter();
    percent.map(|percent| percent.as_u64().unwrap()).collect()
}

/// One that marks pages on its first of two processors.
fn marker(tracker: &'static str) -> (Shape, TinyGuest) {
    let shape = Shape {
        cpus: 2,
        tracker,
        ..Shape::default()
    };
    let guest = TinyGuest::Marker {
        pages: PAGES,
        base: FREE,
        idle: 100,
    };
    (shape, guest)
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_guest_that_writes_faster_than_the_link_moves_leaves_only_if_it_is_slowed_down() {
    let mut guest = TinyGuest::stomper(PAGES);
    if let TinyGuest::Stomper { idle, .. } = &mut guest {
        *idle = 100;
    }
    let mut pair = Pair::new(Shape::default(), guest, 16);

    let error = pair.migrate(false, |status| assert_eq!(throttles(status), [0]));
    let error = error.unwrap_err();
    assert!(error.contains("does not converge"), "{error}");
    pair.runs_on(false);

    let mut most = 0;
    let sent = pair.migrate(true, |status| {
        most = most.max(throttles(status)[0]);
        // The log does not tell.
        assert_eq!(status["dirty_rate"], Value::Null);
    });
    let sent = sent.unwrap();
    assert!(most >= 50, "{most} %");
    assert_eq!(sent["verified"]["different"], 0, "{sent}");
    assert_eq!(sent["post_copy"], false, "{sent}");
    assert_eq!(throttles(&pair.source.status()), [0]);
    pair.runs_on(true);
}

/// A marker, whose writes a ring tells of as it would of any guest's where KVM runs its instructions. Where it emulates them, each store of a
/// page is told of, and a guest that fills pages is quicker than its ring; then takes name everything, and there is no rate to go by.
#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn with_rings_only_the_processor_that_writes_is_slowed_down() {
    let (shape, guest) = marker("ring");
    let mut pair = Pair::new(shape, guest, 1000);
    let (mut most, mut rates) = (0, Vec::new());
    let sent = pair.migrate(true, |status| {
        let throttles = throttles(status);
        most = most.max(throttles[0]);
        assert_eq!(throttles[1], 0, "{status}");
        let rate = |cpu: usize| status["dirty_rate"][cpu].as_u64();
        rates.extend(rate(0).zip(rate(1)));
    });
    assert_eq!(sent.unwrap()["verified"]["different"], 0);
    assert!(most >= 50, "{most} %");
    let writes = |&(one, other): &(u64, u64)| one > 0 && one > other;
    assert!(rates.iter().any(writes), "{rates:?}");
    pair.runs_on(true);
}

#[test]
#[ignore = "kvm: needs /dev/kvm"]
fn a_migration_that_is_called_off_slows_nothing_down_any_more() {
    let (shape, guest) = marker("log");
    let mut pair = Pair::new(shape, guest, 1000);
    let mut called_off = false;
    let socket = pair.source.socket();
    let sent = pair.migrate(true, |status| {
        let throttles = throttles(status);
        // The log does not tell who writes.
        assert_eq!(throttles[0], throttles[1]);
        if throttles[0] > 0 && !called_off {
            called_off = true;
            let cancel = json!({"do": "cancel"});
            Question::new(&socket, &cancel).end(|_| {}).unwrap();
        }
    });
    assert!(called_off);
    let error = sent.unwrap_err();
    assert!(error.contains("the guest runs on at the source"), "{error}");
    pair.runs_on(false);
}
