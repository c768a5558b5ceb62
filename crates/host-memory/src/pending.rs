//! Which pages may be discarded now: the state of background release, as a plain
//! value without locks, threads or clocks.
//!
//! *Given* pages are those that the guest gave up: they were added and not retained.
//! A given page is released, or in one of these sets: *pending* (not yet released),
//! *waiting* (its host page must be released whole, and the guest did not give up the
//! rest), *in flight* (a thread may be discarding it right now), *to be swept*
//! (released, and to be released again because a huge page of the host has come back
//! around it, or may have). There is at most one batch in flight.
//!
//! # Why a page that was retained is not discarded
//! Discarding happens only between [`PendingRelease::begin`] and
//! [`PendingRelease::finish`], and only to pages of the [`Batch`] that `begin`
//! returned: a thread that discards has no other source of pages.
//!
//! 1. A page enters a batch only from *pending*, *waiting* or *to be swept*, and the
//!    last is only ever filled from *given*.
//! 2. [`PendingRelease::retain`] removes its pages from all four, so no later `begin`
//!    can return them before [`PendingRelease::add`] adds them again.
//! 3. If it returns [`Retained::Yes`], no batch in flight contains any of them either.
//!    A finished batch is no longer discarded: `finish` takes the batch by value, and
//!    it cannot be copied.
//! 4. If it returns [`Retained::InFlight`], the caller retries after the batch was
//!    finished. `finish` may have moved pages of the batch to *waiting*; the second
//!    call removes them from there (point 2), and then point 3 holds.
//!
//! So once `retain` has returned yes, none of its pages is discarded until it is added
//! again.

use std::sync::Arc;

use page_set::{CHUNK_PAGES, PAGE_NUMBER_END, PageRange, PageSet};

/// The state; see the module.
#[derive(Debug, Default)]
pub struct PendingRelease {
    given: PageSet,
    pending: PageSet,
    waiting: PageSet,
    sweep: PageSet,
    in_flight: Option<Flight>,
    /// Pages that have moved from pending to a batch.
    begun_pages: u64,
    /// Batches that were finished.
    finished_batches: u64,
}

#[derive(Debug)]
struct Flight {
    pages: Arc<PageSet>,
    swept: bool,
}

/// Pages that may be discarded until the batch is passed to
/// [`PendingRelease::finish`].
#[derive(Debug)]
#[must_use = "pages stay in flight until the batch is finished"]
pub struct Batch {
    pages: Arc<PageSet>,
    swept: bool,
}

/// The pending pages of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Whole 2 MiB chunks only, up to this many pages.
    Chunks(u64),
    /// Up to this many pages: whole chunks first if the host has huge pages; else the
    /// lowest.
    Any(u64),
    /// Everything.
    All,
}

/// Result of [`PendingRelease::retain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Retained {
    /// None of the pages will be discarded.
    Yes,
    /// Some are in flight: retry once the batch is finished.
    InFlight,
}

impl Batch {
    /// The pages.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// True if the pages were released before.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.swept
    }
}

impl PendingRelease {
    /// Adds pages to be released.
    pub fn add(&mut self, pages: &PageSet) {
        self.given.union_with(pages);
        self.pending.union_with(pages);
        self.waiting.subtract(pages);
        self.sweep.subtract(pages);
    }

    /// Takes pages back; see [`Retained`]. Also returns how many of them were not yet
    /// released.
    pub fn retain(&mut self, pages: &PageSet) -> (Retained, u64) {
        let before = self.pending.len() + self.waiting.len();
        self.given.subtract(pages);
        self.pending.subtract(pages);
        self.waiting.subtract(pages);
        self.sweep.subtract(pages);
        let cancelled = before - self.pending.len() - self.waiting.len();
        let flight = self.in_flight.as_ref();
        let in_flight = flight.is_some_and(|flight| flight.pages.intersects(pages));
        (if in_flight { Retained::InFlight } else { Retained::Yes }, cancelled)
    }

    /// Takes back everything that is not in flight.
    pub fn forget(&mut self) {
        self.given.clear();
        self.pending.clear();
        self.waiting.clear();
        self.sweep.clear();
    }

    /// The next range from `from` on with given pages, at most `limit` page numbers long, and its
    /// released pages.
    #[must_use]
    pub fn next_released(&self, from: u64, limit: u64) -> Option<(PageRange, PageSet)> {
        let rest = PageRange::from_bounds(from, PAGE_NUMBER_END).ok()?;
        let first = self.given.ranges_in(rest).next()?.start();
        let end = first.saturating_add(limit).min(PAGE_NUMBER_END);
        let range = PageRange::from_bounds(first, end).ok()?;
        let mut released = self.given.copy_range(range);
        released.subtract(&self.pending);
        released.subtract(&self.waiting);
        Some((range, released))
    }

    /// Marks to be swept those of `chosen` that are released and not pending again. Ignores pages
    /// that were taken back since they were chosen.
    pub fn sweep(&mut self, mut chosen: PageSet) {
        let mut taken_back = chosen.clone();
        taken_back.subtract(&self.given);
        for others in [&taken_back, &self.pending, &self.waiting] {
            chosen.subtract(others);
        }
        self.sweep.union_with(&chosen);
    }

    /// True if pages are to be swept.
    #[must_use]
    pub fn is_to_be_swept(&self) -> bool {
        !self.sweep.is_empty()
    }

    /// Begins a batch of up to `limit` pages to be swept, whole chunks first. `None` if there
    /// are none, or a batch is in flight.
    pub fn begin_sweep(&mut self, limit: u64) -> Option<Batch> {
        if self.in_flight.is_some() {
            return None;
        }
        let pages = match self.sweep.take_full_chunks(limit) {
            chunks if chunks.is_empty() => self.sweep.take_up_to(limit),
            chunks => chunks,
        };
        self.start(pages, true)
    }

    /// Begins a batch. `None` if nothing suits, or one is in flight. Adds waiting pages
    /// within `largest_host_page` pages of the batch, since together they may be a whole
    /// host page.
    pub fn begin(&mut self, take: Take, largest_host_page: u64) -> Option<Batch> {
        if self.in_flight.is_some() {
            return None;
        }
        let before = self.pending.len();
        let mut pages = match take {
            Take::All => std::mem::take(&mut self.pending),
            Take::Chunks(limit) => self.pending.take_full_chunks(limit),
            // Small pages gain nothing from whole chunks, only from long ranges.
            Take::Any(limit) if largest_host_page <= 1 => self.pending.take_up_to(limit),
            Take::Any(limit) => match self.pending.take_full_chunks(limit) {
                chunks if chunks.is_empty() => self.pending.take_up_to(limit),
                chunks => chunks,
            },
        };
        self.begun_pages += before - self.pending.len();
        if !self.waiting.is_empty() {
            let joined = self.take_neighbours(&pages, largest_host_page);
            pages.union_with(&joined);
        }
        if largest_host_page > 1 {
            self.sweep_completed(&pages);
        }
        self.start(pages, false)
    }

    /// Ends a batch: its pages are no longer discarded. Those in `partial` were not
    /// released and wait for the rest of their host page; for a swept batch, only if they
    /// waited before.
    pub fn finish(&mut self, batch: Batch, partial: &PageSet) {
        let flight = self.in_flight.as_ref();
        debug_assert!(flight.is_some_and(|flight| Arc::ptr_eq(&flight.pages, &batch.pages)));
        if batch.swept {
            let mut gone = (*batch.pages).clone();
            gone.subtract(partial);
            self.waiting.subtract(&gone);
        } else {
            self.waiting.union_with(partial);
        }
        // Given again meanwhile: those are part of the next batch.
        self.waiting.subtract(&self.pending);
        self.in_flight = None;
        self.finished_batches += 1;
    }

    /// Makes waiting pages pending again, after the rule for parts changed.
    pub fn retry_waiting(&mut self) {
        self.pending.union_with(&std::mem::take(&mut self.waiting));
    }

    /// Given pages that are not yet in a batch.
    #[must_use]
    pub fn pending(&self) -> &PageSet {
        &self.pending
    }

    /// Pages that wait for the rest of their host page.
    #[must_use]
    pub fn waiting(&self) -> &PageSet {
        &self.waiting
    }

    /// Pages that were added and not retained since.
    #[must_use]
    pub fn given(&self) -> &PageSet {
        &self.given
    }

    /// Pages that are being discarded for the first time.
    #[must_use]
    pub fn in_flight_pages(&self) -> u64 {
        self.in_flight
            .as_ref()
            .filter(|flight| !flight.swept)
            .map_or(0, |flight| flight.pages.len())
    }

    /// Pages that have moved from pending to a batch; only grows.
    #[must_use]
    pub const fn begun_pages(&self) -> u64 {
        self.begun_pages
    }

    /// Batches that were finished.
    #[must_use]
    pub const fn finished_batches(&self) -> u64 {
        self.finished_batches
    }

    /// True while a batch is in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Marks to be swept each chunk whose last missing part is in `pages`. The guest may have
    /// used such a part briefly, which brought the whole huge page back; releasing only the
    /// part would leave the rest of it allocated.
    fn sweep_completed(&mut self, pages: &PageSet) {
        let mut last = None;
        for range in pages.ranges() {
            for chunk in [range.start() / CHUNK_PAGES, (range.end() - 1) / CHUNK_PAGES] {
                let start = chunk * CHUNK_PAGES;
                let Ok(whole) = PageRange::from_bounds(start, start + CHUNK_PAGES) else {
                    continue;
                };
                let is_part = range.intersection(whole) != whole;
                if is_part && last.replace(chunk) != Some(chunk) && self.was_released(whole) {
                    self.sweep.insert(whole);
                }
            }
        }
    }

    /// True if all of it is given, and none of it is still to be released, except the pages
    /// of the new batch.
    fn was_released(&self, range: PageRange) -> bool {
        self.given.ranges_in(range).next() == Some(range)
            && !self.pending.intersects_range(range)
            && !self.waiting.intersects_range(range)
    }

    fn start(&mut self, pages: PageSet, swept: bool) -> Option<Batch> {
        if pages.is_empty() {
            return None;
        }
        let pages = Arc::new(pages);
        self.in_flight = Some(Flight { pages: Arc::clone(&pages), swept });
        Some(Batch { pages, swept })
    }

    /// Waiting pages that may share a host page with one of `pages`.
    fn take_neighbours(&mut self, pages: &PageSet, largest_host_page: u64) -> PageSet {
        let mut found = PageSet::new();
        let reach = largest_host_page.saturating_sub(1);
        for range in pages.ranges() {
            let start = range.start().saturating_sub(reach);
            let end = range.end().saturating_add(reach).min(PAGE_NUMBER_END);
            if let Ok(around) = PageRange::from_bounds(start, end) {
                found.union_with(&self.waiting.take_range(around));
            }
        }
        found
    }
}
