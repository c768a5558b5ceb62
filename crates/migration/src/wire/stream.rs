//! A connection as a sequence of frames in each direction.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

use super::control::{Control, Hello, MigrationId};
use super::frame::{self, HEADER_BYTES, Header, Kind};
use crate::error::MigrationError;
use crate::limits::FRAME_TIMEOUT;
use crate::link::{Closer, Link};

/// Bytes that are buffered before they are written, so that small frames share a system call.
const GATHER_BYTES: usize = 128 << 10;

/// Payloads from this size on are not buffered: a copy would cost more than a system call.
const ALONE_BYTES: usize = 32 << 10;

/// How long to wait until a peer closes the connection after a final message, and for each read.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
const CLOSE_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The sender, which is part of the checksums' seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// The place of the next frame: one direction of one stream, and the frame's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    key: u64,
    number: u64,
}

impl Place {
    /// One direction of a stream, after its hello.
    pub(crate) fn of(id: MigrationId, index: u8, from: Side) -> Self {
        let mut bytes = id.0.to_vec();
        bytes.extend([index, u8::from(from == Side::Source)]);
        Self { key: xxh3_64(&bytes), number: 0 }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.number = self.number.wrapping_add(1);
        self.key.wrapping_add(self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

/// A frame that was read; its payload is in the caller's buffer.
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    pub(crate) body: &'a [u8],
}

/// A connection that carries frames.
pub(crate) struct Stream<L> {
    link: L,
    incoming: Place,
    outgoing: Place,
    body: Vec<u8>,
    /// As long as the longest payload so far: clearing it for each would cost as much as a copy.
    payload: Vec<u8>,
    payload_bytes: usize,
    out: Vec<u8>,
    written_at: Instant,
    /// Bytes written so far.
    pub(crate) sent_bytes: u64,
    /// Bytes of the frames that were read so far.
    pub(crate) received_bytes: u64,
}

impl<L: Link> Stream<L> {
    pub(crate) fn new(link: L, timeout: Duration) -> Result<Self, MigrationError> {
        link.set_timeout(timeout).map_err(MigrationError::link("setting a timeout"))?;
        Ok(Self {
            link,
            incoming: Place::default(),
            outgoing: Place::default(),
            body: Vec::new(),
            payload: Vec::new(),
            payload_bytes: 0,
            out: Vec::new(),
            written_at: Instant::now(),
            sent_bytes: 0,
            received_bytes: 0,
        })
    }

    pub(crate) fn set_timeout(&self, time: Duration) -> Result<(), MigrationError> {
        self.link.set_timeout(time).map_err(MigrationError::link("setting a timeout"))
    }

    pub(crate) fn closer(&self) -> Result<Closer, MigrationError> {
        self.link.closer().map_err(MigrationError::link("preparing to close"))
    }

    /// Sets the checksum seeds of the stream, after its hello was sent or received.
    pub(crate) fn key(&mut self, hello: &Hello, me: Side) {
        let peer = if me == Side::Source { Side::Destination } else { Side::Source };
        self.incoming = Place::of(hello.id, hello.index, peer);
        self.outgoing = Place::of(hello.id, hello.index, me);
    }

    /// Buffers a frame. Writes it with the next [`flush`](Self::flush), or at once if the buffer is
    /// full.
    pub(crate) fn push(
        &mut self,
        kind: Kind,
        body: &[u8],
        payload: &[u8],
    ) -> Result<(), MigrationError> {
        let seed = self.outgoing.next();
        frame::append(&mut self.out, kind, body, payload, seed);
        if payload.len() >= ALONE_BYTES {
            return self.write_with(payload);
        }
        self.out.extend_from_slice(payload);
        if self.out.len() >= GATHER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Time since the last write.
    pub(crate) fn idle(&self) -> Duration {
        self.written_at.elapsed()
    }

    pub(crate) fn flush(&mut self) -> Result<(), MigrationError> {
        self.write_with(&[])
    }

    /// Writes the buffer, followed by `payload`, which is not copied.
    fn write_with(&mut self, payload: &[u8]) -> Result<(), MigrationError> {
        let parts = &mut [IoSlice::new(&self.out), IoSlice::new(payload)][..];
        let written = write_all(&mut self.link, parts).and_then(|()| self.link.flush());
        self.sent_bytes += (self.out.len() + payload.len()) as u64;
        self.out.clear();
        self.written_at = Instant::now();
        written.map_err(MigrationError::link("sending"))
    }

    /// Sends a control message.
    pub(crate) fn send(&mut self, message: &Control) -> Result<(), MigrationError> {
        let (kind, body) = message.encode();
        self.push(kind, &body, &[])?;
        self.flush()
    }

    /// Sends a final message and waits briefly until the peer closes the connection.
    pub(crate) fn send_and_close(&mut self, message: &Control) {
        if self.send_final(message) {
            self.wait_closed();
        }
    }

    /// Sends a final message; false if that failed.
    pub(crate) fn send_final(&mut self, message: &Control) -> bool {
        self.set_timeout(CLOSE_POLL_INTERVAL).and_then(|()| self.send(message)).is_ok()
    }

    /// Waits briefly until the peer closes the connection: closing it with unread bytes would lose
    /// the final message (TCP sends a reset).
    pub(crate) fn wait_closed(&mut self) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let mut rest = [0; 64 << 10];
        while Instant::now() < deadline {
            match self.link.read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// The frame does not arrive, its checksum does not match, or it is too long.
    pub(crate) fn read(&mut self) -> Result<Frame<'_>, MigrationError> {
        let mut head = [0; HEADER_BYTES];
        let mut deadline = None;
        read_all(&mut self.link, &mut head, &mut deadline)?;
        let head = Header::read(head)?;
        self.body.resize(head.body_bytes, 0);
        read_all(&mut self.link, &mut self.body, &mut deadline)?;
        let kind = head.check(&self.body, self.incoming.next())?;
        if self.payload.len() < head.payload_bytes {
            self.payload.resize(head.payload_bytes, 0);
        }
        self.payload_bytes = head.payload_bytes;
        let payload = self.payload.get_mut(..head.payload_bytes).unwrap_or_default();
        read_all(&mut self.link, payload, &mut deadline)?;
        let bytes = HEADER_BYTES + head.body_bytes + head.payload_bytes;
        self.received_bytes += bytes as u64;
        Ok(Frame { kind, body: &self.body })
    }

    /// Body and payload of the frame that was read last.
    pub(crate) fn last(&self) -> (&[u8], &[u8]) {
        (&self.body, self.payload.get(..self.payload_bytes).unwrap_or_default())
    }

    /// Reads a control message. An abort is an error.
    pub(crate) fn receive(&mut self) -> Result<Control, MigrationError> {
        let Frame { kind, body } = self.read()?;
        let message = Control::decode(kind, body)?;
        if self.payload_bytes > 0 {
            return Err(MigrationError::Peer { what: "a message with a payload" });
        }
        match message {
            Control::Abort { reason } => Err(MigrationError::Aborted { reason }),
            message => Ok(message),
        }
    }
}

fn write_all(link: &mut impl Write, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match link.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut parts, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `buffer`. The link's timeout applies to the first byte. From then on there is a deadline,
/// so that a peer that sends a byte now and then cannot block this side.
fn read_all(
    link: &mut impl Read,
    mut buffer: &mut [u8],
    deadline: &mut Option<Instant>,
) -> Result<(), MigrationError> {
    while !buffer.is_empty() {
        match link.read(buffer) {
            Ok(0) => return Err(MigrationError::Closed),
            Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(MigrationError::link("receiving")(error)),
        }
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + FRAME_TIMEOUT);
        if !buffer.is_empty() && Instant::now() > deadline {
            return Err(MigrationError::Stalled);
        }
    }
    Ok(())
}
