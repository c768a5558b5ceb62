//! When to pause the guest: a decision from numbers, without a clock.

use std::time::Duration;

/// The downtime besides pages: state is saved, sent and loaded, and three messages are exchanged.
const FIXED: Duration = Duration::from_millis(30);

/// Assumed pages per second before any were sent: 40 MB/s, a slow network.
const ASSUMED_PAGES_PER_S: f64 = 10_000.0;

/// The first step of throttling the vCPUs, each following step, and the limit, in per cent.
const FIRST_THROTTLE: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const MAX_THROTTLE: u8 = 99;

/// Rounds in a row in which the guest writes more than half of what was sent, before it is
/// throttled (further).
const MAX_DIVERGING_ROUNDS: u32 = 2;

/// The cost of a zero page in pages with contents: it is read and not sent. On a fast network,
/// 10 Gbit/s, an eighth; on a slower one less, so that the estimate errs towards a longer downtime.
const ZERO_COST: f64 = 1.0 / 8.0;

/// Times that a paused guest is resumed because more pages were pending than expected.
const MAX_ABORTED_SWITCHOVERS: u32 = 3;

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The pending pages fit the limit: pause the guest.
    Pause,
    /// Send another round while the guest runs, with its vCPUs throttled.
    Continue {
        /// In per cent, 0 to 99.
        throttle: u8,
    },
    /// The migration does not converge within the limit of rounds.
    Fail,
}

/// Measurements of one round.
#[derive(Clone, Copy, Debug)]
pub struct RoundStats {
    /// Pages whose contents were sent.
    pub sent_pages: u64,
    /// Pending pages that were zeros.
    pub zero_pages: u64,
    /// Duration of the round.
    pub took: Duration,
    /// Pages written meanwhile, according to the dirty log. How many of them are zeros is not known
    /// until they are read.
    pub remaining_pages: u64,
}

impl RoundStats {
    /// The work of the round, in pages with contents.
    fn work(&self) -> f64 {
        as_f64(self.sent_pages) + as_f64(self.zero_pages) * ZERO_COST
    }

    /// Work per page of the round; the maximum for a round without pages.
    fn cost(&self) -> f64 {
        let pages = self.sent_pages.saturating_add(self.zero_pages);
        if pages == 0 { 1.0 } else { self.work() / as_f64(pages) }
    }
}

/// The state of the decision.
///
/// The dirty log counts written pages, not the work to send them: a guest whose kernel clears pages
/// when it allocates them has written every page that it hints as free, and none of them has
/// contents. So a round of written pages counts with its measured work, and pages that are not read
/// yet count with the cost of those before them.
#[derive(Clone, Debug)]
pub struct Convergence {
    downtime: Duration,
    max_rounds: u32,
    rounds: u32,
    diverging_rounds: u32,
    throttle: u8,
    /// Measured rate of pages with contents.
    pages_per_s: Option<f64>,
    /// Work of the newest round.
    work: f64,
    /// Work per page of the newest two rounds of written pages.
    costs: [f64; 2],
    aborted_switchovers: u32,
}

impl Convergence {
    /// For a downtime limit and at most `max_rounds` rounds.
    #[must_use]
    pub const fn new(downtime: Duration, max_rounds: u32) -> Self {
        Self {
            downtime,
            max_rounds,
            rounds: 0,
            diverging_rounds: 0,
            throttle: 0,
            pages_per_s: None,
            work: 0.0,
            costs: [1.0; 2],
            aborted_switchovers: 0,
        }
    }

    /// Decides after a round.
    pub fn after_round(&mut self, stats: RoundStats) -> Decision {
        self.rounds += 1;
        self.update(&stats);
        if self.fits(stats.remaining_pages) {
            return Decision::Pause;
        }
        if self.rounds >= self.max_rounds {
            return Decision::Fail;
        }
        let remaining = as_f64(stats.remaining_pages) * self.cost();
        self.diverging_rounds =
            if remaining > self.work / 2.0 { self.diverging_rounds + 1 } else { 0 };
        if self.diverging_rounds >= MAX_DIVERGING_ROUNDS {
            self.diverging_rounds = 0;
            self.throttle = match self.throttle {
                0 => FIRST_THROTTLE,
                more => more.saturating_add(THROTTLE_STEP).min(MAX_THROTTLE),
            };
        }
        Decision::Continue { throttle: self.throttle }
    }

    /// Updates the rate of the network and the cost of the pages that the guest wrote in the round
    /// before.
    fn update(&mut self, stats: &RoundStats) {
        if stats.sent_pages > 0 && !stats.took.is_zero() {
            let rate = as_f64(stats.sent_pages) / stats.took.as_secs_f64();
            // A round of mostly zeros took longer than its contents needed: the rate is a lower
            // bound.
            let least = self.pages_per_s.filter(|_| stats.zero_pages > stats.sent_pages);
            self.pages_per_s = Some(rate.max(least.unwrap_or_default()));
        }
        let work = stats.work();
        // The first round is of all pages, not of written ones.
        if self.rounds > 1 {
            self.costs = [self.costs[1], stats.cost()];
            if work <= self.work / 2.0 {
                self.diverging_rounds = 0;
            }
        }
        self.work = work;
    }

    /// The cost of a written page: the higher one of the newest two rounds.
    const fn cost(&self) -> f64 {
        self.costs[0].max(self.costs[1])
    }

    /// Whether to resume a paused guest for another round: it wrote so much before it was paused
    /// that the downtime would exceed twice the limit. At most three times.
    pub fn abort_switchover(&mut self, remaining_pages: u64) -> bool {
        let late = self.expected(remaining_pages) > self.downtime.saturating_mul(2);
        let abort = late
            && self.aborted_switchovers < MAX_ABORTED_SWITCHOVERS
            && self.rounds < self.max_rounds;
        self.aborted_switchovers += u32::from(abort);
        abort
    }

    /// The expected downtime if the guest were paused now.
    #[must_use]
    pub fn expected(&self, remaining_pages: u64) -> Duration {
        let rate = self.pages_per_s.unwrap_or(ASSUMED_PAGES_PER_S);
        let seconds = as_f64(remaining_pages) * self.cost() / rate;
        let pages = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        pages.saturating_add(FIXED)
    }

    /// Throttling of the vCPUs, in per cent.
    #[must_use]
    pub const fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Rounds so far.
    #[must_use]
    pub const fn rounds(&self) -> u32 {
        self.rounds
    }

    /// A limit below the fixed downtime still limits the pages.
    fn fits(&self, remaining_pages: u64) -> bool {
        let limit = self.downtime.max(FIXED + self.downtime / 4);
        self.expected(remaining_pages) <= limit
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
const fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    /// A guest of `memory` pages that writes `write` pages per second, each of them once.
    fn simulate(memory: u64, write: f64, rate: f64, max_rounds: u32) -> (Decision, Convergence) {
        let mut convergence = Convergence::new(LIMIT, max_rounds);
        let (mut sent, mut throttle) = (memory, 0);
        loop {
            let took = as_f64(sent) / rate;
            let written = took * write * f64::from(100 - throttle) / 100.0;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a test")]
            let remaining_pages = (written as u64).min(memory);
            let took = Duration::from_secs_f64(took);
            let stats = RoundStats { sent_pages: sent, zero_pages: 0, took, remaining_pages };
            match convergence.after_round(stats) {
                Decision::Continue { throttle: next } => {
                    assert!(next >= throttle && next <= 99);
                    throttle = next;
                }
                decision => return (decision, convergence),
            }
            sent = remaining_pages;
        }
    }

    #[test]
    fn an_idle_guest_is_paused_after_one_round() {
        let (decision, convergence) = simulate(1 << 20, 1000.0, 250_000.0, 60);
        assert_eq!((decision, convergence.rounds()), (Decision::Pause, 1));
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_pages_are_sent_is_throttled() {
        let (decision, convergence) = simulate(1 << 20, 300_000.0, 250_000.0, 60);
        assert_eq!(decision, Decision::Pause);
        assert!(convergence.throttle() >= 20, "{}", convergence.throttle());
    }

    #[test]
    fn a_guest_that_writes_too_fast_fails_the_migration() {
        let (decision, convergence) = simulate(1 << 24, 1e9, 100_000.0, 60);
        assert_eq!((decision, convergence.rounds()), (Decision::Fail, 60));
        assert_eq!(convergence.throttle(), 99);
    }

    #[test]
    fn a_paused_guest_is_resumed_at_most_three_times() {
        let mut convergence = Convergence::new(LIMIT, 60);
        assert_eq!(convergence.after_round(stats(100_000, 0, 1000, 10)), Decision::Pause);
        assert!(!convergence.abort_switchover(50_000), "within twice the limit");
        let many = std::iter::repeat_with(|| convergence.abort_switchover(70_000)).take(5);
        assert_eq!(many.collect::<Vec<_>>(), [true, true, true, false, false]);
    }

    fn stats(sent_pages: u64, zero_pages: u64, ms: u64, remaining_pages: u64) -> RoundStats {
        RoundStats { sent_pages, zero_pages, took: Duration::from_millis(ms), remaining_pages }
    }

    /// Free page hints of a kernel that clears what it allocates: all hinted pages were written,
    /// are zeros, and cost one round.
    #[test]
    fn a_guest_that_wrote_zeros_is_not_throttled() {
        // The round of zeros is long or short, and the network fast or slow.
        for (first_ms, zeros_ms) in [(200, 40), (200, 400), (5000, 60), (20_000, 1000)] {
            let mut convergence = Convergence::new(LIMIT, 60);
            let again = Decision::Continue { throttle: 0 };
            assert_eq!(convergence.after_round(stats(15_000, 5000, first_ms, 200_000)), again);
            // The guest is also busy: it writes more than half of what was sent, in pages.
            let busy = convergence.after_round(stats(200, 199_800, zeros_ms, 3000));
            let fits = 3000 * first_ms / 15_000 + 30 <= 300;
            assert_eq!(busy == Decision::Pause, fits, "{first_ms} {zeros_ms}");
            assert_eq!(convergence.throttle(), 0, "{first_ms} {zeros_ms}");
        }
    }

    #[test]
    fn zeros_do_not_change_the_measured_rate() {
        let mut convergence = Convergence::new(LIMIT, 60);
        convergence.after_round(stats(50_000, 0, 1000, 100_000));
        let before = convergence.expected(10_000);
        convergence.after_round(stats(100, 99_900, 500, 20_000));
        // Nor the cost of written pages: that takes two such rounds.
        assert_eq!(convergence.expected(10_000), before);
    }

    /// A guest that writes only zeros, but more than can be read, is throttled too.
    #[test]
    fn a_guest_that_clears_pages_too_fast_is_throttled() {
        let mut convergence = Convergence::new(LIMIT, 60);
        convergence.after_round(stats(500_000, 0, 10_000, 500_000));
        let throttles = (0..8).map(|_| convergence.after_round(stats(0, 500_000, 1250, 500_000)));
        let last = throttles.last();
        assert!(matches!(last, Some(Decision::Continue { throttle: 20.. })), "{last:?}");
    }

    proptest! {
        #[test]
        fn it_ends_and_pauses_only_within_the_limit(
            memory in 1u64..1 << 26, write in 0.0f64..1e7, rate in 1e3f64..1e6, rounds in 1u32..100
        ) {
            let (decision, convergence) = simulate(memory, write, rate, rounds);
            prop_assert!(convergence.rounds() <= rounds);
            prop_assert!(decision == Decision::Pause || convergence.rounds() == rounds);
        }

        #[test]
        fn a_guest_is_paused_if_and_only_if_the_limit_allows(
            sent_pages in 1u64..1 << 30, ms in 1u64..1 << 20, remaining_pages in 0u64..1 << 30,
            limit in 0u64..5000
        ) {
            let limit = Duration::from_millis(limit);
            let mut convergence = Convergence::new(limit, 2);
            let stats = stats(sent_pages, 0, ms, remaining_pages);
            let stop = convergence.after_round(stats) == Decision::Pause;
            let within = convergence.expected(remaining_pages) <= limit;
            prop_assert!(stop || !within);
            // Beyond the limit only by the fixed downtime.
            prop_assert!(!stop || convergence.expected(remaining_pages) <= limit + FIXED);
        }
    }
}
