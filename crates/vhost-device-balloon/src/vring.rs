//! One vring, set up by the front end.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use balloon_host::ring::{self, MAX_QUEUE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FileType, fstat};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory};

use crate::error::{SessionError, Violation};
use crate::inflight_queue::InflightQueue;

/// Bytes of kicks per read, and most reads: together the capacity of a pipe.
const KICK_BYTES: usize = 4096;
const KICK_READS: usize = 16;

/// A queue with its notifications.
#[derive(Debug)]
pub(crate) struct Vring {
    index: u32,
    pub(crate) queue: InflightQueue,
    /// Set by the front end, or implied if it did not negotiate protocol features
    /// (vhost-user, "Ring states").
    pub(crate) enabled: bool,
    /// The position was recovered since the setup.
    pub(crate) recovered: bool,
    /// Chains were left when it was served last.
    pub(crate) more: bool,
    /// The position at which the front end stopped it, until the next `SET_VRING_BASE`.
    pub(crate) stopped_at: Option<u16>,
    kick: Option<Kick>,
    call: Option<OwnedFd>,
}

/// A kick file descriptor in the epoll set. The front end has it open too, so closing it would
/// not remove it from the set.
///
/// Each kick is reported once (`EPOLLET`): a file that stays readable, such as a pipe whose
/// other end is closed, must not keep the loop busy.
#[derive(Debug)]
struct Kick {
    fd: OwnedFd,
    /// A pipe or socket, which must be read before it is full.
    fills: bool,
    epoll: Rc<OwnedFd>,
}

impl Drop for Kick {
    fn drop(&mut self) {
        if let Err(error) = epoll::delete(&self.epoll, &self.fd) {
            tracing::error!(%error, "host: cannot remove a kick from epoll");
        }
    }
}

impl Vring {
    pub(crate) fn new(index: u32) -> Result<Self, SessionError> {
        let queue =
            InflightQueue::new(MAX_QUEUE_SIZE).map_err(|_| Violation::QueueSetup { index })?;
        Ok(Self {
            index,
            queue,
            enabled: false,
            recovered: false,
            more: false,
            stopped_at: None,
            kick: None,
            call: None,
        })
    }

    /// Forgets the setup except the call, which QEMU sends before it negotiates features.
    pub(crate) fn reset(&mut self) {
        self.queue.reset();
        self.enabled = false;
        self.recovered = false;
        self.more = false;
        self.kick = None;
    }

    /// Returns true once a kick can arrive and be served. Its setup may arrive in any order.
    pub(crate) fn runs(&self) -> bool {
        self.enabled && self.kick.is_some() && self.queue.ready()
    }

    /// Returns true if it already runs with these addresses: descriptor table, used ring and
    /// available ring.
    pub(crate) fn runs_at(&self, places: [GuestAddress; 3], event_idx: bool) -> bool {
        let queue = &self.queue;
        let present = [queue.desc_table(), queue.used_ring(), queue.avail_ring()];
        self.runs() && present == places.map(|at| at.0) && queue.event_idx_enabled() == event_idx
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), SessionError> {
        let size = u16::try_from(size).map_err(|_| self.bad_setup())?;
        self.queue.set_ready(false);
        self.recovered = false;
        self.queue.try_set_size(size).map_err(|_| self.bad_setup())
    }

    /// Handles the base. Cloud Hypervisor and crosvm send it after the addresses, QEMU before.
    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), SessionError> {
        let base = u16::try_from(base).map_err(|_| self.bad_setup())?;
        if self.runs() {
            self.queue.set_ready(false);
        }
        self.recovered = false;
        self.queue.set_next_avail(base);
        self.queue.set_next_used(base);
        Ok(())
    }

    /// Sets the three addresses of the vring and checks that they are in guest memory.
    pub(crate) fn set_addresses(
        &mut self,
        places: [GuestAddress; 3],
        memory: &impl GuestMemory,
        event_idx: bool,
    ) -> Result<(), SessionError> {
        let placed = ring::place(&mut self.queue, places, event_idx, memory);
        self.recovered = false;
        if placed { Ok(()) } else { Err(self.bad_setup()) }
    }

    /// Returns true if the vring is in `memory`. Must be checked again for a new memory table.
    pub(crate) fn is_valid(&self, memory: &impl GuestMemory) -> bool {
        ring::lies_in(&self.queue, memory)
    }

    /// Stops the vring and returns its base, with which the front end can resume it.
    pub(crate) fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.recovered = false;
        self.more = false;
        self.kick = None;
        self.queue.next_avail()
    }

    /// Adds the kick to `epoll`, with the queue's index as data.
    pub(crate) fn set_kick(
        &mut self,
        kick: OwnedFd,
        epoll: &Rc<OwnedFd>,
    ) -> Result<(), SessionError> {
        let (fd, file_type) = self.notify_file(kick)?;
        let fills = matches!(file_type, FileType::Fifo | FileType::Socket);
        self.kick = None;
        let event = epoll::EventData::new_u64(u64::from(self.index));
        epoll::add(epoll, &fd, event, epoll::EventFlags::IN | epoll::EventFlags::ET)
            .map_err(|_| Violation::NotifyFile { index: self.index })?;
        self.kick = Some(Kick { fd, fills, epoll: Rc::clone(epoll) });
        Ok(())
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), SessionError> {
        self.call = call.map(|fd| self.notify_file(fd)).transpose()?.map(|(fd, _)| fd);
        Ok(())
    }

    /// Reads kicks from a pipe or socket. An eventfd need not be read.
    pub(crate) fn clear_kick(&self) {
        let Some(kick) = self.kick.as_ref().filter(|kick| kick.fills) else { return };
        let mut bytes = [0; KICK_BYTES];
        for _ in 0..KICK_READS {
            // An error means that no data is left, or that the file is unusable.
            if rustix::io::read(&kick.fd, &mut bytes) != Ok(KICK_BYTES) {
                return;
            }
        }
    }

    /// Interrupts the guest. A full pipe is a pending interrupt. Any other failure affects only the
    /// front end.
    ///
    /// Polls for writability first, because the front end shares the file description and may
    /// have made it blocking.
    pub(crate) fn notify_guest(&self) {
        let Some(call) = &self.call else { return };
        let now = Timespec::default();
        let mut fds = [PollFd::new(call, PollFlags::OUT)];
        if poll(&mut fds, Some(&now)) != Ok(1) || fds[0].revents() != PollFlags::OUT {
            return;
        }
        if let Err(error) = rustix::io::write(call, &1u64.to_ne_bytes()) {
            tracing::debug!(queue = self.index, %error, "front end: call failed");
        }
    }

    /// Checks a kick or call file of the front end and makes it non-blocking. Other file types are
    /// refused: their reads and writes can block even if non-blocking, and would fill a disk.
    fn notify_file(&self, fd: OwnedFd) -> Result<(OwnedFd, FileType), SessionError> {
        let refused = |_| Violation::NotifyFile { index: self.index };
        let file_type = FileType::from_raw_mode(fstat(&fd).map_err(refused)?.st_mode);
        // An eventfd has no file type.
        if !matches!(file_type, FileType::Unknown | FileType::Fifo | FileType::Socket) {
            return Err(Violation::NotifyFile { index: self.index }.into());
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(refused)?;
        Ok((fd, file_type))
    }

    fn bad_setup(&self) -> SessionError {
        Violation::QueueSetup { index: self.index }.into()
    }
}
