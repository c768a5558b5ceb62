//! Shutdown: the process exits within ten seconds of SIGTERM or SIGINT, even if a wait blocks.
//!
//! Each wait during a shutdown (a peer, a disk, the console's reader) has its own timeout. A
//! watchdog covers the rest: after [`CUT_OFF`] it logs what the process waits for, and exits.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level;

/// Time after which the watchdog exits: more than a second before the limit of ten seconds.
const CUT_OFF: Duration = Duration::from_millis(8500);

/// Time limit for all waits that have a timeout. The rest is for steps without one.
const ORDERLY_TIMEOUT: Duration = Duration::from_secs(7);

/// Time limit for the watchdog's log line: the log may be what blocks the process.
const FINAL_LOG_TIMEOUT: Duration = Duration::from_millis(500);

/// How often the watchdog polls whether the line was logged.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Exit code of the watchdog.
const CUT_OFF_CODE: i32 = 1;

/// The shutdown of this process.
#[derive(Debug)]
pub struct Ending {
    state: Mutex<State>,
    /// Readable once an orderly shutdown has started.
    started: UnixStream,
    starts: UnixStream,
    /// Written by the signal handlers.
    requests: UnixStream,
}

#[derive(Debug)]
struct State {
    /// A loop polls [`Ending::shutdown_fd`] and shuts the process down.
    is_orderly: bool,
    /// Log line for an immediate exit.
    exit_message: Option<String>,
    requested: Option<Instant>,
    waits_for: &'static str,
}

impl Ending {
    /// Handles SIGTERM and SIGINT. Until [`set_orderly`](Self::set_orderly) they end the process
    /// immediately, as without a handler.
    ///
    /// Blocks the signals in the calling thread and in threads that it starts from now on, so that
    /// the watchdog receives them. The kernel delivers a signal to any thread that does not block
    /// it, and a thread that waits for a dead disk would not handle it.
    ///
    /// # Errors
    /// The host has no file descriptor or no thread left.
    pub fn watch() -> io::Result<Arc<Self>> {
        let (ending, signals) = Self::new()?;
        for signal in [SIGTERM, SIGINT] {
            low_level::pipe::register(signal, ending.requests.try_clone()?)?;
        }
        let theirs = Arc::clone(&ending);
        thread::Builder::new().name("end".into()).spawn(move || theirs.wait(&signals))?;
        handled_signals().thread_block()?;
        Ok(ending)
    }

    /// Like [`watch`](Self::watch), without signals and watchdog.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn unwatched() -> io::Result<Arc<Self>> {
        Ok(Self::new()?.0)
    }

    fn new() -> io::Result<(Arc<Self>, UnixStream)> {
        let (started, starts) = UnixStream::pair()?;
        starts.set_nonblocking(true)?;
        let (signals, requests) = UnixStream::pair()?;
        requests.set_nonblocking(true)?;
        let state = State {
            is_orderly: false,
            exit_message: None,
            requested: None,
            waits_for: "the device loop",
        };
        Ok((Arc::new(Self { state: Mutex::new(state), started, starts, requests }), signals))
    }

    /// Makes the shutdown orderly from now on: the caller polls [`shutdown_fd`](Self::shutdown_fd) and ends
    /// the process.
    pub fn set_orderly(&self) {
        self.state().is_orderly = true;
    }

    /// Sets the log line for an exit before [`set_orderly`](Self::set_orderly).
    pub fn set_exit_message(&self, message: Option<String>) {
        self.state().exit_message = message;
    }

    /// File descriptor that becomes readable when the orderly shutdown starts, and stays readable.
    pub fn shutdown_fd(&self) -> BorrowedFd<'_> {
        self.started.as_fd()
    }

    /// Requests the shutdown, like a signal.
    pub fn request(&self) {
        // If the stream is full, the shutdown was requested already.
        let _ = (&self.requests).write(&[1]);
    }

    /// Starts the orderly shutdown without the watchdog's time limit.
    pub fn end(&self) {
        let _ = (&self.starts).write(&[1]);
    }

    /// Returns the time limit for a wait: `usual`, or less once a shutdown was requested. The
    /// watchdog logs `waits_for` if the wait blocks.
    pub fn limit_wait(&self, waits_for: &'static str, usual: Duration) -> Duration {
        let mut state = self.state();
        state.waits_for = waits_for;
        let left = state.requested.map(|at| ORDERLY_TIMEOUT.saturating_sub(at.elapsed()));
        left.map_or(usual, |left| usual.min(left))
    }

    /// Returns true once a shutdown was requested.
    pub fn is_requested(&self) -> bool {
        self.state().requested.is_some()
    }

    /// Ignores poisoning: the state is consistent at any moment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the watchdog.
    fn wait(&self, mut signals: &UnixStream) {
        // The parent thread may have blocked the signals. On an error the mask is unchanged.
        let _ = handled_signals().thread_unblock();
        loop {
            match signals.read(&mut [0; 8]) {
                Ok(1..) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // No writer is left.
                Ok(0) | Err(_) => return,
            }
        }
        let mut state = self.state();
        if !state.is_orderly {
            let message = state.exit_message.take();
            drop(state);
            if let Some(message) = message {
                log_with_timeout(move || tracing::error!("{message}"));
            }
            // The signal's default action.
            let _ = low_level::emulate_default_handler(SIGTERM);
            low_level::exit(CUT_OFF_CODE);
        }
        state.requested = Some(Instant::now());
        drop(state);
        self.end();
        thread::sleep(CUT_OFF);
        let waits_for = self.state().waits_for;
        log_with_timeout(move || {
            tracing::error!(
                waits_for,
                "host: the process did not shut down in time and is cut off; work in progress is lost"
            );
        });
        low_level::exit(CUT_OFF_CODE);
    }
}

fn handled_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// Logs a line, but does not wait long for a log without a reader.
fn log_with_timeout(log: impl FnOnce() + Send + 'static) {
    let log = || {
        log();
        diagnostics::flush_log();
    };
    let Ok(thread) = thread::Builder::new().spawn(log) else { return };
    let until = Instant::now() + FINAL_LOG_TIMEOUT;
    while !thread.is_finished() && Instant::now() < until {
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_limited_once_a_shutdown_was_requested() {
        let ending = Ending::unwatched().unwrap();
        let long = Duration::from_secs(3600);
        assert_eq!(ending.limit_wait("a peer", long), long);
        ending.state().requested = Some(Instant::now());
        assert!(ending.is_requested());
        assert!(ending.limit_wait("a peer", long) <= ORDERLY_TIMEOUT);
        assert_eq!(ending.limit_wait("a peer", Duration::from_millis(1)), Duration::from_millis(1));
        ending.state().requested = Instant::now().checked_sub(CUT_OFF);
        assert_eq!(ending.limit_wait("a peer", long), Duration::ZERO);
        assert_eq!(ending.state().waits_for, "a peer");
    }
}
