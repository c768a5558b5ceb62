//! The registers of a device, and its queues, between two hosts.

use virtio_queue::{Queue, QueueState, QueueT};

use super::{Interrupts, RING_EVENT_IDX, Ring, Transport, VERSION_1, status};
use crate::state::codec::{Malformed, Reader, Writer};
use balloon_host::ring::{self, MAX_QUEUE_SIZE};

/// Queues that a state may have: no virtio device of ours has more.
const MAX_QUEUES: usize = 64;

/// All bits that the status can have (virtio 1.3, section 2.1).
const STATUS_BITS: u32 =
    1 | 2 | 128 | status::DRIVER_OK | status::FEATURES_OK | status::NEEDS_RESET;

/// Bits that the interrupt status can have.
const INTERRUPT_BITS: u32 = super::INTERRUPT_RING | super::INTERRUPT_CONFIG;

/// Registers and queues, as they are while the guest stands still. Not checked yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TransportState {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    rings: Vec<(QueueState, [u64; 3])>,
}

impl TransportState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(self.device_features_sel).u32(self.driver_features_sel);
        writer.u64(self.driver_features).u32(self.queue_sel).u32(self.status);
        writer.u32(self.interrupt_status).u32(self.config_generation);
        writer.u16(u16::try_from(self.rings.len()).unwrap_or(u16::MAX));
        for (queue, places) in &self.rings {
            writer.u16(queue.max_size).u16(queue.next_avail).u16(queue.next_used);
            writer.flag(queue.event_idx_enabled).u16(queue.size).flag(queue.ready);
            writer.u64(queue.desc_table).u64(queue.avail_ring).u64(queue.used_ring);
            places.iter().for_each(|place| {
                writer.u64(*place);
            });
        }
        writer.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let mut state = Self {
            device_features_sel: reader.u32()?,
            driver_features_sel: reader.u32()?,
            driver_features: reader.u64()?,
            queue_sel: reader.u32()?,
            status: reader.u32()?,
            interrupt_status: reader.u32()?,
            config_generation: reader.u32()?,
            rings: Vec::new(),
        };
        let count = reader.u16()?;
        if usize::from(count) > MAX_QUEUES {
            let (count, max) = (count.into(), MAX_QUEUES as u64);
            return Err(Malformed::TooMany { what: "queues", count, max });
        }
        for _ in 0..count {
            let queue = QueueState {
                max_size: reader.u16()?,
                next_avail: reader.u16()?,
                next_used: reader.u16()?,
                event_idx_enabled: reader.flag("an event index")?,
                size: reader.u16()?,
                ready: reader.flag("a queue's readiness")?,
                desc_table: reader.u64()?,
                avail_ring: reader.u64()?,
                used_ring: reader.u64()?,
            };
            state.rings.push((queue, [reader.u64()?, reader.u64()?, reader.u64()?]));
        }
        reader.finish()?;
        Ok(state)
    }

    /// What the driver and the device have agreed on, if they have.
    pub(crate) const fn agreed(&self) -> u64 {
        if self.status & status::FEATURES_OK == 0 { 0 } else { self.driver_features }
    }
}

impl<S: Interrupts> Transport<S> {
    /// Of a guest that is [paused](Transport::pause).
    pub(crate) fn state(&self) -> TransportState {
        TransportState {
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.status,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            rings: self.rings.iter().map(|ring| (ring.queue.state(), ring.places)).collect(),
        }
    }

    /// Takes registers and queues of another host's guest, which stands still until it is
    /// [resumed](Transport::resume).
    ///
    /// Interrupts that were raised and not acknowledged are raised again: one more does no harm,
    /// and one that was still on its way when the guest stopped would be lost.
    pub(crate) fn restore(&mut self, state: &TransportState) -> Result<(), Malformed> {
        let value = |what, value: u64| Malformed::Value { what, value };
        let features = state.driver_features;
        if state.status & !STATUS_BITS != 0 {
            return Err(value("the status", state.status.into()));
        }
        if state.interrupt_status & !INTERRUPT_BITS != 0 {
            return Err(value("the interrupt status", state.interrupt_status.into()));
        }
        let settled = state.status & status::FEATURES_OK != 0;
        let known = features & !self.device.features() == 0 && features & VERSION_1 != 0;
        if settled && !known {
            return Err(value("the driver's features", features));
        }
        if state.status & status::DRIVER_OK != 0 && !settled {
            return Err(value("the status", state.status.into()));
        }
        if state.rings.len() != self.rings.len() {
            return Err(value("the number of queues", state.rings.len() as u64));
        }
        let ring = |(index, ring): (u64, &(QueueState, [u64; 3]))| {
            self.ring(state, ring).ok_or(Malformed::Value { what: "a queue's state", value: index })
        };
        let rings = (0..).zip(&state.rings).map(ring).collect::<Result<_, _>>()?;
        self.rings = rings;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = features;
        self.queue_sel = state.queue_sel;
        self.status = state.status;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        self.paused = true;
        self.device.accepted(state.agreed());
        if self.interrupt_status != 0 {
            self.signals.raise();
        }
        Ok(())
    }

    /// A queue where the state says that it is, if one can be there.
    fn ring(&self, state: &TransportState, ring: &(QueueState, [u64; 3])) -> Option<Ring> {
        let &(queue_state, places) = ring;
        // ControlApi before the queue is, which would log what a peer sent.
        let QueueState { desc_table, avail_ring, used_ring, .. } = queue_state;
        let aligned = desc_table.is_multiple_of(16)
            && avail_ring.is_multiple_of(2)
            && used_ring.is_multiple_of(4);
        if !aligned || queue_state.max_size != MAX_QUEUE_SIZE {
            return None;
        }
        let queue = Queue::try_from(queue_state).ok()?;
        let settled = state.status & status::FEATURES_OK != 0;
        let event_idx = state.driver_features & RING_EVENT_IDX != 0;
        if queue.ready() && (!settled || queue.event_idx_enabled() != event_idx) {
            return None;
        }
        // Chains that the device kept. None of a ring comes back before it was taken; where the rings
        // lie upon one another as well, this device's own answers would be its next chains.
        let kept = queue.next_avail().wrapping_sub(queue.next_used());
        if queue.ready() && kept > queue.size() {
            return None;
        }
        ring::lies_in(&queue, &self.memory).then_some(Ring { queue, places })
    }
}
