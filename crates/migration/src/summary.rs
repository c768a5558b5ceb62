//! The summary of a migration.

use std::time::Duration;

use serde::Serialize;

/// Pages, bytes and times of a migration or snapshot. Pages are 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Identifies the migration on both sides.
    pub id: String,
    /// Pages of the guest.
    pub memory_pages: u64,
    /// Pages whose contents were sent, counted once per send.
    pub sent_pages: u64,
    /// Bytes of all messages.
    pub wire_bytes: u64,
    /// Pages skipped because the guest reported them as free.
    pub free_pages: u64,
    /// Pages skipped because they are in the balloon.
    pub ballooned_pages: u64,
    /// Pending pages that were zeros, counted once per round.
    pub zero_pages: u64,
    /// Pages filled with a pattern at the destination instead of being sent.
    pub filled_pages: u64,
    /// Time of the guest's free-page answer; `None` if it was not queried or did not answer.
    pub free_answer_us: Option<u64>,
    /// Each round; the guest is paused during the last one.
    pub rounds: Vec<RoundSummary>,
    /// Times that the guest was paused and resumed, because more pages were pending than expected.
    pub aborted_switchovers: u32,
    /// Throttling of the vCPUs at the end, in per cent.
    pub throttle: u8,
    /// From the first connection to the last message.
    pub total_us: u64,
    /// Downtime.
    pub downtime: Downtime,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoundSummary {
    /// Pending pages.
    pub pages: u64,
    /// Of them, pages whose contents were sent.
    pub sent_pages: u64,
    /// Of them, zero pages.
    pub zero_pages: u64,
    /// Pages filled with a pattern.
    pub filled_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub took_us: u64,
}

/// Parts of the downtime, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Downtime {
    /// Pausing vCPUs and devices.
    pub pause_us: u64,
    /// Reading the dirty log for the last time.
    pub log_us: u64,
    /// Sending the last round.
    pub copy_us: u64,
    /// Saving the state.
    pub save_us: u64,
    /// Sending and loading the state. Of that, `load_us` is loading, as reported by the
    /// destination.
    pub state_us: u64,
    /// See `state_us`.
    pub load_us: u64,
    /// The switchover. Of that, `resume_us` is starting the guest, as reported by the destination.
    pub switchover_us: u64,
    /// See `switchover_us`.
    pub resume_us: u64,
    /// The whole downtime.
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
