//! What the guest's kernel is asked for, and what it answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Time for a request that names none.
pub const DEFAULT_TIMEOUT_MS: u64 = 30_000;

/// Longest time for a request: a guest may have a hundred GiB of caches to drop.
pub const MAX_TIMEOUT_MS: u64 = 600_000;

/// Smallest and largest block of free memory that can be asked for.
pub const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 4096..=1 << 30;

/// What a hold leaves to the guest unless it is said: enough for a small guest
/// to go on for a while, little of a large one.
pub const DEFAULT_RESERVE_BYTES: u64 = 128 << 20;

const fn default_timeout_ms() -> u64 {
    DEFAULT_TIMEOUT_MS
}

/// Body of `POST /v1/drop-caches`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DropCaches {
    /// Which caches; all if it is not said.
    #[serde(default)]
    pub what: Caches,
    /// Time for the guest to answer, 30000 if it is not said, 600000 at most.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
}

/// Caches of a guest's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Caches {
    /// Contents of files that need not be written back.
    PageCache,
    /// Reclaimable objects of the kernel: inodes and directory entries.
    Slab,
    /// Both.
    #[default]
    All,
}

impl Caches {
    /// The word used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PageCache => "page-cache",
            Self::Slab => "slab",
            Self::All => "all",
        }
    }
}

/// What dropping caches did, by the guest's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DroppedCaches {
    /// Id of the request.
    pub id: u32,
    /// Contents of files.
    pub page_cache: CacheSize,
    /// Reclaimable objects.
    pub slab: CacheSize,
    /// What both lost together.
    pub freed_bytes: u64,
    /// From the request until its answer, seen from the host.
    pub elapsed_ms: f64,
    /// Time the guest says it took.
    pub guest_ms: f64,
}

/// A cache before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheSize {
    /// Before it was dropped.
    pub before_bytes: u64,
    /// After it was dropped.
    pub after_bytes: u64,
    /// What it lost; 0 where it grew.
    pub freed_bytes: u64,
}

impl CacheSize {
    /// From a size before and one after.
    pub const fn new(before_bytes: u64, after_bytes: u64) -> Self {
        let freed_bytes = before_bytes.saturating_sub(after_bytes);
        Self { before_bytes, after_bytes, freed_bytes }
    }
}

/// Body of `POST /v1/free-pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AskFreePages {
    /// A snapshot if it is not said.
    #[serde(default)]
    pub kind: FreeKind,
    /// Snapshot: smallest block to name, a power of two from 4096, which it is if
    /// it is not said, to 1073741824.
    pub min_block_bytes: Option<u64>,
    /// Hold: what the guest keeps free for itself, a multiple of 4096; 134217728
    /// if it is not said.
    pub reserve_bytes: Option<u64>,
    /// Time for the guest to answer, 30000 if it is not said, 600000 at most.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
}

/// What is promised of free pages, and who names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FreeKind {
    /// What was free while the guest looked. It may be in use again.
    #[default]
    Snapshot,
    /// What the guest keeps free until it is told otherwise, or needs it.
    Hold,
    /// A snapshot by the specification's free page hints, for drivers that have no
    /// request queue.
    Hint,
}

impl FreeKind {
    /// The word used in JSON and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Hold => "hold",
            Self::Hint => "hint",
        }
    }
}

/// Free memory as the guest named it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FreePages {
    /// Id of the request.
    pub id: u32,
    /// What is promised of the pages.
    pub kind: FreeKind,
    /// How a hold stands; absent for a snapshot, and for a hold that is over.
    pub hold: Option<HoldState>,
    /// Memory named, each page once.
    pub total_bytes: u64,
    /// Free memory of the guest when it began, by its word; 0 with hints, which do
    /// not say.
    pub guest_free_bytes: u64,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// Memory of it that is in the balloon now.
    pub balloon_bytes: u64,
    /// Blocks named, largest first. One that was met twice counts twice.
    pub blocks: Vec<BlockCount>,
    /// From the request until its answer, seen from the host.
    pub elapsed_ms: f64,
    /// Time the guest says it took.
    pub guest_ms: f64,
    /// Longest time for which the guest says it held a lock.
    pub lock_ns_max: u64,
    /// Time since the answer.
    pub age_ms: u64,
    /// The same in coarse steps, for a picture of a few lines.
    pub map: CoarseMap,
}

/// Blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlockCount {
    /// Size of each.
    pub block_bytes: u64,
    /// How many.
    pub count: u64,
}

/// How a hold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HoldState {
    /// The guest keeps it.
    Kept,
    /// The guest's queues stand still; it keeps it if it is only paused.
    Paused,
    /// The guest was told to give it back and has not said that it did.
    Releasing,
}

/// Guest memory in cells of equal size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoarseMap {
    /// Pages of a cell, a power of two.
    pub cell_pages: u64,
    /// The regions of guest memory, lowest first.
    pub regions: Vec<CoarseRegion>,
}

/// A region of guest memory. Its last cell may be shorter than the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoarseRegion {
    /// Number of its first page: guest physical address / 4096.
    pub first_page: u64,
    /// Its pages.
    pub pages: u64,
    /// Free pages of each cell.
    pub free_pages: Vec<u64>,
    /// Pages of each cell that are in the balloon.
    pub balloon_pages: Vec<u64>,
}

/// What releasing a hold brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReleasedHold {
    /// Id of the request.
    pub id: u32,
    /// Memory that the guest says it gave back to itself.
    pub released_bytes: u64,
    /// From the request until its answer, seen from the host.
    pub elapsed_ms: f64,
}

/// A request that was told to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CancelledRequest {
    /// Its id.
    pub id: u32,
    /// What it asked for, such as `drop-caches`.
    pub command: String,
}

/// Requests to the guest so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestStatus {
    /// True when the guest's driver has a request queue, and it is not stopped: by a
    /// pause, or because the driver starts only now.
    pub possible: bool,
    /// What the guest works on, such as `drop-caches`.
    pub running: Option<String>,
    /// Requests that wait for it to end.
    pub waiting: u64,
    /// How a hold stands; absent without one.
    pub hold: Option<HoldState>,
    /// Answers that came after their time.
    pub late_answers: u64,
    /// Ended requests by command, then by how they ended, such as `done` or
    /// `timed_out`.
    pub ended: BTreeMap<String, BTreeMap<String, u64>>,
}
