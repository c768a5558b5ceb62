//! What the driver needs of a kernel.

use balloon_abi::{Pfn, Vq};

/// The device does not answer any more: it was removed, or it broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The kernel's page allocator and the lists that hold the balloon's blocks.
///
/// A block is 2^order pages of the guest's page size. The lists are the only
/// record of which blocks the balloon holds; the driver keeps counts.
pub trait Memory {
    /// Takes a free block and puts it at the tail of the balloon's list for its
    /// order. Must not wait for memory above order 0, and must never invoke the
    /// OOM killer. `None`: there is no such block now.
    fn allocate(&mut self, order: u32) -> Option<Pfn>;

    /// Moves the block at the tail of the list for `order` to the list of
    /// leaving blocks. `None`: the list is empty.
    fn withdraw(&mut self, order: u32) -> Option<Pfn>;

    /// Frees all leaving blocks, each whole.
    fn free_withdrawn(&mut self);
}

/// The queues and the configuration space of the device.
pub trait Queues {
    /// A message buffer that the host does not hold, at least
    /// [`MIN_BUFFER_BYTES`](crate::message::MIN_BUFFER_BYTES) long. Notifies and
    /// waits where all are with the host. The same buffer is returned until it
    /// is posted.
    fn buffer(&mut self, vq: Vq) -> Result<&mut [u8], Gone>;

    /// Puts the first `len` bytes of the current buffer on the queue. Need not
    /// notify before [`tell_host`](Self::tell_host).
    fn post(&mut self, vq: Vq, len: usize) -> Result<(), Gone>;

    /// Notifies the host and waits until it has returned every posted message.
    fn tell_host(&mut self, vq: Vq) -> Result<(), Gone>;

    /// Reads `num_pages` of the configuration space.
    fn num_pages(&mut self) -> u32;

    /// Writes `actual` of the configuration space.
    fn set_actual(&mut self, pages: u32);
}
