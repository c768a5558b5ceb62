//! Errors in the logs of guests and back ends.

/// Error messages of a kernel or the guests' init. Linux: lib/bug.c,
/// kernel/panic.c, mm/oom_kill.c, mm/page_alloc.c, mm/page_poison.c, kernel/hung_task.c,
/// kernel/rcu/tree_stall.h.
const GUEST_COMPLAINTS: [&str; 16] = [
    "WARNING",
    "BUG",
    "Oops",
    CALL_TRACE,
    "Kernel panic",
    "Out of memory",
    "oom-kill",
    "page allocation failure",
    "bad page",
    "corruption",
    "pagealloc:",
    "blocked for more than",
    "detected stall",
    "expedited stall",
    // Aerostat's driver: the device rejected an answer.
    "refused an answer",
    " init: ",
];

/// Follows a message, or is the only sign of a message not listed above.
const CALL_TRACE: &str = "Call Trace";

/// Lines before and after the head of a call trace that describe its cause.
const LINES_BEFORE: usize = 12;
const LINES_AFTER: usize = 16;

/// Error messages of a back end: levels, and the start of a panic.
const BACKEND_COMPLAINTS: [&str; 3] = [" WARN ", " ERROR ", "panicked at"];

/// Error lines of a guest's console and kernel log; a call trace with the lines around it.
pub fn guest_complaints(log: &str) -> Vec<String> {
    complaints(log, &GUEST_COMPLAINTS)
}

/// Error lines of a back end's log.
pub fn backend_complaints(log: &str) -> Vec<String> {
    complaints(log, &BACKEND_COMPLAINTS)
}

fn complaints(log: &str, words: &[&str]) -> Vec<String> {
    let lines: Vec<&str> = log.lines().collect();
    let complains = |line: &str| words.iter().any(|word| line.contains(word));
    let matching = lines.iter().enumerate().filter(|(_, line)| complains(line));
    matching
        .map(|(at, line)| match line.contains(CALL_TRACE) {
            true => around(&lines, at),
            false => (*line).to_owned(),
        })
        .collect()
}

fn around(lines: &[&str], at: usize) -> String {
    let end = lines.len().min(at + LINES_AFTER);
    lines.get(at.saturating_sub(LINES_BEFORE)..end).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_trace_has_the_lines_around_it() {
        let log = "[  1.0] boots\n\
                   [ 70.0] workqueue: something odd\n\
                   [ 70.1] Call Trace:\n\
                   [ 70.2]  where+0x1/0x2\n";
        let found = guest_complaints(log);
        assert_eq!(found, [log.trim_end()]);
    }

    #[test]
    fn errors_are_found_among_other_lines() {
        let guest = "[    1.1] kernel mem auto-init: heap free:off\n\
                     [    1.2] kernel Run /init as init process\n\
                     [    1.3] kernel WARNING: CPU: 0 PID: 1\n\
                     [    1.4] host 7 fill file1 20 3\n\
                     [    2.0] kernel Out of memory: Killed process 9\n";
        let found = guest_complaints(guest);
        assert_eq!(found.len(), 2, "{found:?}");
        let backend = "2026-01-01T00:00:00Z  INFO vhost_device_balloon: a front end connected\n\
                       2026-01-01T00:00:00Z  WARN vhost_device_balloon: guest: no such page\n";
        assert_eq!(backend_complaints(backend).len(), 1);
        assert_eq!(backend_complaints("thread 'main' panicked at src/x.rs:1").len(), 1);
    }
}
