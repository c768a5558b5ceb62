//! Encodes blocks as messages in the negotiated format.

use balloon_abi::limits::PFNS_PER_MESSAGE;
use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::pfn_array::{self, PFN_BYTES};
use balloon_abi::{Features, Pfn, Vq, record};

use crate::encoder::{Encoder, MAX_RECORD_BYTES, Run};
use crate::traits::{Gone, Queues};

/// Minimum size of a message buffer in bytes: the larger of one record and a full array of
/// page numbers.
pub const MIN_BUFFER_BYTES: usize = if MAX_RECORD_BYTES > PFNS_PER_MESSAGE * PFN_BYTES {
    MAX_RECORD_BYTES
} else {
    PFNS_PER_MESSAGE * PFN_BYTES
};

/// Writes the blocks of one inflate or deflate.
pub(crate) struct Messages {
    format: Format,
    /// Blocks that are not in the message yet; used only by the bitmap format.
    encoder: Encoder,
    /// Bytes of the message so far.
    filled: usize,
}

#[derive(Clone, Copy)]
enum Format {
    Bitmap,
    PfnArray,
}

impl Messages {
    pub(crate) const fn new(negotiated: Features) -> Self {
        let format = if negotiated.contains(Features::PAGE_BITMAP) {
            Format::Bitmap
        } else {
            Format::PfnArray
        };
        Self { format, encoder: Encoder::new(), filled: 0 }
    }

    /// Returns true if the format can name a block that ends at `end`.
    pub(crate) fn can_name(&self, end: Pfn) -> bool {
        match self.format {
            Format::Bitmap => end.0 <= balloon_abi::limits::MAX_RECORD_PFN,
            Format::PfnArray => end.0 <= 1 << 32,
        }
    }

    /// Adds a block of `2^granule_shift` bytes.
    pub(crate) fn add(
        &mut self,
        queues: &mut impl Queues,
        vq: Vq,
        pfn: Pfn,
        granule_shift: u32,
    ) -> Result<(), Gone> {
        let Self { format, encoder, filled } = self;
        match format {
            Format::Bitmap => {
                encoder.add(pfn, granule_shift, &mut |run| write_record(queues, vq, filled, &run))
            }
            Format::PfnArray => {
                let pages = 1u64 << (granule_shift - BALLOON_PAGE_SHIFT);
                (0..pages).try_for_each(|i| write_pfn(queues, vq, filled, Pfn(pfn.0 + i)))
            }
        }
    }

    /// Posts the rest and waits until the host has returned all messages.
    pub(crate) fn tell_host(&mut self, queues: &mut impl Queues, vq: Vq) -> Result<(), Gone> {
        let filled = &mut self.filled;
        self.encoder.finish(&mut |run| write_record(queues, vq, filled, &run))?;
        match core::mem::take(filled) {
            0 => {}
            len => queues.post(vq, len)?,
        }
        queues.tell_host(vq)
    }
}

fn write_record(
    queues: &mut impl Queues,
    vq: Vq,
    filled: &mut usize,
    run: &Run<'_>,
) -> Result<(), Gone> {
    // The second iteration always fits: a buffer has space for at least one record.
    for _ in 0..2 {
        let space = queues.buffer(vq)?.get_mut(*filled..).unwrap_or_default();
        match record::encode(space, run.start_pfn, run.granule_shift, run.bitmap) {
            Ok(Some(len)) => {
                *filled += len;
                return Ok(());
            }
            Ok(None) => queues.post(vq, core::mem::take(filled))?,
            // Unreachable: the allocator aligns blocks, and the caller checked `can_name`.
            Err(_) => return Err(Gone),
        }
    }
    Err(Gone)
}

fn write_pfn(queues: &mut impl Queues, vq: Vq, filled: &mut usize, pfn: Pfn) -> Result<(), Gone> {
    if !pfn_array::encode(queues.buffer(vq)?, *filled / PFN_BYTES, pfn) {
        return Err(Gone);
    }
    *filled += PFN_BYTES;
    if *filled == PFNS_PER_MESSAGE * PFN_BYTES {
        queues.post(vq, core::mem::take(filled))?;
    }
    Ok(())
}
