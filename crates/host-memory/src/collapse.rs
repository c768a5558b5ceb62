//! Keeps transparent huge pages away from ballooned private memory.
//!
//! khugepaged collapses 2 MiB of which a single page is present (`max_ptes_none`), and a page fault
//! can do the same. Either brings released pages back. So each *extent* of 2 MiB, aligned on the
//! host, is `MADV_NOHUGEPAGE` from before its first page is released until its last ballooned page
//! is deflated. All other extents may have huge pages.
//!
//! Each run of such extents is a VMA, and a process may have 65530 (`vm.max_map_count`). So extents
//! are larger for guests above 64 GiB.
//!
//! Reported pages are not marked. No message says when the guest uses them again, so nothing could
//! remove the mark; and reports have blocks of 2 MiB and more, which khugepaged does not collapse
//! as long as they are empty.

use std::sync::{Mutex, MutexGuard, PoisonError};

use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};

use crate::huge::{Huge, advise};
use crate::{Backing, Discard, HostPages, MemoryMap, Region};

/// Limit of runs of marked extents, with as many runs between them: half of the mappings that a
/// process may have (`DEFAULT_MAX_MAP_COUNT` in the kernel's `include/linux/mm.h`).
const MAX_RUNS: u64 = 16_384;

/// The marked extents: those with small pages.
///
/// Lock order: this lock, then the lock of the unused pages. The deflating side removes a mark only
/// if it finds, under both locks, that the guest uses every page of the extent. The releasing side
/// records a page as unused first and marks its extent second. So either the deflating side finds
/// the page, or the mark is set last.
#[derive(Debug, Default)]
pub(crate) struct Marks(Mutex<Marked>);

#[derive(Debug, Default)]
struct Marked {
    extents: PageSet,
    /// Ranges whose `madvise` failed.
    failures: u64,
}

impl Marks {
    /// Marks the extents around pages that are about to be released.
    pub(crate) fn mark(&self, memory: &dyn Discard, pages: &PageSet) {
        let mut extents = memory.extents(pages);
        if extents.is_empty() {
            return;
        }
        let mut marked = self.lock();
        extents.subtract(&marked.extents);
        // An extent that could not be marked is retried with its next page.
        let failed = memory.set_huge(&extents, Huge::Never);
        marked.failures += failed.ranges().count() as u64;
        extents.subtract(&failed);
        marked.extents.union_with(&extents);
    }

    /// Unmarks the extents around pages that the guest took back, except those with other unused
    /// pages. `unused_in` returns the unused pages of the given extents.
    pub(crate) fn unmark(
        &self,
        memory: &dyn Discard,
        pages: &PageSet,
        unused_in: impl FnOnce(&PageSet) -> PageSet,
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
        extents.subtract(&memory.extents(&unused_in(&extents)));
        let failed = memory.set_huge(&extents, Huge::May);
        marked.failures += failed.ranges().count() as u64;
        extents.subtract(&failed);
        marked.extents.subtract(&extents);
    }

    /// Forgets all marks: the memory was replaced.
    pub(crate) fn forget(&self) {
        self.lock().extents.clear();
    }

    /// Number of failed `madvise` ranges.
    pub(crate) fn failures(&self) -> u64 {
        self.lock().failures
    }

    /// The set is consistent at every unlock.
    fn lock(&self) -> MutexGuard<'_, Marked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryMap {
    /// The whole extents that overlap `pages`, in memory that may have huge pages.
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

    /// Advises the kernel; returns the pages whose `madvise` failed.
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

/// True if khugepaged may collapse the region: private memory of this process.
fn is_collapsible(region: &Region) -> bool {
    matches!(region.backing(), Backing::Anonymous(_))
        && region.host_pages() == HostPages::Transparent
}

/// Pages of an extent, for a guest with `pages` of private memory.
fn extent_pages(pages: u64) -> u64 {
    pages.div_ceil(2 * MAX_RUNS).next_power_of_two().max(CHUNK_PAGES)
}

/// The extents of a region that overlap `pages`, which lie in it.
fn around(region: &Region, pages: PageRange, extent_pages: u64) -> PageRange {
    // Aligned on the host, not in the guest.
    let shift = region.base_bytes() / PAGE_BYTES % extent_pages;
    let first = region.pages().start();
    let from = pages.start() - first + shift;
    let to = pages.end() - first + shift;
    let start = (from - from % extent_pages).saturating_sub(shift) + first;
    let end = to.next_multiple_of(extent_pages) - shift + first;
    // Inside the region, so both are valid page numbers.
    PageRange::from_bounds(start, end.min(region.pages().end())).unwrap_or(pages)
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use proptest::prelude::*;

    use super::*;

    /// A region at `host_page`, which is never touched.
    fn region(start: u64, pages: u64, host_page: usize) -> Region {
        let pages = PageRange::new(start, pages).unwrap();
        let host = NonNull::new(std::ptr::without_provenance_mut(host_page * 4096)).unwrap();
        // SAFETY: the address is only used for arithmetic.
        unsafe { Region::anonymous_at(pages, host) }
            .unwrap()
            .with_host_pages(HostPages::Transparent)
    }

    #[test]
    fn a_larger_guest_has_larger_extents_but_not_more() {
        assert_eq!(extent_pages(1), 512);
        assert_eq!(extent_pages(64 << 18), 512);
        assert_eq!(extent_pages((64 << 18) + 1), 1024);
        assert_eq!(extent_pages(1 << 28), 8192);
    }

    proptest! {
        #[test]
        fn extents_are_aligned_on_the_host_and_contain_their_pages(
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
