//! One queue as a front end sets it up.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::event::epoll;
use rustix::io::Errno;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::error::{SessionError, Violation};

/// Entries a queue may have: four times what Linux front ends use, so that the
/// work of one drain stays bounded.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// A queue with its notifications.
#[derive(Debug)]
pub(crate) struct Vring {
    index: u32,
    pub(crate) queue: Queue,
    /// Set by the front end, or implied where it did not negotiate protocol
    /// features (vhost-user, "Ring states").
    pub(crate) enabled: bool,
    kick: Option<Kick>,
    call: Option<OwnedFd>,
}

/// A file descriptor for kicks that is being waited for. The front end holds it
/// too, so closing it would not end the waiting.
#[derive(Debug)]
struct Kick {
    fd: OwnedFd,
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
        let queue = Queue::new(MAX_QUEUE_SIZE).map_err(|_| Violation::QueueSetup { index })?;
        Ok(Self { index, queue, enabled: false, kick: None, call: None })
    }

    /// Forgets everything but the number.
    pub(crate) fn reset(&mut self) {
        self.queue.reset();
        self.enabled = false;
        self.kick = None;
        self.call = None;
    }

    /// True once a kick can arrive and be served.
    pub(crate) const fn runs(&self) -> bool {
        self.enabled && self.kick.is_some()
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), SessionError> {
        let size = u16::try_from(size).map_err(|_| self.bad_setup())?;
        self.queue.set_ready(false);
        self.queue.try_set_size(size).map_err(|_| self.bad_setup())
    }

    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), SessionError> {
        let base = u16::try_from(base).map_err(|_| self.bad_setup())?;
        self.queue.set_ready(false);
        self.queue.set_next_avail(base);
        self.queue.set_next_used(base);
        Ok(())
    }

    /// Places the three parts of the ring and checks that they lie in memory.
    pub(crate) fn set_addresses(
        &mut self,
        [descriptors, used, available]: [GuestAddress; 3],
        memory: &impl GuestMemory,
        event_idx: bool,
    ) -> Result<(), SessionError> {
        let queue = &mut self.queue;
        let placed = queue
            .try_set_desc_table_address(descriptors)
            .and_then(|()| queue.try_set_used_ring_address(used))
            .and_then(|()| queue.try_set_avail_ring_address(available));
        placed.map_err(|_| self.bad_setup())?;
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        if self.queue.is_valid(memory) { Ok(()) } else { Err(self.bad_setup()) }
    }

    /// True when the ring lies in `memory`; to be asked again when memory moves.
    pub(crate) fn is_valid(&self, memory: &impl GuestMemory) -> bool {
        !self.queue.ready() || self.queue.is_valid(memory)
    }

    /// Stops the ring and returns what the front end needs to go on elsewhere.
    pub(crate) fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.kick = None;
        self.queue.next_avail()
    }

    /// Waits for kicks on `epoll` from now on, with the queue's number as data.
    pub(crate) fn set_kick(
        &mut self,
        kick: OwnedFd,
        epoll: &Rc<OwnedFd>,
    ) -> Result<(), SessionError> {
        let fd = nonblocking(kick)?;
        self.kick = None;
        let event = epoll::EventData::new_u64(u64::from(self.index));
        epoll::add(epoll, &fd, event, epoll::EventFlags::IN)
            .map_err(|_| Violation::NoKick { index: self.index })?;
        self.kick = Some(Kick { fd, epoll: Rc::clone(epoll) });
        Ok(())
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), SessionError> {
        self.call = call.map(nonblocking).transpose()?;
        Ok(())
    }

    /// Takes a kick off its file descriptor. One that is not there any more was
    /// served already.
    pub(crate) fn clear_kick(&self) {
        if let Some(kick) = &self.kick {
            let _ = rustix::io::read(&kick.fd, &mut [0; 8]);
        }
    }

    /// Interrupts the guest. A full pipe is an interrupt that is still to be
    /// taken; any other failure is the front end's loss.
    pub(crate) fn notify_guest(&self) {
        let Some(call) = &self.call else { return };
        match rustix::io::write(call, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::debug!(queue = self.index, %error, "front end: call failed"),
        }
    }

    fn bad_setup(&self) -> SessionError {
        Violation::QueueSetup { index: self.index }.into()
    }
}

/// The peer may hand over any kind of file; none may block the loop.
fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, SessionError> {
    rustix::io::ioctl_fionbio(&fd, true)
        .map_err(|e| SessionError::Host { what: "FIONBIO", source: e.into() })?;
    Ok(fd)
}
