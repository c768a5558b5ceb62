//! The end of this process, during or after a migration.

use std::sync::PoisonError;
use std::time::Duration;

use balloon_host::Ending;
use control::api::{MigrationPhase, MigrationSide, MigrationState};

use super::{Current, MigrationController};
use crate::threads::{Joined, join_within};

/// How long a migration that the end of the process cancels may take to notify the peer, which may
/// not answer.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// The same once the peer may have the whole guest: without a notification it is in-doubt.
const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a process whose guest has moved waits for a client to read the outcome.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

impl MigrationController {
    /// Prepares for the end of this process: cancels a migration that has not committed, without
    /// waiting for a peer or a disk that does not answer. Returns true if the guest has moved.
    pub(crate) fn end(&self, ending: &Ending) -> bool {
        self.close("its process is about to end");
        let mut current = self.current();
        let thread = current.thread.take();
        let limit = match current.report.current_phase() {
            // The switchover has its own timeout; a snapshot file is about to be renamed.
            Some(MigrationPhase::Switchover) if !ending.is_requested() => Duration::MAX,
            Some(MigrationPhase::Switchover | MigrationPhase::State) => SWITCHOVER_TIMEOUT,
            _ => CANCEL_TIMEOUT,
        };
        let limit = ending.limit_wait("the end of a migration or snapshot", limit);
        let running = |current: &mut Current| current.state.reported() == MigrationState::Running;
        let waited = self.changed.wait_timeout_while(current, limit, running);
        current = waited.unwrap_or_else(PoisonError::into_inner).0;
        if current.state.reported() == MigrationState::Running {
            tracing::warn!("{}", unfinished(&current));
        } else {
            drop(current);
            // The thread only has to return.
            match thread
                .map(|thread| join_within(thread, ending.limit_wait("a thread", CANCEL_TIMEOUT)))
            {
                None | Some(Joined::Ended) => {}
                Some(Joined::Panicked) => tracing::error!("the migration thread panicked"),
                Some(Joined::TimedOut) => {
                    tracing::error!("host: the migration thread does not end")
                }
            }
            current = self.current();
        }
        let state = current.state.reported();
        if state == MigrationState::InDoubt {
            tracing::error!("the guest ends here; whether it runs on the peer is unknown");
        }
        if state != MigrationState::Moved {
            return false;
        }
        let limit = if ending.is_requested() { CANCEL_TIMEOUT } else { OUTCOME_TIMEOUT };
        let limit = ending.limit_wait("a client to read that the guest was moved", limit);
        let unread = |current: &mut Current| !current.report.outcome_read;
        drop(self.changed.wait_timeout_while(current, limit, unread));
        true
    }
}

/// The log line for a migration or snapshot that is still running when the process ends.
fn unfinished(current: &Current) -> &'static str {
    match (current.report.side(), current.report.current_phase()) {
        (Some(MigrationSide::Snapshot), _) => {
            "this process ends before the snapshot is complete; no snapshot is written"
        }
        (_, Some(MigrationPhase::Switchover)) => {
            "the guest ends here during switchover; whether it runs on the peer is unknown"
        }
        _ => "the migration ends with this process; the peer was not notified",
    }
}
