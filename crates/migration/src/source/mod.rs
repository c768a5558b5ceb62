//! The side where the guest is: the phases, as a list.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diagnostics::panic_point;

use crate::contained::{PanicWatch, attempted, contained};
use crate::convergence::{Convergence, Decision, Seen};
use crate::dirty::DirtyBitmap;
use crate::error::MigrationError;
use crate::limits::{MAX_CONNECTIONS, MAX_ROUNDS, PAUSED_BEYOND, STALL, STALL_PAUSED};
use crate::link::Connect;
use crate::observer::{Observer, Phase};
use crate::selection::{Plan, Selection};
use crate::summary::{RoundSummary, Summary, us};
use crate::traits::{Description, FreePages, SourceMachine, StateSection};
use crate::wire::control::{MigrationId, check_description};

mod doubt;
mod network;
mod pause_limit;
mod round;

pub use doubt::SourceDoubt;
pub(crate) use round::{RoundContext, look_at};

use doubt::recall;
use network::Network;
pub(crate) use network::check_state;

/// How a guest is moved.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// TCP connections, 1 to [`MAX_CONNECTIONS`].
    pub connections: usize,
    /// How long the guest may stand still.
    pub max_downtime: Duration,
    /// Rounds before it is given up, 1 to [`MAX_ROUNDS`].
    pub max_rounds: u32,
    /// Bytes in a second, at most.
    pub bandwidth: Option<u64>,
    /// zstd's level, 1 to 19, where pages are to be compressed.
    pub compression: Option<i32>,
    /// How long the guest may take to drop its caches, if it is to.
    pub drop_caches: Option<Duration>,
    /// How long the guest may take to say which pages are free; zero to not ask it. Shorter than
    /// the destination waits for a sign of life.
    pub free_pages_wait: Duration,
    /// Time without a byte after which the destination counts as gone.
    pub stall: Duration,
    /// The same while the guest stands still.
    pub stall_paused: Duration,
    /// How long the guest may stand still beyond `max_downtime`, before the destination is given up.
    pub paused_beyond: Duration,
    /// Becomes true when somebody wants it to end; the guest goes on here.
    pub cancel: Arc<AtomicBool>,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            connections: 4,
            max_downtime: Duration::from_millis(300),
            max_rounds: 100,
            bandwidth: None,
            compression: None,
            drop_caches: None,
            free_pages_wait: Duration::from_secs(5),
            stall: STALL,
            stall_paused: STALL_PAUSED,
            paused_beyond: PAUSED_BEYOND,
            cancel: Arc::default(),
        }
    }
}

/// A migration that came to nothing, and what became of the guest.
#[derive(Debug)]
pub struct SourceFailure {
    /// Why.
    pub error: MigrationError,
    /// Where the guest is.
    pub guest: SourceGuest,
}

/// What became of a guest that was not moved.
#[derive(Debug)]
pub enum SourceGuest {
    /// It runs here, as before.
    Runs,
    /// It is here and only here, but could not be resumed.
    Stuck(MigrationError),
    /// It is paused here, and nobody knows whether it runs at the destination.
    InDoubt(SourceDoubt),
}

impl SourceGuest {
    const fn runs_here(&self) -> bool {
        matches!(self, Self::Runs)
    }
}

/// Moves a guest. When this returns, it runs at the destination and never again here.
///
/// # Errors
/// It is not known to run at the destination; the failure says where it is.
pub fn migrate<M: SourceMachine, C: Connect>(
    config: &SourceConfig,
    machine: &mut M,
    connect: &mut C,
    observer: &mut dyn Observer,
) -> Result<Summary, SourceFailure> {
    let runs = |error| SourceFailure { error, guest: SourceGuest::Runs };
    config.check().map_err(runs)?;
    let id = MigrationId::random().map_err(runs)?;
    // Before anything is asked of the guest, or of the other side.
    let described = contained("describing the guest", || describe(machine));
    // Who cancelled it hears that, and not what came of it.
    config.not_cancelled().map_err(runs)?;
    let description = described.map_err(runs)?;
    let connected = contained("connecting", || {
        if let Some(wait) = config.drop_caches {
            observer.phase(Phase::DropCaches);
            if let Err(error) = machine.drop_caches(wait) {
                tracing::warn!(error, "the guest did not drop its caches");
            }
        }
        observer.phase(Phase::SyncDisks);
        let synced = machine.before_connect();
        // Who cancelled it hears that, and not what came of it.
        config.not_cancelled()?;
        synced.map_err(MigrationError::machine(SYNCING))?;
        observer.phase(Phase::Connect);
        panic_point("connect");
        let started = Instant::now();
        Ok((started, Network::connect(config, id, connect)?))
    });
    let (started, mut network) = connected.map_err(runs)?;
    let mut job = Job::new(config, machine, &mut network, observer, started);
    job.summary.id = id.to_string();
    let outcome = job.run(&description);
    let summary = job.finish(outcome, SourceDoubt::new(id, config));
    let runs_here = summary.as_ref().is_err_and(|failure| failure.guest.runs_here());
    if runs_here && network.may_hold_the_guest() {
        // It waits for a word that will never come. If this one does not arrive either, its
        // operator has to say it.
        drop(network);
        if let Err(error) = contained("telling it", || recall(id, connect, config)) {
            tracing::warn!(%error, %id, "the destination could not be told to give the guest up");
        }
    }
    summary
}

/// What the guest is, where it can be moved as far as is known before it is.
pub(crate) fn describe<M: SourceMachine>(machine: &M) -> Result<Description, MigrationError> {
    let description = machine.describe();
    let description = description.map_err(MigrationError::machine("describing the guest"))?;
    check_description(&description)?;
    Ok(description)
}

/// For a job whose sink always knows.
pub(crate) const fn no_doubt(id: MigrationId, config: &SourceConfig) -> SourceDoubt {
    SourceDoubt::new(id, config)
}

/// Where pages and state go: over the network, or to a file.
pub(crate) trait Sink {
    /// The guest is described; nothing was sent yet.
    fn open(&mut self, description: &Description) -> Result<(), MigrationError>;

    /// Sends what the plan says. When it returns, all of it is there.
    fn round(
        &mut self,
        context: &mut RoundContext<'_>,
        plan: &Plan,
    ) -> Result<RoundSummary, MigrationError>;

    /// The guest is paused from here on, or goes on.
    fn paused(&mut self, paused: bool) -> Result<(), MigrationError>;

    /// Sends the state. When it returns, the guest could run from what is there; the time that
    /// the other side took to load it.
    fn state(&mut self, state: &[StateSection]) -> Result<Duration, MigrationError>;

    /// Gives the guest away. Called once, after everything else.
    fn switch_over(&mut self) -> SwitchoverResult;

    /// The guest goes on here: the copy that was [switched over](Self::switch_over) is to last.
    fn keep(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// It came to nothing; says so where it can, and leaves nothing behind.
    fn abort(&mut self, error: &MigrationError);

    /// Bytes that went so far.
    fn wire_bytes(&self) -> u64;

    /// Whether the guest may run elsewhere once it was [offered](Self::switch_over).
    fn runs_elsewhere(&self) -> bool;
}

/// What came of offering the guest.
#[derive(Debug)]
pub(crate) enum SwitchoverResult {
    /// It is the other side's. The time that the other side took to start it.
    Taken(Duration),
    /// The other side has none of it, and never ran it.
    Refused(MigrationError),
    /// The other side may run it, or not.
    Unknown(MigrationError),
    /// It was a copy: the guest goes on here.
    Copied,
}

/// How a job ended that got as far as the switchover.
pub(crate) enum Outcome {
    Moved,
    Copied,
    InDoubt(MigrationError),
}

/// One guest on its way.
pub(crate) struct Job<'a, M, S> {
    config: &'a SourceConfig,
    machine: &'a mut M,
    sink: &'a mut S,
    observer: &'a mut dyn Observer,
    pub(crate) summary: Summary,
    started: Instant,
    stopped: Option<Instant>,
    logging: bool,
    asked_free: bool,
    /// The other side may have heard that the guest is its own.
    offered: bool,
    panics: PanicWatch,
}

impl<'a, M: SourceMachine, S: Sink> Job<'a, M, S> {
    pub(crate) fn new(
        config: &'a SourceConfig,
        machine: &'a mut M,
        sink: &'a mut S,
        observer: &'a mut dyn Observer,
        started: Instant,
    ) -> Self {
        let summary = Summary::default();
        Self {
            config,
            machine,
            sink,
            observer,
            summary,
            started,
            stopped: None,
            logging: false,
            asked_free: false,
            offered: false,
            panics: PanicWatch::start(),
        }
    }

    /// The phases, up to and with the switchover. An error means that it was not offered, or that
    /// the other side refused it. A panic is an error as well, or a doubt.
    pub(crate) fn run(&mut self, description: &Description) -> Result<Outcome, MigrationError> {
        match contained("moving the guest", || self.phases(description)) {
            Err(error) if self.offered => Ok(Outcome::InDoubt(error)),
            other => other,
        }
    }

    fn phases(&mut self, description: &Description) -> Result<Outcome, MigrationError> {
        self.observer.phase(Phase::Negotiate);
        self.summary.memory_pages = description.layout.pages();
        self.sink.open(description)?;

        self.machine.start_dirty_log().map_err(MigrationError::machine("watching its writes"))?;
        self.logging = true;
        let mut selection = Selection::everything(&description.layout);
        self.read_log(&mut selection, description)?;
        self.skip_unused(&mut selection);

        self.precopy(&mut selection, description)?;
        self.state()?;
        self.switch_over()
    }

    /// Adds what was written since the log was read last.
    fn read_log(
        &mut self,
        selection: &mut Selection,
        description: &Description,
    ) -> Result<(), MigrationError> {
        let mut written = DirtyBitmap::none(&description.layout);
        let read = self.machine.take_dirty(&mut written);
        read.map_err(MigrationError::machine("reading the log of its writes"))?;
        selection.add_written(&written);
        Ok(())
    }

    /// Leaves out what the guest does not rely on. The log was read just before; it is not read
    /// again until the guest has answered.
    fn skip_unused(&mut self, selection: &mut Selection) {
        self.observer.phase(Phase::FreePages);
        let asked = selection.asking();
        match self.machine.ballooned_pages() {
            Ok(pages) => {
                let unused = FreePages { pages, pattern: 0 };
                self.summary.ballooned_pages = selection.skip(asked, &unused);
            }
            Err(error) => tracing::warn!(error, "what is in the balloon is sent"),
        }
        if self.config.free_pages_wait.is_zero() {
            return;
        }
        let asked_at = Instant::now();
        self.asked_free = true;
        match self.machine.free_pages(self.config.free_pages_wait) {
            Ok(Some(free)) => {
                self.summary.free_answer_us = Some(us(asked_at.elapsed()));
                self.summary.free_pages = selection.skip(asked, &free);
            }
            Ok(None) => tracing::info!("the guest did not say what is free; all of it is sent"),
            Err(error) => tracing::warn!(error, "the guest cannot be asked; all of it is sent"),
        }
    }

    /// Rounds while the guest runs, and the last one.
    fn precopy(
        &mut self,
        selection: &mut Selection,
        description: &Description,
    ) -> Result<(), MigrationError> {
        let mut convergence = Convergence::new(self.config.max_downtime, self.config.max_rounds);
        loop {
            let round = self.round(selection, description, false)?;
            self.read_log(selection, description)?;
            let remaining_pages = selection.pending_pages();
            let took = Duration::from_micros(round.took_us);
            let RoundSummary { sent_pages, zero_pages, .. } = round;
            let seen = Seen { sent_pages, zero_pages, took, remaining_pages };
            match convergence.after_round(seen) {
                Decision::Again { throttle } if throttle != self.summary.throttle => {
                    self.machine.set_throttle(throttle);
                    self.summary.throttle = throttle;
                    continue;
                }
                Decision::Again { .. } => continue,
                Decision::Stop => {}
                Decision::GiveUp => {
                    return Err(MigrationError::NotConverging {
                        rounds: convergence.rounds(),
                        remaining_pages,
                        throttle: convergence.throttle(),
                    });
                }
            }
            self.pause()?;
            let at = Instant::now();
            self.read_log(selection, description)?;
            self.summary.downtime.log_us = us(at.elapsed());
            if !convergence.aborted_switchovers(selection.pending_pages()) {
                break;
            }
            self.summary.aborted_switchovers = self.summary.aborted_switchovers.saturating_add(1);
            self.go_on()?;
        }
        let round = self.round(selection, description, true)?;
        self.summary.downtime.copy_us = round.took_us;
        Ok(())
    }

    fn round(
        &mut self,
        selection: &mut Selection,
        description: &Description,
        last: bool,
    ) -> Result<RoundSummary, MigrationError> {
        self.not_cancelled()?;
        let number = u32::try_from(self.summary.rounds.len()).unwrap_or(u32::MAX);
        panic_point(if last { "last round" } else { "round" });
        self.observer.phase(if last { Phase::LastRound } else { Phase::Round { number } });
        let at = Instant::now();
        let plan = selection.take_round();
        let memory = self.machine.memory();
        let mut context = RoundContext {
            number,
            last,
            layout: &description.layout,
            memory: memory.as_ref(),
            config: self.config,
            observer: self.observer,
        };
        let wire_bytes = self.sink.wire_bytes();
        let mut round = self.sink.round(&mut context, &plan)?;
        round.pages = plan.pages;
        round.wire_bytes = self.sink.wire_bytes() - wire_bytes;
        round.took_us = us(at.elapsed());
        self.summary.add_round(round);
        Ok(round)
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.not_cancelled()?;
        let prepared = self.machine.before_pause();
        // Who cancelled it hears that, and not what came of it.
        self.not_cancelled()?;
        prepared.map_err(MigrationError::machine(SYNCING))?;
        let at = Instant::now();
        self.stopped = Some(at);
        panic_point("pause");
        let paused = self.machine.pause();
        if paused.is_err() {
            self.stopped = None;
        }
        paused.map_err(MigrationError::machine("pausing the guest"))?;
        self.summary.downtime.pause_us = us(at.elapsed());
        self.sink.paused(true)
    }

    fn go_on(&mut self) -> Result<(), MigrationError> {
        self.machine.resume().map_err(MigrationError::machine("resuming the guest"))?;
        self.stopped = None;
        self.sink.paused(false)
    }

    fn state(&mut self) -> Result<(), MigrationError> {
        self.observer.phase(Phase::State);
        let at = Instant::now();
        let state = self.machine.save_state();
        let state = state.map_err(MigrationError::machine("saving the guest's state"))?;
        self.summary.downtime.save_us = us(at.elapsed());
        panic_point("state");
        let at = Instant::now();
        self.summary.downtime.load_us = us(self.sink.state(&state)?);
        self.summary.downtime.state_us = us(at.elapsed());
        Ok(())
    }

    fn switch_over(&mut self) -> Result<Outcome, MigrationError> {
        self.observer.phase(Phase::Switchover);
        // Whoever cancels before the observer was told can rely on it.
        self.not_cancelled()?;
        let at = Instant::now();
        // As late as can be, and before the other side can hear of it.
        let prepared = self.machine.prepare_switchover();
        prepared.map_err(MigrationError::machine("committing the switchover"))?;
        panic_point("offer");
        self.offered = self.sink.runs_elsewhere();
        let switched_over = self.sink.switch_over();
        panic_point("switched over");
        let outcome = match switched_over {
            SwitchoverResult::Taken(resume) => {
                self.machine.relinquish();
                self.summary.downtime.resume_us = us(resume);
                Outcome::Moved
            }
            SwitchoverResult::Copied => Outcome::Copied,
            SwitchoverResult::Unknown(error) => return Ok(Outcome::InDoubt(error)),
            SwitchoverResult::Refused(error) => {
                self.offered = false;
                return Err(error);
            }
        };
        self.summary.downtime.switchover_us = us(at.elapsed());
        Ok(outcome)
    }

    fn not_cancelled(&self) -> Result<(), MigrationError> {
        self.config.not_cancelled()?;
        self.panics.check()
    }

    /// Leaves the guest where it belongs after whatever happened.
    pub(crate) fn finish(
        mut self,
        outcome: Result<Outcome, MigrationError>,
        doubt: SourceDoubt,
    ) -> Result<Summary, SourceFailure> {
        match outcome {
            Ok(Outcome::InDoubt(error)) => {
                Err(SourceFailure { error, guest: SourceGuest::InDoubt(doubt) })
            }
            Ok(Outcome::Moved) => Ok(self.summarize()),
            Ok(Outcome::Copied) => {
                // The guest first: a disk takes as long as it likes.
                let guest = self.undo();
                let kept = contained("keeping the copy", || self.sink.keep());
                if kept.is_ok() && guest.runs_here() {
                    return Ok(self.summarize());
                }
                let what = "the copy is whole, but the guest does not go on".to_owned();
                let error = kept.err().unwrap_or(MigrationError::Operator { what });
                Err(SourceFailure { error, guest })
            }
            Err(error) => {
                // The guest first: it has stood long enough.
                let guest = self.undo();
                // One that cannot go on here may have to go on there, by an operator's word.
                if guest.runs_here() {
                    attempted(|| self.sink.abort(&error));
                }
                Err(SourceFailure { error, guest })
            }
        }
    }

    fn summarize(self) -> Summary {
        let mut summary = self.summary;
        summary.wire_bytes = self.sink.wire_bytes();
        summary.total_us = us(self.started.elapsed());
        if let Some(at) = self.stopped {
            summary.downtime.total_us = us(at.elapsed());
        }
        summary
    }

    /// The guest goes on here, as if nothing had been.
    fn undo(&mut self) -> SourceGuest {
        let mut guest = SourceGuest::Runs;
        if let Some(at) = self.stopped.take() {
            let resumed = contained("resuming the guest", || {
                panic_point("resume");
                self.machine.resume().map_err(MigrationError::machine("resuming the guest"))
            });
            if let Err(error) = resumed {
                guest = SourceGuest::Stuck(error);
            }
            self.summary.downtime.total_us = us(at.elapsed());
        }
        attempted(|| undo_watch(self.machine, self.logging, self.asked_free));
        guest
    }
}

/// Ends what a migration asked of a guest that goes on here.
fn undo_watch<M: SourceMachine>(machine: &mut M, logging: bool, asked_free: bool) {
    machine.set_throttle(0);
    if logging {
        machine.stop_dirty_log();
    }
    if asked_free {
        machine.free_pages_done();
    }
}

/// What the monitor does in [`SourceMachine::before_connect`] and [`SourceMachine::before_pause`].
const SYNCING: &str = "syncing the guest's disks";

impl SourceConfig {
    pub(crate) fn not_cancelled(&self) -> Result<(), MigrationError> {
        let cancelled = self.cancel.load(Ordering::Relaxed);
        if cancelled { Err(MigrationError::Cancelled) } else { Ok(()) }
    }

    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        let wrong = |what: String| Err(MigrationError::Operator { what });
        if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            return wrong(format!("1 to {MAX_CONNECTIONS} connections are possible"));
        }
        if !(1..=MAX_ROUNDS).contains(&self.max_rounds) {
            return wrong(format!("1 to {MAX_ROUNDS} rounds are possible"));
        }
        if self.compression.is_some_and(|level| !(1..=19).contains(&level)) {
            return wrong("zstd has levels 1 to 19".to_owned());
        }
        if self.bandwidth.is_some_and(|bytes| bytes < MIN_BANDWIDTH) {
            return wrong(format!("less than {MIN_BANDWIDTH} bytes in a second never ends"));
        }
        Ok(())
    }
}

/// Bytes in a second: a chunk must arrive before its connection counts as dead.
const MIN_BANDWIDTH: u64 = 1 << 20;
