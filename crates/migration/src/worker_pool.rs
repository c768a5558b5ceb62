//! A round's work, shared by threads: one for each connection.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use diagnostics::panic_point;

use crate::contained::contained;
use crate::error::MigrationError;
use crate::link::Link;
use crate::wire::stream::Stream;

/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Contents are on the heap; what is on the stack are frames of calls, and of a subscriber's. With
/// the usual 2 MiB, which is a huge page where the system gives those to everybody, most of a
/// thread's time went into clearing that.
const STACK_BYTES: usize = 256 << 10;

/// Has a thread for each of `streams` do its `share`, and hands what it did to `add`. `tell` is
/// called now and then meanwhile. `stop` has the others end where one fails or panics.
///
/// # Errors
/// What a share failed with: of several, what says most.
pub(crate) fn run_pool<L: Link, D: Send>(
    streams: &mut [Stream<L>],
    share: impl Fn(usize, &mut Stream<L>) -> Result<D, MigrationError> + Sync,
    stop: impl Fn() + Sync,
    mut add: impl FnMut(D),
    mut tell: impl FnMut(),
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
                // The receiver is there until every thread has ended.
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
            let told = contained("telling how far a round is", || {
                tell();
                Ok(())
            });
            if let Err(error) = told {
                stop();
                failure = Some(more_specific(failure.take(), error));
            }
        }
    });
    failure.map_or(Ok(()), Err)
}

/// Of two errors the one that says more: threads that were stopped, or whose connections were
/// closed, say what another one led to.
fn more_specific(first: Option<MigrationError>, second: MigrationError) -> MigrationError {
    match first {
        Some(first) if !matches!(first, MigrationError::Closed | MigrationError::Cancelled) => {
            first
        }
        Some(first) if matches!(second, MigrationError::Cancelled) => first,
        _ => second,
    }
}
