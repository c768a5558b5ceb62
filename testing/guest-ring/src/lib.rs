//! The driver side of a split virtqueue in guest memory, for tests and fuzz targets of the devices.
//! No shipped crate depends on it.
//!
//! It writes valid chains with [`GuestRing::send`], or any descriptor, head and index with the
//! calls below it. A test reads the used ring to detect returned chains. [`naive`] parses messages.

#![forbid(unsafe_code)]

pub mod naive;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Descriptor flag: another descriptor follows (virtio 1.3, section 2.7.5).
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = 16;
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;
const USED_HEADER_BYTES: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;
const EVENT_BYTES: u64 = 2;
/// Alignment of the vring's parts: larger than any of them needs.
const PART_ALIGN_BYTES: u64 = 16;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub const fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: false }
    }

    /// A buffer that the device writes.
    pub const fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: true }
    }
}

/// A returned chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head descriptor of the chain.
    pub head: u32,
    /// Bytes written according to the device.
    pub written_bytes: u32,
}

/// A vring in guest memory.
#[derive(Clone, Debug)]
pub struct GuestRing {
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    next_slot: u16,
    avail_idx: u16,
    used_idx: u16,
}

impl GuestRing {
    /// A vring of `size` entries (a power of two) at guest physical address `start`, which takes
    /// [`bytes`](Self::bytes) from there.
    ///
    /// `start` must be a multiple of 16 and not 0: `virtio-queue` treats an available ring at
    /// address 0 as one that was never set up.
    pub const fn new(start: u64, size: u16) -> Self {
        let avail = start + size as u64 * DESCRIPTOR_BYTES;
        let avail_bytes = AVAIL_HEADER_BYTES + size as u64 * AVAIL_ENTRY_BYTES + EVENT_BYTES;
        let used = (avail + avail_bytes).next_multiple_of(PART_ALIGN_BYTES);
        Self { size, table: start, avail, used, next_slot: 0, avail_idx: 0, used_idx: 0 }
    }

    /// Bytes of guest memory that a vring of `size` entries takes.
    pub const fn bytes(size: u16) -> u64 {
        let ring = Self::new(0, size);
        ring.used + USED_HEADER_BYTES + size as u64 * USED_ENTRY_BYTES + EVENT_BYTES
    }

    /// Number of entries.
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Guest physical address of the descriptor table.
    pub const fn table(&self) -> u64 {
        self.table
    }

    /// Guest physical address of the available ring.
    pub const fn avail(&self) -> u64 {
        self.avail
    }

    /// Guest physical address of the used ring.
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// Guest physical address of the index that counts returned chains.
    pub const fn used_idx_addr(&self) -> u64 {
        self.used + 2
    }

    /// Device-side queue of this vring, ready.
    ///
    /// # Panics
    /// `size` is no power of two or an address is not aligned.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.try_set_desc_table_address(GuestAddress(self.table)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(self.used)).expect("aligned");
        queue.set_ready(true);
        queue
    }

    /// Zeroes the vring and its state, like a driver that restarts.
    pub fn reset(&mut self, memory: &impl GuestMemory) {
        for at in 0..Self::bytes(self.size) {
            let _ = memory.write_obj(0u8, GuestAddress(self.table + at));
        }
        *self = Self::new(self.table, self.size);
    }

    /// Links `buffers` into a chain, makes it available and returns its head. An empty chain is one
    /// descriptor of address and length 0.
    pub fn send(&mut self, memory: &impl GuestMemory, buffers: &[Buffer]) -> u16 {
        let head = self.next_slot % self.size;
        let slots = u16::try_from(buffers.len()).unwrap_or(self.size).min(self.size);
        if slots == 0 {
            self.write_descriptor(memory, head, Descriptor::new(0, 0, 0, 0));
        }
        for (i, buffer) in (0..slots).zip(buffers) {
            let slot = head.wrapping_add(i) % self.size;
            let next = slot.wrapping_add(1) % self.size;
            let more = if i + 1 < slots { NEXT } else { 0 };
            let write = if buffer.writable { WRITE } else { 0 };
            let descriptor = Descriptor::new(buffer.addr, buffer.len, more | write, next);
            self.write_descriptor(memory, slot, descriptor);
        }
        self.next_slot = head.wrapping_add(slots.max(1)) % self.size;
        self.publish(memory, head);
        head
    }

    /// Writes descriptor `index` of the table, which may lie beyond it. Writes nothing if there is
    /// no memory.
    pub fn write_descriptor(
        &self,
        memory: &impl GuestMemory,
        index: u16,
        descriptor: Descriptor,
    ) -> bool {
        write_descriptor(memory, self.table, index, descriptor)
    }

    /// Makes the chain at `head` available, also if `head` is invalid.
    pub fn publish(&mut self, memory: &impl GuestMemory, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        let at = self.avail + AVAIL_HEADER_BYTES + slot * AVAIL_ENTRY_BYTES;
        let _ = memory.write_obj(head.to_le(), GuestAddress(at));
        self.set_avail_idx(memory, self.avail_idx.wrapping_add(1));
    }

    /// Writes any index of the available ring.
    pub fn set_avail_idx(&mut self, memory: &impl GuestMemory, idx: u16) {
        self.avail_idx = idx;
        let _ = memory.write_obj(idx.to_le(), GuestAddress(self.avail + 2));
    }

    /// The last written index of the available ring.
    pub const fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// First descriptor of the next chain.
    pub const fn next_slot(&self) -> u16 {
        self.next_slot % self.size
    }

    /// Takes the next returned chain, if any.
    pub fn take_used(&mut self, memory: &impl GuestMemory) -> Option<Used> {
        let idx: u16 = memory.read_obj(GuestAddress(self.used_idx_addr())).ok()?;
        if u16::from_le(idx) == self.used_idx {
            return None;
        }
        let slot = u64::from(self.used_idx % self.size);
        let at = self.used + USED_HEADER_BYTES + slot * USED_ENTRY_BYTES;
        self.used_idx = self.used_idx.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(at)).ok()?;
        let written: u32 = memory.read_obj(GuestAddress(at + 4)).ok()?;
        Some(Used { head: u32::from_le(head), written_bytes: u32::from_le(written) })
    }
}

/// Writes entry `index` of the descriptor table at `table`, such as an indirect one. Returns false
/// if there is no memory.
pub fn write_descriptor(
    memory: &impl GuestMemory,
    table: u64,
    index: u16,
    descriptor: Descriptor,
) -> bool {
    table.checked_add(u64::from(index) * DESCRIPTOR_BYTES).is_some_and(|at| {
        memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(at)).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::QueueOwnedT;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn sent_chains_reach_the_device_and_returned_chains_the_driver() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut ring = GuestRing::new(0x1000, 4);
        let mut queue = ring.queue();
        assert!(queue.is_valid(&memory));
        for round in 0..10u32 {
            let buffers = [Buffer::readable(0x2000, 8 + round), Buffer::writable(0x3000, 4)];
            let head = ring.send(&memory, &buffers);
            assert_eq!(ring.take_used(&memory), None);

            let chain = queue.iter(&memory).unwrap().next().unwrap();
            assert_eq!(chain.head_index(), head);
            let seen: Vec<_> =
                chain.map(|d| (d.addr().0, d.len(), d.is_write_only(), d.has_next())).collect();
            assert_eq!(seen, [(0x2000, 8 + round, false, true), (0x3000, 4, true, false)]);
            queue.add_used(&memory, head, round).unwrap();
            let used = Used { head: u32::from(head), written_bytes: round };
            assert_eq!(ring.take_used(&memory), Some(used));
            assert_eq!(ring.take_used(&memory), None);
        }
    }

    #[test]
    fn the_parts_of_a_vring_do_not_overlap() {
        for size in [1, 2, 16, 256, 32768] {
            let ring = GuestRing::new(0x1000, size);
            let entries = u64::from(size);
            assert!(ring.table() + entries * 16 <= ring.avail());
            assert!(ring.avail() + 6 + entries * 2 <= ring.used());
            assert!(ring.used() + 6 + entries * 8 <= 0x1000 + GuestRing::bytes(size));
        }
    }
}
