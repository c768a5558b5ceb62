//! The driver's interfaces to the kernel.

use balloon_abi::request::Caches;
use balloon_abi::{Pfn, Vq};

use crate::hold::Hold;
use crate::inbox::{ReceivedRequest, Stop};

/// The device was removed or is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The kernel's page allocator and the lists that hold the balloon's blocks.
///
/// A block is 2^order pages of the guest's page size. Only the lists record which blocks are in
/// the balloon; the driver keeps counts.
pub trait PageAllocator {
    /// Allocates a free block and adds it to the tail of the balloon's list for its order. Must
    /// not wait for memory above order 0, and must never invoke the OOM killer. Returns `None`
    /// if there is no such block now.
    fn allocate(&mut self, order: u32) -> Option<Pfn>;

    /// Moves the block at the tail of the list for `order` to the list of withdrawn blocks.
    /// Returns `None` if the list is empty.
    fn withdraw(&mut self, order: u32) -> Option<Pfn>;

    /// Frees all withdrawn blocks, each as a unit.
    fn free_withdrawn(&mut self);
}

/// The queues and the configuration space of the device.
pub trait Queues {
    /// Returns a message buffer that is not on the queue, of at least
    /// [`MIN_BUFFER_BYTES`](crate::message::MIN_BUFFER_BYTES). If the host has all of them,
    /// notifies it and waits. Returns the same buffer until it is posted.
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

/// An error of the kernel: a positive number of `errno.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

/// Sizes of the guest's caches, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachePages {
    /// Pages of files and block devices, without tmpfs, which cannot be dropped (Linux:
    /// `Cached + Buffers - Shmem` of `/proc/meminfo`).
    pub page_cache: u64,
    /// Kernel objects (`Slab` of `/proc/meminfo`).
    pub slab: u64,
}

/// A range of page numbers with a common lock; may have holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// First page.
    pub start: Pfn,
    /// The page after the last one.
    pub end: Pfn,
}

/// The result of scanning one slice of a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// First page of the next slice.
    pub next: Pfn,
    /// Number of blocks written to `found`.
    pub found: usize,
    /// Time for which the zone's lock was held.
    pub lock_ns: u64,
}

/// The kernel's side of executing requests. Counts are in balloon pages.
pub trait RequestKernel {
    /// The blocks of the hold.
    type Blocks: HeldBlocks;

    /// Returns the current sizes of the caches.
    fn cache_pages(&mut self) -> CachePages;

    /// Drops the clean part of one cache. May take seconds.
    fn drop_caches(&mut self, cache: Caches) -> Result<(), Errno>;

    /// Returns the pages on the free lists.
    fn free_pages(&mut self) -> u64;

    /// Returns the guest's pages.
    fn total_pages(&mut self) -> u64;

    /// Returns the number of free pages below which the kernel starts to reclaim.
    fn reserved_pages(&mut self) -> u64;

    /// Returns zone `number`, which may be empty; `None` after the last.
    fn zone(&mut self, number: u32) -> Option<Zone>;

    /// Returns false if no zone has a free block of `order` now; need not be exact.
    fn has_free(&mut self, order: u32) -> bool;

    /// Visits up to `visits` pages under the zone's lock, from the first one at or after
    /// `from` at which a block of `order` can start. Writes the free blocks of exactly that order
    /// to `found`. Skips free blocks of a higher order. Ends early when `found` is full.
    fn scan(&mut self, zone: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice;

    /// Calls `act` with the hold under its lock.
    fn with_hold<R>(&mut self, act: impl FnOnce(&mut Hold, &mut Self::Blocks) -> R) -> R;
}

/// The lists of a hold's blocks.
pub trait HeldBlocks {
    /// Allocates a free block of `order` and adds it to the list of blocks that are not named
    /// yet. Must neither reclaim nor wait. Returns false if there is none now.
    fn take(&mut self, order: u32) -> bool;

    /// Moves a block of `order` to the list of named blocks. Returns `None` if all are named.
    fn name(&mut self, order: u32) -> Option<Pfn>;

    /// Frees all blocks, named or not.
    fn free_all(&mut self);
}

/// The request queue, its inbox and a clock.
pub trait RequestQueue {
    /// Ends the running request and starts the next one in the inbox.
    fn begin_next(&mut self) -> Option<ReceivedRequest>;

    /// Returns an error if the running request must stop.
    fn stopped(&mut self) -> Result<(), Stop>;

    /// Returns an answer's buffer that is not on the queue, of at least
    /// [`MIN_ANSWER_BYTES`](crate::answer::MIN_ANSWER_BYTES). If the host has all of them, waits
    /// until one is returned or the request must stop. For the `last` answer a cancel does not
    /// end the wait. Returns the same buffer, with its contents, until it is posted.
    fn buffer(&mut self, last: bool) -> Result<&mut [u8], Stop>;

    /// Puts the first `len` bytes of the current buffer on the queue, as an answer to `id`, and
    /// notifies the host.
    fn post(&mut self, id: u32, len: usize) -> Result<(), Stop>;

    /// Waits until the host has returned all answers. A cancel does not end the wait.
    fn finish(&mut self) -> Result<(), Stop>;

    /// Returns nanoseconds since a fixed moment.
    fn now_ns(&mut self) -> u64;
}
