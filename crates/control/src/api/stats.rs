//! What the guest's kernel says about its memory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Shortest time between two questions to the guest: each wakes it.
pub const MIN_STATS_INTERVAL_MS: u64 = 100;

/// Longest time between two questions: a day.
pub const MAX_STATS_INTERVAL_MS: u64 = 24 * 60 * 60 * 1000;

/// What the guest's kernel says about its memory. The host believes none of it;
/// nothing is decided by these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsStatus {
    /// Time between two questions to the guest; 0 while it is not asked.
    pub interval_ms: u64,
    /// Time since the values came. Absent before the first.
    pub age_ms: Option<u64>,
    /// True where the values say little about now: they are older than two
    /// intervals, or nobody asks, or their driver is gone.
    pub stale: bool,
    /// By name, such as `free_bytes`. A tag without a name is `tag_` and its number.
    pub values: BTreeMap<String, u64>,
}

impl StatsStatus {
    /// Whether values are stale that came `age_ms` ago.
    pub const fn is_stale(interval_ms: u64, age_ms: u64) -> bool {
        interval_ms == 0 || age_ms > interval_ms.saturating_mul(2)
    }
}

/// Body of `PUT /v1/stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetStats {
    /// Time between two questions to the guest: 100 to 86400000, or 0 for none.
    pub interval_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_stale_after_two_intervals_and_when_nobody_asks() {
        assert!(!StatsStatus::is_stale(1000, 0));
        assert!(!StatsStatus::is_stale(1000, 2000));
        assert!(StatsStatus::is_stale(1000, 2001));
        assert!(StatsStatus::is_stale(0, 0));
        assert!(!StatsStatus::is_stale(u64::MAX, u64::MAX));
    }
}
