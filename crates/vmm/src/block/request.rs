//! A request to a block device, read from its chain (virtio 1.3, section 5.2.6).
//!
//! Header, data and status may be cut into buffers in any way; the buffers that the device reads
//! come before those that it writes.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::Ram;

/// Buffers of data in a request: what Linux makes of a request of half a MiB in single pages.
pub(crate) const SEG_MAX: u32 = 126;

/// Bytes of one of them.
pub(crate) const SIZE_MAX: u32 = 64 << 10;

/// Bytes of data in a request, so that none keeps the others waiting for long.
const MAX_DATA_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Bytes of a header: kind u32, reserved u32, sector u64.
const HEADER_BYTES: usize = 16;

/// Buffers of a chain: a header may be cut as small as it likes.
const MAX_BUFFERS: usize = SEG_MAX as usize + HEADER_BYTES + 1;

/// What is asked.
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

/// A buffer of the guest's, or a part of one. It may lie outside of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) at: GuestAddress,
    pub(crate) len: u32,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    /// Of 512 bytes, whatever the disk's block is.
    pub(crate) sector: u64,
    /// What the device is to read.
    pub(crate) out: Vec<Segment>,
    /// What it is to write, but for the status.
    pub(crate) into: Vec<Segment>,
    /// Where the status goes.
    pub(crate) status: GuestAddress,
}

impl Request {
    /// Reads a chain. `None` where there is no header, no room for a status, no end, or more than
    /// a request may have: then nobody can be told anything.
    pub(crate) fn of(chain: DescriptorChain<&Ram>, memory: &Ram) -> Option<Self> {
        let (mut out, mut into) = (Vec::new(), Vec::new());
        let mut is_whole = false;
        for (number, buffer) in chain.enumerate() {
            // A chain that goes in circles, or to where no descriptor is, just stops.
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

/// Bytes of all segments.
pub(crate) fn bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Reads the header, and leaves what is behind it.
fn take_header(out: &mut Vec<Segment>, memory: &Ram) -> Option<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    let mut rest = header.as_mut_slice();
    while !rest.is_empty() {
        let first = out.first_mut()?;
        let len = rest.len().min(first.len as usize);
        let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
        memory.read_slice(now, first.at).ok()?;
        rest = later;
        // Not more than 16, and not more than there is.
        let taken = u32::try_from(len).ok()?;
        *first = Segment { at: first.at.checked_add(taken.into())?, len: first.len - taken };
        if first.len == 0 {
            out.remove(0);
        }
    }
    Some(header)
}

/// The last byte, which is the status.
fn take_last(into: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = into.last_mut()?;
    last.len -= 1;
    let status = last.at.checked_add(last.len.into())?;
    if last.len == 0 {
        into.pop();
    }
    Some(status)
}
