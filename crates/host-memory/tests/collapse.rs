//! Private memory that the host collapses into huge pages by itself: ballooned memory stays with
//! the host, and memory that the guest uses may have huge pages.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use host_memory::resident::resident_bytes;
use host_memory::{
    Discard, HostPages, Huge, MemoryMap, Reclaimer, ReclaimerOptions, Region, ReleaseMode,
    advise_huge,
};
use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const HUGE_BYTES: usize = 2 << 20;
const CHUNKS: u64 = 32;
const PAGES: u64 = CHUNKS * CHUNK_PAGES;
/// First page of the guest's memory, not aligned on the host's huge pages.
const START: u64 = 7;
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Collapses as khugepaged does, but at once (Linux 6.1).
const MADV_COLLAPSE: libc::c_int = 25;

struct Guest {
    memory: GuestMemoryMmap,
    map: MemoryMap,
    reclaimer: Reclaimer,
}

impl Guest {
    fn new(mode: ReleaseMode) -> Self {
        let len = usize::try_from(PAGES * PAGE_BYTES).unwrap();
        let ranges = [(GuestAddress(START * PAGE_BYTES), len)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let region = memory.iter().next().unwrap();
        advise_huge(region, Huge::May).unwrap();
        let known = Region::of_mapping(region).unwrap().with_host_pages(HostPages::Transparent);
        let map = MemoryMap::new(vec![known]).unwrap();
        let options = ReclaimerOptions { mode, ..ReclaimerOptions::default() };
        let reclaimer = Reclaimer::new(Arc::new(map.clone()) as Arc<dyn Discard>, options).unwrap();
        let guest = Self { memory, map, reclaimer };
        guest.touch(&range(START, PAGES).into());
        guest
    }

    fn touch(&self, pages: &PageSet) {
        for page in pages.ranges().flat_map(|range| range.start()..range.end()) {
            self.memory.write_obj(page + 1, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
    }

    fn wait_idle(&self) {
        self.reclaimer.flush();
        assert!(self.reclaimer.wait_idle(TEST_TIMEOUT));
        assert_eq!(self.reclaimer.counters().huge_failures, 0);
    }

    fn resident_pages(&self) -> u64 {
        resident_bytes(&self.map).unwrap() / PAGE_BYTES
    }

    fn addresses(&self) -> (usize, usize) {
        let region = self.memory.iter().next().unwrap();
        let start = region.as_ptr() as usize;
        (start, start + usize::try_from(region.len()).unwrap())
    }

    /// Collapses each 2 MiB into a huge page, if permitted; returns the number of huge pages.
    fn collapse(&self) -> usize {
        let (start, end) = self.addresses();
        let mut huge = 0;
        let mut at = start.next_multiple_of(HUGE_BYTES);
        while at + HUGE_BYTES <= end {
            // SAFETY: a part of the guest's memory; no byte is changed.
            let result = unsafe {
                libc::madvise(ptr::with_exposed_provenance_mut(at), HUGE_BYTES, MADV_COLLAPSE)
            };
            huge += usize::from(result == 0);
            at += HUGE_BYTES;
        }
        huge
    }

    /// Number of the kernel's mappings of the guest's memory.
    fn mappings(&self) -> usize {
        let (start, end) = self.addresses();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let parse = |text: &str| usize::from_str_radix(text, 16).unwrap();
        let bounds = maps.lines().map(|line| line.split_once(' ').unwrap().0);
        let bounds = bounds.map(|bounds| bounds.split_once('-').unwrap());
        bounds.filter(|(from, to)| parse(from) < end && parse(to) > start).count()
    }
}

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(start, pages).unwrap()
}

/// Every `step`-th page of `chunks` chunks from `chunk` on.
fn scattered(chunk: u64, chunks: u64, step: usize) -> PageSet {
    let first = START + chunk * CHUNK_PAGES;
    (first..first + chunks * CHUNK_PAGES).step_by(step).map(|page| range(page, 1)).collect()
}

#[test]
fn ballooned_memory_does_not_come_back_in_huge_pages() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
        let guest = Guest::new(mode);
        let all = guest.collapse();
        if all == 0 {
            eprintln!("SKIPPED: this kernel has no MADV_COLLAPSE (Linux 6.1 has)");
            return;
        }
        assert_eq!(guest.resident_pages(), PAGES);

        let mut given = scattered(0, 16, 8);
        given.insert(range(START + 20 * CHUNK_PAGES, 2 * CHUNK_PAGES));
        guest.reclaimer.release(&given);
        guest.wait_idle();
        assert_eq!(guest.resident_pages(), PAGES - given.len(), "{mode:?}");
        let huge = guest.collapse();
        assert_eq!(guest.resident_pages(), PAGES - given.len(), "{mode:?}: it came back");
        // From 16 to 20 and from 22 to 32, except those at the borders.
        assert!((10..=14).contains(&huge), "{mode:?}: {huge} huge pages of {all}");

        // Only extents that the guest has taken back completely may be huge again.
        let back = scattered(0, 8, 8);
        guest.reclaimer.retain(&back);
        guest.touch(&back);
        given.subtract(&back);
        let more = guest.collapse();
        assert_eq!(guest.resident_pages(), PAGES - given.len(), "{mode:?}: it came back");
        assert!(more >= huge + 7, "{mode:?}: {more} huge pages, and {huge} before");

        let rest = given.clone();
        guest.reclaimer.retain(&rest);
        guest.touch(&rest);
        assert_eq!(guest.collapse(), all, "{mode:?}");
        assert_eq!(guest.mappings(), 1, "{mode:?}");
    }
}

/// The guest takes one page back out of 2 MiB that it gave up completely.
#[test]
fn a_fault_beside_ballooned_memory_allocates_one_page() {
    let guest = Guest::new(ReleaseMode::Background);
    let whole = range(START + 4 * CHUNK_PAGES, 4 * CHUNK_PAGES);
    guest.reclaimer.release(&whole.into());
    guest.wait_idle();
    let one = PageSet::from(range(whole.start() + CHUNK_PAGES + 100, 1));
    guest.reclaimer.retain(&one);
    guest.touch(&one);
    assert_eq!(guest.resident_pages(), PAGES - whole.pages() + 1);
}

/// A guest that may use its pages again without a message, and a guest that is reset.
#[test]
fn pages_released_at_once_keep_their_marks_until_a_reset() {
    let guest = Guest::new(ReleaseMode::Background);
    let all = guest.collapse();
    let given = scattered(0, 16, 8);
    guest.reclaimer.release_now(&given);
    guest.collapse();
    assert_eq!(guest.resident_pages(), PAGES - given.len());
    assert!(guest.mappings() > 1);
    guest.reclaimer.retain_all();
    assert_eq!(guest.mappings(), 1);
    guest.touch(&given);
    assert_eq!(guest.collapse(), all);
}

/// The worst case: every second 2 MiB has a ballooned page.
#[test]
fn the_mappings_are_bounded_and_merge() {
    let guest = Guest::new(ReleaseMode::Background);
    let given: PageSet = (0..CHUNKS)
        .step_by(2)
        .flat_map(|chunk| scattered(chunk, 1, 512).ranges().collect::<Vec<_>>())
        .collect();
    guest.reclaimer.release(&given);
    guest.wait_idle();
    let most = usize::try_from(CHUNKS).unwrap() + 2;
    assert!((most / 2..=most).contains(&guest.mappings()), "{}", guest.mappings());
    guest.reclaimer.release(&range(START, PAGES).into());
    guest.wait_idle();
    assert_eq!(guest.mappings(), 1);
    guest.reclaimer.retain(&range(START, PAGES).into());
    assert_eq!(guest.mappings(), 1);
    // Back to the initial state.
    guest.touch(&range(START, PAGES).into());
    assert!(guest.collapse() > 0 || guest.resident_pages() == PAGES);
}
