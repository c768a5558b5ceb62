//! The destination: the phases, in order.

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

pub use ownership::{DestinationOwnership, ResolveRequest};
pub(crate) use state::StateParts;

use gather::Group;
use round::Round;

/// What a destination accepts.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Name of the guest at its source. The VMM chooses its name here.
    pub machine: String,
    /// Limit of the guest's memory, in bytes.
    pub max_memory_bytes: u64,
    /// Time without a byte after which a source counts as dead.
    pub stall: Duration,
    /// The same once the source has sent all pages and the guest is paused.
    pub stall_paused: Duration,
    /// When to stop waiting for a source; `None` waits without a timeout.
    pub deadline: Option<Instant>,
    /// Migrations to here whose guest was destroyed without having run. A source that requests the
    /// status of one of them receives *gone*, even if an earlier answer was lost.
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
    /// Answers a source that requests the status; see [`DestinationOwnership::answer`].
    pub ownership: DestinationOwnership,
    /// False if *running* could not be sent to the source. The guest stays paused there, in doubt,
    /// until the source requests the status.
    pub source_notified: bool,
    /// Pages whose contents arrived, counted once per arrival.
    pub received_pages: u64,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the first connection to the start of the guest, in microseconds.
    pub total_us: u64,
}

/// A failed arrival, and what is left of the guest here.
#[derive(Debug)]
pub struct ReceiveFailure {
    /// Identifies the migration on both sides; `None` if no source connected.
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
    /// Nothing: it could not be started. *Refused* may be lost, and the source may request the
    /// status.
    Refused(DestinationOwnership),
    /// All of it, paused. The source may have committed, or have resumed it.
    InDoubt(DestinationOwnership),
}

/// Waits for a source, receives its guest and runs it.
///
/// # Errors
/// The guest does not run here. The failure has what is left of it.
pub fn receive<M: DestinationMachine, A: Accept>(
    config: &DestinationConfig,
    machine: &mut M,
    accept: &mut A,
    observer: &mut dyn Observer,
) -> Result<Received, ReceiveFailure> {
    observer.phase(Phase::Connect);
    let no_source = |error| ReceiveFailure { id: None, error, guest: DestinationGuest::Destroyed };
    let group = contained("waiting for a source", || gather::gather(config, accept));
    let group = group.map_err(no_source)?;
    let started = Instant::now();
    let panics = PanicWatch::start();
    let Group { id, mut streams, hello } = group;
    let failed = |error, guest| ReceiveFailure { id: Some(id), error, guest };
    let destroyed = |error| failed(error, DestinationGuest::Destroyed);
    let (received_pages, rounds) = (0, 0);
    let mut arrival = Arrival { config, machine, observer, panics, received_pages, rounds };
    let outcome = contained("receiving the guest", || {
        arrival.prepare(hello.version()?, hello.capabilities, &mut streams)
    });
    if let Err(error) = outcome {
        attempted(|| arrival.machine.destroy());
        attempted(|| abort(&mut streams, &error));
        return Err(destroyed(error));
    }
    let (received_pages, rounds) = (arrival.received_pages, arrival.rounds);
    let first = streams.first_mut().ok_or(MigrationError::Closed).map_err(destroyed)?;
    let mut ownership = DestinationOwnership::new(id);
    let decision = contained("waiting for the commit", || {
        observer.phase(Phase::Switchover);
        panic_point("prepared");
        first.receive()
    });
    match decision {
        Ok(Control::Commit) => {}
        Err(error @ MigrationError::Aborted { .. }) => {
            // The source has decided to keep the guest.
            ownership.discard(machine);
            // If this is lost, the source requests the status.
            attempted(|| drop(first.send(&Control::Status(PeerStatus::Gone))));
            return Err(destroyed(error));
        }
        // A source sends nothing but a decision here, so this message decides nothing.
        Ok(_) => {
            let error = MigrationError::Peer { what: "an unexpected message" };
            return Err(failed(error, DestinationGuest::InDoubt(ownership)));
        }
        Err(error) => {
            return Err(failed(error, DestinationGuest::InDoubt(ownership)));
        }
    }
    let resume = match ownership.run_here(machine) {
        Ok(resume) => resume,
        Err(error) => {
            // It did not run, and was destroyed before this is sent.
            attempted(|| drop(first.send(&Control::Refused)));
            return Err(failed(error, DestinationGuest::Refused(ownership)));
        }
    };
    let sent = contained("sending the outcome", || {
        panic_point("running");
        first.send(&Control::Running { resume_us: us(resume) })
    });
    let source_notified = sent.is_ok();
    let total_us = us(started.elapsed());
    Ok(Received { ownership, source_notified, received_pages, rounds, total_us })
}

/// Sends the source the reason, if possible.
fn abort<L: Link>(streams: &mut [Stream<L>], error: &MigrationError) {
    let reason = error.chain();
    for stream in streams {
        stream.send_and_close(&Control::Abort { reason: reason.clone() });
    }
}

/// A guest that is arriving.
struct Arrival<'a, M> {
    config: &'a DestinationConfig,
    machine: &'a mut M,
    observer: &'a mut dyn Observer,
    panics: PanicWatch,
    received_pages: u64,
    rounds: u32,
}

const UNEXPECTED: MigrationError = MigrationError::Peer { what: "an unexpected message" };

impl<M: DestinationMachine> Arrival<'_, M> {
    /// Phase 1 of the commit, up to *prepared*. After an error the guest must be destroyed.
    fn prepare<L: Link>(
        &mut self,
        version: u16,
        capabilities: u32,
        streams: &mut [Stream<L>],
    ) -> Result<(), MigrationError> {
        self.observer.phase(Phase::Negotiate);
        let capabilities = capabilities & CAPABILITY_ZSTD;
        let first = streams.first_mut().ok_or(MigrationError::Closed)?;
        first.send(&Control::Welcome { version, capabilities })?;
        let Control::Describe(description) = first.receive()? else { return Err(UNEXPECTED) };
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

    /// Receives the rounds, up to the last.
    fn rounds<L: Link>(
        &mut self,
        layout: &GuestLayout,
        memory: Arc<dyn WritePages>,
        streams: &mut [Stream<L>],
    ) -> Result<(), MigrationError> {
        for number in 0..MAX_ROUNDS {
            let first = streams.first_mut().ok_or(MigrationError::Closed)?;
            let Control::RoundStart { round, last, pages } = first.receive()? else {
                return Err(UNEXPECTED);
            };
            if round != number {
                return Err(UNEXPECTED);
            }
            if pages > layout.pages() {
                return Err(MigrationError::Peer {
                    what: "a round of more pages than the guest has",
                });
            }
            let phase = if last { Phase::LastRound } else { Phase::Round { number } };
            self.observer.phase(phase);
            panic_point("taken round");
            let round = Round { number, pages, layout, memory: memory.as_ref() };
            let done = round.receive(streams, self.observer)?;
            self.received_pages += done.received_pages;
            self.rounds = number + 1;
            let first = streams.first_mut().ok_or(MigrationError::Closed)?;
            if last {
                streams
                    .iter()
                    .try_for_each(|stream| stream.set_timeout(self.config.stall_paused))?;
                return Ok(());
            }
            first.send(&Control::RoundDone { round: number, pages: done.named_pages })?;
        }
        Err(MigrationError::Peer { what: "too many rounds" })
    }

    /// Receives the state, loads it, and votes *prepared*.
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
                Control::Abort { reason } => return Err(MigrationError::Aborted { reason }),
                _ => return Err(UNEXPECTED),
            }
        }
    }
}

/// Checks that the guest can run here, before anything is allocated for it.
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

/// Answers a source that requests the status of another migration.
pub(crate) fn answer_other<L: Link>(stream: &mut Stream<L>, status: PeerStatus) {
    stream.send_and_close(&Control::Status(status));
}
