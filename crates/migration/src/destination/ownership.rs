//! A guest that is whole at the destination, and what is said of it to a source that asks.

use std::time::{Duration, Instant};

use diagnostics::panic_point;

use super::answer_other;
use super::gather::hear;
use crate::contained::{attempted, contained};
use crate::error::MigrationError;
use crate::link::{Accept, Link};
use crate::resolution::Resolution;
use crate::summary::us;
use crate::traits::DestinationMachine;
use crate::wire::control::{Control, Hello, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::Stream;

/// The right to run one guest, or what became of it. All ways to run or to destroy the guest
/// lead through here, one at a time, and each is taken once.
#[derive(Debug)]
pub struct DestinationOwnership {
    id: MigrationId,
    status: PeerStatus,
}

/// Somebody who connected and has said what for. Apart from [`DestinationOwnership`], so that nobody who takes
/// long to say it keeps others from the guest.
pub struct Asking<L> {
    hello: Hello,
    stream: Stream<L>,
}

impl<L: Link> Asking<L> {
    /// Hears what a connection is for.
    ///
    /// # Errors
    /// It does not say, or says something else.
    pub fn hear(link: L, stall: Duration) -> Result<Self, MigrationError> {
        let (hello, stream) = hear(link, stall)?;
        Ok(Self { hello, stream })
    }
}

impl DestinationOwnership {
    /// A guest that is whole and paused.
    pub(super) const fn new(id: MigrationId) -> Self {
        Self { id, status: PeerStatus::Waits }
    }

    /// Names the migration on both sides.
    #[must_use]
    pub const fn id(&self) -> MigrationId {
        self.id
    }

    /// Where the guest is.
    #[must_use]
    pub const fn resolution(&self) -> Resolution {
        match self.status {
            PeerStatus::Runs => Resolution::RunsAtDestination,
            PeerStatus::Waits => Resolution::InDoubt,
            PeerStatus::Gone | PeerStatus::Unknown => Resolution::NeverRan,
        }
    }

    /// Runs the guest, by the source's word; or by that of an operator who **knows that it does
    /// not run at the source** and never will. How long starting it took.
    ///
    /// # Errors
    /// It could not be started, or is not here any more. In either case it is gone, without
    /// having run.
    pub fn run_here<M: DestinationMachine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Duration, MigrationError> {
        match self.status {
            PeerStatus::Waits => {}
            PeerStatus::Runs => return Ok(Duration::ZERO),
            PeerStatus::Gone | PeerStatus::Unknown => {
                return Err(MigrationError::Operator { what: "the guest is gone".to_owned() });
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

    /// Destroys a guest that waits. One that runs is left alone.
    pub fn discard<M: DestinationMachine>(&mut self, machine: &mut M) {
        if self.status == PeerStatus::Waits {
            attempted(|| machine.destroy());
            self.status = PeerStatus::Gone;
        }
    }

    /// Serves connections until the source has heard what became of its guest, or until `until`.
    /// What a monitor does after [`receive`](crate::receive) left something to be told.
    ///
    /// # Errors
    /// Nobody came, or no connection can be taken. What fails on one of them is logged, and the
    /// next is waited for.
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
                Err(error) => tracing::warn!(error = error.chain(), id = %self.id, "not resolved"),
            }
        }
    }

    /// Serves one connection of a source that asks what became of its guest. A guest that waits
    /// is run or destroyed, as the source says.
    ///
    /// # Errors
    /// The connection failed, or the guest could not be started. [`resolution`](Self::resolution) says
    /// where it is.
    pub fn answer<M: DestinationMachine, L: Link>(
        &mut self,
        link: L,
        stall: Duration,
        machine: &mut M,
    ) -> Result<(), MigrationError> {
        self.answer_to(Asking::hear(link, stall)?, machine)
    }

    /// The same of one who was heard already.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    pub fn answer_to<M: DestinationMachine, L: Link>(
        &mut self,
        asking: Asking<L>,
        machine: &mut M,
    ) -> Result<(), MigrationError> {
        let Asking { hello, mut stream } = asking;
        if hello.purpose == Purpose::Migrate {
            let reason = "another guest came there before: it runs, or is to be resolved first";
            stream.say_and_hang_up(&Control::Abort { reason: reason.to_owned() });
            return Err(MigrationError::Peer { what: "it brings a guest where one is" });
        }
        if hello.purpose != Purpose::Resolve || hello.id != self.id {
            answer_other(&mut stream, PeerStatus::Unknown);
            return Err(MigrationError::Peer { what: "it asks for another guest" });
        }
        stream.send(&Control::Status(self.status))?;
        if self.status != PeerStatus::Waits {
            return Ok(());
        }
        let outcome = self.take_word(&mut stream, machine);
        // What it comes to is said in any case; if that is lost the source asks again.
        stream.send(&Control::Status(self.status))?;
        outcome
    }

    fn take_word<M: DestinationMachine, L: Link>(
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
            _ => Err(MigrationError::Peer { what: "a message out of its turn" }),
        }
    }
}
