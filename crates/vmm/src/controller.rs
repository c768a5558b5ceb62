//! Moving the guest of a monitor: what its operator may ask, and what is told.

mod control_api;
mod save;
mod told;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use balloon_host::Ending;
use control::ControlError;
use control::api::{MigrationPhase, MigrationSide, MigrationState, MigrationStatus, ResolveAction};
use diagnostics::{Panicked, contain};
use migration::observer::{Observer, Phase, Progress};
use migration::tcp::TcpConnector;
use migration::traits::{MachineError, SourceMachine as _};
use migration::{
    DestinationOwnership, Fate, MigrationError, Resolution, SourceConfig, SourceDoubt,
    SourceFailure, SourceGuest, migrate,
};

use crate::error::hint_of;
use crate::machine::Machine;
use crate::threads::{Joined, join_within};
use crate::traits::{MigrationSource, MigrationTarget};

pub(crate) use self::control_api::ControlApi;

/// How long the guest may take to drop its caches.
const DROP_CACHES_TIME: Duration = Duration::from_secs(30);

/// How long a migration that was cancelled because its monitor ends may take to say so to the other
/// side. It may be waiting for a peer that is silent.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// The same where the other side may have all of the guest: if it is not told, it is in doubt.
const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a monitor whose guest has left waits for somebody to ask how it went.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// A monitor's guest and the newest migration of it.
pub(crate) struct MigrationController {
    machine: Mutex<Option<Arc<Machine>>>,
    state: Mutex<State>,
    changed: Condvar,
    /// Has the monitor end.
    stop: Mutex<Option<Box<dyn Fn() + Send>>>,
}

#[derive(Default)]
struct State {
    status: MigrationStatus,
    began: Option<Instant>,
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    doubt: Option<Doubt>,
    /// What became of a guest that came and was in doubt.
    came: Option<Resolution>,
    /// Somebody knows that the guest has left.
    told: bool,
    /// Why nothing is begun, and no doubt resolved, any more.
    closed: Option<&'static str>,
}

/// A guest of which it is not known where it runs.
enum Doubt {
    Left {
        word: SourceDoubt,
        to: TcpConnector,
        guest: MigrationSource,
    },
    Came(Arc<Mutex<Kept>>),
    /// It is here and nowhere else, but something kept it from going on.
    Stays(MigrationSource),
}

/// A guest that came, and what is said of it to its source.
pub(crate) struct Kept {
    pub(crate) ownership: DestinationOwnership,
    pub(crate) guest: MigrationTarget,
}

impl MigrationController {
    /// For a guest that is there, or is to come.
    pub(crate) fn new(machine: Option<Arc<Machine>>) -> Arc<Self> {
        Arc::new(Self {
            machine: Mutex::new(machine),
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: Mutex::default(),
        })
    }

    /// What ends the monitor once its guest has left.
    pub(crate) fn ends_by(&self, stop: impl Fn() + Send + 'static) {
        *locked(&self.stop) = Some(Box::new(stop));
    }

    /// The guest that came, or `None` where it went.
    pub(crate) fn set_machine(&self, machine: Option<Arc<Machine>>) {
        *locked(&self.machine) = machine;
    }

    /// The guest, if it is here.
    pub(crate) fn machine(&self) -> Option<Arc<Machine>> {
        locked(&self.machine).clone()
    }

    /// Waits for as long as a guest that came is in doubt; what became of it, whatever was done
    /// with it since.
    pub(crate) fn until_resolved(&self) -> Resolution {
        let mut state = self.state();
        loop {
            if let Some(resolved) = state.came {
                return resolved;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The monitor is about to end. Ends a migration, where the guest was not offered yet, and does
    /// not wait for a peer that is silent, or for a disk; true where the guest has left.
    pub(crate) fn end(&self, ending: &Ending) -> bool {
        let mut state = self.state();
        // From here on nothing is begun, and nothing offered: who begins to looks at it after this
        // lock.
        state.close("its process is about to end");
        let thread = state.thread.take();
        let patience = match state.status.phase {
            // Said, and heard or lost within its own time, or a file that is about to have its name:
            // worth waiting for, but where somebody waits for the end.
            Some(MigrationPhase::Switchover) if !ending.was_asked() => Duration::MAX,
            Some(MigrationPhase::Switchover | MigrationPhase::State) => SWITCHOVER_TIMEOUT,
            _ => CANCEL_TIMEOUT,
        };
        let patience = ending.patience("a migration or a snapshot to come to its end", patience);
        let goes_on = |state: &mut State| state.status.state == MigrationState::Running;
        let wait = self.changed.wait_timeout_while(state, patience, goes_on);
        state = wait.unwrap_or_else(PoisonError::into_inner).0;
        if state.status.state == MigrationState::Running {
            tracing::warn!("{}", lost(&state));
        } else {
            drop(state);
            // It has nothing more to do than to come back.
            match thread
                .map(|thread| join_within(thread, ending.patience("a thread", CANCEL_TIMEOUT)))
            {
                None | Some(Joined::Ended) => {}
                Some(Joined::Panicked) => tracing::error!("the migration ended in a panic"),
                Some(Joined::Not) => tracing::error!("host: the migration's thread does not end"),
            }
            state = self.state();
        }
        if matches!(state.status.state, MigrationState::InDoubt) {
            tracing::error!("the guest ends here; whether it runs on the other side is not known");
        }
        if state.status.state != MigrationState::Moved {
            return false;
        }
        let linger = if ending.was_asked() { CANCEL_TIMEOUT } else { OUTCOME_TIMEOUT };
        let linger = ending.patience("whoever asked for the migration", linger);
        drop(self.changed.wait_timeout_while(state, linger, |state| !state.told));
        true
    }

    /// Whatever is under way comes to nothing, and nothing is begun any more: what is read of the
    /// guest is not what it had.
    pub(crate) fn call_off(&self) {
        self.state().close("its memory cannot be read any more");
    }

    /// A destination begins to wait for a guest.
    pub(crate) fn waits(&self) {
        let mut state = self.state();
        state.begin(MigrationSide::Destination);
        state.status.state = MigrationState::Waiting;
    }

    /// The guest that was waited for has come and runs. Both are said under one lock: whoever finds
    /// the machine may move it on at once, and this would be said of that migration.
    pub(crate) fn came(&self, machine: Option<Arc<Machine>>) {
        let mut state = self.state();
        state.over(MigrationState::Arrived, None);
        self.set_machine(machine);
        drop(state);
        self.changed.notify_all();
    }

    /// The guest that was waited for did not come.
    pub(crate) fn failed(&self, error: &MigrationError) {
        self.state().failed(error);
        self.changed.notify_all();
    }

    /// A guest has come, and it is not known whether it runs at its source.
    pub(crate) fn doubts(&self, kept: &Arc<Mutex<Kept>>, error: &MigrationError) {
        let mut state = self.state();
        state.doubt = Some(Doubt::Came(Arc::clone(kept)));
        state.came = None;
        state.over(MigrationState::InDoubt, Some(error.chain()));
    }

    /// A source has said where its guest is.
    pub(crate) fn heard(&self, resolved: Resolution) {
        let mut state = self.state();
        let now = match resolved {
            Resolution::Runs => MigrationState::Arrived,
            Resolution::Waits => return,
            Resolution::Gone => MigrationState::Failed,
        };
        // By then it may be on its way to a third host, or in doubt between here and there: that is
        // another doubt.
        if state.status.state == MigrationState::InDoubt && state.came_here() {
            state.doubt = None;
            state.came = Some(resolved);
            let error = (now == MigrationState::Failed).then(|| "the guest stays away".to_owned());
            state.over(now, error);
        }
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Takes the guest's run_control and begins `work` with it in a thread of its own, which gives them
    /// back unless the guest has left.
    fn begin(
        self: &Arc<Self>,
        side: MigrationSide,
        name: &str,
        machine: &Arc<Machine>,
        cancel: Arc<AtomicBool>,
        work: impl FnOnce(&Arc<Self>, MigrationSource) + Send + 'static,
    ) -> Result<MigrationStatus, ControlError> {
        machine.take_control().map_err(|error| nothing(&error.to_string()))?;
        let guest = MigrationSource::new(Arc::clone(machine), Arc::clone(&cancel));
        let mut state = self.state();
        state.may_begin().inspect_err(|_| machine.return_control())?;
        state.begin(side);
        state.status.state = MigrationState::Running;
        state.cancel = cancel;
        let controller = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.to_owned());
        match thread.spawn(move || {
            if let Err(panicked) = contain(|| work(&controller, guest)) {
                controller.lost_track(&panicked);
            }
        }) {
            Ok(thread) => state.thread = Some(thread),
            Err(error) => {
                state.over(MigrationState::Failed, Some(error.to_string()));
                machine.return_control();
            }
        }
        Ok(state.status.clone())
    }

    /// Whoever moved the guest panicked where nobody answers for it. Nobody waits for it any more;
    /// nor does anybody else move the guest, or let it go on.
    fn lost_track(&self, panicked: &Panicked) {
        let mut state = self.state();
        if state.status.state == MigrationState::Running {
            tracing::error!(%panicked, "what became of moving the guest is not known");
            state.over(MigrationState::Stuck, Some(panicked.to_string()));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The guest goes on here, and has its operator again. Both under one lock: whoever takes the
    /// run_control then begins the next migration, and this would be said of that one.
    fn goes_on(&self, mut state: MutexGuard<'_, State>, now: MigrationState, why: Option<String>) {
        state.over(now, why);
        self.return_unused(state);
    }

    /// The same after an error.
    fn goes_on_after(&self, mut state: MutexGuard<'_, State>, error: &MigrationError) {
        state.failed(error);
        self.return_unused(state);
    }

    fn return_unused(&self, state: MutexGuard<'_, State>) {
        let _state = state;
        if let Some(machine) = locked(&self.machine).as_ref() {
            machine.return_control();
        }
    }

    /// Moves the guest; runs in a thread of its own.
    fn carry(
        self: &Arc<Self>,
        config: &SourceConfig,
        mut guest: MigrationSource,
        mut to: TcpConnector,
    ) {
        let mut watch = Watch(Arc::clone(self));
        let moved = migrate(config, &mut guest, &mut to, &mut watch);
        match moved {
            Ok(summary) => {
                tracing::info!(id = summary.id, total_us = summary.total_us, "moved");
                let told = contain(|| told::summary(&summary)).ok();
                let mut state = self.state();
                // With what was said besides pages.
                state.status.wire_bytes = summary.wire_bytes;
                state.status.summary = told;
                drop(state);
                self.left();
            }
            Err(SourceFailure { error, guest: SourceGuest::Runs }) => {
                tracing::warn!(error = error.chain(), "the guest was not moved, and runs on");
                self.goes_on_after(self.state(), &error);
            }
            Err(SourceFailure { error, guest: SourceGuest::Stuck(stuck) }) => {
                let error = format!("{}; {}", error.chain(), stuck.chain());
                tracing::error!(error, "the guest was not moved, and does not go on");
                let mut state = self.state();
                state.doubt = Some(Doubt::Stays(guest));
                state.over(MigrationState::Stuck, Some(error));
            }
            Err(SourceFailure { error, guest: SourceGuest::InDoubt(word) }) => {
                tracing::error!(error = error.chain(), "where the guest runs is not known");
                let mut state = self.state();
                state.doubt = Some(Doubt::Left { word, to, guest });
                state.over(MigrationState::InDoubt, Some(error.chain()));
            }
        }
        self.changed.notify_all();
    }

    /// The guest runs on the other side: this monitor ends.
    fn left(&self) {
        self.state().over(MigrationState::Moved, None);
        self.changed.notify_all();
        if let Some(stop) = locked(&self.stop).as_ref() {
            stop();
        }
    }

    /// Resolves the doubt of a source.
    fn resolve_source(
        &self,
        doubt: &mut (SourceDoubt, TcpConnector, MigrationSource),
        word: ResolveAction,
    ) -> Result<(), MigrationError> {
        let (known, to, guest) = doubt;
        let fate = match word {
            ResolveAction::Ask => known.ask(guest, to)?,
            ResolveAction::RunHere => known.run_here(guest)?,
            ResolveAction::Discard => known.relinquish(guest),
        };
        match fate {
            Fate::RunsThere => self.left(),
            Fate::RunsHere => {
                let error = "the destination never ran the guest".to_owned();
                self.goes_on(self.state(), MigrationState::Failed, Some(error));
            }
        }
        Ok(())
    }

    /// Has a guest go on that stands still, and was not moved.
    fn resolve_stuck(
        &self,
        guest: &mut MigrationSource,
        word: ResolveAction,
    ) -> Result<(), ControlError> {
        if word == ResolveAction::Discard {
            let what = "the guest is here and nowhere else".to_owned();
            let hint = "end its monitor if it is to end".to_owned();
            return Err(ControlError::Refused { what, hint });
        }
        guest.resume().map_err(|error| stands_still(&error))?;
        let error = "it was not moved, and goes on".to_owned();
        self.goes_on(self.state(), MigrationState::Failed, Some(error));
        Ok(())
    }

    /// Resolves the doubt of a destination.
    fn resolve_destination(
        &self,
        kept: &Mutex<Kept>,
        word: ResolveAction,
    ) -> Result<(), ControlError> {
        let mut kept = locked(kept);
        let Kept { ownership, guest } = &mut *kept;
        match word {
            ResolveAction::Ask => {
                let what = "a destination is asked, and does not ask".to_owned();
                let hint = "resolve it at the source; if that is dead, say --run-here".to_owned();
                Err(ControlError::Refused { what, hint })
            }
            ResolveAction::RunHere => {
                if ownership.resolved() == Resolution::Waits {
                    // A guest that cannot be started is given up, and its source may be dead. So
                    // what may go away is found out before that.
                    guest.take_disks().map_err(|error| stands_still(&error))?;
                }
                let ran = ownership.run_here(guest);
                // Also where it could not: it is gone then.
                self.heard(ownership.resolved());
                ran.map(drop).map_err(|error| refused(&error))
            }
            ResolveAction::Discard => {
                ownership.discard(guest);
                self.heard(ownership.resolved());
                Ok(())
            }
        }
    }
}

impl State {
    /// The newest migration is that of a guest which came, or is to come.
    fn came_here(&self) -> bool {
        self.status.side == Some(MigrationSide::Destination)
    }

    /// The guest ends here: what is under way is called off, and nothing more is begun.
    fn close(&mut self, why: &'static str) {
        self.closed.get_or_insert(why);
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Nothing is done with a guest that ends here.
    fn is_open(&self) -> Result<(), ControlError> {
        match self.closed {
            Some(why) => Err(nothing(&format!("the guest ends here: {why}"))),
            None => Ok(()),
        }
    }

    /// Nothing is begun with a guest that may run on the other side, or ends here.
    fn may_begin(&self) -> Result<(), ControlError> {
        self.is_open()?;
        if self.status.state == MigrationState::InDoubt {
            return Err(nothing("it is not known where the guest runs; resolve that first"));
        }
        Ok(())
    }

    fn begin(&mut self, side: MigrationSide) {
        self.status = MigrationStatus { side: Some(side), ..MigrationStatus::default() };
        self.began = Some(Instant::now());
        self.told = false;
    }

    fn over(&mut self, state: MigrationState, error: Option<String>) {
        self.status.elapsed_ms = self.elapsed_ms();
        self.began = None;
        self.status.state = state;
        self.status.phase = None;
        self.status.error = error;
        self.status.hint = None;
    }

    fn failed(&mut self, error: &MigrationError) {
        self.over(MigrationState::Failed, Some(error.chain()));
        self.status.hint = Some(hint_of(error));
    }

    fn elapsed_ms(&self) -> f64 {
        self.began.map_or(self.status.elapsed_ms, |began| began.elapsed().as_secs_f64() * 1e3)
    }
}

/// Notes how far a migration is.
pub(crate) struct Watch(pub(crate) Arc<MigrationController>);

impl Observer for Watch {
    fn phase(&mut self, phase: Phase) {
        let mut state = self.0.state();
        let status = &mut state.status;
        // A destination that waits for connections has no guest on its way.
        if status.state == MigrationState::Waiting && phase != Phase::Connect {
            status.state = MigrationState::Running;
        }
        let (phase, round) = told::phase(phase);
        status.phase = Some(phase);
        status.round = round.unwrap_or(status.round);
        (status.done_pages, status.of_pages) = (0, 0);
    }

    fn progress(&mut self, progress: Progress) {
        let mut state = self.0.state();
        let status = &mut state.status;
        (status.done_pages, status.of_pages) = (progress.pages, progress.of_pages);
        status.wire_bytes = progress.wire_bytes;
    }
}

fn nothing(what: &str) -> ControlError {
    let hint = "see `aerostat status NAME`".to_owned();
    ControlError::Refused { what: what.to_owned(), hint }
}

/// It was not resolved: the doubt is as it was.
fn failed(panicked: Panicked) -> Result<(), ControlError> {
    let hint = "look into the log, and resolve it again".to_owned();
    Err(ControlError::Failed { what: format!("host: {panicked}"), hint })
}

/// Nothing has changed.
fn stands_still(error: &MachineError) -> ControlError {
    let hint = "the guest is whole and stands still; resolve it again when the disk is free, which \
                means that no other guest has it, here or there";
    ControlError::Refused { what: error.to_string(), hint: hint.to_owned() }
}

fn refused(error: &MigrationError) -> ControlError {
    ControlError::Refused { what: error.chain(), hint: hint_of(error) }
}

/// What comes of what was under way when the process ends before it.
fn lost(state: &State) -> &'static str {
    match (state.status.side, state.status.phase) {
        (Some(MigrationSide::Snapshot), _) => {
            "the snapshot is not finished and ends with this process: there is none"
        }
        (_, Some(MigrationPhase::Switchover)) => {
            "the guest was offered and ends here; whether it runs on the other side is not known"
        }
        _ => "the migration ends with this process; the other side was not told",
    }
}

/// What is behind these locks is whole at any moment.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use control::VmmControl as _;
    use control::api::{StartMigration, TlsPaths};

    use super::*;
    use crate::controller::control_api::security;

    fn ask(to: &str) -> StartMigration {
        StartMigration { to: to.into(), ..StartMigration::default() }
    }

    #[test]
    fn without_a_guest_there_is_nothing_to_move_to_end_or_to_resolve() {
        let controller = MigrationController::new(None);
        let asked = ControlApi(Arc::clone(&controller));
        assert!(asked.balloon().is_none());
        let refused = [
            asked.start_migration(&ask("127.0.0.1:1")),
            asked.cancel_migration(),
            asked.resolve_migration(ResolveAction::Ask),
            asked.resolve_migration(ResolveAction::RunHere),
            asked.resolve_migration(ResolveAction::Discard),
        ];
        for refused in refused {
            assert_eq!(refused.unwrap_err().http_status(), 409);
        }
        assert_eq!(asked.migration().state, MigrationState::None);
        assert!(!controller.end(&Ending::unwatched().unwrap()));
    }

    #[test]
    fn a_destination_tells_how_far_it_is() {
        let controller = MigrationController::new(None);
        let asked = ControlApi(Arc::clone(&controller));
        controller.waits();
        let mut watch = Watch(Arc::clone(&controller));
        watch.phase(Phase::Connect);
        assert_eq!(asked.migration().state, MigrationState::Waiting);
        watch.phase(Phase::Round { number: 3 });
        watch.progress(Progress { pages: 5, of_pages: 9, wire_bytes: 100 });
        watch.phase(Phase::LastRound);
        watch.progress(Progress { pages: 1, of_pages: 2, wire_bytes: 110 });
        let status = asked.migration();
        assert_eq!((status.state, status.round), (MigrationState::Running, 3));
        assert_eq!((status.done_pages, status.of_pages, status.wire_bytes), (1, 2, 110));
        // It is its source's to end.
        assert!(asked.cancel_migration().is_err());
        controller.failed(&MigrationError::Closed);
        let status = asked.migration();
        assert_eq!((status.state, status.phase), (MigrationState::Failed, None));
        assert!(status.state.is_over() && status.elapsed_ms > 0.0);
    }

    /// A source that was in doubt for long hears that its guest runs here, while that is in doubt
    /// between here and a third host.
    #[test]
    fn what_an_old_source_is_told_resolves_no_other_doubt() {
        let controller = MigrationController::new(None);
        controller.state().begin(MigrationSide::Source);
        controller.state().over(MigrationState::InDoubt, Some("the last word was lost".into()));
        controller.heard(Resolution::Runs);
        assert_eq!(controller.state().status.state, MigrationState::InDoubt);
    }

    #[test]
    fn nothing_is_begun_with_a_guest_in_doubt() {
        let controller = MigrationController::new(None);
        for side in [MigrationSide::Source, MigrationSide::Destination] {
            controller.state().begin(side);
            controller.state().over(MigrationState::InDoubt, None);
            assert_eq!(controller.state().may_begin().unwrap_err().http_status(), 409);
        }
        controller.heard(Resolution::Gone);
        assert!(controller.state().may_begin().is_ok());
    }

    /// Its operator may move it on at once, before whoever waits for the word has looked.
    #[test]
    fn a_guest_that_was_settled_here_is_served_whatever_is_done_with_it() {
        let controller = MigrationController::new(None);
        controller.waits();
        controller.state().over(MigrationState::InDoubt, None);
        controller.heard(Resolution::Runs);
        controller.state().begin(MigrationSide::Source);
        controller.state().status.state = MigrationState::Running;
        assert_eq!(controller.until_resolved(), Resolution::Runs);
    }

    /// Also what would be begun after that: it had a word of its own to be cancelled by.
    #[test]
    fn what_is_called_off_is_cancelled_and_nothing_is_begun_any_more() {
        for why in ["memory", "about to end"] {
            let controller = MigrationController::new(None);
            let cancel = Arc::clone(&controller.state().cancel);
            if why == "memory" {
                controller.call_off();
            } else {
                assert!(!controller.end(&Ending::unwatched().unwrap()));
            }
            assert!(cancel.load(Ordering::Relaxed));
            let refused = controller.state().may_begin().unwrap_err();
            assert_eq!(refused.http_status(), 409);
            assert!(refused.to_string().contains(why), "{refused}");
            let resolved =
                ControlApi(Arc::clone(&controller)).resolve_migration(ResolveAction::RunHere);
            assert!(resolved.unwrap_err().to_string().contains(why));
        }
    }

    /// Whoever finds the guest may move it on at once: what is said of its arrival is said before
    /// that, and not of the migration that begins then.
    #[test]
    fn a_guest_is_found_when_it_is_said_to_have_come() {
        let controller = MigrationController::new(None);
        controller.waits();
        let end = Instant::now() + Duration::from_secs(20);
        std::thread::scope(|scope| {
            let machine = locked(&controller.machine);
            let came = scope.spawn(|| controller.came(None));
            // Nobody begins anything meanwhile.
            while controller.state.try_lock().is_ok() {
                assert!(!came.is_finished() && Instant::now() < end);
                std::thread::yield_now();
            }
            drop(machine);
        });
        assert_eq!(controller.state().status.state, MigrationState::Arrived);
    }

    #[test]
    fn only_one_host_needs_no_certificates_and_files_must_be_there() {
        let plain = security(None).unwrap();
        assert!(TcpConnector::new("192.0.2.1:7000", plain).is_err());
        let paths = TlsPaths { authority: "/nowhere".into(), ..TlsPaths::default() };
        assert!(security(Some(&paths)).is_err());
    }
}
