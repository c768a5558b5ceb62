//! The control API's report on the latest migration.

use std::time::Instant;

use control::api::{MigrationPhase, MigrationSide, MigrationStatus, MigrationSummary};
use migration::MigrationError;
use migration::observer::{Phase, Progress};

use super::state::State;
use super::summary;
use crate::error::hint_of;

/// All fields of the status except `state`, which [`State`] provides.
#[derive(Default)]
pub(super) struct Report {
    details: MigrationStatus,
    began: Option<Instant>,
    /// A client has read that the guest has moved.
    pub(super) outcome_read: bool,
}

impl Report {
    pub(super) fn begin(side: MigrationSide) -> Self {
        let details = MigrationStatus { side: Some(side), ..MigrationStatus::default() };
        Self { details, began: Some(Instant::now()), outcome_read: false }
    }

    pub(super) fn status(&self, state: State) -> MigrationStatus {
        let (state, elapsed_ms) = (state.reported(), self.elapsed_ms());
        MigrationStatus { state, elapsed_ms, ..self.details.clone() }
    }

    pub(super) fn side(&self) -> Option<MigrationSide> {
        self.details.side
    }

    pub(super) fn current_phase(&self) -> Option<MigrationPhase> {
        self.details.phase
    }

    pub(super) fn phase(&mut self, phase: Phase) {
        let (phase, round) = summary::phase(phase);
        self.details.phase = Some(phase);
        self.details.round = round.unwrap_or(self.details.round);
        (self.details.done_pages, self.details.of_pages) = (0, 0);
    }

    pub(super) fn progress(&mut self, progress: Progress) {
        (self.details.done_pages, self.details.of_pages) = (progress.pages, progress.of_pages);
        self.details.wire_bytes = progress.wire_bytes;
    }

    /// The migration is over, or waits for the operator.
    pub(super) fn end(&mut self, error: Option<String>) {
        self.details.elapsed_ms = self.elapsed_ms();
        self.began = None;
        self.details.phase = None;
        self.details.error = error;
        self.details.hint = None;
    }

    pub(super) fn fail(&mut self, error: &MigrationError) {
        self.end(Some(error.chain()));
        self.details.hint = Some(hint_of(error));
    }

    pub(super) fn succeed(&mut self, wire_bytes: u64, summary: Option<MigrationSummary>) {
        self.end(None);
        self.details.wire_bytes = wire_bytes;
        self.details.summary = summary;
    }

    fn elapsed_ms(&self) -> f64 {
        self.began.map_or(self.details.elapsed_ms, |began| began.elapsed().as_secs_f64() * 1e3)
    }
}
