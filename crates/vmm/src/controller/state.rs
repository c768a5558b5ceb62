//! The state of this process's guest and its migration: who may run and pause the guest. Every
//! transition is one pure function, [`State::next`]; threads, locks and the guest are outside.
//!
//! ```text
//!            Begin (source, snapshot)
//!   +------+ -----------------------> +---------+  Saved, Moved, Failed, Start   +------+
//!   | Idle |                          | Running | -----------------------------> | Done |
//!   +------+ --> Waiting -----------> +---------+ <----------------------------- +------+
//!            Wait        Connected     |       |             Begin                ^   ^
//!                          Uncertain   |       | Unresumable, Lost                |   |
//!                                      v       v                                  |   |
//!                               +---------+ +-------+                             |   |
//!                               | InDoubt | | Stuck | ----------------------------+   |
//!                               +---------+ +-------+  ResolveBegin, Resumed          |
//!                                    |                                                |
//!                                    +------------------------------------------------+
//!                                      ResolveBegin, or a peer that asks; then
//!                                      Moved, Resumed, Start or Discarded
//! ```
//!
//! Waiting fails to Done, and a destination whose guest did not arrive waits again.
//!
//! A migration is a two-phase commit. The destination is prepared once it has the whole guest. The
//! source decides: from [`Event::Commit`] on its guest stays paused until the source knows that the
//! destination did not run it. A source without the
//! answer, or a destination without the decision, is in doubt.

use control::api::{MigrationSide, MigrationState};

/// The phase of the migration, and the state of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) guest: Guest,
    /// This process is ending, for this reason: nothing is begun, committed or resolved any more.
    pub(crate) closed: Option<&'static str>,
}

/// The latest migration or snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// None yet.
    Idle,
    /// A destination waits for a source to connect.
    Waiting,
    /// In progress. `committing`: from here on it cannot be cancelled.
    Running { side: MigrationSide, committing: bool },
    /// The answer (source) or the decision (destination) was lost. `resolving`: a thread is
    /// resolving it.
    InDoubt { side: MigrationSide, resolving: bool },
    /// The guest could not be resumed, or nothing is known of it after a panic.
    Stuck { side: MigrationSide, resolving: bool },
    /// It is over.
    Done { side: MigrationSide, outcome: Outcome },
}

/// How a migration or a snapshot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// The guest runs at the destination; this is its source.
    Moved,
    /// The guest runs here; this is its destination.
    Arrived,
    /// The guest is in a file, and runs here.
    Saved,
    /// Nothing has changed: the guest runs where it ran before.
    Failed,
}

/// The guest in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    /// None yet, or no longer.
    Absent,
    /// Runs, under the operator's control.
    Runs,
    /// Paused by the operator.
    Paused,
    /// The operator is pausing or resuming it.
    Changing,
    /// A migration controls it, and only that may pause and resume it; or it is in doubt or stuck.
    Held,
}

/// A transition of a guest or its migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The guest is about to run here: booted, restored or arrived.
    Start,
    /// The operator begins to pause or resume it.
    Change,
    /// The pause or resume is complete.
    Changed { paused: bool },
    /// The operator migrates it, or writes it to a file.
    Begin(MigrationSide),
    /// The operator cancels the migration or snapshot.
    Cancel,
    /// The operator begins to resolve a guest that is in doubt or stuck.
    ResolveBegin,
    /// It is still in-doubt or stuck.
    ResolveFailed,
    /// A destination waits for a source.
    Wait,
    /// A source has connected.
    Connected,
    /// The migration or snapshot is about to commit.
    Commit,
    /// The peer's answer is lost.
    Uncertain,
    /// The destination runs the guest.
    Moved,
    /// The guest is in the file and runs again.
    Saved,
    /// The guest continues at the source; or no guest arrived.
    Failed,
    /// The source's guest, which was in-doubt or stuck, runs again.
    Resumed,
    /// The guest cannot be resumed.
    Unresumable,
    /// The destination's guest was destroyed before it ran.
    Discarded,
    /// The migration thread panicked, and the guest's state is unknown.
    Lost,
    /// This process is ending.
    Close(&'static str),
}

/// Why an event is not allowed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("this process has no guest")]
    NoGuest,
    #[error("the guest is paused; resume it first")]
    Paused,
    #[error("a migration or snapshot of the guest is in progress")]
    Busy,
    #[error("the guest is being paused or resumed")]
    Changing,
    #[error("the guest is in-doubt: on which host it runs is unknown; resolve that first")]
    InDoubt,
    #[error("the guest could not be resumed; resolve that first")]
    Stuck,
    #[error("no migration or snapshot is in progress that can still be cancelled")]
    NotCancellable,
    #[error("the guest is neither in-doubt nor stuck")]
    NotInDoubt,
    #[error("another request is already resolving it")]
    Resolving,
    #[error("the guest ends here: {0}")]
    Closed(&'static str),
    #[error("{event:?} cannot follow {phase:?}")]
    OutOfOrder { event: Event, phase: Phase },
}

impl Default for State {
    fn default() -> Self {
        Self { phase: Phase::Idle, guest: Guest::Absent, closed: None }
    }
}

impl State {
    /// Returns the state after `event`.
    ///
    /// # Errors
    /// The event is not allowed now; the state is unchanged.
    pub(crate) fn next(self, event: Event) -> Result<Self, Refusal> {
        match event {
            Event::Start => self.start(),
            Event::Change | Event::Changed { .. } => self.operator(event),
            Event::Begin(side) => self.begin(side),
            Event::Cancel => match self.phase {
                Phase::Running {
                    side: MigrationSide::Source | MigrationSide::Snapshot,
                    committing: false,
                } => Ok(self),
                _ => Err(Refusal::NotCancellable),
            },
            Event::ResolveBegin | Event::ResolveFailed => self.resolve(event),
            Event::Wait | Event::Connected | Event::Discarded => self.destination(event),
            Event::Close(reason) => Ok(Self { closed: self.closed.or(Some(reason)), ..self }),
            _ => self.source(event),
        }
    }

    /// The control API's state.
    pub(crate) const fn reported(self) -> MigrationState {
        match self.phase {
            Phase::Idle => MigrationState::None,
            Phase::Waiting => MigrationState::Waiting,
            Phase::Running { .. } => MigrationState::Running,
            Phase::InDoubt { .. } => MigrationState::InDoubt,
            Phase::Stuck { .. } => MigrationState::Stuck,
            Phase::Done { outcome, .. } => match outcome {
                Outcome::Moved => MigrationState::Moved,
                Outcome::Arrived => MigrationState::Arrived,
                Outcome::Saved => MigrationState::Saved,
                Outcome::Failed => MigrationState::Failed,
            },
        }
    }

    /// The incoming guest did not arrive and never ran here.
    pub(crate) fn arrival_failed(self) -> bool {
        self.phase == done(MigrationSide::Destination, Outcome::Failed)
    }

    /// A guest that arrived is in-doubt.
    pub(crate) const fn arrived_in_doubt(self) -> bool {
        matches!(self.phase, Phase::InDoubt { side: MigrationSide::Destination, .. })
    }

    fn open(self) -> Result<Self, Refusal> {
        self.closed.map_or(Ok(self), |reason| Err(Refusal::Closed(reason)))
    }

    /// Checks that the operator controls the guest, and no migration does.
    fn free(self) -> Result<Self, Refusal> {
        match self.phase {
            Phase::InDoubt { .. } => return Err(Refusal::InDoubt),
            Phase::Stuck { .. } => return Err(Refusal::Stuck),
            Phase::Running { side: MigrationSide::Source | MigrationSide::Snapshot, .. } => {
                return Err(Refusal::Busy);
            }
            Phase::Idle | Phase::Waiting | Phase::Running { .. } | Phase::Done { .. } => {}
        }
        match self.guest {
            Guest::Absent => Err(Refusal::NoGuest),
            Guest::Changing => Err(Refusal::Changing),
            Guest::Held => Err(Refusal::Busy),
            Guest::Runs | Guest::Paused => self.open(),
        }
    }

    fn start(self) -> Result<Self, Refusal> {
        let phase = match (self.phase, self.guest) {
            (Phase::Idle, Guest::Absent) => Phase::Idle,
            (
                Phase::Running { side: MigrationSide::Destination, .. }
                | Phase::InDoubt { side: MigrationSide::Destination, .. },
                Guest::Absent | Guest::Held,
            ) => done(MigrationSide::Destination, Outcome::Arrived),
            (phase, _) => return Err(Refusal::OutOfOrder { event: Event::Start, phase }),
        };
        self.open().map(|state| Self { phase, guest: Guest::Runs, ..state })
    }

    fn operator(self, event: Event) -> Result<Self, Refusal> {
        let guest = match (event, self.guest) {
            (Event::Changed { paused: true }, Guest::Changing) => Guest::Paused,
            (Event::Changed { paused: false }, Guest::Changing) => Guest::Runs,
            (Event::Change, _) => return self.free().map(|state| state.with(Guest::Changing)),
            (event, _) => return Err(Refusal::OutOfOrder { event, phase: self.phase }),
        };
        Ok(self.with(guest))
    }

    fn begin(self, side: MigrationSide) -> Result<Self, Refusal> {
        let state = self.free()?;
        if state.guest == Guest::Paused {
            return Err(Refusal::Paused);
        }
        let phase = Phase::Running { side, committing: false };
        Ok(Self { phase, guest: Guest::Held, ..state })
    }

    fn resolve(self, event: Event) -> Result<Self, Refusal> {
        let begins = event == Event::ResolveBegin;
        let phase = match self.phase {
            Phase::InDoubt { resolving, .. } | Phase::Stuck { resolving, .. }
                if resolving == begins =>
            {
                return Err(Refusal::Resolving);
            }
            Phase::InDoubt { side, .. } => Phase::InDoubt { side, resolving: begins },
            Phase::Stuck { side, .. } => Phase::Stuck { side, resolving: begins },
            _ => return Err(Refusal::NotInDoubt),
        };
        let state = if begins { self.open()? } else { self };
        Ok(Self { phase, ..state })
    }

    /// The events that occur only at a destination: Wait, Connected, Discarded.
    fn destination(self, event: Event) -> Result<Self, Refusal> {
        const SIDE: MigrationSide = MigrationSide::Destination;
        let (phase, guest) = match (event, self.phase) {
            (Event::Wait, Phase::Idle) if self.guest == Guest::Absent => {
                (Phase::Waiting, self.guest)
            }
            (Event::Wait, Phase::Done { side: SIDE, outcome: Outcome::Failed }) => {
                (Phase::Waiting, Guest::Absent)
            }
            (Event::Connected, Phase::Waiting) => {
                (Phase::Running { side: SIDE, committing: false }, Guest::Absent)
            }
            (Event::Discarded, Phase::InDoubt { side: SIDE, .. }) => {
                (done(SIDE, Outcome::Failed), Guest::Absent)
            }
            (event, phase) => return Err(Refusal::OutOfOrder { event, phase }),
        };
        Ok(Self { phase, guest, ..self })
    }

    /// Commit, and the events that end a migration or leave it unresolved.
    fn source(self, event: Event) -> Result<Self, Refusal> {
        use MigrationSide::{Destination, Snapshot, Source};
        let (phase, guest) = match (event, self.phase) {
            (
                Event::Commit,
                Phase::Running { side: side @ (Source | Snapshot), committing: false },
            ) => {
                let state = self.open()?;
                return Ok(Self { phase: Phase::Running { side, committing: true }, ..state });
            }
            (Event::Uncertain, Phase::Running { side: Source, committing: true }) => {
                (Phase::InDoubt { side: Source, resolving: false }, Guest::Held)
            }
            (Event::Uncertain, Phase::Running { side: Destination, .. }) => {
                (Phase::InDoubt { side: Destination, resolving: false }, Guest::Held)
            }
            (
                Event::Moved,
                Phase::Running { side: Source, committing: true }
                | Phase::InDoubt { side: Source, resolving: true },
            ) => (done(Source, Outcome::Moved), Guest::Absent),
            (Event::Saved, Phase::Running { side: Snapshot, committing: true }) => {
                (done(Snapshot, Outcome::Saved), Guest::Runs)
            }
            (Event::Failed, Phase::Running { side: side @ (Source | Snapshot), .. }) => {
                (done(side, Outcome::Failed), Guest::Runs)
            }
            (Event::Failed, Phase::Running { side: Destination, .. } | Phase::Waiting) => {
                (done(Destination, Outcome::Failed), Guest::Absent)
            }
            (
                Event::Resumed,
                Phase::InDoubt { side: side @ Source, resolving: true }
                | Phase::Stuck { side, resolving: true },
            ) => (done(side, Outcome::Failed), Guest::Runs),
            (
                Event::Unresumable | Event::Lost,
                Phase::Running { side: side @ (Source | Snapshot), .. },
            ) => (Phase::Stuck { side, resolving: false }, Guest::Held),
            (event, phase) => return Err(Refusal::OutOfOrder { event, phase }),
        };
        Ok(Self { phase, guest, ..self })
    }

    const fn with(self, guest: Guest) -> Self {
        Self { guest, ..self }
    }
}

const fn done(side: MigrationSide, outcome: Outcome) -> Phase {
    Phase::Done { side, outcome }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
