//! The thread that writes the state file: a disk that does not answer keeps neither the guest nor
//! the lock of its device.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Saved, StateFile};

/// How long whoever must know waits until something is written, and so does the end. A write takes
/// microseconds; a disk that takes longer is stuck, or busy for longer than an operator waits.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Stack of the thread. The usual 2 MiB are a huge page where the system gives those to everybody.
const STACK_BYTES: usize = 256 << 10;

/// Keeps the newest of what it is told in a file. Dropping waits until it is written, for at most
/// [`WRITE_TIMEOUT`].
#[derive(Debug)]
pub(crate) struct StateWriter {
    shared: Arc<Shared>,
    saved: Saved,
}

/// A value that was told, to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Told(u64);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write, or nothing more will be.
    told: Condvar,
    /// It was tried to write something.
    tried: Condvar,
}

#[derive(Debug)]
struct Queue {
    newest: Saved,
    /// Values told so far, and which of them the newest is that was tried to be written.
    told: u64,
    tried: u64,
    /// The thread sleeps until it is told something.
    idle: bool,
    /// A caller has waited in vain, and nothing was written since.
    late: bool,
    over: bool,
}

impl StateWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(mut file: StateFile) -> io::Result<Self> {
        let saved = file.saved();
        let queue =
            Queue { newest: saved, told: 0, tried: 0, idle: false, late: false, over: false };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            told: Condvar::new(),
            tried: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name("state file".into()).stack_size(STACK_BYTES);
        // Not joined: it may never come back from a disk.
        thread.spawn(move || {
            while diagnostics::contain(|| theirs.write_until_over(&mut file)).is_err() {}
        })?;
        Ok(Self { shared, saved })
    }

    /// What the file said at the start.
    pub(crate) const fn saved(&self) -> Saved {
        self.saved
    }

    /// Has `saved` written, unless it is overtaken by something newer. Waits for nothing.
    pub(crate) fn save(&self, saved: Saved) -> Told {
        let mut queue = self.shared.queue();
        queue.newest = saved;
        queue.told += 1;
        let told = Told(queue.told);
        let idle = queue.idle;
        drop(queue);
        if idle {
            self.shared.told.notify_one();
        }
        told
    }

    /// Waits until something was written, or what is newer; false where that takes too long. An
    /// error is in the log.
    pub(crate) fn wait(&self, told: Told) -> bool {
        self.shared.wait(told.0)
    }

    /// The same for a thread that serves a guest: while a disk does not answer it waits once, and
    /// not for each write.
    pub(crate) fn wait_unless_late(&self, told: Told) -> bool {
        !self.shared.queue().late && self.wait(told)
    }

    /// The same for all that was told.
    pub(crate) fn wait_for_all(&self) -> bool {
        let told = self.shared.queue().told;
        self.shared.wait(told)
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        self.shared.queue().over = true;
        self.shared.told.notify_one();
        if !self.wait_for_all() {
            tracing::error!(
                "host: the state file cannot be written in time; what it would say is lost"
            );
        }
    }
}

impl Shared {
    /// It is whole at every unlock.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, told: u64) -> bool {
        let end = Instant::now() + WRITE_TIMEOUT;
        let mut queue = self.queue();
        while queue.tried < told {
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

    fn write_until_over(&self, file: &mut StateFile) {
        let mut queue = self.queue();
        loop {
            if queue.tried == queue.told {
                if queue.over {
                    return;
                }
                queue.idle = true;
                queue = self.told.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle = false;
                continue;
            }
            let (newest, told) = (queue.newest, queue.told);
            drop(queue);
            let outcome = diagnostics::contain(|| file.save(newest));
            if let Ok(Err(error)) = outcome {
                tracing::error!(%error, "host: the state file cannot be written");
            }
            queue = self.queue();
            queue.tried = told;
            queue.late = false;
            self.tried.notify_all();
        }
    }
}
