//! The one loop that takes chains off a queue and returns them.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

/// Chains that one call serves at most, so that a guest which keeps adding
/// cannot keep the device from its other queues: four times the largest ring
/// that Linux sets up for a balloon.
pub const MAX_CHAINS_PER_DRAIN: usize = 1024;

/// Bytes of messages after which a drain ends, so that messages which cost much
/// do not keep the device from all else: four of the largest, some tens of
/// milliseconds of work where every second page of 16 GiB is named, and more than
/// a whole ring of Linux's classic messages.
pub const MAX_BYTES_PER_DRAIN: usize = 4 * balloon_abi::limits::MAX_MESSAGE_BYTES;

/// What was done with a chain.
#[derive(Clone, Copy, Debug)]
pub struct Handled {
    /// Bytes that were read.
    pub read_bytes: usize,
    /// Bytes that were written, for the used ring; `None` where the chain is kept, to be
    /// returned later.
    pub written_bytes: Option<u32>,
}

/// What a drain did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Chains taken, and returned unless they are kept.
    pub chains: usize,
    /// The driver wants to be notified.
    pub notify: bool,
    /// The limit was reached with chains left: call again.
    pub more: bool,
}

/// Hands available chains, up to a bound, to `handle` and returns each with the
/// bytes that `handle` says it wrote. Every chain that was taken is returned, or
/// kept because `handle` said so.
///
/// Notifications are off meanwhile; after they are on again the ring is looked
/// at once more, since a driver with EVENT_IDX does not repeat a kick.
///
/// A queue that is not ready is not touched: its addresses are no addresses yet.
///
/// # Errors
/// The queue is not ready, the ring makes no sense, or its memory is gone, which is an I/O
/// error.
pub fn drain<'m, M: GuestMemory>(
    queue: &mut impl QueueT,
    memory: &'m M,
    handle: impl FnMut(DescriptorChain<&'m M>) -> Handled,
) -> Result<Drained, Error> {
    if !queue.ready() {
        return Err(Error::QueueNotReady);
    }
    drain_ready(queue, memory, handle).map_err(|error| {
        // What was read of a ring whose memory is gone is no fault of the guest.
        match memory.read_obj::<u16>(GuestAddress(queue.avail_ring())) {
            Err(gone @ GuestMemoryError::IOError(_)) => Error::GuestMemory(gone),
            _ => error,
        }
    })
}

fn drain_ready<'m, M: GuestMemory>(
    queue: &mut impl QueueT,
    memory: &'m M,
    mut handle: impl FnMut(DescriptorChain<&'m M>) -> Handled,
) -> Result<Drained, Error> {
    let mut drained = Drained::default();
    let mut bytes = 0;
    let mut returned = false;
    loop {
        let before = drained.chains;
        queue.disable_notification(memory)?;
        while drained.chains < MAX_CHAINS_PER_DRAIN && bytes < MAX_BYTES_PER_DRAIN {
            let Some(chain) = next_chain(queue, memory)? else { break };
            let head = chain.head_index();
            let handled = handle(chain);
            if let Some(written_bytes) = handled.written_bytes {
                queue.add_used(memory, head, written_bytes)?;
                returned = true;
            }
            drained.chains += 1;
            bytes += handled.read_bytes;
        }
        // The last round saw a chain that is gone now, so this would never end:
        // perhaps the notifications' own words lie upon the ring's index.
        if drained.more && drained.chains == before {
            return Err(Error::InvalidAvailRingIndex);
        }
        drained.more = queue.enable_notification(memory)?;
        if !drained.more || drained.chains >= MAX_CHAINS_PER_DRAIN || bytes >= MAX_BYTES_PER_DRAIN {
            break;
        }
    }
    drained.notify = returned && queue.needs_notification(memory)?;
    Ok(drained)
}

/// The next available chain, or `None` where there is none.
///
/// The queue says `None` as well where it cannot read the ring's entry, and
/// the index would say for ever that there is one: that is an error here. So is
/// a head that the ring does not have, since it could not be returned.
///
/// An index that is impossibly far ahead is found before the queue is asked,
/// which would log it.
fn next_chain<'m, M: GuestMemory>(
    queue: &mut impl QueueT,
    memory: &'m M,
) -> Result<Option<DescriptorChain<&'m M>>, Error> {
    let size = queue.size();
    let ahead = queue.avail_idx(memory, Ordering::Acquire)?.0.wrapping_sub(queue.next_avail());
    if ahead > size {
        return Err(Error::InvalidAvailRingIndex);
    }
    match queue.pop_descriptor_chain(memory) {
        Some(chain) if chain.head_index() >= size => Err(Error::InvalidDescriptorIndex),
        None if ahead > 0 => Err(Error::InvalidAvailRingIndex),
        chain => Ok(chain),
    }
}
