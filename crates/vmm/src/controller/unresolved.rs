//! A guest of which its operator, or the other side, has to say what becomes of it.

use std::sync::{Arc, Mutex};

use control::ControlError;
use control::api::ResolveAction;
use diagnostics::{contain, panic_point};
use migration::tcp::TcpConnector;
use migration::traits::{MachineError, SourceMachine as _};
use migration::{DestinationOwnership, Resolution, SourceDoubt};

use super::state::Event;
use super::{MigrationController, locked, refusal, refused};
use crate::traits::{MigrationSource, MigrationTarget};

/// What is needed to resolve it.
pub(super) enum Unresolved {
    /// In doubt, at its source.
    Source { doubt: SourceDoubt, to: TcpConnector, guest: MigrationSource },
    /// In doubt, at its destination.
    Destination(Arc<Mutex<Arrived>>),
    /// It is here and nowhere else, and could not be resumed.
    Stuck(MigrationSource),
}

/// A guest that came, and the right to run it.
pub(crate) struct Arrived {
    pub(crate) ownership: DestinationOwnership,
    pub(crate) guest: MigrationTarget,
}

impl MigrationController {
    /// Resolves where the guest runs, for an operator.
    ///
    /// # Errors
    /// Nothing is in doubt, or it still is.
    pub(super) fn resolve(&self, action: ResolveAction) -> Result<(), ControlError> {
        let mut unresolved = self.begin_to_resolve()?;
        let resolved = contain(|| {
            panic_point("resolve");
            unresolved.resolve(action)
        });
        let resolved = resolved.unwrap_or_else(|panicked| {
            let hint = "look into the log, and resolve it again".to_owned();
            Err(ControlError::Failed { what: format!("host: {panicked}"), hint })
        });
        match resolved {
            Ok(Some(Resolution::RunsAtDestination)) => {
                self.moved(|current| current.report.end(None))
            }
            Ok(Some(Resolution::NeverRan)) => self.note(Event::Resumed, |current| {
                let error = "the guest was not moved, and runs on".to_owned();
                current.report.end(Some(error));
            }),
            // What became of it is noted where it is started or destroyed, if it was.
            Ok(Some(Resolution::InDoubt) | None) | Err(_) => self.end_to_resolve(unresolved),
        }
        resolved.map(drop)
    }

    /// Nobody else resolves it meanwhile.
    fn begin_to_resolve(&self) -> Result<Unresolved, ControlError> {
        let mut current = self.current();
        let state = current.state.next(Event::ResolveBegin).map_err(refusal)?;
        let unresolved = current.unresolved.take().ok_or_else(|| {
            let what = "what became of the guest is not known after a panic".to_owned();
            let hint = "see the log; where the guest does not run on the other side, start it anew";
            ControlError::Failed { what, hint: hint.to_owned() }
        })?;
        current.state = state;
        Ok(unresolved)
    }

    /// It is as it was, unless a source that asked has resolved it.
    fn end_to_resolve(&self, unresolved: Unresolved) {
        let mut current = self.current();
        if current.advance(Event::ResolveFailed).is_ok() {
            current.unresolved = Some(unresolved);
        }
        drop(current);
        self.changed.notify_all();
    }
}

impl Unresolved {
    /// What is known now of a guest that was to leave.
    fn resolve(&mut self, action: ResolveAction) -> Result<Option<Resolution>, ControlError> {
        match self {
            Self::Source { doubt, to, guest } => {
                let resolved = match action {
                    ResolveAction::Ask => doubt.ask(guest, to),
                    ResolveAction::RunHere => doubt.run_here(guest),
                    ResolveAction::Discard => Ok(doubt.relinquish(guest)),
                };
                resolved.map(Some).map_err(|error| refused(&error))
            }
            Self::Stuck(guest) => resolve_stuck(guest, action).map(Some),
            Self::Destination(arrived) => {
                resolve_destination(&mut locked(arrived), action).map(|()| None)
            }
        }
    }
}

/// Resumes a guest that was not moved.
fn resolve_stuck(
    guest: &mut MigrationSource,
    action: ResolveAction,
) -> Result<Resolution, ControlError> {
    if action == ResolveAction::Discard {
        let what = "the guest is here and nowhere else".to_owned();
        let hint = "end its process if the guest is to end".to_owned();
        return Err(ControlError::Refused { what, hint });
    }
    guest.resume().map_err(|error| still_paused(&error))?;
    Ok(Resolution::NeverRan)
}

/// Runs or destroys a guest that came.
fn resolve_destination(arrived: &mut Arrived, action: ResolveAction) -> Result<(), ControlError> {
    let Arrived { ownership, guest } = arrived;
    match action {
        ResolveAction::Ask => {
            let what = "only a source can ask".to_owned();
            let hint = "resolve it at the source; if that is dead, give --run-here".to_owned();
            Err(ControlError::Refused { what, hint })
        }
        ResolveAction::RunHere => {
            if ownership.resolution() == Resolution::InDoubt {
                // A guest that cannot be started is destroyed, and its source may be dead: what may
                // change is checked before that.
                guest.take_disks().map_err(|error| still_paused(&error))?;
            }
            ownership.run_here(guest).map(drop).map_err(|error| refused(&error))
        }
        ResolveAction::Discard => {
            ownership.discard(guest);
            Ok(())
        }
    }
}

/// Nothing has changed.
fn still_paused(error: &MachineError) -> ControlError {
    let hint = "the guest is whole and paused; resolve it again when no other guest has the disk, \
                here or on the other host";
    ControlError::Refused { what: error.to_string(), hint: hint.to_owned() }
}
