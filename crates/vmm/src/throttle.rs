//! MigrationSource the guest's processors a part of their time only, so that it writes less while it is
//! moved.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Time of which a processor runs a part and rests the other: short enough that the guest's own
/// timers, which tick every few milliseconds, do not take it for a lock-up.
const PERIOD: Duration = Duration::from_millis(20);

/// What can be taken at most: some of a guest has to run, or it would be paused.
pub(crate) const MAX_PERCENT: u8 = 99;

/// How much of their time the processors rest, in per cent.
#[derive(Debug, Default)]
pub(crate) struct Throttle(AtomicU8);

impl Throttle {
    /// More than [`MAX_PERCENT`] is that.
    pub(crate) fn set(&self, percent: u8) {
        self.0.store(percent.min(MAX_PERCENT), Ordering::Relaxed);
    }

    /// Time that a processor may run without a rest, if it is to rest.
    pub(crate) fn run_time(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            percent => Some(PERIOD * u32::from(100 - percent) / 100),
        }
    }

    /// How long a processor rests now that has run since `since`.
    pub(crate) fn rest(&self, since: Instant, now: Instant) -> Option<Duration> {
        let run_time = self.run_time()?;
        let ran = now.saturating_duration_since(since);
        (ran >= run_time).then(|| PERIOD.saturating_sub(run_time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_rests_its_share_once_it_has_run_the_other() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        assert_eq!((throttle.run_time(), throttle.rest(start, start + PERIOD)), (None, None));
        throttle.set(75);
        assert_eq!(throttle.run_time(), Some(PERIOD / 4));
        assert_eq!(throttle.rest(start, start + PERIOD / 5), None);
        assert_eq!(throttle.rest(start, start + PERIOD / 4), Some(PERIOD * 3 / 4));
        throttle.set(200);
        assert_eq!(throttle.run_time(), Some(PERIOD / 100));
    }
}
