//! Memory statistics reported by the guest's kernel.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Shortest polling interval: every poll wakes the guest.
pub const MIN_STATS_INTERVAL_MS: u64 = 100;

/// Longest polling interval: a day.
pub const MAX_STATS_INTERVAL_MS: u64 = 24 * 60 * 60 * 1000;

/// Memory statistics reported by the guest's kernel. The host does not trust them and bases no
/// decision on them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsStatus {
    /// Polling interval; 0 if the guest is not polled.
    pub interval_ms: u64,
    /// Time since the values arrived. Absent before the first.
    pub age_ms: Option<u64>,
    /// True if the values are out of date: older than two intervals, or polling is off, or the
    /// driver is gone.
    pub stale: bool,
    /// Values by name, such as `free_bytes`. A tag without a name is `tag_` and its number.
    pub values: BTreeMap<String, u64>,
}

impl StatsStatus {
    /// Returns whether values that arrived `age_ms` ago are out of date.
    pub const fn is_stale(interval_ms: u64, age_ms: u64) -> bool {
        interval_ms == 0 || age_ms > interval_ms.saturating_mul(2)
    }
}

/// Body of `PUT /v1/stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetStats {
    /// Polling interval: 100 to 86400000, or 0 to stop polling.
    pub interval_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_stale_after_two_intervals_or_without_polling() {
        assert!(!StatsStatus::is_stale(1000, 0));
        assert!(!StatsStatus::is_stale(1000, 2000));
        assert!(StatsStatus::is_stale(1000, 2001));
        assert!(StatsStatus::is_stale(0, 0));
        assert!(!StatsStatus::is_stale(u64::MAX, u64::MAX));
    }
}
