//! Chains that the device keeps until it has data for them.

use std::collections::VecDeque;

use virtio_queue::{Error, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

/// A chain that was taken off a queue and not returned yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingChain {
    /// Its first descriptor.
    pub(crate) head: u16,
    /// Address of the writable buffer, not checked against guest memory.
    pub(crate) buffer: Option<GuestAddress>,
}

/// Why a chain cannot be pending. Both are the guest's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotPending {
    /// A chain with this head is pending already.
    Repeated,
    /// The limit is reached.
    TooMany,
}

/// The pending chains of one queue, oldest first.
///
/// They belong to one vring. Before it stops they are [returned](Self::return_unused). If
/// it is gone without being stopped they are [forgotten](Self::forget), because its memory
/// may have another use by now.
#[derive(Debug, Default)]
pub(crate) struct PendingChains(VecDeque<PendingChain>);

impl PendingChains {
    /// Keeps `chain` unless `limit` chains are pending. The limit is never more than the
    /// vring's entries: a correct driver cannot have more chains in flight.
    pub(crate) fn keep(&mut self, chain: PendingChain, limit: usize) -> Result<(), NotPending> {
        if self.0.iter().any(|pending| pending.head == chain.head) {
            return Err(NotPending::Repeated);
        }
        if self.0.len() >= limit {
            return Err(NotPending::TooMany);
        }
        self.0.push_back(chain);
        Ok(())
    }

    /// Takes the oldest chain; the caller returns it to the driver.
    pub(crate) fn take(&mut self) -> Option<PendingChain> {
        self.0.pop_front()
    }

    /// Returns every chain to the driver with length 0. Returns true if the driver must be
    /// notified.
    pub(crate) fn return_unused<M: GuestMemory>(
        &mut self,
        queue: &mut impl QueueT,
        memory: &M,
    ) -> Result<bool, Error> {
        if self.0.is_empty() || !queue.ready() {
            self.forget();
            return Ok(false);
        }
        while let Some(chain) = self.take() {
            queue.add_used(memory, chain.head, 0)?;
        }
        queue.needs_notification(memory)
    }

    /// Drops all chains, when their vring is gone.
    pub(crate) fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use guest_ring::{GuestRing, Used};
    use vm_memory::GuestMemoryMmap;

    fn chain(head: u16) -> PendingChain {
        PendingChain { head, buffer: None }
    }

    #[test]
    fn a_head_is_kept_once_and_no_more_than_the_limit() {
        let mut pending = PendingChains::default();
        assert_eq!(pending.keep(chain(3), 2), Ok(()));
        assert_eq!(pending.keep(chain(3), 2), Err(NotPending::Repeated));
        assert_eq!(pending.keep(chain(1), 2), Ok(()));
        assert_eq!(pending.keep(chain(2), 2), Err(NotPending::TooMany));
        assert_eq!(
            [pending.take(), pending.take(), pending.take()],
            [Some(chain(3)), Some(chain(1)), None]
        );
    }

    #[test]
    fn chains_are_returned_unused_with_length_zero() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut ring = GuestRing::new(0x1000, 4);
        let mut queue = ring.queue();
        let mut pending = PendingChains::default();
        assert!(!pending.return_unused(&mut queue, &memory).unwrap(), "nothing returned");
        for head in [2, 0] {
            pending.keep(chain(head), 4).unwrap();
        }
        assert!(pending.return_unused(&mut queue, &memory).unwrap());
        for head in [2, 0] {
            assert_eq!(ring.take_used(&memory), Some(Used { head, written_bytes: 0 }));
        }
        assert_eq!(pending.take(), None);
    }

    #[test]
    fn a_stopped_vring_is_not_accessed() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut ring = GuestRing::new(0x1000, 4);
        let mut queue = ring.queue();
        let mut pending = PendingChains::default();
        pending.keep(chain(0), 4).unwrap();
        queue.set_ready(false);
        assert!(!pending.return_unused(&mut queue, &memory).unwrap());
        assert_eq!((ring.take_used(&memory), pending.take()), (None, None));
    }
}
