//! What the threads of a process are at, for those who ask why it does not answer.

use std::fmt::Write as _;
use std::fs;

/// Names a thread's state in `/proc/PID/task/TID/status` (proc(5)).
const STATE: &str = "State:";

/// A line for each thread: number, name, state, where in the kernel it waits (`-` where it does
/// not), and its time so far, in ticks of user and system. Empty where the process has ended.
pub(crate) fn of(pid: u32) -> String {
    let mut text = String::new();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix(STATE)).unwrap_or_default();
        let (name, place, stat) = (read("comm"), read("wchan"), read("stat"));
        // Fields 14 and 15; the name before them may have blanks in it.
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
    fn a_thread_that_waits_is_shown() {
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
