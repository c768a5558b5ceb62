//! Huge pages that come back around released pages: when the worker checks for them, and what
//! it releases again.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use page_set::CHUNK_PAGES;

use super::{BATCH_PAGES, Inner, ReleaseMode, Shared, Step};
use crate::PartialHuge;

/// Interval of the worker's checks whether huge pages have come back, in milliseconds. A
/// check is one fstat; the host should not lack the memory for long.
pub const SWEEP_INTERVAL_MS: u64 = 1000;

/// Page numbers that a check processes under the lock at a time (64 GiB): at most 2 MiB are
/// copied for them, which takes some 0.3 ms.
const CHECK_PAGES: u64 = 1 << 24;

/// Maximal interval of checks, in milliseconds, while sweeps find nothing: a sweep may take
/// a microsecond or two for each given range.
pub const SWEEP_INTERVAL_MAX_MS: u64 = 64_000;

/// When to check for huge pages that came back.
pub(super) struct SweepTimer {
    pub(super) at: Instant,
    interval: Duration,
    /// Pages that the host spent on the guest after the last sweep.
    swept_to: Option<u64>,
    /// The same when the current sweep began.
    sweeping_from: Option<u64>,
    /// The guest took pages back since then.
    pub(super) taken_back: bool,
    /// The worker has a timer for the next check.
    pub(super) armed: bool,
}

impl SweepTimer {
    pub(super) fn new() -> Self {
        Self {
            at: Instant::now(),
            interval: Duration::from_millis(SWEEP_INTERVAL_MS),
            swept_to: None,
            sweeping_from: None,
            taken_back: false,
            armed: false,
        }
    }

    /// Schedules the next check after the minimal interval.
    pub(super) fn soon(&mut self) {
        self.interval = Duration::from_millis(SWEEP_INTERVAL_MS);
        self.at = Instant::now() + self.interval;
    }
}

impl Shared {
    /// Marks to be swept what may have come back. Queries the host and processes page sets
    /// without the lock, so that the guest can give up and take back pages meanwhile.
    ///
    /// If the guest took nothing back and the host spends as much as before, nothing has come
    /// back.
    pub(super) fn check_huge<'a>(&'a self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        let resident = memory.resident_pages();
        let mut inner = self.lock();
        let taken_back = std::mem::take(&mut inner.sweep_timer.taken_back);
        if resident.is_none() || (!taken_back && resident == inner.sweep_timer.swept_to) {
            return inner;
        }
        let mut from = 0;
        while !inner.stop
            && Arc::ptr_eq(&inner.memory, &memory)
            && let Some((range, mut released)) = inner.pages.next_released(from, CHECK_PAGES)
        {
            drop(inner);
            let chosen = memory.take_partial(&mut released, PartialHuge::Wait);
            from = range.end();
            inner = self.lock();
            // The memory may have been replaced by now; the choice does not apply to the new one.
            if Arc::ptr_eq(&inner.memory, &memory) {
                inner.pages.sweep(chosen);
            }
        }
        inner.sweep_timer.sweeping_from = resident;
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
    /// True if a huge page of the host may contain released pages.
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

    /// The next step while nothing is pending: release again what came back.
    pub(super) fn next_sweep(&mut self) -> Step {
        if self.has_to_sweep()
            && let Some(batch) = self.pages.begin_sweep(BATCH_PAGES)
        {
            return Step::Run(batch);
        }
        if !self.may_return() {
            return Step::Wait;
        }
        if let Some(before) = self.sweep_timer.sweeping_from.take() {
            return Step::EndSweep(before);
        }
        let now = Instant::now();
        if now >= self.sweep_timer.at {
            self.sweep_timer.at = now + self.sweep_timer.interval;
            return Step::CheckHuge;
        }
        self.sweep_timer.armed = true;
        Step::WaitFor(self.sweep_timer.at.saturating_duration_since(now))
    }

    fn sweep_ended(&mut self, before: u64, resident: Option<u64>, now: Instant) {
        self.sweep_timer.swept_to = resident;
        let found = before.saturating_sub(self.sweep_timer.swept_to.unwrap_or(before));
        self.sweep_timer.interval = if found >= CHUNK_PAGES {
            Duration::from_millis(SWEEP_INTERVAL_MS)
        } else {
            (self.sweep_timer.interval * 2).min(Duration::from_millis(SWEEP_INTERVAL_MAX_MS))
        };
        self.sweep_timer.at = now + self.sweep_timer.interval;
    }
}
