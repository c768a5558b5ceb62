//! A disk without a machine, for tests and fuzz targets that act as a hostile driver.

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::block::{Block, DiskFile, DiskOptions};
use crate::error::Error;
use crate::memory::Ram;
use crate::mmio::{Device, Served};

/// Passes after which a vring counts as endless: the device's own writes may add chains to it. A
/// machine serves its other devices between two passes.
const MAX_PASSES: usize = 100;

/// A disk, its virtqueue, and the guest memory.
pub struct Disk {
    block: Block,
    memory: Ram,
    queue: Queue,
    notify_fd: EventFd,
}

impl Disk {
    /// A disk with guest memory at these addresses, of this many bytes each. `unit_bytes` is the
    /// host's unit of discard and write-zeroes.
    ///
    /// # Errors
    /// The file does not exist, or the host cannot allocate the memory or start a thread.
    pub fn new(
        options: &DiskOptions,
        ranges: &[(u64, usize)],
        queue: Queue,
        unit_bytes: u64,
    ) -> Result<Self, Error> {
        let ranges: Vec<_> = ranges.iter().map(|(at, len)| (GuestAddress(*at), *len)).collect();
        let memory = Ram::from_ranges(&ranges).map_err(Error::memory("mapping"))?;
        let file = Arc::new(DiskFile::open(options)?.in_units(unit_bytes));
        let mut block = Block::new(&file, 0, memory.clone())?;
        let notify_fd = EventFd::new(0).map_err(Error::host("eventfd"))?;
        block.set_notify_fds(&[notify_fd.try_clone().map_err(Error::host("dup"))?]);
        Ok(Self { block, memory, queue, notify_fd })
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &Ram {
        &self.memory
    }

    /// The offered features.
    pub fn features(&self) -> u64 {
        self.block.features()
    }

    /// Resets the device for a driver with another virtqueue.
    pub fn start(&mut self, features: u64, queue: Queue) {
        self.block.reset(features);
        self.queue = queue;
    }

    /// The virtqueue as the device sees it.
    pub const fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Serves the virtqueue once, as after a notification; false if the vring is invalid.
    pub fn serve_once(&mut self) -> bool {
        self.block.serve(0, &self.memory, &mut self.queue) != Served::Broken
    }

    /// Serves the virtqueue until it is empty; false if the vring is invalid or endless.
    pub fn serve(&mut self) -> bool {
        for _ in 0..MAX_PASSES {
            match self.block.serve(0, &self.memory, &mut self.queue) {
                Served::Broken => return false,
                Served::Done { more: true, .. } => {}
                Served::Done { .. } if self.block.is_idle() => return true,
                // Written when a request is done.
                Served::Done { .. } => drop(self.notify_fd.read()),
            }
        }
        false
    }

    /// Waits until a request is in progress.
    pub fn until_busy(&self) {
        while !self.block.is_busy() {
            std::thread::yield_now();
        }
    }

    /// Waits until no request is in progress, including those before the last [start](Self::start).
    pub fn until_idle(&self) {
        while self.block.is_busy() {
            std::thread::yield_now();
        }
    }

    /// Pauses the disk while requests are in progress; false if the vring is invalid.
    pub fn pause(&mut self) -> bool {
        let broken = self.block.return_unused(0, &self.memory, &mut self.queue) == Served::Broken;
        assert!(self.block.is_idle());
        !broken
    }
}
