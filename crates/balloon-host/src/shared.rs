//! What the loop that serves the guest and the control API share: the device,
//! under a lock, and what is known around it.

mod hints;
mod keep;
mod stats;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use balloon_abi::Features;
use balloon_device::{BalloonDevice, Change};
use control::api::{
    BALLOON_PAGE_BYTES, BalloonChange, BalloonStatus, CancelledRequest, Direction, Driver, Faults,
    FreePageHints, GuestStatus, ReleaseMode, ReleaseStatus, ReportsStatus, StagesMs, StatsStatus,
    Status,
};
use control::{ControlError, FreePagesMap, GuestAnswer, GuestAsk};
use rustix::event::EventfdFlags;

use crate::HostError;
use crate::log_limit::LogLimit;
use crate::reclaim::{HostReclaim, Work};
use crate::requests::RequestTimes;
use crate::saved::{Saved, StateWriter};

/// How often a wait looks whether releasing in the background has come to its
/// end, which nobody announces.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// One guest's balloon.
pub struct Shared {
    name: String,
    started: Instant,
    state: Mutex<State>,
    pub(crate) changed: Condvar,
    wake: OwnedFd,
    log_limit: Mutex<LogLimit>,
    /// Counted only where the guest's monitor is this process.
    exits: Option<Exits>,
}

/// How often the guest left its processor because of the balloon.
#[derive(Default)]
struct Exits {
    all: AtomicU64,
    /// Of them, to notify.
    kicks: AtomicU64,
}

pub(crate) struct State {
    pub(crate) device: BalloonDevice<HostReclaim>,
    pub(crate) connected: bool,
    generation: u64,
    /// What was released before the present change began.
    baseline: Work,
    front_end_faults: BTreeMap<&'static str, u64>,
    /// How often the guest is asked for statistics, if it is.
    stats_interval: Option<Duration>,
    /// The configuration space has changed and the guest was not told yet.
    config_changed: bool,
    /// The guest may go on elsewhere, with a state that was taken already.
    leaving: bool,
    /// What a driver said, for when it goes on.
    saved: Saved,
    /// Where that is kept, if it is.
    writer: Option<Arc<StateWriter>>,
    /// When requests were submitted, and what became of the newest free pages.
    pub(crate) times: RequestTimes,
}

/// The device, locked.
pub struct DeviceGuard<'a>(MutexGuard<'a, State>);

impl std::ops::Deref for DeviceGuard<'_> {
    type Target = BalloonDevice<HostReclaim>;
    fn deref(&self) -> &Self::Target {
        &self.0.device
    }
}

impl std::ops::DerefMut for DeviceGuard<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0.device
    }
}

impl Shared {
    /// A balloon without a guest.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new(name: String, reclaim: HostReclaim) -> Result<Self, HostError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| HostError { what: "eventfd", source: e.into() })?;
        let state = State {
            device: BalloonDevice::new(reclaim),
            connected: false,
            generation: 0,
            baseline: Work::default(),
            front_end_faults: BTreeMap::new(),
            stats_interval: None,
            config_changed: false,
            leaving: false,
            saved: Saved::default(),
            writer: None,
            times: RequestTimes::default(),
        };
        Ok(Self {
            name,
            started: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
            log_limit: Mutex::default(),
            exits: None,
        })
    }

    /// The same for a monitor, which sees each time that the guest leaves its processor.
    #[must_use]
    pub fn with_exits(self) -> Self {
        Self { exits: Some(Exits::default()), ..self }
    }

    /// The guest left its processor so many times because of the balloon.
    pub fn count_exits(&self, count: u64) {
        if let Some(exits) = &self.exits {
            exits.all.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The same, to notify the balloon.
    pub fn count_kicks(&self, count: u64) {
        self.count_exits(count);
        if let Some(exits) = &self.exits {
            exits.kicks.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The device, locked.
    pub fn device(&self) -> DeviceGuard<'_> {
        DeviceGuard(self.state())
    }

    /// Wakes those who wait for a change of the balloon.
    pub fn changed(&self) {
        self.changed.notify_all();
    }

    /// A guest came or went.
    pub fn set_connected(&self, connected: bool) {
        self.state().connected = connected;
        self.changed();
    }

    /// Counts a fault of the monitor under this word.
    pub fn count_front_end_fault(&self, name: &'static str) {
        let mut state = self.state();
        let count = state.front_end_faults.entry(name).or_default();
        *count = count.saturating_add(1);
    }

    /// True where one more line about a peer's doing may go to the log.
    pub fn may_log(&self) -> bool {
        let mut limit = self.log_limit.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = limit.take(Instant::now());
        if let Some(lines @ 1..) = left_out {
            tracing::warn!(lines, "more happened than was logged; see the fault counters");
        }
        left_out.is_some()
    }

    /// True once for each change of the configuration space, or for many at once.
    pub fn take_config_changed(&self) -> bool {
        std::mem::take(&mut self.state().config_changed)
    }

    /// Has the loop look at what the operator wants.
    pub(crate) fn wake_up(&self) -> Result<(), ControlError> {
        let woken = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        woken.map(drop).map_err(|error| ControlError::Failed {
            what: format!("the balloon cannot be woken: {error}"),
            hint: "restart the back end of this guest".into(),
        })
    }

    /// Becomes readable when the operator wants something.
    pub const fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Has the loop tell the guest that the configuration space changed.
    fn announce(&self, mut state: MutexGuard<'_, State>) -> Result<(), ControlError> {
        state.config_changed = true;
        drop(state);
        self.wake_up()
    }

    /// A thread that panicked with the lock held has left counters behind, no
    /// half-made structure; the guest is worth more than a clean exit.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl control::BalloonControl for Shared {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn status(&self) -> Status {
        let state = self.state();
        let device = &state.device;
        let footprint = device.reclaim().footprint();
        let status = Status {
            name: self.name.clone(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            guest: state.guest(),
            balloon: state.balloon(),
            release: device.reclaim().status(),
            resident_bytes: None,
            exits: self.exits.as_ref().map(|exits| exits.all.load(Ordering::Relaxed)),
            kicks: self.exits.as_ref().map(|exits| exits.kicks.load(Ordering::Relaxed)),
            stats: state.stats(),
            reports: state.reports(),
            faults: state.faults(),
            requests: state.requests(),
        };
        // The guest is served while its memory is gone through.
        drop(state);
        Status { resident_bytes: footprint.resident_bytes(), ..status }
    }

    fn release(&self) -> ReleaseStatus {
        self.state().device.reclaim().status()
    }

    fn stats(&self) -> StatsStatus {
        self.state().stats()
    }

    fn set_target(&self, pages: u32) -> Result<u64, ControlError> {
        let mut state = self.state();
        if state.leaving {
            let what =
                "the guest is about to run elsewhere, where a target for it would not be known";
            let hint = "ask where it runs, as soon as `aerostat status` says where".to_owned();
            return Err(ControlError::Refused { what: what.to_owned(), hint });
        }
        let memory_pages = state.device.layout().pages();
        // Asked here once more: the guest may have come since the server asked.
        if memory_pages > 0 && u64::from(pages) > memory_pages {
            return Err(ControlError::TargetTooLarge {
                target_bytes: u64::from(pages) * BALLOON_PAGE_BYTES,
                max_bytes: memory_pages * BALLOON_PAGE_BYTES,
            });
        }
        if state.device.config().num_pages == pages {
            return Ok(state.generation);
        }
        state.baseline = state.device.reclaim().work();
        state.device.set_target(pages, Instant::now());
        state.saved.target = pages;
        let kept = self.save(&state);
        state.generation += 1;
        let generation = state.generation;
        self.announce(state)?;
        self.changed();
        // Without the lock: the guest is served meanwhile.
        if let Some(kept) = kept {
            kept.wait();
        }
        Ok(generation)
    }

    fn set_release_mode(&self, mode: ReleaseMode) -> Result<(), ControlError> {
        let change = self.state().device.reclaim().mode_changer();
        change(mode);
        Ok(())
    }

    fn set_stats_interval(&self, interval: Option<Duration>) -> Result<(), ControlError> {
        self.change_stats_interval(interval)
    }

    fn start_hints(&self) -> Result<u32, ControlError> {
        self.begin_hints()
    }

    fn wait_hints(&self, id: u32, timeout: Duration) -> FreePageHints {
        self.await_hints(id, timeout)
    }

    fn end_hints(&self, id: u32) -> Result<(), ControlError> {
        self.finish_hints(id)
    }

    fn submit(&self, ask: GuestAsk, timeout: Duration) -> Result<u32, ControlError> {
        self.submit_request(ask, timeout)
    }

    fn wait_request(
        &self,
        id: u32,
        timeout: Duration,
    ) -> Option<Result<GuestAnswer, ControlError>> {
        self.wait_for_request(id, timeout)
    }

    fn cancel_request(&self, id: Option<u32>) -> Result<CancelledRequest, ControlError> {
        self.cancel_one(id)
    }

    fn free_pages(&self) -> Option<FreePagesMap> {
        self.state().newest_free_pages()
    }

    fn wait_change(&self, generation: u64, timeout: Duration) -> BalloonStatus {
        let end = Instant::now().checked_add(timeout);
        let mut state = self.state();
        loop {
            let status = state.balloon();
            let now = Instant::now();
            if status.is_over(generation) || end.is_some_and(|end| now >= end) {
                return status;
            }
            let left = end.map_or(Duration::MAX, |end| end - now);
            // Only a guest that has reached its target leaves nothing but the
            // release to wait for; all else is announced.
            let reached = status.actual_pages == status.target_pages;
            let wait = if reached { left.min(SETTLE_LOOK) } else { left };
            let woken = self.changed.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn guest(&self) -> GuestStatus {
        let negotiated = self.device.negotiated();
        let driver = if negotiated == Features::NONE {
            Driver::None
        } else if negotiated.contains(Features::PAGE_BITMAP) {
            Driver::Aerostat
        } else {
            Driver::Classic
        };
        GuestStatus {
            connected: self.connected,
            driver,
            features: negotiated.names().map(str::to_owned).collect(),
            poison_val: negotiated
                .contains(Features::PAGE_POISON)
                .then_some(self.device.config().poison_val),
            memory_bytes: self.device.layout().pages() * BALLOON_PAGE_BYTES,
        }
    }

    fn balloon(&self) -> BalloonStatus {
        let config = self.device.config();
        let memory_pages = self.device.layout().pages();
        BalloonStatus {
            generation: self.generation,
            at_target: self.reached_at().is_some() || self.generation == 0,
            max_bytes: (memory_pages > 0).then_some(memory_pages * BALLOON_PAGE_BYTES),
            last_change: self.device.change().map(|change| self.change(change)),
            ..BalloonStatus::from_pages(config.num_pages, config.actual)
        }
    }

    /// When the guest had reached the target and the host had released all.
    fn reached_at(&self) -> Option<Instant> {
        let reached_at = self.device.change()?.reached_at()?;
        let released_at = self.device.reclaim().reached_at()?;
        Some(released_at.map_or(reached_at, |released_at| released_at.max(reached_at)))
    }

    fn change(&self, change: &Change) -> BalloonChange {
        let end = self.reached_at().unwrap_or_else(Instant::now);
        let work = self.device.reclaim().work().since(&self.baseline);
        let stages = change.stages(end, work.translate, work.release);
        let inflates = change.to_pages() >= change.from_pages();
        BalloonChange {
            direction: if inflates { Direction::Inflate } else { Direction::Deflate },
            from_pages: change.from_pages(),
            to_pages: change.to_pages(),
            wall_ms: ms(change.wall(end)),
            stages_ms: StagesMs {
                allocate: ms(stages.allocate),
                send: ms(stages.send),
                translate: ms(stages.translate),
                release: ms(stages.release),
            },
            messages: change.messages(),
            release_calls: work.calls,
            released_bytes: work.bytes,
        }
    }

    fn reports(&self) -> ReportsStatus {
        let reports = self.device.reports();
        ReportsStatus {
            messages: reports.messages,
            reported_bytes: reports.pages * BALLOON_PAGE_BYTES,
            poisoned_bytes: reports.poisoned_pages * BALLOON_PAGE_BYTES,
            ..self.device.reclaim().reports()
        }
    }

    fn faults(&self) -> Faults {
        let seen = self.device.faults().iter().filter(|(_, count)| *count > 0);
        let guest = seen.map(|(fault, count)| (fault.name().replace('-', "_"), count)).collect();
        let front_end = self
            .front_end_faults
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect();
        let mut host = self.device.reclaim().faults();
        // Of the whole process.
        let process = [
            ("thread_panicked", diagnostics::panics()),
            ("log_line_dropped", diagnostics::dropped_lines()),
        ];
        let seen = process.into_iter().filter(|(_, count)| *count > 0);
        host.extend(seen.map(|(name, count)| (name.to_owned(), count)));
        Faults { guest, front_end, host }
    }
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as StdMutex;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use balloon_abi::Vq;
    use balloon_device::MemoryLayout;
    use control::BalloonControl as _;
    use control::api::PartialHuge;
    use guest_ring::{Buffer, GuestRing};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::reclaim::Measure;

    const TEST_TIMEOUT: Duration = Duration::from_secs(60);
    const MEMORY_BYTES: usize = 4 << 20;

    /// Measures when it is told to.
    #[derive(Debug)]
    struct Slow {
        asked: Sender<()>,
        go: StdMutex<Receiver<u64>>,
    }

    impl Measure for Slow {
        fn resident_bytes(&self) -> Option<u64> {
            self.asked.send(()).unwrap();
            self.go.lock().unwrap().recv().ok()
        }
    }

    /// A guest that has terabytes, or one on a file system that hangs: it is served as ever.
    #[test]
    fn a_guest_is_served_while_its_memory_is_measured() {
        let mut reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
        let (asked_tx, asked) = channel();
        let (go, go_rx) = channel();
        reclaim.measure_by(Arc::new(Slow { asked: asked_tx, go: StdMutex::new(go_rx) }));
        let shared = Arc::new(Shared::new("vm1".into(), reclaim).unwrap());
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        shared.device().set_layout(MemoryLayout::of(&memory).unwrap());
        shared.reset(Features::VERSION_1 | Features::MUST_TELL_HOST);

        let operator = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.status()
        });
        asked.recv_timeout(TEST_TIMEOUT).expect("memory is measured");
        let (served_tx, served) = channel();
        let guest = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let mut ring = GuestRing::new(0x1000, 16);
                let mut queue = ring.queue();
                memory.write_slice(&[0x80, 0, 0, 0, 0x81, 0, 0, 0], GuestAddress(0x8000)).unwrap();
                ring.send(&memory, &[Buffer::readable(0x8000, 8)]);
                let mut device = shared.device();
                device.process_queue(Vq::Inflate, &memory, &mut queue).unwrap();
                served_tx.send((ring.take_used(&memory).is_some(), device.held().len())).unwrap();
            }
        });
        let served = served.recv_timeout(TEST_TIMEOUT);
        go.send(12345).unwrap();
        assert_eq!(served, Ok((true, 2)), "the guest waited for a status");
        guest.join().unwrap();
        assert_eq!(operator.join().unwrap().resident_bytes, Some(12345));
    }
    /// Who asks while another one's answer is measured gets what was measured before.
    #[test]
    fn memory_is_measured_for_one_at_a_time_and_only_for_who_asks() {
        let mut reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
        let (asked_tx, asked) = channel();
        let (go, go_rx) = channel();
        reclaim.measure_by(Arc::new(Slow { asked: asked_tx, go: StdMutex::new(go_rx) }));
        let shared = Arc::new(Shared::new("vm1".into(), reclaim).unwrap());
        go.send(1).unwrap();
        assert_eq!(shared.status().resident_bytes, Some(1));
        asked.recv_timeout(TEST_TIMEOUT).unwrap();

        let slow = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.status().resident_bytes
        });
        asked.recv_timeout(TEST_TIMEOUT).expect("memory is measured");
        let (told_tx, told) = channel();
        let others = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let _ = (shared.release(), shared.stats());
                told_tx.send([shared.status(), shared.status()]).unwrap();
            }
        });
        let told = told.recv_timeout(TEST_TIMEOUT);
        go.send(2).unwrap();
        let told = told.expect("others wait for what one has asked");
        assert!(told.iter().all(|status| status.resident_bytes == Some(1)));
        others.join().unwrap();
        assert_eq!(slow.join().unwrap(), Some(2));
        assert!(asked.try_recv().is_err(), "it was measured for them too");
        go.send(3).unwrap();
        assert_eq!(shared.status().resident_bytes, Some(3));
    }
}
