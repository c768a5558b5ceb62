//! A guest from its first instruction to its last.

mod stop;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LockResult, Mutex, MutexGuard};
use std::time::Duration;

use balloon_device::RequestFailure;
use balloon_host::{HostReclaim, Shared};
use control::Server;
use diagnostics::{contain, panic_point};
use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use rustix::event::EventfdFlags;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self, MmioSlot};
use crate::balloon::VirtioBalloon;
use crate::block::{Block, DiskFile, MAX_DISKS};
use crate::boot::Boot;
use crate::console::Console;
use crate::console::output::standard_output;
use crate::controller::{ControlApi, MigrationController};
use crate::cpu;
use crate::cpuid::Template;
use crate::error::{Error, OPENING_KVM};
use crate::firmware;
use crate::generation;
use crate::kvm::Vm;
use crate::layout;
use crate::memory::MachineMemory;
use crate::mmio::{Device, Interrupts, Transport, register};
use crate::options::RunOptions;
use crate::ports::{Ports, Request};
use crate::signals::Signals;
use crate::vcpu::Processors;
pub(crate) use stop::PAUSE_TIME;
use stop::end_console;

/// How a guest ended without anybody's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It switched itself off.
    PoweredOff,
    /// It asked for a reset, which this monitor leaves to whoever started it.
    Reset,
    /// Its kernel panicked, said so, and then asked for either.
    Panicked,
    /// It was moved, and runs on another host.
    Moved,
    /// This process was asked to end (SIGTERM, SIGINT, or at the terminal).
    Stopped,
}

/// Runs the guest to its end. SIGUSR1 pauses it, SIGUSR2 lets it go on; its balloon can be asked
/// meanwhile.
///
/// # Errors
/// What is wrong with the options, or with the host; and a processor of the guest that stops for
/// good.
pub fn run(options: &RunOptions) -> Result<End, Error> {
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let machine = Machine::new(options, standard_output().map_err(Error::host("dup"))?)?;
    machine.take_new_disks()?;
    machine.load_kernel(options)?;
    let machine = Arc::new(machine);
    let controller = MigrationController::new(Some(Arc::clone(&machine)));
    requests.take_stop();
    let _control =
        Server::bind_monitor(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
    tracing::info!(
        name = options.host.name,
        cpus = options.cpus,
        memory_mib = options.memory_bytes >> 20,
        "booting"
    );
    controller.start_guest(&machine)?;
    serve_to_end(&machine, &controller, &requests)
}

/// Serves a guest that runs, until it ends or has left.
pub(crate) fn serve_to_end(
    machine: &Arc<Machine>,
    controller: &Arc<MigrationController>,
    requests: &Signals,
) -> Result<End, Error> {
    controller.ends_by(requests.stopper());
    // The guest runs, and goes on without what is typed.
    let console = Console::start(&machine.bus, requests.asker());
    let _console = console.inspect_err(|error| tracing::error!(%error, "nothing can be typed"));
    let end = machine.serve_with(requests, &|pause| controller.operator_pauses(machine, pause));
    let has_moved = controller.end(requests.ending());
    end_console(machine, requests.ending());
    if has_moved { Ok(End::Moved) } else { end }
}

/// Everything that the guest's processors can reach besides memory.
pub(crate) struct Bus {
    pub(crate) ports: Ports,
    pub(crate) slots: Vec<Slot>,
}

/// A virtio-mmio device in its window.
pub(crate) struct Slot {
    start: u64,
    transport: Mutex<Transport<EventFdInterrupts>>,
    kicks: Vec<EventFd>,
    /// It was to come to a stop, which came to nothing when somebody else had its registers: it is
    /// to go on as soon as they can be had.
    is_to_go_on: AtomicBool,
}

/// Event files: to the guest by KVM, to the device by this process's loop.
pub(crate) struct EventFdInterrupts {
    interrupt: EventFd,
    kicks: Vec<EventFd>,
}

impl Interrupts for EventFdInterrupts {
    fn raise(&self) {
        if let Err(error) = self.interrupt.write(1) {
            tracing::error!(%error, "host: cannot interrupt the guest");
        }
    }

    fn kick(&self, index: usize) {
        // A file that is full is readable, and that is all there is to say.
        let _ = self.kicks.get(index).map(|kick| kick.write(1));
    }
}

impl Bus {
    /// The guest reads where no memory is; where nobody is either, it reads ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.transport().read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes where no memory is.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            slot.transport().write(offset, data);
        }
    }

    /// Serves what is to be served without a notification.
    fn poll_timers(&self, woken: bool) {
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
    /// Places a device; KVM turns notifications and interrupts into event files by itself.
    fn new(
        number: u32,
        mut device: Box<dyn Device>,
        vm: &VmFd,
        memory: &MachineMemory,
    ) -> Result<Self, Error> {
        let place = mmio_slot(number);
        let start = u64::from(place.start);
        let interrupt = event_file()?;
        vm.register_irqfd(&interrupt, place.gsi).map_err(Error::kvm("making an interrupt"))?;
        let mut kicks = Vec::new();
        for index in (0u32..).take(device.queues()) {
            let kick = event_file()?;
            let notify = IoEventAddress::Mmio(start + register::QUEUE_NOTIFY);
            vm.register_ioevent(&kick, &notify, index)
                .map_err(Error::kvm("making a notification"))?;
            kicks.push(kick);
        }
        device.set_kicks(&kicks);
        let copies = kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>();
        let signals = EventFdInterrupts {
            interrupt,
            kicks: copies.map_err(Error::host::<io::Error>("dup"))?,
        };
        let transport = Transport::new(device, signals, memory.guest.clone())
            .map_err(Error::memory("making queues"))?;
        Ok(Self {
            start,
            transport: Mutex::new(transport),
            kicks,
            is_to_go_on: AtomicBool::new(false),
        })
    }

    /// A thread that panicked with the lock held has left a device that nobody can rely on: its
    /// driver has to reset it. The guest goes on, as after a ring that makes no sense.
    pub(crate) fn transport(&self) -> MutexGuard<'_, Transport<EventFdInterrupts>> {
        self.had(self.transport.lock())
    }

    fn had<'a>(
        &self,
        lock: LockResult<MutexGuard<'a, Transport<EventFdInterrupts>>>,
    ) -> MutexGuard<'a, Transport<EventFdInterrupts>> {
        let mut transport = lock.unwrap_or_else(|poisoned| {
            self.transport.clear_poison();
            let mut transport = poisoned.into_inner();
            transport.fail();
            tracing::error!(start = self.start, "host: a device failed, and waits for a reset");
            transport
        });
        if self.is_to_go_on.swap(false, Ordering::AcqRel) {
            transport.resume();
        }
        transport
    }
}

/// Where device `number` is.
fn mmio_slot(number: u32) -> MmioSlot {
    let start = layout::MMIO_START + u64::from(number) * layout::MMIO_BYTES;
    MmioSlot {
        // Cannot fail: the hole is below 4 GiB and has room for more devices than interrupts.
        start: u32::try_from(start).unwrap_or(u32::MAX),
        gsi: layout::FIRST_DEVICE_GSI + number,
    }
}

fn event_file() -> Result<EventFd, Error> {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    EventFd::new(flags.bits().cast_signed()).map_err(Error::host::<io::Error>("eventfd"))
}

/// A guest, which stands still until it is [resumed](Self::resume).
pub struct Machine {
    pub(crate) bus: Arc<Bus>,
    pub(crate) balloon: Arc<Shared>,
    pub(crate) disks: Vec<Arc<DiskFile>>,
    /// A sync of them is under way.
    pub(crate) syncing: Arc<AtomicBool>,
    pub(crate) processors: Processors,
    pub(crate) memory: MachineMemory,
    pub(crate) vm: Arc<Vm>,
    /// Model-specific registers that KVM knows.
    pub(crate) msrs: Vec<u32>,
    /// Interrupts the guest to tell of an event of the machine (`generation`).
    pub(crate) event: EventFd,
    /// How it was made.
    pub(crate) options: RunOptions,
    /// What each of the guest's processors answers to CPUID, from the guest's birth on. Not asked
    /// of KVM: after a state was loaded some KVMs answer with what the host's processor can do.
    pub(crate) cpuid: Mutex<Vec<CpuId>>,
}

impl Machine {
    /// A machine with nothing in its memory. Its serial line writes to `output`.
    ///
    /// # Errors
    /// What is wrong with the options, or with the host.
    pub fn new(options: &RunOptions, output: Box<dyn io::Write + Send>) -> Result<Self, Error> {
        if !(1..=layout::MAX_CPUS).contains(&options.cpus) {
            let what = format!("a guest can have 1 to {} processors", layout::MAX_CPUS);
            return Err(Error::Option { what });
        }
        if options.host.disks.len() > MAX_DISKS {
            let what = format!("a guest can have {MAX_DISKS} disks");
            return Err(Error::Option { what });
        }
        let disks = crate::disks::open(&options.host.disks)?;
        let memory = MachineMemory::new(options.memory_bytes, options.host.memory)?;
        let kvm = Kvm::new().map_err(Error::kvm(OPENING_KVM))?;
        let fd = kvm.create_vm().map_err(Error::kvm("making a virtual machine"))?;
        fd.set_tss_address(layout::TSS).map_err(Error::kvm("placing the TSS"))?;
        fd.create_irq_chip().map_err(Error::kvm("making interrupt controllers"))?;
        let vm = Arc::new(Vm::new(fd, &memory.guest)?);

        let balloon = balloon(options, &memory)?;
        let device = Box::new(VirtioBalloon::new(Arc::clone(&balloon)));
        let mut slots = vec![Slot::new(0, device, vm.fd(), &memory)?];
        for ((number, disk), slot) in disks.iter().enumerate().zip(1..) {
            let device = Box::new(Block::new(disk, number, memory.guest.clone())?);
            slots.push(Slot::new(slot, device, vm.fd(), &memory)?);
        }
        let [serial, event] = [layout::SERIAL_GSI, layout::EVENT_GSI].map(|gsi| {
            let file = event_file()?;
            let made = vm.fd().register_irqfd(&file, gsi);
            made.map_err(Error::kvm("making an interrupt")).map(|()| file)
        });
        let (serial, event) = (serial?, event?);
        let ports = Ports::new(serial, output).map_err(Error::host("dup"))?;
        let bus = Arc::new(Bus { ports, slots });
        let template = Template::new(&kvm, vm.fd(), options.nested)?;
        let cpuid: Vec<_> =
            (0..options.cpus).map(|cpu| template.of_processor(cpu, options.cpus)).collect();
        let processors = make_processors(&cpuid, vm.fd())?;
        let processors = Processors::new(processors, &bus, &vm)?;
        let msrs = kvm.get_msr_index_list().map_err(Error::kvm("asking for registers"))?;
        let msrs = msrs.as_slice().to_vec();
        let cpuid = Mutex::new(cpuid);
        let options = options.clone();
        let syncing = Arc::default();
        Ok(Self {
            bus,
            balloon,
            disks,
            syncing,
            processors,
            memory,
            vm,
            msrs,
            event,
            options,
            cpuid,
        })
    }

    /// Puts a kernel, and what firmware would have left, into the memory of a new machine.
    ///
    /// # Errors
    /// The kernel cannot be booted, or does not fit.
    pub fn load_kernel(&self, options: &RunOptions) -> Result<(), Error> {
        let places: Vec<_> = (0..).take(self.bus.slots.len()).map(mmio_slot).collect();
        let tables = acpi::tables(self.options.cpus, &places);
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
        self.processors.pause(PAUSE_TIME)?;
        let enter = |number, fd: &VcpuFd| match number {
            0 => cpu::enter(fd, entry, &memory.guest),
            _ => Ok(()),
        };
        self.processors.each(enter).map(drop)
    }

    /// Serves the guest's devices until it ends, or is to end. Others may pause and resume the
    /// guest meanwhile.
    ///
    /// # Errors
    /// The host fails, or a processor of the guest stops for good.
    pub fn serve(&self, requests: &Signals) -> Result<End, Error> {
        self.serve_with(requests, &|pause| {
            if !pause {
                self.resume();
            } else if let Err(error) = self.pause() {
                tracing::error!(%error, "the guest is not paused");
            }
        })
    }

    /// The same; `change` is called for an operator who pauses the guest, or resumes it.
    pub(crate) fn serve_with(&self, requests: &Signals, change: Change<'_>) -> Result<End, Error> {
        let poll = self.watch(requests).map_err(Error::host("epoll"))?;
        self.balloon.set_connected(true);
        let end = self.serve_events(&poll, requests, change);
        self.come_to_an_end(requests.ending());
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
        add(&requests.ending().told(), EVENT_STOP)?;
        add(&requests.pause, EVENT_PAUSE)?;
        add(&requests.resume, EVENT_RESUME)?;
        add(self.balloon.wake(), EVENT_WAKE)?;
        add(self.processors.ended(), EVENT_ENDED)?;
        for (slot, place) in (0u64..).zip(&self.bus.slots) {
            for (index, kick) in (0u64..).zip(&place.kicks) {
                add(kick, slot << SLOT_SHIFT | index)?;
            }
        }
        Ok(poll)
    }

    /// `None` where this process is to end.
    fn serve_events(
        &self,
        poll: &Epoll,
        requests: &Signals,
        change: Change<'_>,
    ) -> Result<Option<Request>, Error> {
        let mut events = vec![EpollEvent::default(); EVENTS_AT_ONCE];
        let mut panics = 0;
        loop {
            match contain(|| self.serve_once(poll, (requests, change), &mut events)) {
                Ok(Ok(Turn::More)) => {}
                Ok(Ok(Turn::Stop)) => return Ok(None),
                Ok(Ok(Turn::Ended(request))) => return Ok(Some(request)),
                Ok(Err(error)) => return Err(error),
                // The device that it was about waits for a reset, and the others go on.
                Err(_) if panics < MAX_PANICS => panics += 1,
                Err(panicked) => {
                    let source = io::Error::other(panicked);
                    return Err(Error::host("serving the guest's devices")(source));
                }
            }
        }
    }

    /// Waits for what is to be served, and serves it.
    fn serve_once(
        &self,
        poll: &Epoll,
        (requests, change): (&Signals, Change<'_>),
        events: &mut [EpollEvent],
    ) -> Result<Turn, Error> {
        let due = self.bus.slots.iter().filter_map(|slot| slot.transport().until_due());
        let timeout = due.chain(self.processors.until_call()).min();
        let count = match poll.wait(timeout.map_or(-1, whole_ms), events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(Error::host("epoll_wait")(error)),
        };
        self.bus.poll_timers(false);
        if self.processors.until_call().is_some() {
            self.processors.call();
        }
        for event in events.iter().take(count) {
            match event.data() {
                EVENT_STOP => return Ok(Turn::Stop),
                EVENT_ENDED => {
                    if let Some(end) = self.processors.take_end() {
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
                kick => self.kicked(kick),
            }
        }
        Ok(Turn::More)
    }

    /// Has the loop look what is to be served.
    pub(crate) fn wake_loop(&self) {
        // A file that is full is readable.
        let _ = rustix::io::write(self.balloon.wake(), &1u64.to_ne_bytes());
    }

    /// The guest runs.
    pub fn resume(&self) {
        self.balloon.stay();
        self.bus.slots.iter().for_each(|slot| slot.transport().resume());
        self.processors.resume();
    }

    /// The guest's processors come to a stop soon, and nobody lets them go on.
    pub(crate) fn halt(&self) {
        self.processors.halt();
    }

    /// A processor has ended the guest.
    pub(crate) fn has_ended(&self) -> bool {
        self.processors.have_ended()
    }

    fn kicked(&self, data: u64) {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let (slot, index) = (number(data >> SLOT_SHIFT), number(data & ((1 << SLOT_SHIFT) - 1)));
        let Some(slot) = self.bus.slots.get(slot) else { return };
        let Some(kick) = slot.kicks.get(index) else { return };
        // Several notifications come as one, with their number.
        let count = kick.read().unwrap_or(0);
        if slot.transport().notified(index, count) {
            // The others first.
            let _ = kick.write(1);
        }
    }
}

/// Pauses the guest for its operator (true), or resumes it.
type Change<'a> = &'a dyn Fn(bool);

/// What came of looking once what is to be served.
enum Turn {
    More,
    /// This process is to end.
    Stop,
    /// The guest has ended.
    Ended(Request),
}

/// Panics of the loop after which it is given up: a fault that comes again at each turn would keep
/// a processor busy and serve nobody.
const MAX_PANICS: u32 = 16;

/// A millisecond more than nothing, so that what is due then is due when the wait is over.
fn whole_ms(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// Events taken from the kernel at once; those beyond come next time.
const EVENTS_AT_ONCE: usize = 16;

/// Events other than notifications, whose data is the slot's and the queue's number.
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

/// As many as there are answers to CPUID.
fn make_processors(cpuid: &[CpuId], vm: &VmFd) -> Result<Vec<VcpuFd>, Error> {
    let mut processors = Vec::new();
    for (number, leaves) in (0..).zip(cpuid) {
        let fd = vm.create_vcpu(number).map_err(Error::kvm("making a processor"))?;
        fd.set_cpuid2(leaves).map_err(Error::kvm("describing a processor"))?;
        cpu::set_msrs(&fd)?;
        processors.push(fd);
    }
    Ok(processors)
}
