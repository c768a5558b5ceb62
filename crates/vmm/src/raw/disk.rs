//! A disk without a machine, for whoever plays a hostile driver.

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::block::{Block, DiskFile, DiskOptions};
use crate::error::Error;
use crate::memory::Ram;
use crate::mmio::{Device, Served};

/// How often a ring is served before it counts as one that adds to itself: the device may write
/// what it then takes for the driver's words. A machine looks at its other devices in between.
const MAX_PASSES: usize = 100;

/// A disk, its ring, and the memory that both lie in.
pub struct Disk {
    block: Block,
    memory: Ram,
    queue: Queue,
    bell: EventFd,
}

impl Disk {
    /// A disk in memory at these addresses, of so many bytes each. The host gives back and clears
    /// only whole units of its file.
    ///
    /// # Errors
    /// There is no such file, or the host has no such memory or no thread.
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
        let bell = EventFd::new(0).map_err(Error::host("eventfd"))?;
        block.set_kicks(&[bell.try_clone().map_err(Error::host("dup"))?]);
        Ok(Self { block, memory, queue, bell })
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &Ram {
        &self.memory
    }

    /// What the device offers.
    pub fn features(&self) -> u64 {
        self.block.features()
    }

    /// A driver starts anew, with another ring.
    pub fn start(&mut self, features: u64, queue: Queue) {
        self.block.reset(features);
        self.queue = queue;
    }

    /// The ring as the device sees it.
    pub const fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Serves the ring once, as after a notification; false where it makes no sense.
    pub fn serve_once(&mut self) -> bool {
        self.block.serve(0, &self.memory, &mut self.queue) != Served::Broken
    }

    /// Serves the ring until nothing of it is left to do; false where it makes no sense.
    pub fn serve(&mut self) -> bool {
        for _ in 0..MAX_PASSES {
            match self.block.serve(0, &self.memory, &mut self.queue) {
                Served::Broken => return false,
                Served::Done { more: true, .. } => {}
                Served::Done { .. } if self.block.is_idle() => return true,
                // Rung when something is done.
                Served::Done { .. } => drop(self.bell.read()),
            }
        }
        false
    }

    /// Waits until a request is being carried out.
    pub fn until_busy(&self) {
        while !self.block.is_busy() {
            std::thread::yield_now();
        }
    }

    /// Waits until none is, also none of before the newest [start](Self::start).
    pub fn until_idle(&self) {
        while self.block.is_busy() {
            std::thread::yield_now();
        }
    }

    /// The guest stands still while the disk is at work; false where the ring makes no sense.
    pub fn pause(&mut self) -> bool {
        let broken = self.block.return_unused(0, &self.memory, &mut self.queue) == Served::Broken;
        assert!(self.block.is_idle());
        !broken
    }
}
