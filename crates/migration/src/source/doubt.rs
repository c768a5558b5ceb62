//! A source in doubt: it sent the commit and does not know whether the destination runs the guest.

use std::time::Duration;

use super::network::hello;
use super::{SourceConfig, stop_tracking};
use crate::error::MigrationError;
use crate::link::{Connect, Link};
use crate::resolution::Resolution;
use crate::traits::SourceMachine;
use crate::wire::control::{Control, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::{Side, Stream};

/// The answer to the commit was lost. The guest is paused here. The destination may run it, may
/// still be prepared, or may have destroyed it. Each method resolves the doubt.
#[derive(Clone, Debug)]
pub struct SourceDoubt {
    id: MigrationId,
    stall: Duration,
    queried_free: bool,
}

impl SourceDoubt {
    pub(super) const fn new(id: MigrationId, config: &SourceConfig) -> Self {
        let queried_free = !config.free_pages_wait.is_zero();
        Self { id, stall: config.stall_paused, queried_free }
    }

    /// Identifies the migration on both sides.
    #[must_use]
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// Requests the destination's status and completes the migration. Commits again if the
    /// destination is still prepared.
    ///
    /// # Errors
    /// The destination cannot be reached, or has no record of the migration. The guest stays paused
    /// and in doubt.
    pub fn resolve<M: SourceMachine, C: Connect>(
        &self,
        machine: &mut M,
        connect: &mut C,
    ) -> Result<Resolution, MigrationError> {
        match resolve(self.id, connect, self.stall, &Control::Commit)? {
            PeerStatus::Runs => {
                machine.relinquish();
                Ok(Resolution::RunsAtDestination)
            }
            PeerStatus::Gone => self.run_here(machine),
            PeerStatus::Prepared | PeerStatus::Unknown => {
                Err(MigrationError::Peer { what: "it has no outcome of this migration" })
            }
        }
    }

    /// Resumes the guest here, on the order of an operator who **knows that it does not run at the
    /// destination** and never will: the destination's process is dead.
    ///
    /// # Errors
    /// The guest cannot be resumed. It is still here, and still in doubt.
    pub fn run_here<M: SourceMachine>(
        &self,
        machine: &mut M,
    ) -> Result<Resolution, MigrationError> {
        machine.resume().map_err(MigrationError::machine("resuming the guest"))?;
        stop_tracking(machine, true, self.queried_free);
        Ok(Resolution::NeverRan)
    }

    /// Relinquishes the guest, on the order of an operator who knows that the destination has it.
    pub fn relinquish<M: SourceMachine>(&self, machine: &mut M) -> Resolution {
        machine.relinquish();
        Resolution::RunsAtDestination
    }
}

/// Sends a rollback to a destination that may be prepared: the guest runs on here.
pub(super) fn roll_back<C: Connect>(
    id: MigrationId,
    connect: &mut C,
    config: &SourceConfig,
) -> Result<(), MigrationError> {
    resolve(id, connect, config.stall_paused, &Control::Rollback).map(drop)
}

/// Requests a destination's status. Sends `decision` if the destination is prepared, and returns
/// the status after that.
fn resolve<C: Connect>(
    id: MigrationId,
    connect: &mut C,
    stall: Duration,
    decision: &Control,
) -> Result<PeerStatus, MigrationError> {
    let link = connect.connect().map_err(|source| MigrationError::Connect { source })?;
    let mut stream = Stream::new(link, stall)?;
    let hello = hello(id, Purpose::Resolve, 0, 1);
    stream.send(&Control::Hello(hello.clone()))?;
    stream.key(&hello, Side::Source);
    match status(&mut stream)? {
        PeerStatus::Prepared => {}
        known => return Ok(known),
    }
    stream.send(decision)?;
    status(&mut stream)
}

fn status<L: Link>(stream: &mut Stream<L>) -> Result<PeerStatus, MigrationError> {
    match stream.receive()? {
        Control::Status(status) => Ok(status),
        _ => Err(MigrationError::Peer { what: "an unexpected message" }),
    }
}
