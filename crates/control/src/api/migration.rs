//! Live migration and VM snapshots.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartMigration {
    /// The destination's address, as `HOST:PORT`.
    pub to: String,
    /// TLS files, readable by the VMM. Without them the connection is not encrypted, which is
    /// accepted only on a loopback address.
    pub tls: Option<TlsPaths>,
    /// TCP connections, 1 to 16; default 4.
    pub connections: Option<u8>,
    /// Longest downtime; default 300.
    pub max_downtime_ms: Option<u64>,
    /// Bandwidth limit in bytes per second, at least 1 MiB; default none.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// zstd level, 1 to 19; default no compression.
    pub compression: Option<u8>,
    /// Rounds before the migration fails, 1 to 1000; default 100.
    pub max_rounds: Option<u32>,
    /// Drop the guest's caches first.
    #[serde(default)]
    pub drop_caches: bool,
    /// Do not request a free-page report; send free pages too.
    #[serde(default)]
    pub send_free_pages: bool,
}

/// Body of `POST /v1/snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartSnapshot {
    /// Absolute path of the file. The VMM creates it; it must not exist.
    pub path: String,
    /// Drop the guest's caches first.
    #[serde(default)]
    pub drop_caches: bool,
    /// Do not request a free-page report; send free pages too.
    #[serde(default)]
    pub write_free_pages: bool,
}

/// Paths of PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// CA certificate that must have issued the peer's certificate.
    pub authority: String,
    /// This side's certificate.
    pub certificate: String,
    /// This side's private key.
    pub key: String,
}

/// Body of `POST /v1/migration/resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// How to resolve the in-doubt migration.
    pub action: ResolveAction,
}

/// How to resolve an in-doubt migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResolveAction {
    /// The source queries its destination. Always safe.
    Ask,
    /// Resume the guest here. The caller **guarantees that the guest does not run on the other
    /// side** and never will: that process is dead.
    RunHere,
    /// Never run the guest here. The caller guarantees that the other side has it.
    Discard,
}

/// Status of a migration, or of a VM snapshot, which is a migration to a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationStatus {
    /// Overall state.
    pub state: MigrationState,
    /// Whether this is the source, the destination or a VM snapshot; absent before the first
    /// migration.
    pub side: Option<MigrationSide>,
    /// Current phase; absent unless a migration runs.
    pub phase: Option<MigrationPhase>,
    /// Current round, from 0.
    pub round: u32,
    /// 4 KiB pages processed in this phase, whether sent or skipped.
    pub done_pages: u64,
    /// Total for `done_pages`; 0 if unknown.
    pub of_pages: u64,
    /// Bytes sent on the network so far, protocol overhead included, or written to the file.
    pub wire_bytes: u64,
    /// Time since the migration began.
    pub elapsed_ms: f64,
    /// Why the migration failed or is in doubt.
    pub error: Option<String>,
    /// How to fix the failure.
    #[serde(default)]
    pub hint: Option<String>,
    /// Outcome; source only.
    pub summary: Option<MigrationSummary>,
}

/// State of the newest migration or VM snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// No migration yet; the guest runs here.
    #[default]
    None,
    /// This destination waits for a source.
    Waiting,
    /// A migration is in progress.
    Running,
    /// The migration failed. On the source, the guest still runs here.
    Failed,
    /// The guest is paused here, and this side cannot know whether it runs on the other side: see
    /// `POST /v1/migration/resolve`.
    InDoubt,
    /// This side owns the guest, but could not resume it.
    Stuck,
    /// The guest runs on the other side and never again here.
    Moved,
    /// The guest arrived and runs here.
    Arrived,
    /// The VM snapshot is written; the guest still runs here.
    Saved,
}

impl MigrationState {
    /// Returns whether the state is final without operator action.
    pub const fn is_over(self) -> bool {
        !matches!(self, Self::Waiting | Self::Running)
    }
}

/// Role of this process in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationSide {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
    /// The guest is written to a file and continues to run here.
    Snapshot,
}

/// Phase of a running migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The guest drops its caches.
    DropCaches,
    /// The guest's disks are flushed.
    SyncDisks,
    /// The two sides connect.
    Connect,
    /// The two sides check that they are compatible.
    Negotiate,
    /// The guest reports its free pages.
    FreePages,
    /// Pages are sent while the guest runs.
    Round,
    /// The guest is paused and the last pages are sent.
    LastRound,
    /// vCPU and device state is sent.
    State,
    /// The source commits, and the destination resumes the guest.
    Switchover,
}

impl MigrationPhase {
    /// The name used in JSON and on the command line.
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

/// Outcome of a migration. Except for `wire_bytes`, sizes are bytes of guest memory, counted once
/// per round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationSummary {
    /// ID of the migration, the same on both sides.
    pub id: String,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Pages sent with their contents.
    pub sent_bytes: u64,
    /// Bytes on the network, protocol overhead included.
    pub wire_bytes: u64,
    /// Pages skipped because the guest reported them free.
    pub free_bytes: u64,
    /// Pages skipped because they are in the balloon.
    pub balloon_bytes: u64,
    /// Pages of zeros, sent without contents.
    pub zero_bytes: u64,
    /// Pages that the destination filled with a pattern.
    pub filled_bytes: u64,
    /// Time the guest took to report its free pages; absent if it did not.
    pub free_answer_ms: Option<f64>,
    /// All rounds; the guest is paused in the last.
    pub rounds: Vec<MigrationRound>,
    /// Aborted switchovers: the guest was paused and resumed because more was dirty than expected.
    pub aborted_switchovers: u32,
    /// vCPU throttling at the end, in per cent.
    pub throttle_percent: u8,
    /// From the first connection to the last message.
    pub total_ms: f64,
    /// Downtime and its parts.
    pub downtime: MigrationDowntime,
}

/// One round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationRound {
    /// Memory to send in this round.
    pub bytes: u64,
    /// How much of it was sent with contents.
    pub sent_bytes: u64,
    /// How much of it was zeros.
    pub zero_bytes: u64,
    /// Bytes on the network.
    pub wire_bytes: u64,
    /// Duration of the round.
    pub took_ms: f64,
}

/// Parts of the downtime, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDowntime {
    /// Pausing vCPUs and devices.
    pub pause_ms: f64,
    /// Reading the dirty log.
    pub log_ms: f64,
    /// Sending the last pages.
    pub copy_ms: f64,
    /// Saving state.
    pub save_ms: f64,
    /// Sending and loading state.
    pub state_ms: f64,
    /// Part of `state_ms`: loading.
    pub load_ms: f64,
    /// Switchover.
    pub switchover_ms: f64,
    /// Part of `switchover_ms`: resuming the guest.
    pub resume_ms: f64,
    /// Sum of the parts.
    pub total_ms: f64,
}
