//! Releases the memory of a page set to the host.

use std::time::{Duration, Instant};

use page_set::{PAGE_BYTES, PageRange, PageSet};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::advise::{advise, vectors_work};
use crate::{Backing, Huge, MemoryMap, PartialHuge, Piece, Region, resident};

/// Failures that a report keeps in full. Beyond that they are only counted, so that a
/// host which refuses everything costs bounded memory.
pub const KEPT_FAILURES: usize = 16;

/// Pieces that are translated before they are released. Bounds memory (24 KiB per
/// thousand) and is far more than the limit of one vectored call.
const PIECES_PER_PASS: usize = 4096;

/// Pages in one request of a classic driver, and so what the per-page mode translates
/// before it releases
/// (`VIRTIO_BALLOON_ARRAY_PFNS_MAX` in `drivers/virtio/virtio_balloon.c`).
const PER_PAGE_REQUEST_PAGES: usize = 256;

/// Memory whose pages can be released: a [`MemoryMap`], or a model in tests.
pub trait Discard: Send + Sync {
    /// Size of the largest host page, in 4 KiB pages; 1 if all are small.
    fn largest_host_page(&self) -> u64;

    /// Removes from `pages` those that must wait because `pages` does not contain their
    /// whole host page; returns them.
    fn take_partial(&self, pages: &mut PageSet, partial_huge: PartialHuge) -> PageSet;

    /// Removes from `pages` those that cannot be reserved again before the guest uses them; returns
    /// them.
    fn take_unpromised(&self, _pages: &mut PageSet) -> PageSet {
        PageSet::new()
    }

    /// True if the host may collapse parts of this memory into huge pages by itself: some
    /// [extents](Self::extents) are not empty.
    fn collapses(&self) -> bool {
        false
    }

    /// The extents around `pages` that the host could collapse into huge pages, which would
    /// allocate released pages again. Empty if it does not do so by itself.
    fn extents(&self, _pages: &PageSet) -> PageSet {
        PageSet::new()
    }

    /// Allows or forbids huge pages in such extents; returns those for which that failed.
    fn set_huge(&self, _extents: &PageSet, _huge: Huge) -> PageSet {
        PageSet::new()
    }

    /// Releases the memory of `pages` with the fewest calls. Failures are in the report;
    /// it always tries all pages.
    fn discard(&self, pages: &PageSet) -> DiscardReport;

    /// 4 KiB pages that the host spends on the guest now, or `None` if that requires
    /// reading an entry for each page.
    fn resident_pages(&self) -> Option<u64>;

    /// As [`discard`](Self::discard), page by page: one look-up and one call each, as
    /// QEMU did until 2016. For comparison only.
    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport;
}

/// The result of releasing pages.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct DiscardReport {
    /// System calls.
    pub calls: u64,
    /// Runs of pages released, split at region borders.
    pub ranges: u64,
    /// Pages released (4 KiB each), whether they were resident or not.
    pub pages: u64,
    /// Pages that the host refused to release.
    pub failed_pages: u64,
    /// Pages outside guest memory: the caller's fault.
    pub outside_pages: u64,
    /// The first [`KEPT_FAILURES`] failures.
    pub failures: Vec<DiscardFailure>,
    /// Number of failures.
    pub failure_count: u64,
    /// Time spent translating pages to regions.
    pub translate: Duration,
    /// Time spent releasing.
    pub release: Duration,
}

/// A run of pages that the host did not release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot release pages {pages:?}: {call}")]
pub struct DiscardFailure {
    /// The pages.
    pub pages: PageRange,
    /// The call that failed.
    pub call: DiscardCall,
    /// The host's error.
    #[source]
    pub errno: Errno,
}

/// The call that releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardCall {
    /// `fallocate` with FALLOC_FL_PUNCH_HOLE.
    PunchHole,
    /// `madvise` or `process_madvise` with MADV_DONTNEED.
    DontNeed,
}

impl std::fmt::Display for DiscardCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PunchHole => "punching a hole into its file failed",
            Self::DontNeed => "madvise(MADV_DONTNEED) failed",
        })
    }
}

impl Discard for MemoryMap {
    fn largest_host_page(&self) -> u64 {
        self.regions().iter().map(|region| region.host_pages().largest_pages()).max().unwrap_or(1)
    }

    fn take_partial(&self, pages: &mut PageSet, partial_huge: PartialHuge) -> PageSet {
        self.take_partial(pages, partial_huge)
    }

    fn take_unpromised(&self, pages: &mut PageSet) -> PageSet {
        self.take_unpromised(pages)
    }

    fn collapses(&self) -> bool {
        self.collapsible().next().is_some()
    }

    fn extents(&self, pages: &PageSet) -> PageSet {
        self.extents_of(pages)
    }

    fn set_huge(&self, extents: &PageSet, huge: Huge) -> PageSet {
        self.advise_extents(extents, huge)
    }

    fn resident_pages(&self) -> Option<u64> {
        let shared = |region: &Region| matches!(region.backing(), Backing::Shared { .. });
        let bytes = self.regions().iter().all(shared).then(|| resident::resident_bytes(self));
        Some(bytes?.ok()? / PAGE_BYTES)
    }

    fn discard(&self, pages: &PageSet) -> DiscardReport {
        self.observers.notify(pages, || discard_merged(self, pages))
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        self.observers.notify(pages, || discard_one_by_one(self, pages))
    }
}

fn discard_merged(map: &MemoryMap, pages: &PageSet) -> DiscardReport {
    let mut report = DiscardReport::default();
    let mut located = pages.ranges().flat_map(|range| map.translate(range));
    let mut pieces = Vec::new();
    loop {
        let started = Instant::now();
        pieces.clear();
        let mut seen = 0;
        for piece in located.by_ref().take(PIECES_PER_PASS) {
            seen += 1;
            match piece {
                Ok(piece) => pieces.push(piece),
                Err(outside) => report.outside_pages += outside.pages.pages(),
            }
        }
        let translated = Instant::now();
        report.translate += translated - started;
        if seen == 0 {
            break;
        }
        release(&pieces, &mut report);
        report.release += translated.elapsed();
    }
    report
}

fn discard_one_by_one(map: &MemoryMap, pages: &PageSet) -> DiscardReport {
    let mut report = DiscardReport::default();
    let mut numbers = pages.ranges().flat_map(|range| range.start()..range.end());
    let mut request = Vec::with_capacity(PER_PAGE_REQUEST_PAGES);
    let mut pieces = Vec::with_capacity(PER_PAGE_REQUEST_PAGES);
    loop {
        request.clear();
        request.extend(numbers.by_ref().take(PER_PAGE_REQUEST_PAGES));
        if request.is_empty() {
            return report;
        }
        // Two passes, so that the clock is read twice for 256 pages and not
        // for each.
        let started = Instant::now();
        pieces.clear();
        pieces.extend(request.iter().filter_map(|&page| map.find(page)));
        let translated = Instant::now();
        report.outside_pages += (request.len() - pieces.len()) as u64;
        report.translate += translated - started;
        for piece in &pieces {
            release(std::slice::from_ref(piece), &mut report);
        }
        report.release += translated.elapsed();
    }
}

/// Releases pieces in order: files hole by hole, runs of anonymous memory
/// by vectors.
fn release(pieces: &[Piece<'_>], report: &mut DiscardReport) {
    let anonymous = |piece: &Piece<'_>| matches!(piece.region.backing(), Backing::Anonymous(_));
    for run in pieces.chunk_by(|a, b| anonymous(a) == anonymous(b)) {
        if run.first().is_some_and(anonymous) {
            let calls = advise(run, vectors_work(), |piece, result| {
                report.count(piece, DiscardCall::DontNeed, result);
            });
            report.calls += calls;
        } else {
            for piece in run {
                report.calls += 1;
                let result = punch_hole(piece);
                report.count(piece, DiscardCall::PunchHole, result);
            }
        }
    }
}

/// Removes the memory of `piece` from its file and from every mapping of it.
fn punch_hole(piece: &Piece<'_>) -> Result<(), Errno> {
    let Backing::Shared { file, .. } = piece.region.backing() else { return Err(Errno::INVAL) };
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file, mode, piece.start_bytes(), piece.len_bytes()) {
            // Interrupted by a signal at an unknown offset; punching twice is
            // harmless.
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

impl DiscardReport {
    fn count(&mut self, piece: &Piece<'_>, call: DiscardCall, result: Result<(), Errno>) {
        match result {
            Ok(()) => {
                self.ranges += 1;
                self.pages += piece.pages.pages();
            }
            Err(errno) => {
                self.failed_pages += piece.pages.pages();
                self.failure_count += 1;
                if self.failures.len() < KEPT_FAILURES {
                    self.failures.push(DiscardFailure { pages: piece.pages, call, errno });
                }
            }
        }
    }
}
