//! Where a region lies in the memory of a process.

use std::io;
use std::ops::Range;

use crate::chunk::{ChunkBitmap, ChunkRun, ChunkSize};

/// A mapping of a region, or of a part of it. A region may be mapped by several, also the same bytes twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// The addresses in the process, whole pages.
    pub address: Range<u64>,
    /// The byte offset in the region of the first address, whole pages.
    pub offset: u64,
}

/// The areas of one region, and the chunks that their addresses stand for.
#[derive(Debug)]
pub(super) struct Areas {
    areas: Vec<Area>,
    region_len: u64,
    chunk_size: ChunkSize,
}

impl Areas {
    /// Checks `areas`. What an area has beyond the end of the region, in the last page, belongs to no chunk.
    pub(super) fn new(
        areas: Vec<Area>,
        region_len: u64,
        chunk_size: ChunkSize,
    ) -> io::Result<Self> {
        let page = crate::sys::mapping::page_size();
        for area in &areas {
            let Range { start, end } = area.address;
            let whole_pages = [start, end, area.offset]
                .iter()
                .all(|byte| byte.is_multiple_of(page));
            let region_end = region_len.checked_next_multiple_of(page);
            let area_end = end
                .checked_sub(start)
                .and_then(|len| len.checked_add(area.offset));
            let inside = matches!((area_end, region_end), (Some(a), Some(r)) if a <= r);
            if !whole_pages || !inside || start == end {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "{area:x?} is no part of a region of {region_len} bytes in whole pages"
                    ),
                ));
            }
        }
        Ok(Self {
            areas,
            region_len,
            chunk_size,
        })
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Area> {
        self.areas.iter()
    }

    pub(super) fn region_len(&self) -> u64 {
        self.region_len
    }

    /// The empty set of the chunks of this region.
    pub(super) fn no_chunks(&self) -> ChunkBitmap {
        ChunkBitmap::empty(self.chunk_size.chunks_in(self.region_len))
    }

    /// The chunks of `bytes` of the region.
    pub(super) fn chunks_of(&self, bytes: &Range<u64>) -> ChunkRun {
        let start = bytes.start / u64::from(self.chunk_size.bytes());
        let end = self.chunk_size.chunks_in(bytes.end.min(self.region_len));
        ChunkRun::new(start, end.saturating_sub(start))
    }

    /// The addresses of `bytes` of the region, which begin at a page, in `area`: whole pages, perhaps none.
    pub(super) fn addresses(area: &Area, bytes: &Range<u64>) -> Range<u64> {
        let page = crate::sys::mapping::page_size();
        let len = area.address.end - area.address.start;
        let place = |byte: u64| area.address.start + byte.saturating_sub(area.offset).min(len);
        place(bytes.start)..place(bytes.end.next_multiple_of(page))
    }

    /// The chunks that `addresses`, which are within `area`, touch.
    pub(super) fn chunks(&self, area: &Area, addresses: &Range<u64>) -> ChunkRun {
        let place = |address: u64| address - area.address.start + area.offset;
        self.chunks_of(&(place(addresses.start)..place(addresses.end)))
    }
}

pub(super) fn not_started() -> io::Error {
    io::Error::other("the tracker was asked what changed before it was started")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_that_is_no_part_of_the_region_is_refused() {
        let check = |start, end, offset| {
            let address = start..end;
            Areas::new(vec![Area { address, offset }], 10_000, ChunkSize::PAGE).is_ok()
        };
        assert!(check(0x1000, 0x4000, 0));
        assert!(check(0x1000, 0x2000, 0x2000));
        assert!(!check(0x1000, 0x2000, 0x3000), "beyond the end");
        assert!(!check(0x1000, 0x1001, 0), "no whole page");
        assert!(!check(0x1001, 0x3001, 0), "no page begins there");
        assert!(!check(0x1000, 0x2000, 1), "no page of the region");
        assert!(!check(0x2000, 0x1000, 0), "ends before it starts");
        assert!(!check(0x1000, 0x1000, 0), "empty");
        assert!(!check(0, !0xfff, !0xfff), "overflows");
    }

    #[test]
    fn addresses_stand_for_the_chunks_that_they_touch_and_never_for_one_beyond_the_end() {
        let size = ChunkSize::new(8192).unwrap();
        let area = Area {
            address: 0x10_0000..0x10_5000,
            offset: 0x1000,
        };
        let areas = Areas::new(vec![area.clone()], 0x5801, size).unwrap();
        let chunks = |address| areas.chunks(&area, &address);
        assert_eq!(chunks(0x10_0000..0x10_1000), ChunkRun::new(0, 1));
        assert_eq!(chunks(0x10_0000..0x10_2000), ChunkRun::new(0, 2));
        assert_eq!(chunks(0x10_4000..0x10_5000), ChunkRun::new(2, 1));
        assert_eq!(areas.no_chunks().chunks(), 3);
    }
}
