//! Parses a block request from its descriptor chain (virtio 1.3, section 5.2.6).
//!
//! Header, data and status may be split into buffers in any way. Device-readable buffers precede
//! device-writable ones.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::Ram;

/// Maximum data segments in a request: Linux uses this many for half a MiB in single pages.
pub(crate) const SEG_MAX: u32 = 126;

/// Maximum bytes of a segment.
pub(crate) const SIZE_MAX: u32 = 64 << 10;

/// Maximum data bytes in a request, so that one request does not delay others for long.
const MAX_DATA_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Bytes of a header: type u32, reserved u32, sector u64.
const HEADER_BYTES: usize = 16;

/// Maximum buffers of a chain: the header may be split into single bytes.
const MAX_BUFFERS: usize = SEG_MAX as usize + HEADER_BYTES + 1;

/// The request type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown,
}

impl Kind {
    const fn of(word: u32) -> Self {
        match word {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Unknown,
        }
    }
}

/// A guest buffer or part of one. It may lie outside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) at: GuestAddress,
    pub(crate) len: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    /// In units of 512 bytes, whatever the disk's block size.
    pub(crate) sector: u64,
    /// Device-readable data.
    pub(crate) out: Vec<Segment>,
    /// Device-writable data, without the status.
    pub(crate) into: Vec<Segment>,
    /// The address of the status byte.
    pub(crate) status: GuestAddress,
}

impl Request {
    /// Parses a chain. `None` if it has no header, no status byte, no end, or more data than
    /// allowed: then no status can be returned.
    pub(crate) fn of(chain: DescriptorChain<&Ram>, memory: &Ram) -> Option<Self> {
        let (mut out, mut into) = (Vec::new(), Vec::new());
        let mut is_whole = false;
        for (number, buffer) in chain.enumerate() {
            // The iterator stops at a loop or an invalid descriptor.
            is_whole = !buffer.has_next();
            if number >= MAX_BUFFERS || (!buffer.is_write_only() && !into.is_empty()) {
                return None;
            }
            let segment = Segment { at: buffer.addr(), len: buffer.len() };
            let list = if buffer.is_write_only() { &mut into } else { &mut out };
            if segment.len > 0 {
                list.push(segment);
            }
        }
        if !is_whole {
            return None;
        }
        let header = take_header(&mut out, memory)?;
        let status = take_last(&mut into)?;
        if bytes(&out).max(bytes(&into)) > MAX_DATA_BYTES {
            return None;
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = Kind::of(u32::from_le_bytes([k0, k1, k2, k3]));
        Some(Self { kind, sector: u64::from_le_bytes(sector), out, into, status })
    }
}

/// Total bytes of the segments.
pub(crate) fn bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Reads the header and removes it from the segments.
fn take_header(out: &mut Vec<Segment>, memory: &Ram) -> Option<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    let mut rest = header.as_mut_slice();
    while !rest.is_empty() {
        let first = out.first_mut()?;
        let len = rest.len().min(first.len as usize);
        let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
        memory.read_slice(now, first.at).ok()?;
        rest = later;
        // At most 16, and at most the segment's length.
        let taken = u32::try_from(len).ok()?;
        *first = Segment { at: first.at.checked_add(taken.into())?, len: first.len - taken };
        if first.len == 0 {
            out.remove(0);
        }
    }
    Some(header)
}

/// Removes the last byte, the status, and returns its address.
fn take_last(into: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = into.last_mut()?;
    last.len -= 1;
    let status = last.at.checked_add(last.len.into())?;
    if last.len == 0 {
        into.pop();
    }
    Some(status)
}
