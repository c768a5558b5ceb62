//! What the vCPUs can access besides memory: I/O ports, and virtio-mmio devices in their windows.

mod pause;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LockResult, Mutex, MutexGuard};

use kvm_ioctls::{IoEventAddress, VmFd};
use rustix::event::EventfdFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::MmioSlot;
use crate::error::Error;
use crate::layout;
use crate::memory::MachineMemory;
use crate::mmio::{Device, Interrupts, Transport, register};
use crate::ports::Ports;

/// Everything that the vCPUs can access besides memory.
pub(crate) struct Bus {
    pub(crate) ports: Ports,
    pub(crate) slots: Vec<Slot>,
}

/// A virtio-mmio device and its MMIO window.
pub(crate) struct Slot {
    start: u64,
    transport: Mutex<Transport<EventFdInterrupts>>,
    pub(crate) notify_fds: Vec<EventFd>,
    /// A pause was aborted while another thread held the transport's lock: the next thread to take
    /// the lock resumes the device.
    resume_pending: AtomicBool,
}

/// Eventfds: an irqfd to the guest, and ioeventfds that the device loop polls.
pub(crate) struct EventFdInterrupts {
    interrupt: EventFd,
    notify_fds: Vec<EventFd>,
}

impl Interrupts for EventFdInterrupts {
    fn raise(&self) {
        if let Err(error) = self.interrupt.write(1) {
            tracing::error!(%error, "host: cannot interrupt the guest");
        }
    }

    fn notify_device(&self, index: usize) {
        // A full eventfd is readable, which is all that is needed.
        let _ = self.notify_fds.get(index).map(|notify_fd| notify_fd.write(1));
    }
}

impl Bus {
    /// Serves an MMIO read. An address without a device reads as all ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.transport().read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Serves an MMIO write.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            slot.transport().write(offset, data);
        }
    }

    /// Serves the queues whose timers are due.
    pub(crate) fn poll_timers(&self, woken: bool) {
        self.slots.iter().for_each(|slot| slot.transport().poll_timers(woken));
    }

    fn slot(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = |slot: &Slot| {
            address.checked_sub(slot.start).filter(|offset| *offset < layout::MMIO_BYTES)
        };
        self.slots.iter().find_map(|slot| Some((slot, offset(slot)?)))
    }
}

impl Slot {
    /// Places a device in its window; KVM signals an ioeventfd for each notification, and interrupts the
    /// guest when the irqfd is written.
    pub(crate) fn new(
        number: u32,
        mut device: Box<dyn Device>,
        vm: &VmFd,
        memory: &MachineMemory,
    ) -> Result<Self, Error> {
        let place = mmio_slot(number);
        let start = u64::from(place.start);
        let interrupt = new_eventfd()?;
        vm.register_irqfd(&interrupt, place.gsi).map_err(Error::kvm("registering an irqfd"))?;
        let mut notify_fds = Vec::new();
        for index in (0u32..).take(device.queues()) {
            let notify_fd = new_eventfd()?;
            let notify = IoEventAddress::Mmio(start + register::QUEUE_NOTIFY);
            vm.register_ioevent(&notify_fd, &notify, index)
                .map_err(Error::kvm("registering an ioeventfd"))?;
            notify_fds.push(notify_fd);
        }
        device.set_notify_fds(&notify_fds);
        let copies = notify_fds.iter().map(EventFd::try_clone).collect::<Result<_, _>>();
        let signals = EventFdInterrupts {
            interrupt,
            notify_fds: copies.map_err(Error::host::<io::Error>("dup"))?,
        };
        let transport = Transport::new(device, signals, memory.guest.clone())
            .map_err(Error::memory("creating virtqueues"))?;
        Ok(Self {
            start,
            transport: Mutex::new(transport),
            notify_fds,
            resume_pending: AtomicBool::new(false),
        })
    }

    /// Locks the transport. If a thread panicked with the lock held, the device's state is
    /// unreliable: it sets DEVICE_NEEDS_RESET, as after an invalid vring, and the guest continues.
    pub(crate) fn transport(&self) -> MutexGuard<'_, Transport<EventFdInterrupts>> {
        self.locked(self.transport.lock())
    }

    fn locked<'a>(
        &self,
        lock: LockResult<MutexGuard<'a, Transport<EventFdInterrupts>>>,
    ) -> MutexGuard<'a, Transport<EventFdInterrupts>> {
        let mut transport = lock.unwrap_or_else(|poisoned| {
            self.transport.clear_poison();
            let mut transport = poisoned.into_inner();
            transport.fail();
            tracing::error!(start = self.start, "host: a device failed and needs a reset");
            transport
        });
        if self.resume_pending.swap(false, Ordering::AcqRel) {
            transport.resume();
        }
        transport
    }
}

/// The MMIO window and interrupt of device `number`.
pub(crate) fn mmio_slot(number: u32) -> MmioSlot {
    let start = layout::MMIO_START + u64::from(number) * layout::MMIO_BYTES;
    MmioSlot {
        // Cannot fail: the hole is below 4 GiB and fits more devices than there are interrupts.
        start: u32::try_from(start).unwrap_or(u32::MAX),
        gsi: layout::FIRST_DEVICE_GSI + number,
    }
}

pub(crate) fn new_eventfd() -> Result<EventFd, Error> {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    EventFd::new(flags.bits().cast_signed()).map_err(Error::host::<io::Error>("eventfd"))
}
