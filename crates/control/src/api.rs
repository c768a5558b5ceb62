//! The JSON of the API: what the server answers and what it accepts.
//!
//! Every size is in bytes unless its name says `_pages`; a page here is a
//! balloon page of 4 KiB, whatever the pages of host and guest are. Every time
//! is in milliseconds; a measured one may have a fraction.

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
    AskFreePages, BLOCK_BYTES, BlockCount, CacheSize, Caches, CancelledRequest, CoarseMap,
    CoarseRegion, DEFAULT_RESERVE_BYTES, DEFAULT_TIMEOUT_MS, DropCaches, DroppedCaches, FreeKind,
    FreePages, HoldState, MAX_TIMEOUT_MS, ReleasedHold, RequestStatus,
};
pub use stats::{MAX_STATS_INTERVAL_MS, MIN_STATS_INTERVAL_MS, SetStats, StatsStatus};

/// Bytes of one balloon page, the unit of the virtio balloon (virtio 1.3,
/// section 5.5.6).
pub const BALLOON_PAGE_BYTES: u64 = 4096;

/// Everything known about one guest's balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The guest's name, as given when its balloon was started.
    pub name: String,
    /// Process that serves the balloon.
    pub pid: u32,
    /// Time since that process began to serve it.
    pub uptime_ms: u64,
    /// The guest and its driver.
    pub guest: GuestStatus,
    /// What the balloon shall hold and holds.
    pub balloon: BalloonStatus,
    /// How memory goes back to the host.
    pub release: ReleaseStatus,
    /// Guest memory that the host really keeps in RAM, measured on the host.
    /// Absent when it cannot be measured.
    pub resident_bytes: Option<u64>,
    /// Times the guest left its processor because of the balloon: accesses to
    /// its registers, and notifications. Absent where another process is the
    /// monitor, which alone could count them.
    #[serde(default)]
    pub exits: Option<u64>,
    /// Notifications among them; absent where those are.
    #[serde(default)]
    pub kicks: Option<u64>,
    /// What the guest's kernel says about its memory.
    #[serde(default)]
    pub stats: StatsStatus,
    /// Free memory that the guest reported by itself.
    #[serde(default)]
    pub reports: ReportsStatus,
    /// What went wrong so far.
    pub faults: Faults,
    /// What was asked of the guest's kernel.
    #[serde(default)]
    pub requests: RequestStatus,
}

/// The guest and its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestStatus {
    /// True while a monitor is attached to the balloon.
    pub connected: bool,
    /// Which kind of driver runs in the guest.
    pub driver: Driver,
    /// Names of the features that were negotiated, such as `must-tell-host`.
    pub features: Vec<String>,
    /// What the guest fills free pages with. Absent where its driver does not say;
    /// 0 where it clears them.
    #[serde(default)]
    pub poison_val: Option<u32>,
    /// Memory the monitor has shared with the balloon; 0 before it has.
    pub memory_bytes: u64,
}

/// The driver in the guest, told by the features it accepted.
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
    /// The word used in JSON and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Classic => "classic",
            Self::Aerostat => "aerostat",
        }
    }
}

/// What the balloon shall hold and holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatus {
    /// Counts accepted changes of the target: 0 before the first one.
    pub generation: u64,
    /// True when the change of this generation is over: the guest reached the
    /// target, and no page it gave is still pending or in flight to the host.
    /// Pages that wait for the rest of their huge page do not hold it up. True
    /// in generation 0.
    pub at_target: bool,
    /// Pages the balloon shall hold.
    pub target_pages: u32,
    /// The same in bytes.
    pub target_bytes: u64,
    /// Pages the guest says it holds.
    pub actual_pages: u32,
    /// The same in bytes.
    pub actual_bytes: u64,
    /// The largest target that is accepted, which is the guest's memory. Absent
    /// while no guest is connected; any target is accepted then.
    pub max_bytes: Option<u64>,
    /// The change of this generation, in progress unless `settled`.
    pub last_change: Option<BalloonChange>,
}

impl BalloonStatus {
    /// Builds the status from page counts, so that bytes cannot disagree.
    pub fn from_pages(target_pages: u32, actual_pages: u32) -> Self {
        Self {
            target_pages,
            target_bytes: u64::from(target_pages) * BALLOON_PAGE_BYTES,
            actual_pages,
            actual_bytes: u64::from(actual_pages) * BALLOON_PAGE_BYTES,
            ..Self::default()
        }
    }

    /// True when nobody needs to wait for change `generation` any longer: it
    /// settled, or a later one took its place.
    pub fn is_over(&self, generation: u64) -> bool {
        self.generation > generation || (self.generation == generation && self.at_target)
    }
}

/// One way from an old target to a new one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonChange {
    /// Whether the balloon grows or shrinks.
    pub direction: Direction,
    /// Pages held when the target was set.
    pub from_pages: u32,
    /// The target.
    pub to_pages: u32,
    /// From the acceptance of the target until it settled, or until now.
    pub wall_ms: f64,
    /// Where that time went.
    pub stages_ms: StagesMs,
    /// Buffers the guest sent on the inflate and deflate queues.
    pub messages: u64,
    /// System calls that gave memory back.
    pub release_calls: u64,
    /// Bytes those calls covered.
    pub released_bytes: u64,
}

/// Whether the balloon grows or shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The guest gives pages.
    #[default]
    Inflate,
    /// The guest takes pages back.
    Deflate,
}

/// Time of the four stages of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StagesMs {
    /// The guest takes pages from its allocator.
    pub allocate: f64,
    /// Messages travel between guest and host.
    pub send: f64,
    /// The host turns page numbers into its own addresses.
    pub translate: f64,
    /// The host kernel takes the memory back.
    pub release: f64,
}

/// How memory goes back to the host, and how much of it is on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReleaseStatus {
    /// When pages are released.
    pub mode: ReleaseMode,
    /// What happens to pieces of a huge page.
    pub partial_huge: PartialHuge,
    /// Acknowledged to the guest, not released yet.
    pub pending_bytes: u64,
    /// In a release call right now.
    pub in_flight_bytes: u64,
    /// Waiting for the rest of their huge page.
    pub waiting_bytes: u64,
    /// Released since the start.
    pub released_bytes: u64,
    /// System calls made to release them.
    pub release_calls: u64,
    /// Calls among them that the host kernel refused.
    pub release_errors: u64,
}

/// When pages of an inflated balloon are released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseMode {
    /// After the guest was answered, merged over many messages.
    #[default]
    Background,
    /// Before the guest is answered, merged within one message.
    Immediate,
    /// Before the guest is answered, page by page. For comparison only.
    PerPage,
}

impl ReleaseMode {
    /// The word used in JSON, on the command line and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::Immediate => "immediate",
            Self::PerPage => "per-page",
        }
    }
}

/// What happens to a piece of a host huge page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PartialHuge {
    /// It waits until the whole huge page is in the balloon.
    Wait,
    /// It waits until the guest has reached its target or pauses, and is then
    /// released; the host splits the huge page.
    #[default]
    Split,
}

impl PartialHuge {
    /// The word used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Split => "split",
        }
    }
}

/// Counts of what went wrong, by whose fault it was, then by kind.
///
/// A kind is lower case with underscores, such as `page_outside_memory`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Faults {
    /// The guest's driver broke the protocol.
    pub guest: BTreeMap<String, u64>,
    /// The monitor broke the vhost-user protocol.
    pub front_end: BTreeMap<String, u64>,
    /// The host refused what it should have done.
    pub host: BTreeMap<String, u64>,
}

impl Faults {
    /// The three sides with the word used for each in JSON and in metrics.
    pub fn sides(&self) -> [(&'static str, &BTreeMap<String, u64>); 3] {
        [("guest", &self.guest), ("front_end", &self.front_end), ("host", &self.host)]
    }

    /// All faults together.
    pub fn total(&self) -> u64 {
        let counts = self.sides().into_iter().flat_map(|(_, kinds)| kinds.values());
        counts.fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// Body of `PUT /v1/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// What the balloon shall hold: a multiple of 4096, at most `max_bytes`.
    pub target_bytes: u64,
}

/// Body of `PUT /v1/release`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRelease {
    /// When pages are released from now on.
    pub mode: ReleaseMode,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What was wrong.
    pub error: String,
    /// What to do about it.
    pub hint: String,
}
