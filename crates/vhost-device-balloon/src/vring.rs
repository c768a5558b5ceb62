//! One queue as a front end sets it up.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use balloon_host::ring::{self, MAX_QUEUE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FileType, fstat};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory};

use crate::error::{SessionError, Violation};
use crate::inflight_queue::TrackedQueue;

/// Bytes of kicks that are read at once, and how often at most: together what a
/// pipe holds.
const KICK_BYTES: usize = 4096;
const KICK_READS: usize = 16;

/// A queue with its notifications.
#[derive(Debug)]
pub(crate) struct Vring {
    index: u32,
    pub(crate) queue: TrackedQueue,
    /// Set by the front end, or implied where it did not negotiate protocol
    /// features (vhost-user, "Ring states").
    pub(crate) enabled: bool,
    /// It was looked at where the ring stands, since it was set up.
    pub(crate) found: bool,
    /// Chains were left when it was served last.
    pub(crate) more: bool,
    /// Where the front end stopped it, until it says where to go on.
    pub(crate) stopped_at: Option<u16>,
    kick: Option<Kick>,
    call: Option<OwnedFd>,
}

/// A file descriptor for kicks that is being waited for. The front end holds it
/// too, so closing it would not end the waiting.
///
/// Each kick is reported once (`EPOLLET`): a file that stays readable for ever,
/// such as a pipe whose other end is closed, must not keep the loop busy.
#[derive(Debug)]
struct Kick {
    fd: OwnedFd,
    /// A pipe or socket, which is full some day if nobody reads it.
    fills: bool,
    epoll: Rc<OwnedFd>,
}

impl Drop for Kick {
    fn drop(&mut self) {
        if let Err(error) = epoll::delete(&self.epoll, &self.fd) {
            tracing::error!(%error, "host: cannot stop waiting for kicks");
        }
    }
}

impl Vring {
    pub(crate) fn new(index: u32) -> Result<Self, SessionError> {
        let queue =
            TrackedQueue::new(MAX_QUEUE_SIZE).map_err(|_| Violation::QueueSetup { index })?;
        Ok(Self {
            index,
            queue,
            enabled: false,
            found: false,
            more: false,
            stopped_at: None,
            kick: None,
            call: None,
        })
    }

    /// Forgets its setup, but not the call, which QEMU hands over before it
    /// negotiates features.
    pub(crate) fn reset(&mut self) {
        self.queue.reset();
        self.enabled = false;
        self.found = false;
        self.more = false;
        self.kick = None;
    }

    /// True once a kick can arrive and be served. The parts that this needs come
    /// in any order.
    pub(crate) fn runs(&self) -> bool {
        self.enabled && self.kick.is_some() && self.queue.ready()
    }

    /// True where it runs, and with these parts already: descriptor table, used and
    /// available ring.
    pub(crate) fn runs_at(&self, places: [GuestAddress; 3], event_idx: bool) -> bool {
        let queue = &self.queue;
        let present = [queue.desc_table(), queue.used_ring(), queue.avail_ring()];
        self.runs() && present == places.map(|at| at.0) && queue.event_idx_enabled() == event_idx
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), SessionError> {
        let size = u16::try_from(size).map_err(|_| self.bad_setup())?;
        self.queue.set_ready(false);
        self.found = false;
        self.queue.try_set_size(size).map_err(|_| self.bad_setup())
    }

    /// Cloud Hypervisor and crosvm say it after the addresses, and QEMU before.
    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), SessionError> {
        let base = u16::try_from(base).map_err(|_| self.bad_setup())?;
        if self.runs() {
            self.queue.set_ready(false);
        }
        self.found = false;
        self.queue.set_next_avail(base);
        self.queue.set_next_used(base);
        Ok(())
    }

    /// Places the three parts of the ring and checks that they lie in memory.
    pub(crate) fn set_addresses(
        &mut self,
        places: [GuestAddress; 3],
        memory: &impl GuestMemory,
        event_idx: bool,
    ) -> Result<(), SessionError> {
        let placed = ring::place(&mut self.queue, places, event_idx, memory);
        self.found = false;
        if placed { Ok(()) } else { Err(self.bad_setup()) }
    }

    /// True when the ring lies in `memory`; to be asked again when memory moves.
    pub(crate) fn is_valid(&self, memory: &impl GuestMemory) -> bool {
        ring::lies_in(&self.queue, memory)
    }

    /// Stops the ring and returns what the front end needs to go on elsewhere.
    pub(crate) fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.found = false;
        self.more = false;
        self.kick = None;
        self.queue.next_avail()
    }

    /// Waits for kicks on `epoll` from now on, with the queue's number as data.
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

    /// Takes kicks off a file that would fill; an event file only counts.
    pub(crate) fn clear_kick(&self) {
        let Some(kick) = self.kick.as_ref().filter(|kick| kick.fills) else { return };
        let mut bytes = [0; KICK_BYTES];
        for _ in 0..KICK_READS {
            // An error says that nothing is there, or never will be.
            if rustix::io::read(&kick.fd, &mut bytes) != Ok(KICK_BYTES) {
                return;
            }
        }
    }

    /// Interrupts the guest. A full pipe is an interrupt that is still to be
    /// taken; any other failure is the front end's loss.
    ///
    /// It is asked whether the file takes more, because the front end shares it
    /// and may have made it block again.
    pub(crate) fn notify_guest(&self) {
        let Some(call) = &self.call else { return };
        let now = Timespec::default();
        let mut room = [PollFd::new(call, PollFlags::OUT)];
        if poll(&mut room, Some(&now)) != Ok(1) || room[0].revents() != PollFlags::OUT {
            return;
        }
        if let Err(error) = rustix::io::write(call, &1u64.to_ne_bytes()) {
            tracing::debug!(queue = self.index, %error, "front end: call failed");
        }
    }

    /// A file that the peer switched over to notify by, made not to block. Reading
    /// and writing files of other types can block whatever is asked, and would
    /// fill a disk.
    fn notify_file(&self, fd: OwnedFd) -> Result<(OwnedFd, FileType), SessionError> {
        let refused = |_| Violation::NotifyFile { index: self.index };
        let file_type = FileType::from_raw_mode(fstat(&fd).map_err(refused)?.st_mode);
        // Event files have no type.
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
