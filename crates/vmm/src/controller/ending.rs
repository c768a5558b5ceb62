//! The end of this process, with a migration under way or behind it.

use std::sync::PoisonError;
use std::time::Duration;

use balloon_host::Ending;
use control::api::{MigrationPhase, MigrationSide, MigrationState};

use super::{Current, MigrationController};
use crate::threads::{Joined, join_within};

/// How long a migration that is cancelled because its process ends may take to say so to the other
/// side, which may not answer.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// The same where the other side may have all of the guest: if it is not told, it is in doubt.
const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a process whose guest has left waits for a client to read the outcome.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

impl MigrationController {
    /// This process is about to end. Cancels a migration before its commit, and does not wait for a
    /// peer or a disk that does not answer. True where the guest has left.
    pub(crate) fn end(&self, ending: &Ending) -> bool {
        self.close("its process is about to end");
        let mut current = self.current();
        let thread = current.thread.take();
        let limit = match current.report.current_phase() {
            // It ends within its own timeout, as a file does that is about to have its name.
            Some(MigrationPhase::Switchover) if !ending.was_asked() => Duration::MAX,
            Some(MigrationPhase::Switchover | MigrationPhase::State) => SWITCHOVER_TIMEOUT,
            _ => CANCEL_TIMEOUT,
        };
        let limit = ending.patience("a migration or a snapshot to come to its end", limit);
        let running = |current: &mut Current| current.state.reported() == MigrationState::Running;
        let waited = self.changed.wait_timeout_while(current, limit, running);
        current = waited.unwrap_or_else(PoisonError::into_inner).0;
        if current.state.reported() == MigrationState::Running {
            tracing::warn!("{}", unfinished(&current));
        } else {
            drop(current);
            // It has only to return.
            match thread
                .map(|thread| join_within(thread, ending.patience("a thread", CANCEL_TIMEOUT)))
            {
                None | Some(Joined::Ended) => {}
                Some(Joined::Panicked) => tracing::error!("the migration ended in a panic"),
                Some(Joined::Not) => tracing::error!("host: the migration's thread does not end"),
            }
            current = self.current();
        }
        let state = current.state.reported();
        if state == MigrationState::InDoubt {
            tracing::error!("the guest ends here; whether it runs on the other side is not known");
        }
        if state != MigrationState::Moved {
            return false;
        }
        let limit = if ending.was_asked() { CANCEL_TIMEOUT } else { OUTCOME_TIMEOUT };
        let limit = ending.patience("a client to read that the guest was moved", limit);
        let unread = |current: &mut Current| !current.report.outcome_read;
        drop(self.changed.wait_timeout_while(current, limit, unread));
        true
    }
}

/// What becomes of what was under way when the process ends before it.
fn unfinished(current: &Current) -> &'static str {
    match (current.report.side(), current.report.current_phase()) {
        (Some(MigrationSide::Snapshot), _) => {
            "the snapshot is not finished and ends with this process: there is none"
        }
        (_, Some(MigrationPhase::Switchover)) => {
            "the guest ends here in its switchover; whether it runs on the other side is not known"
        }
        _ => "the migration ends with this process; the other side was not told",
    }
}
