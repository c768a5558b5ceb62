//! A disk's I/O thread, so that neither vCPUs nor other devices wait for the disk.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::file::DiskFile;
use super::permit::Permit;
use super::request::Request;
use super::work::Executor;
use crate::error::Error;
use crate::threads::{Joined, join_within};

/// How long [`quiesce`](Worker::quiesce) waits for the request in progress.
const QUIESCE_TIMEOUT: Duration = Duration::from_millis(1);

/// How long dropping the worker waits for the thread, which may be in an uninterruptible system
/// call.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests: pending, in progress, and done.
#[derive(Default)]
struct State {
    pending: VecDeque<Job>,
    /// A request is in progress.
    busy: bool,
    /// No more requests are started.
    halted: bool,
    /// The request in progress is executed again if it was interrupted: the pause was aborted.
    restart: bool,
    /// The driver has reset the device during the request in progress. The next request waits for
    /// it, because its system call may still write to the disk.
    abandoned: bool,
    /// Requests that were interrupted, which count as not started.
    interrupted: usize,
    done: Vec<Done>,
    writes_through: bool,
    /// Notifies the device loop of a completed request.
    notify_fd: Option<EventFd>,
    end: bool,
}

/// A chain, in the order of the ring.
#[derive(Debug)]
pub(crate) struct Job {
    /// The index of its first descriptor.
    pub(crate) head: u16,
    /// `None` if the chain is no valid request: it is returned in its turn.
    pub(crate) request: Option<Request>,
}

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// The index of the chain's first descriptor.
    pub(crate) head: u16,
    pub(crate) written_bytes: u32,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The I/O thread. Dropping it ends the thread.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    permit: Arc<Permit>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn start(
        mut executor: Executor,
        file: Arc<DiskFile>,
        name: &str,
    ) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let permit = executor.permit();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || of_thread.run(&mut executor, &file))
            .map_err(Error::host::<std::io::Error>("starting a thread"))?;
        Ok(Self { shared, permit, thread: Some(thread) })
    }

    /// Sets the eventfd that is written when a request is done.
    pub(crate) fn set_notify_fd(&self, notify_fd: EventFd) {
        self.shared.state().notify_fd = Some(notify_fd);
    }

    /// Sets whether a write is flushed to the disk before it completes.
    pub(crate) fn set_writes_through(&self, writes_through: bool) {
        self.shared.state().writes_through = writes_through;
    }

    pub(crate) fn push(&self, job: Job) {
        self.shared.state().pending.push_back(job);
        self.shared.changed.notify_all();
    }

    /// Takes the completed requests.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut self.shared.state().done)
    }

    /// Starts no more requests and interrupts the one in progress. Returns true once none is in
    /// progress; waits [`QUIESCE_TIMEOUT`] at most.
    pub(crate) fn quiesce(&self) -> bool {
        let mut state = self.shared.state();
        state.halted = true;
        state.restart = false;
        self.permit.interrupt(true);
        let is_working = |state: &mut State| !state.end && state.busy;
        let waited = self.shared.changed.wait_timeout_while(state, QUIESCE_TIMEOUT, is_working);
        !is_working(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Continues after [`quiesce`](Self::quiesce). Returns false if a request was interrupted
    /// meanwhile: then the worker must be [stopped](Self::stop) first.
    pub(crate) fn cancel_quiesce(&self) -> bool {
        let mut state = self.shared.state();
        if state.interrupted > 0 {
            return false;
        }
        state.halted = false;
        state.restart = state.busy && !state.abandoned;
        self.permit.interrupt(state.abandoned);
        drop(state);
        self.shared.changed.notify_all();
        true
    }

    /// Drops the pending jobs and interrupts the request in progress. Returns the completed
    /// requests and the number of jobs, the last ones, that were not executed. On return no request
    /// accesses the guest's memory. Waits for the request in progress, so call it after
    /// [`quiesce`](Self::quiesce) has returned true.
    pub(crate) fn stop(&self) -> (Vec<Done>, usize) {
        let mut state = self.shared.state();
        let pending = std::mem::take(&mut state.pending).len();
        self.permit.interrupt(true);
        let mut state = self.shared.idle(state);
        self.permit.interrupt(false);
        state.halted = false;
        let interrupted = std::mem::take(&mut state.interrupted);
        (std::mem::take(&mut state.done), pending + interrupted)
    }

    /// Drops all jobs and completed requests. On return no request accesses the guest's memory.
    /// Does not wait for the disk: a system call in progress continues, and may write to the file
    /// until it returns.
    pub(crate) fn abandon(&self) {
        let mut state = self.shared.state();
        state.pending.clear();
        state.done.clear();
        (state.restart, state.interrupted) = (false, 0);
        if state.busy {
            state.abandoned = true;
            self.permit.interrupt(true);
            self.permit.revoke();
        }
    }

    /// A request is in progress.
    #[cfg(feature = "raw")]
    pub(crate) fn is_busy(&self) -> bool {
        self.shared.state().busy
    }

    /// A request is in progress whose driver has reset the device since.
    pub(crate) fn has_abandoned(&self) -> bool {
        self.shared.state().abandoned
    }
}

#[cfg(test)]
impl Worker {
    /// Interrupts all requests until [`stop`](Self::stop).
    pub(crate) fn interrupt(&self) {
        self.permit.interrupt(true);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.state().end = true;
        self.shared.changed.notify_all();
        // The panic hook has logged a panic; nothing is left to do.
        let joined = self.thread.take().map(|thread| join_within(thread, JOIN_TIMEOUT));
        if joined == Some(Joined::TimedOut) {
            tracing::error!("host: a disk does not answer; its I/O thread does not end");
        }
    }
}

impl Shared {
    /// Ignores poisoning: the state is consistent at any time.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let is_working =
            |state: &mut State| !state.end && (state.busy || !state.pending.is_empty());
        self.changed.wait_while(state, is_working).unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, executor: &mut Executor, file: &DiskFile) {
        // Also set on a panic, so that no other thread waits without end.
        let _end_on_drop = EndOnDrop(self);
        let permit = executor.permit();
        let mut state = self.state();
        loop {
            if state.end {
                return;
            }
            let next = if state.halted { None } else { state.pending.pop_front() };
            let Some(Job { head, request }) = next else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy = true;
            let writes_through = state.writes_through;
            drop(state);
            let mut execute = || match &request {
                Some(request) => executor.execute(request, file, writes_through),
                None => Some(0),
            };
            let mut written = execute();
            state = self.state();
            while written.is_none() && std::mem::take(&mut state.restart) {
                drop(state);
                written = execute();
                state = self.state();
            }
            (state.busy, state.restart) = (false, false);
            if std::mem::take(&mut state.abandoned) {
                permit.renew();
                permit.interrupt(state.halted);
                self.changed.notify_all();
                continue;
            }
            // Requests complete in order: after an interrupted one, none completes.
            match written.filter(|_| state.interrupted == 0) {
                Some(written_bytes) => state.done.push(Done { head, written_bytes }),
                None => state.interrupted += 1,
            }
            if let Some(notify_fd) = &state.notify_fd {
                // A full eventfd is readable, which is all that is needed.
                let _ = notify_fd.write(1);
            }
            self.changed.notify_all();
        }
    }
}

struct EndOnDrop<'a>(&'a Shared);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.state().end = true;
        self.0.changed.notify_all();
    }
}
