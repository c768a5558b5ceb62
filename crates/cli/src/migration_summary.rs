//! Text summary of a completed migration.

use std::fmt::Write as _;

use control::Size;
use control::api::MigrationSummary;

use crate::output::plural;

/// Formats what was sent, what was skipped, and the downtime.
pub fn text(guest: &str, to: &str, summary: &MigrationSummary) -> String {
    let down = &summary.downtime;
    let mut text = format!(
        "{guest}: migrated to {to} in {:.0} ms, downtime {:.1} ms\n",
        summary.total_ms, down.total_ms
    );
    let mut line = |size: u64, what: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {:>12}  {what}", Size(size).to_string());
    };
    let rounds = plural(summary.rounds.len() as u64, "round");
    line(summary.memory_bytes, "guest memory");
    line(summary.sent_bytes, &format!("sent in {rounds}"));
    line(summary.wire_bytes, "on the network");
    let answered =
        summary.free_answer_ms.map(|ms| format!(", reported by the guest in {ms:.1} ms"));
    line(summary.free_bytes, &format!("skipped: free{}", answered.unwrap_or_default()));
    line(summary.balloon_bytes, "skipped: in the balloon");
    line(summary.zero_bytes, "sent without contents: zeros");
    if summary.filled_bytes > 0 {
        line(summary.filled_bytes, "filled with a pattern at the destination");
    }
    let _ = writeln!(
        text,
        "  downtime: stopping vCPUs {:.1} ms, dirty log {:.1}, last pages {:.1}, saving {:.1}, state {:.1} \
         (loading {:.1}), switchover {:.1} (starting {:.1})",
        down.pause_ms,
        down.log_ms,
        down.copy_ms,
        down.save_ms,
        down.state_ms,
        down.load_ms,
        down.switchover_ms,
        down.resume_ms
    );
    if summary.throttle_percent > 0 {
        let _ = writeln!(text, "  vCPUs throttled by {} % at the end", summary.throttle_percent);
    }
    text
}
