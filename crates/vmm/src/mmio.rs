//! The registers of a virtio-mmio device (virtio 1.3, section 4.2.2).
//!
//! Invalid accesses are ignored. A driver that cannot be served gets the status bit
//! `DEVICE_NEEDS_RESET`.

mod state;

pub(crate) use state::TransportState;

use std::time::Duration;

use balloon_host::ring::{self, MAX_QUEUE_SIZE};
use diagnostics::panic_point;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Ram;

/// "virt", version 2, and Aerostat's own vendor ID.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"Aero");

/// Offsets of registers.
pub(crate) mod register {
    pub(crate) const MAGIC: u64 = 0x000;
    pub(crate) const VERSION: u64 = 0x004;
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const VENDOR_ID: u64 = 0x00c;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(crate) const QUEUE_SIZE: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC: u64 = 0x080;
    pub(crate) const QUEUE_DRIVER: u64 = 0x090;
    pub(crate) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(crate) const SHM_LEN: u64 = 0x0b0;
    pub(crate) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(crate) const CONFIG: u64 = 0x100;
}
use register::{CONFIG, QUEUE_DESC, QUEUE_DEVICE, QUEUE_DRIVER};

/// Bits of the status register (virtio 1.3, section 2.1).
pub(crate) mod status {
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const NEEDS_RESET: u32 = 64;
}

/// Passes over a vring before a pause: each takes at least one chain, and no vring has more.
const MAX_PASSES: u16 = MAX_QUEUE_SIZE;

/// Bits of the interrupt status.
pub(crate) const INTERRUPT_VRING: u32 = 1;
pub(crate) const INTERRUPT_CONFIG: u32 = 2;

/// A virtio device without its transport.
pub(crate) trait Device: Send {
    /// The virtio device ID (virtio 1.3, chapter 5).
    fn id(&self) -> u32;
    /// The offered features.
    fn features(&self) -> u64;
    /// The number of virtqueues.
    fn queues(&self) -> usize;
    /// Reads configuration space; bytes beyond its end read as zeros.
    fn read_config(&mut self, offset: u32, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: u32, data: &[u8]);
    /// Resets the device for a driver with these features; 0 for no driver.
    fn reset(&mut self, features: u64);
    /// Restores the negotiated features after a migration.
    fn restore_features(&mut self, _features: u64) {}
    /// Sets the eventfds that make the device loop serve each queue, as a guest's notification
    /// does.
    fn set_notify_fds(&mut self, _fds: &[EventFd]) {}
    /// Counts VM exits caused by this device.
    fn count_exits(&mut self, count: u64);
    /// Counts VM exits caused by queue notifications.
    fn count_notifications(&mut self, count: u64) {
        self.count_exits(count);
    }
    /// Serves a queue.
    fn serve(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served;
    /// Time until a queue must be served without a notification, if any.
    fn until_due(&self) -> Option<Duration>;
    /// Queues to serve now without a notification. With `woken`, includes queues that wait for a
    /// request of the operator.
    fn due(&mut self, woken: bool) -> Vec<usize>;
    /// Whether a pause serves all available chains first. If not, they stay in the vring until the
    /// guest is resumed, here or on another host.
    fn serves_before_pause(&self) -> bool {
        true
    }
    /// Returns the chains of a queue that the device has taken and not used, when the guest pauses.
    fn return_unused(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served;
    /// Starts no more requests and interrupts the one in progress. Returns true once none is in
    /// progress; waits a millisecond at most.
    fn quiesce(&mut self) -> bool {
        true
    }
    /// Continues after [`quiesce`](Self::quiesce). Returns false if a request was interrupted
    /// meanwhile: then the device must be paused and resumed.
    fn cancel_quiesce(&mut self) -> bool {
        true
    }
    /// Chains that the device has taken and not returned; a pending chain does not count.
    fn unfinished(&self) -> usize {
        0
    }
    /// Drops all state of a queue that was reset or disabled.
    fn drop_queue(&mut self, index: usize);
    /// Pauses all queues.
    fn suspend(&mut self);
}

/// The outcome of serving a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Served up to a limit.
    Done {
        /// The driver needs an interrupt.
        notify: bool,
        /// More chains are available: serve again.
        more: bool,
    },
    /// The vring is invalid.
    Broken,
}

/// Signals to the driver and to the device loop.
pub(crate) trait Interrupts: Send {
    /// Raises the device's interrupt.
    fn raise(&self);
    /// Makes the device loop serve a queue, as a guest's notification does.
    fn notify_device(&self, index: usize);
}

/// A virtqueue and the addresses that the driver has set for it.
#[derive(Debug)]
struct Vring {
    queue: Queue,
    /// Descriptor table, used and available ring.
    addresses: [u64; 3],
}

/// The registers of one device.
pub(crate) struct Transport<S> {
    device: Box<dyn Device>,
    signals: S,
    memory: Ram,
    vrings: Vec<Vring>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    /// The vCPUs and the queues are paused.
    paused: bool,
}

impl<S: Interrupts> Transport<S> {
    /// Creates the registers of a device without a driver.
    pub(crate) fn new(
        device: Box<dyn Device>,
        signals: S,
        memory: Ram,
    ) -> Result<Self, virtio_queue::Error> {
        let vring = |_| Ok(Vring { queue: Queue::new(MAX_QUEUE_SIZE)?, addresses: [0; 3] });
        Ok(Self {
            vrings: (0..device.queues()).map(vring).collect::<Result<_, _>>()?,
            device,
            signals,
            memory,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            paused: false,
        })
    }

    /// Serves a read by the guest.
    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.device.count_exits(1);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(u32::try_from(offset).unwrap_or(u32::MAX), data);
            return;
        }
        data.fill(0);
        // Registers have 32 bits; a driver must access them as such.
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    /// Serves a write by the guest.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.count_exits(1);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.write_config(u32::try_from(offset).unwrap_or(u32::MAX), data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.set_register(offset, u32::from_le_bytes(word));
        }
    }

    /// Serves a queue after `count` notifications that caused VM exits. Returns true if more is
    /// available.
    pub(crate) fn notified(&mut self, index: usize, count: u64) -> bool {
        self.device.count_notifications(count);
        if !self.runs() || self.paused {
            return false;
        }
        let Some(vring) = self.vrings.get_mut(index).filter(|vring| vring.queue.ready()) else {
            return false;
        };
        panic_point("device");
        let served = self.device.serve(index, &self.memory, &mut vring.queue);
        self.served(served)
    }

    /// Acts on the outcome. Returns true if more is available.
    fn served(&mut self, served: Served) -> bool {
        match served {
            Served::Done { notify, more } => {
                if notify {
                    self.raise(INTERRUPT_VRING);
                }
                more
            }
            Served::Broken => {
                self.fail();
                false
            }
        }
    }

    /// Time until [`poll_timers`](Self::poll_timers) must be called, if at all.
    pub(crate) fn until_due(&self) -> Option<Duration> {
        self.device.until_due()
    }

    /// Serves the queues that are due without a notification.
    pub(crate) fn poll_timers(&mut self, woken: bool) {
        for index in self.device.due(woken) {
            if self.notified(index, 0) {
                self.signals.notify_device(index);
            }
        }
    }

    /// Pauses the device after the vCPUs. Serves all available chains, unless the device leaves
    /// them in the vring, and returns unused ones. Returns false if a request is still in progress:
    /// call again, or [resume](Self::resume).
    pub(crate) fn pause(&mut self) -> bool {
        if self.paused {
            return true;
        }
        if !self.device.quiesce() {
            return false;
        }
        if self.device.serves_before_pause() {
            for index in 0..self.vrings.len() {
                // Only the device's own writes can add chains meanwhile, if a hostile guest lets
                // parts of the vring overlap. The rest stays in the vring.
                let mut passes = 0..MAX_PASSES;
                while passes.next().is_some() && self.notified(index, 0) {}
            }
        }
        if self.runs() {
            for index in 0..self.vrings.len() {
                let Some(vring) = self.vrings.get_mut(index).filter(|vring| vring.queue.ready())
                else {
                    continue;
                };
                let returned = self.device.return_unused(index, &self.memory, &mut vring.queue);
                self.served(returned);
            }
        }
        self.device.suspend();
        self.paused = true;
        true
    }

    #[cfg(test)]
    pub(crate) const fn is_paused(&self) -> bool {
        self.paused
    }

    /// Requests of the guest that the device has not answered.
    pub(crate) fn unfinished(&self) -> usize {
        self.device.unfinished()
    }

    /// Resumes the device before the vCPUs.
    pub(crate) fn resume(&mut self) {
        if !self.device.cancel_quiesce() {
            // A request was interrupted after the pause was aborted.
            self.pause();
        }
        if std::mem::take(&mut self.paused) && self.runs() {
            // Notifications during the pause were not served.
            (0..self.vrings.len()).for_each(|index| self.signals.notify_device(index));
        }
    }

    /// Reports a change of the configuration space to the driver.
    pub(crate) fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.runs() {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    /// Features that the device offers.
    pub(crate) fn offered(&self) -> u64 {
        self.device.features()
    }

    fn runs(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0
    }

    fn raise(&mut self, bit: u32) {
        self.interrupt_status |= bit;
        self.signals.raise();
    }

    /// Serves nothing more until the driver resets the device.
    pub(crate) fn fail(&mut self) {
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let vring = self.vrings.get(self.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => vring.map_or(0, |vring| vring.queue.max_size().into()),
            register::QUEUE_READY => vring.map_or(0, |vring| vring.queue.ready().into()),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            // No shared memory regions: the length reads as all ones.
            register::SHM_LEN..=0xb4 => u32::MAX,
            register::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            // Features cannot change once they are negotiated.
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            register::QUEUE_SEL => self.queue_sel = value,
            // With an ioeventfd KVM handles this write; this is the path without one.
            register::QUEUE_NOTIFY if (value as usize) < self.vrings.len() => {
                self.signals.notify_device(value as usize);
            }
            register::INTERRUPT_ACK => self.interrupt_status &= !value,
            register::STATUS => self.set_status(value),
            _ => self.set_queue_register(offset, value),
        }
    }

    /// Writes a register of the selected queue. Ignored while the queue is ready.
    fn set_queue_register(&mut self, offset: u64, value: u32) {
        let Some(vring) = self.vrings.get_mut(self.queue_sel as usize) else { return };
        if offset == register::QUEUE_READY {
            let ready = value & 1 != 0;
            return self.set_queue_ready(ready);
        }
        if vring.queue.ready() {
            return;
        }
        let [descriptors, used, available] = &mut vring.addresses;
        match offset {
            register::QUEUE_SIZE => {
                // The queue keeps its old size.
                let size = u16::try_from(value).unwrap_or(0);
                if vring.queue.try_set_size(size).is_err() {
                    self.fail();
                }
            }
            QUEUE_DESC => set_half(descriptors, 0, value),
            0x084 => set_half(descriptors, 1, value),
            QUEUE_DRIVER => set_half(available, 0, value),
            0x094 => set_half(available, 1, value),
            QUEUE_DEVICE => set_half(used, 0, value),
            0x0a4 => set_half(used, 1, value),
            _ => {}
        }
    }

    /// Enables or disables the selected queue. Enabling needs negotiated features.
    fn set_queue_ready(&mut self, ready: bool) {
        let negotiated = self.status & status::FEATURES_OK != 0;
        let event_idx = self.driver_features & RING_EVENT_IDX != 0;
        let Some(vring) = self.vrings.get_mut(self.queue_sel as usize) else { return };
        if !ready {
            vring.queue.set_ready(false);
            self.device.drop_queue(self.queue_sel as usize);
        } else if negotiated && !vring.queue.ready() {
            let addresses = vring.addresses.map(GuestAddress);
            vring.queue.set_next_avail(0);
            vring.queue.set_next_used(0);
            if !ring::place(&mut vring.queue, addresses, event_idx, &self.memory) {
                vring.queue.set_ready(false);
                self.fail();
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // The driver can only add bits, and cannot set the device's own bit.
        let new = value & !self.status & !status::NEEDS_RESET;
        if new & status::FEATURES_OK != 0 && !self.negotiate() {
            self.status |= new & !status::FEATURES_OK & !status::DRIVER_OK;
            return;
        }
        let may_run = (self.status | new) & status::FEATURES_OK != 0;
        self.status |= if may_run { new } else { new & !status::DRIVER_OK };
        if may_run && new & status::DRIVER_OK != 0 {
            // Notifications before DRIVER_OK were not served.
            (0..self.vrings.len()).for_each(|index| self.signals.notify_device(index));
        }
    }

    /// Negotiates the driver's features; false if they are not acceptable. Legacy drivers are not
    /// supported.
    fn negotiate(&mut self) -> bool {
        let offered = self.device.features();
        let negotiated =
            self.driver_features & !offered == 0 && self.driver_features & VERSION_1 != 0;
        if negotiated {
            self.device.reset(self.driver_features);
        }
        negotiated
    }

    fn reset(&mut self) {
        // The queues first, so that none is served during the device's reset.
        for vring in &mut self.vrings {
            vring.queue.reset();
            vring.addresses = [0; 3];
        }
        self.device.reset(0);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.interrupt_status = 0;
    }
}

/// Transport feature bits (virtio 1.3, chapter 6).
const RING_EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// The lower (0) or upper (1) half of 64 bits; 0 for other selectors.
fn half(value: u64, which: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match which {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, which: u32, half: u32) {
    match which {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
