//! One frame: a header, a structured body, a payload of contents.
//!
//! The checksum at its start covers header and body. Its seed depends on the stream and on the
//! frame's number in it, which is not sent, so a frame that is changed, lost, repeated or reordered
//! is detected. Payloads have their own checksums, in the body (`chunk`).

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::error::MigrationError;
use crate::limits::{MAX_BODY_BYTES, MAX_PAYLOAD_BYTES};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 24;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Hello,
    Welcome,
    Describe,
    Ready,
    RoundStart,
    Chunk,
    Fill,
    RoundEnd,
    RoundDone,
    State,
    StateEnd,
    Prepared,
    Commit,
    Running,
    Refused,
    Abort,
    Status,
    Rollback,
    Alive,
}

const KINDS: [(u16, Kind); 19] = [
    (1, Kind::Hello),
    (2, Kind::Welcome),
    (3, Kind::Describe),
    (4, Kind::Ready),
    (5, Kind::RoundStart),
    (6, Kind::Chunk),
    (7, Kind::Fill),
    (8, Kind::RoundEnd),
    (9, Kind::RoundDone),
    (10, Kind::State),
    (11, Kind::StateEnd),
    (12, Kind::Prepared),
    (13, Kind::Commit),
    (14, Kind::Running),
    (15, Kind::Refused),
    (16, Kind::Abort),
    (17, Kind::Status),
    (18, Kind::Rollback),
    (19, Kind::Alive),
];

impl Kind {
    fn number(self) -> u16 {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or(0, |(number, _)| *number)
    }

    fn of_number(number: u16) -> Option<Self> {
        KINDS.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind)
    }
}

/// A header that was read. Only the lengths may be used before [`check`](Self::check); they are
/// within their limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    bytes: [u8; HEADER_BYTES],
    pub(crate) body_bytes: usize,
    pub(crate) payload_bytes: usize,
}

impl Header {
    /// Decodes a header.
    ///
    /// # Errors
    /// A length exceeds its limit.
    pub(crate) fn read(bytes: [u8; HEADER_BYTES]) -> Result<Self, MigrationError> {
        let [_, _, _, _, _, _, _, _, _, _, _, _, b0, b1, b2, b3, p0, p1, p2, p3, ..] = bytes;
        let len = |bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX);
        let head =
            Self { bytes, body_bytes: len([b0, b1, b2, b3]), payload_bytes: len([p0, p1, p2, p3]) };
        if head.body_bytes > MAX_BODY_BYTES || head.payload_bytes > MAX_PAYLOAD_BYTES {
            return Err(MigrationError::Peer { what: "a frame is longer than it may be" });
        }
        Ok(head)
    }

    /// Checks the frame once its body was read, and returns its kind. `seed` is that of its place
    /// in the stream.
    ///
    /// # Errors
    /// The checksum does not match, or the kind is unknown.
    pub(crate) fn check(&self, body: &[u8], seed: u64) -> Result<Kind, MigrationError> {
        let (sum, rest) = self.bytes.split_at(8);
        if sum != checksum(rest, body, seed).to_le_bytes() {
            return Err(MigrationError::Damaged { what: "a message" });
        }
        let [_, _, _, _, _, _, _, _, k0, k1, r0, r1, _, _, _, _, _, _, _, _, r2 @ ..] = self.bytes;
        if [r0, r1] != [0; 2] || r2 != [0; 4] {
            return Err(MigrationError::Peer { what: "a reserved byte is not 0" });
        }
        Kind::of_number(u16::from_le_bytes([k0, k1]))
            .ok_or(MigrationError::Peer { what: "a message of an unknown kind" })
    }
}

/// Appends a frame to `out` without its payload, which follows it on the wire. Lengths are within
/// their limits.
pub(crate) fn append(out: &mut Vec<u8>, kind: Kind, body: &[u8], payload: &[u8], seed: u64) {
    debug_assert!(body.len() <= MAX_BODY_BYTES && payload.len() <= MAX_PAYLOAD_BYTES);
    append_any(out, kind.number(), body, payload, seed);
}

/// The same for invalid frames.
pub(crate) fn append_any(out: &mut Vec<u8>, kind: u16, body: &[u8], payload: &[u8], seed: u64) {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut head = [0u8; HEADER_BYTES - 8];
    let fields = kind.to_le_bytes().into_iter().chain([0; 2]);
    let fields = fields.chain(len(body)).chain(len(payload));
    for (place, byte) in head.iter_mut().zip(fields) {
        *place = byte;
    }
    out.extend_from_slice(&checksum(&head, body, seed).to_le_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(body);
}

fn checksum(head: &[u8], body: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(body, xxh3_64_with_seed(head, seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8], seed: u64) -> Result<(Kind, Vec<u8>), MigrationError> {
        let (head, rest) = bytes.split_first_chunk().unwrap();
        let head = Header::read(*head)?;
        let body = rest.get(..head.body_bytes).unwrap_or(rest);
        head.check(body, seed).map(|kind| (kind, rest[head.body_bytes..].to_vec()))
    }

    #[test]
    fn every_kind_is_decoded_as_encoded() {
        for (number, kind) in KINDS {
            let mut bytes = Vec::new();
            append(&mut bytes, kind, b"body", b"payload", u64::from(number));
            bytes.extend(b"payload");
            assert_eq!(parse(&bytes, number.into()).unwrap(), (kind, b"payload".to_vec()));
        }
    }

    #[test]
    fn a_changed_bit_or_another_place_is_detected() {
        let mut bytes = Vec::new();
        append(&mut bytes, Kind::Ready, b"body", b"", 7);
        assert!(parse(&bytes, 7).is_ok());
        assert!(parse(&bytes, 8).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&changed, 7).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_checked_before_the_checksum() {
        let mut head = [0; HEADER_BYTES];
        head[12..16].copy_from_slice(&u32::try_from(MAX_BODY_BYTES + 1).unwrap().to_le_bytes());
        assert!(matches!(Header::read(head), Err(MigrationError::Peer { .. })));
        head[12..20].copy_from_slice(&[0, 0, 0, 0, 255, 255, 255, 255]);
        assert!(matches!(Header::read(head), Err(MigrationError::Peer { .. })));
    }
}
