//! The rings themselves: reading entries, having them reset, and getting over what should not happen.

use std::io;

use crate::kvm::TrackError;
use crate::kvm::sys::{Entry, Mark, Ring};

/// The rings of all vCPUs of a VM.
///
/// KVM fills a ring's entries in order, round and round; we read them in order and say so; KVM, when it is asked to, resets
/// what was read in order, up to the first entry that was not. It stops a vCPU well before its ring is full.
///
/// That is not always well enough: a vCPU that KVM emulates may write a few hundred times before KVM looks, and then entries
/// are overwritten that were not read. This is noticed and said ([`lost`](Self::lost)), and the ring goes on to work,
/// though KVM counts entries as filled then that are not.
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
    /// The first entry that may not be reset.
    kept: u32,
    /// Entries so far.
    pages: u64,
    /// Whether entries of this ring were ever overwritten: then some may be missing that KVM counts as filled.
    overrun: bool,
    /// What came next when room was last made for the vCPU.
    full_at: Option<u32>,
}

/// How often KVM is asked in vain to go on with resetting: a signal stops it, and has then to be delivered.
const ATTEMPTS: u32 = 100;

impl Rings {
    /// Reads this ring, too.
    pub(super) fn add(&mut self, ring: Ring) -> usize {
        self.vcpus.push(Vcpu {
            ring,
            next: 0,
            kept: 0,
            pages: 0,
            overrun: false,
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

    /// Whether entries of this vCPU's ring were ever overwritten.
    pub(super) fn is_overrun(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|vcpu| vcpu.overrun)
    }

    /// Tells all entries that are there, and has them reset by `reset`, which says how many it has reset.
    pub(super) fn harvest(
        &mut self,
        mut found: impl FnMut(usize, Entry),
        mut reset: impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        for (number, vcpu) in self.vcpus.iter_mut().enumerate() {
            self.unreset += vcpu.collect(|entry| found(number, entry));
            self.lost |= vcpu.is_full();
        }
        self.reset(&mut found, &mut reset)
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
        if vcpu.overrun && vcpu.full_at == Some(vcpu.next) {
            // A quarter is surely less than what KVM counts when it calls a ring full.
            self.unreset += vcpu.skip(vcpu.ring.count() / 4);
            self.lost = true;
            self.reset(&mut found, &mut reset)?;
        }
        let vcpu = &mut self.vcpus[number];
        vcpu.full_at = Some(vcpu.next);
        Ok(())
    }

    /// Has KVM reset as many entries as were read. A signal that waits for this thread stops it half-way.
    fn reset(
        &mut self,
        found: &mut impl FnMut(usize, Entry),
        call: &mut impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        let (mut vain, mut repairs) = (0, 0);
        while self.unreset > 0 {
            match call() {
                Ok(0) => vain += 1,
                Ok(count) => {
                    self.unreset = self.unreset.saturating_sub(count);
                    vain = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => vain += 1,
                Err(error) => return Err(error),
            }
            if vain == ATTEMPTS {
                // The vCPU may go round again meanwhile, until KVM looks.
                if repairs == ATTEMPTS || !self.repair(found) {
                    return Err(TrackError::NotReset { left: self.unreset }.into());
                }
                (vain, repairs) = (0, repairs + 1);
            }
        }
        for vcpu in &mut self.vcpus {
            vcpu.kept = vcpu.next;
        }
        Ok(())
    }

    /// KVM resets nothing, since the first entry that it should reset is one that it has filled anew: it has gone round the
    /// ring and overwritten what was read. Reads that; says whether it was so.
    fn repair(&mut self, found: &mut impl FnMut(usize, Entry)) -> bool {
        let mut was_so = false;
        self.unreset = 0;
        for (number, vcpu) in self.vcpus.iter_mut().enumerate() {
            let mut index = vcpu.kept;
            while index != vcpu.next {
                if let Some(entry) = vcpu.ring.collect(index) {
                    vcpu.pages += 1;
                    vcpu.overrun = true;
                    was_so = true;
                    found(number, entry);
                }
                self.unreset += u64::from(vcpu.ring.look(index) == Mark::Read);
                index = index.wrapping_add(1);
            }
        }
        self.lost |= was_so;
        was_so
    }
}

impl Vcpu {
    /// Reads all entries that are there; how many are KVM's to reset now.
    fn collect(&mut self, mut found: impl FnMut(Entry)) -> u64 {
        let mut read = 0;
        // Entries that were read are not filled again before they are reset: there are no more than this.
        while self.next.wrapping_sub(self.kept) < self.ring.count() {
            if let Some(entry) = self.ring.collect(self.next) {
                self.next = self.next.wrapping_add(1);
                self.pages += 1;
                read += 1;
                found(entry);
            } else if let Some(missing) = self.missing() {
                read += self.skip(missing);
            } else if self.ring.look(self.next) != Mark::Filled {
                break;
            }
        }
        // KVM leaves some entries free: where none is, it did not stop the vCPU in time.
        self.overrun |= self.is_full();
        read
    }

    fn is_full(&self) -> bool {
        self.next.wrapping_sub(self.kept) == self.ring.count()
    }

    /// How many entries come next that KVM counts as filled and that are not. KVM fills in order, so those are it that
    /// come before one that is filled.
    fn missing(&self) -> Option<u32> {
        if !self.overrun {
            return None;
        }
        let left = self.ring.count() - self.next.wrapping_sub(self.kept);
        let filled = |&ahead: &u32| self.ring.look(self.next.wrapping_add(ahead)) == Mark::Filled;
        let missing = (1..left).find(filled)?;
        // It may have been filled since it was looked at.
        (self.ring.look(self.next) != Mark::Filled).then_some(missing)
    }

    /// Has KVM reset so many entries, though nothing is in them.
    fn skip(&mut self, count: u32) -> u64 {
        for _ in 0..count {
            self.ring.say_read(self.next);
            self.next = self.next.wrapping_add(1);
        }
        count.into()
    }
}

#[cfg(test)]
mod tests;
