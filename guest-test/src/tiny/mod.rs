//! Guests of a few hundred instructions, for a VMM that puts them into long mode: they run where a Linux does not, and check themselves.
//!
//! All of them are in one [`image`], which is assembled into this program; the first of the words that a guest is started with says which of
//! them runs. Every processor runs the same guest. Each prints a line on the serial port every so many ticks, which [`report`] reads.
//!
//! They keep to what KVM runs where it emulates the guest's instructions, as on a machine without virtualisation of its own: integers,
//! string instructions, moves of SSE registers, `fxsave`, port and memory-mapped devices, interrupts. Such a KVM lacks `cmpxchg16b`, `rdtscp`,
//! `popcnt`, `crc32`, BMI, arithmetic and AVX of vector registers, x87 beyond its control word, `xsave`, `xgetbv`, software interrupts, `ltr`
//! and hypercalls: nothing here uses them.

pub mod report;
mod sys;

pub use sys::image;

/// A tiny guest, and what it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyGuest {
    /// Stamps pages and looks whether the stamps of earlier are still there.
    Stomper {
        /// How many pages, at least one a processor.
        pages: u64,
        /// Where they begin: at a page, above [`FREE`] and the table.
        base: u64,
        /// At random instead of in order.
        random: bool,
        /// How much it does nothing in each tick.
        idle: u64,
        /// Every processor but the first has one page alone: when the first one waits, the others have no reason to.
        lopsided: bool,
    },
    /// Halts and is woken by a timer; looks whether a clock goes back.
    Timer {
        /// How many microseconds a tick takes.
        tick_micros: u64,
        /// Whose timer wakes the first processor.
        timer: Timer,
    },
    /// Keeps patterns in the registers of SSE and looks whether they are still there.
    Registers {
        /// For how long: so many times nothing.
        idle: u64,
    },
    /// Touches pages that nobody has touched, one after the other.
    Toucher {
        /// How many pages, at least one a processor.
        pages: u64,
        /// Where they begin.
        base: u64,
        /// How much it does nothing in each tick.
        idle: u64,
    },
    /// Marks pages, a word of each, in order: on the first processor alone. The others write nothing.
    Marker {
        /// How many pages.
        pages: u64,
        /// Where they begin.
        base: u64,
        /// How much it does nothing in each tick.
        idle: u64,
    },
}

/// Which timer interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// That of each processor.
    LocalApic,
    /// The one of the machine, by way of its oldest interrupt controller.
    Pit,
}

/// Memory from here on is a guest's to use: the image and everything else that it needs is below.
pub const FREE: u64 = 0x20_0000;

const PAGE: u64 = 4096;

impl TinyGuest {
    /// A stomper of `pages` pages as low as they can be.
    #[must_use]
    pub fn stomper(pages: u64) -> Self {
        Self::Stomper {
            pages,
            base: (FREE + pages * 8).next_multiple_of(PAGE),
            random: true,
            idle: 0,
            lopsided: false,
        }
    }

    /// The words that it is started with. A line is printed every `every` ticks of a processor.
    #[must_use]
    pub fn words(&self, every: u64) -> Vec<u64> {
        match *self {
            Self::Stomper {
                pages,
                base,
                random,
                idle,
                lopsided,
            } => {
                let (random, lopsided) = (random.into(), lopsided.into());
                vec![0, pages, base, FREE, random, every, idle, lopsided]
            }
            Self::Timer { tick_micros, timer } => {
                let periods = match timer {
                    Timer::LocalApic => 0,
                    Timer::Pit => tick_micros * 1_193_182 / 1_000_000,
                };
                vec![1, tick_micros * 1000, periods, every]
            }
            Self::Registers { idle } => vec![2, every, idle],
            Self::Toucher { pages, base, idle } => vec![3, pages, base, every, idle],
            Self::Marker { pages, base, idle } => vec![4, pages, base, every, idle],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_begins_with_its_first_instruction_and_is_little() {
        let image = image();
        // mov r15, rdi
        assert_eq!(image[..3], [0x49, 0x89, 0xff]);
        assert!(image.len() < 4096, "{} bytes", image.len());
    }

    #[test]
    fn the_pages_of_a_stomper_begin_behind_its_table() {
        let TinyGuest::Stomper { base, .. } = TinyGuest::stomper(513) else {
            panic!("a stomper is one");
        };
        assert_eq!(base, FREE + 2 * PAGE);
    }
}
