//! Requests to the guest's kernel, and its responses.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Default timeout of a request.
pub const DEFAULT_TIMEOUT_MS: u64 = 30_000;

/// Longest timeout of a request: a guest may have a hundred GiB of caches to drop.
pub const MAX_TIMEOUT_MS: u64 = 600_000;

/// Valid values of `min_block_bytes`; it must also be a power of two.
pub const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 4096..=1 << 30;

/// Default reserve of a hold: enough for a small guest to run for a while, and little of a large
/// one.
pub const DEFAULT_RESERVE_BYTES: u64 = 128 << 20;

const fn default_timeout_ms() -> u64 {
    DEFAULT_TIMEOUT_MS
}

/// Body of `POST /v1/drop-caches`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DropCaches {
    /// Which caches; default all.
    #[serde(default)]
    pub what: Caches,
    /// Timeout for the guest's response; default 30000, at most 600000.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
}

/// Caches of the guest's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Caches {
    /// Clean page cache.
    PageCache,
    /// Reclaimable slab objects: inodes and dentries.
    Slab,
    /// Both.
    #[default]
    All,
}

impl Caches {
    /// The name used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PageCache => "page-cache",
            Self::Slab => "slab",
            Self::All => "all",
        }
    }
}

/// Result of dropping caches, according to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DroppedCaches {
    /// ID of the request.
    pub id: u32,
    /// Page cache.
    pub page_cache: CacheSize,
    /// Reclaimable slab.
    pub slab: CacheSize,
    /// Sum of both `freed_bytes`.
    pub freed_bytes: u64,
    /// From request to response, measured on the host.
    pub elapsed_ms: f64,
    /// Duration according to the guest.
    pub guest_ms: f64,
}

/// Size of a cache before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheSize {
    /// Before the drop.
    pub before_bytes: u64,
    /// After the drop.
    pub after_bytes: u64,
    /// The difference; 0 if the cache grew.
    pub freed_bytes: u64,
}

impl CacheSize {
    /// Computes `freed_bytes` from the two sizes.
    pub const fn new(before_bytes: u64, after_bytes: u64) -> Self {
        let freed_bytes = before_bytes.saturating_sub(after_bytes);
        Self { before_bytes, after_bytes, freed_bytes }
    }
}

/// Body of `POST /v1/free-pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FreePagesRequest {
    /// Kind of request; default `snapshot`.
    #[serde(default)]
    pub kind: FreeKind,
    /// Snapshot only: smallest block to report, a power of two from 4096 to 1073741824; default
    /// 4096.
    pub min_block_bytes: Option<u64>,
    /// Hold only: memory that the guest keeps for its own use, a multiple of 4096; default
    /// 134217728.
    pub reserve_bytes: Option<u64>,
    /// Timeout for the guest's response; default 30000, at most 600000.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
}

/// How free pages are reported and whether they stay free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FreeKind {
    /// A free-page report. The pages may be in use again when it arrives.
    #[default]
    Snapshot,
    /// The guest holds the pages until they are released or it needs them.
    Hold,
    /// The same as `snapshot`, by virtio free page hints, for drivers without a request queue.
    Hint,
}

impl FreeKind {
    /// The name used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Hold => "hold",
            Self::Hint => "hint",
        }
    }
}

/// Free memory according to the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FreePages {
    /// ID of the request.
    pub id: u32,
    /// Kind of request.
    pub kind: FreeKind,
    /// State of the hold; absent for the other kinds and for a hold that has ended.
    pub hold: Option<HoldState>,
    /// Memory reported; each page counts once.
    pub total_bytes: u64,
    /// The guest's free memory when it began, according to the guest; 0 with hints, which do not
    /// report it.
    pub guest_free_bytes: u64,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Memory now in the balloon.
    pub balloon_bytes: u64,
    /// Blocks reported, largest first. A block reported twice counts twice.
    pub blocks: Vec<BlockCount>,
    /// From request to response, measured on the host.
    pub elapsed_ms: f64,
    /// Duration according to the guest.
    pub guest_ms: f64,
    /// Longest time the guest held a lock, according to the guest.
    pub lock_ns_max: u64,
    /// Time since the response.
    pub age_ms: u64,
    /// The same as a coarse map, for a few lines of text.
    pub map: CoarseMap,
}

/// Number of blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlockCount {
    /// Block size.
    pub block_bytes: u64,
    /// Number of blocks.
    pub count: u64,
}

/// State of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HoldState {
    /// The guest holds the pages.
    Kept,
    /// The guest's virtqueues are stopped. The guest still holds the pages if it is only paused.
    Paused,
    /// The guest was asked to release the pages and has not confirmed it.
    Releasing,
}

/// Guest memory divided into cells of equal size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoarseMap {
    /// Pages per cell, a power of two.
    pub cell_pages: u64,
    /// The regions of guest memory, lowest first.
    pub regions: Vec<CoarseRegion>,
}

/// A region of guest memory. Its last cell may be shorter than the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoarseRegion {
    /// Guest physical address of the first page divided by 4096.
    pub first_page: u64,
    /// Number of pages.
    pub pages: u64,
    /// Free pages in each cell.
    pub free_pages: Vec<u64>,
    /// Pages in each cell that are in the balloon.
    pub balloon_pages: Vec<u64>,
}

/// Result of releasing a hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReleasedHold {
    /// ID of the request.
    pub id: u32,
    /// Memory freed, according to the guest.
    pub released_bytes: u64,
    /// From request to response, measured on the host.
    pub elapsed_ms: f64,
}

/// A cancelled request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CancelledRequest {
    /// ID of the request.
    pub id: u32,
    /// Command of the request, such as `drop-caches`.
    pub command: String,
}

/// Status and counters of requests to the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestStatus {
    /// True if the guest's driver has a request queue and the queue is running, that is neither
    /// paused nor still starting.
    pub possible: bool,
    /// Command that the guest is processing, such as `drop-caches`.
    pub running: Option<String>,
    /// Requests queued behind it.
    pub waiting: u64,
    /// State of the hold; absent without one.
    pub hold: Option<HoldState>,
    /// Responses that arrived after the timeout.
    pub late_answers: u64,
    /// Completed requests by command, then by outcome, such as `done` or `timed_out`.
    pub ended: BTreeMap<String, BTreeMap<String, u64>>,
}
