//! State shared between the device loop and the control API: the device and its
//! bookkeeping, behind a lock.

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
use control::{ControlError, FreePagesMap, GuestAnswer, GuestRequest};
use rustix::event::EventfdFlags;

use crate::HostError;
use crate::log_limit::LogLimit;
use crate::reclaim::{HostReclaim, Work};
use crate::request_times::RequestTimes;
use crate::saved::{Saved, StateWriter};

/// How often a wait polls for the end of a background release, which sends no
/// notification.
const RELEASE_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// One guest's balloon.
pub struct Shared {
    name: String,
    started: Instant,
    state: Mutex<State>,
    pub(crate) changed: Condvar,
    wake: OwnedFd,
    log_limit: Mutex<LogLimit>,
    /// Counted only if this process is the VMM.
    exits: Option<Exits>,
}

/// Exits of the guest's vCPUs because of the balloon.
#[derive(Default)]
struct Exits {
    all: AtomicU64,
    /// The exits that were notifications.
    kicks: AtomicU64,
}

pub(crate) struct State {
    pub(crate) device: BalloonDevice<HostReclaim>,
    pub(crate) connected: bool,
    generation: u64,
    /// Work done before the current change started.
    baseline: Work,
    front_end_faults: BTreeMap<&'static str, u64>,
    /// Interval of statistics requests; `None` to request none.
    stats_interval: Option<Duration>,
    /// The configuration space has changed, and the guest was not notified yet.
    config_changed: bool,
    /// The device state was taken for a migration; the guest may run on another host.
    leaving: bool,
    /// State for a back-end restart.
    saved: Saved,
    /// Writes `saved` to the state file, if there is one.
    writer: Option<Arc<StateWriter>>,
    /// When requests were submitted, and the timing of the newest free pages.
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
    /// Creates a balloon without a guest.
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

    /// Enables the exit counters, for the VMM.
    #[must_use]
    pub fn with_exits(self) -> Self {
        Self { exits: Some(Exits::default()), ..self }
    }

    /// Counts vCPU exits because of the balloon.
    pub fn count_exits(&self, count: u64) {
        if let Some(exits) = &self.exits {
            exits.all.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Counts vCPU exits that notify the balloon; they also count as exits.
    pub fn count_kicks(&self, count: u64) {
        self.count_exits(count);
        if let Some(exits) = &self.exits {
            exits.kicks.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Locks the device.
    pub fn device(&self) -> DeviceGuard<'_> {
        DeviceGuard(self.state())
    }

    /// Wakes all threads that wait for a change of the balloon.
    pub fn changed(&self) {
        self.changed.notify_all();
    }

    /// Records whether a guest is connected.
    pub fn set_connected(&self, connected: bool) {
        self.state().connected = connected;
        self.changed();
    }

    /// Counts a fault of the front end under `name`.
    pub fn count_front_end_fault(&self, name: &'static str) {
        let mut state = self.state();
        let count = state.front_end_faults.entry(name).or_default();
        *count = count.saturating_add(1);
    }

    /// Returns true if the rate limit allows another log line caused by a peer.
    pub fn may_log(&self) -> bool {
        let mut limit = self.log_limit.lock().unwrap_or_else(PoisonError::into_inner);
        let suppressed = limit.take(Instant::now());
        if let Some(lines @ 1..) = suppressed {
            tracing::warn!(lines, "log lines were suppressed; see the fault counters");
        }
        suppressed.is_some()
    }

    /// Returns true once after one or more changes of the configuration space.
    pub fn take_config_changed(&self) -> bool {
        std::mem::take(&mut self.state().config_changed)
    }

    /// Wakes the device loop to handle the operator's request.
    pub(crate) fn wake_up(&self) -> Result<(), ControlError> {
        let woken = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        woken.map(drop).map_err(|error| ControlError::Failed {
            what: format!("the balloon's device loop cannot be woken: {error}"),
            hint: "restart the back end of this guest".into(),
        })
    }

    /// Eventfd that becomes readable when the operator made a request.
    pub const fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Makes the device loop send a configuration change notification.
    fn announce(&self, mut state: MutexGuard<'_, State>) -> Result<(), ControlError> {
        state.config_changed = true;
        drop(state);
        self.wake_up()
    }

    /// Ignores poisoning: a thread that panicked with the lock held may have left wrong
    /// counters, but no broken structure, and the guest must continue to run.
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
        // Measure without the lock: the guest is served meanwhile.
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
            let what = "the guest is being migrated or saved, and a new target would be lost";
            let hint = "set the target on the host that `aerostat status` reports".to_owned();
            return Err(ControlError::Refused { what: what.to_owned(), hint });
        }
        let memory_pages = state.device.layout().pages();
        // The server checked this too, but the guest may have connected since.
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

    fn submit(&self, ask: GuestRequest, timeout: Duration) -> Result<u32, ControlError> {
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
            // Once the guest has reached its target only the background release is left,
            // which must be polled. All other changes notify `changed`.
            let reached = status.actual_pages == status.target_pages;
            let wait = if reached { left.min(RELEASE_POLL_INTERVAL) } else { left };
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

    /// When the guest had reached the target and the host had released all pages.
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
        // Counters of the whole process.
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

    /// Measures when the test sends the result.
    #[derive(Debug)]
    struct Slow {
        requested: Sender<()>,
        go: StdMutex<Receiver<u64>>,
    }

    impl Measure for Slow {
        fn resident_bytes(&self) -> Option<u64> {
            self.requested.send(()).unwrap();
            self.go.lock().unwrap().recv().ok()
        }
    }

    /// Measuring may be slow: the guest may have terabytes, or its file system may hang.
    #[test]
    fn a_guest_is_served_while_its_memory_is_measured() {
        let mut reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
        let (requested_tx, requested) = channel();
        let (go, go_rx) = channel();
        reclaim.measure_by(Arc::new(Slow { requested: requested_tx, go: StdMutex::new(go_rx) }));
        let shared = Arc::new(Shared::new("vm1".into(), reclaim).unwrap());
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        shared.device().set_layout(MemoryLayout::of(&memory).unwrap());
        shared.reset(Features::VERSION_1 | Features::MUST_TELL_HOST);

        let operator = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.status()
        });
        requested.recv_timeout(TEST_TIMEOUT).expect("memory is measured");
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
        assert_eq!(served, Ok((true, 2)), "the guest waited for the status");
        guest.join().unwrap();
        assert_eq!(operator.join().unwrap().resident_bytes, Some(12345));
    }

    /// A client that requests the status during a measurement gets the previous result.
    #[test]
    fn memory_is_measured_by_one_client_at_a_time() {
        let mut reclaim = HostReclaim::new(ReleaseMode::Background, PartialHuge::Split).unwrap();
        let (requested_tx, requested) = channel();
        let (go, go_rx) = channel();
        reclaim.measure_by(Arc::new(Slow { requested: requested_tx, go: StdMutex::new(go_rx) }));
        let shared = Arc::new(Shared::new("vm1".into(), reclaim).unwrap());
        go.send(1).unwrap();
        assert_eq!(shared.status().resident_bytes, Some(1));
        requested.recv_timeout(TEST_TIMEOUT).unwrap();

        let slow = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.status().resident_bytes
        });
        requested.recv_timeout(TEST_TIMEOUT).expect("memory is measured");
        let (statuses_tx, statuses) = channel();
        let others = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let _ = (shared.release(), shared.stats());
                statuses_tx.send([shared.status(), shared.status()]).unwrap();
            }
        });
        let statuses = statuses.recv_timeout(TEST_TIMEOUT);
        go.send(2).unwrap();
        let statuses = statuses.expect("other clients wait for the measurement");
        assert!(statuses.iter().all(|status| status.resident_bytes == Some(1)));
        others.join().unwrap();
        assert_eq!(slow.join().unwrap(), Some(2));
        assert!(requested.try_recv().is_err(), "only one client measured");
        go.send(3).unwrap();
        assert_eq!(shared.status().resident_bytes, Some(3));
    }
}
