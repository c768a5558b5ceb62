//! Checks of a split virtqueue's addresses in guest memory.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// Most entries of a queue, so that the work of one drain is bounded. Four times what Linux
/// front ends use.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Alignment of the descriptor table, the used ring and the available ring, in bytes
/// (virtio 1.3, section 2.7).
const ALIGNMENTS: [u64; 3] = [16, 4, 2];

/// Sets the addresses of descriptor table, used ring and available ring, and makes the queue
/// ready. Returns false if they are invalid: then the queue must not be served.
#[must_use]
pub fn place(
    queue: &mut Queue,
    places: [GuestAddress; 3],
    event_idx: bool,
    memory: &impl GuestMemory,
) -> bool {
    // Checked before `Queue` does, which would log a peer's invalid address.
    let mut parts = places.iter().zip(ALIGNMENTS);
    if !parts.all(|(place, alignment)| place.0.is_multiple_of(alignment)) {
        return false;
    }
    let [descriptors, used, available] = places;
    let placed = queue
        .try_set_desc_table_address(descriptors)
        .and_then(|()| queue.try_set_used_ring_address(used))
        .and_then(|()| queue.try_set_avail_ring_address(available));
    if placed.is_err() {
        return false;
    }
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    lies_in(queue, memory)
}

/// Returns true if the vring of a ready queue is inside of `memory`. Must be checked again when
/// the memory layout changes.
#[must_use]
pub fn lies_in(queue: &Queue, memory: &impl GuestMemory) -> bool {
    let entries = usize::from(queue.size());
    // Each ring has three 16-bit fields besides its entries.
    let parts = [
        (queue.desc_table(), entries * 16, Permissions::Read),
        (queue.used_ring(), entries * 8 + 6, Permissions::Write),
        (queue.avail_ring(), entries * 2 + 6, Permissions::Read),
    ];
    let inside = |(start, len, access)| memory.check_range(GuestAddress(start), len, access);
    !queue.ready() || parts.into_iter().all(inside)
}
