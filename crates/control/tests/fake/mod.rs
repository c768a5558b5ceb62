//! A fake balloon: the test acts as the guest.

#![allow(dead_code, reason = "every test file uses its own part")]

mod requests;
mod setup;

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use control::api::{
    BALLOON_PAGE_BYTES, BalloonChange, BalloonStatus, CancelledRequest, Direction, Driver,
    FreePageHints, GuestStatus, HintOutcome, ReleaseMode, ReleaseStatus, StatsStatus, Status,
};
use control::{BalloonControl, ControlError, FreePagesMap, GuestAnswer, GuestRequest};

#[allow(unused_imports, reason = "every test file uses its own part")]
pub(crate) use requests::{Requests, free_pages};
#[allow(unused_imports, reason = "every test file uses its own part")]
pub(crate) use setup::{Setup, answered, setup};

/// Memory of the fake guest.
pub(crate) const GUEST_BYTES: u64 = 4 << 30;

/// What the fake guest does with a new target.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    /// Reaches it immediately.
    Obeys,
    /// Nothing; the test calls [`FakeBalloon::reach`].
    Waits,
}

pub(crate) struct FakeBalloon {
    guest: Guest,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    status: Status,
    /// Calls that would measure the guest's memory.
    measured: u32,
    /// Blocking calls started.
    waits: u32,
    /// Number of requests for hints, and whether the last one has ended.
    hints: u32,
    hints_ended: bool,
    requests: Requests,
}

impl FakeBalloon {
    pub(crate) fn new(name: &str, guest: Guest) -> Self {
        let status = Status {
            name: name.into(),
            pid: std::process::id(),
            uptime_ms: 61_500,
            guest: GuestStatus {
                connected: true,
                driver: Driver::Aerostat,
                features: vec!["must-tell-host".into(), "page-bitmap".into()],
                memory_bytes: GUEST_BYTES,
                poison_val: None,
            },
            balloon: BalloonStatus {
                at_target: true,
                max_bytes: Some(GUEST_BYTES),
                ..BalloonStatus::from_pages(0, 0)
            },
            release: ReleaseStatus { released_bytes: 8192, ..ReleaseStatus::default() },
            resident_bytes: Some(1 << 30),
            exits: Some(8),
            kicks: Some(2),
            ..Status::default()
        };
        let state = Mutex::new(State {
            status,
            measured: 0,
            waits: 0,
            hints: 0,
            hints_ended: true,
            requests: Requests::default(),
        });
        Self { guest, state, changed: Condvar::new() }
    }

    /// Changes the balloon's status.
    pub(crate) fn edit(&self, edit: impl FnOnce(&mut Status)) {
        edit(&mut self.lock().status);
        self.changed.notify_all();
    }

    /// Sets the actual size.
    pub(crate) fn reach(&self, pages: u32) {
        self.edit(|status| {
            let balloon = &mut status.balloon;
            balloon.actual_pages = pages;
            balloon.actual_bytes = u64::from(pages) * BALLOON_PAGE_BYTES;
            balloon.at_target = pages == balloon.target_pages;
            if let Some(change) = &mut balloon.last_change {
                change.wall_ms = 12.5;
                change.messages = 1;
                change.release_calls = 2;
            }
        });
    }

    /// Waits until a client has waited for a change.
    pub(crate) fn until_waited(&self) {
        self.until(|state| state.waits > 0);
    }

    /// Waits until `count` more waits have started.
    pub(crate) fn until_waits(&self, count: u32) {
        let before = self.lock().waits;
        self.until(|state| state.waits >= before + count);
    }

    /// Waits until `count` requests for hints were made and the last has ended.
    pub(crate) fn until_hints_ended(&self, count: u32) {
        self.until(|state| state.hints == count && state.hints_ended);
    }

    /// Waits until the target is `pages`.
    pub(crate) fn until_target(&self, pages: u32) {
        self.until(|state| state.status.balloon.target_pages == pages);
    }

    /// Lets the test act on the guest's requests.
    pub(crate) fn requests<T>(&self, play: impl FnOnce(&mut Requests) -> T) -> T {
        let played = play(&mut self.lock().requests);
        self.changed.notify_all();
        played
    }

    /// Returns how many calls would have measured memory.
    pub(crate) fn measured(&self) -> u32 {
        self.lock().measured
    }

    /// Waits until `count` requests are open.
    pub(crate) fn until_open(&self, count: usize) {
        self.until(|state| state.requests.open.len() == count);
    }

    fn until(&self, done: impl Fn(&State) -> bool) {
        let seen = self.changed.wait_while(self.lock(), |state| !done(state));
        drop(seen.expect("no test panics with this lock"));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with this lock")
    }
}

impl BalloonControl for FakeBalloon {
    fn name(&self) -> String {
        self.lock().status.name.clone()
    }

    fn submit(&self, ask: GuestRequest, timeout: Duration) -> Result<u32, ControlError> {
        let mut state = self.lock();
        let id = state.requests.submit(ask, timeout, self.guest == Guest::Obeys)?;
        self.changed.notify_all();
        Ok(id)
    }

    fn wait_request(
        &self,
        id: u32,
        timeout: Duration,
    ) -> Option<Result<GuestAnswer, ControlError>> {
        let open = |state: &mut State| !state.requests.ended.contains_key(&id);
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, open);
        waited.expect("no test panics with this lock").0.requests.ended.remove(&id)
    }

    fn cancel_request(&self, id: Option<u32>) -> Result<CancelledRequest, ControlError> {
        let cancelled = self.lock().requests.cancel(id);
        self.changed.notify_all();
        cancelled
    }

    fn free_pages(&self) -> Option<FreePagesMap> {
        self.lock().requests.newest.clone()
    }

    fn status(&self) -> Status {
        let mut state = self.lock();
        state.measured += 1;
        state.status.clone()
    }

    fn release(&self) -> ReleaseStatus {
        self.lock().status.release.clone()
    }

    fn stats(&self) -> StatsStatus {
        self.lock().status.stats.clone()
    }

    fn set_target(&self, pages: u32) -> Result<u64, ControlError> {
        let generation = {
            let status = &mut self.lock().status;
            if !status.guest.connected {
                return Err(ControlError::Refused {
                    what: "no guest is connected".into(),
                    hint: "start the guest".into(),
                });
            }
            let balloon = &mut status.balloon;
            if pages == balloon.target_pages {
                return Ok(balloon.generation);
            }
            let from_pages = balloon.actual_pages;
            *balloon = BalloonStatus {
                generation: balloon.generation + 1,
                max_bytes: balloon.max_bytes,
                last_change: Some(BalloonChange {
                    direction: if pages < from_pages {
                        Direction::Deflate
                    } else {
                        Direction::Inflate
                    },
                    from_pages,
                    to_pages: pages,
                    ..BalloonChange::default()
                }),
                ..BalloonStatus::from_pages(pages, from_pages)
            };
            balloon.generation
        };
        self.changed.notify_all();
        if self.guest == Guest::Obeys {
            self.reach(pages);
        }
        Ok(generation)
    }

    fn set_release_mode(&self, mode: ReleaseMode) -> Result<(), ControlError> {
        self.edit(|status| status.release.mode = mode);
        Ok(())
    }

    fn set_stats_interval(&self, interval: Option<Duration>) -> Result<(), ControlError> {
        let interval_ms = interval.map_or(0, |interval| interval.as_millis().try_into().unwrap());
        self.edit(|status| status.stats.interval_ms = interval_ms);
        Ok(())
    }

    fn start_hints(&self) -> Result<u32, ControlError> {
        let mut state = self.lock();
        state.hints += 1;
        state.hints_ended = false;
        Ok(state.hints)
    }

    /// A guest that obeys has 1 MiB free.
    fn wait_hints(&self, id: u32, timeout: Duration) -> FreePageHints {
        let (outcome, pages) = match self.guest {
            Guest::Obeys => (HintOutcome::Complete, 256),
            Guest::Waits => {
                std::thread::sleep(timeout);
                (HintOutcome::InProgress, 0)
            }
        };
        let bytes = pages * BALLOON_PAGE_BYTES;
        FreePageHints { id, outcome, pages, bytes, runs: 1, elapsed_ms: 2, list: vec![] }
    }

    fn end_hints(&self, id: u32) -> Result<(), ControlError> {
        let mut state = self.lock();
        state.hints_ended = id == state.hints;
        if self.guest == Guest::Obeys {
            state.requests.newest = Some(free_pages(id, control::api::FreeKind::Hint));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn wait_change(&self, generation: u64, timeout: Duration) -> BalloonStatus {
        let mut state = self.lock();
        if !timeout.is_zero() {
            state.waits += 1;
            self.changed.notify_all();
        }
        let pending = |state: &mut State| !state.status.balloon.is_over(generation);
        let waited = self.changed.wait_timeout_while(state, timeout, pending);
        waited.expect("no test panics with this lock").0.status.balloon.clone()
    }
}
