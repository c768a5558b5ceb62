//! A disk: a virtio block device (virtio 1.3, section 5.2) on a raw file.
//!
//! The device loop takes requests from the vring. The disk's I/O thread executes them and notifies
//! the loop, which then returns their chains.

mod file;
mod identity;
mod limits;
mod lock;
mod permit;
mod request;
mod work;
mod worker;

pub use file::DiskOptions;
#[cfg(test)]
pub(crate) use file::no_process_starts;
pub(crate) use file::{DiskFile, DiskMismatch, DiskShape, GuestDisk};
pub(crate) use identity::DiskIdentity;
pub(crate) use limits::DiskLimits;

use std::sync::Arc;
use std::time::Duration;

use balloon_device::{Drained, Handled, drain};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::memory::Ram;
use crate::mmio::{Device, Served};
use request::{Request, SEG_MAX, SIZE_MAX};
use work::{DISCARD, Executor, ID_BYTES, WRITE_ZEROES};
use worker::{Done, Job, Worker};

/// Maximum number of disks: with the balloon they use all interrupts above the PC's own.
pub const MAX_DISKS: usize = 7;

/// Bytes of the configuration space up to the last field that is offered.
const CONFIG_BYTES: usize = 60;

/// Its fields (virtio 1.3, 5.2.4).
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SIZE_MAX: usize = 8;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const ALIGNMENT_OFFSET: usize = 25;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const OPT_IO_SIZE: usize = 28;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// One disk of a guest.
pub(crate) struct Block {
    file: Arc<DiskFile>,
    worker: Worker,
    /// Chains that the worker has. With an honest driver at most the number of vring entries.
    in_flight: usize,
}

impl Block {
    /// # Errors
    /// The host cannot start a thread.
    pub(crate) fn new(file: &Arc<DiskFile>, number: usize, memory: Ram) -> Result<Self, Error> {
        let name = format!("disk{number}");
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(format!("aerostat-{name}").bytes()).for_each(|(to, from)| *to = from);
        let worker = Worker::start(Executor::new(memory, id), Arc::clone(file), &name)?;
        Ok(Self { file: Arc::clone(file), worker, in_flight: 0 })
    }

    /// No chain is in flight.
    #[cfg(feature = "raw")]
    pub(crate) const fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// A request is being executed.
    #[cfg(feature = "raw")]
    pub(crate) fn is_busy(&self) -> bool {
        self.worker.is_busy()
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            space.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(field::CAPACITY, &self.file.shape().sectors.to_le_bytes());
        let limits = self.file.limits();
        for (at, value) in [
            (field::SIZE_MAX, SIZE_MAX),
            (field::SEG_MAX, SEG_MAX),
            (field::BLK_SIZE, limits.block_bytes),
            (field::OPT_IO_SIZE, limits.opt_io_blocks),
            (field::MAX_DISCARD_SECTORS, limits.max_discard_sectors()),
            (field::MAX_DISCARD_SEG, DISCARD.ranges),
            (field::DISCARD_ALIGNMENT, limits.discard_sectors),
            (field::MAX_WRITE_ZEROES_SECTORS, WRITE_ZEROES.sectors),
            (field::MAX_WRITE_ZEROES_SEG, WRITE_ZEROES.ranges),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(field::PHYSICAL_BLOCK_EXP, &[limits.physical_exp]);
        put(field::ALIGNMENT_OFFSET, &[limits.alignment_offset]);
        put(field::MIN_IO_SIZE, &limits.min_io_blocks.to_le_bytes());
        put(field::NUM_QUEUES, &1u16.to_le_bytes());
        put(field::WRITE_ZEROES_MAY_UNMAP, &[1]);
        space
    }

    /// Adds completed chains to the used ring.
    fn complete(
        &mut self,
        done: &[Done],
        memory: &Ram,
        queue: &mut Queue,
    ) -> Result<(), QueueError> {
        for Done { head, written_bytes } in done {
            queue.add_used(memory, *head, *written_bytes)?;
        }
        self.in_flight = self.in_flight.saturating_sub(done.len());
        Ok(())
    }

    /// Returns completed chains and takes new ones.
    fn serve_queue(&mut self, memory: &Ram, queue: &mut Queue) -> Result<Drained, QueueError> {
        let done = self.worker.take_done();
        self.complete(&done, memory, queue)?;
        let most = usize::from(queue.size());
        let mut too_many = false;
        let drained = drain(queue, memory, |chain| {
            too_many |= self.in_flight >= most;
            if too_many {
                return Handled { read_bytes: 0, written_bytes: Some(0) };
            }
            self.in_flight += 1;
            // Invalid requests also go to the worker: chains return in the order of the vring.
            let head = chain.head_index();
            self.worker.push(Job { head, request: Request::of(chain, memory) });
            Handled { read_bytes: 0, written_bytes: None }
        })?;
        if too_many {
            // The driver made a chain available that the device already has.
            return Err(QueueError::InvalidAvailRingIndex);
        }
        let notify = drained.notify || (!done.is_empty() && queue.needs_notification(memory)?);
        Ok(Drained { notify, ..drained })
    }

    fn broken(&mut self, error: &QueueError) -> Served {
        self.drop_queue(0);
        tracing::debug!(%error, "guest: the virtqueue of a disk is invalid");
        Served::Broken
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if self.file.shape().read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> usize {
        1
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) {
        let space = self.config();
        let mut bytes = space.iter().skip(offset as usize);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }

    /// Read-only: the writeback field needs a feature that is not offered.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn reset(&mut self, features: u64) {
        self.drop_queue(0);
        self.restore_features(features);
    }

    fn restore_features(&mut self, features: u64) {
        // virtio 1.3, 5.2.6.2: without the flush feature, writes must be durable before they
        // complete.
        self.worker.set_writes_through(features & 1 << VIRTIO_BLK_F_FLUSH == 0);
    }

    fn set_notify_fds(&mut self, fds: &[EventFd]) {
        match fds.first().map(EventFd::try_clone) {
            Some(Ok(notify_fd)) => self.worker.set_notify_fd(notify_fd),
            _ => tracing::error!("host: a disk cannot report completed requests"),
        }
    }

    fn count_exits(&mut self, _count: u64) {}

    fn serve(&mut self, _index: usize, memory: &Ram, queue: &mut Queue) -> Served {
        match self.serve_queue(memory, queue) {
            Ok(Drained { notify, more, .. }) => Served::Done { notify, more },
            Err(error) => self.broken(&error),
        }
    }

    fn until_due(&self) -> Option<Duration> {
        None
    }

    fn due(&mut self, _woken: bool) -> Vec<usize> {
        Vec::new()
    }

    fn quiesce(&mut self) -> bool {
        self.worker.quiesce()
    }

    fn cancel_quiesce(&mut self) -> bool {
        self.worker.cancel_quiesce()
    }

    fn unfinished(&self) -> usize {
        self.in_flight + usize::from(self.worker.has_abandoned())
    }

    /// Finishes only the current piece of the request in progress. The other chains become
    /// available again: they are the last that were taken, and an honest driver does not overwrite
    /// the entries of a chain that was not returned.
    fn return_unused(&mut self, _index: usize, memory: &Ram, queue: &mut Queue) -> Served {
        let (done, left) = self.worker.stop();
        let completed = self.complete(&done, memory, queue);
        // At most the number of vring entries.
        let left = u16::try_from(left).unwrap_or(u16::MAX);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        self.in_flight = 0;
        let notify =
            completed.and_then(|()| Ok(!done.is_empty() && queue.needs_notification(memory)?));
        match notify {
            Ok(notify) => Served::Done { notify, more: false },
            Err(error) => self.broken(&error),
        }
    }

    /// Available chains stay in the vring.
    fn serves_before_pause(&self) -> bool {
        false
    }

    /// Does not wait for the disk: called by a vCPU thread or the device loop.
    fn drop_queue(&mut self, _index: usize) {
        self.worker.abandon();
        self.in_flight = 0;
    }

    fn suspend(&mut self) {}
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
