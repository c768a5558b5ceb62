//! Huge pages that come back around pages that were released: when they are looked for,
//! and what of them is released once more.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use page_set::CHUNK_PAGES;

use super::{BATCH_PAGES, Inner, ReleaseMode, Shared, Step};
use crate::PartialHuge;

/// How often the worker looks whether huge pages have come back, in milliseconds.
/// A look is one fstat; the host shall not wait long for memory that it was given.
pub const SWEEP_LOOK_MS: u64 = 1000;

/// Page numbers that one look takes under the lock at a time (64 GiB): at most 2 MiB are
/// copied for them, which takes some 0.3 ms.
const LOOK_PAGES: u64 = 1 << 24;

/// How rare looks become, in milliseconds, while sweeps find nothing: one may take
/// a microsecond or two for each of the ranges that the guest gave.
pub const SWEEP_LOOK_MAX_MS: u64 = 64_000;

/// When to look for huge pages that came back.
pub(super) struct Look {
    pub(super) at: Instant,
    every: Duration,
    /// Pages that the host spent on the guest when the last sweep had ended.
    swept_to: Option<u64>,
    /// The same when the present sweep began.
    sweeping_from: Option<u64>,
    /// The guest took pages back since then.
    pub(super) taken_back: bool,
    /// The worker will wake by itself to look.
    pub(super) armed: bool,
}

impl Look {
    pub(super) fn new() -> Self {
        Self {
            at: Instant::now(),
            every: Duration::from_millis(SWEEP_LOOK_MS),
            swept_to: None,
            sweeping_from: None,
            taken_back: false,
            armed: false,
        }
    }

    /// The next one is as soon as one can be.
    pub(super) fn soon(&mut self) {
        self.every = Duration::from_millis(SWEEP_LOOK_MS);
        self.at = Instant::now() + self.every;
    }
}

impl Shared {
    /// Marks to be swept what may have come back. The host is asked, and sets of pages are
    /// gone through, without the lock: the guest goes on giving and taking back.
    ///
    /// A guest that took nothing back, and for which the host spends what it did before, has
    /// touched nothing.
    pub(super) fn look<'a>(&'a self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        let resident = memory.resident_pages();
        let mut inner = self.lock();
        let taken_back = std::mem::take(&mut inner.look.taken_back);
        if resident.is_none() || (!taken_back && resident == inner.look.swept_to) {
            return inner;
        }
        let mut from = 0;
        while !inner.stop
            && Arc::ptr_eq(&inner.memory, &memory)
            && let Some((range, mut released)) = inner.pages.next_released(from, LOOK_PAGES)
        {
            drop(inner);
            let chosen = memory.take_partial(&mut released, PartialHuge::Wait);
            from = range.end();
            inner = self.lock();
            // Other memory may be in its place by now, of which nothing was looked at.
            if Arc::ptr_eq(&inner.memory, &memory) {
                inner.pages.sweep(chosen);
            }
        }
        inner.look.sweeping_from = resident;
        inner
    }

    pub(super) fn end_sweep<'a>(
        &'a self,
        inner: MutexGuard<'a, Inner>,
        before: u64,
    ) -> MutexGuard<'a, Inner> {
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        let resident = memory.resident_pages();
        let mut inner = self.lock();
        inner.sweep_ended(before, resident, Instant::now());
        inner
    }
}

impl Inner {
    /// True where a huge page of the host may hold pages that were released.
    pub(super) fn may_return(&self) -> bool {
        let given = self.pages.given();
        self.partial_huge == PartialHuge::Split
            && self.mode != ReleaseMode::PerPage
            && self.memory.largest_host_page() > 1
            && given.len() > given.full_chunk_pages()
    }

    pub(super) fn has_to_sweep(&self) -> bool {
        self.mode != ReleaseMode::PerPage && self.pages.is_to_be_swept()
    }

    /// What to do while nothing is pending: release once more what came back.
    pub(super) fn next_sweep(&mut self) -> Step {
        if self.has_to_sweep()
            && let Some(batch) = self.pages.begin_sweep(BATCH_PAGES)
        {
            return Step::Run(batch);
        }
        if !self.may_return() {
            return Step::Wait;
        }
        if let Some(before) = self.look.sweeping_from.take() {
            return Step::EndSweep(before);
        }
        let now = Instant::now();
        if now >= self.look.at {
            self.look.at = now + self.look.every;
            return Step::Look;
        }
        self.look.armed = true;
        Step::WaitFor(self.look.at.saturating_duration_since(now))
    }

    fn sweep_ended(&mut self, before: u64, resident: Option<u64>, now: Instant) {
        self.look.swept_to = resident;
        let found = before.saturating_sub(self.look.swept_to.unwrap_or(before));
        self.look.every = if found >= CHUNK_PAGES {
            Duration::from_millis(SWEEP_LOOK_MS)
        } else {
            (self.look.every * 2).min(Duration::from_millis(SWEEP_LOOK_MAX_MS))
        };
        self.look.at = now + self.look.every;
    }
}
