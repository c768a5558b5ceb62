//! Saving and restoring a device's registers and queues.

use virtio_queue::{Queue, QueueState, QueueT};

use super::{Interrupts, RING_EVENT_IDX, Transport, VERSION_1, Vring, status};
use crate::codec::{Malformed, Reader, Writer};
use balloon_host::ring::{self, MAX_QUEUE_SIZE};

/// Maximum number of queues in a state; no device here has more.
const MAX_QUEUES: usize = 64;

/// All valid status bits (virtio 1.3, section 2.1).
const STATUS_BITS: u32 =
    1 | 2 | 128 | status::DRIVER_OK | status::FEATURES_OK | status::NEEDS_RESET;

/// All valid interrupt status bits.
const INTERRUPT_BITS: u32 = super::INTERRUPT_VRING | super::INTERRUPT_CONFIG;

/// Registers and queues of a paused guest. Not validated yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TransportState {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    vrings: Vec<(QueueState, [u64; 3])>,
}

impl TransportState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(self.device_features_sel).u32(self.driver_features_sel);
        writer.u64(self.driver_features).u32(self.queue_sel).u32(self.status);
        writer.u32(self.interrupt_status).u32(self.config_generation);
        writer.u16(u16::try_from(self.vrings.len()).unwrap_or(u16::MAX));
        for (queue, addresses) in &self.vrings {
            writer.u16(queue.max_size).u16(queue.next_avail).u16(queue.next_used);
            writer.flag(queue.event_idx_enabled).u16(queue.size).flag(queue.ready);
            writer.u64(queue.desc_table).u64(queue.avail_ring).u64(queue.used_ring);
            addresses.iter().for_each(|address| {
                writer.u64(*address);
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
            vrings: Vec::new(),
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
            state.vrings.push((queue, [reader.u64()?, reader.u64()?, reader.u64()?]));
        }
        reader.finish()?;
        Ok(state)
    }

    /// The negotiated features, or 0.
    pub(crate) const fn negotiated(&self) -> u64 {
        if self.status & status::FEATURES_OK == 0 { 0 } else { self.driver_features }
    }
}

impl<S: Interrupts> Transport<S> {
    /// Returns the state of a [paused](Transport::pause) device.
    pub(crate) fn state(&self) -> TransportState {
        TransportState {
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.status,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            vrings: self
                .vrings
                .iter()
                .map(|vring| (vring.queue.state(), vring.addresses))
                .collect(),
        }
    }

    /// Restores registers and queues. The device stays paused until it is
    /// [resumed](Transport::resume).
    ///
    /// Raises unacknowledged interrupts again: a spurious one is harmless, and one that was in
    /// flight when the guest paused would be lost.
    pub(crate) fn restore(&mut self, state: &TransportState) -> Result<(), Malformed> {
        let value = |what, value: u64| Malformed::Value { what, value };
        let features = state.driver_features;
        if state.status & !STATUS_BITS != 0 {
            return Err(value("the status", state.status.into()));
        }
        if state.interrupt_status & !INTERRUPT_BITS != 0 {
            return Err(value("the interrupt status", state.interrupt_status.into()));
        }
        let negotiated = state.status & status::FEATURES_OK != 0;
        let valid = features & !self.device.features() == 0 && features & VERSION_1 != 0;
        if negotiated && !valid {
            return Err(value("the driver's features", features));
        }
        if state.status & status::DRIVER_OK != 0 && !negotiated {
            return Err(value("the status", state.status.into()));
        }
        if state.vrings.len() != self.vrings.len() {
            return Err(value("the number of queues", state.vrings.len() as u64));
        }
        let vring = |(index, vring): (u64, &(QueueState, [u64; 3]))| {
            self.vring(state, vring)
                .ok_or(Malformed::Value { what: "a queue's state", value: index })
        };
        let vrings = (0..).zip(&state.vrings).map(vring).collect::<Result<_, _>>()?;
        self.vrings = vrings;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = features;
        self.queue_sel = state.queue_sel;
        self.status = state.status;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        self.paused = true;
        self.device.restore_features(state.negotiated());
        if self.interrupt_status != 0 {
            self.signals.raise();
        }
        Ok(())
    }

    /// Restores a queue; `None` if its state is invalid.
    fn vring(&self, state: &TransportState, vring: &(QueueState, [u64; 3])) -> Option<Vring> {
        let &(queue_state, addresses) = vring;
        // Checked before `Queue::try_from`, which would log the peer's values.
        let QueueState { desc_table, avail_ring, used_ring, .. } = queue_state;
        let aligned = desc_table.is_multiple_of(16)
            && avail_ring.is_multiple_of(2)
            && used_ring.is_multiple_of(4);
        if !aligned || queue_state.max_size != MAX_QUEUE_SIZE {
            return None;
        }
        let queue = Queue::try_from(queue_state).ok()?;
        let negotiated = state.status & status::FEATURES_OK != 0;
        let event_idx = state.driver_features & RING_EVENT_IDX != 0;
        if queue.ready() && (!negotiated || queue.event_idx_enabled() != event_idx) {
            return None;
        }
        // Chains that the device has taken and not returned. With more of them than entries, and
        // overlapping rings, the device's own answers would become its next chains.
        let taken = queue.next_avail().wrapping_sub(queue.next_used());
        if queue.ready() && taken > queue.size() {
            return None;
        }
        ring::lies_in(&queue, &self.memory).then_some(Vring { queue, addresses })
    }
}
