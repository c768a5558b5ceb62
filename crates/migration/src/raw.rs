//! Frames and files as bytes, for whoever plays a hostile peer: tests and fuzz targets. Check sums
//! are right here, so that what is behind them is reached.

use crate::wire::chunk;
use crate::wire::control::MigrationId;
use crate::wire::frame;
use crate::wire::stream::{Place, Side};

/// Says frames on one connection in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Speaker {
    place: Place,
}

impl Speaker {
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

impl Default for Speaker {
    fn default() -> Self {
        Self::new()
    }
}

/// Check sum of contents at their place: round, start, data and zeros of a chunk; index, version,
/// total and offset of a part of state.
#[must_use]
pub fn content_sum(contents: &[u8], place: [u64; 4]) -> u64 {
    chunk::content_sum(contents, place)
}

/// Makes the check sums of a snapshot right again, as far as its head says where things are.
pub fn seal_snapshot(bytes: &mut [u8]) {
    crate::snapshot::seal(bytes);
}
