//! Bounds what peers can make the log say.

use std::time::{Duration, Instant};

/// Lines that peers may cause in one period: enough to see what happens.
const LINES: u32 = 20;

/// Length of a period: at 20 lines in 10 s a day fills some 20 MiB at most.
const PERIOD: Duration = Duration::from_secs(10);

/// Counts log lines that a peer caused.
#[derive(Debug, Default)]
pub struct LogLimit {
    period_start: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    /// Asks for one line: `None` where it must be left out, else how many were
    /// left out since the last one.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let over = self.period_start.is_none_or(|start| now.duration_since(start) >= PERIOD);
        if over {
            self.period_start = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_its_lines_and_the_next_one_says_what_was_left_out() {
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
