//! Threads that may be stuck in a call that nobody can interrupt.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often it is looked whether a thread has ended; nobody announces that.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// What became of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joined {
    Ended,
    Panicked,
    /// It is left to the end of the process.
    Not,
}

/// Waits for the end of a thread, at most so long.
pub(crate) fn join_within<T>(thread: JoinHandle<T>, limit: Duration) -> Joined {
    let began = Instant::now();
    while !thread.is_finished() {
        if began.elapsed() >= limit {
            return Joined::Not;
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
    fn a_thread_that_does_not_end_is_left() {
        let (ends, ended) = channel::<()>();
        let stuck = thread::spawn(move || ended.recv());
        assert_eq!(join_within(stuck, POLL_INTERVAL), Joined::Not);
        drop(ends);
        assert_eq!(join_within(thread::spawn(|| ()), Duration::MAX), Joined::Ended);
    }
}
