//! Frames and files as bytes, for tests and fuzz targets that act as a hostile peer. Checksums are
//! valid here, so that the code behind the checks is reached.

use crate::wire::chunk;
use crate::wire::control::MigrationId;
use crate::wire::frame;
use crate::wire::stream::{Place, Side};

/// Encodes frames of one connection in one direction.
#[derive(Clone, Copy, Debug)]
pub struct FrameWriter {
    place: Place,
}

impl FrameWriter {
    /// Before the hello.
    #[must_use]
    pub fn new() -> Self {
        Self { place: Place::default() }
    }

    /// After the hello, on connection `index`.
    #[must_use]
    pub fn keyed(id: MigrationId, index: u8, is_source: bool) -> Self {
        let side = if is_source { Side::Source } else { Side::Destination };
        Self { place: Place::of(id, index, side) }
    }

    /// The next frame, of any kind and any length.
    pub fn frame(&mut self, kind: u16, body: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        frame::append_any(&mut out, kind, body, payload, self.place.next());
        out.extend_from_slice(payload);
        out
    }
}

impl Default for FrameWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// Checksum of contents at their place: round, start, data and zeros of a chunk; index, version,
/// total and offset of a part of state.
#[must_use]
pub fn content_sum(contents: &[u8], place: [u64; 4]) -> u64 {
    chunk::content_sum(contents, place)
}

/// Recomputes the checksums of a snapshot, as far as its header has valid offsets.
pub fn seal_snapshot(bytes: &mut [u8]) {
    crate::snapshot::seal(bytes);
}
