//! Writes the answers to a request: partial answers with records, and the last answer.

use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::request::{ANSWER_HEADER_BYTES, ANSWER_VALUES, AnswerHeader, Outcome};
use balloon_abi::{Pfn, record};

use crate::encoder::{Encoder, MAX_RECORD_BYTES, Run};
use crate::inbox::Stop;
use crate::traits::RequestQueue;

/// Minimum size of an answer's buffer in bytes: a header and one record.
pub const MIN_ANSWER_BYTES: usize = ANSWER_HEADER_BYTES + MAX_RECORD_BYTES;

/// The answers to the running request.
pub(crate) struct Answer {
    encoder: Encoder,
    progress: Progress,
    /// Bytes of records in the buffer.
    filled: usize,
}

/// Values that every answer to the request contains.
struct Progress {
    id: u32,
    started_ns: u64,
    named_pages: u64,
    free_pages: u64,
    longest_lock_ns: u64,
}

impl Answer {
    pub(crate) const fn new() -> Self {
        let progress =
            Progress { id: 0, started_ns: 0, named_pages: 0, free_pages: 0, longest_lock_ns: 0 };
        Self { encoder: Encoder::new(), progress, filled: 0 }
    }

    /// Starts the answers to `id`. Drops the rest of an earlier request.
    pub(crate) fn begin(&mut self, id: u32, started_ns: u64) {
        self.encoder.clear();
        self.filled = 0;
        self.progress =
            Progress { id, started_ns, named_pages: 0, free_pages: 0, longest_lock_ns: 0 };
    }

    /// Records the free pages at the start of the request.
    pub(crate) fn record_free(&mut self, pages: u64) {
        self.progress.free_pages = pages;
    }

    pub(crate) fn record_lock(&mut self, held_ns: u64) {
        self.progress.longest_lock_ns = self.progress.longest_lock_ns.max(held_ns);
    }

    /// Adds a block of `2^granule_shift` bytes. Sends full buffers.
    pub(crate) fn add(
        &mut self,
        queue: &mut impl RequestQueue,
        pfn: Pfn,
        granule_shift: u32,
    ) -> Result<(), Stop> {
        let Self { encoder, progress, filled } = self;
        encoder.add(pfn, granule_shift, &mut |run| write_record(queue, progress, filled, &run))
    }

    /// Sends the collected blocks. A later block, which may contain pages of an earlier one, is
    /// then in another answer.
    pub(crate) fn send(&mut self, queue: &mut impl RequestQueue) -> Result<(), Stop> {
        self.flush(queue)?;
        if self.filled > 0 {
            post_more(queue, &self.progress, &mut self.filled)?;
        }
        Ok(())
    }

    /// Writes all records. Returns the values of the last answer, including its records.
    pub(crate) fn finish_records(
        &mut self,
        queue: &mut impl RequestQueue,
    ) -> Result<[u64; ANSWER_VALUES], Stop> {
        self.flush(queue)?;
        Ok(self.progress.values())
    }

    /// Sends the last answer: with the written records if it is *done*, else without any.
    pub(crate) fn end(
        &mut self,
        queue: &mut impl RequestQueue,
        outcome: Outcome,
        values: [u64; ANSWER_VALUES],
    ) -> Result<(), Stop> {
        if outcome != Outcome::Done {
            self.filled = 0;
        }
        post(queue, &self.progress, outcome, values, &mut self.filled)
    }

    fn flush(&mut self, queue: &mut impl RequestQueue) -> Result<(), Stop> {
        let Self { encoder, progress, filled } = self;
        encoder.finish(&mut |run| write_record(queue, progress, filled, &run))
    }
}

impl Progress {
    const fn values(&self) -> [u64; ANSWER_VALUES] {
        [self.named_pages, self.free_pages, self.longest_lock_ns, 0]
    }
}

fn write_record(
    queue: &mut impl RequestQueue,
    progress: &mut Progress,
    filled: &mut usize,
    run: &Run<'_>,
) -> Result<(), Stop> {
    // The second iteration always fits: a buffer has space for at least one record.
    for _ in 0..2 {
        let at = ANSWER_HEADER_BYTES + *filled;
        let space = queue.buffer(false)?.get_mut(at..).unwrap_or_default();
        match record::encode(space, run.start_pfn, run.granule_shift, run.bitmap) {
            Ok(Some(len)) => {
                *filled += len;
                progress.named_pages += run_pages(run);
                return Ok(());
            }
            Ok(None) => post_more(queue, progress, filled)?,
            // Unreachable: the allocator aligns blocks, and no kernel has memory beyond
            // `MAX_RECORD_PFN`.
            Err(_) => return Err(Stop::Gone),
        }
    }
    Err(Stop::Gone)
}

fn run_pages(run: &Run<'_>) -> u64 {
    let blocks = match run.bitmap {
        [] => 1,
        words => words.iter().map(|word| u64::from(word.count_ones())).sum(),
    };
    blocks << (run.granule_shift - BALLOON_PAGE_SHIFT)
}

fn post_more(
    queue: &mut impl RequestQueue,
    progress: &Progress,
    filled: &mut usize,
) -> Result<(), Stop> {
    post(queue, progress, Outcome::More, progress.values(), filled)
}

fn post(
    queue: &mut impl RequestQueue,
    progress: &Progress,
    outcome: Outcome,
    values: [u64; ANSWER_VALUES],
    filled: &mut usize,
) -> Result<(), Stop> {
    let elapsed_ns = queue.now_ns().saturating_sub(progress.started_ns);
    let header = AnswerHeader { id: progress.id, outcome, elapsed_ns, values };
    let last = outcome != Outcome::More;
    let buffer = queue.buffer(last)?;
    buffer.get_mut(..ANSWER_HEADER_BYTES).ok_or(Stop::Gone)?.copy_from_slice(&header.to_bytes());
    queue.post(progress.id, ANSWER_HEADER_BYTES + core::mem::take(filled))
}
