//! Keeping huge pages off what the balloon has of private memory.
//!
//! The host makes a huge page of 2 MiB of which as little as one page is there: khugepaged does so by
//! itself (`max_ptes_none`), and so does a fault where none is. The rest comes back with it, and with
//! the rest what the guest gave. So each *extent* of 2 MiB, by the host's borders, from which the
//! balloon has a page is told to have small pages (`MADV_NOHUGEPAGE`), from before the first page of
//! it is released until the guest has taken the last one back. All others may have huge pages.
//!
//! Each run of such extents is a mapping of its own to the kernel, which allows a process 65530
//! (`vm.max_map_count`). So extents are larger where the guest has more than 64 GiB.
//!
//! What the guest only reports as free is not kept so. No word follows when it is used, so that
//! nothing could be ended by one; and it comes in blocks of 2 MiB and more, of which khugepaged makes
//! nothing as long as none of it is used.

use std::sync::{Mutex, MutexGuard, PoisonError};

use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};

use crate::huge::{Huge, advise};
use crate::{Backing, Discard, HostPages, MemoryMap, Region};

/// Runs of extents with small pages that may be, with as many between them: half of the mappings
/// that a process may have (`DEFAULT_MAX_MAP_COUNT` in the kernel's `include/linux/mm.h`).
const MAX_RUNS: u64 = 16_384;

/// Which extents have small pages.
///
/// Its lock comes before that of the pages that are away: whoever gives an extent huge pages
/// again looks under both that nothing of it is away. Who releases a page notes it as away first, and
/// has its extent marked then. So a page is either seen by the one, or marked after it by the other.
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
