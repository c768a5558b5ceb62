//! Free page hinting and free page reporting: the two queues on which the guest
//! names free pages, and the host's side of hinting.

use std::sync::Arc;
use std::time::Instant;

use balloon_abi::{Features, HintId, Vq};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::{BalloonDevice, QueueError};
use crate::answer::{Blocks, FreeKind, FreePages};
use crate::drain::{Drained, Handled, drain};
use crate::fault::Fault;
use crate::hint::{HintError, HintPhase, Hinting};
use crate::named::{self, Named};
use crate::poison;
use crate::reclaim::Reclaim;
use crate::report::Reports;

impl<R: Reclaim> BalloonDevice<R> {
    /// Requests hints under a new command id and ends the previous request. The caller
    /// sends a configuration change notification. A caller that will skip hinted pages
    /// must enable dirty logging **before** this call.
    pub fn start_hinting(&mut self, now: Instant) -> Result<HintId, HintError> {
        if !self.negotiated.contains(Features::FREE_PAGE_HINT) {
            return Err(HintError::NotNegotiated);
        }
        let id = self.hinting.start(now);
        self.publish_hint_command();
        Ok(id)
    }

    /// Stops hinting. The guest keeps the hinted pages allocated until
    /// [`hinting_done`](Self::hinting_done). The caller sends a configuration change
    /// notification.
    pub fn stop_hinting(&mut self) {
        self.hinting.stop();
        self.publish_hint_command();
    }

    /// Lets the guest free the hinted pages. A complete set of hints becomes the newest
    /// free-page report ([`GuestRequests::newest`](crate::GuestRequests::newest)), which is
    /// information only. The caller sends a configuration change notification. Until this
    /// call the guest keeps its free memory allocated, so every
    /// [`start_hinting`](Self::start_hinting) must be followed by it.
    pub fn hinting_done(&mut self) {
        if let (HintPhase::Complete, Some(id)) = (self.hinting.phase(), self.hinting.id()) {
            let pages = self.hinting.pages().clone();
            let elapsed = self.hinting.started().map(|started| started.elapsed());
            let elapsed_ns = elapsed.map_or(0, |elapsed| elapsed.as_nanos());
            self.requests.hinted(FreePages {
                id: id.get(),
                kind: FreeKind::Hint,
                blocks: Blocks::of(&pages),
                pages: Arc::new(pages),
                guest_free_pages: 0,
                lock_ns: 0,
                elapsed_ns: u64::try_from(elapsed_ns).unwrap_or(u64::MAX),
            });
        }
        self.hinting.done();
        self.publish_hint_command();
    }

    /// The newest request for hints and its state.
    pub const fn hinting(&self) -> &Hinting {
        &self.hinting
    }

    /// Totals of free page reporting.
    pub const fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Serves the hint queue or the reporting queue.
    pub(super) fn process_free_pages<M: GuestMemory>(
        &mut self,
        vq: Vq,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<Drained, QueueError> {
        let ring = GuestAddress(queue.desc_table());
        let drained = drain(queue, memory, |chain| {
            let (read_bytes, named) = named::read(chain, memory, &self.layout);
            // If the vring's memory is gone, the descriptors may have been read as zeros.
            let is_there = memory.check_range(ring, 1, Permissions::Read);
            let named =
                named.and_then(|named| is_there.then_some(named).ok_or(Fault::BadDescriptor));
            if vq == Vq::Reporting {
                self.reports.messages += 1;
            }
            let outcome = named.and_then(|named| match vq {
                Vq::Reporting => self.report(&named),
                _ => self.hint(&named),
            });
            if let Err(fault) = outcome {
                self.faults.count(fault);
            }
            // The descriptors only name the pages; the device writes nothing.
            Handled { read_bytes, written_bytes: Some(0) }
        });
        self.publish_hint_command();
        drained.map_err(|source| self.bad_ring(vq, source))
    }

    fn hint(&mut self, named: &Named) -> Result<(), Fault> {
        if let Some(command) = named.command {
            self.hinting.receive_command(command)?;
        }
        if named.pages.is_empty() {
            Ok(())
        } else {
            self.hinting.receive_pages(&named.pages, &self.held)
        }
    }

    fn report(&mut self, named: &Named) -> Result<(), Fault> {
        if named.command.is_some() {
            return Err(Fault::MalformedFreePages);
        }
        let may_read_as_zeros = poison::may_read_as_zeros(self.negotiated, &self.config);
        self.reports.take(&named.pages, &self.held, may_read_as_zeros, &mut self.reclaim)
    }

    pub(super) const fn publish_hint_command(&mut self) {
        self.config.free_page_hint_cmd_id = self.hinting.command().to_u32();
    }
}
