//! What is told while a migration goes on: what a progress bar needs.

/// Where a migration stands. Each phase is told once, but for rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest is asked to drop its caches.
    DropCaches,
    /// What the guest wrote to its disks is brought there, as far as that can be done beforehand.
    SyncDisks,
    /// Connections are opened (source), or waited for (destination).
    Connect,
    /// The two sides find out whether they fit.
    Negotiate,
    /// The guest is asked for its free pages.
    FreePages,
    /// Pages go while the guest runs.
    Round {
        /// From 0.
        number: u32,
    },
    /// The guest stands; what is left goes.
    LastRound,
    /// State of processors and devices.
    State,
    /// The guest changes sides, unless it was cancelled before this was told.
    Switchover,
}

/// How far the present phase is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages that were looked at, sent or not.
    pub pages: u64,
    /// Of so many in this phase.
    pub of_pages: u64,
    /// Bytes that went over the network, or to the file, since the migration began: everything that is
    /// said, as in [`Summary::wire_bytes`](crate::Summary::wire_bytes). Before TLS.
    pub wire_bytes: u64,
}

/// Is told. Calls come from the thread that runs the migration and delay it.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// How far it is, some ten times a second.
    fn progress(&mut self, progress: Progress) {
        let _ = progress;
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
