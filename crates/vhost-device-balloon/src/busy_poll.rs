//! Polls briefly for the guest's next message before the thread sleeps.
//!
//! A stock driver sends thousands of messages and waits for each, and each wakes this thread.
//! Busy polling occupies a host CPU, so it is off unless the operator enables it.

use std::time::{Duration, Instant};

/// Total polling time after an operator's request: enough for half a TiB from a stock driver
/// on hardware. It bounds the CPU time that a guest can cause by sending messages.
const BUDGET: Duration = Duration::from_secs(10);

/// Decides whether to poll or to sleep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BusyPoll {
    limit: Duration,
    left: Duration,
    since: Option<Instant>,
}

impl BusyPoll {
    /// Polls for at most `limit` after each message.
    pub(crate) const fn new(limit: Duration) -> Self {
        Self { limit, left: Duration::ZERO, since: None }
    }

    /// Renews the budget, after an operator's request.
    pub(crate) const fn allow(&mut self) {
        self.left = BUDGET;
    }

    /// Starts to poll, after a message.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.spend(now);
        self.since = Some(now);
    }

    /// Returns true while the thread should poll.
    pub(crate) fn is_active(&mut self, now: Instant) -> bool {
        let Some(since) = self.since else { return false };
        let active = now.saturating_duration_since(since) < self.limit.min(self.left);
        if !active {
            self.spend(now);
        }
        active
    }

    fn spend(&mut self, now: Instant) {
        let spent = self.since.take().map(|since| now.saturating_duration_since(since));
        self.left = self.left.saturating_sub(spent.unwrap_or_default().min(self.limit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(100);

    #[test]
    fn polls_for_the_limit_after_each_message() {
        let (mut poll, start) = (BusyPoll::new(LIMIT), Instant::now());
        poll.allow();
        assert!(!poll.is_active(start));
        poll.answered(start);
        assert!(poll.is_active(start + LIMIT / 2));
        poll.answered(start + LIMIT / 2);
        assert!(poll.is_active(start + LIMIT));
        assert!(!poll.is_active(start + LIMIT * 2));
        assert!(!poll.is_active(start));
    }

    #[test]
    fn the_budget_bounds_polling() {
        let (mut poll, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        poll.answered(now);
        assert!(!poll.is_active(now));
        poll.allow();
        let mut spent = Duration::ZERO;
        loop {
            poll.answered(now);
            if !poll.is_active(now) {
                break;
            }
            now += LIMIT;
            spent += LIMIT;
            assert!(spent <= BUDGET);
        }
        assert_eq!(spent, BUDGET);
        poll.allow();
        poll.answered(now);
        assert!(poll.is_active(now));
    }

    #[test]
    fn a_limit_of_zero_disables_polling() {
        let (mut poll, now) = (BusyPoll::new(Duration::ZERO), Instant::now());
        poll.allow();
        poll.answered(now);
        assert!(!poll.is_active(now));
    }
}
