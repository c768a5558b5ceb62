//! The statistics queue.

use std::time::Instant;

use balloon_abi::Vq;
use balloon_abi::stats::MAX_STATS_BYTES;
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use super::{BalloonDevice, QueueError};
use crate::drain::{Drained, Handled, drain};
use crate::reclaim::Reclaim;
use crate::stats::Stats;

impl<R: Reclaim> BalloonDevice<R> {
    /// The newest statistics of the guest.
    pub const fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests new statistics by returning the pending buffer. Does nothing while the
    /// driver has not answered the last request. Returns true if the driver must be
    /// notified.
    pub fn request_stats<M: GuestMemory>(
        &mut self,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<bool, QueueError> {
        if !queue.ready() {
            return Ok(false);
        }
        let Some(chain) = self.stats.pending.take() else { return Ok(false) };
        let returned = queue.add_used(memory, chain.head, 0);
        let notify = returned.and_then(|()| queue.needs_notification(memory));
        notify.map_err(|source| self.bad_ring(Vq::Stats, source))
    }

    pub(super) fn process_stats<M: GuestMemory>(
        &mut self,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<Drained, QueueError> {
        let drained = drain(queue, memory, |chain| {
            let head = chain.head_index();
            let read = self.message.read(chain, memory, MAX_STATS_BYTES);
            let buffer = read.map(|()| self.message.bytes());
            let (kept, fault) = self.stats.take(head, buffer, Instant::now());
            if let Some(fault) = fault {
                self.faults.count(fault);
            }
            let written_bytes = (!kept).then_some(0);
            Handled { read_bytes: self.message.bytes().len(), written_bytes }
        });
        drained.map_err(|source| self.bad_ring(Vq::Stats, source))
    }
}
