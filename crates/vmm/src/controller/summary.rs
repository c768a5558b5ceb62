//! Converts a migration's phases and figures to the control API's types.

use control::api::{MigrationDowntime, MigrationPhase, MigrationRound, MigrationSummary};
use migration::observer::Phase;
use migration::{RoundSummary, Summary};
use page_set::PAGE_BYTES;

/// The phase, and the round's number if it is a round.
pub(super) const fn phase(phase: Phase) -> (MigrationPhase, Option<u32>) {
    match phase {
        Phase::DropCaches => (MigrationPhase::DropCaches, None),
        Phase::SyncDisks => (MigrationPhase::SyncDisks, None),
        Phase::Connect => (MigrationPhase::Connect, None),
        Phase::Negotiate => (MigrationPhase::Negotiate, None),
        Phase::FreePages => (MigrationPhase::FreePages, None),
        Phase::Round { number } => (MigrationPhase::Round, Some(number)),
        Phase::LastRound => (MigrationPhase::LastRound, None),
        Phase::State => (MigrationPhase::State, None),
        Phase::Switchover => (MigrationPhase::Switchover, None),
    }
}

pub(super) fn summary(summary: &Summary) -> MigrationSummary {
    let down = &summary.downtime;
    MigrationSummary {
        id: summary.id.clone(),
        memory_bytes: bytes(summary.memory_pages),
        sent_bytes: bytes(summary.sent_pages),
        wire_bytes: summary.wire_bytes,
        free_bytes: bytes(summary.free_pages),
        balloon_bytes: bytes(summary.ballooned_pages),
        zero_bytes: bytes(summary.zero_pages),
        filled_bytes: bytes(summary.filled_pages),
        free_answer_ms: summary.free_answer_us.map(ms),
        rounds: summary.rounds.iter().map(round).collect(),
        aborted_switchovers: summary.aborted_switchovers,
        throttle_percent: summary.throttle,
        total_ms: ms(summary.total_us),
        downtime: MigrationDowntime {
            pause_ms: ms(down.pause_us),
            log_ms: ms(down.log_us),
            copy_ms: ms(down.copy_us),
            save_ms: ms(down.save_us),
            state_ms: ms(down.state_us),
            load_ms: ms(down.load_us),
            switchover_ms: ms(down.switchover_us),
            resume_ms: ms(down.resume_us),
            total_ms: ms(down.total_us),
        },
    }
}

fn round(round: &RoundSummary) -> MigrationRound {
    MigrationRound {
        bytes: bytes(round.pages),
        sent_bytes: bytes(round.sent_pages),
        zero_bytes: bytes(round.zero_pages),
        wire_bytes: round.wire_bytes,
        took_ms: ms(round.took_us),
    }
}

const fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES)
}

#[expect(clippy::cast_precision_loss, reason = "a time in milliseconds has no 2^53 microseconds")]
const fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}
