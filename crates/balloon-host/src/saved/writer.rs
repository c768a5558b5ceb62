//! The thread that writes the state file, so that a dead disk blocks neither the guest nor the
//! device's lock.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Saved, StateFile};

/// How long a caller or a shutdown waits for a write. A write takes microseconds. A disk that
/// takes longer than this is dead, or too slow for an operator who waits.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Stack of the thread. The default of 2 MiB takes a huge page if `enabled` is `always`.
const STACK_BYTES: usize = 256 << 10;

/// Writes the newest state to a file. Dropping it waits until that is written, for at most
/// [`WRITE_TIMEOUT`].
#[derive(Debug)]
pub(crate) struct StateWriter {
    shared: Arc<Shared>,
    saved: Saved,
}

/// A queued state, to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct SaveTicket(u64);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is a state to write, or the writer is dropped.
    queued: Condvar,
    /// A write was attempted.
    tried: Condvar,
}

#[derive(Debug)]
struct Queue {
    newest: Saved,
    /// Number of the newest queued state.
    queued: u64,
    /// Number of the newest state with a write attempt.
    tried: u64,
    /// The thread waits for a state.
    idle: bool,
    /// A wait timed out, and nothing was written since.
    late: bool,
    stopped: bool,
}

impl StateWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(mut file: StateFile) -> io::Result<Self> {
        let saved = file.saved();
        let queue =
            Queue { newest: saved, queued: 0, tried: 0, idle: false, late: false, stopped: false };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            queued: Condvar::new(),
            tried: Condvar::new(),
        });
        let writer = Arc::clone(&shared);
        let thread = thread::Builder::new().name("state file".into()).stack_size(STACK_BYTES);
        // Not joined: a write to a dead disk may never return.
        thread.spawn(move || {
            while diagnostics::contain(|| writer.write_until_stopped(&mut file)).is_err() {}
        })?;
        Ok(Self { shared, saved })
    }

    /// The state in the file at the start.
    pub(crate) const fn saved(&self) -> Saved {
        self.saved
    }

    /// Queues `saved` for writing; a newer state replaces it. Does not wait.
    pub(crate) fn save(&self, saved: Saved) -> SaveTicket {
        let mut queue = self.shared.queue();
        queue.newest = saved;
        queue.queued += 1;
        let ticket = SaveTicket(queue.queued);
        let idle = queue.idle;
        drop(queue);
        if idle {
            self.shared.queued.notify_one();
        }
        ticket
    }

    /// Waits until the state or a newer one was written; false on a timeout. A write error is
    /// only logged.
    pub(crate) fn wait(&self, ticket: SaveTicket) -> bool {
        self.shared.wait(ticket.0)
    }

    /// The same for a thread that serves a guest: while a disk does not answer, only the first call
    /// waits.
    pub(crate) fn wait_unless_late(&self, ticket: SaveTicket) -> bool {
        !self.shared.queue().late && self.wait(ticket)
    }

    /// Waits until all queued states were written; false on a timeout.
    pub(crate) fn wait_for_all(&self) -> bool {
        let queued = self.shared.queue().queued;
        self.shared.wait(queued)
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        self.shared.queue().stopped = true;
        self.shared.queued.notify_one();
        if !self.wait_for_all() {
            tracing::error!("host: writing the state file timed out; the newest state is lost");
        }
    }
}

impl Shared {
    /// Ignores poisoning: the queue is consistent at every unlock.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, queued: u64) -> bool {
        let end = Instant::now() + WRITE_TIMEOUT;
        let mut queue = self.queue();
        while queue.tried < queued {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.late = true;
                return false;
            }
            let waited = self.tried.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn write_until_stopped(&self, file: &mut StateFile) {
        let mut queue = self.queue();
        loop {
            if queue.tried == queue.queued {
                if queue.stopped {
                    return;
                }
                queue.idle = true;
                queue = self.queued.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle = false;
                continue;
            }
            let (newest, queued) = (queue.newest, queue.queued);
            drop(queue);
            let outcome = diagnostics::contain(|| file.save(newest));
            if let Ok(Err(error)) = outcome {
                tracing::error!(%error, "host: the state file cannot be written");
            }
            queue = self.queue();
            queue.tried = queued;
            queue.late = false;
            self.tried.notify_all();
        }
    }
}
