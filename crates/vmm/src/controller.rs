//! The guest of this process and its latest migration or snapshot. [`state`] decides which events
//! are allowed; this module has the lock, the threads and the guest.

mod control_api;
mod ending;
mod participant;
mod report;
mod save;
mod send;
mod state;
mod summary;
mod unresolved;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use control::ControlError;
use control::api::{MigrationSide, MigrationStatus};
use diagnostics::{Panicked, contain, panic_point};
use migration::MigrationError;
use migration::observer::{Observer, Phase, Progress};

use self::participant::MigrationSource;
use self::report::Report;
use self::state::{Event, Refusal, State};
use self::unresolved::Unresolved;
use crate::error::{Error, hint_of};
use crate::machine::Machine;

pub(crate) use self::control_api::ControlApi;
pub(crate) use self::participant::MigrationTarget;
pub(crate) use self::unresolved::Arrived;

/// The guest and its latest migration, behind one lock.
pub(crate) struct MigrationController {
    current: Mutex<Current>,
    /// Notified at each change of the state.
    changed: Condvar,
    /// Ends this process.
    stop: Mutex<Option<Box<dyn Fn() + Send>>>,
}

#[derive(Default)]
struct Current {
    state: State,
    machine: Option<Arc<Machine>>,
    report: Report,
    /// Cancels the current migration, until it commits.
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Set while the state is in-doubt or stuck and no thread is resolving it.
    unresolved: Option<Unresolved>,
}

impl MigrationController {
    /// `machine`: a guest that has not started yet; `None` at a destination that waits for one.
    pub(crate) fn new(machine: Option<Arc<Machine>>) -> Arc<Self> {
        let current = Mutex::new(Current { machine, ..Current::default() });
        Arc::new(Self { current, changed: Condvar::new(), stop: Mutex::default() })
    }

    /// Sets the callback that ends this process once its guest has moved.
    pub(crate) fn set_stop(&self, stop: impl Fn() + Send + 'static) {
        *locked(&self.stop) = Some(Box::new(stop));
    }

    /// The guest, if this process has one.
    pub(crate) fn machine(&self) -> Option<Arc<Machine>> {
        self.current().machine.clone()
    }

    /// Drops the guest after its end, so that the control API no longer reaches its balloon.
    pub(crate) fn drop_machine(&self) {
        self.current().machine = None;
    }

    /// Starts a guest that has not run here yet and hands control of it to the operator, under one
    /// lock: a client may see the guest, and migrate it again, as soon as it runs.
    ///
    /// # Errors
    /// This process is ending, or the guest may not run here in the current state.
    pub(crate) fn start_guest(&self, machine: &Arc<Machine>) -> Result<(), Error> {
        let mut current = self.current();
        let state = current.state.next(Event::Start).map_err(refused_here)?;
        // First: after a panic here the guest has not started, and the caller destroys it.
        machine.resume();
        current.state = state;
        current.machine = Some(Arc::clone(machine));
        current.unresolved = None;
        current.report.end(None);
        drop(current);
        self.changed.notify_all();
        Ok(())
    }

    /// Pauses or resumes the guest for the operator. Does not hold the lock: a stuck disk can delay
    /// the pause.
    pub(crate) fn pause_or_resume(&self, machine: &Machine, pause: bool) {
        if let Err(error) = self.current().advance(Event::Change) {
            tracing::warn!(%error, "cannot pause or resume the guest");
            return;
        }
        let change = || {
            panic_point("operator");
            if !pause {
                machine.resume();
                tracing::info!("resumed");
                return false;
            }
            let paused = machine.pause();
            match &paused {
                Ok(()) => tracing::info!("paused"),
                Err(error) => {
                    tracing::error!(%error, "cannot pause the guest; it continues to run")
                }
            }
            paused.is_ok()
        };
        // A panic, which is logged, must not leave the change unfinished: nobody could end it.
        let paused = contain(change).unwrap_or(false);
        self.record(Event::Changed { paused }, |_| {});
    }

    /// Cancels a running migration and refuses to begin, commit or resolve one from now on.
    pub(crate) fn close(&self, why: &'static str) {
        let mut current = self.current();
        current.cancel.store(true, Ordering::Relaxed);
        // `Close` is never refused.
        let _ = current.advance(Event::Close(why));
    }

    /// Records that this destination waits for a source.
    pub(crate) fn wait_for_source(&self) {
        self.record(Event::Wait, |current| {
            current.report = Report::begin(MigrationSide::Destination)
        });
    }

    /// Records that the incoming migration failed.
    pub(crate) fn not_arrived(&self, error: &MigrationError) {
        self.record(Event::Failed, |current| current.report.fail(error));
    }

    /// Records that a guest has arrived and is in-doubt.
    pub(crate) fn arrived_in_doubt(&self, arrived: &Arc<Mutex<Arrived>>, error: &MigrationError) {
        let machine = locked(arrived).guest.machine().cloned();
        self.record(Event::Uncertain, |current| {
            current.machine = machine;
            current.unresolved = Some(Unresolved::Destination(Arc::clone(arrived)));
            current.report.end(Some(error.chain()));
        });
    }

    /// Records that the destination destroyed its guest before it ran.
    pub(crate) fn discarded(&self) {
        let mut current = self.current();
        // Refused if the guest was destroyed before it was complete; `not_arrived` reports that.
        if current.advance(Event::Discarded).is_ok() {
            current.machine = None;
            current.unresolved = None;
            current.report.end(Some("the guest was discarded here and never ran".to_owned()));
        }
        drop(current);
        self.changed.notify_all();
    }

    /// Waits until a guest that arrived in-doubt is resolved. Returns true if it runs here, or ran
    /// here and has moved on since; false if it was discarded.
    pub(crate) fn until_resolved(&self) -> bool {
        let mut current = self.current();
        while current.state.arrived_in_doubt() {
            current = self.changed.wait(current).unwrap_or_else(PoisonError::into_inner);
        }
        !current.state.arrival_failed()
    }

    /// Marks the migration or snapshot as committing. From here on the migration cannot be cancelled.
    ///
    /// # Errors
    /// The migration was cancelled, or this process is ending.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        let mut current = self.current();
        if current.cancel.load(Ordering::Relaxed) {
            return Err(Error::Option { what: "the migration was cancelled".into() });
        }
        current.advance(Event::Commit).map_err(refused_here)
    }

    /// Takes control of the guest from the operator and runs `work` on it in a new thread.
    fn begin(
        self: &Arc<Self>,
        side: MigrationSide,
        name: &str,
        cancel: Arc<AtomicBool>,
        work: impl FnOnce(&Arc<Self>, MigrationSource) + Send + 'static,
    ) -> Result<MigrationStatus, ControlError> {
        let mut current = self.current();
        let machine = current.machine.clone().ok_or_else(|| refusal(Refusal::NoGuest))?;
        current.advance(Event::Begin(side)).map_err(refusal)?;
        current.report = Report::begin(side);
        current.cancel = Arc::clone(&cancel);
        let guest = MigrationSource::new(machine, cancel, self);
        let controller = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.to_owned());
        match thread.spawn(move || {
            if let Err(panicked) = contain(|| work(&controller, guest)) {
                controller.thread_panicked(&panicked);
            }
        }) {
            Ok(thread) => current.thread = Some(thread),
            Err(error) => {
                current.report.end(Some(format!("host: cannot start a thread: {error}")));
                current.advance(Event::Failed).map_err(refusal)?;
            }
        }
        Ok(current.report.status(current.state))
    }

    /// Handles a panic of the migration thread after which the guest's state is unknown: stops
    /// waiting for the thread and refuses to migrate or resume the guest.
    fn thread_panicked(&self, panicked: &Panicked) {
        let mut current = self.current();
        if current.advance(Event::Lost).is_ok() {
            tracing::error!(%panicked, "the migration thread panicked: guest state unknown");
            current.report.end(Some(panicked.to_string()));
        }
        drop(current);
        self.changed.notify_all();
    }

    /// Applies an event that has happened, and updates the report.
    fn record(&self, event: Event, report: impl FnOnce(&mut Current)) {
        let mut current = self.current();
        match current.advance(event) {
            Ok(()) => report(&mut current),
            // Cannot happen: only the owner of the guest records events. The guest is left alone
            // from here on.
            Err(error) => tracing::error!(%error, "bug: invalid migration state transition"),
        }
        drop(current);
        self.changed.notify_all();
    }

    /// Records that the guest runs at the destination, and ends this process.
    fn moved(&self, report: impl FnOnce(&mut Current)) {
        self.record(Event::Moved, report);
        if let Some(stop) = locked(&self.stop).as_ref() {
            stop();
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        locked(&self.current)
    }
}

impl Current {
    fn advance(&mut self, event: Event) -> Result<(), Refusal> {
        self.state = self.state.next(event)?;
        Ok(())
    }
}

/// Copies a migration's progress to its [`Report`].
pub(crate) struct Watch(pub(crate) Arc<MigrationController>);

impl Observer for Watch {
    fn phase(&mut self, phase: Phase) {
        let mut current = self.0.current();
        // A destination that waits for connections has no source yet. A source refuses the event.
        if phase != Phase::Connect {
            let _ = current.advance(Event::Connected);
        }
        current.report.phase(phase);
    }

    fn progress(&mut self, progress: Progress) {
        self.0.current().report.progress(progress);
    }
}

fn refusal(refusal: Refusal) -> ControlError {
    let hint = "see `aerostat status NAME`".to_owned();
    ControlError::Refused { what: refusal.to_string(), hint }
}

fn refused_here(refusal: Refusal) -> Error {
    Error::Option { what: refusal.to_string() }
}

fn refused(error: &MigrationError) -> ControlError {
    ControlError::Refused { what: error.chain(), hint: hint_of(error) }
}

/// Ignores poisoning: a panic leaves the data behind these locks consistent.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
