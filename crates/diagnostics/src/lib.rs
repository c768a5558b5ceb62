//! Logging that never blocks or fails, and panics that are counted and contained.
//!
//! A guest must not depend on the log's reader. So a line goes into a bounded queue
//! ([`LineQueue`]), and one thread writes it to standard error. A line that does not fit, or cannot
//! be written, is dropped and counted.
//!
//! A panic is logged the same way and counted ([`panics`]). Work for a guest or a peer is
//! [contained](contain), so that its caller can report the failure.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod panics;
mod point;
mod queue;
mod visible;

use std::fmt;
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

pub use panics::{Panicked, contain, hide_backtraces, panics, watch_panics};
pub use point::panic_point;
pub use queue::LineQueue;
pub use visible::{shortened, visible};

/// Capacity for lines that are not written yet: some thousand lines.
const LOG_BYTES: usize = 256 << 10;

/// How long an ending process waits until the remaining lines are written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Stack of the thread that writes. It does not format.
const STACK_BYTES: usize = 128 << 10;

static LOG: LineQueue = LineQueue::new(LOG_BYTES);

/// Logs a line; never blocks, never fails. Lines are written once the log is [started](start_log).
#[macro_export]
macro_rules! log_line {
    ($($arguments:tt)*) => { $crate::log_arguments(::std::format_args!($($arguments)*)) };
}

/// The function behind [`log_line!`].
pub fn log_arguments(text: fmt::Arguments<'_>) {
    LOG.push(format!("{text}\n").as_bytes());
}

/// The writer for a tracing subscriber, which writes each event with one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts a thread that writes the log to standard error. Earlier lines are queued: a process
/// enters its sandbox first, while it has one thread. A second call does nothing.
pub fn start_log() {
    if !LOG.start() {
        return;
    }
    let thread = thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES);
    let write = || {
        // A panic loses only the current line.
        while contain(|| LOG.write_to(&mut io::stderr())).is_err() {
            LOG.lost_one();
        }
    };
    if thread.spawn(write).is_err() {
        // The next call, at the latest at the end of the process, tries again.
        LOG.not_started();
    }
}

/// Waits until the log is written, at most a second.
pub fn flush_log() {
    start_log();
    LOG.flush(FLUSH_TIMEOUT);
}

/// Flushes the log when it is dropped, also by a panic.
#[derive(Debug)]
pub struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        flush_log();
    }
}

/// The number of log lines dropped so far.
#[must_use]
pub fn dropped_lines() -> u64 {
    LOG.dropped()
}
