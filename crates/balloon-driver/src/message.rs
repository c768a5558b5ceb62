//! Turns blocks into messages, in the form that was negotiated.

use balloon_abi::limits::PFNS_PER_MESSAGE;
use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::pfn_array::{self, PFN_BYTES};
use balloon_abi::{Features, Pfn, Vq, record};

use crate::encoder::{Encoder, MAX_RECORD_BYTES, Run};
use crate::traits::{Gone, Queues};

/// Bytes that a message buffer must have at least: the longer of one record and
/// one full array of page numbers.
pub const MIN_BUFFER_BYTES: usize = if MAX_RECORD_BYTES > PFNS_PER_MESSAGE * PFN_BYTES {
    MAX_RECORD_BYTES
} else {
    PFNS_PER_MESSAGE * PFN_BYTES
};

/// Writes the blocks of one inflate or deflate.
pub(crate) struct Messages {
    form: Form,
    /// Blocks that are not in the message yet; used by the bitmap form alone.
    encoder: Encoder,
    /// Bytes of the message so far.
    filled: usize,
}

#[derive(Clone, Copy)]
enum Form {
    Bitmap,
    PfnArray,
}

impl Messages {
    pub(crate) const fn new(negotiated: Features) -> Self {
        let form =
            if negotiated.contains(Features::PAGE_BITMAP) { Form::Bitmap } else { Form::PfnArray };
        Self { form, encoder: Encoder::new(), filled: 0 }
    }

    /// True when the host can be told of a block that ends before `end`.
    pub(crate) fn can_name(&self, end: Pfn) -> bool {
        match self.form {
            Form::Bitmap => end.0 <= balloon_abi::limits::MAX_RECORD_PFN,
            Form::PfnArray => end.0 <= 1 << 32,
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
        let Self { form, encoder, filled } = self;
        match form {
            Form::Bitmap => {
                encoder.add(pfn, granule_shift, &mut |run| write_record(queues, vq, filled, &run))
            }
            Form::PfnArray => {
                let pages = 1u64 << (granule_shift - BALLOON_PAGE_SHIFT);
                (0..pages).try_for_each(|i| write_pfn(queues, vq, filled, Pfn(pfn.0 + i)))
            }
        }
    }

    /// Posts what is still gathered and waits for the host.
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
    // A second round always fits: a buffer holds at least one record.
    for _ in 0..2 {
        let room = queues.buffer(vq)?.get_mut(*filled..).unwrap_or_default();
        match record::encode(room, run.start_pfn, run.granule_shift, run.bitmap) {
            Ok(Some(len)) => {
                *filled += len;
                return Ok(());
            }
            Ok(None) => queues.post(vq, core::mem::take(filled))?,
            // Cannot be: the allocator aligns blocks and `can_name` was asked.
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
