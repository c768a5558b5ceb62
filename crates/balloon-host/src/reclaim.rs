//! Implements the device's [`Reclaim`] on the host's memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use balloon_abi::BALLOON_PAGE_BYTES;
use balloon_device::Reclaim;
use control::api::{PartialHuge, ReleaseMode, ReleaseStatus, ReportsStatus};
use host_memory::{MemoryMap, Reclaimer, ReclaimerOptions, resident};
use page_set::PageSet;

use crate::{HostError, LogLimit};

/// Releases the memory of one guest. It exists without a connected guest, too.
#[derive(Debug)]
pub struct HostReclaim {
    reclaimer: Arc<Reclaimer>,
    footprint: Footprint,
    memory: Arc<MemoryMap>,
    partial_huge: PartialHuge,
    /// Deflates for which the host could not reserve memory.
    unbacked: u64,
    log: LogLimit,
}

/// Measures the host memory behind a guest. A measurement takes up to ten milliseconds per GiB
/// that the guest has touched, and does not return if a file system hangs. So callers clone this
/// and measure without a lock. Only one caller measures at a time: a file system that hangs blocks
/// one thread, and ten clients cost as much as one.
#[derive(Clone, Debug)]
pub struct Footprint {
    measure: Arc<dyn Measure>,
    measured: Arc<Measured>,
}

#[derive(Debug, Default)]
struct Measured {
    /// Locked during a measurement.
    measuring: Mutex<()>,
    /// The last result.
    last: Mutex<Option<u64>>,
}

/// Memory that can be measured.
pub(crate) trait Measure: std::fmt::Debug + Send + Sync {
    /// Returns the resident bytes; `None` without a guest or on an error.
    fn resident_bytes(&self) -> Option<u64>;
}

impl Measure for MemoryMap {
    fn resident_bytes(&self) -> Option<u64> {
        if self.pages() == 0 {
            return None;
        }
        let measured = resident::resident_bytes(self);
        measured.inspect_err(|error| tracing::warn!(%error, "cannot measure guest memory")).ok()
    }
}

impl Footprint {
    fn new(measure: Arc<dyn Measure>) -> Self {
        Self { measure, measured: Arc::default() }
    }

    /// Returns the guest's resident bytes; `None` without a guest. While another thread
    /// measures, returns the last result, or `None` if there is none.
    pub fn resident_bytes(&self) -> Option<u64> {
        let Measured { measuring, last } = &*self.measured;
        let last = || last.lock().unwrap_or_else(PoisonError::into_inner);
        let _measuring = match measuring.try_lock() {
            Err(TryLockError::WouldBlock) => return *last(),
            // The mutex protects no data that a panic could leave inconsistent.
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Ok(measuring) => measuring,
        };
        let bytes = self.measure.resident_bytes();
        *last() = bytes;
        bytes
    }
}

/// Work done up to some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// System calls.
    pub calls: u64,
    /// Bytes released to the host.
    pub bytes: u64,
    /// Time spent on translation to host addresses.
    pub translate: Duration,
    /// Time spent in the system calls.
    pub release: Duration,
}

impl Work {
    /// Returns the work done since `earlier`.
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            calls: self.calls.saturating_sub(earlier.calls),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            translate: self.translate.saturating_sub(earlier.translate),
            release: self.release.saturating_sub(earlier.release),
        }
    }
}

impl HostReclaim {
    /// Starts without a guest's memory; see [`set_memory`](Self::set_memory).
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn new(mode: ReleaseMode, partial_huge: PartialHuge) -> Result<Self, HostError> {
        let memory = Arc::new(MemoryMap::default());
        let options = ReclaimerOptions {
            mode: reclaimer_mode(mode),
            partial_huge: match partial_huge {
                PartialHuge::Split => host_memory::PartialHuge::Split,
                PartialHuge::Wait => host_memory::PartialHuge::Wait,
            },
        };
        let reclaimer = Reclaimer::new(Arc::clone(&memory) as _, options)
            .map_err(|source| HostError { what: "starting a thread", source })?;
        let (footprint, log) = (Footprint::new(Arc::clone(&memory) as _), LogLimit::default());
        Ok(Self {
            reclaimer: Arc::new(reclaimer),
            footprint,
            memory,
            partial_huge,
            unbacked: 0,
            log,
        })
    }

    /// Sets the guest's memory map.
    pub fn set_memory(&mut self, memory: MemoryMap) {
        self.replace(Arc::new(memory));
    }

    /// Drops the guest's memory map.
    pub fn forget_memory(&mut self) {
        self.replace(Arc::new(MemoryMap::default()));
    }

    /// Returns a function that changes the release mode after all pending releases. That may
    /// take long, so it must be called without a lock.
    pub(crate) fn mode_changer(&self) -> impl FnOnce(ReleaseMode) + use<> {
        let reclaimer = Arc::clone(&self.reclaimer);
        move |mode| reclaimer.set_mode(reclaimer_mode(mode))
    }

    /// Returns the measurement of the guest's memory, for use without a lock.
    pub fn footprint(&self) -> Footprint {
        self.footprint.clone()
    }

    #[cfg(test)]
    pub(crate) fn measure_by(&mut self, measure: Arc<dyn Measure>) {
        self.footprint = Footprint::new(measure);
    }

    /// Returns `None` while a release is pending or in flight, else when the last release
    /// ended, if there was any.
    pub fn reached_at(&self) -> Option<Option<Instant>> {
        let done = self.reclaimer.counters();
        let idle = done.pending_pages == 0 && done.in_flight_pages == 0;
        idle.then_some(done.last_batch_at)
    }

    /// Returns the work done so far.
    pub fn work(&self) -> Work {
        let done = self.reclaimer.counters();
        Work {
            calls: done.calls,
            bytes: done.discarded_pages * BALLOON_PAGE_BYTES,
            translate: Duration::from_nanos(done.translate_ns),
            release: Duration::from_nanos(done.release_ns),
        }
    }

    /// Returns the status for the control API.
    pub fn status(&self) -> ReleaseStatus {
        let done = self.reclaimer.counters();
        ReleaseStatus {
            mode: api_mode(self.reclaimer.mode()),
            partial_huge: self.partial_huge,
            pending_bytes: done.pending_pages * BALLOON_PAGE_BYTES,
            in_flight_bytes: done.in_flight_pages * BALLOON_PAGE_BYTES,
            waiting_bytes: done.waiting_pages * BALLOON_PAGE_BYTES,
            released_bytes: done.discarded_pages * BALLOON_PAGE_BYTES,
            release_calls: done.calls,
            release_errors: done.errors,
        }
    }

    /// Returns the releases of reported pages. The device adds the other fields.
    pub fn reports(&self) -> ReportsStatus {
        let done = self.reclaimer.counters();
        ReportsStatus {
            released_bytes: done.free_pages * BALLOON_PAGE_BYTES,
            release_calls: done.free_calls,
            partial_bytes: done.free_partial_pages * BALLOON_PAGE_BYTES,
            ..ReportsStatus::default()
        }
    }

    /// Returns the host's faults by kind.
    pub fn faults(&self) -> BTreeMap<String, u64> {
        let done = self.reclaimer.counters();
        let kinds = [
            ("release_refused", done.errors),
            ("release_panicked", done.panics),
            ("release_outside_memory", done.outside_pages),
            ("huge_page_advice_refused", done.huge_failures),
            ("taken_back_unbacked", self.unbacked),
        ];
        let seen = kinds.into_iter().filter(|(_, count)| *count > 0);
        seen.map(|(name, count)| (name.to_owned(), count)).collect()
    }

    fn replace(&mut self, memory: Arc<MemoryMap>) {
        self.footprint = Footprint::new(Arc::clone(&memory) as _);
        self.memory = Arc::clone(&memory);
        self.reclaimer.replace_memory(memory);
    }
}

impl Reclaim for HostReclaim {
    fn release(&mut self, pages: &PageSet) {
        self.reclaimer.release(pages);
    }

    fn release_now(&mut self, pages: &PageSet) {
        self.reclaimer.release_now(pages);
    }

    fn release_free(&mut self, pages: &PageSet) {
        self.reclaimer.release_free(pages);
    }

    fn cancel(&mut self, pages: &PageSet) {
        self.reclaimer.cancel(pages);
    }

    fn retain(&mut self, pages: &PageSet) {
        self.reclaimer.retain(pages);
        // The protocol has no way to refuse a deflate, so the error is only logged here.
        if let Err(error) = self.memory.reserve(pages) {
            self.unbacked += 1;
            if let Some(suppressed) = self.log.take(Instant::now()) {
                tracing::error!(
                    %error,
                    suppressed,
                    "host: cannot reserve memory for a deflate; the guest may be killed when it \
                     accesses the pages"
                );
            }
        }
    }

    fn flush(&mut self) {
        self.reclaimer.flush();
    }
}

const fn api_mode(mode: host_memory::ReleaseMode) -> ReleaseMode {
    match mode {
        host_memory::ReleaseMode::Background => ReleaseMode::Background,
        host_memory::ReleaseMode::Immediate => ReleaseMode::Immediate,
        host_memory::ReleaseMode::PerPage => ReleaseMode::PerPage,
    }
}

const fn reclaimer_mode(mode: ReleaseMode) -> host_memory::ReleaseMode {
    match mode {
        ReleaseMode::Background => host_memory::ReleaseMode::Background,
        ReleaseMode::Immediate => host_memory::ReleaseMode::Immediate,
        ReleaseMode::PerPage => host_memory::ReleaseMode::PerPage,
    }
}
