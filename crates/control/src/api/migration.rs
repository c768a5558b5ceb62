//! Moving a guest to another host.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartMigration {
    /// Where the destination listens, as `HOST:PORT`.
    pub to: String,
    /// Certificates, by files that the guest's monitor can read. Without them nothing is
    /// encrypted, which is possible on a loopback address only.
    pub tls: Option<TlsPaths>,
    /// TCP connections, 1 to 16; 4 if it is not given.
    pub connections: Option<u8>,
    /// How long the guest may stand still; 300 if it is not given.
    pub max_downtime_ms: Option<u64>,
    /// Bytes in a second, at most; at least 1 MiB. No limit if it is not given.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// zstd's level, 1 to 19. Pages are not compressed if it is not given.
    pub compression: Option<u8>,
    /// Rounds before it is given up, 1 to 1000; 100 if it is not given.
    pub max_rounds: Option<u32>,
    /// Has the guest drop its caches first.
    #[serde(default)]
    pub drop_caches: bool,
    /// Does not ask the guest which of its pages are free.
    #[serde(default)]
    pub send_free_pages: bool,
}

/// Body of `POST /v1/snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartSnapshot {
    /// The file, by a path from the root; the guest's monitor makes it, and it must not be there
    /// yet.
    pub path: String,
    /// Has the guest drop its caches first.
    #[serde(default)]
    pub drop_caches: bool,
    /// Does not ask the guest which of its pages are free.
    #[serde(default)]
    pub write_free_pages: bool,
}

/// Files in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// Whom the other side's certificate must come from.
    pub authority: String,
    /// This side's certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// Body of `POST /v1/migration/resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// What is known.
    pub word: ResolveAction,
}

/// What ends a doubt about where a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResolveAction {
    /// The source asks its destination. Always safe.
    Ask,
    /// The guest runs here. Whoever says so **knows that it does not run on the other side**,
    /// and never will: that process is dead.
    RunHere,
    /// The guest never runs here. Whoever says so knows that the other side has it.
    Discard,
}

/// Where a migration stands, or a snapshot, which is a migration into a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationStatus {
    /// What is going on.
    pub state: MigrationState,
    /// Whether the guest leaves, comes, or is written to a file; absent where there was no
    /// migration.
    pub side: Option<MigrationSide>,
    /// What is being done, as `round`; absent where nothing is.
    pub phase: Option<MigrationPhase>,
    /// Number of the round, from 0.
    pub round: u32,
    /// Pages of 4 KiB that were looked at in this phase, sent or not.
    pub done_pages: u64,
    /// Of so many; 0 where it is not known.
    pub of_pages: u64,
    /// Bytes on the network so far, of everything that is said, or written to the file.
    pub wire_bytes: u64,
    /// Since it began.
    pub elapsed_ms: f64,
    /// Why it failed, or what is not known.
    pub error: Option<String>,
    /// What can be done about a failure.
    #[serde(default)]
    pub hint: Option<String>,
    /// What it came to, at the source.
    pub summary: Option<MigrationSummary>,
}

/// What is going on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// Nothing; the guest runs here.
    #[default]
    None,
    /// A destination waits for a guest.
    Waiting,
    /// A guest is on its way.
    Running,
    /// It came to nothing. A guest that was to leave runs here as before.
    Failed,
    /// The guest is paused here, and nobody knows whether it runs on the other side: see
    /// `POST /v1/migration/resolve`.
    InDoubt,
    /// The guest is here and only here, but could not be resumed.
    Stuck,
    /// The guest runs on the other side, and never again here.
    Moved,
    /// The guest came, and runs here.
    Arrived,
    /// The guest is in a file as well, and runs here.
    Saved,
}

impl MigrationState {
    /// True where nothing will change by itself.
    pub const fn is_over(self) -> bool {
        !matches!(self, Self::Waiting | Self::Running)
    }
}

/// The two sides, and the file in place of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationSide {
    /// Where the guest ran before.
    Source,
    /// Where it is to run.
    Destination,
    /// It is written to a file, and runs on.
    Snapshot,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The guest drops its caches.
    DropCaches,
    /// What the guest wrote to its disks is brought there.
    SyncDisks,
    /// The two sides connect.
    Connect,
    /// They find out whether they fit.
    Negotiate,
    /// The guest is asked which of its pages are free.
    FreePages,
    /// Pages go while the guest runs.
    Round,
    /// The guest stands, and the last pages go.
    LastRound,
    /// State of processors and devices goes.
    State,
    /// The guest changes sides.
    Switchover,
}

impl MigrationPhase {
    /// The word used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DropCaches => "drop-caches",
            Self::SyncDisks => "sync-disks",
            Self::Connect => "connect",
            Self::Negotiate => "negotiate",
            Self::FreePages => "free-pages",
            Self::Round => "round",
            Self::LastRound => "last-round",
            Self::State => "state",
            Self::Switchover => "switchover",
        }
    }
}

/// What a migration came to. Sizes are bytes of the guest's memory, counted each time that they
/// were to be sent, except `wire_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationSummary {
    /// Names the migration on both sides.
    pub id: String,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Contents that were sent.
    pub sent_bytes: u64,
    /// Bytes on the network, with everything.
    pub wire_bytes: u64,
    /// Skipped because the guest said that it does not use them.
    pub free_bytes: u64,
    /// Skipped because they are in the balloon.
    pub balloon_bytes: u64,
    /// Zeros.
    pub zero_bytes: u64,
    /// Filled with a pattern at the destination.
    pub filled_bytes: u64,
    /// How long the guest took to say what is free; absent where it did not.
    pub free_answer_ms: Option<f64>,
    /// Each round, the last one with the guest stopped.
    pub rounds: Vec<MigrationRound>,
    /// Times that the guest was stopped and went on, because more was left than expected.
    pub aborted_switchovers: u32,
    /// How far the guest's processors were held back at the end, in per cent.
    pub throttle_percent: u8,
    /// From the first connection to the last word.
    pub total_ms: f64,
    /// Downtime.
    pub downtime: MigrationDowntime,
}

/// One round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationRound {
    /// To be sent.
    pub bytes: u64,
    /// Of them, contents that went.
    pub sent_bytes: u64,
    /// Of them, zeros.
    pub zero_bytes: u64,
    /// Bytes on the network.
    pub wire_bytes: u64,
    /// How long it took.
    pub took_ms: f64,
}

/// Parts of the downtime, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDowntime {
    /// Processors and devices came to a stop.
    pub pause_ms: f64,
    /// It was found out what was written last.
    pub log_ms: f64,
    /// The last pages were sent.
    pub copy_ms: f64,
    /// State was saved.
    pub save_ms: f64,
    /// State was sent and loaded.
    pub state_ms: f64,
    /// Of `state_ms`, loading.
    pub load_ms: f64,
    /// The guest changed sides.
    pub switchover_ms: f64,
    /// Of `switchover_ms`, starting it.
    pub resume_ms: f64,
    /// All together.
    pub total_ms: f64,
}
