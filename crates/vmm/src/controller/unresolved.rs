//! A guest that is in-doubt or stuck until the operator or the peer resolves it.

use std::sync::{Arc, Mutex};

use control::ControlError;
use control::api::ResolveAction;
use diagnostics::{contain, panic_point};
use migration::tcp::TcpConnector;
use migration::traits::{MachineError, SourceMachine as _};
use migration::{DestinationOwnership, Resolution, SourceDoubt};

use super::participant::{MigrationSource, MigrationTarget};
use super::state::Event;
use super::{MigrationController, locked, refusal, refused};

/// What resolving it requires.
pub(super) enum Unresolved {
    /// In-doubt at the source.
    Source { doubt: SourceDoubt, to: TcpConnector, guest: MigrationSource },
    /// In-doubt at the destination.
    Destination(Arc<Mutex<Arrived>>),
    /// Only this host has the guest, and it could not be resumed.
    Stuck(MigrationSource),
}

/// A guest that arrived, and the ownership that permits running it.
pub(crate) struct Arrived {
    pub(crate) ownership: DestinationOwnership,
    pub(crate) guest: MigrationTarget,
}

impl MigrationController {
    /// Resolves on which host the guest runs, for the operator.
    ///
    /// # Errors
    /// Nothing is in doubt, or the guest is still in-doubt.
    pub(super) fn resolve(&self, action: ResolveAction) -> Result<(), ControlError> {
        let mut unresolved = self.claim_unresolved()?;
        let resolved = contain(|| {
            panic_point("resolve");
            unresolved.resolve(action)
        });
        let resolved = resolved.unwrap_or_else(|panicked| {
            let hint = "see the log, then resolve it again".to_owned();
            Err(ControlError::Failed { what: format!("host: {panicked}"), hint })
        });
        match resolved {
            Ok(Some(Resolution::RunsAtDestination)) => {
                self.moved(|current| current.report.end(None))
            }
            Ok(Some(Resolution::NeverRan)) => self.record(Event::Resumed, |current| {
                let error = "the migration failed; the guest runs here".to_owned();
                current.report.end(Some(error));
            }),
            // Starting or destroying the guest has already recorded the outcome.
            Ok(Some(Resolution::InDoubt) | None) | Err(_) => self.return_unresolved(unresolved),
        }
        resolved.map(drop)
    }

    /// Claims the unresolved guest; a second call is refused until the claim ends.
    fn claim_unresolved(&self) -> Result<Unresolved, ControlError> {
        let mut current = self.current();
        let state = current.state.next(Event::ResolveBegin).map_err(refusal)?;
        let unresolved = current.unresolved.take().ok_or_else(|| {
            let what = "the guest's state is unknown after a panic".to_owned();
            let hint = "see the log; if the guest does not run on the peer, start it again";
            ControlError::Failed { what, hint: hint.to_owned() }
        })?;
        current.state = state;
        Ok(unresolved)
    }

    /// Returns the unresolved guest, unless a source that asked has resolved it meanwhile.
    fn return_unresolved(&self, unresolved: Unresolved) {
        let mut current = self.current();
        if current.advance(Event::ResolveFailed).is_ok() {
            current.unresolved = Some(unresolved);
        }
        drop(current);
        self.changed.notify_all();
    }
}

impl Unresolved {
    /// Returns the resolution of a source's guest; `None` for a destination's.
    fn resolve(&mut self, action: ResolveAction) -> Result<Option<Resolution>, ControlError> {
        match self {
            Self::Source { doubt, to, guest } => {
                let resolved = match action {
                    ResolveAction::Ask => doubt.resolve(guest, to),
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

/// Resumes a guest whose migration failed.
fn resolve_stuck(
    guest: &mut MigrationSource,
    action: ResolveAction,
) -> Result<Resolution, ControlError> {
    if action == ResolveAction::Discard {
        let what = "only this host has the guest".to_owned();
        let hint = "end its process to end the guest".to_owned();
        return Err(ControlError::Refused { what, hint });
    }
    guest.resume().map_err(|error| still_paused(&error))?;
    Ok(Resolution::NeverRan)
}

/// Runs or destroys a guest that arrived.
fn resolve_destination(arrived: &mut Arrived, action: ResolveAction) -> Result<(), ControlError> {
    let Arrived { ownership, guest } = arrived;
    match action {
        ResolveAction::Ask => {
            let what = "only a source can ask its peer".to_owned();
            let hint =
                "resolve it at the source; if the source is dead, give --run-here".to_owned();
            Err(ControlError::Refused { what, hint })
        }
        ResolveAction::RunHere => {
            if ownership.resolution() == Resolution::InDoubt {
                // A guest that cannot be started is destroyed, and the source may be dead. So take
                // the disks first: only that can fail and succeed later.
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

/// The error for a guest that is still paused and whole.
fn still_paused(error: &MachineError) -> ControlError {
    let hint = "the guest is intact and paused; resolve it again when no other guest uses the \
                disk, here or on the peer";
    ControlError::Refused { what: error.to_string(), hint: hint.to_owned() }
}
