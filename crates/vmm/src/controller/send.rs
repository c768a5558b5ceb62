//! Sending the guest to another host.

use std::sync::Arc;

use diagnostics::contain;
use migration::tcp::TcpConnector;
use migration::{SourceConfig, SourceFailure, SourceGuest, migrate};

use super::state::Event;
use super::unresolved::Unresolved;
use super::{MigrationController, Watch, summary};
use crate::traits::MigrationSource;

impl MigrationController {
    /// Moves the guest; runs in a thread of its own.
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
                tracing::warn!(error = error.chain(), "the guest was not moved, and runs on");
                self.note(Event::Failed, |current| current.report.fail(&error));
            }
            Err(SourceFailure { error, guest: SourceGuest::Stuck(stuck) }) => {
                self.stuck(guest, format!("{}; {}", error.chain(), stuck.chain()));
            }
            Err(SourceFailure { error, guest: SourceGuest::InDoubt(doubt) }) => {
                tracing::error!(error = error.chain(), "where the guest runs is not known");
                self.note(Event::Uncertain, |current| {
                    current.unresolved = Some(Unresolved::Source { doubt, to, guest });
                    current.report.end(Some(error.chain()));
                });
            }
        }
    }

    /// The guest is here, was not moved or saved, and cannot be resumed.
    pub(super) fn stuck(&self, guest: MigrationSource, error: String) {
        tracing::error!(error, "the guest was not moved or saved, and cannot be resumed");
        self.note(Event::Unresumable, |current| {
            current.unresolved = Some(Unresolved::Stuck(guest));
            current.report.end(Some(error));
        });
    }
}
