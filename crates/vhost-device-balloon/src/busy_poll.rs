//! Looks for the guest's next message for a moment, instead of sleeping until it comes.
//!
//! A stock driver needs thousands of messages and waits for each, and each is a wake-up of
//! this thread. Looking costs a processor meanwhile, so operators have to ask for it.

use std::time::{Duration, Instant};

/// How long altogether after the operator wanted something: half a TiB from a stock
/// driver on hardware. A guest that sends for the sake of it gets no more of a processor.
const BUDGET: Duration = Duration::from_secs(10);

/// Whether to look or to sleep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BusyPoll {
    limit: Duration,
    left: Duration,
    since: Option<Instant>,
}

impl BusyPoll {
    /// Looks for `limit` after each message.
    pub(crate) const fn new(limit: Duration) -> Self {
        Self { limit, left: Duration::ZERO, since: None }
    }

    /// The operator wants something of the guest.
    pub(crate) const fn allow(&mut self) {
        self.left = BUDGET;
    }

    /// A message came, and the next may be near.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.spend(now);
        self.since = Some(now);
    }

    /// Whether to look again.
    pub(crate) fn goes_on(&mut self, now: Instant) -> bool {
        let Some(since) = self.since else { return false };
        let goes_on = now.saturating_duration_since(since) < self.limit.min(self.left);
        if !goes_on {
            self.spend(now);
        }
        goes_on
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
    fn looks_for_a_moment_after_each_message() {
        let (mut poll, start) = (BusyPoll::new(LIMIT), Instant::now());
        poll.allow();
        assert!(!poll.goes_on(start));
        poll.answered(start);
        assert!(poll.goes_on(start + LIMIT / 2));
        poll.answered(start + LIMIT / 2);
        assert!(poll.goes_on(start + LIMIT));
        assert!(!poll.goes_on(start + LIMIT * 2));
        assert!(!poll.goes_on(start));
    }

    #[test]
    fn a_guest_that_sends_for_ever_has_a_budget() {
        let (mut poll, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        poll.answered(now);
        assert!(!poll.goes_on(now));
        poll.allow();
        let mut spent = Duration::ZERO;
        loop {
            poll.answered(now);
            if !poll.goes_on(now) {
                break;
            }
            now += LIMIT;
            spent += LIMIT;
            assert!(spent <= BUDGET);
        }
        assert_eq!(spent, BUDGET);
        poll.allow();
        poll.answered(now);
        assert!(poll.goes_on(now));
    }

    #[test]
    fn no_limit_is_no_looking() {
        let (mut poll, now) = (BusyPoll::new(Duration::ZERO), Instant::now());
        poll.allow();
        poll.answered(now);
        assert!(!poll.goes_on(now));
    }
}
