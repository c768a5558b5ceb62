//! What a migration came to.

use std::time::Duration;

use serde::Serialize;

/// What went where, and how long it took. Pages are 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Names the migration on both sides.
    pub id: String,
    /// Pages of the guest.
    pub memory_pages: u64,
    /// Pages whose contents were sent, each time that they were.
    pub sent_pages: u64,
    /// Bytes on the wire, with everything.
    pub wire_bytes: u64,
    /// Pages that were skipped because the guest said that it does not use them.
    pub free_pages: u64,
    /// Pages that were skipped because they are in the balloon.
    pub ballooned_pages: u64,
    /// Pages that were zeros, each time that they were to be sent.
    pub zero_pages: u64,
    /// Pages that were filled with a pattern at the destination instead of being sent.
    pub filled_pages: u64,
    /// How long the guest took to say what it does not use; absent where it was not asked or did not answer.
    pub free_answer_us: Option<u64>,
    /// Each round, the last one with the guest stopped.
    pub rounds: Vec<RoundSummary>,
    /// Times that the guest was stopped and went on, because more was left than expected.
    pub aborted_switchovers: u32,
    /// How far the guest was held back at the end, in per cent.
    pub throttle: u8,
    /// From the first connection to the last word.
    pub total_us: u64,
    /// Downtime.
    pub downtime: Downtime,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoundSummary {
    /// Pages that were to be sent.
    pub pages: u64,
    /// Of them, pages whose contents went.
    pub sent_pages: u64,
    /// Of them, zeros.
    pub zero_pages: u64,
    /// Pages filled with a pattern.
    pub filled_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub took_us: u64,
}

/// Parts of the downtime, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Downtime {
    /// Its processors and devices came to a stop.
    pub pause_us: u64,
    /// The log was read for the last time.
    pub log_us: u64,
    /// The last pages were sent.
    pub copy_us: u64,
    /// State was saved.
    pub save_us: u64,
    /// State was sent and loaded, of which `load_us` was loading, by the destination's word.
    pub state_us: u64,
    /// See `state_us`.
    pub load_us: u64,
    /// The switchover, of which `resume_us` was starting the guest, by the destination's word.
    pub switchover_us: u64,
    /// See `switchover_us`.
    pub resume_us: u64,
    /// From before the first to after the last, all together.
    pub total_us: u64,
}

/// Whole microseconds.
pub(crate) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Summary {
    pub(crate) fn add_round(&mut self, round: RoundSummary) {
        self.sent_pages += round.sent_pages;
        self.zero_pages += round.zero_pages;
        self.filled_pages += round.filled_pages;
        self.rounds.push(round);
    }
}
