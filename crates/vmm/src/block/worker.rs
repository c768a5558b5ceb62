//! The thread that does a disk's work, so that neither the guest's processors nor its other
//! devices wait for it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::file::DiskFile;
use super::permit::Permit;
use super::request::Request;
use super::work::Work;
use crate::error::Error;
use crate::threads::{Joined, join_within};

/// For how long it is waited for a job at a time, with the desk but nothing else locked.
const MOMENT: Duration = Duration::from_millis(1);

/// How long the end waits for the thread, which may be in a call that nothing interrupts.
const END_TIME: Duration = Duration::from_secs(1);

/// What is to be done, what is being done, and what is done.
#[derive(Default)]
struct Desk {
    todo: VecDeque<Job>,
    /// A request is being carried out.
    busy: bool,
    /// Nothing more is begun.
    halted: bool,
    /// What is being done is begun anew if it was interrupted: it is not to stop any more.
    again: bool,
    /// What is being done is nobody's any more: its driver has reset the device. What is to be done
    /// next waits for it, since it may write to the disk as long as its call to the host does.
    forgotten: bool,
    /// As many were interrupted, and are as good as not begun.
    interrupted: usize,
    done: Vec<Done>,
    writes_through: bool,
    /// Whom to tell that something is done.
    bell: Option<EventFd>,
    end: bool,
}

/// A chain, in the order of the ring.
#[derive(Debug)]
pub(crate) struct Job {
    /// By its first descriptor.
    pub(crate) head: u16,
    /// `None` where it is no request: it comes back in its turn, with nothing done.
    pub(crate) request: Option<Request>,
}

/// A request that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// The chain, by its first descriptor.
    pub(crate) head: u16,
    pub(crate) written_bytes: u32,
}

#[derive(Default)]
struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
}

/// One thread, which ends when this is dropped.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    permit: Arc<Permit>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn start(mut work: Work, file: Arc<DiskFile>, name: &str) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let permit = work.permit();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || theirs.work_on(&mut work, &file))
            .map_err(Error::host::<std::io::Error>("starting a thread"))?;
        Ok(Self { shared, permit, thread: Some(thread) })
    }

    /// Whom to tell when something is done.
    pub(crate) fn rings(&self, bell: EventFd) {
        self.shared.desk().bell = Some(bell);
    }

    /// Whether what is written is on the disk before it is done.
    pub(crate) fn set_writes_through(&self, writes_through: bool) {
        self.shared.desk().writes_through = writes_through;
    }

    pub(crate) fn push(&self, job: Job) {
        self.shared.desk().todo.push_back(job);
        self.shared.changed.notify_all();
    }

    /// What is done, once.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut self.shared.desk().done)
    }

    /// Begins nothing more, and has what is under way end soon; true once nothing is, for which it
    /// waits for no longer than a moment.
    pub(crate) fn rests(&self) -> bool {
        let mut desk = self.shared.desk();
        desk.halted = true;
        desk.again = false;
        self.permit.interrupt(true);
        let works = |desk: &mut Desk| !desk.end && desk.busy;
        let waited = self.shared.changed.wait_timeout_while(desk, MOMENT, works);
        !works(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Goes on after it was to rest; false where a job was interrupted since: it has to be
    /// [stopped](Self::stop) first.
    pub(crate) fn goes_on(&self) -> bool {
        let mut desk = self.shared.desk();
        if desk.interrupted > 0 {
            return false;
        }
        desk.halted = false;
        desk.again = desk.busy && !desk.forgotten;
        self.permit.interrupt(desk.forgotten);
        drop(desk);
        self.shared.changed.notify_all();
        true
    }

    /// Begins nothing more, and has what is under way end soon. What is done, and how many jobs
    /// are not: the youngest. The guest's memory is not touched any more when this returns. It waits
    /// for what is under way, so only where that has come to [rest](Self::rests).
    pub(crate) fn stop(&self) -> (Vec<Done>, usize) {
        let mut desk = self.shared.desk();
        let begun_none = std::mem::take(&mut desk.todo).len();
        self.permit.interrupt(true);
        let mut desk = self.shared.idle(desk);
        self.permit.interrupt(false);
        desk.halted = false;
        let interrupted = std::mem::take(&mut desk.interrupted);
        (std::mem::take(&mut desk.done), begun_none + interrupted)
    }

    /// Forgets whatever it was to do, and what is done. The guest's memory is not touched any more
    /// when this returns, which does not wait for the disk: a call to the host that is under way is
    /// left to it, and its file may be written until that comes back.
    pub(crate) fn forget(&self) {
        let mut desk = self.shared.desk();
        desk.todo.clear();
        desk.done.clear();
        (desk.again, desk.interrupted) = (false, 0);
        if desk.busy {
            desk.forgotten = true;
            self.permit.interrupt(true);
            self.permit.revoke();
        }
    }

    /// Something is being done.
    pub(crate) fn is_busy(&self) -> bool {
        self.shared.desk().busy
    }

    /// Whether something is under way of a driver that has reset the device since.
    pub(crate) fn is_left_behind(&self) -> bool {
        self.shared.desk().forgotten
    }
}

#[cfg(test)]
impl Worker {
    /// From now on nothing that takes any time is done until it is stopped.
    pub(crate) fn stand_still(&self) {
        self.permit.interrupt(true);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.desk().end = true;
        self.shared.changed.notify_all();
        // A panic has been printed by the hook, and there is nothing left to do.
        let joined = self.thread.take().map(|thread| join_within(thread, END_TIME));
        if joined == Some(Joined::Not) {
            tracing::error!("host: a disk does not answer; what is under way there is left to it");
        }
    }
}

impl Shared {
    /// What is behind it is whole at any moment.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle<'a>(&self, desk: MutexGuard<'a, Desk>) -> MutexGuard<'a, Desk> {
        let works = |desk: &mut Desk| !desk.end && (desk.busy || !desk.todo.is_empty());
        self.changed.wait_while(desk, works).unwrap_or_else(PoisonError::into_inner)
    }

    fn work_on(&self, work: &mut Work, file: &DiskFile) {
        // Also told when this panics: who waits for it must not wait for ever.
        let _end = End(self);
        let permit = work.permit();
        let mut desk = self.desk();
        loop {
            if desk.end {
                return;
            }
            let next = if desk.halted { None } else { desk.todo.pop_front() };
            let Some(Job { head, request }) = next else {
                desk = self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            desk.busy = true;
            let writes_through = desk.writes_through;
            drop(desk);
            let mut carry_out = || match &request {
                Some(request) => work.carry_out(request, file, writes_through),
                None => Some(0),
            };
            let mut written = carry_out();
            desk = self.desk();
            while written.is_none() && std::mem::take(&mut desk.again) {
                drop(desk);
                written = carry_out();
                desk = self.desk();
            }
            (desk.busy, desk.again) = (false, false);
            if std::mem::take(&mut desk.forgotten) {
                permit.renew();
                permit.interrupt(desk.halted);
                self.changed.notify_all();
                continue;
            }
            // Nothing is done that is younger than what is not.
            match written.filter(|_| desk.interrupted == 0) {
                Some(written_bytes) => desk.done.push(Done { head, written_bytes }),
                None => desk.interrupted += 1,
            }
            if let Some(bell) = &desk.bell {
                // A file that is full is readable, and that is all there is to say.
                let _ = bell.write(1);
            }
            self.changed.notify_all();
        }
    }
}

struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.desk().end = true;
        self.0.changed.notify_all();
    }
}
