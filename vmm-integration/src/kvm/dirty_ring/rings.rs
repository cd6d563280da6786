//! The rings themselves: reading entries, having them reset, and getting over what should not happen.

use std::io;
use std::time::{Duration, Instant};

use crate::kvm::TrackError;
use crate::kvm::sys::{Entry, Mark, Ring};

/// The rings of all vCPUs of a VM.
///
/// KVM fills a ring's entries in order, round and round; we read them in order and say so; KVM, when it is asked to, resets
/// what was read in order, up to the first entry that was not. It stops a vCPU well before its ring is full.
///
/// That is not always well enough: a vCPU that KVM emulates may write a thousand times before KVM looks, and goes round its
/// ring: then entries are overwritten that were not read, or that were and are not reset yet, and KVM counts entries as filled
/// from then on that are not. Where it goes on filling is not to be had. So
///
/// - that it went round is seen by the last entry before it overwrites any that was read, which stays filled until it is read;
/// - from then on KVM may fill [anywhere](Filling::Anywhere), and whatever is read counts as [lost](Self::lost), until the ring
///   was seen empty: then the first entry that is filled tells where KVM goes on;
/// - whatever happens, the entry that comes next is never marked as read, and none is forgotten before KVM has reset it: KVM
///   resets without a look at what it has filled, and would take the ring for full for ever if it went too far.
#[derive(Debug, Default)]
pub(super) struct Rings {
    vcpus: Vec<Vcpu>,
    /// Entries that were read and are not reset.
    unreset: u64,
    /// Whether entries may have been overwritten that nobody has read.
    lost: bool,
}

#[derive(Debug)]
struct Vcpu {
    ring: Ring,
    /// The entry that comes next, counted round and round.
    next: u32,
    /// All entries before this one are reset. From here to `next` KVM resets, or has begun to.
    kept: u32,
    /// Entries so far.
    pages: u64,
    filling: Filling,
    /// Whether all that was filled was read in order, when the ring was last read.
    caught_up: bool,
    /// Whether entries from `kept` to `next` were overwritten.
    refilled: bool,
    /// What came next when room was last made for the vCPU.
    full_at: Option<u32>,
}

/// Where KVM goes on to fill a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filling {
    /// At the entry that comes next.
    AtNext,
    /// There or ahead of it: the ring was empty, and it is where the first entry is found.
    Ahead,
    /// Where nobody knows.
    Anywhere,
}

/// How often KVM is asked in vain to go on with resetting: a signal stops it, and has then to be delivered.
const ATTEMPTS: u32 = 100;
/// How often KVM stops, where all entries were marked as read just before, until that is no accident: the vCPU may overwrite
/// one in between, and only after a whole round the same one.
const VAIN: u32 = 3;
/// How long a vCPU may go on to overwrite entries while they are reset. It does so until KVM looks, after a thousand
/// instructions that it emulates in some 20 ms.
const PATIENCE: Duration = Duration::from_secs(2);

impl Rings {
    /// Reads this ring, too.
    pub(super) fn add(&mut self, ring: Ring) -> usize {
        self.vcpus.push(Vcpu {
            ring,
            next: 0,
            kept: 0,
            pages: 0,
            filling: Filling::AtNext,
            caught_up: false,
            refilled: false,
            full_at: None,
        });
        self.vcpus.len() - 1
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }

    /// Entries so far, by vCPU.
    pub(super) fn pages(&self) -> Vec<u64> {
        self.vcpus.iter().map(|vcpu| vcpu.pages).collect()
    }

    /// Whether entries may have been overwritten since [`found_again`](Self::found_again).
    pub(super) fn lost(&self) -> bool {
        self.lost
    }

    /// What was lost is made up for.
    pub(super) fn found_again(&mut self) {
        self.lost = false;
    }

    /// Whether KVM may take this vCPU's ring for full though nothing is in it.
    pub(super) fn may_be_full(&self, vcpu: usize) -> bool {
        self.vcpus
            .get(vcpu)
            .is_some_and(|vcpu| vcpu.filling != Filling::AtNext || vcpu.full_at == Some(vcpu.next))
    }

    /// Tells all entries that are there, and has them reset by `reset`, which says how many it has reset.
    pub(super) fn harvest(
        &mut self,
        mut found: impl FnMut(usize, Entry),
        mut reset: impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        if self.collect(&mut found) {
            // A ring that is full may hold one more.
            self.reset(&mut found, &mut reset)?;
            self.collect(&mut found);
        }
        self.reset(&mut found, &mut reset)
    }

    /// Reads all entries that are there; whether any ring was full.
    fn collect(&mut self, found: &mut impl FnMut(usize, Entry)) -> bool {
        let mut any_full = false;
        for (number, vcpu) in self.vcpus.iter_mut().enumerate() {
            self.unreset += vcpu.collect(|entry| found(number, entry));
            any_full |= vcpu.is_full();
        }
        any_full
    }

    /// The same, for a vCPU that KVM does not run since its ring is full.
    pub(super) fn make_room(
        &mut self,
        number: usize,
        mut found: impl FnMut(usize, Entry),
        mut reset: impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        self.harvest(&mut found, &mut reset)?;
        let Some(vcpu) = self.vcpus.get_mut(number) else {
            return Ok(());
        };
        // Full, with nothing read since it was last full, and nothing there: KVM counts entries that are not there.
        if vcpu.full_at == Some(vcpu.next) {
            if vcpu.filling == Filling::AtNext {
                vcpu.filling = Filling::Ahead;
            }
            // A quarter is surely less than what KVM counts when it calls a ring full.
            self.unreset += vcpu.skip(vcpu.ring.count() / 4);
            self.reset(&mut found, &mut reset)?;
        }
        let vcpu = &mut self.vcpus[number];
        vcpu.full_at = Some(vcpu.next);
        Ok(())
    }

    /// Has KVM reset all entries that were read.
    fn reset(
        &mut self,
        found: &mut impl FnMut(usize, Entry),
        call: &mut impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        let began = Instant::now();
        let mut vain = 0;
        while let Some(count) = self.call(call)? {
            vain = if count == 0 { vain + 1 } else { 0 };
            let in_time = began.elapsed() < PATIENCE;
            if self.read_refilled(found) && vain < VAIN && in_time {
                continue;
            }
            // Nothing is there that KVM could have stopped at, but for the entry that comes next. Or there always is: then
            // the vCPU goes round the ring, and KVM has not stopped there each time.
            let doubtful = self.vcpus.iter().filter(|vcpu| !vcpu.refilled || !in_time);
            let left = doubtful.map(Vcpu::left).sum();
            if left > 0 {
                return Err(TrackError::NotReset { left }.into());
            }
            break;
        }
        self.unreset = 0;
        for vcpu in &mut self.vcpus {
            self.lost |= vcpu.forget();
        }
        Ok(())
    }

    /// Calls until KVM resets nothing more, and says how many entries it has reset. `None` if that is surely all of them: it
    /// counts those of all rings together, so where none were overwritten, that many can be no others.
    ///
    /// A signal that waits for this thread stops KVM half-way.
    fn call(&mut self, call: &mut impl FnMut() -> io::Result<u64>) -> io::Result<Option<u64>> {
        let exact = !self.vcpus.iter().any(|vcpu| vcpu.refilled);
        let (mut all, mut vain) = (0, 0);
        while vain < ATTEMPTS {
            if exact && self.unreset == 0 {
                return Ok(None);
            }
            let count = match call() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                count => count?,
            };
            vain = if count == 0 { vain + 1 } else { 0 };
            all += count;
            self.unreset = self.unreset.saturating_sub(count);
        }
        Ok(Some(all))
    }

    /// KVM resets nothing more, and that may be since the first entry that it should reset is one that it has filled anew:
    /// it has gone round a ring and overwritten what was read. Reads that; says whether it was so.
    fn read_refilled(&mut self, found: &mut impl FnMut(usize, Entry)) -> bool {
        let mut refilled = false;
        for (number, vcpu) in self.vcpus.iter_mut().enumerate() {
            refilled |= vcpu.read_refilled(|entry| found(number, entry));
        }
        refilled
    }
}

impl Vcpu {
    /// Reads all entries that are there; how many are KVM's to reset now.
    fn collect(&mut self, mut found: impl FnMut(Entry)) -> u64 {
        let mut read = 0;
        self.caught_up = false;
        while !self.is_full() {
            if let Some(entry) = self.ring.collect(self.next) {
                self.next = self.next.wrapping_add(1);
                self.pages += 1;
                read += 1;
                found(entry);
                continue;
            }
            match self.ring.look(self.next) {
                Mark::Filled => {}
                // Read when it was found out of turn.
                Mark::Held | Mark::Read => read += self.skip(1),
                Mark::Free => match self.missing() {
                    Some(missing) => read += self.skip(missing),
                    None => {
                        self.caught_up = read > 0;
                        break;
                    }
                },
            }
        }
        read
    }

    /// Whether all entries were read but the one that KVM must not go past.
    fn is_full(&self) -> bool {
        self.next.wrapping_sub(self.kept) == self.ring.count() - 1
    }

    /// How many entries come next that KVM counts as filled and that are not: those that come before one that is.
    fn missing(&self) -> Option<u32> {
        if self.filling == Filling::AtNext {
            return None;
        }
        let left = self.ring.count() - 1 - self.next.wrapping_sub(self.kept);
        let was_filled = |&ahead: &u32| {
            let mark = self.ring.look(self.next.wrapping_add(ahead));
            matches!(mark, Mark::Filled | Mark::Held)
        };
        (1..=left).find(was_filled)
    }

    /// Has KVM reset so many entries, though there is nothing in them to be read; fewer, where there is. How many.
    fn skip(&mut self, count: u32) -> u64 {
        let mut skipped = 0;
        // KVM may fill them now, if it has gone round the ring and is among those that it has not filled before.
        while skipped < count && self.ring.pass(self.next) {
            self.next = self.next.wrapping_add(1);
            skipped += 1;
        }
        skipped.into()
    }

    /// The entries that were read and of which some may not be reset.
    fn kept(&self) -> impl Iterator<Item = u32> + use<> {
        let kept = self.kept;
        (0..self.next.wrapping_sub(kept)).map(move |ahead| kept.wrapping_add(ahead))
    }

    /// Whether KVM surely has reset all of them, in order: the last one is free.
    fn is_reset(&self) -> bool {
        let last = self.next.wrapping_sub(1);
        self.kept == self.next || self.ring.look(last) == Mark::Free
    }

    /// Reads those that KVM has filled anew, be it before it reset them or afterwards; whether there were any.
    fn read_refilled(&mut self, mut found: impl FnMut(Entry)) -> bool {
        if self.is_reset() {
            return false;
        }
        let mut any = false;
        for index in self.kept() {
            if let Some(entry) = self.ring.collect(index) {
                self.pages += 1;
                any = true;
                found(entry);
            }
        }
        self.refilled |= any;
        any
    }

    /// How many of them KVM has not reset.
    fn left(&self) -> u64 {
        if self.is_reset() {
            return 0;
        }
        let unreset = |&index: &u32| self.ring.look(index) != Mark::Free;
        self.kept().filter(unreset).count() as u64
    }

    /// All of them are reset; whether any entry may be lost. Those that were filled anew afterwards, and read, have their turn when
    /// KVM has gone round.
    fn forget(&mut self) -> bool {
        if self.refilled {
            self.kept().for_each(|index| self.ring.hold(index));
        }
        let read = self.kept != self.next;
        // KVM fills in order: this one comes before any that was read. It may overwrite one while it resets it, and nothing tells.
        let before = self.kept.wrapping_sub(1);
        let went_round = self.refilled || read && self.ring.look(before) == Mark::Filled;
        let lost = went_round || read && self.filling == Filling::Anywhere;
        self.refilled = false;
        self.kept = self.next;
        self.filling = match self.filling {
            _ if went_round => Filling::Anywhere,
            Filling::Anywhere if self.is_empty() => Filling::Ahead,
            Filling::Ahead if self.caught_up => Filling::AtNext,
            as_before => as_before,
        };
        lost
    }

    fn is_empty(&self) -> bool {
        (0..self.ring.count()).all(|index| self.ring.look(index) == Mark::Free)
    }
}

#[cfg(test)]
mod tests;
