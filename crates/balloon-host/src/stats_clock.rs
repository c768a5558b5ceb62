//! Timer of statistics requests.

use std::time::{Duration, Instant};

/// The time of the last request.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatsClock {
    requested: Option<Instant>,
}

impl StatsClock {
    /// Returns the time until the next request; `None` without an interval.
    pub fn left(&self, interval: Option<Duration>, now: Instant) -> Option<Duration> {
        let interval = interval?;
        let since = self.requested.map_or(interval, |at| now.saturating_duration_since(at));
        Some(interval.saturating_sub(since))
    }

    /// Returns true if a request is due. The next one is an interval later, even if this one
    /// cannot be sent.
    pub fn is_due(&mut self, interval: Option<Duration>, now: Instant) -> bool {
        let due = self.left(interval, now) == Some(Duration::ZERO);
        if due {
            self.requested = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_request_is_due_immediately_and_then_one_per_interval() {
        let (mut clock, start) = (StatsClock::default(), Instant::now());
        let second = Some(Duration::from_secs(1));
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(clock.left(None, start), None);
        assert!(!clock.is_due(None, start));
        assert!(clock.is_due(second, at(5)));
        assert!(!clock.is_due(second, at(1000)));
        assert_eq!(clock.left(second, at(1000)), Some(Duration::from_millis(5)));
        // A shorter interval counts from the last request, too.
        assert!(clock.is_due(Some(Duration::from_millis(100)), at(1000)));
        assert!(clock.is_due(second, at(60_000)));
        assert!(!clock.is_due(second, at(60_001)), "missed requests are skipped");
    }
}
