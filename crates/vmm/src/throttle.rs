//! Throttles the vCPUs, so that the guest writes less during a migration.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A vCPU runs for one part of each period and sleeps for the rest. Short enough that the guest's
/// timers, which tick every few milliseconds, do not detect a lock-up.
const PERIOD: Duration = Duration::from_millis(20);

/// Maximum throttle: at 100 the guest would be paused.
pub(crate) const MAX_PERCENT: u8 = 99;

/// The part of the time for which vCPUs sleep, in per cent.
#[derive(Debug, Default)]
pub(crate) struct Throttle(AtomicU8);

impl Throttle {
    /// Sets the throttle, limited to [`MAX_PERCENT`].
    pub(crate) fn set(&self, percent: u8) {
        self.0.store(percent.min(MAX_PERCENT), Ordering::Relaxed);
    }

    /// Time for which a vCPU runs in each period; `None` without a throttle.
    pub(crate) fn run_time(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            percent => Some(PERIOD * u32::from(100 - percent) / 100),
        }
    }

    /// How long a vCPU must sleep now, if it has run since `since`.
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
    fn a_vcpu_sleeps_after_its_run_time() {
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
