//! Keeps transparent huge pages away from ballooned private memory.
//!
//! khugepaged collapses 2 MiB of which a single page is present (`max_ptes_none`), and a page fault
//! can do the same. Either brings released pages back. So each *extent* of 2 MiB, aligned on the host,
//! is `MADV_NOHUGEPAGE` from before its first page is released until its last ballooned page is
//! deflated. All other extents may have huge pages.
//!
//! Each run of such extents is a VMA, and a process may have 65530 (`vm.max_map_count`). So extents
//! are larger for guests above 64 GiB.
//!
//! Reported pages are not marked. No message says when the guest uses them again, so nothing could
//! remove the mark; and they come in blocks of 2 MiB and more, which khugepaged leaves alone as long
//! as they are empty.

use std::sync::{Mutex, MutexGuard, PoisonError};

use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};

use crate::huge::{Huge, advise};
use crate::{Backing, Discard, HostPages, MemoryMap, Region};

/// Runs of extents with small pages that may be, with as many between them: half of the mappings
/// that a process may have (`DEFAULT_MAX_MAP_COUNT` in the kernel's `include/linux/mm.h`).
const MAX_RUNS: u64 = 16_384;

/// Which extents have small pages.
///
/// Lock order: this lock, then the lock of the pages that are away. The deflating side removes a mark
/// only if it finds, under both locks, that no page of the extent is away. The releasing side records
/// a page as away first and marks its extent second. So either the page is found, or the mark comes
/// last.
#[derive(Debug, Default)]
pub(crate) struct Marks(Mutex<Marked>);

#[derive(Debug, Default)]
struct Marked {
    extents: PageSet,
    /// Ranges that the kernel did not take advice on.
    failures: u64,
}

impl Marks {
    /// Has the extents around pages that are about to be released keep to small pages.
    pub(crate) fn keep_small(&self, memory: &dyn Discard, pages: &PageSet) {
        let mut extents = memory.extents(pages);
        if extents.is_empty() {
            return;
        }
        let mut marked = self.lock();
        extents.subtract(&marked.extents);
        // What could not be marked is tried again with its next page.
        let failed = memory.set_huge(&extents, Huge::Never);
        marked.failures += failed.ranges().count() as u64;
        extents.subtract(&failed);
        marked.extents.union_with(&extents);
    }

    /// Lets the extents around pages that the guest took back have huge pages, but for those of which
    /// other pages are away: `extents_away` tells them, of those that it is asked for.
    pub(crate) fn let_huge(
        &self,
        memory: &dyn Discard,
        pages: &PageSet,
        extents_away: impl FnOnce(&PageSet) -> PageSet,
    ) {
        let around = memory.extents(pages);
        if around.is_empty() {
            return;
        }
        let mut marked = self.lock();
        let mut extents: PageSet =
            around.ranges().flat_map(|range| marked.extents.ranges_in(range)).collect();
        if extents.is_empty() {
            return;
        }
        extents.subtract(&memory.extents(&extents_away(&extents)));
        let failed = memory.set_huge(&extents, Huge::May);
        marked.failures += failed.ranges().count() as u64;
        extents.subtract(&failed);
        marked.extents.subtract(&extents);
    }

    /// The memory is another.
    pub(crate) fn forget(&self) {
        self.lock().extents.clear();
    }

    /// How often the kernel took no advice.
    pub(crate) fn failures(&self) -> u64 {
        self.lock().failures
    }

    /// The set is whole at every unlock.
    fn lock(&self) -> MutexGuard<'_, Marked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryMap {
    /// The extents that have any of `pages`, whole, where they may have huge pages.
    pub(crate) fn extents_of(&self, pages: &PageSet) -> PageSet {
        let private: u64 = self.collapsible().map(|region| region.pages().pages()).sum();
        let mut extents = PageSet::new();
        if private == 0 {
            return extents;
        }
        let extent_pages = extent_pages(private);
        for piece in pages.ranges().flat_map(|range| self.translate(range)).flatten() {
            if is_collapsible(piece.region) {
                extents.extend([around(piece.region, piece.pages, extent_pages)]);
            }
        }
        extents
    }

    /// Advises the kernel; returns what it took no advice on.
    pub(crate) fn advise_extents(&self, extents: &PageSet, huge: Huge) -> PageSet {
        let mut failed = PageSet::new();
        for piece in extents.ranges().flat_map(|range| self.translate(range)).flatten() {
            if is_collapsible(piece.region) && advise(&piece, huge).is_err() {
                failed.extend([piece.pages]);
            }
        }
        failed
    }

    pub(crate) fn collapsible(&self) -> impl Iterator<Item = &Region> {
        self.regions().iter().filter(|region| is_collapsible(region))
    }
}

/// Where the kernel makes huge pages by itself of memory of this process alone.
fn is_collapsible(region: &Region) -> bool {
    matches!(region.backing(), Backing::Anonymous(_))
        && region.host_pages() == HostPages::Transparent
}

/// Pages of an extent, for a guest with so many.
fn extent_pages(pages: u64) -> u64 {
    pages.div_ceil(2 * MAX_RUNS).next_power_of_two().max(CHUNK_PAGES)
}

/// The extents of a region that have any of `pages`, which lie in it.
fn around(region: &Region, pages: PageRange, extent_pages: u64) -> PageRange {
    // Counted from the host's borders, not the guest's.
    let shift = region.base_bytes() / PAGE_BYTES % extent_pages;
    let first = region.pages().start();
    let from = pages.start() - first + shift;
    let to = pages.end() - first + shift;
    let start = (from - from % extent_pages).saturating_sub(shift) + first;
    let end = to.next_multiple_of(extent_pages) - shift + first;
    // Inside the region, so both are numbers of pages.
    PageRange::from_bounds(start, end.min(region.pages().end())).unwrap_or(pages)
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use proptest::prelude::*;

    use super::*;

    /// A region at `host_page`, of which nothing is touched.
    fn region(start: u64, pages: u64, host_page: usize) -> Region {
        let pages = PageRange::new(start, pages).unwrap();
        let host = NonNull::new(std::ptr::without_provenance_mut(host_page * 4096)).unwrap();
        // SAFETY: its address is only counted with.
        unsafe { Region::anonymous_at(pages, host) }
            .unwrap()
            .with_host_pages(HostPages::Transparent)
    }

    #[test]
    fn a_large_guest_has_larger_extents_and_no_more_of_them() {
        assert_eq!(extent_pages(1), 512);
        assert_eq!(extent_pages(64 << 18), 512);
        assert_eq!(extent_pages((64 << 18) + 1), 1024);
        assert_eq!(extent_pages(1 << 28), 8192);
    }

    proptest! {
        #[test]
        fn extents_are_whole_by_the_hosts_borders_and_hold_their_pages(
            start in 0u64..5000,
            pages in 1u64..5000,
            host_page in 1usize..5000,
            at in 0u64..5000,
            len in 1u64..3000,
        ) {
            let region = region(start, pages, host_page);
            let at = start + at % pages;
            let asked = PageRange::from_bounds(at, (at + len).min(start + pages)).unwrap();
            let found = around(&region, asked, 512);
            prop_assert_eq!(found.intersection(asked), asked);
            prop_assert_eq!(found.intersection(region.pages()), found);
            let host = |page: u64| host_page as u64 + page - start;
            prop_assert!(found.start() == start || host(found.start()) % 512 == 0);
            prop_assert!(found.end() == start + pages || host(found.end()) % 512 == 0);
            prop_assert!(found.start() + 512 > asked.start());
            prop_assert!(found.end() < asked.end() + 512);
        }
    }
}
