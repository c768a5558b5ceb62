//! Framing of vhost-user messages on a stream socket.
//!
//! The header is read separately, so that file descriptors of a message are not
//! attributed to the next one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};

use crate::error::{SessionError, Violation};

/// Time limit for receiving the rest of a message after its first byte, and for sending a
/// reply. The loop serves nothing else meanwhile.
pub(crate) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of request, flags and size.
const HEADER_BYTES: usize = 12;

/// Most bytes of a payload: enough for a memory table of over a hundred regions. The
/// protocol itself sets no limit.
const MAX_PAYLOAD_BYTES: usize = 4096;

/// Most file descriptors of a message: one for each memory region.
pub(crate) const MAX_FDS: usize = 32;

/// Low bits of the flags: the protocol's version, which is always 1.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;

/// A message from the front end.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub(crate) request: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Reads the next message into `self`. `Ok(false)` means that the front end closed the
    /// connection between two messages.
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> Result<bool, SessionError> {
        self.fds.clear();
        let deadline = Instant::now() + MESSAGE_TIMEOUT;
        let mut header = [0; HEADER_BYTES];
        if !fill(&socket, &mut header, Some(&mut self.fds), deadline)? {
            return Ok(false);
        }
        let [request, flags, size] = words(header);
        if flags & VERSION_MASK != VERSION || flags & FLAG_REPLY != 0 {
            return Err(Violation::Header { flags }.into());
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD_BYTES {
            return Err(Violation::PayloadSize { request, size }.into());
        }
        self.request = request;
        self.payload.resize(size, 0);
        if size > 0 && !fill(&socket, &mut self.payload, None, deadline)? {
            return Err(SessionError::Truncated);
        }
        Ok(true)
    }

    /// Returns a reader of the payload's fields.
    pub(crate) fn fields(&self) -> Fields<'_> {
        Fields { request: self.request, rest: &self.payload }
    }
}

/// Answers `request` with `payload`.
pub(crate) fn reply(socket: impl AsFd, request: u32, payload: &[u8]) -> io::Result<()> {
    send_message(socket, request, FLAG_REPLY, payload, SendFlags::NOSIGNAL)
}

/// Answers `request` with `payload` and a file descriptor.
pub(crate) fn reply_with(
    socket: impl AsFd,
    request: u32,
    payload: &[u8],
    fd: impl AsFd,
) -> io::Result<()> {
    let bytes = message_bytes(request, FLAG_REPLY, payload)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let sent = loop {
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    send_all(socket, &bytes[sent.min(bytes.len())..], SendFlags::NOSIGNAL)
}

/// Sends a request of the back end. Fails instead of blocking if the front end does not read
/// its channel.
pub(crate) fn request(socket: impl AsFd, request: u32, payload: &[u8]) -> io::Result<()> {
    send_message(socket, request, 0, payload, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

fn send_message(
    socket: impl AsFd,
    request: u32,
    flags: u32,
    payload: &[u8],
    how: SendFlags,
) -> io::Result<()> {
    send_all(socket, &message_bytes(request, flags, payload)?, how)
}

fn message_bytes(request: u32, flags: u32, payload: &[u8]) -> io::Result<Vec<u8>> {
    let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for word in [request, flags | VERSION, size] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload);
    Ok(bytes)
}

fn send_all(socket: impl AsFd, mut rest: &[u8], how: SendFlags) -> io::Result<()> {
    while !rest.is_empty() {
        match send(&socket, rest, how) {
            Ok(sent) => rest = &rest[sent.min(rest.len())..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reader of a payload's fields, in native byte order as the protocol requires.
pub(crate) struct Fields<'a> {
    request: u32,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn u16(&mut self) -> Result<u16, SessionError> {
        self.chunk().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, SessionError> {
        self.chunk().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, SessionError> {
        self.chunk().map(u64::from_ne_bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], SessionError> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.short())?;
        self.rest = rest;
        Ok(bytes)
    }

    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], SessionError> {
        let (chunk, rest) = self.rest.split_first_chunk().ok_or_else(|| self.short())?;
        self.rest = rest;
        Ok(*chunk)
    }

    fn short(&self) -> SessionError {
        Violation::PayloadSize { request: self.request, size: self.rest.len() }.into()
    }
}

fn words(header: [u8; HEADER_BYTES]) -> [u32; 3] {
    let word = |at: usize| {
        u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    [word(0), word(4), word(8)]
}

/// Fills `buffer` before `deadline`, and receives file descriptors. `Ok(false)` means that the
/// connection ended before the first byte.
fn fill(
    socket: &impl AsFd,
    buffer: &mut [u8],
    mut fds: Option<&mut Vec<OwnedFd>>,
    deadline: Instant,
) -> Result<bool, SessionError> {
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut filled = 0;
    while filled < buffer.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let part = &mut [IoSliceMut::new(&mut buffer[filled..])];
        let received = match recvmsg(socket, part, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                wait_readable(socket, deadline).map_err(SessionError::Receive)?;
                continue;
            }
            Err(error) => return Err(SessionError::Receive(error.into())),
        };
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Violation::TooManyFds.into());
        }
        // Draining the buffer closes unexpected file descriptors.
        for message in control.drain() {
            if let (RecvAncillaryMessage::ScmRights(rights), Some(fds)) = (message, fds.as_mut()) {
                fds.extend(rights);
                // Each byte could carry some.
                if fds.len() > MAX_FDS {
                    return Err(Violation::TooManyFds.into());
                }
            }
        }
        match received.bytes {
            0 if filled == 0 => return Ok(false),
            0 => return Err(SessionError::Truncated),
            bytes => filled += bytes,
        }
    }
    Ok(true)
}

fn wait_readable(socket: &impl AsFd, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let left = left.try_into().map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
