//! Sending the guest to another host.

use std::sync::Arc;

use diagnostics::contain;
use migration::tcp::TcpConnector;
use migration::{SourceConfig, SourceFailure, SourceGuest, migrate};

use super::participant::MigrationSource;
use super::state::Event;
use super::unresolved::Unresolved;
use super::{MigrationController, Watch, summary};

impl MigrationController {
    /// Migrates the guest; runs in its own thread.
    pub(super) fn send(
        self: &Arc<Self>,
        config: &SourceConfig,
        mut guest: MigrationSource,
        mut to: TcpConnector,
    ) {
        let mut watch = Watch(Arc::clone(self));
        match migrate(config, &mut guest, &mut to, &mut watch) {
            Ok(moved) => {
                tracing::info!(id = moved.id, total_us = moved.total_us, "moved");
                let summary = contain(|| summary::summary(&moved)).ok();
                self.moved(|current| current.report.succeed(moved.wire_bytes, summary));
            }
            Err(SourceFailure { error, guest: SourceGuest::Runs }) => {
                tracing::warn!(error = error.chain(), "the migration failed; the guest runs here");
                self.record(Event::Failed, |current| current.report.fail(&error));
            }
            Err(SourceFailure { error, guest: SourceGuest::Stuck(stuck) }) => {
                self.stuck(guest, format!("{}; {}", error.chain(), stuck.chain()));
            }
            Err(SourceFailure { error, guest: SourceGuest::InDoubt(doubt) }) => {
                tracing::error!(
                    error = error.chain(),
                    "in-doubt: on which host the guest runs is unknown"
                );
                self.record(Event::Uncertain, |current| {
                    current.unresolved = Some(Unresolved::Source { doubt, to, guest });
                    current.report.end(Some(error.chain()));
                });
            }
        }
    }

    /// Records that the migration or snapshot failed and the guest cannot be resumed here.
    pub(super) fn stuck(&self, guest: MigrationSource, error: String) {
        tracing::error!(error, "the migration or snapshot failed, and the guest cannot be resumed");
        self.record(Event::Unresumable, |current| {
            current.unresolved = Some(Unresolved::Stuck(guest));
            current.report.end(Some(error));
        });
    }
}
