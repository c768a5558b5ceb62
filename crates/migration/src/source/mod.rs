//! The source: the phases, in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diagnostics::panic_point;

use crate::contained::{PanicWatch, attempted, contained};
use crate::convergence::{Convergence, Decision, RoundStats};
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
pub(crate) use round::{RoundContext, read_word};

use doubt::roll_back;
use network::Network;
pub(crate) use network::check_state;

/// Parameters of a migration.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// TCP connections, 1 to [`MAX_CONNECTIONS`].
    pub connections: usize,
    /// Downtime limit.
    pub max_downtime: Duration,
    /// Rounds after which the migration fails, 1 to [`MAX_ROUNDS`].
    pub max_rounds: u32,
    /// Limit in bytes per second.
    pub bandwidth: Option<u64>,
    /// zstd level, 1 to 19; `None` sends pages uncompressed.
    pub compression: Option<i32>,
    /// Timeout for the guest to drop its caches; `None` skips it.
    pub drop_caches: Option<Duration>,
    /// Timeout for the guest's free-page answer; zero skips the query. Shorter than the
    /// destination's stall timeout.
    pub free_pages_wait: Duration,
    /// Time without a byte after which the destination counts as dead.
    pub stall: Duration,
    /// The same while the guest is paused.
    pub stall_paused: Duration,
    /// Downtime beyond `max_downtime` after which the source aborts.
    pub paused_beyond: Duration,
    /// Cancels the migration when it becomes true; the guest runs on here.
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

/// A failed migration, and the state of the guest.
#[derive(Debug)]
pub struct SourceFailure {
    /// Why.
    pub error: MigrationError,
    /// The state of the guest.
    pub guest: SourceGuest,
}

/// The state of a guest after a failed migration.
#[derive(Debug)]
pub enum SourceGuest {
    /// It runs here.
    Runs,
    /// It is here and nowhere else, but could not be resumed.
    Stuck(MigrationError),
    /// It is paused here, and may run at the destination.
    InDoubt(SourceDoubt),
}

impl SourceGuest {
    const fn runs_here(&self) -> bool {
        matches!(self, Self::Runs)
    }
}

/// Moves a guest. On success it runs at the destination and never again here.
///
/// # Errors
/// The guest is not known to run at the destination. The failure has its state.
pub fn migrate<M: SourceMachine, C: Connect>(
    config: &SourceConfig,
    machine: &mut M,
    connect: &mut C,
    observer: &mut dyn Observer,
) -> Result<Summary, SourceFailure> {
    let runs = |error| SourceFailure { error, guest: SourceGuest::Runs };
    config.check().map_err(runs)?;
    let id = MigrationId::random().map_err(runs)?;
    // Before anything changes for the guest or the destination.
    let described = contained("describing the guest", || describe(machine));
    // A cancellation takes precedence over the error that it may have caused.
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
        // A cancellation takes precedence over the error that it may have caused.
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
    if runs_here && network.may_be_prepared() {
        // The destination waits for a decision. If this message is lost too, an operator has to
        // resolve the doubt there.
        drop(network);
        if let Err(error) = contained("rolling back", || roll_back(id, connect, config)) {
            tracing::warn!(%error, %id, "cannot roll back; the destination may be in doubt");
        }
    }
    summary
}

/// Describes the guest. Fails if it is known in advance that it cannot be moved.
pub(crate) fn describe<M: SourceMachine>(machine: &M) -> Result<Description, MigrationError> {
    let description = machine.describe();
    let description = description.map_err(MigrationError::machine("describing the guest"))?;
    check_description(&description)?;
    Ok(description)
}

/// For a sink that is never in doubt.
pub(crate) const fn no_doubt(id: MigrationId, config: &SourceConfig) -> SourceDoubt {
    SourceDoubt::new(id, config)
}

/// Receives pages and state: the network, or a file.
pub(crate) trait Sink {
    /// Begins, before any page is sent.
    fn open(&mut self, description: &Description) -> Result<(), MigrationError>;

    /// Sends the pages of the plan. When it returns, all of them have arrived.
    fn round(
        &mut self,
        context: &mut RoundContext<'_>,
        plan: &Plan,
    ) -> Result<RoundSummary, MigrationError>;

    /// The guest was paused, or resumed.
    fn paused(&mut self, paused: bool) -> Result<(), MigrationError>;

    /// Sends the state. When it returns, the other side is prepared. Returns the time that it took
    /// to load the state.
    fn state(&mut self, state: &[StateSection]) -> Result<Duration, MigrationError>;

    /// Commits. Called once, after everything else.
    fn switch_over(&mut self) -> SwitchoverResult;

    /// Keeps a copy whose guest runs on here, after [`switch_over`](Self::switch_over).
    fn keep(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Aborts: notifies the other side if possible, and leaves nothing behind.
    fn abort(&mut self, error: &MigrationError);

    /// Bytes sent so far.
    fn wire_bytes(&self) -> u64;

    /// Whether the guest may run elsewhere after [`switch_over`](Self::switch_over).
    fn runs_elsewhere(&self) -> bool;
}

/// The outcome of a commit.
#[derive(Debug)]
pub(crate) enum SwitchoverResult {
    /// The other side runs the guest. The time that it took to start it.
    Taken(Duration),
    /// The other side destroyed the guest and never ran it.
    Refused(MigrationError),
    /// The other side may run the guest: in doubt.
    Unknown(MigrationError),
    /// It was a copy: the guest runs on here.
    Copied,
}

/// The outcome of a job that reached the commit.
pub(crate) enum Outcome {
    Moved,
    Copied,
    InDoubt(MigrationError),
}

/// One migration or snapshot.
pub(crate) struct Job<'a, M, S> {
    config: &'a SourceConfig,
    machine: &'a mut M,
    sink: &'a mut S,
    observer: &'a mut dyn Observer,
    pub(crate) summary: Summary,
    started: Instant,
    stopped: Option<Instant>,
    logging: bool,
    queried_free: bool,
    /// The other side may have received the commit.
    committing: bool,
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
            queried_free: false,
            committing: false,
            panics: PanicWatch::start(),
        }
    }

    /// Runs the phases, the switchover included. An error means that the source did not commit, or
    /// that the other side refused. A panic is an error before the commit, and a doubt after it.
    pub(crate) fn run(&mut self, description: &Description) -> Result<Outcome, MigrationError> {
        match contained("moving the guest", || self.phases(description)) {
            Err(error) if self.committing => Ok(Outcome::InDoubt(error)),
            other => other,
        }
    }

    fn phases(&mut self, description: &Description) -> Result<Outcome, MigrationError> {
        self.observer.phase(Phase::Negotiate);
        self.summary.memory_pages = description.layout.pages();
        self.sink.open(description)?;

        self.machine
            .start_dirty_log()
            .map_err(MigrationError::machine("starting the dirty log"))?;
        self.logging = true;
        let mut selection = Selection::all(&description.layout);
        self.read_log(&mut selection, description)?;
        self.skip_unused(&mut selection);

        self.precopy(&mut selection, description)?;
        self.state()?;
        self.switch_over()
    }

    /// Adds the pages written since the dirty log was last read.
    fn read_log(
        &mut self,
        selection: &mut Selection,
        description: &Description,
    ) -> Result<(), MigrationError> {
        let mut written = DirtyBitmap::none(&description.layout);
        let read = self.machine.take_dirty(&mut written);
        read.map_err(MigrationError::machine("reading the dirty log"))?;
        selection.add_written(&written);
        Ok(())
    }

    /// Leaves out pages that the guest does not depend on. The dirty log was read just before, and
    /// is not read again until the guest has answered.
    fn skip_unused(&mut self, selection: &mut Selection) {
        self.observer.phase(Phase::FreePages);
        let asked = selection.mark();
        match self.machine.ballooned_pages() {
            Ok(pages) => {
                let unused = FreePages { pages, pattern: 0 };
                self.summary.ballooned_pages = selection.skip(asked, &unused);
            }
            Err(error) => tracing::warn!(error, "cannot query the ballooned pages; sending them"),
        }
        if self.config.free_pages_wait.is_zero() {
            return;
        }
        let asked_at = Instant::now();
        self.queried_free = true;
        match self.machine.free_pages(self.config.free_pages_wait) {
            Ok(Some(free)) => {
                self.summary.free_answer_us = Some(us(asked_at.elapsed()));
                self.summary.free_pages = selection.skip(asked, &free);
            }
            Ok(None) => tracing::info!("the guest did not report its free pages; sending them"),
            Err(error) => {
                tracing::warn!(error, "cannot query the guest's free pages; sending them")
            }
        }
    }

    /// Sends rounds while the guest runs, pauses it, and sends the last round.
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
            let stats = RoundStats { sent_pages, zero_pages, took, remaining_pages };
            match convergence.after_round(stats) {
                Decision::Continue { throttle } if throttle != self.summary.throttle => {
                    self.machine.set_throttle(throttle);
                    self.summary.throttle = throttle;
                    continue;
                }
                Decision::Continue { .. } => continue,
                Decision::Pause => {}
                Decision::Fail => {
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
            if !convergence.abort_switchover(selection.pending_pages()) {
                break;
            }
            self.summary.aborted_switchovers = self.summary.aborted_switchovers.saturating_add(1);
            self.resume()?;
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
        let synced = self.machine.before_pause();
        // A cancellation takes precedence over the error that it may have caused.
        self.not_cancelled()?;
        synced.map_err(MigrationError::machine(SYNCING))?;
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

    fn resume(&mut self) -> Result<(), MigrationError> {
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
        // A cancellation before the observer was notified always prevents the commit.
        self.not_cancelled()?;
        let at = Instant::now();
        // As late as possible, but before the other side can receive the commit.
        let prepared = self.machine.prepare_switchover();
        prepared.map_err(MigrationError::machine("preparing the switchover"))?;
        panic_point("commit");
        self.committing = self.sink.runs_elsewhere();
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
                self.committing = false;
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

    /// Ends the job: resumes the guest or leaves it in doubt, as the outcome requires.
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
                // Resume the guest first: the disk may be slow.
                let guest = self.undo();
                let kept = contained("keeping the copy", || self.sink.keep());
                if kept.is_ok() && guest.runs_here() {
                    return Ok(self.summarize());
                }
                let what = "the copy is complete, but the guest cannot be resumed".to_owned();
                let error = kept.err().unwrap_or(MigrationError::Operator { what });
                Err(SourceFailure { error, guest })
            }
            Err(error) => {
                // Resume the guest first, to keep its downtime short.
                let guest = self.undo();
                // If it cannot be resumed here, an operator may have to run it at the destination.
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

    /// Resumes the guest here, and undoes all changes for the migration.
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
        attempted(|| stop_tracking(self.machine, self.logging, self.queried_free));
        guest
    }
}

/// Ends throttling, dirty log and held hints of a guest that runs on here.
fn stop_tracking<M: SourceMachine>(machine: &mut M, logging: bool, queried_free: bool) {
    machine.set_throttle(0);
    if logging {
        machine.stop_dirty_log();
    }
    if queried_free {
        machine.free_pages_done();
    }
}

/// What [`SourceMachine::before_connect`] and [`SourceMachine::before_pause`] do.
const SYNCING: &str = "syncing the guest's disks";

impl SourceConfig {
    pub(crate) fn not_cancelled(&self) -> Result<(), MigrationError> {
        let cancelled = self.cancel.load(Ordering::Relaxed);
        if cancelled { Err(MigrationError::Cancelled) } else { Ok(()) }
    }

    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        let wrong = |what: String| Err(MigrationError::Operator { what });
        if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            return wrong(format!("the number of connections must be 1 to {MAX_CONNECTIONS}"));
        }
        if !(1..=MAX_ROUNDS).contains(&self.max_rounds) {
            return wrong(format!("the number of rounds must be 1 to {MAX_ROUNDS}"));
        }
        if self.compression.is_some_and(|level| !(1..=19).contains(&level)) {
            return wrong("the zstd level must be 1 to 19".to_owned());
        }
        if self.bandwidth.is_some_and(|bytes| bytes < MIN_BANDWIDTH) {
            return wrong(format!(
                "the bandwidth must be at least {MIN_BANDWIDTH} bytes per second"
            ));
        }
        Ok(())
    }
}

/// Bytes per second: a chunk must arrive before its connection counts as dead.
const MIN_BANDWIDTH: u64 = 1 << 20;
