//! Releases or forgets pending pages in the calling thread.

use std::sync::MutexGuard;

use super::{BATCH_PAGES, Inner, Shared};
use crate::Take;

impl Shared {
    /// Releases everything pending in this thread, which is the one that adds pages.
    pub(super) fn drain<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        while !inner.is_idle() {
            inner = self.run_or_wait(inner, Take::All);
        }
        inner
    }

    /// Releases as many pages as are pending now, in this thread or the worker's, and waits for
    /// the last batch of them.
    pub(super) fn drain_present<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
    ) -> MutexGuard<'a, Inner> {
        let end = inner.pages.begun_pages() + inner.pages.pending().len();
        while inner.pages.begun_pages() < end && !inner.pages.pending().is_empty() {
            inner = self.run_or_wait(inner, Take::Any(BATCH_PAGES));
        }
        let finished = inner.pages.finished_batches();
        while inner.pages.is_busy() && inner.pages.finished_batches() == finished {
            inner = self.wait_done(inner);
        }
        inner
    }

    /// Releases a batch, or waits for the one in flight.
    fn run_or_wait<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        take: Take,
    ) -> MutexGuard<'a, Inner> {
        let largest = inner.memory.largest_host_page();
        match inner.pages.begin(take, largest) {
            Some(batch) => self.run(inner, batch),
            None => self.wait_done(inner),
        }
    }

    /// Forgets everything pending and waits for the batch in flight.
    pub(super) fn forget<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        loop {
            let cancelled = inner.pages.pending().len() + inner.pages.waiting().len();
            inner.counters.retained_pages += cancelled;
            inner.pages.forget();
            if !inner.pages.is_busy() {
                return inner;
            }
            inner = self.wait_done(inner);
        }
    }
}
