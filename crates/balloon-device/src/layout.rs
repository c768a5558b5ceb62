//! The layout of guest memory.

use balloon_abi::page::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT};
use page_set::{PageRange, PageSet};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Why a memory map is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A region that is empty or not aligned to balloon pages.
    #[error("front end: memory region of {bytes} bytes at {start:#x} is empty or unaligned")]
    Unaligned {
        /// Guest physical address.
        start: u64,
        /// Bytes of the region.
        bytes: u64,
    },
    /// Two regions overlap.
    #[error("front end: memory regions overlap at page {page:#x}")]
    Overlap {
        /// First balloon page of the later region.
        page: u64,
    },
}

/// The balloon pages of guest memory: sorted, with adjacent ranges merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryLayout {
    ranges: Vec<PageRange>,
    pages: u64,
}

impl MemoryLayout {
    /// Creates the layout of `(guest physical address, bytes)` regions.
    pub fn new(regions: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, LayoutError> {
        let mut sorted = regions
            .into_iter()
            .map(|(start, bytes)| {
                range_of(start, bytes).ok_or(LayoutError::Unaligned { start, bytes })
            })
            .collect::<Result<Vec<_>, _>>()?;
        sorted.sort_by_key(|range| range.start());
        let mut layout = Self::default();
        for range in sorted {
            layout.append(range)?;
        }
        Ok(layout)
    }

    /// Creates the layout of a `vm-memory` map.
    pub fn of(memory: &impl GuestMemoryBackend) -> Result<Self, LayoutError> {
        Self::new(memory.iter().map(|region| (region.start_addr().raw_value(), region.len())))
    }

    /// Number of balloon pages.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The pages as ranges, lowest first, no two of them adjacent.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// Returns the first page and the page after the last; `(0, 0)` without memory.
    pub fn bounds(&self) -> (u64, u64) {
        match (self.ranges.first(), self.ranges.last()) {
            (Some(first), Some(last)) => (first.start(), last.end()),
            _ => (0, 0),
        }
    }

    /// Iterates over the gaps between the ranges, lowest first.
    pub fn gaps(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.ranges
            .windows(2)
            .filter_map(|pair| PageRange::from_bounds(pair[0].end(), pair[1].start()).ok())
    }

    /// Returns true if every page of `range` is guest memory.
    pub fn covers(&self, range: PageRange) -> bool {
        let after = self.ranges.partition_point(|known| known.start() <= range.start());
        after.checked_sub(1).is_some_and(|at| range.is_within(self.ranges[at]))
    }

    /// Removes the pages that are not guest memory from `pages` and returns them.
    pub(crate) fn cut(&self, pages: &mut PageSet) -> PageSet {
        let mut gone = std::mem::take(pages);
        for range in &self.ranges {
            pages.union_with(&gone.take_range(*range));
        }
        gone
    }

    fn append(&mut self, range: PageRange) -> Result<(), LayoutError> {
        self.pages += range.pages();
        match self.ranges.last_mut() {
            Some(last) if range.start() < last.end() => {
                return Err(LayoutError::Overlap { page: range.start() });
            }
            Some(last) if range.start() == last.end() => {
                *last = PageRange::from_bounds(last.start(), range.end())
                    .map_err(|_| LayoutError::Overlap { page: range.start() })?;
            }
            _ => self.ranges.push(range),
        }
        Ok(())
    }
}

fn range_of(start: u64, bytes: u64) -> Option<PageRange> {
    let whole =
        start.is_multiple_of(BALLOON_PAGE_BYTES) && bytes.is_multiple_of(BALLOON_PAGE_BYTES);
    if !whole || bytes == 0 {
        return None;
    }
    PageRange::new(start >> BALLOON_PAGE_SHIFT, bytes >> BALLOON_PAGE_SHIFT).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    #[test]
    fn adjacent_ranges_are_merged_and_gaps_are_not_covered() {
        let layout =
            MemoryLayout::new([(0x4000, 0x2000), (0x0, 0x2000), (0x2000, 0x1000)]).unwrap();
        assert_eq!(layout.pages(), 5);
        assert_eq!(layout.bounds(), (0, 6));
        assert_eq!(layout.ranges(), [range(0, 3), range(4, 2)]);
        assert_eq!(layout.gaps().collect::<Vec<_>>(), [range(3, 1)]);
        assert!(layout.covers(range(0, 3)));
        assert!(layout.covers(range(4, 2)));
        assert!(!layout.covers(range(2, 2)), "page 3 is a gap");
        assert!(!layout.covers(range(3, 1)));
        assert!(!layout.covers(range(5, 2)), "beyond the end");
        assert!(!MemoryLayout::default().covers(range(0, 1)));
    }

    #[test]
    fn an_invalid_memory_map_is_rejected() {
        for (start, bytes) in [(1, 0x1000), (0, 0x1001), (0, 0), (!0xfff, 0x2000)] {
            let error = MemoryLayout::new([(start, bytes)]);
            assert_eq!(error, Err(LayoutError::Unaligned { start, bytes }));
        }
        let error = MemoryLayout::new([(0, 0x3000), (0x2000, 0x1000)]);
        assert_eq!(error, Err(LayoutError::Overlap { page: 2 }));
    }
}
