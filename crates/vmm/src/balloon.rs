//! The balloon on a virtio-mmio transport. Its rules are `balloon-device`'s.

use std::sync::Arc;
use std::time::Instant;

use balloon_abi::config::CONFIG_BYTES;
use balloon_abi::{Features, QueueLayout};
use balloon_host::{HostReclaim, Shared};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use crate::mmio::{Device, Served};

/// The virtio device type of a balloon (virtio 1.3, 5.5.1).
const ID: u32 = 5;

/// One guest's balloon.
pub(crate) struct Balloon {
    shared: Arc<Shared>,
}

impl Balloon {
    pub(crate) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        balloon_device::Balloon::<HostReclaim>::FEATURES.0
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
        self.shared.device().reset(Features(features));
        self.shared.changed();
    }

    fn count_exits(&mut self, count: u64) {
        self.shared.count_exits(count);
    }

    fn serve(&mut self, index: usize, memory: &GuestMemoryMmap, queue: &mut Queue) -> Served {
        let mut device = self.shared.device();
        let Some(vq) = device.queues().vq(index) else {
            return Served::Done { notify: false, more: false };
        };
        let outcome = device.process_queue(vq, memory, queue);
        drop(device);
        self.shared.changed();
        match outcome {
            Ok(drained) => Served::Done { notify: drained.notify, more: drained.more },
            Err(error) => {
                if self.shared.may_log() {
                    tracing::warn!(%error, "queue stopped");
                }
                Served::Broken
            }
        }
    }
}
