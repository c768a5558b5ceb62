//! Chains that the device keeps until it has something to say.

use std::collections::VecDeque;

use virtio_queue::{Error, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

/// A chain that was taken off a queue and is not returned yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingChain {
    /// Its first descriptor.
    pub(crate) head: u16,
    /// Where the device may write, by the guest's word.
    pub(crate) room: Option<GuestAddress>,
}

/// Why a chain is not kept. Both are the guest's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotPending {
    /// A chain with this head is kept already.
    Repeated,
    /// As many are kept as may be.
    TooMany,
}

/// The kept chains of one queue, oldest first.
///
/// They belong to the ring that they came from: before that stops they are
/// [given back](Self::return_unused), and where it is gone without a word they are
/// [forgotten](Self::forget), because its memory may be anything by now.
#[derive(Debug, Default)]
pub(crate) struct PendingChains(VecDeque<PendingChain>);

impl PendingChains {
    /// Keeps `chain` unless there are `limit` already, which is never more than
    /// the ring's entries: an honest driver cannot have more on its way.
    pub(crate) fn keep(&mut self, chain: PendingChain, limit: usize) -> Result<(), NotPending> {
        if self.0.iter().any(|kept| kept.head == chain.head) {
            return Err(NotPending::Repeated);
        }
        if self.0.len() >= limit {
            return Err(NotPending::TooMany);
        }
        self.0.push_back(chain);
        Ok(())
    }

    /// Takes the oldest; the caller returns it.
    pub(crate) fn take(&mut self) -> Option<PendingChain> {
        self.0.pop_front()
    }

    /// Returns every chain with a length of 0, which says that nothing is in
    /// it. True where the driver wants to be notified.
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

    /// The ring is gone, and its chains with it.
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
        PendingChain { head, room: None }
    }

    #[test]
    fn a_head_is_kept_once_and_no_more_than_the_limit() {
        let mut kept = PendingChains::default();
        assert_eq!(kept.keep(chain(3), 2), Ok(()));
        assert_eq!(kept.keep(chain(3), 2), Err(NotPending::Repeated));
        assert_eq!(kept.keep(chain(1), 2), Ok(()));
        assert_eq!(kept.keep(chain(2), 2), Err(NotPending::TooMany));
        assert_eq!([kept.take(), kept.take(), kept.take()], [Some(chain(3)), Some(chain(1)), None]);
    }

    #[test]
    fn what_is_given_back_says_that_it_is_empty() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut ring = GuestRing::new(0x1000, 4);
        let mut queue = ring.queue();
        let mut kept = PendingChains::default();
        assert!(!kept.return_unused(&mut queue, &memory).unwrap(), "nothing to tell of");
        for head in [2, 0] {
            kept.keep(chain(head), 4).unwrap();
        }
        assert!(kept.return_unused(&mut queue, &memory).unwrap());
        for head in [2, 0] {
            assert_eq!(ring.take_used(&memory), Some(Used { head, written_bytes: 0 }));
        }
        assert_eq!(kept.take(), None);
    }

    #[test]
    fn a_ring_that_stopped_is_not_touched() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut ring = GuestRing::new(0x1000, 4);
        let mut queue = ring.queue();
        let mut kept = PendingChains::default();
        kept.keep(chain(0), 4).unwrap();
        queue.set_ready(false);
        assert!(!kept.return_unused(&mut queue, &memory).unwrap());
        assert_eq!((ring.take_used(&memory), kept.take()), (None, None));
    }
}
