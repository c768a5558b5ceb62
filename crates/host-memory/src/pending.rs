//! Which pages may be discarded now: the state behind background release, as a
//! plain value without locks, threads or clocks.
//!
//! A page is in at most these places: *pending* (given, not yet released),
//! *waiting* (given, but its host page must be released whole and the rest was
//! not given), *in flight* (some thread may be discarding it right now), *to be
//! swept* (given and released, and to be released again because a huge page of the
//! host has come back around it, or may have). There is at most one batch in flight. *Given*
//! are all of these and those that were released: what was added and not
//! retained.
//!
//! # Why a page that was retained is not discarded
//! Discarding happens only between [`PendingRelease::begin`] and
//! [`PendingRelease::finish`], and only to pages of the [`Batch`] that `begin`
//! returned: whoever discards can get pages from nowhere else.
//!
//! 1. A page enters a batch only out of *pending*, *waiting* or *to be swept*, and
//!    the last is only ever filled out of *given*.
//! 2. [`PendingRelease::retain`] takes its pages out of all four, so no later
//!    `begin` can return them before they are given anew by
//!    [`PendingRelease::add`].
//! 3. If it answers [`Retained::Yes`], no batch in flight holds any of them
//!    either. A batch that was finished is discarded no more: `finish` takes the
//!    batch by value, and it cannot be copied.
//! 4. If it answers [`Retained::InFlight`], the caller asks again after the batch
//!    was finished. `finish` may have moved pages of the batch to *waiting*; the
//!    second question takes them out there (point 2) and then point 3 holds.
//!
//! So once `retain` has answered yes, none of its pages is discarded until it is
//! added again.

use std::sync::Arc;

use page_set::{CHUNK_PAGES, PAGE_NUMBER_END, PageRange, PageSet};

/// See the module.
#[derive(Debug, Default)]
pub struct PendingRelease {
    given: PageSet,
    pending: PageSet,
    waiting: PageSet,
    sweep: PageSet,
    in_flight: Option<Flight>,
    /// Pages that were pending and came into a batch, so far.
    begun_pages: u64,
    /// Batches that were finished, so far.
    finished_batches: u64,
}

#[derive(Debug)]
struct Flight {
    pages: Arc<PageSet>,
    swept: bool,
}

/// Pages that may be discarded until the batch is given back to
/// [`PendingRelease::finish`].
#[derive(Debug)]
#[must_use = "pages stay in flight until the batch is finished"]
pub struct Batch {
    pages: Arc<PageSet>,
    swept: bool,
}

/// Which pending pages to begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Whole 2 MiB chunks only, up to so many pages.
    Chunks(u64),
    /// Up to so many pages: where the host has huge pages, whole chunks before
    /// others; else the lowest.
    Any(u64),
    /// Everything.
    All,
}

/// Answer of [`PendingRelease::retain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Retained {
    /// None of the pages will be discarded.
    Yes,
    /// Some are in flight: ask again once the batch is finished.
    InFlight,
}

impl Batch {
    /// The pages.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// True where the pages were released before.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.swept
    }
}

impl PendingRelease {
    /// Gives pages to be released.
    pub fn add(&mut self, pages: &PageSet) {
        self.given.union_with(pages);
        self.pending.union_with(pages);
        self.waiting.subtract(pages);
        self.sweep.subtract(pages);
    }

    /// Takes pages back; see [`Retained`]. Returns also how many pages it found
    /// not yet released.
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

    /// Takes everything back that is not in flight.
    pub fn forget(&mut self) {
        self.given.clear();
        self.pending.clear();
        self.waiting.clear();
        self.sweep.clear();
    }

    /// The next pages from `from` on, within at most `limit` page numbers, of which some
    /// were released.
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

    /// Marks to be swept what of `chosen` was released, and is not to be released anew by
    /// now: pages that were taken back since they were chosen are left alone.
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

    /// Begins a batch of up to so many pages to be swept, whole chunks before
    /// others: none if there are none or a batch is in flight.
    pub fn begin_sweep(&mut self, limit: u64) -> Option<Batch> {
        if self.in_flight.is_some() {
            return None;
        }
        let pages = match self.sweep.take_full_chunks(limit) {
            chunks if chunks.is_empty() => self.sweep.take_up_to(limit),
            chunks => chunks,
        };
        self.fly(pages, true)
    }

    /// Begins a batch: none if nothing suits or one is in flight. Pages that wait
    /// come along if a page within `largest_host_page` pages of them does, since
    /// together they may make a whole host page.
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
        self.fly(pages, false)
    }

    /// Ends a batch: nobody discards its pages any more. `partial` of them were
    /// left alone and wait for the rest of their host page; of a swept batch, as far
    /// as they did before.
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
        // Given again meanwhile: those come with the next batch.
        self.waiting.subtract(&self.pending);
        self.in_flight = None;
        self.finished_batches += 1;
    }

    /// Makes what waits pending again: the rule changed.
    pub fn retry_waiting(&mut self) {
        self.pending.union_with(&std::mem::take(&mut self.waiting));
    }

    /// Pages given and not yet begun.
    #[must_use]
    pub fn pending(&self) -> &PageSet {
        &self.pending
    }

    /// Pages that wait for the rest of their host page.
    #[must_use]
    pub fn waiting(&self) -> &PageSet {
        &self.waiting
    }

    /// Pages that were given and not retained since.
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

    /// Pages that were pending and came into a batch, so far: grows only.
    #[must_use]
    pub const fn begun_pages(&self) -> u64 {
        self.begun_pages
    }

    /// Batches that were finished, so far.
    #[must_use]
    pub const fn finished_batches(&self) -> u64 {
        self.finished_batches
    }

    /// True while a batch is in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Marks to be swept each chunk of which `pages` are the last missing part. Such
    /// a part may have been the guest's for a moment and have brought the whole huge
    /// page back; to release the part alone would leave the rest to the guest.
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

    /// True where all of it is given, and nothing of it still to be released but what
    /// a batch has just taken.
    fn was_released(&self, range: PageRange) -> bool {
        self.given.ranges_in(range).next() == Some(range)
            && !self.pending.intersects_range(range)
            && !self.waiting.intersects_range(range)
    }

    fn fly(&mut self, pages: PageSet, swept: bool) -> Option<Batch> {
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
