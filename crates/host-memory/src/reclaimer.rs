//! Releasing behind the guest's back, merged over many requests.

mod drain;
mod look;

pub use look::{SWEEP_LOOK_MAX_MS, SWEEP_LOOK_MS};

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use page_set::PageSet;

use self::look::Look;
use crate::collapse::Marks;
use crate::{Batch, Discard, DiscardReport, PartialHuge, PendingRelease, Retained, Snapshot, Take};

/// The worker is woken when so many pages (32 MiB) can be released: enough that
/// a wake-up and a call are lost in the time of the release itself (some 6 ms
/// for small pages), little enough that the host gets its memory soon.
pub const WAKE_PAGES: u64 = 8192;

/// Most pages in one batch (32 MiB), and so how long a retained page waits at
/// worst: some 6 ms with touched 4 KiB pages, 0.2 ms with huge ones.
pub const BATCH_PAGES: u64 = 8192;

/// Where the host has huge pages, parts of them are released without a pause of
/// the guest once so many pages (256 MiB) have come together: by then the guest
/// is fragmented rather than slow.
pub const PARTIAL_LIMIT_PAGES: u64 = 65536;

/// After a pause of so many milliseconds nothing more is expected to add up, and
/// what is left is released. A driver that waits for its answers sends again
/// within one.
pub const GRACE_MS: u64 = 10;

/// How pages are released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReleaseMode {
    /// By the worker, merged over requests; `release` returns at once.
    #[default]
    Background,
    /// In the thread that calls `release`, merged inside the request.
    Immediate,
    /// In the thread that calls `release`, page by page: for comparison alone.
    PerPage,
}

/// Stack of the worker. The usual 2 MiB are a huge page where the system gives those to everybody,
/// which it clears when a guest is made.
const STACK_BYTES: usize = 512 << 10;

/// What a reclaimer starts with; all can be changed later.
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
/// [`release`](Self::release) is for pages that the guest may not use: it gave
/// them and has not been told that they are its own again. Before it is told so,
/// they must be [retained](Self::retain): when `retain` returns, no thread is
/// discarding any of them and none will, until they are released anew.
///
/// Why that holds: every discard, of the worker and of calling threads alike, is
/// of a [`Batch`] which came out of [`PendingRelease`] under the lock and goes
/// back under the lock only when the call has returned (or panicked: it has then
/// returned too). `retain` asks that state under the same lock and comes back
/// only when it answers [`Retained::Yes`]; why that answer suffices is argued in
/// [`PendingRelease`]. The worker's batches are bounded and the next one cannot
/// contain the retained pages, so `retain` waits for at most one batch. Calls for the
/// same page from two threads must be put in order by the caller, as the guest's
/// own requests are.
///
/// # Faults
/// What the host refuses to release is counted and not tried again: memory that
/// stays resident harms nobody. A panic while discarding is caught and counted
/// likewise.
///
/// # Huge pages that come back
/// A guest that touches one page of a 2 MiB hole gets a huge page from the host
/// (tmpfs with `huge=always`), and with it come back the pages around it that it
/// gave and may not use. The worker looks now and then whether the host spends more
/// than it should, and then releases the given parts of such pages once more. Where
/// the guest gives such a page again before that, all of it is released anew.
///
/// In private memory the host makes huge pages by itself (khugepaged). There the parts of
/// which the guest gave a page have small pages until it has taken the last one back; see
/// `collapse.rs`.
///
/// # End
/// Dropping waits for the batch in flight and forgets what is pending: it is for
/// a guest that is gone, whose memory goes with it.
#[derive(Debug)]
pub struct Reclaimer {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// There may be something to do for the worker.
    work: Condvar,
    /// A batch was finished.
    done: Condvar,
    /// What may have no huge pages; locked before `inner`, if both are.
    marks: Marks,
}

struct Inner {
    pages: PendingRelease,
    /// What the guest does not use, as far as is known: also what it may use without a word. Empty
    /// where the host makes no huge pages by itself, since nothing hangs on it there.
    away: PageSet,
    memory: Arc<dyn Discard>,
    mode: ReleaseMode,
    partial_huge: PartialHuge,
    /// Release everything pending, whole or not.
    flushing: bool,
    /// When pages were last given.
    last_given: Instant,
    /// The worker will wake by itself to see whether the grace is over.
    armed: bool,
    stop: bool,
    look: Look,
    counters: Snapshot,
}

/// What the worker should do now.
enum Step {
    Run(Batch),
    /// See whether huge pages have come back.
    Look,
    /// The host spent so many pages before the sweep that is over.
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
            away: PageSet::new(),
            memory,
            mode: options.mode,
            partial_huge: options.partial_huge,
            flushing: false,
            last_given: Instant::now(),
            armed: false,
            stop: false,
            look: Look::new(),
            counters: Snapshot::default(),
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
                // A batch that panics is dealt with where it is run. Whatever else does keeps
                // nobody from the memory that is still to be released.
                while diagnostics::contain(|| shared.work_until_stopped()).is_err() {
                    shared.lock().counters.panics += 1;
                }
            }
        })?;
        Ok(Self { shared, worker: Some(worker) })
    }

    /// Gives pages to be released. In the background this only notes them; in the
    /// other modes they are released when it returns.
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
            // Noted here, so that the next call need not wake it once more.
            inner.armed = true;
            drop(inner);
            self.shared.work.notify_one();
        }
    }

    /// Releases pages before it returns, whatever the mode, for a guest that may
    /// use them right after. What could not be released is taken back.
    pub fn release_now(&self, pages: &PageSet) {
        let mut inner = self.shared.lock();
        inner.add(pages);
        drop(self.shared.drain(inner));
        self.cancel(pages);
    }

    /// Releases pages that were never given, in the calling thread and before it
    /// returns, whatever the mode. It waits for nothing else and counts on its own.
    ///
    /// Pages of a pool (hugetlbfs) are left alone: their user takes them back without a word,
    /// so that they could not be reserved again first, and would be ended where the pool
    /// is empty.
    ///
    /// For pages that their user leaves alone until this returns, and only then
    /// knows to be its own again. None of them is to be pending or in flight.
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

    /// Takes pages back that their user may use from now on: as [`cancel`](Self::cancel), and
    /// they may have huge pages again.
    pub fn retain(&self, pages: &PageSet) {
        self.cancel(pages);
        let mut inner = self.shared.lock();
        inner.away.subtract(pages);
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        self.shared.let_huge(memory.as_ref(), pages);
    }

    /// Releases none of these pages any more: when it returns, none of them is or will be
    /// discarded until it is given anew. May wait for one batch. What was released stays with the
    /// host, which makes no huge pages of it.
    pub fn cancel(&self, pages: &PageSet) {
        let mut inner = self.shared.lock();
        loop {
            let (retained, cancelled) = inner.pages.retain(pages);
            inner.counters.retained_pages += cancelled;
            inner.look.taken_back = true;
            if retained == Retained::Yes {
                let begins_to_look = inner.may_return() && !inner.look.armed;
                inner.look.armed |= begins_to_look;
                drop(inner);
                if begins_to_look {
                    self.shared.work.notify_one();
                }
                return;
            }
            inner.counters.retain_waits += 1;
            inner = self.shared.wait_done(inner);
        }
    }

    /// Takes every page back and waits for the batch in flight: the guest was
    /// reset, or is about to be told that all is its own.
    pub fn retain_all(&self) {
        let mut inner = self.shared.forget(self.shared.lock());
        let away = std::mem::take(&mut inner.away);
        let memory = Arc::clone(&inner.memory);
        drop(inner);
        self.shared.let_huge(memory.as_ref(), &away);
    }

    /// Releases now what is pending, whole huge pages or not, without waiting for
    /// it. Good at the end of a message that says all there is to say.
    pub fn flush(&self) {
        let mut inner = self.shared.lock();
        // The operator's change is over: what it left behind shall be found soon.
        inner.look.soon();
        let returns = inner.may_return();
        inner.flushing = !inner.pages.pending().is_empty();
        inner.look.armed |= returns;
        if inner.flushing || returns {
            drop(inner);
            self.shared.work.notify_one();
        }
    }

    /// True if nothing is pending or in flight. Pages that wait for the rest of
    /// their huge page do not count.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.shared.lock().is_at_target()
    }

    /// Waits until [is_idle](Self::is_idle), at most so long; returns whether it is.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let started = Instant::now();
        let mut inner = self.shared.lock();
        while !inner.is_at_target() {
            let Some(left) = timeout.checked_sub(started.elapsed()) else { return false };
            let waited = self.shared.done.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Changes how pages are released, after as much was released as is pending now: which may
    /// take long, in batches that hold nobody up longer than the worker's. What a guest gives
    /// meanwhile is not waited for, else one that goes on giving would be waited for for ever.
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

    /// Changes what happens to parts of transparent huge pages. What waits is
    /// looked at again.
    pub fn set_partial_huge(&self, partial_huge: PartialHuge) {
        let mut inner = self.shared.lock();
        inner.partial_huge = partial_huge;
        inner.pages.retry_waiting();
        inner.flushing = !inner.pages.pending().is_empty();
        drop(inner);
        self.shared.work.notify_one();
    }

    /// Puts other memory in place of the guest's. Pages given for the old memory
    /// and not yet released are forgotten; when it returns, the old memory is
    /// touched no more.
    pub fn replace_memory(&self, memory: Arc<dyn Discard>) {
        let mut inner = self.shared.forget(self.shared.lock());
        inner.memory = memory;
        inner.away.clear();
        drop(inner);
        self.shared.marks.forget();
    }

    /// What was done so far.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let huge_failures = self.shared.marks.failures();
        let inner = self.shared.lock();
        Snapshot {
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
            // The worker catches panics of its batches; one of its own has been
            // printed by the panic hook, and there is nothing left to do.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The state is whole at every unlock, so a poisoned lock is none.
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
                Step::Look => self.look(inner),
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

    /// Lets what the guest took back have huge pages, where nothing beside it is away.
    fn let_huge(&self, memory: &dyn Discard, pages: &PageSet) {
        self.marks.let_huge(memory, pages, |extents| {
            let inner = self.lock();
            extents.ranges().flat_map(|range| inner.away.ranges_in(range)).collect()
        });
    }

    /// Discards a batch without the lock, then gives it back.
    fn run<'a>(&'a self, mut inner: MutexGuard<'a, Inner>, batch: Batch) -> MutexGuard<'a, Inner> {
        let memory = Arc::clone(&inner.memory);
        let (mode, partial_huge, swept) = (inner.mode, inner.partial_huge, batch.is_swept());
        drop(inner);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let keep_small = |pages: &PageSet| self.marks.keep_small(memory.as_ref(), pages);
            discard(memory.as_ref(), batch.pages(), mode, partial_huge, keep_small)
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
            // What it left alone by the old rule is looked at by the new one.
            inner.pages.retry_waiting();
        }
        self.done.notify_all();
        let begins_to_look = inner.may_return() && !inner.look.armed;
        if !inner.pages.pending().is_empty() || inner.has_to_sweep() || begins_to_look {
            // The worker could not begin while this one was in flight.
            self.work.notify_one();
        }
        inner
    }
}

/// Discards what can be; returns what must wait.
fn discard(
    memory: &dyn Discard,
    batch: &PageSet,
    mode: ReleaseMode,
    partial_huge: PartialHuge,
    keep_small: impl FnOnce(&PageSet),
) -> (DiscardReport, PageSet) {
    let started = Instant::now();
    let mut pages = batch.clone();
    let partial = memory.take_partial(&mut pages, partial_huge);
    // First: what is empty and not marked yet could be filled.
    keep_small(&pages);
    let prepared = started.elapsed();
    let mut report = match mode {
        ReleaseMode::PerPage => memory.discard_per_page(&pages),
        ReleaseMode::Background | ReleaseMode::Immediate => memory.discard(&pages),
    };
    report.translate += prepared;
    (report, partial)
}

impl Inner {
    /// The guest gave pages.
    fn add(&mut self, pages: &PageSet) {
        if self.memory.collapses() {
            self.away.union_with(pages);
        }
        self.pages.add(pages);
        self.counters.given_pages += pages.len();
    }

    fn is_at_target(&self) -> bool {
        self.pages.pending().is_empty() && !self.pages.is_busy()
    }

    /// Pages worth releasing now: with huge host pages, only whole chunks.
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
        self.look.armed = false;
        if self.stop {
            return Step::Stop;
        }
        if self.pages.is_busy() {
            // Another thread releases; it wakes this one if something is left.
            return Step::Wait;
        }
        if self.pages.pending().is_empty() {
            self.flushing = false;
            return self.next_sweep();
        }
        let grace = Duration::from_millis(GRACE_MS);
        let quiet = self.last_given.elapsed();
        let take = if self.flushing || quiet >= grace {
            Take::Any(BATCH_PAGES)
        } else if self.ready_pages() >= WAKE_PAGES && self.memory.largest_host_page() > 1 {
            Take::Chunks(BATCH_PAGES)
        } else if self.is_worth_waking() {
            Take::Any(BATCH_PAGES)
        } else {
            self.armed = true;
            return Step::WaitFor(grace - quiet);
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
