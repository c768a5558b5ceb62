//! Who may run a guest that has fully arrived, and the answers to its source.

use std::time::{Duration, Instant};

use diagnostics::panic_point;

use super::answer_other;
use super::gather::read_hello;
use crate::contained::{attempted, contained};
use crate::error::MigrationError;
use crate::link::{Accept, Link};
use crate::resolution::Resolution;
use crate::summary::us;
use crate::traits::DestinationMachine;
use crate::wire::control::{Control, Hello, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::Stream;

/// The destination's participant of the two-phase commit: the right to run one guest, or its
/// outcome. Every path that runs or destroys the guest goes through here, one at a time, and at
/// most once.
#[derive(Debug)]
pub struct DestinationOwnership {
    id: MigrationId,
    status: PeerStatus,
}

/// A peer that connected and sent its hello. Apart from [`DestinationOwnership`], so that a peer
/// which is slow to send it does not block access to the guest.
pub struct ResolveRequest<L> {
    hello: Hello,
    stream: Stream<L>,
}

impl<L: Link> ResolveRequest<L> {
    /// Reads the hello of a connection.
    ///
    /// # Errors
    /// There is no hello.
    pub fn read(link: L, stall: Duration) -> Result<Self, MigrationError> {
        let (hello, stream) = read_hello(link, stall)?;
        Ok(Self { hello, stream })
    }
}

impl DestinationOwnership {
    /// A prepared guest: whole and paused.
    pub(super) const fn new(id: MigrationId) -> Self {
        Self { id, status: PeerStatus::Prepared }
    }

    /// Identifies the migration on both sides.
    #[must_use]
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// Where the guest is.
    #[must_use]
    pub const fn resolution(&self) -> Resolution {
        match self.status {
            PeerStatus::Runs => Resolution::RunsAtDestination,
            PeerStatus::Prepared => Resolution::InDoubt,
            PeerStatus::Gone | PeerStatus::Unknown => Resolution::NeverRan,
        }
    }

    /// Runs the guest, after the source's commit, or on the order of an operator who **knows that
    /// it does not run at the source** and never will. Returns how long starting it took.
    ///
    /// # Errors
    /// The guest could not be started, or is no longer here. In either case it is destroyed and
    /// never ran.
    pub fn run_here<M: DestinationMachine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Duration, MigrationError> {
        match self.status {
            PeerStatus::Prepared => {}
            PeerStatus::Runs => return Ok(Duration::ZERO),
            PeerStatus::Gone | PeerStatus::Unknown => {
                return Err(MigrationError::Operator {
                    what: "the guest was destroyed here".to_owned(),
                });
            }
        }
        let at = Instant::now();
        let resumed = contained("starting the guest", || {
            panic_point("start");
            machine.resume().map_err(MigrationError::machine("starting the guest"))
        });
        if let Err(error) = resumed {
            self.discard(machine);
            return Err(error);
        }
        self.status = PeerStatus::Runs;
        Ok(at.elapsed())
    }

    /// Destroys a prepared guest. Does nothing to one that runs.
    pub fn discard<M: DestinationMachine>(&mut self, machine: &mut M) {
        if self.status == PeerStatus::Prepared {
            attempted(|| machine.destroy());
            self.status = PeerStatus::Gone;
        }
    }

    /// Serves connections until the source has received the outcome, or until `until`. For a VMM
    /// whose source has not been notified when [`receive`](crate::receive) returns.
    ///
    /// # Errors
    /// No source connected, or no connection can be accepted. An error of one connection is logged,
    /// and the next connection is awaited.
    pub fn serve<M: DestinationMachine, A: Accept>(
        &mut self,
        accept: &mut A,
        stall: Duration,
        until: Option<Instant>,
        machine: &mut M,
    ) -> Result<Resolution, MigrationError> {
        loop {
            let link = accept.accept(until);
            let link = link.map_err(MigrationError::link("waiting for the source"))?;
            match self.answer(link, stall, machine) {
                Ok(()) => return Ok(self.resolution()),
                Err(error) => {
                    tracing::warn!(error = error.chain(), id = %self.id, "still unresolved")
                }
            }
        }
    }

    /// Serves one connection of a source that requests the status. Runs or destroys a prepared
    /// guest, as the source decides.
    ///
    /// # Errors
    /// The connection failed, or the guest could not be started. [`resolution`](Self::resolution)
    /// has the outcome.
    pub fn answer<M: DestinationMachine, L: Link>(
        &mut self,
        link: L,
        stall: Duration,
        machine: &mut M,
    ) -> Result<(), MigrationError> {
        self.answer_to(ResolveRequest::read(link, stall)?, machine)
    }

    /// The same for a peer whose hello was read already.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    pub fn answer_to<M: DestinationMachine, L: Link>(
        &mut self,
        asking: ResolveRequest<L>,
        machine: &mut M,
    ) -> Result<(), MigrationError> {
        let ResolveRequest { hello, mut stream } = asking;
        if hello.purpose == Purpose::Migrate {
            let reason =
                "another guest arrived there before: it runs there, or must be resolved first";
            stream.send_and_close(&Control::Abort { reason: reason.to_owned() });
            return Err(MigrationError::Peer {
                what: "it sends a guest to a destination that already has one",
            });
        }
        if hello.purpose != Purpose::Resolve || hello.id != self.id {
            answer_other(&mut stream, PeerStatus::Unknown);
            return Err(MigrationError::Peer {
                what: "it requests the status of another migration",
            });
        }
        stream.send(&Control::Status(self.status))?;
        if self.status != PeerStatus::Prepared {
            return Ok(());
        }
        let outcome = self.apply_decision(&mut stream, machine);
        // Send the outcome in any case. If it is lost, the source requests it again.
        stream.send(&Control::Status(self.status))?;
        outcome
    }

    fn apply_decision<M: DestinationMachine, L: Link>(
        &mut self,
        stream: &mut Stream<L>,
        machine: &mut M,
    ) -> Result<(), MigrationError> {
        match stream.receive()? {
            Control::Commit => {
                let resume = self.run_here(machine)?;
                tracing::info!(id = %self.id, resume_us = us(resume), "the guest runs here");
                Ok(())
            }
            Control::Rollback => {
                self.discard(machine);
                Ok(())
            }
            _ => Err(MigrationError::Peer { what: "an unexpected message" }),
        }
    }
}
