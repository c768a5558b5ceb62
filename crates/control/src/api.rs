//! The API's JSON types: request and response bodies.
//!
//! Sizes are in bytes unless the name ends in `_pages`. A page is a balloon page of 4 KiB,
//! regardless of the page size of host and guest. Times are in milliseconds; measured times may
//! have a fraction.

mod free;
mod migration;
mod requests;
mod stats;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use free::{FreePageHints, HintOutcome, MAX_LISTED_RUNS, PageRun, ReportsStatus};
pub use migration::{
    MigrationDowntime, MigrationPhase, MigrationRound, MigrationSide, MigrationState,
    MigrationStatus, MigrationSummary, ResolveAction, ResolveMigration, StartMigration,
    StartSnapshot, TlsPaths,
};
pub use requests::{
    BLOCK_BYTES, BlockCount, CacheSize, Caches, CancelledRequest, CoarseMap, CoarseRegion,
    DEFAULT_RESERVE_BYTES, DEFAULT_TIMEOUT_MS, DropCaches, DroppedCaches, FreeKind, FreePages,
    FreePagesRequest, HoldState, MAX_TIMEOUT_MS, ReleasedHold, RequestStatus,
};
pub use stats::{MAX_STATS_INTERVAL_MS, MIN_STATS_INTERVAL_MS, SetStats, StatsStatus};

/// Size of a balloon page, the unit of the virtio balloon (virtio 1.3, section 5.5.6).
pub const BALLOON_PAGE_BYTES: u64 = 4096;

/// Full status of one guest's balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The guest's name, as given when its balloon was started.
    pub name: String,
    /// Process ID of the balloon's server.
    pub pid: u32,
    /// Time since that process began to serve the balloon.
    pub uptime_ms: u64,
    /// The guest and its driver.
    pub guest: GuestStatus,
    /// Target and actual size of the balloon.
    pub balloon: BalloonStatus,
    /// How memory is released to the host.
    pub release: ReleaseStatus,
    /// Guest memory resident in the host's RAM, measured on the host. Absent when it cannot be
    /// measured.
    pub resident_bytes: Option<u64>,
    /// VM exits caused by the balloon: register accesses and notifications. Absent in a vhost-user
    /// back end, because only the VMM can count them.
    #[serde(default)]
    pub exits: Option<u64>,
    /// How many of `exits` were notifications. Absent when `exits` is.
    #[serde(default)]
    pub kicks: Option<u64>,
    /// Memory statistics reported by the guest's kernel.
    #[serde(default)]
    pub stats: StatsStatus,
    /// Free page reporting.
    #[serde(default)]
    pub reports: ReportsStatus,
    /// Fault counters.
    pub faults: Faults,
    /// Requests sent to the guest's kernel.
    #[serde(default)]
    pub requests: RequestStatus,
}

/// The guest and its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestStatus {
    /// True while a VMM is attached to the balloon.
    pub connected: bool,
    /// Kind of driver in the guest.
    pub driver: Driver,
    /// Names of the negotiated features, such as `must-tell-host`.
    pub features: Vec<String>,
    /// Value with which the guest poisons free pages, 0 if it clears them. Absent if its driver
    /// does not report it.
    #[serde(default)]
    pub poison_val: Option<u32>,
    /// Memory that the VMM shares with the balloon; 0 until it does.
    pub memory_bytes: u64,
}

/// The driver in the guest, derived from the features it accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// No driver has started.
    #[default]
    None,
    /// A virtio balloon driver that sends arrays of page numbers.
    Classic,
    /// Aerostat's driver, which sends page-bitmap records.
    Aerostat,
}

impl Driver {
    /// The name used in JSON and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Classic => "classic",
            Self::Aerostat => "aerostat",
        }
    }
}

/// Target and actual size of the balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatus {
    /// Number of accepted target changes: 0 before the first.
    pub generation: u64,
    /// True when the change of this generation is complete: the guest has reached the target, and
    /// no page it gave up is pending or in flight to the host. Pages that wait for the rest of
    /// their huge page do not delay it. True in generation 0.
    pub at_target: bool,
    /// Target size in pages.
    pub target_pages: u32,
    /// Target size in bytes.
    pub target_bytes: u64,
    /// Size reported by the guest, in pages.
    pub actual_pages: u32,
    /// Size reported by the guest, in bytes.
    pub actual_bytes: u64,
    /// Largest accepted target: the guest's memory size. Absent while no guest is connected; every
    /// target is accepted then.
    pub max_bytes: Option<u64>,
    /// The change of this generation, in progress unless `at_target`.
    pub last_change: Option<BalloonChange>,
}

impl BalloonStatus {
    /// Builds the status from page counts, so that pages and bytes agree.
    pub fn from_pages(target_pages: u32, actual_pages: u32) -> Self {
        Self {
            target_pages,
            target_bytes: u64::from(target_pages) * BALLOON_PAGE_BYTES,
            actual_pages,
            actual_bytes: u64::from(actual_pages) * BALLOON_PAGE_BYTES,
            ..Self::default()
        }
    }

    /// Returns whether change `generation` is complete or a later one has replaced it.
    pub fn is_over(&self, generation: u64) -> bool {
        self.generation > generation || (self.generation == generation && self.at_target)
    }
}

/// One change of the target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonChange {
    /// Whether the balloon grows or shrinks.
    pub direction: Direction,
    /// Pages in the balloon when the target was set.
    pub from_pages: u32,
    /// Target in pages.
    pub to_pages: u32,
    /// From acceptance of the target until the change was complete, or until now.
    pub wall_ms: f64,
    /// How that time is divided.
    pub stages_ms: StagesMs,
    /// Buffers received on the inflate and deflate queues.
    pub messages: u64,
    /// System calls that released memory.
    pub release_calls: u64,
    /// Bytes released by those calls.
    pub released_bytes: u64,
}

/// Whether the balloon grows or shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The guest gives up pages.
    #[default]
    Inflate,
    /// The guest takes pages back from the balloon.
    Deflate,
}

/// Times of the four stages of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StagesMs {
    /// The guest allocates pages.
    pub allocate: f64,
    /// Messages are in transit between guest and host.
    pub send: f64,
    /// The host translates page numbers into host addresses.
    pub translate: f64,
    /// The host kernel frees the memory.
    pub release: f64,
}

/// How memory is released to the host, and how much is not released yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReleaseStatus {
    /// When pages are released.
    pub mode: ReleaseMode,
    /// What happens to part of a huge page.
    pub partial_huge: PartialHuge,
    /// Acknowledged to the guest, not released yet.
    pub pending_bytes: u64,
    /// In a release call at this moment.
    pub in_flight_bytes: u64,
    /// Waiting for the rest of their huge page.
    pub waiting_bytes: u64,
    /// Released since the start.
    pub released_bytes: u64,
    /// System calls that released them.
    pub release_calls: u64,
    /// How many of those calls failed.
    pub release_errors: u64,
}

/// When pages of an inflated balloon are released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseMode {
    /// After the reply to the guest, merged across messages.
    #[default]
    Background,
    /// Before the reply to the guest, merged within a message.
    Immediate,
    /// Before the reply to the guest, page by page. For comparison only.
    PerPage,
}

impl ReleaseMode {
    /// The name used in JSON, on the command line and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::Immediate => "immediate",
            Self::PerPage => "per-page",
        }
    }
}

/// What happens to part of a host huge page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PartialHuge {
    /// It is released once the whole huge page is in the balloon.
    Wait,
    /// It is released when the guest reaches its target or pauses; the host splits the huge page.
    #[default]
    Split,
}

impl PartialHuge {
    /// The name used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Split => "split",
        }
    }
}

/// Fault counters, by the side at fault, then by kind.
///
/// A kind is lower case with underscores, such as `page_outside_memory`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Faults {
    /// The guest's driver violated the protocol.
    pub guest: BTreeMap<String, u64>,
    /// The front end violated the vhost-user protocol.
    pub front_end: BTreeMap<String, u64>,
    /// An operation failed on the host.
    pub host: BTreeMap<String, u64>,
}

impl Faults {
    /// Returns the three sides, each with its name in JSON and in metrics.
    pub fn sides(&self) -> [(&'static str, &BTreeMap<String, u64>); 3] {
        [("guest", &self.guest), ("front_end", &self.front_end), ("host", &self.host)]
    }

    /// Returns the number of all faults.
    pub fn total(&self) -> u64 {
        let counts = self.sides().into_iter().flat_map(|(_, kinds)| kinds.values());
        counts.fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// Body of `PUT /v1/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// Target size of the balloon: a multiple of 4096, at most `max_bytes`.
    pub target_bytes: u64,
}

/// Body of `PUT /v1/release`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRelease {
    /// When pages are released from now on.
    pub mode: ReleaseMode,
}

/// Body of every error response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What happened.
    pub error: String,
    /// How to fix it.
    pub hint: String,
}
