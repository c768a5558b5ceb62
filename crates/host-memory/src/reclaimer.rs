//! Releases pages in the background, merged over many requests.

mod drain;
mod sweep;

pub use sweep::{SWEEP_INTERVAL_MAX_MS, SWEEP_INTERVAL_MS};

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use page_set::PageSet;

use self::sweep::SweepTimer;
use crate::collapse::Marks;
use crate::{
    Batch, Discard, DiscardReport, PartialHuge, PendingRelease, ReclaimerCounters, Retained, Take,
};

/// Pages (32 MiB) that wake the worker once they can be released: enough that a wake-up
/// and a call are negligible compared with the release (some 6 ms for small pages), few
/// enough that the host gets its memory soon.
pub const WAKE_PAGES: u64 = 8192;

/// Limit of pages in one batch (32 MiB). This bounds how long a retained page waits: some
/// 6 ms with touched 4 KiB pages, 0.2 ms with huge ones.
pub const BATCH_PAGES: u64 = 8192;

/// On a host with huge pages, parts of them are released without waiting for a pause of
/// the guest once this many pages (256 MiB) are pending: then the guest is fragmented
/// rather than slow.
pub const PARTIAL_LIMIT_PAGES: u64 = 65536;

/// After a pause of this many milliseconds no more pages are expected, and the rest is
/// released. A driver that waits for its answers sends again within one millisecond.
pub const QUIET_MS: u64 = 10;

/// How pages are released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReleaseMode {
    /// By the worker, merged over requests; `release` returns at once.
    #[default]
    Background,
    /// In the thread that calls `release`, merged inside the request.
    Immediate,
    /// In the thread that calls `release`, page by page: for comparison only.
    PerPage,
}

/// Stack of the worker. The default of 2 MiB is one huge page if transparent huge pages are always
/// on, which the kernel clears when a guest is created.
const STACK_BYTES: usize = 512 << 10;

/// Initial settings of a reclaimer; all can be changed later.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReclaimerOptions {
    /// How pages are released.
    pub mode: ReleaseMode,
    /// What happens to parts of transparent huge pages.
    pub partial_huge: PartialHuge,
}

/// Releases the pages of one guest.
///
/// # Safety for the guest
/// [`release`](Self::release) is for pages that the guest may not use: it gave them up
/// and has not been notified that it may use them again. Before that notification, they
/// must be [retained](Self::retain): when `retain` returns, no thread is discarding any
/// of them and none will, until they are released again.
///
/// Why that holds: every discard, of the worker and of calling threads alike, is of a
/// [`Batch`] that [`PendingRelease`] returned under the lock, and that is finished under
/// the lock only when the call has returned (or panicked: it has then returned too).
/// `retain` calls that state under the same lock and returns only when it has got
/// [`Retained::Yes`]; [`PendingRelease`] has the argument why that suffices. The worker's
/// batches are bounded, and the next one cannot contain the retained pages, so `retain`
/// waits for at most one batch. The caller must order calls for the same page from two
/// threads, as the guest's own requests are ordered.
///
/// # Faults
/// Pages that the host refuses to release are counted and not retried: memory that stays
/// resident does no harm. A panic while discarding is caught and counted likewise.
///
/// # Huge pages that come back
/// A guest that touches one page of a 2 MiB hole gets a huge page from the host (tmpfs
/// with `huge=always`). With it the pages around it come back that the guest gave up and
/// may not use. The worker checks periodically whether the host spends more than it
/// should, and then releases the given parts of such pages again. If the guest gives up
/// such a page again before that, all of it is released again.
///
/// In private memory the host collapses huge pages by itself (khugepaged). There an extent
/// of which the guest gave up a page has small pages until the guest has taken the last
/// one back; see `collapse.rs`.
///
/// # End
/// Dropping waits for the batch in flight and forgets pending pages: it is for a guest
/// that has ended, whose memory is freed with it.
#[derive(Debug)]
pub struct Reclaimer {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// There may be work for the worker.
    work: Condvar,
    /// A batch was finished.
    done: Condvar,
    /// The extents without huge pages; locked before `inner`, if both are.
    marks: Marks,
}

struct Inner {
    pages: PendingRelease,
    /// Pages that the guest is known not to use, also those that it may use again without a
    /// message. Empty if the host does not collapse huge pages by itself, since nothing depends on
    /// it then.
    unused: PageSet,
    memory: Arc<dyn Discard>,
    mode: ReleaseMode,
    partial_huge: PartialHuge,
    /// Release everything pending, parts of huge pages too.
    flushing: bool,
    /// When pages were last added.
    last_given: Instant,
    /// The worker has a timer for the end of the pause.
    armed: bool,
    stop: bool,
    sweep_timer: SweepTimer,
    counters: ReclaimerCounters,
}

/// The worker's next step.
enum Step {
    Run(Batch),
    /// Check whether huge pages have come back.
    CheckHuge,
    /// A sweep has ended; the host spent this many pages before it.
    EndSweep(u64),
    WaitFor(Duration),
    Wait,
    Stop,
}

impl Reclaimer {
    /// Starts the worker of a guest whose memory is `memory`.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn new(memory: Arc<dyn Discard>, options: ReclaimerOptions) -> io::Result<Self> {
        let inner = Inner {
            pages: PendingRelease::default(),
            unused: PageSet::new(),
            memory,
            mode: options.mode,
            partial_huge: options.partial_huge,
            flushing: false,
            last_given: Instant::now(),
            armed: false,
            stop: false,
            sweep_timer: SweepTimer::new(),
            counters: ReclaimerCounters::default(),
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            work: Condvar::new(),
            done: Condvar::new(),
            marks: Marks::default(),
        });
        let worker = thread::Builder::new().name("reclaimer".into()).stack_size(STACK_BYTES);
        let worker = worker.spawn({
            let shared = Arc::clone(&shared);
            move || {
                // `run` handles a panic of a batch. After any other panic the worker continues
                // with the memory that is still to be released.
                while diagnostics::contain(|| shared.work_until_stopped()).is_err() {
                    shared.lock().counters.panics += 1;
                }
            }
        })?;
        Ok(Self { shared, worker: Some(worker) })
    }

    /// Releases pages. In background mode this only records them; in the other modes they
    /// are released when it returns.
    pub fn release(&self, pages: &PageSet) {
        if pages.is_empty() {
            return;
        }
        let mut inner = self.shared.lock();
        inner.add(pages);
        inner.last_given = Instant::now();
        if inner.mode != ReleaseMode::Background {
            drop(self.shared.drain(inner));
        } else if inner.is_worth_waking() || !inner.armed {
            // Set here, so that the next call need not wake it again.
            inner.armed = true;
            drop(inner);
            self.shared.work.notify_one();
        }
    }

    /// Releases pages before it returns, in any mode, for a guest that may use them right
    /// after. Takes back pages that could not be released.
    pub fn release_now(&self, pages: &PageSet) {
        let mut inner = self.shared.lock();
        inner.add(pages);
        drop(self.shared.drain(inner));
        self.cancel(pages);
    }

    /// Releases pages that were never given, in the calling thread and before it returns,
    /// in any mode. Waits for nothing else, and has its own counters.
    ///
    /// Does not release pages of a pool (hugetlbfs): the guest uses them again without a
    /// message, so they could not be reserved first, and the guest would be killed if the
    /// pool is empty.
    ///
    /// The guest must not use the pages until this returns. None of them may be pending or
    /// in flight.
    pub fn release_free(&self, pages: &PageSet) {
        let inner = self.shared.lock();
        let (memory, partial_huge) = (Arc::clone(&inner.memory), inner.partial_huge);
        drop(inner);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut pages = pages.clone();
            let unpromised = memory.take_unpromised(&mut pages);
            let mode = ReleaseMode::Immediate;
            let (report, mut left) = discard(memory.as_ref(), &pages, mode, partial_huge, |_| ());
            left.union_with(&unpromised);
            (report, left)
        }));
        let counters = &mut self.shared.lock().counters;
        match outcome {
            Ok((report, partial)) => counters.count_free(&report, partial.len()),
            Err(_) => {
                counters.panics += 1;
                counters.failed_pages += pages.len();
            }
        }
    }

    /// Takes back pages that the guest may use from now on: as [`cancel`](Self::cancel), and they
    /// may have huge pages again.
    pub fn retain(&self, pages: &PageSet) {
        self.cancel(pages);
        let mut inner = self.shared.lock();
        inner.unused.subtract(pages);
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        self.shared.unmark(memory.as_ref(), pages);
    }

    /// Stops the release of these pages: when it returns, none of them is or will be discarded
    /// until it is added again. May wait for one batch. Released pages stay with the host, which
    /// does not collapse them into huge pages.
    pub fn cancel(&self, pages: &PageSet) {
        let mut inner = self.shared.lock();
        loop {
            let (retained, cancelled) = inner.pages.retain(pages);
            inner.counters.retained_pages += cancelled;
            inner.sweep_timer.taken_back = true;
            if retained == Retained::Yes {
                let starts_checking = inner.may_return() && !inner.sweep_timer.armed;
                inner.sweep_timer.armed |= starts_checking;
                drop(inner);
                if starts_checking {
                    self.shared.work.notify_one();
                }
                return;
            }
            inner.counters.retain_waits += 1;
            inner = self.shared.wait_done(inner);
        }
    }

    /// Takes back every page and waits for the batch in flight: the guest was reset, or is
    /// about to be notified that it may use all pages.
    pub fn retain_all(&self) {
        let mut inner = self.shared.forget(self.shared.lock());
        let unused = std::mem::take(&mut inner.unused);
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        self.shared.unmark(memory.as_ref(), &unused);
    }

    /// Starts the release of everything pending, parts of huge pages too, without waiting
    /// for it. Call it when no more pages follow soon.
    pub fn flush(&self) {
        let mut inner = self.shared.lock();
        // The target was reached: check soon for huge pages that came back.
        inner.sweep_timer.soon();
        let returns = inner.may_return();
        inner.flushing = !inner.pages.pending().is_empty();
        inner.sweep_timer.armed |= returns;
        if inner.flushing || returns {
            drop(inner);
            self.shared.work.notify_one();
        }
    }

    /// True if nothing is pending or in flight. Pages that wait for the rest of their huge
    /// page do not count.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.shared.lock().is_idle()
    }

    /// Waits until [`is_idle`](Self::is_idle), at most `timeout`; returns whether it is.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let started = Instant::now();
        let mut inner = self.shared.lock();
        while !inner.is_idle() {
            let Some(left) = timeout.checked_sub(started.elapsed()) else { return false };
            let waited = self.shared.done.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Changes how pages are released, after as many pages were released as are pending now. That
    /// may take long, in batches that block other calls no longer than the worker's. Does not wait
    /// for pages that the guest gives up meanwhile, which could continue infinitely.
    pub fn set_mode(&self, mode: ReleaseMode) {
        let inner = self.shared.lock();
        let mut inner = self.shared.drain_present(inner);
        inner.mode = mode;
    }

    /// How pages are released.
    #[must_use]
    pub fn mode(&self) -> ReleaseMode {
        self.shared.lock().mode
    }

    /// Changes what happens to parts of transparent huge pages. Waiting pages become
    /// pending again.
    pub fn set_partial_huge(&self, partial_huge: PartialHuge) {
        let mut inner = self.shared.lock();
        inner.partial_huge = partial_huge;
        inner.pages.retry_waiting();
        inner.flushing = !inner.pages.pending().is_empty();
        drop(inner);
        self.shared.work.notify_one();
    }

    /// Replaces the guest's memory. Forgets pages of the old memory that are not released
    /// yet. When it returns, the old memory is no longer touched.
    pub fn replace_memory(&self, memory: Arc<dyn Discard>) {
        let mut inner = self.shared.forget(self.shared.lock());
        inner.memory = memory;
        inner.unused.clear();
        drop(inner);
        self.shared.marks.forget();
    }

    /// The counters.
    #[must_use]
    pub fn counters(&self) -> ReclaimerCounters {
        let huge_failures = self.shared.marks.failures();
        let inner = self.shared.lock();
        ReclaimerCounters {
            pending_pages: inner.pages.pending().len(),
            in_flight_pages: inner.pages.in_flight_pages(),
            waiting_pages: inner.pages.waiting().len(),
            huge_failures,
            ..inner.counters.clone()
        }
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_one();
        if let Some(worker) = self.worker.take() {
            // The worker catches panics of its batches. The panic hook has printed any
            // other one, and nothing is left to do.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The state is consistent at every unlock, so poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_done<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.done.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    fn work_until_stopped(&self) {
        let mut inner = self.lock();
        loop {
            diagnostics::panic_point("reclaimer");
            inner = match inner.next_step() {
                Step::Run(batch) => self.run(inner, batch),
                Step::CheckHuge => self.check_huge(inner),
                Step::EndSweep(before) => self.end_sweep(inner, before),
                Step::WaitFor(time) => {
                    let waited = self.work.wait_timeout(inner, time);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Step::Wait => self.work.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Step::Stop => return,
            };
        }
    }

    /// Allows huge pages in extents of pages that the guest took back, unless it does not use other
    /// pages there.
    fn unmark(&self, memory: &dyn Discard, pages: &PageSet) {
        self.marks.unmark(memory, pages, |extents| {
            let inner = self.lock();
            extents.ranges().flat_map(|range| inner.unused.ranges_in(range)).collect()
        });
    }

    /// Discards a batch without the lock, then finishes it.
    fn run<'a>(&'a self, mut inner: MutexGuard<'a, Inner>, batch: Batch) -> MutexGuard<'a, Inner> {
        let memory = Arc::clone(&inner.memory);
        let (mode, partial_huge, swept) = (inner.mode, inner.partial_huge, batch.is_swept());
        drop(inner);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mark = |pages: &PageSet| self.marks.mark(memory.as_ref(), pages);
            discard(memory.as_ref(), batch.pages(), mode, partial_huge, mark)
        }));
        inner = self.lock();
        if !swept {
            inner.counters.batches += 1;
            inner.counters.last_batch_at = Some(Instant::now());
        }
        match outcome {
            Ok((report, partial)) if swept => {
                inner.counters.swept_pages += report.pages;
                inner.pages.finish(batch, &partial);
            }
            Ok((report, partial)) => {
                inner.counters.count(&report);
                inner.pages.finish(batch, &partial);
            }
            Err(_) => {
                inner.counters.panics += 1;
                inner.counters.failed_pages += batch.pages().len();
                inner.pages.finish(batch, &PageSet::new());
            }
        }
        if inner.partial_huge != partial_huge {
            // Apply the new rule to what the old one left waiting.
            inner.pages.retry_waiting();
        }
        self.done.notify_all();
        let starts_checking = inner.may_return() && !inner.sweep_timer.armed;
        if !inner.pages.pending().is_empty() || inner.has_to_sweep() || starts_checking {
            // The worker could not begin a batch while this one was in flight.
            self.work.notify_one();
        }
        inner
    }
}

/// Discards a batch; returns the pages that must wait.
fn discard(
    memory: &dyn Discard,
    batch: &PageSet,
    mode: ReleaseMode,
    partial_huge: PartialHuge,
    mark: impl FnOnce(&PageSet),
) -> (DiscardReport, PageSet) {
    let started = Instant::now();
    let mut pages = batch.clone();
    let partial = memory.take_partial(&mut pages, partial_huge);
    // Before discarding: an empty extent that is not marked could be collapsed.
    mark(&pages);
    let prepared = started.elapsed();
    let mut report = match mode {
        ReleaseMode::PerPage => memory.discard_per_page(&pages),
        ReleaseMode::Background | ReleaseMode::Immediate => memory.discard(&pages),
    };
    report.translate += prepared;
    (report, partial)
}

impl Inner {
    /// Adds pages that the guest gave up.
    fn add(&mut self, pages: &PageSet) {
        if self.memory.collapses() {
            self.unused.union_with(pages);
        }
        self.pages.add(pages);
        self.counters.given_pages += pages.len();
    }

    fn is_idle(&self) -> bool {
        self.pages.pending().is_empty() && !self.pages.is_busy()
    }

    /// Pages worth releasing now: only whole chunks if the host has huge pages.
    fn ready_pages(&self) -> u64 {
        let pending = self.pages.pending();
        if self.memory.largest_host_page() > 1 { pending.full_chunk_pages() } else { pending.len() }
    }

    /// Pages that are not part of a whole chunk.
    fn ragged_pages(&self) -> u64 {
        self.pages.pending().len() - self.pages.pending().full_chunk_pages()
    }

    fn is_worth_waking(&self) -> bool {
        self.ready_pages() >= WAKE_PAGES || self.ragged_pages() >= PARTIAL_LIMIT_PAGES
    }

    fn next_step(&mut self) -> Step {
        self.armed = false;
        self.sweep_timer.armed = false;
        if self.stop {
            return Step::Stop;
        }
        if self.pages.is_busy() {
            // Another thread releases; it wakes this one if pages are left.
            return Step::Wait;
        }
        if self.pages.pending().is_empty() {
            self.flushing = false;
            return self.next_sweep();
        }
        let pause = Duration::from_millis(QUIET_MS);
        let quiet = self.last_given.elapsed();
        let take = if self.flushing || quiet >= pause {
            Take::Any(BATCH_PAGES)
        } else if self.ready_pages() >= WAKE_PAGES && self.memory.largest_host_page() > 1 {
            Take::Chunks(BATCH_PAGES)
        } else if self.is_worth_waking() {
            Take::Any(BATCH_PAGES)
        } else {
            self.armed = true;
            return Step::WaitFor(pause - quiet);
        };
        match self.pages.begin(take, self.memory.largest_host_page()) {
            Some(batch) => Step::Run(batch),
            None => Step::Wait,
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("mode", &self.mode)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
