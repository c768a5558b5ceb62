//! The vCPUs: one thread each. They run, pause and stop together.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use diagnostics::{Panicked, contain, panic_point};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::error::Error;
use crate::kvm::Vm;
use crate::layout;
use crate::ports::Request;
use crate::throttle::Throttle;

/// A vCPU that does not leave the guest is kicked again after this time: a signal that arrives just
/// before `KVM_RUN` is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// How long the end of a guest waits for its vCPU threads. A vCPU leaves the guest within
/// microseconds unless it waits for a device or for a page that does not arrive.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Stack of a vCPU thread. The default of 2 MiB would be a huge page on a host with transparent
/// huge pages set to `always`, which the kernel clears when it creates the thread.
const STACK_BYTES: usize = 512 << 10;

/// All vCPUs of a guest. Dropping them stops them.
pub(crate) struct Vcpus {
    group: Arc<Group>,
    threads: Vec<JoinHandle<()>>,
    fds: Vec<Arc<Mutex<VcpuFd>>>,
}

/// What the threads share.
struct Group {
    state: Mutex<State>,
    changed: Condvar,
    ended: EventFd,
    throttle: Throttle,
    /// Where each vCPU is, encoded as [`Place`], for the error of a pause that times out.
    places: Vec<AtomicU64>,
}

#[derive(Default)]
struct State {
    requested: RunState,
    /// The vCPUs stay paused, whatever is requested.
    halted: bool,
    /// Threads that have left the guest and wait, and threads that have ended.
    parked: usize,
    exited: usize,
    end: Option<Result<Request, Error>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum RunState {
    Run,
    #[default]
    Pause,
    Stop,
}

struct Vcpu {
    /// Locked by the thread while it is not parked.
    fd: Arc<Mutex<VcpuFd>>,
    number: u8,
    bus: Arc<Bus>,
    group: Arc<Group>,
    /// When it was last throttled, or began to run.
    ran_since: Instant,
    /// Keeps the guest's memory mapped where KVM expects it.
    _vm: Arc<Vm>,
}

/// The outcome of one `KVM_RUN`.
enum Step {
    /// The exit was served.
    Served,
    /// A kick interrupted it, or it waits for its startup IPI.
    Interrupted,
    /// The guest has ended.
    Ended(Result<Request, Error>),
}

/// What a vCPU does next.
enum RunDecision {
    Run,
    /// It must stop.
    Stop,
    /// The exit that it completed ends the guest.
    Ended(Result<Request, Error>),
}

/// The outcome of one turn of a vCPU's loop.
enum Turn {
    More,
    /// It must stop.
    Stop,
    Ended(Result<Request, Error>),
}

/// Panics after which a vCPU, and so the guest, fails: a guest whose every device access panics is
/// of no use.
const MAX_PANICS: u32 = 16;

impl Vcpus {
    /// Starts a thread for each vCPU; they wait until [`resume`](Self::resume).
    pub(crate) fn new(vcpus: Vec<VcpuFd>, bus: &Arc<Bus>, vm: &Arc<Vm>) -> Result<Self, Error> {
        // The handler does nothing: the signal only has to interrupt `KVM_RUN`.
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|error| Error::host("signal handling")(std::io::Error::from(error)))?;
        let state = State::default();
        let ended = EventFd::new(rustix::event::EventfdFlags::NONBLOCK.bits().cast_signed())
            .map_err(Error::host::<std::io::Error>("eventfd"))?;
        let group = Arc::new(Group {
            state: Mutex::new(state),
            changed: Condvar::new(),
            ended,
            throttle: Throttle::default(),
            places: vcpus.iter().map(|_| AtomicU64::new(Place::PARKED)).collect(),
        });
        let mut all = Self { group, threads: Vec::new(), fds: Vec::new() };
        for (number, fd) in (0..).zip(vcpus) {
            let (bus, vm, group) = (Arc::clone(bus), Arc::clone(vm), Arc::clone(&all.group));
            let fd = Arc::new(Mutex::new(fd));
            all.fds.push(Arc::clone(&fd));
            let ran_since = Instant::now();
            let vcpu = Vcpu { fd, number, bus, group, ran_since, _vm: vm };
            let thread = thread::Builder::new()
                .name(format!("cpu{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || vcpu.run())
                .map_err(Error::host::<std::io::Error>("starting a thread"))?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Becomes readable when a vCPU has ended the guest.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.group.ended
    }

    /// Takes the guest's outcome, if it has ended.
    pub(crate) fn take_end(&self) -> Option<Result<Request, Error>> {
        self.group.state().end.take()
    }

    /// True if a vCPU thread has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.group.state().exited > 0
    }

    /// Runs all vCPUs, unless they were [halted](Self::halt).
    pub(crate) fn resume(&self) {
        self.group.state().resume();
        self.group.changed.notify_all();
    }

    /// Pauses all vCPUs: waits until each has left the guest and its last exit is complete.
    ///
    /// # Errors
    /// A vCPU does not pause in time; all vCPUs are resumed then, if they ran before.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), Error> {
        self.request(RunState::Pause, limit)
    }

    /// Pauses the vCPUs permanently, without waiting. A later [`resume`](Self::resume), for example
    /// by a migration, has no effect.
    pub(crate) fn halt(&self) {
        self.group.state().halt();
        self.group.changed.notify_all();
        self.kick();
    }

    /// Throttles each vCPU by `percent` of its time, 0 to 99.
    pub(crate) fn set_throttle(&self, percent: u8) {
        self.group.throttle.set(percent);
    }

    /// Time after which a vCPU that has not left the guest must be [kicked](Self::kick), if vCPUs
    /// are throttled.
    pub(crate) fn until_kick(&self) -> Option<Duration> {
        // Callers wait in whole milliseconds; less than one would be zero.
        self.group.throttle.run_time().map(|run_time| run_time.max(KICK_INTERVAL))
    }

    /// Forces each vCPU to leave the guest and check whether it must pause or is throttled.
    pub(crate) fn kick(&self) {
        for thread in &self.threads {
            // Fails for a thread that has ended, which needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// The number of vCPUs.
    pub(crate) const fn len(&self) -> usize {
        self.threads.len()
    }

    /// Calls `read` for each vCPU; none can run meanwhile.
    ///
    /// # Errors
    /// A vCPU has ended, they are not [paused](Self::pause), or `read` fails.
    pub(crate) fn each<T>(
        &self,
        mut read: impl FnMut(usize, &VcpuFd) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let state = self.group.state();
        if state.requested != RunState::Pause || state.parked != self.threads.len() {
            let what = "a guest that is not paused, or has ended".to_owned();
            return Err(Error::Unsupported { what });
        }
        self.fds.iter().enumerate().map(|(number, fd)| read(number, &locked(fd))).collect()
    }

    fn request(&self, requested: RunState, limit: Duration) -> Result<(), Error> {
        let began = Instant::now();
        let mut state = self.group.state();
        let before = std::mem::replace(&mut state.requested, requested);
        self.group.changed.notify_all();
        let is_done = |state: &State| match requested {
            RunState::Run => true,
            RunState::Pause => state.parked + state.exited == self.threads.len(),
            RunState::Stop => state.exited == self.threads.len(),
        };
        while !is_done(&state) {
            if began.elapsed() >= limit {
                // A guest must not run with some of its vCPUs paused.
                if before == RunState::Run {
                    state.resume();
                }
                self.group.changed.notify_all();
                drop(state);
                return Err(Error::Stuck { what: self.stuck(began.elapsed()) });
            }
            // A failed migration may have resumed the guest after all vCPUs had paused and before
            // this thread woke up.
            state.requested = requested;
            self.kick();
            let waited = self.group.changed.wait_timeout(state, KICK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The error text for vCPUs that do not pause: which, and where they are.
    fn stuck(&self, time: Duration) -> String {
        let places = self.group.places.iter().enumerate();
        let places = places.filter_map(|(number, place)| {
            let place = Place::of(place.load(Ordering::Relaxed))?;
            Some(format!("vCPU {number} is {place}"))
        });
        let places = places.collect::<Vec<_>>().join(", ");
        format!("the guest did not pause within {} ms: {places}", time.as_millis())
    }
}

/// Where a vCPU is that is not parked.
enum Place {
    Guest,
    Port,
    Register(u64),
}

impl Place {
    const PARKED: u64 = 0;
    const GUEST: u64 = 1;
    const PORT: u64 = 2;

    /// Any other word is the address of a device register.
    const fn of(word: u64) -> Option<Self> {
        match word {
            Self::PARKED => None,
            Self::GUEST => Some(Self::Guest),
            Self::PORT => Some(Self::Port),
            address => Some(Self::Register(address)),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest => f.write_str("in the guest or waiting for a page of its memory"),
            Self::Port => f.write_str("accessing an I/O port"),
            Self::Register(address) => {
                let device = address.saturating_sub(layout::MMIO_START) / layout::MMIO_BYTES;
                write!(
                    f,
                    "accessing a register of device {device} (0 is the balloon, 1 the first disk)"
                )
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Err(error) = self.request(RunState::Stop, STOP_TIMEOUT) {
            tracing::error!(%error, "vCPU threads do not stop; they end with the process");
            self.group.state().requested = RunState::Stop;
            return;
        }
        for thread in self.threads.drain(..) {
            // The panic hook has logged a panic; nothing is left to do.
            let _ = thread.join();
        }
    }
}

impl State {
    fn resume(&mut self) {
        if !self.halted {
            self.requested = RunState::Run;
        }
    }

    fn halt(&mut self) {
        self.halted = true;
        // `Stop` also ends the vCPUs.
        if self.requested != RunState::Stop {
            self.requested = RunState::Pause;
        }
    }
}

impl Group {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vcpu {
    fn run(mut self) {
        // Also counts a thread that panics, so that no other thread waits for it without end.
        let _count_ended = CountEnded(Arc::clone(&self.group));
        let mut panics = 0;
        loop {
            let turn = contain(|| self.turn());
            let turn = turn.or_else(|panicked| {
                panics += 1;
                self.survives(panicked, panics)
            });
            let end = match turn {
                Ok(Turn::More) => continue,
                Ok(Turn::Stop) => break,
                Ok(Turn::Ended(end)) => end,
                Err(panicked) => {
                    let source = std::io::Error::other(panicked);
                    Err(Error::host("running the guest")(source))
                }
            };
            let mut state = self.group.state();
            // The first outcome counts.
            state.end.get_or_insert(end);
            drop(state);
            let _ = self.group.ended.write(1);
            break;
        }
    }

    /// Waits while the guest is paused; else runs it until its next exit.
    fn turn(&mut self) -> Turn {
        match self.wait_to_run() {
            RunDecision::Stop => Turn::Stop,
            RunDecision::Ended(end) => Turn::Ended(end),
            RunDecision::Run => {
                self.throttle();
                match self.step() {
                    Step::Ended(end) => Turn::Ended(end),
                    Step::Served | Step::Interrupted => Turn::More,
                }
            }
        }
    }

    /// Continues after a panic, up to a limit. Only device code panics, and the device then needs a
    /// reset. The vCPU's state is in KVM and consistent: its access counts as served.
    fn survives(&self, panicked: Panicked, panics: u32) -> Result<Turn, Panicked> {
        if panics > MAX_PANICS {
            return Err(panicked);
        }
        locked(&self.fd).set_kvm_immediate_exit(0);
        Ok(Turn::More)
    }

    /// Sleeps if the vCPU is throttled, at most until the guest is paused.
    fn throttle(&mut self) {
        let now = Instant::now();
        let Some(time) = self.group.throttle.rest(self.ran_since, now) else { return };
        let end = now + time;
        let mut state = self.group.state();
        while state.requested == RunState::Run {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.group.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.ran_since = Instant::now();
    }

    /// Completes the last exit and waits while the guest is paused.
    fn wait_to_run(&mut self) -> RunDecision {
        let group = Arc::clone(&self.group);
        let mut state = group.state();
        if state.requested == RunState::Run {
            return RunDecision::Run;
        }
        drop(state);
        if let Some(end) = self.complete() {
            return RunDecision::Ended(end);
        }
        state = group.state();
        state.parked += 1;
        self.set_place(Place::PARKED);
        group.changed.notify_all();
        while state.requested == RunState::Pause {
            state = group.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        self.set_place(Place::GUEST);
        let runs = state.requested == RunState::Run;
        drop(state);
        if runs {
            // Keeps the guest's watchdog from taking the pause for a lock-up. Fails for a guest
            // that does not use kvmclock.
            let _ = locked(&self.fd).kvmclock_ctrl();
        }
        if runs { RunDecision::Run } else { RunDecision::Stop }
    }

    fn set_place(&self, place: u64) {
        if let Some(at) = self.group.places.get(usize::from(self.number)) {
            at.store(place, Ordering::Relaxed);
        }
    }

    /// Completes the last exit. KVM finishes a device access only on the next entry;
    /// `immediate_exit` makes one that runs no guest code (KVM's `api.rst`, `KVM_RUN`). An
    /// instruction with several accesses exits for each of them, and each next entry completes one.
    fn complete(&mut self) -> Option<Result<Request, Error>> {
        locked(&self.fd).set_kvm_immediate_exit(1);
        let end = loop {
            match self.step() {
                Step::Served => {}
                Step::Interrupted => break None,
                Step::Ended(end) => break Some(end),
            }
        };
        locked(&self.fd).set_kvm_immediate_exit(0);
        end
    }

    /// Runs the guest until its next exit, and serves that.
    fn step(&mut self) -> Step {
        self.set_place(Place::GUEST);
        let mut fd = locked(&self.fd);
        let why = match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.set_place(address);
                self.bus.read(address, data);
                return Step::Served;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.set_place(address);
                panic_point("processor");
                self.bus.write(address, data);
                return Step::Served;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.set_place(Place::PORT);
                self.bus.ports.read(port, data);
                return Step::Served;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.set_place(Place::PORT);
                let ends = self.bus.ports.write(port, data);
                return ends.map_or(Step::Served, |request| Step::Ended(Ok(request)));
            }
            Ok(VcpuExit::Intr) => return Step::Interrupted,
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(exit) => format!("{exit:?}"),
            Err(error) if is_interruption(error) => return Step::Interrupted,
            Err(error) => {
                return Step::Ended(Err(Error::kvm("running the guest")(error)));
            }
        };
        let at = fd.get_regs().map_or(0, |regs| regs.rip);
        let why = format!("{why}, at {at:#x}");
        Step::Ended(Err(Error::Vcpu { cpu: self.number, why }))
    }
}

/// Ignores poisoning: a thread that panics with a vCPU locked ends the guest.
fn locked(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a thread as ended, whatever ends it.
struct CountEnded(Arc<Group>);

impl Drop for CountEnded {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.exited += 1;
        if thread::panicking() {
            let source = std::io::Error::other("a vCPU thread panicked");
            state.end.get_or_insert(Err(Error::Host { what: "running the guest", source }));
            let _ = self.0.ended.write(1);
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

/// A signal arrived, or the vCPU waits for its startup IPI.
fn is_interruption(error: kvm_ioctls::Error) -> bool {
    let errno = Errno::from_raw_os_error(error.errno());
    errno == Errno::INTR || errno == Errno::AGAIN
}

/// Does nothing: see [`Vcpus::new`].
extern "C" fn on_kick(_number: i32, _info: *mut libc::siginfo_t, _context: *mut std::ffi::c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group without vCPUs: to it, a vCPU in the guest or parked is only a counter.
    fn vcpus() -> Vcpus {
        register_signal_handler(SIGRTMIN(), on_kick).unwrap();
        let group = Group {
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: EventFd::new(0).unwrap(),
            throttle: Throttle::default(),
            places: Vec::new(),
        };
        Vcpus { group: Arc::new(group), threads: Vec::new(), fds: Vec::new() }
    }

    /// The thread that paused the vCPUs may resume them after the guest has ended or its memory has
    /// become unreadable.
    #[test]
    fn resume_has_no_effect_on_halted_vcpus() {
        let vcpus = vcpus();
        vcpus.resume();
        assert_eq!(vcpus.group.state().requested, RunState::Run);
        vcpus.pause(Duration::ZERO).unwrap();
        vcpus.halt();
        vcpus.resume();
        assert_eq!(vcpus.group.state().requested, RunState::Pause);
    }

    /// A pause that times out resumes the vCPUs, unless they were halted meanwhile.
    #[test]
    fn a_pause_that_times_out_does_not_resume_halted_vcpus() {
        let mut vcpus = vcpus();
        // Runs until `end` is dropped, and never parks.
        let (end, ended) = std::sync::mpsc::channel::<()>();
        vcpus.threads.push(thread::spawn(move || ended.recv().unwrap_or_default()));
        let limit = KICK_INTERVAL * 20;
        vcpus.resume();
        vcpus.pause(limit).unwrap_err();
        assert_eq!(vcpus.group.state().requested, RunState::Run);
        thread::scope(|scope| {
            let pause = scope.spawn(|| vcpus.pause(limit));
            while vcpus.group.state().requested == RunState::Run {
                thread::yield_now();
            }
            vcpus.group.state().halt();
            pause.join().unwrap().unwrap_err();
        });
        assert_eq!(vcpus.group.state().requested, RunState::Pause);
        drop(end);
        // The thread has ended without counting itself.
        vcpus.group.state().exited = 1;
    }
}
