//! Free page reporting and free page hints.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of free page reporting. Reported memory is released immediately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportsStatus {
    /// Reports received.
    pub messages: u64,
    /// Memory reported. A page counts each time it is reported.
    pub reported_bytes: u64,
    /// Memory released because it was reported. It is not in the balloon and not counted in the
    /// balloon's `released_bytes`.
    pub released_bytes: u64,
    /// System calls that released it.
    pub release_calls: u64,
    /// Memory not released because the guest expects its poison value there.
    pub poisoned_bytes: u64,
    /// Memory not released because it is part of a larger host page.
    pub partial_bytes: u64,
}

/// Most runs listed in a response: about 0.5 MiB of JSON, and all runs that a guest of 64 GiB can
/// report in blocks of 4 MiB.
pub const MAX_LISTED_RUNS: usize = 16384;

/// The guest's answer to a request for free page hints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FreePageHints {
    /// ID of this request, echoed by the guest.
    pub id: u32,
    /// Outcome of the request.
    pub outcome: HintOutcome,
    /// Pages that the guest hinted.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Runs of adjacent pages among them.
    pub runs: u64,
    /// Time since the request.
    pub elapsed_ms: u64,
    /// The 16384 runs at the lowest addresses, if requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub list: Vec<PageRun>,
}

/// A run of adjacent guest pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PageRun {
    /// Guest physical address of the first page divided by 4096.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

/// Outcome of a request for hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HintOutcome {
    /// The guest is still sending hints, or has not begun.
    #[default]
    InProgress,
    /// The guest has sent all hints.
    Complete,
    /// Another request replaced or stopped it.
    Replaced,
    /// The guest's driver was reset or disconnected.
    Lost,
}
