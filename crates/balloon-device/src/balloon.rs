//! The device: configuration space, the queues' handlers, what the guest gave.

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

/// A queue cannot be served any more until the driver sets it up anew.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring itself is not as the specification says.
    #[error("guest: the ring of the {vq:?} queue makes no sense")]
    BadRing {
        /// The queue.
        vq: Vq,
        /// What was wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// The queue has no number under the negotiated features.
    #[error("front end: there is no queue {index} under the negotiated features")]
    NoSuchQueue {
        /// The number.
        index: usize,
    },
}

/// What the queues carried so far.
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
    /// Pages the guest gave and did not take back.
    held: PageSet,
    /// The guest gave pages before the device began to watch, nobody knows which.
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
    /// Chains of the request queue that wait for a request.
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

    /// A device without memory; see [`set_layout`](Self::set_layout).
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

    /// Offers no feature of `features`, from the next driver on.
    pub fn withhold(&mut self, features: Features) {
        self.offered = Self::FEATURES.without(features);
    }

    /// A driver starts: it holds nothing, and uses any page that it wants.
    /// Features that were not offered are not accepted either.
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
        self.show_hint_command();
        if let Some(change) = &mut self.change {
            change.actual_is(0, Instant::now());
        }
    }

    /// The driver's queues stop. It may be reset now, and then uses any page that
    /// it wants before the device hears of it again: what was not released yet
    /// never is. Where it only pauses, its balloon is still what it was, and what was
    /// released stays so.
    ///
    /// Chains that are kept are forgotten; see [`return_unused`](Self::return_unused).
    pub fn suspend(&mut self) {
        self.reclaim.cancel(&self.held);
        self.stats.kept.forget();
        self.waiting.forget();
        self.requests.suspend();
    }

    /// A queue is about to stop: chains of it that the device keeps go back to
    /// the driver with nothing in them. True where it wants to be notified.
    pub fn return_unused<M: GuestMemory>(
        &mut self,
        vq: Vq,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<bool, QueueError> {
        let kept = match vq {
            Vq::Stats => &mut self.stats.kept,
            Vq::Request => &mut self.waiting,
            Vq::Inflate | Vq::Deflate | Vq::FreePage | Vq::Reporting => return Ok(false),
        };
        let given_back = kept.return_unused(queue, memory);
        given_back.map_err(|source| self.bad_ring(vq, source))
    }

    /// A queue is set up anew without having been stopped: what is kept of it
    /// cannot be returned.
    pub fn forget_kept(&mut self, vq: Vq) {
        match vq {
            Vq::Stats => self.stats.kept.forget(),
            Vq::Request => self.waiting.forget(),
            Vq::Inflate | Vq::Deflate | Vq::FreePage | Vq::Reporting => {}
        }
    }

    /// Guest memory is now at `layout`. Pages that are gone are forgotten, and
    /// not released later: other memory may come in their place.
    pub fn set_layout(&mut self, layout: MemoryLayout) {
        self.hinting.forget_outside(&layout);
        let gone = layout.cut(&mut self.held);
        if !gone.is_empty() {
            self.reclaim.cancel(&gone);
        }
        self.layout = layout;
        self.requests.forget_pages();
    }

    /// Serves a queue: takes every message, acts on it, and returns it.
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

    /// Serves the request queue: also when something was submitted, stopped or
    /// ran out of time.
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
        // The host's, whose memory is gone.
        if !matches!(source, GuestMemory(vm_memory::GuestMemoryError::IOError(_))) {
            self.faults.count(Fault::BadRing);
        }
        QueueError::BadRing { vq, source }
    }

    /// Sets the pages that the guest is asked to give. The caller tells the
    /// driver that the configuration changed.
    pub fn set_target(&mut self, pages: u32, now: Instant) {
        let actual = self.config.actual;
        let change = self.change.insert(Change::new(actual, pages, now));
        if self.negotiated == Features::NONE && actual == pages {
            // No driver will come to say so.
            change.actual_is(actual, now);
        }
        self.config.num_pages = pages;
    }

    /// The configuration space, as a driver reads it.
    pub fn read_config(&mut self, now: Instant) -> ConfigSpace {
        if let Some(change) = &mut self.change {
            change.config_read(self.config.actual, now);
        }
        self.config
    }

    /// A driver's write to the configuration space; one that is not allowed is
    /// counted and changes nothing.
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

    /// Numbering of the queues under the negotiated features.
    pub const fn queues(&self) -> QueueLayout {
        QueueLayout::new(self.negotiated)
    }

    /// What the next driver can accept.
    pub const fn offered(&self) -> Features {
        self.offered
    }

    /// What the driver accepted.
    pub const fn negotiated(&self) -> Features {
        self.negotiated
    }

    /// Values of the configuration space.
    pub const fn config(&self) -> ConfigSpace {
        self.config
    }

    /// Where guest memory is.
    pub const fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Pages that the host counts in the balloon, whatever the guest says.
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

    /// The newest change of the target.
    pub const fn change(&self) -> Option<&Change> {
        self.change.as_ref()
    }

    /// What the operator asks of the guest.
    pub const fn requests(&self) -> &GuestRequests {
        &self.requests
    }

    /// What the operator asks of the guest, to ask more. The request queue is to
    /// be [served](Self::process_queue) then.
    pub const fn requests_mut(&mut self) -> &mut GuestRequests {
        &mut self.requests
    }

    /// What releases memory.
    pub const fn reclaim(&self) -> &R {
        &self.reclaim
    }

    /// What releases memory, to change its settings.
    pub const fn reclaim_mut(&mut self) -> &mut R {
        &mut self.reclaim
    }

    const fn limit(&self) -> usize {
        if self.speaks_bitmap() { MAX_MESSAGE_BYTES } else { MAX_PFN_ARRAY_BYTES }
    }

    const fn speaks_bitmap(&self) -> bool {
        self.negotiated.contains(Features::PAGE_BITMAP)
    }

    fn handle(&mut self, vq: Vq) -> Result<(), Fault> {
        let bytes = self.message.bytes();
        let pages = if self.speaks_bitmap() {
            decode_bitmap(bytes, &self.layout)?
        } else {
            decode_pfn_array(bytes, &self.layout, &mut self.faults)
        };
        match vq {
            Vq::Inflate => self.inflate(&pages),
            Vq::Deflate => self.deflate(&pages),
            // Not offered, so no layout gives them a number; requests go their own way.
            Vq::Stats | Vq::FreePage | Vq::Reporting | Vq::Request => {}
        }
        Ok(())
    }

    /// A page that is in the balloon already is released again: a guest that
    /// lost count may have written to it. A guest that need not tell the host
    /// before it uses a page can only be served at once.
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

    /// Pages that the balloon does not hold are kept all the same: keeping is
    /// always safe. But the host is to have memory only for what comes out of the balloon, not
    /// for whatever a guest names. Where nobody knows what is in it, all may be.
    fn deflate(&mut self, pages: &PageSet) {
        self.counters.deflate_messages += 1;
        self.counters.deflated_pages += pages.len();
        let mut strange = pages.clone();
        strange.subtract(&self.held);
        self.held.subtract(pages);
        if strange.is_empty() || self.inherited {
            self.reclaim.retain(pages);
            return;
        }
        self.faults.count(Fault::NotInBalloon);
        self.reclaim.cancel(&strange);
        let mut taken_out = pages.clone();
        taken_out.subtract(&strange);
        self.reclaim.retain(&taken_out);
    }

    /// A driver without `PAGE_BITMAP` cannot be told that its deflate was refused:
    /// it uses the pages as soon as the message comes back. The device does not
    /// know which ones, so none that it holds may be released any more.
    fn refuse(&mut self, vq: Vq) {
        if vq == Vq::Deflate && !self.speaks_bitmap() {
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
        if self.speaks_bitmap() { self.message.answer(memory, status) } else { 0 }
    }
}
