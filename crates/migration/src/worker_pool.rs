//! Distributes a round to threads, one for each connection.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use diagnostics::panic_point;

use crate::contained::contained;
use crate::error::MigrationError;
use crate::link::Link;
use crate::wire::stream::Stream;

/// Interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Contents are on the heap; the stack has only call frames, those of a tracing subscriber
/// included. The default of 2 MiB is one huge page if transparent huge pages are always on;
/// clearing it took most of a thread's time.
const STACK_BYTES: usize = 256 << 10;

/// Runs `share` in one thread for each of `streams`, and passes each result to `add`. Calls
/// `report` every [`PROGRESS_INTERVAL`]. If one thread fails or panics, calls `stop`, which ends
/// the others.
///
/// # Errors
/// The most specific error of the threads.
pub(crate) fn run_pool<L: Link, D: Send>(
    streams: &mut [Stream<L>],
    share: impl Fn(usize, &mut Stream<L>) -> Result<D, MigrationError> + Sync,
    stop: impl Fn() + Sync,
    mut add: impl FnMut(D),
    mut report: impl FnMut(),
) -> Result<(), MigrationError> {
    let mut failure: Option<MigrationError> = None;
    thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        for (index, stream) in streams.iter_mut().enumerate() {
            let (share, stop, of_thread) = (&share, &stop, done.clone());
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            let spawned = thread.spawn_scoped(scope, move || {
                let done = contained("a thread of a round", || {
                    panic_point("share");
                    share(index, stream)
                });
                if done.is_err() {
                    stop();
                }
                // The receiver exists until every thread has ended.
                let _ = of_thread.send(done);
            });
            if let Err(error) = spawned {
                stop();
                let _ = done.send(Err(MigrationError::machine("starting a thread")(error.into())));
            }
        }
        drop(done);
        loop {
            match ended.recv_timeout(PROGRESS_INTERVAL) {
                Ok(Ok(part)) => add(part),
                Ok(Err(error)) => failure = Some(more_specific(failure.take(), error)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let reported = contained("reporting progress", || {
                report();
                Ok(())
            });
            if let Err(error) = reported {
                stop();
                failure = Some(more_specific(failure.take(), error));
            }
        }
    });
    failure.map_or(Ok(()), Err)
}

/// Returns the more specific of two errors: threads that were stopped, or whose connections were
/// closed, only report the consequence of another thread's error.
fn more_specific(first: Option<MigrationError>, second: MigrationError) -> MigrationError {
    match first {
        Some(first) if !matches!(first, MigrationError::Closed | MigrationError::Cancelled) => {
            first
        }
        Some(first) if matches!(second, MigrationError::Cancelled) => first,
        _ => second,
    }
}
