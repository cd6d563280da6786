//! What holds at every moment of a session, and at its end.

use super::{End, Pair};
use crate::error::ProtocolError;
use crate::handover::Ownership;

impl Pair {
    /// Two honest sides never accuse each other.
    pub(super) fn check_honest(&self, result: Result<(), ProtocolError>) {
        if let Err(error) = result {
            assert!(
                matches!(error, ProtocolError::PeerAborted { .. }),
                "an honest peer was accused: {error}"
            );
        }
    }

    /// What holds at every moment.
    pub(super) fn check(&self) {
        let seen = self.seeder.observation().map(|seen| seen.bandwidth);
        if let (Some(seen), Some(limit)) = (seen, self.plan.bandwidth) {
            assert!(seen <= limit, "{seen} bytes a second, of {limit}");
        }
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
    pub(super) fn check_hand_over(&self) {
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

    pub(super) fn check_complete(&self) {
        for chunk in 0..self.source.chunks() {
            let written = self.destination.written[usize::try_from(chunk).unwrap()];
            let expected = written.unwrap_or_else(|| self.source.content(chunk));
            let is = self.destination.read(chunk);
            assert_eq!(is, expected, "chunk {chunk} at the end");
        }
    }

    /// What is neither restored nor dirty is at the destination: nothing that was taken is forgotten.
    pub(super) fn check_restored(&self) {
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
    pub(in crate::tests) fn check_ends(&self) {
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
            assert_eq!(self.destination.memory, self.destination.old);
        }
        assert_eq!(self.seeder.poll_timeout(), None);
        assert_eq!(self.leecher.poll_timeout(), None);
    }
}
