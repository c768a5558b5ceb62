//! Progress reports of a migration.

/// The phase of a migration. Each phase except rounds is reported once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest drops its caches.
    DropCaches,
    /// The VMM syncs the guest's disks in advance.
    SyncDisks,
    /// The source opens connections; the destination waits for them.
    Connect,
    /// The two sides check whether the guest can move.
    Negotiate,
    /// The source queries the guest's free pages.
    FreePages,
    /// Pages are sent while the guest runs.
    Round {
        /// From 0.
        number: u32,
    },
    /// The guest is paused; the remaining pages are sent.
    LastRound,
    /// State of vCPUs and devices.
    State,
    /// The guest changes sides, unless it was cancelled before this was reported.
    Switchover,
}

/// Progress of the current phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were processed, sent or not.
    pub pages: u64,
    /// All pages of this phase.
    pub of_pages: u64,
    /// Bytes sent over the network, or written to the file, since the migration began: all
    /// messages, as in [`Summary::wire_bytes`](crate::Summary::wire_bytes), before TLS.
    pub wire_bytes: u64,
}

/// Receives progress reports. The migration's thread makes the calls, and they delay it.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// Progress, some ten times a second.
    fn progress(&mut self, progress: Progress) {
        let _ = progress;
    }
}

/// Ignores all reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
