//! Where a program that faults will fault next.

/// How many sequences are followed at once: a few threads, and a copy from one place to another in each.
const MOST_STREAMS: usize = 16;

/// How far apart two accesses may be to be taken for neighbours of a sequence: 4 MiB.
const LONGEST_STRIDE: u64 = 1024;

/// How many steps an access may be late.
const LATE: i64 = 8;

/// With how many steps a sequence begins: 64 KiB if it is one page after the other. It doubles with every confirmation.
const FIRST_WINDOW: u64 = 16;

/// Most steps of a sequence that leaves pages out; each is a read of its own.
const MOST_STRIDES: u64 = 64;

/// The sequences in which pages are accessed, as far as faults show them.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    accesses: u64,
}

#[derive(Debug)]
struct Stream {
    last: u64,
    /// Zero until a second page has come.
    stride: i64,
    confirmed: u32,
    /// Steps behind `last` that were asked for.
    asked: u64,
    window: u64,
    /// The access that it was part of last.
    used: u64,
}

/// Pages that are worth having before somebody waits for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ahead {
    pub(super) first: u64,
    pub(super) stride: i64,
    /// The pages are so many, `stride` from each to the next. They may lie outside of the memory.
    pub(super) count: u64,
}

impl Streams {
    /// Takes note of a fault at `page`; says what to read ahead, at most `most` pages.
    pub(super) fn access(&mut self, page: u64, most: u64) -> Option<Ahead> {
        if most == 0 {
            return None;
        }
        self.accesses += 1;
        let now = self.accesses;
        let known = self
            .streams
            .iter_mut()
            .find_map(|it| it.steps_to(page).map(|steps| (steps, it)));
        if let Some((steps, stream)) = known {
            stream.used = now;
            return if steps > 0 {
                stream.go_on(page, most)
            } else {
                None
            };
        }
        // Two accesses that are near each other may be the beginning of a sequence.
        let beginning = self
            .streams
            .iter_mut()
            .filter(|it| it.confirmed < 2 && (1..=LONGEST_STRIDE).contains(&it.last.abs_diff(page)))
            .min_by_key(|it| it.last.abs_diff(page));
        if let Some(stream) = beginning {
            stream.used = now;
            stream.stride = page.cast_signed().wrapping_sub(stream.last.cast_signed());
            stream.confirmed = 0;
            stream.asked = 0;
            stream.window = FIRST_WINDOW / 2;
            return stream.go_on(page, most);
        }
        let fresh = Stream {
            last: page,
            stride: 0,
            confirmed: 0,
            asked: 0,
            window: 0,
            used: now,
        };
        if self.streams.len() < MOST_STREAMS {
            self.streams.push(fresh);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|it| it.used) {
            *oldest = fresh;
        }
        None
    }
}

impl Stream {
    /// How many steps `page` is behind the last one, if it is one that was asked for, or the one after those. Threads that serve
    /// faults overtake each other, so a few steps back are part of the sequence, too.
    fn steps_to(&self, page: u64) -> Option<i64> {
        let delta = page.cast_signed().wrapping_sub(self.last.cast_signed());
        if self.stride == 0 || delta.checked_rem(self.stride) != Some(0) {
            return None;
        }
        let steps = delta.checked_div(self.stride)?;
        let most = i64::try_from(self.asked)
            .unwrap_or(i64::MAX)
            .saturating_add(1);
        (-LATE..=most).contains(&steps).then_some(steps)
    }

    fn go_on(&mut self, page: u64, most: u64) -> Option<Ahead> {
        let steps = page.abs_diff(self.last) / self.stride.unsigned_abs();
        self.asked = self.asked.saturating_sub(steps);
        self.last = page;
        self.confirmed += 1;
        let sequential = self.stride.unsigned_abs() == 1;
        if !sequential && self.confirmed < 2 {
            return None;
        }
        let most = if sequential {
            most
        } else {
            most.min(MOST_STRIDES)
        };
        self.window = (self.window * 2).min(most);
        let count = self.window.saturating_sub(self.asked);
        // In one go rather than page by page.
        if count == 0 || (count < self.window / 2 && self.asked > 0) {
            return None;
        }
        let skipped = self.asked.cast_signed() + 1;
        self.asked = self.window;
        Some(Ahead {
            first: page.wrapping_add_signed(self.stride.wrapping_mul(skipped)),
            stride: self.stride,
            count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(first: u64, stride: i64, count: u64) -> Option<Ahead> {
        Some(Ahead {
            first,
            stride,
            count,
        })
    }

    #[test]
    fn two_neighbours_are_a_sequence_that_is_read_further_ahead_each_time() {
        let mut streams = Streams::default();
        assert_eq!(streams.access(10, 64), None);
        assert_eq!(streams.access(11, 64), ahead(12, 1, 16));
        assert_eq!(streams.access(12, 64), ahead(28, 1, 17));
        assert_eq!(streams.access(28, 64), ahead(45, 1, 48));
        // All of it was used up.
        assert_eq!(streams.access(93, 64), ahead(94, 1, 64));
    }

    #[test]
    fn equal_steps_are_a_sequence_from_the_third_on_forwards_and_backwards() {
        for stride in [10_i64, -3] {
            let mut streams = Streams::default();
            let page = |n: i64| 5000_u64.wrapping_add_signed(n * stride);
            assert_eq!(streams.access(page(0), 1024), None);
            assert_eq!(streams.access(page(1), 1024), None);
            assert_eq!(streams.access(page(2), 1024), ahead(page(3), stride, 16));
            assert_eq!(streams.access(page(3), 1024), ahead(page(19), stride, 17));
            assert_eq!(streams.access(page(5), 1024), ahead(page(36), stride, 34));
            // In one go, when half of what may be ahead is used up.
            assert_eq!(streams.access(page(6), 1024), None);
            assert_eq!(streams.access(page(37), 1024), ahead(page(70), stride, 32));
        }
    }

    #[test]
    fn accesses_that_overtake_each_other_are_one_sequence() {
        let mut streams = Streams::default();
        for page in [10, 11] {
            streams.access(page, 64);
        }
        for page in [14, 12, 13, 17, 15, 16] {
            let found = streams.access(page, 64);
            assert!(found.is_none_or(|ahead| ahead.stride == 1 && ahead.first > 27));
        }
        assert_eq!(streams.streams.len(), 1);
    }

    #[test]
    fn sequences_side_by_side_are_told_apart() {
        let mut streams = Streams::default();
        for n in 0..10 {
            for place in [0, 100_000, 200_000] {
                let found = streams.access(place + n, 64);
                assert!(n == 0 || found.is_none_or(|ahead| ahead.stride == 1));
            }
        }
        let asked: Vec<_> = streams.streams.iter().map(|it| it.stride).collect();
        assert_eq!(asked, [1, 1, 1]);
    }

    #[test]
    fn accesses_at_random_ask_for_next_to_nothing() {
        let mut streams = Streams::default();
        let mut state = 1_u64;
        let asked = (0..10_000)
            .filter(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                streams.access(state >> 44, 2048).is_some()
            })
            .count();
        assert!(asked < 100, "{asked} of 10000");
    }

    #[test]
    fn nothing_is_asked_for_where_nothing_shall_be_and_the_ends_are_no_trouble() {
        assert_eq!(Streams::default().access(1, 0), None);
        let mut streams = Streams::default();
        for page in [1, 0, u64::MAX, u64::MAX - 1, 0, u64::MAX >> 1] {
            streams.access(page, 8);
        }
    }
}
