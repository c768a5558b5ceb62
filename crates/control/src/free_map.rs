//! Free pages of a guest: exact, and as a coarse map.

use std::sync::Arc;

use page_set::{PageRange, PageSet};

use crate::api::{CoarseMap, CoarseRegion, FreePages};

/// Cells in a coarse map: a few lines of a terminal. A region that does not fill its last cell
/// adds at most one more.
const MAX_CELLS: u64 = 512;

/// The newest free pages and the guest memory around them. Immutable, so that server threads read
/// it without blocking the balloon.
#[derive(Clone, Debug, Default)]
pub struct FreePagesMap {
    /// The summary, without the coarse map.
    pub summary: FreePages,
    /// Guest memory, lowest first; no two regions are adjacent.
    pub regions: Vec<PageRange>,
    /// The free pages.
    pub free: Arc<PageSet>,
    /// Pages in the balloon.
    pub balloon: PageSet,
}

impl FreePagesMap {
    /// Returns the summary with its coarse map. Linear in the runs of both sets.
    pub fn summarize(mut self) -> FreePages {
        let cell_pages = cell_pages(&self.regions, MAX_CELLS);
        let region = |range: &PageRange| CoarseRegion {
            first_page: range.start(),
            pages: range.pages(),
            free_pages: counts(&self.free, *range, cell_pages),
            balloon_pages: counts(&self.balloon, *range, cell_pages),
        };
        let regions = self.regions.iter().map(region).collect();
        self.summary.map = CoarseMap { cell_pages, regions };
        self.summary
    }
}

/// Returns the smallest power of two of pages per cell with which `regions` have about
/// `max_cells` cells or fewer.
pub(crate) fn cell_pages(regions: &[PageRange], max_cells: u64) -> u64 {
    let pages = regions.iter().fold(0u64, |sum, range| sum.saturating_add(range.pages()));
    pages.div_ceil(max_cells).max(1).checked_next_power_of_two().unwrap_or(1 << 63)
}

/// Counts the pages of `set` in each cell of `range`.
pub(crate) fn counts(set: &PageSet, range: PageRange, cell_pages: u64) -> Vec<u64> {
    let cells = usize::try_from(range.pages().div_ceil(cell_pages)).unwrap_or(0);
    let mut counts = vec![0; cells];
    for run in set.ranges_in(range) {
        let (mut from, end) = (run.start() - range.start(), run.end() - range.start());
        while from < end {
            let cell = from / cell_pages;
            let to = ((cell + 1) * cell_pages).min(end);
            if let Some(count) = usize::try_from(cell).ok().and_then(|cell| counts.get_mut(cell)) {
                *count += to - from;
            }
            from = to;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    #[test]
    fn a_run_is_counted_in_every_cell_it_overlaps() {
        let set = PageSet::from_iter([range(0, 5), range(102, 7), range(120, 100)]);
        assert_eq!(counts(&set, range(100, 25), 8), [6, 1, 4, 1]);
        assert_eq!(counts(&set, range(300, 8), 8), [0]);
    }

    #[test]
    fn cells_are_as_small_as_the_limit_allows() {
        assert_eq!(cell_pages(&[], 512), 1);
        assert_eq!(cell_pages(&[range(0, 512)], 512), 1);
        assert_eq!(cell_pages(&[range(0, 500), range(600, 13)], 512), 2);
        assert_eq!(cell_pages(&[range(0, 1 << 52)], 512), 1 << 43);
    }
}
