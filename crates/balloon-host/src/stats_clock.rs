//! When the guest is to be asked for statistics.

use std::time::{Duration, Instant};

/// Remembers when it was asked last.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatsClock {
    asked: Option<Instant>,
}

impl StatsClock {
    /// Time until the next question; `None` where there is none to come.
    pub fn left(&self, interval: Option<Duration>, now: Instant) -> Option<Duration> {
        let interval = interval?;
        let since = self.asked.map_or(interval, |asked| now.saturating_duration_since(asked));
        Some(interval.saturating_sub(since))
    }

    /// True where it is time; the next question is an interval later then, whether
    /// or not the guest can be asked now.
    pub fn is_due(&mut self, interval: Option<Duration>, now: Instant) -> bool {
        let due = self.left(interval, now) == Some(Duration::ZERO);
        if due {
            self.asked = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_asked_at_once_and_then_once_in_an_interval() {
        let (mut clock, start) = (StatsClock::default(), Instant::now());
        let second = Some(Duration::from_secs(1));
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(clock.left(None, start), None);
        assert!(!clock.is_due(None, start));
        assert!(clock.is_due(second, at(5)));
        assert!(!clock.is_due(second, at(1000)));
        assert_eq!(clock.left(second, at(1000)), Some(Duration::from_millis(5)));
        // A shorter interval counts from the last question too.
        assert!(clock.is_due(Some(Duration::from_millis(100)), at(1000)));
        assert!(clock.is_due(second, at(60_000)));
        assert!(!clock.is_due(second, at(60_001)), "what was missed is not made up for");
    }
}
