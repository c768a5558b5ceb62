//! A bandwidth limit: computes how long to wait before bytes are sent.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Burst allowed after a pause.
const BURST: Duration = Duration::from_millis(20);

/// A limit that several threads share.
#[derive(Debug)]
pub(crate) struct Bandwidth {
    bytes_per_s: u64,
    /// When everything accepted so far would have been sent at the limit.
    free_at: Mutex<Option<Instant>>,
}

impl Bandwidth {
    pub(crate) const fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, free_at: Mutex::new(None) }
    }

    /// Accepts `bytes`; returns how long to wait before they are sent.
    pub(crate) fn take(&self, bytes: u64, now: Instant) -> Duration {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = free_at.map_or(earliest, |at| at.max(earliest));
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        let end = from.checked_add(Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)));
        // A time beyond the clock's range: wait a second instead.
        let end = end.unwrap_or(from + Duration::from_secs(1));
        *free_at = Some(end);
        end.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_equals_the_limit_over_time() {
        let limit = Bandwidth::new(1_000_000);
        let start = Instant::now();
        let mut now = start;
        for _ in 0..1000 {
            now += limit.take(10_000, now);
        }
        let took = (now - start).as_secs_f64();
        assert!((9.9..=10.01).contains(&took), "{took}");
    }

    #[test]
    fn a_pause_does_not_add_to_the_burst() {
        let limit = Bandwidth::new(1_000_000);
        let start = Instant::now();
        limit.take(1_000_000, start);
        let later = start + Duration::from_secs(100);
        assert_eq!(limit.take(1_000_000, later), Duration::from_secs(1) - BURST);
    }
}
