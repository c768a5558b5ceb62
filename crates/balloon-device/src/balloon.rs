//! The device: configuration space, queue handlers, and the pages in the balloon.

mod free_pages;
mod resume;
mod state;
mod stats_queue;

pub use state::{BalloonState, StateError};

use std::time::Instant;

use balloon_abi::limits::{MAX_MESSAGE_BYTES, MAX_PFN_ARRAY_BYTES};
use balloon_abi::{ConfigSpace, Features, Field, MessageStatus, QueueLayout, Vq};
use page_set::PageSet;
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use crate::change::Change;
use crate::decode::{decode_bitmap, decode_pfn_array};
use crate::drain::{Drained, Handled, drain};
use crate::fault::{Fault, Faults};
use crate::hint::Hinting;
use crate::layout::MemoryLayout;
use crate::message::Message;
use crate::pending::PendingChains;
use crate::reclaim::Reclaim;
use crate::report::Reports;
use crate::request::GuestRequests;
use crate::request_failure::RequestFailure;
use crate::request_queue::RequestQueue;
use crate::stats::Stats;

/// A queue cannot be served until the driver sets it up again.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The vring is invalid.
    #[error("guest: the vring of the {vq:?} queue is invalid")]
    BadRing {
        /// The queue.
        vq: Vq,
        /// The defect.
        #[source]
        source: virtio_queue::Error,
    },
    /// The negotiated features include no queue with this index.
    #[error("front end: there is no queue {index} under the negotiated features")]
    NoSuchQueue {
        /// The index.
        index: usize,
    },
}

/// Totals of the inflate and deflate queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages on the inflate queue.
    pub inflate_messages: u64,
    /// Messages on the deflate queue.
    pub deflate_messages: u64,
    /// Balloon pages inflated.
    pub inflated_pages: u64,
    /// Balloon pages deflated.
    pub deflated_pages: u64,
}

/// A balloon device for one guest.
#[derive(Debug)]
pub struct BalloonDevice<R> {
    config: ConfigSpace,
    offered: Features,
    negotiated: Features,
    layout: MemoryLayout,
    /// Pages in the balloon.
    held: PageSet,
    /// The balloon may hold pages that were inflated before this device started. The
    /// device has no list of them.
    inherited: bool,
    reclaim: R,
    message: Message,
    faults: Faults,
    counters: Counters,
    change: Option<Change>,
    hinting: Hinting,
    reports: Reports,
    stats: Stats,
    requests: GuestRequests,
    /// Chains of the request queue that wait for a request to be written into them.
    waiting: PendingChains,
}

impl<R: Reclaim> BalloonDevice<R> {
    /// Features that the device can offer on any transport.
    pub const FEATURES: Features = Features::MUST_TELL_HOST
        .union(Features::DEFLATE_ON_OOM)
        .union(Features::FREE_PAGE_HINT)
        .union(Features::PAGE_POISON)
        .union(Features::STATS_VQ)
        .union(Features::REPORTING)
        .union(Features::RING_INDIRECT_DESC)
        .union(Features::RING_EVENT_IDX)
        .union(Features::VERSION_1)
        .union(Features::PAGE_BITMAP)
        .union(Features::REQUEST_VQ);

    /// Creates a device without memory; see [`set_layout`](Self::set_layout).
    pub fn new(reclaim: R) -> Self {
        Self {
            config: ConfigSpace::default(),
            offered: Self::FEATURES,
            negotiated: Features::NONE,
            layout: MemoryLayout::default(),
            held: PageSet::new(),
            inherited: false,
            reclaim,
            message: Message::default(),
            faults: Faults::default(),
            counters: Counters::default(),
            change: None,
            hinting: Hinting::default(),
            reports: Reports::default(),
            stats: Stats::default(),
            requests: GuestRequests::default(),
            waiting: PendingChains::default(),
        }
    }

    /// Stops offering `features`, from the next driver on.
    pub fn withhold(&mut self, features: Features) {
        self.offered = Self::FEATURES.without(features);
    }

    /// Starts a driver. The balloon is empty, and the guest may use every page. Drops
    /// features that were not offered.
    pub fn reset(&mut self, negotiated: Features) {
        let held = std::mem::take(&mut self.held);
        self.reclaim.retain(&held);
        self.inherited = false;
        self.negotiated = negotiated & self.offered;
        self.waiting.forget();
        self.requests.reset(self.negotiated);
        self.config.actual = 0;
        self.config.poison_val = 0;
        self.hinting.reset();
        self.stats.reset(!self.negotiated.contains(Features::VERSION_1));
        self.publish_hint_command();
        if let Some(change) = &mut self.change {
            change.actual_is(0, Instant::now());
        }
    }

    /// Stops the driver's queues. The guest may reset the driver next and use any page
    /// before the device receives the reset, so every pending release is cancelled. If the
    /// guest is only paused, the balloon is unchanged and released pages stay released.
    ///
    /// Forgets pending chains; see [`return_unused`](Self::return_unused).
    pub fn suspend(&mut self) {
        self.reclaim.cancel(&self.held);
        self.stats.pending.forget();
        self.waiting.forget();
        self.requests.suspend();
    }

    /// Returns the queue's pending chains to the driver with length 0, before the queue
    /// stops. Returns true if the driver must be notified.
    pub fn return_unused<M: GuestMemory>(
        &mut self,
        vq: Vq,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<bool, QueueError> {
        let pending = match vq {
            Vq::Stats => &mut self.stats.pending,
            Vq::Request => &mut self.waiting,
            Vq::Inflate | Vq::Deflate | Vq::FreePage | Vq::Reporting => return Ok(false),
        };
        let returned = pending.return_unused(queue, memory);
        returned.map_err(|source| self.bad_ring(vq, source))
    }

    /// Forgets the pending chains of a queue that was set up again without being
    /// stopped first. They cannot be returned.
    pub fn forget_pending(&mut self, vq: Vq) {
        match vq {
            Vq::Stats => self.stats.pending.forget(),
            Vq::Request => self.waiting.forget(),
            Vq::Inflate | Vq::Deflate | Vq::FreePage | Vq::Reporting => {}
        }
    }

    /// Sets the layout of guest memory. Forgets pages that no longer exist and cancels
    /// their release: other memory may be mapped in their place.
    pub fn set_layout(&mut self, layout: MemoryLayout) {
        self.hinting.forget_outside(&layout);
        let gone = layout.cut(&mut self.held);
        if !gone.is_empty() {
            self.reclaim.cancel(&gone);
        }
        self.requests.forget_pages(&layout);
        self.layout = layout;
    }

    /// Serves a queue: takes each message, acts on it, and returns it.
    pub fn process_queue<M: GuestMemory>(
        &mut self,
        vq: Vq,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<Drained, QueueError> {
        match vq {
            Vq::Stats => return self.process_stats(memory, queue),
            Vq::FreePage | Vq::Reporting => return self.process_free_pages(vq, memory, queue),
            Vq::Request => return self.process_requests(memory, queue),
            Vq::Inflate | Vq::Deflate => {}
        }
        if let Some(change) = &mut self.change {
            change.notified(Instant::now());
        }
        let limit = self.limit();
        let drained = drain(queue, memory, |chain| {
            let outcome = self.message.read(chain, memory, limit).and_then(|()| self.handle(vq));
            if outcome.is_err() {
                self.refuse(vq);
            }
            let written_bytes = self.answer(memory, outcome);
            Handled { read_bytes: self.message.bytes().len(), written_bytes: Some(written_bytes) }
        });
        let drained = drained.map_err(|source| self.bad_ring(vq, source))?;
        if let Some(change) = &mut self.change {
            change.served(drained.chains);
        }
        Ok(drained)
    }

    /// Serves the request queue. The caller also calls this after a request was
    /// submitted, cancelled or timed out.
    fn process_requests<M: GuestMemory>(
        &mut self,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<Drained, QueueError> {
        self.requests.resume();
        let served = RequestQueue {
            requests: &mut self.requests,
            waiting: &mut self.waiting,
            message: &mut self.message,
            faults: &mut self.faults,
            layout: &self.layout,
            balloon: &self.held,
        }
        .process(memory, queue);
        served.map_err(|source| {
            self.waiting.forget();
            self.requests.end_all(RequestFailure::BadRing);
            self.bad_ring(Vq::Request, source)
        })
    }

    fn bad_ring(&mut self, vq: Vq, source: virtio_queue::Error) -> QueueError {
        use virtio_queue::Error::GuestMemory;
        // On an I/O error the memory behind the vring is gone, which is the host's fault.
        if !matches!(source, GuestMemory(vm_memory::GuestMemoryError::IOError(_))) {
            self.faults.count(Fault::BadRing);
        }
        QueueError::BadRing { vq, source }
    }

    /// Sets the balloon's target, in balloon pages. The caller sends the driver a
    /// configuration change notification.
    pub fn set_target(&mut self, pages: u32, now: Instant) {
        let actual = self.config.actual;
        let change = self.change.insert(Change::new(actual, pages, now));
        if self.negotiated == Features::NONE && actual == pages {
            // Without a driver, no config write will report this.
            change.actual_is(actual, now);
        }
        self.config.num_pages = pages;
    }

    /// Returns the configuration space as the driver reads it.
    pub fn read_config(&mut self, now: Instant) -> ConfigSpace {
        if let Some(change) = &mut self.change {
            change.config_read(self.config.actual, now);
        }
        self.config
    }

    /// Handles a driver's write to the configuration space. An invalid write is counted
    /// and changes nothing.
    pub fn write_config(&mut self, offset: u32, data: &[u8], now: Instant) -> Result<(), Fault> {
        let is_poison = Field::PoisonVal.offset() as u64 == u64::from(offset);
        if is_poison && !self.negotiated.contains(Features::PAGE_POISON) {
            self.faults.count(Fault::ConfigWrite);
            return Err(Fault::ConfigWrite);
        }
        match self.config.driver_write(offset, data) {
            Ok((Field::Actual, actual)) => {
                if let Some(change) = &mut self.change {
                    change.actual_is(actual, now);
                }
                if actual == self.config.num_pages {
                    self.reclaim.flush();
                }
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(_) => {
                self.faults.count(Fault::ConfigWrite);
                Err(Fault::ConfigWrite)
            }
        }
    }

    /// Queue indices under the negotiated features.
    pub const fn queues(&self) -> QueueLayout {
        QueueLayout::new(self.negotiated)
    }

    /// Features offered to the next driver.
    pub const fn offered(&self) -> Features {
        self.offered
    }

    /// Features that the driver accepted.
    pub const fn negotiated(&self) -> Features {
        self.negotiated
    }

    /// The configuration space.
    pub const fn config(&self) -> ConfigSpace {
        self.config
    }

    /// The layout of guest memory.
    pub const fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Pages in the balloon according to the inflate and deflate messages. The guest's
    /// `actual` may differ.
    pub const fn held(&self) -> &PageSet {
        &self.held
    }

    /// The guest's faults so far.
    pub const fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Totals so far.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// The latest change of the target.
    pub const fn change(&self) -> Option<&Change> {
        self.change.as_ref()
    }

    /// The requests to the guest.
    pub const fn requests(&self) -> &GuestRequests {
        &self.requests
    }

    /// The requests to the guest, to submit or cancel one. The caller must
    /// [serve](Self::process_queue) the request queue afterwards.
    pub const fn requests_mut(&mut self) -> &mut GuestRequests {
        &mut self.requests
    }

    /// The implementation that releases memory.
    pub const fn reclaim(&self) -> &R {
        &self.reclaim
    }

    /// The implementation that releases memory, to change its settings.
    pub const fn reclaim_mut(&mut self) -> &mut R {
        &mut self.reclaim
    }

    const fn limit(&self) -> usize {
        if self.uses_bitmap() { MAX_MESSAGE_BYTES } else { MAX_PFN_ARRAY_BYTES }
    }

    const fn uses_bitmap(&self) -> bool {
        self.negotiated.contains(Features::PAGE_BITMAP)
    }

    fn handle(&mut self, vq: Vq) -> Result<(), Fault> {
        let bytes = self.message.bytes();
        let pages = if self.uses_bitmap() {
            decode_bitmap(bytes, &self.layout)?
        } else {
            decode_pfn_array(bytes, &self.layout, &mut self.faults)
        };
        match vq {
            Vq::Inflate => self.inflate(&pages),
            Vq::Deflate => self.deflate(&pages),
            // `process_queue` serves these with handlers of their own.
            Vq::Stats | Vq::FreePage | Vq::Reporting | Vq::Request => {}
        }
        Ok(())
    }

    /// Releases a page again if it is in the balloon already: a guest that lost count may
    /// have written to it. Without `MUST_TELL_HOST` the guest may use the page as soon as
    /// the message is returned, so memory is released now or not at all.
    fn inflate(&mut self, pages: &PageSet) {
        self.counters.inflate_messages += 1;
        self.counters.inflated_pages += pages.len();
        self.held.union_with(pages);
        self.requests.inflated(pages);
        if self.negotiated.contains(Features::MUST_TELL_HOST) {
            self.reclaim.release(pages);
        } else {
            self.reclaim.release_now(pages);
        }
    }

    /// Cancels the release even of pages that are not in the balloon, which is always safe.
    /// But the host provides memory only for pages that leave the balloon, not for any page
    /// that a guest names. If the balloon may hold inherited pages, all pages count as
    /// balloon pages.
    fn deflate(&mut self, pages: &PageSet) {
        self.counters.deflate_messages += 1;
        self.counters.deflated_pages += pages.len();
        let mut unexpected = pages.clone();
        unexpected.subtract(&self.held);
        self.held.subtract(pages);
        if unexpected.is_empty() || self.inherited {
            self.reclaim.retain(pages);
            return;
        }
        self.faults.count(Fault::NotInBalloon);
        self.reclaim.cancel(&unexpected);
        let mut deflated = pages.clone();
        deflated.subtract(&unexpected);
        self.reclaim.retain(&deflated);
    }

    /// A driver without `PAGE_BITMAP` receives no status, so it does not see that its
    /// deflate was refused and uses the pages as soon as the message is returned. The
    /// device cannot tell which pages, so it cancels every pending release.
    fn refuse(&mut self, vq: Vq) {
        if vq == Vq::Deflate && !self.uses_bitmap() {
            self.reclaim.cancel(&self.held);
        }
    }

    /// Counts a fault and answers the message; returns the bytes written.
    fn answer(&mut self, memory: &impl GuestMemory, outcome: Result<(), Fault>) -> u32 {
        let status = match outcome {
            Ok(()) => MessageStatus::Accepted,
            Err(fault) => {
                self.faults.count(fault);
                fault.status()
            }
        };
        if self.uses_bitmap() { self.message.answer(memory, status) } else { 0 }
    }
}
