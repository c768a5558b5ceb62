//! An unresponsive back end: a proxy between it and the guest withholds the guest's notifications.
//! Configuration space and other messages pass.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{read, write};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Request, flags and size of a vhost-user message.
const HEADER_BYTES: usize = 12;

/// The message with a queue's kick file descriptor, and the part of its payload that is the queue
/// index (vhost-user.rst, `VHOST_USER_SET_VRING_KICK`).
const SET_VRING_KICK: u32 = 12;
const QUEUE_MASK: u64 = 0xff;

/// Maximum file descriptors of a message from the test's front end: one per memory region.
const MAX_FDS: usize = 8;

/// Between two polls of the state.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Queue masks with our driver, which negotiates all but statistics, hints and reports.
pub(crate) const EVERY_QUEUE: u64 = u64::MAX;
pub(crate) const REQUEST_QUEUE: u64 = 1 << 2;

#[derive(Default)]
struct State {
    /// Bit mask of queues whose notifications are withheld.
    blocked: AtomicU64,
    stop: AtomicBool,
}

/// A proxy in front of a back end, until it is dropped.
pub(crate) struct NotificationBlocker {
    state: Arc<State>,
}

impl NotificationBlocker {
    /// Takes over the socket of the back end.
    pub(crate) fn in_front_of(socket: &Path) -> Self {
        let behind = socket.with_extension("behind");
        fs::rename(socket, &behind).unwrap();
        let listener = UnixListener::bind(socket).unwrap();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            let (guest, _) = listener.accept().unwrap();
            let back_end = UnixStream::connect(&behind).unwrap();
            let (guest_reader, back_end_writer) =
                (guest.try_clone().unwrap(), back_end.try_clone().unwrap());
            thread::spawn(move || pass_on(&guest_reader, &back_end_writer, Some(&shared)));
            pass_on(&back_end, &guest, None);
        });
        Self { state }
    }

    /// Withholds notifications of these queues.
    pub(crate) fn block(&self, queues: u64) {
        self.state.blocked.store(queues, Ordering::Relaxed);
    }

    /// Sends the withheld notifications and passes later ones.
    pub(crate) fn unblock(&self) {
        self.block(0);
    }
}

impl Drop for NotificationBlocker {
    fn drop(&mut self) {
        self.unblock();
        self.state.stop.store(true, Ordering::Relaxed);
    }
}

/// Passes messages on until one side disconnects. With a state, intercepts notifications.
fn pass_on(from: &UnixStream, to: &UnixStream, state: Option<&Arc<State>>) {
    while let Ok((message, mut fds)) = receive(from) {
        if let Some(state) = state {
            intercept(&message, &mut fds, state);
        }
        if send(to, &message, &fds).is_err() {
            return;
        }
    }
}

fn intercept(message: &[u8], fds: &mut [OwnedFd], state: &Arc<State>) {
    let request = u32::from_ne_bytes(message[..4].try_into().unwrap());
    let (SET_VRING_KICK, [kick]) = (request, fds) else { return };
    let number = u64::from_ne_bytes(message[HEADER_BYTES..][..8].try_into().unwrap());
    let queue = 1 << (number & QUEUE_MASK);
    let ours = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let back_end = ours.try_clone().unwrap();
    let guest = std::mem::replace(kick, ours);
    let state = Arc::clone(state);
    thread::spawn(move || relay(&guest, &back_end, queue, &state));
}

/// Passes a queue's notifications on unless they are withheld.
fn relay(guest: &OwnedFd, back_end: &OwnedFd, queue: u64, state: &State) {
    let wait = Timespec::try_from(POLL_INTERVAL).unwrap();
    while !state.stop.load(Ordering::Relaxed) {
        if state.blocked.load(Ordering::Relaxed) & queue != 0 {
            thread::sleep(POLL_INTERVAL);
            continue;
        }
        let mut ready = [PollFd::new(guest, PollFlags::IN)];
        if poll(&mut ready, Some(&wait)).unwrap_or(0) == 0 {
            continue;
        }
        let mut count = [0; 8];
        // The queue was blocked meanwhile.
        if state.blocked.load(Ordering::Relaxed) & queue == 0 && read(guest, &mut count).is_ok() {
            let _ = write(back_end, &1u64.to_ne_bytes());
        }
    }
}

fn receive(from: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0; HEADER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let part = &mut [IoSliceMut::new(&mut message)];
    let received = recvmsg(from.as_fd(), part, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    let mut from = from;
    from.read_exact(&mut message[received.bytes..])?;
    let size = u32::from_ne_bytes(message[8..HEADER_BYTES].try_into().unwrap());
    message.resize(HEADER_BYTES + size as usize, 0);
    from.read_exact(&mut message[HEADER_BYTES..])?;
    Ok((message, fds))
}

fn send(mut to: &UnixStream, message: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let parts = &[IoSlice::new(message)];
    let sent = sendmsg(to.as_fd(), parts, &mut control, SendFlags::NOSIGNAL)?;
    to.write_all(&message[sent..])
}
