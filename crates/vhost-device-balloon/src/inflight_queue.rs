//! A virtqueue that records its chains in flight in the inflight region.

use std::num::Wrapping;
use std::ops::Deref;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, Queue, QueueGuard, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::inflight::QueueRegion;

/// Bytes of flags and index before the entries of an available ring, and of one
/// entry (virtio 1.3, section 2.7.6).
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;

/// A queue of the `virtio-queue` crate, with or without an inflight region.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    queue: Queue,
    region: Option<QueueRegion>,
    counter: u64,
    /// A write to the inflight region failed: the front end truncated it.
    lost: bool,
}

/// State of a vring that another back end may have served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecoveredVring {
    /// Chains were returned before: the driver did not just start.
    pub(crate) used: bool,
    /// Pending chains that cannot be read from the available ring again. The caller must
    /// return them unused.
    pub(crate) pending: Vec<u16>,
}

impl InflightQueue {
    /// Records chains in `region` from the next [`recover`](Self::recover) on.
    pub(crate) fn set_region(&mut self, region: Option<QueueRegion>) {
        self.region = region;
    }

    pub(crate) const fn has_region(&self) -> bool {
        self.region.is_some()
    }

    pub(crate) const fn is_lost(&self) -> bool {
        self.lost
    }

    /// Recovers the position in the vring. The used ring has the returned chains, the inflight
    /// region has the pending chains, and all others are taken again. Without an inflight region
    /// all chains that were not returned are taken again.
    ///
    /// Ignores the base in `SET_VRING_BASE`: front ends that lost their back end send the used
    /// index, or even the available index.
    ///
    /// A chain that is taken again may have been acted on. That is harmless: it was not returned,
    /// so its driver uses neither the pages that it inflated nor those that it deflates.
    pub(crate) fn recover<M: GuestMemory>(&mut self, memory: &M) -> Result<RecoveredVring, Error> {
        let used_idx = self.queue.used_idx(memory, Ordering::Acquire)?.0;
        let avail_idx = self.queue.avail_idx(memory, Ordering::Acquire)?.0;
        if !self.is_there(memory) {
            return Err(Error::InvalidAvailRingIndex);
        }
        self.queue.set_next_used(used_idx);
        self.queue.set_next_avail(used_idx);
        let mut recovered = RecoveredVring { used: used_idx != 0, pending: Vec::new() };
        let size = self.queue.size();
        // A region of another size does not belong to this queue.
        self.region.take_if(|region| !region.fits(size));
        let Some(region) = self.region.clone() else { return Ok(recovered) };
        match region.recover(used_idx, avail_idx) {
            Ok(mut inflight) => {
                self.counter = inflight.counter;
                // Heads outside of the vring mean that the region is invalid.
                self.lost |= inflight.heads.iter().any(|head| *head >= size);
                let mut next =
                    used_idx.wrapping_add(u16::try_from(inflight.heads.len()).unwrap_or(0));
                // The chains taken last are still in the available ring, and are taken again.
                while let Some(head) = inflight.heads.last() {
                    if self.entry(memory, next.wrapping_sub(1))? != *head {
                        break;
                    }
                    inflight.heads.pop();
                    next = next.wrapping_sub(1);
                }
                self.queue.set_next_avail(next);
                recovered.pending = inflight.heads;
            }
            Err(_) => self.lost = true,
        }
        Ok(recovered)
    }

    /// Returns false if the vring's memory is gone, so that earlier reads may be invalid.
    fn is_there<M: GuestMemory + ?Sized>(&self, memory: &M) -> bool {
        memory.check_range(GuestAddress(self.queue.avail_ring()), 1, Permissions::Read)
    }

    /// Returns the head in the available ring at `index`.
    fn entry<M: GuestMemory>(&self, memory: &M, index: u16) -> Result<u16, Error> {
        let slot = u64::from(index % self.queue.size().max(1));
        let at = self.queue.avail_ring().checked_add(AVAIL_HEADER_BYTES + slot * AVAIL_ENTRY_BYTES);
        let at = GuestAddress(at.ok_or(Error::AddressOverflow)?);
        memory.read_obj(at).map(u16::from_le).map_err(Error::GuestMemory)
    }

    fn record(&mut self, write: impl FnOnce(&QueueRegion) -> std::io::Result<()>) {
        if let Some(region) = &self.region {
            self.lost |= write(region).is_err();
        }
    }
}

impl Deref for InflightQueue {
    type Target = Queue;
    fn deref(&self) -> &Queue {
        &self.queue
    }
}

impl std::ops::DerefMut for InflightQueue {
    fn deref_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }
}

impl<'a> QueueGuard<'a> for InflightQueue {
    type G = &'a mut Queue;
}

impl QueueT for InflightQueue {
    fn new(max_size: u16) -> Result<Self, Error> {
        Ok(Self { queue: Queue::new(max_size)?, region: None, counter: 0, lost: false })
    }

    fn pop_descriptor_chain<M>(&mut self, mem: M) -> Option<DescriptorChain<M>>
    where
        M: Clone + Deref,
        M::Target: GuestMemory,
    {
        // An error is reported by `drain`, which checks the index first.
        let memory = mem.clone();
        let chain = self.queue.iter(mem).ok()?.next()?;
        if !self.is_there(&*memory) {
            return None;
        }
        let head = chain.head_index();
        if head < self.queue.size() {
            self.counter = self.counter.wrapping_add(1);
            let counter = self.counter;
            self.record(|region| region.taken(head, counter));
        }
        Some(chain)
    }

    fn add_used<M: GuestMemory>(
        &mut self,
        mem: &M,
        head_index: u16,
        len: u32,
    ) -> Result<(), Error> {
        if head_index >= self.queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        self.record(|region| region.returning(head_index));
        self.queue.add_used(mem, head_index, len)?;
        let used_idx = self.queue.next_used();
        self.record(|region| region.returned(head_index, used_idx));
        Ok(())
    }

    fn is_valid<M: GuestMemory>(&self, mem: &M) -> bool {
        self.queue.is_valid(mem)
    }

    fn reset(&mut self) {
        self.queue.reset();
    }

    fn lock(&mut self) -> &mut Queue {
        &mut self.queue
    }

    fn max_size(&self) -> u16 {
        self.queue.max_size()
    }

    fn size(&self) -> u16 {
        self.queue.size()
    }

    fn set_size(&mut self, size: u16) {
        self.queue.set_size(size);
    }

    fn ready(&self) -> bool {
        self.queue.ready()
    }

    fn set_ready(&mut self, ready: bool) {
        self.queue.set_ready(ready);
    }

    fn set_desc_table_address(&mut self, low: Option<u32>, high: Option<u32>) {
        self.queue.set_desc_table_address(low, high);
    }

    fn set_avail_ring_address(&mut self, low: Option<u32>, high: Option<u32>) {
        self.queue.set_avail_ring_address(low, high);
    }

    fn set_used_ring_address(&mut self, low: Option<u32>, high: Option<u32>) {
        self.queue.set_used_ring_address(low, high);
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    fn avail_idx<M>(&self, mem: &M, order: Ordering) -> Result<Wrapping<u16>, Error>
    where
        M: GuestMemory + ?Sized,
    {
        self.queue.avail_idx(mem, order)
    }

    fn used_idx<M: GuestMemory>(&self, mem: &M, order: Ordering) -> Result<Wrapping<u16>, Error> {
        self.queue.used_idx(mem, order)
    }

    fn enable_notification<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, Error> {
        self.queue.enable_notification(mem)
    }

    fn disable_notification<M: GuestMemory>(&mut self, mem: &M) -> Result<(), Error> {
        self.queue.disable_notification(mem)
    }

    fn needs_notification<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, Error> {
        self.queue.needs_notification(mem)
    }

    fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    fn set_next_avail(&mut self, next_avail: u16) {
        self.queue.set_next_avail(next_avail);
    }

    fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    fn set_next_used(&mut self, next_used: u16) {
        self.queue.set_next_used(next_used);
    }

    fn desc_table(&self) -> u64 {
        self.queue.desc_table()
    }

    fn avail_ring(&self) -> u64 {
        self.queue.avail_ring()
    }

    fn used_ring(&self) -> u64 {
        self.queue.used_ring()
    }

    fn event_idx_enabled(&self) -> bool {
        self.queue.event_idx_enabled()
    }
}
