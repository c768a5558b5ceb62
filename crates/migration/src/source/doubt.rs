//! A guest that was offered, and of which nobody knows whether it was taken.

use std::time::Duration;

use super::network::hello;
use super::{SourceConfig, undo_watch};
use crate::error::MigrationError;
use crate::link::{Connect, Link};
use crate::resolution::Resolution;
use crate::traits::SourceMachine;
use crate::wire::control::{Control, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::{Side, Stream};

/// The last word of a migration was lost. The guest is paused here; the destination may run it, or
/// may wait. One of these resolves it.
#[derive(Clone, Debug)]
pub struct SourceDoubt {
    id: MigrationId,
    stall: Duration,
    asked_free: bool,
}

impl SourceDoubt {
    pub(super) const fn new(id: MigrationId, config: &SourceConfig) -> Self {
        let asked_free = !config.free_pages_wait.is_zero();
        Self { id, stall: config.stall_paused, asked_free }
    }

    /// Names the migration on both sides.
    #[must_use]
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// Asks the destination, and brings the migration to its end: a destination that waits takes
    /// the guest now.
    ///
    /// # Errors
    /// It cannot be reached, or does not know; the guest stays paused and in doubt.
    pub fn ask<M: SourceMachine, C: Connect>(
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
            PeerStatus::Waits | PeerStatus::Unknown => {
                Err(MigrationError::Peer { what: "it does not know what became of the guest" })
            }
        }
    }

    /// The guest goes on here, by the word of an operator who **knows that it does not run at the
    /// destination** and never will: its process is dead.
    ///
    /// # Errors
    /// It cannot be resumed; it is still here, and still in doubt.
    pub fn run_here<M: SourceMachine>(
        &self,
        machine: &mut M,
    ) -> Result<Resolution, MigrationError> {
        machine.resume().map_err(MigrationError::machine("resuming the guest"))?;
        undo_watch(machine, true, self.asked_free);
        Ok(Resolution::NeverRan)
    }

    /// The guest is given away, by the word of an operator who knows that the destination has it.
    pub fn relinquish<M: SourceMachine>(&self, machine: &mut M) -> Resolution {
        machine.relinquish();
        Resolution::RunsAtDestination
    }
}

/// The guest goes on here, and a destination that has all of it, and waits, is to forget it.
pub(super) fn recall<C: Connect>(
    id: MigrationId,
    connect: &mut C,
    config: &SourceConfig,
) -> Result<(), MigrationError> {
    resolve(id, connect, config.stall_paused, &Control::Rollback).map(drop)
}

/// Asks a destination; `word` is for one that waits.
fn resolve<C: Connect>(
    id: MigrationId,
    connect: &mut C,
    stall: Duration,
    word: &Control,
) -> Result<PeerStatus, MigrationError> {
    let link = connect.connect().map_err(|source| MigrationError::Connect { source })?;
    let mut stream = Stream::new(link, stall)?;
    let hello = hello(id, Purpose::Resolve, 0, 1);
    stream.send(&Control::Hello(hello.clone()))?;
    stream.key(&hello, Side::Source);
    match status(&mut stream)? {
        PeerStatus::Waits => {}
        known => return Ok(known),
    }
    stream.send(word)?;
    status(&mut stream)
}

fn status<L: Link>(stream: &mut Stream<L>) -> Result<PeerStatus, MigrationError> {
    match stream.receive()? {
        Control::Status(status) => Ok(status),
        _ => Err(MigrationError::Peer { what: "a message out of its turn" }),
    }
}
