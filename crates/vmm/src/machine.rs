//! The virtual machine: creates it, boots it, and serves its devices until the guest ends.

mod stop;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use balloon_device::RequestFailure;
use balloon_host::{HostReclaim, Shared};
use diagnostics::{contain, panic_point};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self};
use crate::balloon::VirtioBalloon;
use crate::block::{Block, DiskFile, MAX_DISKS};
use crate::boot::Boot;
use crate::bus::{Bus, Slot, mmio_slot, new_eventfd};
use crate::cpu;
use crate::cpuid::Template;
use crate::error::{Error, OPENING_KVM};
use crate::firmware;
use crate::generation;
use crate::kvm::Vm;
use crate::layout;
use crate::memory::MachineMemory;
use crate::options::RunOptions;
use crate::ports::{Ports, Request};
use crate::signals::Signals;
use crate::vcpu::Vcpus;
pub(crate) use stop::PAUSE_TIMEOUT;

/// How a guest ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest requested a reset. The VMM exits instead; its caller may start it again.
    Reset,
    /// The guest's kernel reported a panic, then requested a power-off or reset.
    Panicked,
    /// The guest was migrated and runs on another host.
    Moved,
    /// This process was stopped (SIGTERM, SIGINT, or the terminal's escape sequence).
    Stopped,
}

/// A virtual machine. It is paused until it is [resumed](Self::resume).
pub struct Machine {
    pub(crate) bus: Arc<Bus>,
    pub(crate) balloon: Arc<Shared>,
    pub(crate) disks: Vec<Arc<DiskFile>>,
    /// A sync of the disks is in progress.
    pub(crate) syncing: Arc<AtomicBool>,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MachineMemory,
    pub(crate) vm: Arc<Vm>,
    /// Model-specific registers that KVM supports.
    pub(crate) msrs: Vec<u32>,
    /// Interrupts the guest to report a change of the VM generation ID (`generation`).
    pub(crate) event: EventFd,
    /// The options that created the machine.
    pub(crate) options: RunOptions,
    /// The CPUID leaves of each vCPU, fixed when the guest boots. Not read back from KVM: after a
    /// state was loaded, some KVM versions return the features of the host's CPU.
    pub(crate) cpuid: Mutex<Vec<CpuId>>,
}

impl Machine {
    /// Creates a machine with empty memory. Its serial port writes to `output`.
    ///
    /// # Errors
    /// The options are invalid, or the host fails.
    pub fn new(options: &RunOptions, output: Box<dyn io::Write + Send>) -> Result<Self, Error> {
        if !(1..=layout::MAX_CPUS).contains(&options.cpus) {
            let what = format!("a guest can have 1 to {} vCPUs", layout::MAX_CPUS);
            return Err(Error::Option { what });
        }
        if options.host.disks.len() > MAX_DISKS {
            let what = format!("a guest can have at most {MAX_DISKS} disks");
            return Err(Error::Option { what });
        }
        let disks = crate::disk_reads::open(&options.host.disks)?;
        let memory = MachineMemory::new(options.memory_bytes, options.host.memory)?;
        let kvm = Kvm::new().map_err(Error::kvm(OPENING_KVM))?;
        let fd = kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?;
        fd.set_tss_address(layout::TSS).map_err(Error::kvm("placing the TSS"))?;
        fd.create_irq_chip().map_err(Error::kvm("creating the interrupt controllers"))?;
        let vm = Arc::new(Vm::new(fd, &memory.guest)?);

        let balloon = balloon(options, &memory)?;
        let device = Box::new(VirtioBalloon::new(Arc::clone(&balloon)));
        let mut slots = vec![Slot::new(0, device, vm.fd(), &memory)?];
        for ((number, disk), slot) in disks.iter().enumerate().zip(1..) {
            let device = Box::new(Block::new(disk, number, memory.guest.clone())?);
            slots.push(Slot::new(slot, device, vm.fd(), &memory)?);
        }
        let [serial, event] = [layout::SERIAL_GSI, layout::EVENT_GSI].map(|gsi| {
            let file = new_eventfd()?;
            let registered = vm.fd().register_irqfd(&file, gsi);
            registered.map_err(Error::kvm("registering an irqfd")).map(|()| file)
        });
        let (serial, event) = (serial?, event?);
        let ports = Ports::new(serial, output).map_err(Error::host("dup"))?;
        let bus = Arc::new(Bus { ports, slots });
        let template = Template::new(&kvm, vm.fd(), options.nested)?;
        let cpuid: Vec<_> =
            (0..options.cpus).map(|cpu| template.for_vcpu(cpu, options.cpus)).collect();
        let vcpus = create_vcpus(&cpuid, vm.fd())?;
        let vcpus = Vcpus::new(vcpus, &bus, &vm)?;
        let msrs = kvm.get_msr_index_list().map_err(Error::kvm("listing the MSRs"))?;
        let msrs = msrs.as_slice().to_vec();
        let cpuid = Mutex::new(cpuid);
        let options = options.clone();
        let syncing = Arc::default();
        Ok(Self { bus, balloon, disks, syncing, vcpus, memory, vm, msrs, event, options, cpuid })
    }

    /// Loads a kernel, and the tables that firmware would have left, into the memory of a new
    /// machine.
    ///
    /// # Errors
    /// The kernel cannot be booted, or does not fit.
    pub fn load_kernel(&self, options: &RunOptions) -> Result<(), Error> {
        let slots: Vec<_> = (0..).take(self.bus.slots.len()).map(mmio_slot).collect();
        let tables = acpi::tables(self.options.cpus, &slots);
        let memory = &self.memory;
        memory
            .guest
            .write_slice(&tables, GuestAddress(layout::ACPI_TABLES))
            .map_err(Error::memory("writing the ACPI tables"))?;
        firmware::write(&memory.guest)?;
        generation::write(&memory.guest)?;
        let boot = Boot {
            kernel: &options.kernel,
            initrd: options.initrd.as_deref(),
            command_line: &options.command_line,
            memory: &memory.guest,
            ranges: &memory.ranges,
        };
        let entry = boot.load()?;
        self.vcpus.pause(PAUSE_TIMEOUT)?;
        let enter = |number, fd: &VcpuFd| match number {
            0 => cpu::enter(fd, entry, &memory.guest),
            _ => Ok(()),
        };
        self.vcpus.each(enter).map(drop)
    }

    /// Serves the guest's devices until the guest ends or this process is stopped. Other threads
    /// may pause and resume the guest meanwhile.
    ///
    /// # Errors
    /// The host fails, or a vCPU stops with an error.
    pub fn serve(&self, requests: &Signals) -> Result<End, Error> {
        self.serve_with(requests, &|pause| {
            if !pause {
                self.resume();
            } else if let Err(error) = self.pause() {
                tracing::error!(%error, "cannot pause the guest");
            }
        })
    }

    /// As [`serve`](Self::serve), but calls `change` when the operator pauses or resumes the guest.
    pub(crate) fn serve_with(&self, requests: &Signals, change: Change<'_>) -> Result<End, Error> {
        let poll = self.watch(requests).map_err(Error::host("epoll"))?;
        self.balloon.set_connected(true);
        let end = self.serve_events(&poll, requests, change);
        self.stop(requests.ending());
        self.balloon.device().requests_mut().end_all(RequestFailure::HungUp);
        self.balloon.set_connected(false);
        match end? {
            None => Ok(End::Stopped),
            Some(_) if self.bus.ports.panicked() => Ok(End::Panicked),
            Some(Request::PowerOff) => Ok(End::PoweredOff),
            Some(Request::Reset) => Ok(End::Reset),
        }
    }

    fn watch(&self, requests: &Signals) -> io::Result<Epoll> {
        let poll = Epoll::new()?;
        let add = |file: &dyn AsRawFd, data: u64| {
            let event = EpollEvent::new(EventSet::IN, data);
            poll.ctl(ControlOperation::Add, file.as_raw_fd(), event)
        };
        add(&requests.ending().shutdown_fd(), EVENT_STOP)?;
        add(&requests.pause, EVENT_PAUSE)?;
        add(&requests.resume, EVENT_RESUME)?;
        add(self.balloon.wake(), EVENT_WAKE)?;
        add(self.vcpus.ended(), EVENT_ENDED)?;
        for (number, slot) in (0u64..).zip(&self.bus.slots) {
            for (index, notify_fd) in (0u64..).zip(&slot.notify_fds) {
                add(notify_fd, number << SLOT_SHIFT | index)?;
            }
        }
        Ok(poll)
    }

    /// Serves events; `None` if this process must stop.
    fn serve_events(
        &self,
        poll: &Epoll,
        requests: &Signals,
        change: Change<'_>,
    ) -> Result<Option<Request>, Error> {
        let mut events = vec![EpollEvent::default(); MAX_EVENTS];
        let mut panics = 0;
        loop {
            match contain(|| self.serve_once(poll, (requests, change), &mut events)) {
                Ok(Ok(Turn::More)) => {}
                Ok(Ok(Turn::Stop)) => return Ok(None),
                Ok(Ok(Turn::Ended(request))) => return Ok(Some(request)),
                Ok(Err(error)) => return Err(error),
                // The affected device needs a reset; the others continue.
                Err(_) if panics < MAX_PANICS => panics += 1,
                Err(panicked) => {
                    let source = io::Error::other(panicked);
                    return Err(Error::host("serving the guest's devices")(source));
                }
            }
        }
    }

    /// Waits for events once, and serves them.
    fn serve_once(
        &self,
        poll: &Epoll,
        (requests, change): (&Signals, Change<'_>),
        events: &mut [EpollEvent],
    ) -> Result<Turn, Error> {
        let due = self.bus.slots.iter().filter_map(|slot| slot.transport().until_due());
        let timeout = due.chain(self.vcpus.until_kick()).min();
        let count = match poll.wait(timeout.map_or(-1, ceil_ms), events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(Error::host("epoll_wait")(error)),
        };
        self.bus.poll_timers(false);
        if self.vcpus.until_kick().is_some() {
            self.vcpus.kick();
        }
        for event in events.iter().take(count) {
            match event.data() {
                EVENT_STOP => return Ok(Turn::Stop),
                EVENT_ENDED => {
                    if let Some(end) = self.vcpus.take_end() {
                        return end.map(Turn::Ended);
                    }
                }
                EVENT_WAKE => {
                    let _ = rustix::io::read(self.balloon.wake(), &mut [0; 8]);
                    panic_point("loop");
                    let slot = self.bus.slots.first();
                    if let Some(slot) = slot.filter(|_| self.balloon.take_config_changed()) {
                        slot.transport().config_changed();
                    }
                    self.bus.poll_timers(true);
                }
                EVENT_PAUSE => {
                    requests.pause.clear();
                    change(true);
                }
                EVENT_RESUME => {
                    requests.resume.clear();
                    change(false);
                }
                queue => self.queue_notified(queue),
            }
        }
        Ok(Turn::More)
    }

    /// Wakes the device loop, so that it polls all timers.
    pub(crate) fn wake_loop(&self) {
        // A full eventfd is readable.
        let _ = rustix::io::write(self.balloon.wake(), &1u64.to_ne_bytes());
    }

    /// Resumes the devices, then the vCPUs.
    pub fn resume(&self) {
        self.balloon.stay();
        self.bus.slots.iter().for_each(|slot| slot.transport().resume());
        self.vcpus.resume();
    }

    /// Pauses the vCPUs permanently, without waiting until they are paused.
    pub(crate) fn halt(&self) {
        self.vcpus.halt();
    }

    /// A vCPU has ended the guest.
    pub(crate) fn has_ended(&self) -> bool {
        self.vcpus.has_ended()
    }

    fn queue_notified(&self, data: u64) {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let (slot, index) = (number(data >> SLOT_SHIFT), number(data & ((1 << SLOT_SHIFT) - 1)));
        let Some(slot) = self.bus.slots.get(slot) else { return };
        let Some(notify_fd) = slot.notify_fds.get(index) else { return };
        // The eventfd counts the notifications since the last read.
        let count = notify_fd.read().unwrap_or(0);
        if slot.transport().notified(index, count) {
            // More is left; serve the other devices first.
            let _ = notify_fd.write(1);
        }
    }
}

/// Pauses (true) or resumes the guest for the operator.
type Change<'a> = &'a dyn Fn(bool);

/// The outcome of one turn of the device loop.
enum Turn {
    More,
    /// This process must stop.
    Stop,
    /// The guest has ended.
    Ended(Request),
}

/// Panics of the loop after which it fails: a panic at every turn would use up a CPU and serve
/// nothing.
const MAX_PANICS: u32 = 16;

/// Rounds up, so that a timer is due when the wait is over.
fn ceil_ms(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// Events per `epoll_wait`; the next call returns the rest.
const MAX_EVENTS: usize = 16;

/// A notification's epoll data is the numbers of its slot and queue; the other events follow.
const SLOT_SHIFT: u32 = 16;
const EVENT_STOP: u64 = 1 << 48;
const EVENT_WAKE: u64 = EVENT_STOP + 1;
const EVENT_ENDED: u64 = EVENT_STOP + 2;
const EVENT_PAUSE: u64 = EVENT_STOP + 3;
const EVENT_RESUME: u64 = EVENT_STOP + 4;

fn balloon(options: &RunOptions, memory: &MachineMemory) -> Result<Arc<Shared>, Error> {
    let mut reclaim = HostReclaim::new(options.host.release, options.host.partial_huge)?;
    reclaim.set_memory(memory.map.clone());
    let shared = Shared::new(options.host.name.clone(), reclaim)?.with_exits();
    let layout = balloon_device::MemoryLayout::new(memory.ranges.iter().copied())
        .map_err(Error::memory("describing"))?;
    shared.device().set_layout(layout);
    shared.device().withhold(options.without);
    Ok(Arc::new(shared))
}

/// Creates one vCPU for each set of CPUID leaves.
fn create_vcpus(cpuid: &[CpuId], vm: &VmFd) -> Result<Vec<VcpuFd>, Error> {
    let mut vcpus = Vec::new();
    for (number, leaves) in (0..).zip(cpuid) {
        let fd = vm.create_vcpu(number).map_err(Error::kvm("creating a vCPU"))?;
        fd.set_cpuid2(leaves).map_err(Error::kvm("setting a vCPU's CPUID"))?;
        cpu::set_msrs(&fd)?;
        vcpus.push(fd);
    }
    Ok(vcpus)
}
