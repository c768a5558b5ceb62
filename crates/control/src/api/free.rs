//! Free memory that the guest tells of: reports and hints.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Free memory that the guest reported by itself, which is released at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportsStatus {
    /// Reports of the guest.
    pub messages: u64,
    /// Memory that they named. A page counts each time that it is reported.
    pub reported_bytes: u64,
    /// Memory that was released because of them. It is not in the balloon, and not
    /// among what the balloon released.
    pub released_bytes: u64,
    /// System calls made to release it.
    pub release_calls: u64,
    /// Memory that was not released because the guest expects its poison there.
    pub poisoned_bytes: u64,
    /// Memory that was not released because it is part of a larger host page.
    pub partial_bytes: u64,
}

/// Runs that an answer lists at most: some 0.5 MiB of JSON, and all that a guest of
/// 64 GiB can name in blocks of 4 MiB.
pub const MAX_LISTED_RUNS: usize = 16384;

/// What the guest does not use, as it said when it was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FreePageHints {
    /// Number of this request, which the guest repeated.
    pub id: u32,
    /// How it went.
    pub outcome: HintOutcome,
    /// Pages that the guest named.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Runs of neighbouring pages among them.
    pub runs: u64,
    /// Time since the guest was asked.
    pub elapsed_ms: u64,
    /// The lowest 16384 runs, where they were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub list: Vec<PageRun>,
}

/// Neighbouring pages of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PageRun {
    /// Guest physical address of the first one divided by 4096.
    pub start: u64,
    /// How many.
    pub pages: u64,
}

/// How a request for hints went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HintOutcome {
    /// The guest is still naming pages, or has not begun.
    #[default]
    InProgress,
    /// The guest named all that it could.
    Complete,
    /// Somebody else asked or stopped it in between.
    Replaced,
    /// The guest's driver went away.
    Lost,
}
