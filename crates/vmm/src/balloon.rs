//! The balloon on a virtio-mmio transport. The device itself is in `balloon-device`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use balloon_abi::config::CONFIG_BYTES;
use balloon_abi::{Features, QueueLayout, Vq};
use balloon_device::QueueError;
use balloon_host::{Shared, StatsClock};
use virtio_queue::Queue;

use crate::memory::Ram;
use crate::mmio::{Device, Served};

/// The virtio device type of a balloon (virtio 1.3, 5.5.1).
const ID: u32 = 5;

/// One guest's balloon.
pub(crate) struct VirtioBalloon {
    shared: Arc<Shared>,
    stats_clock: StatsClock,
    /// Statistics are due.
    stats_due: bool,
}

impl VirtioBalloon {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, stats_clock: StatsClock::default(), stats_due: false }
    }

    fn broken(&self, vq: Vq, error: &QueueError) -> Served {
        self.shared.device().forget_pending(vq);
        if self.shared.may_log() {
            tracing::warn!(%error, "virtqueue stopped");
        }
        Served::Broken
    }
}

impl Device for VirtioBalloon {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        self.shared.device().offered().0
    }

    fn queues(&self) -> usize {
        QueueLayout::MAX_QUEUES
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) {
        let space = self.shared.device().read_config(Instant::now()).to_bytes();
        data.fill(0);
        let from = (offset as usize).min(CONFIG_BYTES);
        for (byte, value) in data.iter_mut().zip(&space[from..]) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let outcome = self.shared.device().write_config(offset, data, Instant::now());
        if let Err(fault) = outcome {
            tracing::debug!(%fault, offset, "config write refused");
        }
        self.shared.changed();
    }

    fn reset(&mut self, features: u64) {
        self.shared.reset(Features(features));
        self.shared.changed();
    }

    fn count_exits(&mut self, count: u64) {
        self.shared.count_exits(count);
    }

    fn count_notifications(&mut self, count: u64) {
        self.shared.count_kicks(count);
    }

    fn serve(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served {
        let mut device = self.shared.device();
        let Some(vq) = device.queues().vq(index) else {
            return Served::Done { notify: false, more: false };
        };
        let requests_stats = vq == Vq::Stats && std::mem::take(&mut self.stats_due);
        let outcome = if requests_stats {
            device.request_stats(memory, queue).map(|notify| (notify, false))
        } else {
            device.process_queue(vq, memory, queue).map(|drained| (drained.notify, drained.more))
        };
        drop(device);
        self.shared.changed();
        match outcome {
            Ok((notify, more)) => Served::Done { notify, more },
            Err(error) => self.broken(vq, &error),
        }
    }

    fn until_due(&self) -> Option<Duration> {
        let stats = self.stats_clock.left(self.shared.stats_interval(), Instant::now());
        [self.shared.until_deadline(), stats].into_iter().flatten().min()
    }

    fn due(&mut self, woken: bool) -> Vec<usize> {
        let interval = self.shared.stats_interval();
        self.stats_due |= self.stats_clock.is_due(interval, Instant::now());
        let expired = self.shared.expire_requests();
        let device = self.shared.device();
        let queues = device.queues();
        let stats = queues.index(Vq::Stats).filter(|_| self.stats_due);
        // A stopped request queue is served again only after a notification.
        let serves_requests = (woken || expired) && !device.requests().is_stopped();
        let requests = queues.index(Vq::Request).filter(|_| serves_requests);
        stats.into_iter().chain(requests).collect()
    }

    fn return_unused(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served {
        let mut device = self.shared.device();
        let Some(vq) = device.queues().vq(index) else {
            return Served::Done { notify: false, more: false };
        };
        let returned = device.return_unused(vq, memory, queue);
        drop(device);
        match returned {
            Ok(notify) => Served::Done { notify, more: false },
            Err(error) => self.broken(vq, &error),
        }
    }

    fn drop_queue(&mut self, index: usize) {
        let mut device = self.shared.device();
        if let Some(vq) = device.queues().vq(index) {
            device.forget_pending(vq);
        }
    }

    fn suspend(&mut self) {
        self.shared.device().suspend();
        self.shared.changed();
    }
}
