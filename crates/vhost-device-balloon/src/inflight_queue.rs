//! A queue whose chains under way are noted where the front end keeps them.

use std::num::Wrapping;
use std::ops::Deref;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, Queue, QueueGuard, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::inflight::Part;

/// Bytes of flags and index before the entries of an available ring, and of one
/// entry (virtio 1.3, section 2.7.6).
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;

/// A queue of the `virtio-queue` crate, with notes beside it or without.
#[derive(Debug)]
pub(crate) struct TrackedQueue {
    queue: Queue,
    notes: Option<Part>,
    counter: u64,
    /// A note could not be written: the front end took its memory away.
    lost: bool,
}

/// How a queue was found where another device may have left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The driver has had chains back: it did not start just now.
    pub(crate) used: bool,
    /// Chains that were kept, and cannot be read from the ring once more: they are
    /// to be given back.
    pub(crate) kept: Vec<u16>,
}

impl TrackedQueue {
    /// Notes chains in `notes` from the next [`find`](Self::find) on.
    pub(crate) fn set_notes(&mut self, notes: Option<Part>) {
        self.notes = notes;
    }

    pub(crate) const fn has_notes(&self) -> bool {
        self.notes.is_some()
    }

    pub(crate) const fn is_lost(&self) -> bool {
        self.lost
    }

    /// Stands where the ring stands: the used ring tells what the driver has had
    /// back, the notes what was under way, and what is neither is still to be taken.
    /// Without notes all that has not come back is.
    ///
    /// The front end's word for it (`SET_VRING_BASE`) is not needed: monitors that
    /// lost their back end send the used index, or even the available one.
    ///
    /// A chain that is read once more may have been acted on. That is harmless: it
    /// did not come back, so its driver still leaves alone what it gave and what it
    /// asked for.
    pub(crate) fn find<M: GuestMemory>(&mut self, memory: &M) -> Result<Found, Error> {
        let used_idx = self.queue.used_idx(memory, Ordering::Acquire)?.0;
        let avail_idx = self.queue.avail_idx(memory, Ordering::Acquire)?.0;
        if !self.is_there(memory) {
            return Err(Error::InvalidAvailRingIndex);
        }
        self.queue.set_next_used(used_idx);
        self.queue.set_next_avail(used_idx);
        let mut found = Found { used: used_idx != 0, kept: Vec::new() };
        let size = self.queue.size();
        // Of another size, they are not about this queue.
        self.notes.take_if(|notes| !notes.fits(size));
        let Some(notes) = self.notes.clone() else { return Ok(found) };
        match notes.recover(used_idx, avail_idx) {
            Ok(mut noted) => {
                self.counter = noted.counter;
                // Heads that the ring does not have are not of this queue.
                self.lost |= noted.heads.iter().any(|head| *head >= size);
                let mut next = used_idx.wrapping_add(u16::try_from(noted.heads.len()).unwrap_or(0));
                // Those taken last are still in the ring, and are read once more.
                while let Some(head) = noted.heads.last() {
                    if self.entry(memory, next.wrapping_sub(1))? != *head {
                        break;
                    }
                    noted.heads.pop();
                    next = next.wrapping_sub(1);
                }
                self.queue.set_next_avail(next);
                found.kept = noted.heads;
            }
            Err(_) => self.lost = true,
        }
        Ok(found)
    }

    /// False where what was read of the ring may be none of it, because its memory turned
    /// out to be gone.
    fn is_there<M: GuestMemory + ?Sized>(&self, memory: &M) -> bool {
        memory.check_range(GuestAddress(self.queue.avail_ring()), 1, Permissions::Read)
    }

    /// The head that stands in the available ring at `index`.
    fn entry<M: GuestMemory>(&self, memory: &M, index: u16) -> Result<u16, Error> {
        let slot = u64::from(index % self.queue.size().max(1));
        let at = self.queue.avail_ring().checked_add(AVAIL_HEADER_BYTES + slot * AVAIL_ENTRY_BYTES);
        let at = GuestAddress(at.ok_or(Error::AddressOverflow)?);
        memory.read_obj(at).map(u16::from_le).map_err(Error::GuestMemory)
    }

    fn note(&mut self, write: impl FnOnce(&Part) -> std::io::Result<()>) {
        if let Some(notes) = &self.notes {
            self.lost |= write(notes).is_err();
        }
    }
}

impl Deref for TrackedQueue {
    type Target = Queue;
    fn deref(&self) -> &Queue {
        &self.queue
    }
}

impl std::ops::DerefMut for TrackedQueue {
    fn deref_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }
}

impl<'a> QueueGuard<'a> for TrackedQueue {
    type G = &'a mut Queue;
}

impl QueueT for TrackedQueue {
    fn new(max_size: u16) -> Result<Self, Error> {
        Ok(Self { queue: Queue::new(max_size)?, notes: None, counter: 0, lost: false })
    }

    fn pop_descriptor_chain<M>(&mut self, mem: M) -> Option<DescriptorChain<M>>
    where
        M: Clone + Deref,
        M::Target: GuestMemory,
    {
        // Asked for its error before, by whoever drains.
        let memory = mem.clone();
        let chain = self.queue.iter(mem).ok()?.next()?;
        if !self.is_there(&*memory) {
            return None;
        }
        let head = chain.head_index();
        if head < self.queue.size() {
            self.counter = self.counter.wrapping_add(1);
            let counter = self.counter;
            self.note(|notes| notes.taken(head, counter));
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
        self.note(|notes| notes.returning(head_index));
        self.queue.add_used(mem, head_index, len)?;
        let used_idx = self.queue.next_used();
        self.note(|notes| notes.returned(head_index, used_idx));
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
