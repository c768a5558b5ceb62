//! States of a process's threads, to diagnose why it does not answer.

use std::fmt::Write as _;
use std::fs;

/// Prefix of a thread's state in `/proc/PID/task/TID/status` (proc(5)).
const STATE: &str = "State:";

/// One line per thread: id, name, state, kernel function in which it waits (`-` if none), and its
/// user and system time in ticks. Empty if the process has ended.
pub(crate) fn of(pid: u32) -> String {
    let mut text = String::new();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix(STATE)).unwrap_or_default();
        let (name, place, stat) = (read("comm"), read("wchan"), read("stat"));
        // Fields 14 and 15. The name before them may contain spaces.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: Vec<_> = after_name.split_whitespace().skip(11).take(2).collect();
        let place = if matches!(place.as_str(), "" | "0") { "-" } else { place.as_str() };
        let number = thread.file_name().to_string_lossy().into_owned();
        let (name, state, ticks) = (name.trim(), state.trim(), ticks.join("+"));
        let _ = writeln!(text, "thread {number} {name}: {state}, {place}, {ticks}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_thread_is_listed() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (named, is_named) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("waits long".into());
        let body = move || {
            named.send(()).unwrap();
            wait.recv()
        };
        let thread = thread.spawn(body).unwrap();
        is_named.recv().unwrap();
        let shown = of(std::process::id());
        drop(go);
        assert!(thread.join().unwrap().is_err());
        assert!(shown.lines().any(|line| line.contains(" waits long: ")), "{shown}");
        assert_eq!(of(u32::MAX), "");
    }
}
