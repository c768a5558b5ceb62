//! The loop that takes chains off a queue and returns them.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

/// Most chains per call, so that a guest that keeps adding chains cannot starve the
/// device's other queues. Four times the largest vring that Linux sets up for a balloon.
pub const MAX_CHAINS_PER_DRAIN: usize = 1024;

/// Bytes of messages after which a drain ends, so that expensive messages do not block
/// the device. Four of the largest messages: tens of milliseconds of work if they name
/// every second page of 16 GiB. Also more than a full vring of Linux's classic messages.
pub const MAX_BYTES_PER_DRAIN: usize = 4 * balloon_abi::limits::MAX_MESSAGE_BYTES;

/// How a chain was handled.
#[derive(Clone, Copy, Debug)]
pub struct Handled {
    /// Bytes read.
    pub read_bytes: usize,
    /// Bytes written, for the used ring. `None` if the chain is pending and is returned
    /// later.
    pub written_bytes: Option<u32>,
}

/// The outcome of a drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Chains taken, each of them returned or pending.
    pub chains: usize,
    /// The driver must be notified.
    pub notify: bool,
    /// A limit was reached and chains are left: call again.
    pub more: bool,
}

/// Passes available chains, up to the limits, to `handle`, and returns each chain with
/// the length that `handle` reports, unless `handle` keeps it.
///
/// Disables notifications meanwhile. Checks the available ring again after it enables
/// them, because a driver with `EVENT_IDX` does not repeat a notification.
///
/// Does not access a queue that is not ready: its addresses are not valid.
///
/// # Errors
/// The queue is not ready, the vring is invalid, or its memory is gone (an I/O error).
pub fn drain<'m, M: GuestMemory>(
    queue: &mut impl QueueT,
    memory: &'m M,
    handle: impl FnMut(DescriptorChain<&'m M>) -> Handled,
) -> Result<Drained, Error> {
    if !queue.ready() {
        return Err(Error::QueueNotReady);
    }
    drain_ready(queue, memory, handle).map_err(|error| {
        // A vring whose memory is gone is not the guest's fault.
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
        // The last iteration saw a chain, and now there is none: this would loop
        // infinitely. The avail_event field may overlap the available ring's index.
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

/// Returns the next available chain, or `None` if there is none.
///
/// `pop_descriptor_chain` also returns `None` if it cannot read the available ring's
/// entry. The index would then report a chain infinitely, so this is an error here. A head
/// outside of the vring is an error too, because it cannot be returned.
///
/// An index that is too far ahead is detected before `pop_descriptor_chain`, which would
/// log it.
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
