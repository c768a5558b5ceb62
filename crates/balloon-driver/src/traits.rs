//! What the driver needs of a kernel.

use balloon_abi::request::Caches;
use balloon_abi::{Pfn, Vq};

use crate::hold::Hold;
use crate::inbox::{ReceivedRequest, Stop};

/// The device does not answer any more: it was removed, or it broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The kernel's page allocator and the lists that hold the balloon's blocks.
///
/// A block is 2^order pages of the guest's page size. The lists are the only
/// record of which blocks the balloon holds; the driver keeps counts.
pub trait PageAllocator {
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

/// Why the kernel refused: a positive number of `errno.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

/// What the guest's caches hold, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachePages {
    /// Pages of files and block devices; not those of tmpfs, which cannot be
    /// dropped. (Linux: `Cached + Buffers - Shmem` of `/proc/meminfo`.)
    pub page_cache: u64,
    /// All of the kernel's objects (`Slab` of `/proc/meminfo`).
    pub slab: u64,
}

/// A stretch of page numbers that share one lock; may have holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// First page.
    pub start: Pfn,
    /// Page behind the last one.
    pub end: Pfn,
}

/// What one slice of a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Where the next slice goes on.
    pub next: Pfn,
    /// Blocks written to the front of `found`.
    pub found: usize,
    /// How long the zone's lock was held.
    pub lock_ns: u64,
}

/// What carrying out requests needs of the kernel. Counts are in balloon pages.
pub trait RequestKernel {
    /// The blocks of the hold.
    type Blocks: HeldBlocks;

    /// What the caches hold now.
    fn cache_pages(&mut self) -> CachePages;

    /// Drops what is clean in one cache. May take seconds.
    fn drop_caches(&mut self, cache: Caches) -> Result<(), Errno>;

    /// Pages on the free lists.
    fn free_pages(&mut self) -> u64;

    /// Pages that the guest has.
    fn total_pages(&mut self) -> u64;

    /// Free pages below which the kernel begins to reclaim.
    fn reserved_pages(&mut self) -> u64;

    /// Zone number `number`, perhaps an empty one; `None` behind the last.
    fn zone(&mut self, number: u32) -> Option<Zone>;

    /// False where no zone has a free block of `order` now; need not be exact.
    fn has_free(&mut self, order: u32) -> bool;

    /// Looks under the zone's lock at up to `visits` pages, from the first one
    /// at or behind `from` where a block of `order` can begin, and writes the
    /// free blocks of exactly that order to `found`. Passes over free blocks of
    /// a higher order. Ends early when `found` is full.
    fn scan(&mut self, zone: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice;

    /// Does something to the hold under its lock.
    fn with_hold<R>(&mut self, act: impl FnOnce(&mut Hold, &mut Self::Blocks) -> R) -> R;
}

/// The lists that hold a hold's blocks.
pub trait HeldBlocks {
    /// Takes a free block of `order` and puts it on the list of those that were
    /// not named yet. Must neither reclaim nor wait. False: there is none now.
    fn take(&mut self, order: u32) -> bool;

    /// Moves a block of `order` to the list of those that were named. `None`:
    /// all were.
    fn name(&mut self, order: u32) -> Option<Pfn>;

    /// Frees all blocks, named or not.
    fn free_all(&mut self);
}

/// The request queue, its inbox and a clock.
pub trait RequestQueue {
    /// Ends the running request and takes the next one from the inbox.
    fn begin_next(&mut self) -> Option<ReceivedRequest>;

    /// Whether the running request may go on.
    fn stopped(&mut self) -> Result<(), Stop>;

    /// An answer's buffer that the host does not hold, at least
    /// [`MIN_ANSWER_BYTES`](crate::answer::MIN_ANSWER_BYTES) long. Waits where all
    /// are with the host, until the request is stopped; for its `last` answer a
    /// cancel is no reason to stop. The same buffer, with its contents, is
    /// returned until it is posted.
    fn buffer(&mut self, last: bool) -> Result<&mut [u8], Stop>;

    /// Puts the first `len` bytes of the current buffer on the queue, an answer
    /// to `id`, and notifies the host.
    fn post(&mut self, id: u32, len: usize) -> Result<(), Stop>;

    /// Waits until the host has returned all answers; a cancel is no reason to
    /// stop.
    fn finish(&mut self) -> Result<(), Stop>;

    /// Nanoseconds since any fixed moment.
    fn now_ns(&mut self) -> u64;
}
