//! Who may run and stop the guest of this process, and where a migration of it is. Every change is
//! one pure function, [`State::next`]; threads, locks and the guest itself are outside.
//!
//! ```text
//!            Begin (source, snapshot)
//!   +------+ -----------------------> +---------+ Saved, Moved, Failed, Arrived  +------+
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
//!                                      Moved, Resumed, Arrived or Discarded
//! ```
//!
//! A migration is a two-phase commit. The destination is prepared when it has the whole guest. The
//! source decides: from [`Event::Commit`] on its guest stays paused until it is known that the
//! destination did not run it. A participant that has not heard the other's answer is in doubt.

use control::api::{MigrationSide, MigrationState};

/// Where the migration is, and what the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) guest: Guest,
    /// Why nothing is begun, committed or resolved any more: this process ends.
    pub(crate) closed: Option<&'static str>,
}

/// The newest migration or snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// There was none.
    Idle,
    /// A destination waits for a source to connect.
    Waiting,
    /// It is under way. `committing`: the destination may have been told to run the guest.
    Running { side: MigrationSide, committing: bool },
    /// The other side's answer was lost. `resolving`: somebody is finding it out.
    InDoubt { side: MigrationSide, resolving: bool },
    /// The guest is here and nowhere else, and could not be resumed.
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
    /// Nothing has changed: the guest runs where it ran.
    Failed,
}

/// The guest in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    /// There is none: not yet, or not any more.
    Absent,
    /// Its operator has it, and it runs.
    Runs,
    /// Its operator has paused it.
    Paused,
    /// Its operator is pausing or resuming it.
    Changing,
    /// A migration has it, and alone may pause and resume it; or it is in doubt and paused.
    Held,
}

/// What happens to a guest or its migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The guest is about to run here: booted, restored or arrived.
    Start,
    /// The operator pauses or resumes it.
    Change,
    /// That is done.
    Changed { paused: bool },
    /// The operator moves it, or writes it to a file.
    Begin(MigrationSide),
    /// The operator ends that.
    Cancel,
    /// The operator, or a source that asks, resolves what is in doubt or stuck.
    ResolveBegin,
    /// It is as it was.
    ResolveFailed,
    /// A destination waits for a source.
    Wait,
    /// A source has connected.
    Connected,
    /// The source is about to tell the destination to run the guest.
    Commit,
    /// The other side's answer is lost.
    Uncertain,
    /// The destination runs the guest.
    Moved,
    /// The guest is in the file and runs again.
    Saved,
    /// The source's guest runs on; or no guest came.
    Failed,
    /// The source's guest, which was in doubt or stuck, runs again.
    Resumed,
    /// It cannot be resumed.
    Unresumable,
    /// The destination's guest was destroyed before it ran.
    Discarded,
    /// Its thread panicked where nothing is known of the guest.
    Lost,
    /// This process ends.
    Close(&'static str),
}

/// Why an event cannot happen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("there is no guest here")]
    NoGuest,
    #[error("the guest is paused; resume it first")]
    Paused,
    #[error("a migration or a snapshot of the guest is under way")]
    Busy,
    #[error("the guest is being paused or resumed")]
    Changing,
    #[error("it is not known on which host the guest runs; resolve that first")]
    InDoubt,
    #[error("the guest could not be resumed; resolve that first")]
    Stuck,
    #[error("no migration or snapshot of the guest is under way that could be cancelled")]
    NotCancellable,
    #[error("nothing is in doubt about where the guest runs")]
    NotInDoubt,
    #[error("somebody is resolving it already")]
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
    /// The state after `event`.
    ///
    /// # Errors
    /// It cannot happen now, and the state stays as it is.
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

    /// In the control API's words.
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

    /// The guest that was waited for did not come, and never ran here.
    pub(crate) fn has_not_come(self) -> bool {
        self.phase == done(MigrationSide::Destination, Outcome::Failed)
    }

    /// A guest that came is in doubt.
    pub(crate) const fn came_in_doubt(self) -> bool {
        matches!(self.phase, Phase::InDoubt { side: MigrationSide::Destination, .. })
    }

    fn open(self) -> Result<Self, Refusal> {
        self.closed.map_or(Ok(self), |reason| Err(Refusal::Closed(reason)))
    }

    /// The operator has the guest, and no migration.
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

    /// What happens before a guest has come.
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

    /// What becomes of a migration that is under way, in doubt or stuck.
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
