//! Joining threads that may be stuck in an uninterruptible system call.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often to check whether a thread has ended; there is no event for it.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The outcome of joining a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joined {
    Ended,
    Panicked,
    /// The thread still runs; it ends with the process.
    TimedOut,
}

/// Waits for the end of a thread, at most `limit`.
pub(crate) fn join_within<T>(thread: JoinHandle<T>, limit: Duration) -> Joined {
    let began = Instant::now();
    while !thread.is_finished() {
        if began.elapsed() >= limit {
            return Joined::TimedOut;
        }
        thread::sleep(POLL_INTERVAL);
    }
    if thread.join().is_ok() { Joined::Ended } else { Joined::Panicked }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn join_within_gives_up_after_the_limit() {
        let (end, ended) = channel::<()>();
        let stuck = thread::spawn(move || ended.recv());
        assert_eq!(join_within(stuck, POLL_INTERVAL), Joined::TimedOut);
        drop(end);
        assert_eq!(join_within(thread::spawn(|| ()), Duration::MAX), Joined::Ended);
    }
}
