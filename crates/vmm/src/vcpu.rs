//! The guest's processors: a thread each, which run, pause and end together.

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

use crate::error::Error;
use crate::kvm::Vm;
use crate::layout;
use crate::machine::Bus;
use crate::ports::Request;
use crate::throttle::Throttle;

/// How often a processor that does not come out of the guest is called again: a signal that comes
/// just before it enters the guest is lost.
const CALL_AGAIN: Duration = Duration::from_millis(1);

/// How long the end of a guest waits for its processors. Each comes out within microseconds, but
/// where it waits for a device or a page that does not come.
const END_TIME: Duration = Duration::from_secs(1);

/// Stack of a processor's thread. The usual 2 MiB are a huge page where the system gives those to
/// everybody, which it clears when a guest is made.
const STACK_BYTES: usize = 512 << 10;

/// All processors of a guest. Dropping them stops them.
pub(crate) struct Processors {
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
    /// Where each processor is, as the words of [`Place`] have it: for whoever waits for one.
    places: Vec<AtomicU64>,
}

#[derive(Default)]
struct State {
    wanted: Wanted,
    /// Nobody lets them run any more, whatever is asked.
    halted: bool,
    /// Threads that are out of the guest and wait, and those that have ended.
    parked: usize,
    gone: usize,
    end: Option<Result<Request, Error>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    Run,
    #[default]
    Pause,
    Stop,
}

/// One processor.
struct Processor {
    /// Locked by the thread while it is not parked.
    fd: Arc<Mutex<VcpuFd>>,
    number: u8,
    bus: Arc<Bus>,
    group: Arc<Group>,
    /// When it rested last, if it has to.
    ran_since: Instant,
    /// Keeps the guest's memory where KVM knows it.
    _vm: Arc<Vm>,
}

/// What came of entering the guest once.
enum Step {
    /// It needed something, and has it.
    Served,
    /// It was called out, or waits to be woken for the first time.
    Interrupted,
    /// It has ended.
    Ended(Result<Request, Error>),
}

/// What a processor is to do.
enum Stand {
    Runs,
    /// Nobody wants it any more.
    Over,
    /// What it was doing ends the guest.
    Ended(Result<Request, Error>),
}

/// What came of one turn of its loop.
enum Turn {
    More,
    /// Nobody wants it any more.
    Over,
    Ended(Result<Request, Error>),
}

/// Panics after which a processor is given up, and the guest with it: one that comes again at each
/// access leaves no guest that anybody could use.
const MAX_PANICS: u32 = 16;

impl Processors {
    /// Makes threads for `processors`, which wait until they are [told to run](Self::resume).
    pub(crate) fn new(
        processors: Vec<VcpuFd>,
        bus: &Arc<Bus>,
        vm: &Arc<Vm>,
    ) -> Result<Self, Error> {
        // What matters of the signal is that it ends the system call which runs the guest.
        register_signal_handler(SIGRTMIN(), on_call)
            .map_err(|error| Error::host("signal handling")(std::io::Error::from(error)))?;
        let state = State::default();
        let ended = EventFd::new(rustix::event::EventfdFlags::NONBLOCK.bits().cast_signed())
            .map_err(Error::host::<std::io::Error>("eventfd"))?;
        let group = Arc::new(Group {
            state: Mutex::new(state),
            changed: Condvar::new(),
            ended,
            throttle: Throttle::default(),
            places: processors.iter().map(|_| AtomicU64::new(Place::PARKED)).collect(),
        });
        let mut all = Self { group, threads: Vec::new(), fds: Vec::new() };
        for (number, fd) in (0..).zip(processors) {
            let (bus, vm, group) = (Arc::clone(bus), Arc::clone(vm), Arc::clone(&all.group));
            let fd = Arc::new(Mutex::new(fd));
            all.fds.push(Arc::clone(&fd));
            let ran_since = Instant::now();
            let processor = Processor { fd, number, bus, group, ran_since, _vm: vm };
            let thread = thread::Builder::new()
                .name(format!("cpu{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || processor.run())
                .map_err(Error::host::<std::io::Error>("starting a thread"))?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Becomes readable when a processor has ended the guest.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.group.ended
    }

    /// How the guest ended, if it did.
    pub(crate) fn take_end(&self) -> Option<Result<Request, Error>> {
        self.group.state().end.take()
    }

    /// True where one will never run again.
    pub(crate) fn have_ended(&self) -> bool {
        self.group.state().gone > 0
    }

    /// Lets all processors run, unless they were [halted](Self::halt).
    pub(crate) fn resume(&self) {
        self.group.state().resume();
        self.group.changed.notify_all();
    }

    /// Returns when no processor is in the guest any more, and what each was doing is complete.
    ///
    /// # Errors
    /// One is not within the time; all go on then as before.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), Error> {
        self.want(Wanted::Pause, limit)
    }

    /// Has the processors pause for good, and does not wait until they do. A migration that is under
    /// way may not know of it: it lets nobody run.
    pub(crate) fn halt(&self) {
        self.group.state().halt();
        self.group.changed.notify_all();
        self.call();
    }

    /// Has each processor rest for `percent` of its time, 0 to 99.
    pub(crate) fn set_throttle(&self, percent: u8) {
        self.group.throttle.set(percent);
    }

    /// Time after which a processor that does not come out of the guest by itself has to be
    /// [called](Self::call), if any is to rest.
    pub(crate) fn until_call(&self) -> Option<Duration> {
        // Fewer milliseconds than one would be none to whoever waits.
        self.group.throttle.run_time().map(|run_time| run_time.max(CALL_AGAIN))
    }

    /// Has each processor come out of the guest, and look whether it is to rest.
    pub(crate) fn call(&self) {
        for thread in &self.threads {
            // A thread that has ended needs no call.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// How many there are.
    pub(crate) const fn len(&self) -> usize {
        self.threads.len()
    }

    /// Looks at each processor, none of which can run meanwhile.
    ///
    /// # Errors
    /// One has ended, or they are not [paused](Self::pause); and what `look` says.
    pub(crate) fn each<T>(
        &self,
        mut look: impl FnMut(usize, &VcpuFd) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let state = self.group.state();
        if state.wanted != Wanted::Pause || state.parked != self.threads.len() {
            let what = "a guest that is not paused, or has ended".to_owned();
            return Err(Error::Unsupported { what });
        }
        self.fds.iter().enumerate().map(|(number, fd)| look(number, &locked(fd))).collect()
    }

    fn want(&self, wanted: Wanted, limit: Duration) -> Result<(), Error> {
        let began = Instant::now();
        let mut state = self.group.state();
        let before = std::mem::replace(&mut state.wanted, wanted);
        self.group.changed.notify_all();
        let is_done = |state: &State| match wanted {
            Wanted::Run => true,
            Wanted::Pause => state.parked + state.gone == self.threads.len(),
            Wanted::Stop => state.gone == self.threads.len(),
        };
        while !is_done(&state) {
            if began.elapsed() >= limit {
                // Nobody shall wait for a guest of which a part stands still.
                if before == Wanted::Run {
                    state.resume();
                }
                self.group.changed.notify_all();
                drop(state);
                return Err(Error::Stuck { what: self.stuck(began.elapsed()) });
            }
            // Who failed to move the guest may have let it go on since, when all had come to a stop
            // and this thread had not looked yet.
            state.wanted = wanted;
            self.call();
            let waited = self.group.changed.wait_timeout(state, CALL_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Which processors do not come to a stop, and where they are.
    fn stuck(&self, time: Duration) -> String {
        let places = self.group.places.iter().enumerate();
        let places = places.filter_map(|(number, place)| {
            let place = Place::of(place.load(Ordering::Relaxed))?;
            Some(format!("processor {number} is {place}"))
        });
        let places = places.collect::<Vec<_>>().join(", ");
        format!("the guest did not come to a stop within {} ms: {places}", time.as_millis())
    }
}

/// Where a processor is that is not parked.
enum Place {
    Guest,
    Port,
    Register(u64),
}

impl Place {
    const PARKED: u64 = 0;
    const GUEST: u64 = 1;
    const PORT: u64 = 2;

    /// A register of a device by its address, which is none of the above.
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
            Self::Guest => f.write_str("in the guest, or waits for a page of its memory"),
            Self::Port => f.write_str("at an I/O port"),
            Self::Register(address) => {
                let device = address.saturating_sub(layout::MMIO_START) / layout::MMIO_BYTES;
                write!(f, "at a register of device {device} (0 is the balloon, 1 the first disk)")
            }
        }
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        if let Err(error) = self.want(Wanted::Stop, END_TIME) {
            tracing::error!(%error, "its threads are left to the end of the process");
            self.group.state().wanted = Wanted::Stop;
            return;
        }
        for thread in self.threads.drain(..) {
            // A panic has been printed by the hook, and there is nothing left to do.
            let _ = thread.join();
        }
    }
}

impl State {
    fn resume(&mut self) {
        if !self.halted {
            self.wanted = Wanted::Run;
        }
    }

    fn halt(&mut self) {
        self.halted = true;
        // Its threads end.
        if self.wanted != Wanted::Stop {
            self.wanted = Wanted::Pause;
        }
    }
}

impl Group {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Processor {
    fn run(mut self) {
        // Also told when this panics: who waits for it must not wait for ever.
        let _gone = Gone(Arc::clone(&self.group));
        let mut panics = 0;
        loop {
            let turn = contain(|| self.turn());
            let turn = turn.or_else(|panicked| {
                panics += 1;
                self.survives(panicked, panics)
            });
            let end = match turn {
                Ok(Turn::More) => continue,
                Ok(Turn::Over) => break,
                Ok(Turn::Ended(end)) => end,
                Err(panicked) => {
                    let source = std::io::Error::other(panicked);
                    Err(Error::host("running the guest")(source))
                }
            };
            let mut state = self.group.state();
            // The first end is the one that counts.
            state.end.get_or_insert(end);
            drop(state);
            let _ = self.group.ended.write(1);
            break;
        }
    }

    /// Waits while the guest is paused, else runs it until it needs something.
    fn turn(&mut self) -> Turn {
        match self.may_run() {
            Stand::Over => Turn::Over,
            Stand::Ended(end) => Turn::Ended(end),
            Stand::Runs => {
                self.rest();
                match self.step() {
                    Step::Ended(end) => Turn::Ended(end),
                    Step::Served | Step::Interrupted => Turn::More,
                }
            }
        }
    }

    /// What panics is a device, which waits for a reset then. The processor itself is KVM's, and
    /// whole: its access counts as served.
    fn survives(&self, panicked: Panicked, panics: u32) -> Result<Turn, Panicked> {
        if panics > MAX_PANICS {
            return Err(panicked);
        }
        locked(&self.fd).set_kvm_immediate_exit(0);
        Ok(Turn::More)
    }

    /// Rests where it has to, and no longer than the guest runs.
    fn rest(&mut self) {
        let now = Instant::now();
        let Some(time) = self.group.throttle.rest(self.ran_since, now) else { return };
        let end = now + time;
        let mut state = self.group.state();
        while state.wanted == Wanted::Run {
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

    /// Waits while the guest is paused.
    fn may_run(&mut self) -> Stand {
        let group = Arc::clone(&self.group);
        let mut state = group.state();
        if state.wanted == Wanted::Run {
            return Stand::Runs;
        }
        drop(state);
        if let Some(end) = self.complete() {
            return Stand::Ended(end);
        }
        state = group.state();
        state.parked += 1;
        self.is_at(Place::PARKED);
        group.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = group.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        self.is_at(Place::GUEST);
        let runs = state.wanted == Wanted::Run;
        drop(state);
        if runs {
            // The guest shall not take the pause for a lock-up. It may have no such clock.
            let _ = locked(&self.fd).kvmclock_ctrl();
        }
        if runs { Stand::Runs } else { Stand::Over }
    }

    fn is_at(&self, place: u64) {
        if let Some(at) = self.group.places.get(usize::from(self.number)) {
            at.store(place, Ordering::Relaxed);
        }
    }

    /// KVM finishes an access to a device only on the next entry; with this there is one that
    /// runs nothing of the guest (KVM's `api.rst`, `KVM_RUN`). An instruction that makes several
    /// accesses comes out for each, and the next entry takes each for served.
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

    /// Runs the guest until it needs something, and gives it that.
    fn step(&mut self) -> Step {
        self.is_at(Place::GUEST);
        let mut fd = locked(&self.fd);
        let why = match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.is_at(address);
                self.bus.read(address, data);
                return Step::Served;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.is_at(address);
                panic_point("processor");
                self.bus.write(address, data);
                return Step::Served;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.is_at(Place::PORT);
                self.bus.ports.read(port, data);
                return Step::Served;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.is_at(Place::PORT);
                let ends = self.bus.ports.write(port, data);
                return ends.map_or(Step::Served, |request| Step::Ended(Ok(request)));
            }
            Ok(VcpuExit::Intr) => return Step::Interrupted,
            Ok(VcpuExit::Shutdown) => "a fault while it handled a fault (triple fault)".to_owned(),
            Ok(exit) => format!("{exit:?}"),
            Err(error) if is_interruption(error) => return Step::Interrupted,
            Err(error) => {
                return Step::Ended(Err(Error::kvm("running the guest")(error)));
            }
        };
        let at = fd.get_regs().map_or(0, |regs| regs.rip);
        let why = format!("{why}, at {at:#x}");
        Step::Ended(Err(Error::Processor { cpu: self.number, why }))
    }
}

/// A thread that panicked with a processor locked has ended the guest.
fn locked(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a thread out, whatever ends it.
struct Gone(Arc<Group>);

impl Drop for Gone {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.gone += 1;
        if thread::panicking() {
            let source = std::io::Error::other("a processor's thread panicked");
            state.end.get_or_insert(Err(Error::Host { what: "running the guest", source }));
            let _ = self.0.ended.write(1);
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

/// A signal came, or the processor waits to be woken for the first time.
fn is_interruption(error: kvm_ioctls::Error) -> bool {
    let errno = Errno::from_raw_os_error(error.errno());
    errno == Errno::INTR || errno == Errno::AGAIN
}

/// Does nothing: see [`Processors::new`].
extern "C" fn on_call(_number: i32, _info: *mut libc::siginfo_t, _context: *mut std::ffi::c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// No processor, which is all that is known of one that is in the guest or waits.
    fn processors() -> Processors {
        register_signal_handler(SIGRTMIN(), on_call).unwrap();
        let group = Group {
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: EventFd::new(0).unwrap(),
            throttle: Throttle::default(),
            places: Vec::new(),
        };
        Processors { group: Arc::new(group), threads: Vec::new(), fds: Vec::new() }
    }

    /// Who paused them for a moment may let them go on when the guest has ended meanwhile, or its
    /// memory cannot be read any more.
    #[test]
    fn nobody_lets_processors_run_that_are_halted() {
        let processors = processors();
        processors.resume();
        assert_eq!(processors.group.state().wanted, Wanted::Run);
        processors.pause(Duration::ZERO).unwrap();
        processors.halt();
        processors.resume();
        assert_eq!(processors.group.state().wanted, Wanted::Pause);
    }

    /// One that does not come to a stop in time goes on as before, but not if it was halted since.
    #[test]
    fn who_waits_in_vain_lets_nobody_run_that_is_halted() {
        let mut processors = processors();
        // It runs for as long as there is somebody to end it, and never parks.
        let (ends, ended) = std::sync::mpsc::channel::<()>();
        processors.threads.push(thread::spawn(move || ended.recv().unwrap_or_default()));
        let limit = CALL_AGAIN * 20;
        processors.resume();
        processors.pause(limit).unwrap_err();
        assert_eq!(processors.group.state().wanted, Wanted::Run);
        thread::scope(|scope| {
            let waits = scope.spawn(|| processors.pause(limit));
            while processors.group.state().wanted == Wanted::Run {
                thread::yield_now();
            }
            processors.group.state().halt();
            waits.join().unwrap().unwrap_err();
        });
        assert_eq!(processors.group.state().wanted, Wanted::Pause);
        drop(ends);
        // It has ended, and nobody has counted it.
        processors.group.state().gone = 1;
    }
}
