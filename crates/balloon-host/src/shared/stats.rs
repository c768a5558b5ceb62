//! The guest's memory statistics.

use std::time::{Duration, Instant};

use balloon_abi::StatTag;
use control::ControlError;
use control::api::StatsStatus;

use super::{Shared, State};

impl Shared {
    /// Interval of statistics requests; `None` if there are none.
    pub fn stats_interval(&self) -> Option<Duration> {
        self.state().stats_interval
    }

    /// Sets the interval; `None` stops the requests. Wakes the loop, whose timeout may be
    /// long.
    pub(super) fn change_stats_interval(
        &self,
        interval: Option<Duration>,
    ) -> Result<(), ControlError> {
        self.state().stats_interval = interval;
        self.wake_up()
    }
}

impl State {
    pub(super) fn stats(&self) -> StatsStatus {
        let stats = self.device.stats();
        let interval_ms = self.stats_interval.map_or(0, whole_ms);
        let age_ms =
            stats.received().map(|at| whole_ms(Instant::now().saturating_duration_since(at)));
        let stale = age_ms.is_some_and(|age_ms| {
            stats.is_from_former_driver() || StatsStatus::is_stale(interval_ms, age_ms)
        });
        let values = stats.values().iter().map(|stat| (name(stat.tag), stat.value)).collect();
        StatsStatus { interval_ms, age_ms, stale, values }
    }
}

fn name(tag: StatTag) -> String {
    tag.name().map_or_else(|| format!("tag_{}", tag.0), str::to_owned)
}

pub(super) fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
