//! The guest of this process, and the newest migration or snapshot of it. [`state`] decides what may
//! happen; here are the lock, the threads and the guest.

mod control_api;
mod ending;
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
use diagnostics::{Panicked, contain};
use migration::MigrationError;
use migration::observer::{Observer, Phase, Progress};

use self::report::Report;
use self::state::{Event, Refusal, State};
use self::unresolved::Unresolved;
use crate::error::{Error, hint_of};
use crate::machine::Machine;
use crate::traits::MigrationSource;

pub(crate) use self::control_api::ControlApi;
pub(crate) use self::unresolved::Arrived;

/// See the [module](self).
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
    /// Ends the migration that is under way, up to its commit.
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// There while the state is in doubt or stuck, and nobody is resolving it.
    unresolved: Option<Unresolved>,
}

impl MigrationController {
    /// For a guest that is there and not started yet, or is to come.
    pub(crate) fn new(machine: Option<Arc<Machine>>) -> Arc<Self> {
        let current = Mutex::new(Current { machine, ..Current::default() });
        Arc::new(Self { current, changed: Condvar::new(), stop: Mutex::default() })
    }

    /// What ends this process once its guest has left.
    pub(crate) fn ends_by(&self, stop: impl Fn() + Send + 'static) {
        *locked(&self.stop) = Some(Box::new(stop));
    }

    /// The guest, if it is here.
    pub(crate) fn machine(&self) -> Option<Arc<Machine>> {
        self.current().machine.clone()
    }

    /// The guest has ended: nobody asks for its balloon any more.
    pub(crate) fn drop_machine(&self) {
        self.current().machine = None;
    }

    /// Runs a guest that has not run here yet, and gives it to its operator, in one step: the guest
    /// may be heard of as soon as it runs, and be moved on at once.
    ///
    /// # Errors
    /// This process ends, or it is not known that the guest may run here.
    pub(crate) fn start_guest(&self, machine: &Arc<Machine>) -> Result<(), Error> {
        let mut current = self.current();
        current.advance(Event::Start).map_err(refused_here)?;
        current.machine = Some(Arc::clone(machine));
        current.unresolved = None;
        current.report.end(None);
        machine.resume();
        drop(current);
        self.changed.notify_all();
        Ok(())
    }

    /// The operator pauses the guest, or resumes it. Not under the lock: a disk may not let it pause.
    pub(crate) fn operator_pauses(&self, machine: &Machine, pause: bool) {
        if let Err(error) = self.current().advance(Event::Change) {
            tracing::warn!(%error, "the guest is not paused or resumed");
            return;
        }
        let paused = match pause.then(|| machine.pause()) {
            None => {
                machine.resume();
                tracing::info!("resumed");
                false
            }
            Some(Ok(())) => {
                tracing::info!("paused");
                true
            }
            Some(Err(error)) => {
                tracing::error!(%error, "the guest is not paused, and runs on");
                false
            }
        };
        self.note(Event::Changed { paused }, |_| {});
    }

    /// What is under way is cancelled, and nothing is begun, committed or resolved any more.
    pub(crate) fn close(&self, why: &'static str) {
        let mut current = self.current();
        current.cancel.store(true, Ordering::Relaxed);
        // Never refused.
        let _ = current.advance(Event::Close(why));
    }

    /// A destination begins to wait for a source.
    pub(crate) fn wait_for_source(&self) {
        self.note(Event::Wait, |current| {
            current.report = Report::begin(MigrationSide::Destination)
        });
    }

    /// The guest that was waited for did not come.
    pub(crate) fn not_arrived(&self, error: &MigrationError) {
        self.note(Event::Failed, |current| current.report.fail(error));
    }

    /// A guest has come, and it is not known whether it may run here.
    pub(crate) fn arrived_in_doubt(&self, arrived: &Arc<Mutex<Arrived>>, error: &MigrationError) {
        let machine = locked(arrived).guest.machine().cloned();
        self.note(Event::Uncertain, |current| {
            current.machine = machine;
            current.unresolved = Some(Unresolved::Destination(Arc::clone(arrived)));
            current.report.end(Some(error.chain()));
        });
    }

    /// The guest of a destination was destroyed before it ran.
    pub(crate) fn discarded(&self) {
        let mut current = self.current();
        // Refused where it is destroyed before it was whole, which fails by another way.
        if current.advance(Event::Discarded).is_ok() {
            current.machine = None;
            current.unresolved = None;
            current.report.end(Some("the guest was discarded here and never ran".to_owned()));
        }
        drop(current);
        self.changed.notify_all();
    }

    /// Waits while a guest that came is in doubt. True where it runs here, or has run here and was
    /// moved on since; false where it was discarded.
    pub(crate) fn until_resolved(&self) -> bool {
        let mut current = self.current();
        while current.state.came_in_doubt() {
            current = self.changed.wait(current).unwrap_or_else(PoisonError::into_inner);
        }
        !current.state.has_not_come()
    }

    /// The source is about to commit: from here on it cannot be cancelled.
    ///
    /// # Errors
    /// It was cancelled, or this process ends.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        let mut current = self.current();
        if current.cancel.load(Ordering::Relaxed) {
            return Err(Error::Option { what: "the migration was cancelled".into() });
        }
        current.advance(Event::Commit).map_err(refused_here)
    }

    /// Takes the guest from its operator and begins `work` with it in a thread of its own.
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
                controller.lost(&panicked);
            }
        }) {
            Ok(thread) => current.thread = Some(thread),
            Err(error) => {
                current.report.end(Some(format!("host: no thread can be started: {error}")));
                current.advance(Event::Failed).map_err(refusal)?;
            }
        }
        Ok(current.report.status(current.state))
    }

    /// The thread of a migration panicked where nothing is known of the guest: nobody waits for it
    /// any more, and nobody moves or resumes the guest.
    fn lost(&self, panicked: &Panicked) {
        let mut current = self.current();
        if current.advance(Event::Lost).is_ok() {
            tracing::error!(%panicked, "what became of the guest's migration is not known");
            current.report.end(Some(panicked.to_string()));
        }
        drop(current);
        self.changed.notify_all();
    }

    /// Notes what has happened to the guest.
    fn note(&self, event: Event, report: impl FnOnce(&mut Current)) {
        let mut current = self.current();
        match current.advance(event) {
            Ok(()) => report(&mut current),
            // Cannot happen: who notes it has the guest. Nothing is done with it from here on.
            Err(error) => tracing::error!(%error, "a fault of the migration's states"),
        }
        drop(current);
        self.changed.notify_all();
    }

    /// The guest runs at the destination: this process ends.
    fn moved(&self, report: impl FnOnce(&mut Current)) {
        self.note(Event::Moved, report);
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

/// Reports how far a migration is.
pub(crate) struct Watch(pub(crate) Arc<MigrationController>);

impl Observer for Watch {
    fn phase(&mut self, phase: Phase) {
        let mut current = self.0.current();
        // A destination that waits for connections has no source yet. Refused at a source.
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

/// A panic leaves what is behind these locks whole.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
