//! Logging that never blocks or fails, and panics that are counted and contained.
//!
//! A guest must not depend on the log's reader. So a line goes into a bounded queue ([`LineQueue`]),
//! and one thread writes it to standard error. A line that does not fit, or cannot be written, is
//! dropped and counted.
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

/// Room for lines that standard error has not taken yet: some thousand lines.
const LOG_BYTES: usize = 256 << 10;

/// How long a process that ends waits for standard error to take what is left.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// Stack of the thread that writes. It formats nothing.
const STACK_BYTES: usize = 128 << 10;

static LOG: LineQueue = LineQueue::new(LOG_BYTES);

/// Logs a line: never blocks, never fails. It is written once the log was [started](start_log).
#[macro_export]
macro_rules! say {
    ($($arguments:tt)*) => { $crate::say_line(::std::format_args!($($arguments)*)) };
}

/// The function behind [`say!`].
pub fn say_line(text: fmt::Arguments<'_>) {
    LOG.push(format!("{text}\n").as_bytes());
}

/// Where a subscriber of tracing writes, each event with one call.
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

/// Begins to write the log to standard error, in a thread. What was logged before is kept until
/// then: a process that gives up files or system calls does that first, while it has one thread.
/// A second call does nothing.
pub fn start_log() {
    if !LOG.begin() {
        return;
    }
    let thread = thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES);
    let write = || {
        // A panic loses the line that was being written, and nothing else.
        while contain(|| LOG.write_to(&mut io::stderr())).is_err() {
            LOG.lost_one();
        }
    };
    if thread.spawn(write).is_err() {
        // Tried again with the next call, which the end of the process is at the latest.
        LOG.not_begun();
    }
}

/// Waits until the log is written, but not for a reader that does not read: a second at most.
pub fn flush_log() {
    start_log();
    LOG.flush(FLUSH_TIME);
}

/// Flushes the log when it is dropped, also by a panic.
#[derive(Debug)]
pub struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        flush_log();
    }
}

/// Log lines that were dropped so far.
#[must_use]
pub fn dropped_lines() -> u64 {
    LOG.dropped()
}
