//! The registers of a virtio-mmio device (virtio 1.3, section 4.2.2).
//!
//! The guest reads and writes them as it likes. What the specification does not allow is not
//! done; a driver that cannot be served is told so by the bit `DEVICE_NEEDS_RESET`.

mod state;

pub(crate) use state::TransportState;

use std::time::Duration;

use balloon_host::ring::{self, MAX_QUEUE_SIZE};
use diagnostics::panic_point;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Ram;

/// "virt", version 2, and a vendor of our own.
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

/// Times that a ring is served before the guest stands still: each takes a chain at least, and no ring
/// has more.
const MAX_PASSES: u16 = MAX_QUEUE_SIZE;

/// Bits of the interrupt status.
pub(crate) const INTERRUPT_RING: u32 = 1;
pub(crate) const INTERRUPT_CONFIG: u32 = 2;

/// A virtio device without its transport.
pub(crate) trait Device: Send {
    /// Its kind (virtio 1.3, chapter 5).
    fn id(&self) -> u32;
    /// What it offers.
    fn features(&self) -> u64;
    /// How many queues it may have.
    fn queues(&self) -> usize;
    /// Reads configuration space; what is beyond its end reads as zeros.
    fn read_config(&mut self, offset: u32, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: u32, data: &[u8]);
    /// A driver starts with these features, or goes with none.
    fn reset(&mut self, features: u64);
    /// A driver that these features were agreed on with came from another host.
    fn accepted(&mut self, _features: u64) {}
    /// What has each of its queues served, as a notification by the guest would.
    fn set_kicks(&mut self, _kicks: &[EventFd]) {}
    /// The guest left its processor so many times because of this device.
    fn count_exits(&mut self, count: u64);
    /// The same, to notify it.
    fn count_kicks(&mut self, count: u64) {
        self.count_exits(count);
    }
    /// Serves a queue.
    fn serve(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served;
    /// Time until a queue is to be served whatever the guest does, if it is.
    fn until_due(&self) -> Option<Duration>;
    /// Queues to be served now whatever the guest does. Those that wait for this host's operator
    /// are among them where he was heard (`woken`).
    fn due(&mut self, woken: bool) -> Vec<usize>;
    /// Whether all that the guest has sent is served before it stands still. What is not waits in
    /// the ring for whoever lets the guest go on, here or on another host.
    fn serves_before_pause(&self) -> bool {
        true
    }
    /// A queue stops: what the device keeps of it goes back into it.
    fn return_unused(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served;
    /// Begins nothing more, and has what is under way end soon; true once nothing is. It waits no
    /// longer than a moment.
    fn comes_to_rest(&mut self) -> bool {
        true
    }
    /// Goes on after it was to come to rest; false where it has since, and no queue was told.
    fn goes_on(&mut self) -> bool {
        true
    }
    /// Chains that are with the device and neither answered nor kept for later.
    fn unfinished(&self) -> usize {
        0
    }
    /// A queue is gone, with whatever the device keeps of it.
    fn forget(&mut self, index: usize);
    /// All queues stand still for a while.
    fn suspend(&mut self);
}

/// What came of serving a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// All is done up to a limit.
    Done {
        /// The driver wants to hear of it.
        notify: bool,
        /// There is more: serve again.
        more: bool,
    },
    /// The ring makes no sense.
    Broken,
}

/// The two ways between the guest's processors and who serves the device.
pub(crate) trait Interrupts: Send {
    /// Raises the device's interrupt.
    fn raise(&self);
    /// Has a queue served soon, as a notification by the guest would.
    fn kick(&self, index: usize);
}

/// A queue as the driver describes it, until it says that it is ready.
#[derive(Debug)]
struct Ring {
    queue: Queue,
    /// Descriptor table, used and available ring.
    places: [u64; 3],
}

/// The registers of one device.
pub(crate) struct Transport<S> {
    device: Box<dyn Device>,
    signals: S,
    memory: Ram,
    rings: Vec<Ring>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    /// The guest's processors stand still, and so do the queues.
    paused: bool,
}

impl<S: Interrupts> Transport<S> {
    /// A device that no driver has touched.
    pub(crate) fn new(
        device: Box<dyn Device>,
        signals: S,
        memory: Ram,
    ) -> Result<Self, virtio_queue::Error> {
        let ring = |_| Ok(Ring { queue: Queue::new(MAX_QUEUE_SIZE)?, places: [0; 3] });
        Ok(Self {
            rings: (0..device.queues()).map(ring).collect::<Result<_, _>>()?,
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

    /// The guest reads.
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

    /// The guest writes.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.count_exits(1);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.write_config(u32::try_from(offset).unwrap_or(u32::MAX), data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.set_register(offset, u32::from_le_bytes(word));
        }
    }

    /// Serves a queue after so many notifications that the guest left its processor for; true
    /// where there is more to serve.
    pub(crate) fn notified(&mut self, index: usize, count: u64) -> bool {
        self.device.count_kicks(count);
        if !self.runs() || self.paused {
            return false;
        }
        let Some(ring) = self.rings.get_mut(index).filter(|ring| ring.queue.ready()) else {
            return false;
        };
        panic_point("device");
        let served = self.device.serve(index, &self.memory, &mut ring.queue);
        self.served(served)
    }

    /// True where there is more to serve.
    fn served(&mut self, served: Served) -> bool {
        match served {
            Served::Done { notify, more } => {
                if notify {
                    self.raise(INTERRUPT_RING);
                }
                more
            }
            Served::Broken => {
                self.fail();
                false
            }
        }
    }

    /// Time until [`poll_timers`](Self::poll_timers) has something to do, also where the guest does nothing.
    pub(crate) fn until_due(&self) -> Option<Duration> {
        self.device.until_due()
    }

    /// Serves what is to be served without a notification.
    pub(crate) fn poll_timers(&mut self, woken: bool) {
        for index in self.device.due(woken) {
            if self.notified(index, 0) {
                self.signals.kick(index);
            }
        }
    }

    /// The guest's processors stand still: all that the guest has sent is served, unless the device
    /// leaves it in the ring, and what the device keeps goes back there. False where the device
    /// has not come to rest yet: ask again, or let it go on.
    pub(crate) fn pause(&mut self) -> bool {
        if self.paused {
            return true;
        }
        if !self.device.comes_to_rest() {
            return false;
        }
        if self.device.serves_before_pause() {
            for index in 0..self.rings.len() {
                // Nobody adds to the ring meanwhile but the device, by what it writes to it where a
                // hostile guest has laid one part upon another. The rest waits in the ring.
                let mut passes = 0..MAX_PASSES;
                while passes.next().is_some() && self.notified(index, 0) {}
            }
        }
        if self.runs() {
            for index in 0..self.rings.len() {
                let Some(ring) = self.rings.get_mut(index).filter(|ring| ring.queue.ready()) else {
                    continue;
                };
                let given = self.device.return_unused(index, &self.memory, &mut ring.queue);
                self.served(given);
            }
        }
        self.device.suspend();
        self.paused = true;
        true
    }

    /// Queues stand still.
    #[cfg(test)]
    pub(crate) const fn is_paused(&self) -> bool {
        self.paused
    }

    /// Requests of the guest that are not answered.
    pub(crate) fn unfinished(&self) -> usize {
        self.device.unfinished()
    }

    /// The guest's processors are about to run.
    pub(crate) fn resume(&mut self) {
        if !self.device.goes_on() {
            // It has come to rest after nobody waited for that any more.
            self.pause();
        }
        if std::mem::take(&mut self.paused) && self.runs() {
            // Whatever came meanwhile was not served.
            (0..self.rings.len()).for_each(|index| self.signals.kick(index));
        }
    }

    /// The device has changed its configuration space.
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

    /// Nothing is served any more until the driver starts anew.
    pub(crate) fn fail(&mut self) {
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.raise(INTERRUPT_CONFIG);
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let ring = self.rings.get(self.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => ring.map_or(0, |ring| ring.queue.max_size().into()),
            register::QUEUE_READY => ring.map_or(0, |ring| ring.queue.ready().into()),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            // There is no shared memory: a length of all ones says so.
            register::SHM_LEN..=0xb4 => u32::MAX,
            register::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            // Features are settled once the device has agreed to them.
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            register::QUEUE_SEL => self.queue_sel = value,
            // KVM turns a write of a queue's number into a notification by itself; this is for
            // machines where it cannot.
            register::QUEUE_NOTIFY if (value as usize) < self.rings.len() => {
                self.signals.kick(value as usize);
            }
            register::INTERRUPT_ACK => self.interrupt_status &= !value,
            register::STATUS => self.set_status(value),
            _ => self.set_queue_register(offset, value),
        }
    }

    /// The registers of the chosen queue, which stay as they are while it is ready.
    fn set_queue_register(&mut self, offset: u64, value: u32) {
        let Some(ring) = self.rings.get_mut(self.queue_sel as usize) else { return };
        if offset == register::QUEUE_READY {
            let ready = value & 1 != 0;
            return self.set_queue_ready(ready);
        }
        if ring.queue.ready() {
            return;
        }
        let [descriptors, used, available] = &mut ring.places;
        match offset {
            register::QUEUE_SIZE => {
                // A size that no ring has is found out by its driver, which keeps the old one.
                let size = u16::try_from(value).unwrap_or(0);
                if ring.queue.try_set_size(size).is_err() {
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

    /// A ring may be placed once features are settled.
    fn set_queue_ready(&mut self, ready: bool) {
        let settled = self.status & status::FEATURES_OK != 0;
        let event_idx = self.driver_features & RING_EVENT_IDX != 0;
        let Some(ring) = self.rings.get_mut(self.queue_sel as usize) else { return };
        if !ready {
            ring.queue.set_ready(false);
            self.device.forget(self.queue_sel as usize);
        } else if settled && !ring.queue.ready() {
            let places = ring.places.map(GuestAddress);
            ring.queue.set_next_avail(0);
            ring.queue.set_next_used(0);
            if !ring::place(&mut ring.queue, places, event_idx, &self.memory) {
                ring.queue.set_ready(false);
                self.fail();
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // The driver adds bits. It cannot take any away, nor set the device's own.
        let new = value & !self.status & !status::NEEDS_RESET;
        if new & status::FEATURES_OK != 0 && !self.agree() {
            self.status |= new & !status::FEATURES_OK & !status::DRIVER_OK;
            return;
        }
        let may_run = (self.status | new) & status::FEATURES_OK != 0;
        self.status |= if may_run { new } else { new & !status::DRIVER_OK };
        if may_run && new & status::DRIVER_OK != 0 {
            // A notification that came before this was not served.
            (0..self.rings.len()).for_each(|index| self.signals.kick(index));
        }
    }

    /// Whether the device takes the driver's features. It serves no drivers from before virtio 1.
    fn agree(&mut self) -> bool {
        let offered = self.device.features();
        let agreed = self.driver_features & !offered == 0 && self.driver_features & VERSION_1 != 0;
        if agreed {
            self.device.reset(self.driver_features);
        }
        agreed
    }

    fn reset(&mut self) {
        // First the queues, so that nothing is served while the device forgets its driver.
        for ring in &mut self.rings {
            ring.queue.reset();
            ring.places = [0; 3];
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

/// Feature bits of the transport's own concern (virtio 1.3, chapter 6).
const RING_EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// The lower or upper half of 64 bits; there is no other.
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
