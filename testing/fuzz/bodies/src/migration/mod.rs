//! Migrations with a hostile peer, and hostile snapshots.

mod destination;
mod file;
mod machine;
mod source;

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use migration::MigrationId;
use migration::link::{Closer, Link};
use migration::raw::FrameWriter;

use crate::script::Script;

/// Runs a migration of which one side is honest.
///
/// # Panics
/// An invariant does not hold.
pub fn migration(data: &[u8]) {
    let mut script = Script::new(data);
    match script.pick([0, 0, 0, 1, 1, 2]) {
        0 => destination::run(&mut script),
        1 => source::run(&mut script),
        _ => file::run(&mut script),
    }
}

/// Kinds of frames; docs/migration.md.
mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const WELCOME: u16 = 2;
    pub(super) const DESCRIBE: u16 = 3;
    pub(super) const READY: u16 = 4;
    pub(super) const ROUND_START: u16 = 5;
    pub(super) const CHUNK: u16 = 6;
    pub(super) const FILL: u16 = 7;
    pub(super) const ROUND_END: u16 = 8;
    pub(super) const ROUND_DONE: u16 = 9;
    pub(super) const STATE: u16 = 10;
    pub(super) const STATE_END: u16 = 11;
    pub(super) const PREPARED: u16 = 12;
    pub(super) const COMMIT: u16 = 13;
    pub(super) const RUNNING: u16 = 14;
    pub(super) const REFUSED: u16 = 15;
    pub(super) const ABORT: u16 = 16;
    pub(super) const STATUS: u16 = 17;
    pub(super) const ROLLBACK: u16 = 18;
    pub(super) const ALIVE: u16 = 19;
}

/// Encodes a body, little-endian.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &[u8]) -> Self {
        let mut body = self.u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        body.0.extend(text);
        body
    }
}

/// Frames of a peer, as kinds, bodies and payloads.
type Frames = Vec<(u16, Vec<u8>, Vec<u8>)>;

/// A connection whose other end sends prepared bytes. A destination's frames have checksums seeded
/// with the hello that it received.
struct Scripted {
    input: Vec<u8>,
    read: usize,
    /// Sent as a destination, once the hello has arrived.
    later: Frames,
    received: Arc<Mutex<Vec<u8>>>,
}

impl Scripted {
    /// Sends `input`.
    fn bytes(input: Vec<u8>) -> Self {
        Self { input, read: 0, later: Vec::new(), received: Arc::default() }
    }

    /// Sends frames of a destination.
    fn destination(later: Frames, received: Arc<Mutex<Vec<u8>>>) -> Self {
        Self { input: Vec::new(), read: 0, later, received }
    }

    fn answer(&mut self) {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        // The header of the frame, then magic, versions, purpose, index, count, 0, id.
        let (Some(&index), Some(id)) =
            (received.get(24 + 13), received.get(40..56).and_then(|id| id.first_chunk()))
        else {
            return;
        };
        let mut writer = FrameWriter::keyed(MigrationId(*id), index, false);
        for (kind, body, payload) in self.later.drain(..) {
            self.input.extend(writer.frame(kind, &body, &payload));
        }
    }
}

impl Read for Scripted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if !self.later.is_empty() {
            self.answer();
        }
        let rest = self.input.get(self.read..).unwrap_or_default();
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        self.read += len;
        Ok(len)
    }
}

impl Write for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link for Scripted {
    fn set_timeout(&self, _time: Duration) -> io::Result<()> {
        Ok(())
    }

    fn closer(&self) -> io::Result<Closer> {
        Ok(Box::new(|| ()))
    }
}
