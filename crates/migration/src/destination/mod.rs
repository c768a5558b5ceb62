//! The side where the guest is to be: the phases, as a list.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diagnostics::panic_point;

use crate::contained::{PanicWatch, attempted, contained};
use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::limits::{DEFAULT_MAX_MEMORY_BYTES, MAX_ROUNDS, STALL, STALL_PAUSED};
use crate::link::{Accept, Link};
use crate::observer::{Observer, Phase};
use crate::summary::us;
use crate::traits::{Description, DestinationMachine, WritePages};
use crate::wire::chunk::PAGE_BYTES;
use crate::wire::control::{CAPABILITY_ZSTD, Control, MigrationId, PeerStatus};
use crate::wire::frame::Kind;
use crate::wire::stream::Stream;

mod gather;
mod ownership;
mod round;
mod state;

pub use ownership::{Asking, DestinationOwnership};
pub(crate) use state::StateParts;

use gather::Group;
use round::Round;

/// What a destination takes.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Name of the machine where it comes from; what it is called here is for the monitor to choose.
    pub machine: String,
    /// Memory that a guest may have, in bytes.
    pub max_memory_bytes: u64,
    /// Time without a byte after which a source counts as gone.
    pub stall: Duration,
    /// The same once it has sent everything and the guest stands still.
    pub stall_paused: Duration,
    /// Until when a source must have come; for ever where there is none.
    pub deadline: Option<Instant>,
    /// Migrations to here whose guest is gone without having run: a source that asks for one of
    /// them hears so, also where the word was lost before.
    pub gone: Vec<MigrationId>,
}

impl DestinationConfig {
    /// For machines named `machine`, with the limits of [`crate::limits`].
    #[must_use]
    pub fn new(machine: &str) -> Self {
        Self {
            machine: machine.to_owned(),
            max_memory_bytes: DEFAULT_MAX_MEMORY_BYTES,
            stall: STALL,
            stall_paused: STALL_PAUSED,
            deadline: None,
            gone: Vec::new(),
        }
    }
}

/// A guest that arrived.
#[derive(Debug)]
pub struct Received {
    /// What is answered to a source that asks; see [`DestinationOwnership::answer`].
    pub ownership: DestinationOwnership,
    /// False where the source could not be told that the guest runs. It stays paused there and
    /// asks, if its operator wants it to.
    pub source_knows: bool,
    /// Pages whose contents came, each time that they did.
    pub received_pages: u64,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the first connection to the start of the guest, in microseconds.
    pub total_us: u64,
}

/// A guest that did not arrive, and what is left of it here.
#[derive(Debug)]
pub struct ReceiveFailure {
    /// Names the migration on both sides; none where no source came.
    pub id: Option<MigrationId>,
    /// Why.
    pub error: MigrationError,
    /// What is left.
    pub guest: DestinationGuest,
}

/// What is left of a guest that did not arrive.
#[derive(Debug)]
pub enum DestinationGuest {
    /// Nothing.
    Destroyed,
    /// Nothing: it could not be started. The source may not have heard that, and ask.
    Refused(DestinationOwnership),
    /// All of it, paused. Its source may have given it away, or have kept it.
    InDoubt(DestinationOwnership),
}

/// Waits for a source, takes its guest and runs it.
///
/// # Errors
/// The guest does not run here; the failure says what is left of it.
pub fn receive<M: DestinationMachine, A: Accept>(
    config: &DestinationConfig,
    machine: &mut M,
    accept: &mut A,
    observer: &mut dyn Observer,
) -> Result<Received, ReceiveFailure> {
    observer.phase(Phase::Connect);
    let nobody = |error| ReceiveFailure { id: None, error, guest: DestinationGuest::Destroyed };
    let group = contained("waiting for a source", || gather::gather(config, accept));
    let group = group.map_err(nobody)?;
    let started = Instant::now();
    let panics = PanicWatch::start();
    let Group { id, mut streams, hello } = group;
    let failed = |error, guest| ReceiveFailure { id: Some(id), error, guest };
    let destroyed = |error| failed(error, DestinationGuest::Destroyed);
    let (received_pages, rounds) = (0, 0);
    let mut arrival = Arrival { config, machine, observer, panics, received_pages, rounds };
    let outcome = contained("taking the guest", || {
        arrival.everything(hello.version()?, hello.capabilities, &mut streams)
    });
    if let Err(error) = outcome {
        attempted(|| arrival.machine.destroy());
        attempted(|| give_up(&mut streams, &error));
        return Err(destroyed(error));
    }
    let (received_pages, rounds) = (arrival.received_pages, arrival.rounds);
    let first = streams.first_mut().ok_or(MigrationError::Closed).map_err(destroyed)?;
    let mut ownership = DestinationOwnership::new(id);
    let word = contained("waiting for the source's word", || {
        observer.phase(Phase::Switchover);
        panic_point("prepared");
        first.receive()
    });
    match word {
        Ok(Control::Commit) => {}
        Err(error @ MigrationError::GivenUp { .. }) => {
            // Its last word, and that it keeps the guest.
            ownership.discard(machine);
            // If this does not arrive it asks.
            attempted(|| drop(first.send(&Control::Status(PeerStatus::Gone))));
            return Err(destroyed(error));
        }
        // The source says this or that, and nothing else: so it was not the source.
        Ok(_) => {
            let error = MigrationError::Peer { what: "a message out of its turn" };
            return Err(failed(error, DestinationGuest::InDoubt(ownership)));
        }
        Err(error) => {
            return Err(failed(error, DestinationGuest::InDoubt(ownership)));
        }
    }
    let resume = match ownership.run_here(machine) {
        Ok(resume) => resume,
        Err(error) => {
            // It did not run, and is gone before the source hears of it.
            attempted(|| drop(first.send(&Control::Refused)));
            return Err(failed(error, DestinationGuest::Refused(ownership)));
        }
    };
    let told = contained("telling the source", || {
        panic_point("running");
        first.send(&Control::Running { resume_us: us(resume) })
    });
    let source_knows = told.is_ok();
    let total_us = us(started.elapsed());
    Ok(Received { ownership, source_knows, received_pages, rounds, total_us })
}

/// Tells the source why, where it can be told.
fn give_up<L: Link>(streams: &mut [Stream<L>], error: &MigrationError) {
    let reason = error.chain();
    for stream in streams {
        stream.say_and_hang_up(&Control::Abort { reason: reason.clone() });
    }
}

/// A guest on its way in.
struct Arrival<'a, M> {
    config: &'a DestinationConfig,
    machine: &'a mut M,
    observer: &'a mut dyn Observer,
    panics: PanicWatch,
    received_pages: u64,
    rounds: u32,
}

const OUT_OF_TURN: MigrationError = MigrationError::Peer { what: "a message out of its turn" };

impl<M: DestinationMachine> Arrival<'_, M> {
    /// Everything up to the source's last word. An error leaves a guest that must be destroyed.
    fn everything<L: Link>(
        &mut self,
        version: u16,
        capabilities: u32,
        streams: &mut [Stream<L>],
    ) -> Result<(), MigrationError> {
        self.observer.phase(Phase::Negotiate);
        let capabilities = capabilities & CAPABILITY_ZSTD;
        let first = streams.first_mut().ok_or(MigrationError::Closed)?;
        first.send(&Control::Welcome { version, capabilities })?;
        let Control::Describe(description) = first.receive()? else { return Err(OUT_OF_TURN) };
        let memory = self.create(&description)?;
        first.send(&Control::Ready)?;
        self.rounds(&description.layout, memory, streams)?;
        self.state(streams.first_mut().ok_or(MigrationError::Closed)?)
    }

    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MigrationError> {
        check(self.config, &self.machine.cpu_features(), description)?;
        let memory = self.machine.create(description);
        memory.map_err(MigrationError::machine("making the guest"))
    }

    /// Takes rounds to the last.
    fn rounds<L: Link>(
        &mut self,
        layout: &GuestLayout,
        memory: Arc<dyn WritePages>,
        streams: &mut [Stream<L>],
    ) -> Result<(), MigrationError> {
        for number in 0..MAX_ROUNDS {
            let first = streams.first_mut().ok_or(MigrationError::Closed)?;
            let Control::RoundStart { round, last, pages } = first.receive()? else {
                return Err(OUT_OF_TURN);
            };
            if round != number {
                return Err(OUT_OF_TURN);
            }
            if pages > layout.pages() {
                return Err(MigrationError::Peer { what: "more pages than the guest has" });
            }
            let phase = if last { Phase::LastRound } else { Phase::Round { number } };
            self.observer.phase(phase);
            panic_point("taken round");
            let round = Round { number, pages, layout, memory: memory.as_ref() };
            let done = round.take(streams, self.observer)?;
            self.received_pages += done.received_pages;
            self.rounds = number + 1;
            let first = streams.first_mut().ok_or(MigrationError::Closed)?;
            if last {
                streams
                    .iter()
                    .try_for_each(|stream| stream.set_timeout(self.config.stall_paused))?;
                return Ok(());
            }
            first.send(&Control::RoundDone { round: number, pages: done.told_pages })?;
        }
        Err(MigrationError::Peer { what: "rounds without end" })
    }

    /// Takes the state and gives it to the machine.
    fn state<L: Link>(&mut self, first: &mut Stream<L>) -> Result<(), MigrationError> {
        self.observer.phase(Phase::State);
        let mut parts = StateParts::default();
        loop {
            let kind = first.read()?.kind;
            let (body, payload) = first.last();
            if kind == Kind::State {
                parts.add(body, payload)?;
                continue;
            }
            match Control::decode(kind, body)? {
                Control::StateEnd { sections, bytes } if payload.is_empty() => {
                    let state = parts.finish(sections, bytes)?;
                    let at = Instant::now();
                    let loaded = self.machine.load_state(state);
                    loaded.map_err(MigrationError::machine("loading the guest's state"))?;
                    panic_point("loaded");
                    self.panics.check()?;
                    return first.send(&Control::Prepared { load_us: us(at.elapsed()) });
                }
                Control::Abort { reason } => return Err(MigrationError::GivenUp { reason }),
                _ => return Err(OUT_OF_TURN),
            }
        }
    }
}

/// Checks that a guest can be taken at all, before anything is allocated for it.
pub(crate) fn check(
    config: &DestinationConfig,
    host: &crate::cpu::CpuFeatures,
    description: &Description,
) -> Result<(), MigrationError> {
    if description.machine != config.machine {
        let (guest, awaited) = (description.machine.clone(), config.machine.clone());
        return Err(MigrationError::OtherName { guest, awaited });
    }
    let (pages, most) = (description.layout.pages(), config.max_memory_bytes / PAGE_BYTES as u64);
    if pages > most {
        return Err(MigrationError::TooLarge { pages, most });
    }
    Ok(description.cpu.check(host)?)
}

/// What a destination says of a migration other than the one that it has.
pub(crate) fn answer_other<L: Link>(stream: &mut Stream<L>, status: PeerStatus) {
    stream.say_and_hang_up(&Control::Status(status));
}
