//! Rate limit for log lines that a peer can cause.

use std::time::{Duration, Instant};

/// Lines per period: enough for a diagnosis.
const LINES: u32 = 20;

/// Length of a period: 20 lines in 10 s are at most about 20 MiB a day.
const PERIOD: Duration = Duration::from_secs(10);

/// Limits log lines that a peer causes.
#[derive(Debug, Default)]
pub struct LogLimit {
    period_start: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Requests one line. Returns `None` if it must be suppressed, else the number of lines
    /// suppressed since the last one.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let expired = self.period_start.is_none_or(|start| now.duration_since(start) >= PERIOD);
        if expired {
            self.period_start = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_period_reports_suppressed_lines() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.take(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(limit.take(start + PERIOD / 2), None);
        }
        assert_eq!(limit.take(start + PERIOD), Some(7));
        assert_eq!(limit.take(start + PERIOD), Some(0));
    }
}
