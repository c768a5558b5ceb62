//! One round at the source: one thread for each connection reads, finds zeros, compresses and
//! sends.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::bandwidth::Bandwidth;
use crate::dirty::Word;
use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::link::{Closer, Link};
use crate::observer::{Observer, Progress};
use crate::summary::RoundSummary;
use crate::traits::ReadPages;
use crate::wire::chunk::{Chunk, Compressor, Encoding, PAGE_BYTES};
use crate::wire::control::Control;
use crate::wire::frame::Kind;
use crate::wire::stream::Stream;
use crate::worker_pool::run_pool;

use super::SourceConfig;

/// Words that a thread takes at once: 4 MiB of memory.
const WORDS_AT_ONCE: usize = 16;

/// Parameters of a round.
pub(crate) struct RoundContext<'a> {
    pub(crate) number: u32,
    pub(crate) last: bool,
    pub(crate) layout: &'a GuestLayout,
    pub(crate) memory: &'a dyn ReadPages,
    pub(crate) config: &'a SourceConfig,
    pub(crate) observer: &'a mut dyn Observer,
}

impl RoundContext<'_> {
    pub(crate) fn not_cancelled(&self) -> Result<(), MigrationError> {
        self.config.not_cancelled()
    }
}

/// State that the threads of a round share.
struct Work<'a> {
    number: u32,
    words: &'a [Word],
    next: AtomicUsize,
    failed: AtomicBool,
    memory: &'a dyn ReadPages,
    level: Option<i32>,
    limit: Option<&'a Bandwidth>,
    cancel: &'a AtomicBool,
    /// Interval after which a keepalive is due.
    keepalive: Duration,
    pages: AtomicU64,
    wire_bytes: AtomicU64,
}

/// Sends `words` over all of `streams`. On success the kernel has accepted all of it, followed by
/// the round's end on each stream.
pub(super) fn send<L: Link>(
    context: &mut RoundContext<'_>,
    words: &[Word],
    streams: &mut [Stream<L>],
    closers: &[Closer],
    level: Option<i32>,
    limit: Option<&Bandwidth>,
) -> Result<RoundSummary, MigrationError> {
    let work = Work {
        number: context.number,
        words,
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        memory: context.memory,
        level,
        limit,
        cancel: &context.config.cancel,
        keepalive: context.config.stall.min(context.config.stall_paused) / 8,
        pages: AtomicU64::new(0),
        wire_bytes: AtomicU64::new(streams.iter().map(|stream| stream.sent_bytes).sum()),
    };
    let of_pages = words.iter().map(|word| u64::from(word.bits.count_ones())).sum();
    let mut sum = RoundSummary::default();
    let stop = || {
        work.failed.store(true, Ordering::Relaxed);
        // The other threads may be blocked on a peer that no longer reads.
        closers.iter().for_each(|close| close());
    };
    let share = |_: usize, stream: &mut Stream<L>| {
        let outcome = work.send_share(stream);
        if outcome.is_err() {
            stop();
        }
        outcome
    };
    let add = |part: RoundSummary| {
        sum.sent_pages += part.sent_pages;
        sum.zero_pages += part.zero_pages;
    };
    let report = || {
        context.observer.progress(Progress {
            pages: work.pages.load(Ordering::Relaxed),
            of_pages,
            wire_bytes: work.wire_bytes.load(Ordering::Relaxed),
        });
    };
    run_pool(streams, share, stop, add, report)?;
    Ok(sum)
}

impl Work<'_> {
    /// Sends words until none is left, then the end of the round.
    fn send_share<L: Link>(&self, stream: &mut Stream<L>) -> Result<RoundSummary, MigrationError> {
        let mut compressor = self.level.map(Compressor::new).transpose()?;
        let (mut read, mut space) = (Vec::new(), Vec::new());
        let mut sum = RoundSummary::default();
        let (mut frames, mut named_pages) = (0, 0);
        while let Some(words) = self.take() {
            for &word in words {
                if self.failed.load(Ordering::Relaxed) || self.cancel.load(Ordering::Relaxed) {
                    return Err(MigrationError::Cancelled);
                }
                let (data, zeros, contents) = read_word(self.memory, word, &mut read)?;
                sum.sent_pages += u64::from(data.count_ones());
                sum.zero_pages += u64::from(zeros.count_ones());
                self.pages.fetch_add(u64::from(word.bits.count_ones()), Ordering::Relaxed);
                // The destination's memory reads as zeros until something else is sent.
                let zeros = if self.number == 0 { 0 } else { zeros };
                if stream.idle() > self.keepalive {
                    // Pages that are zeros or compress well send the peer no bytes for a while.
                    stream.send(&Control::Alive)?;
                }
                if data | zeros == 0 {
                    continue;
                }
                let encoding = Encoding::Raw;
                let start = word.start;
                let mut chunk = Chunk { round: self.number, encoding, start, data, zeros, sum: 0 };
                chunk.sum = chunk.sum_of(contents);
                let compressed = compressor
                    .as_mut()
                    .and_then(|compressor| compressor.compress(contents, &mut space));
                if compressed.is_some() {
                    chunk.encoding = Encoding::Zstd;
                }
                let payload = compressed.unwrap_or(contents);
                self.wait(payload.len());
                let before = stream.sent_bytes;
                stream.push(Kind::Chunk, &chunk.encode(), payload)?;
                self.wire_bytes.fetch_add(stream.sent_bytes - before, Ordering::Relaxed);
                frames += 1;
                named_pages += u64::from((data | zeros).count_ones());
            }
        }
        let before = stream.sent_bytes;
        stream.send(&Control::RoundEnd { round: self.number, frames, pages: named_pages })?;
        self.wire_bytes.fetch_add(stream.sent_bytes - before, Ordering::Relaxed);
        Ok(sum)
    }

    fn take(&self) -> Option<&[Word]> {
        let from = self.next.fetch_add(WORDS_AT_ONCE, Ordering::Relaxed);
        let end = from.saturating_add(WORDS_AT_ONCE).min(self.words.len());
        self.words.get(from..end).filter(|words| !words.is_empty())
    }

    /// Sleeps as long as the bandwidth limit requires.
    fn wait(&self, bytes: usize) {
        let wait = self.limit.map(|limit| limit.take(bytes as u64, Instant::now()));
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            thread::sleep(wait);
        }
    }
}

/// Reads the pages of `word` into `space`. Returns the bits of those with contents, the bits of
/// those that are zeros, and the contents, page after page.
pub(crate) fn read_word<'a>(
    memory: &dyn ReadPages,
    word: Word,
    space: &'a mut Vec<u8>,
) -> Result<(u64, u64, &'a [u8]), MigrationError> {
    // It never shrinks: clearing it for each word would cost as much as a copy.
    space.resize(WORD_BYTES, 0);
    let contents = space.get_mut(..word.bits.count_ones() as usize * PAGE_BYTES);
    let contents = contents.unwrap_or_default();
    let mut rest = &mut *contents;
    for run in word.runs() {
        let bytes = usize::try_from(run.pages()).unwrap_or(0) * PAGE_BYTES;
        let (out, behind) = rest.split_at_mut(bytes.min(rest.len()));
        memory.read_pages(run, out).map_err(MigrationError::machine("reading memory"))?;
        rest = behind;
    }
    let (mut data, mut zeros) = (0, 0);
    let mut kept = 0;
    let mut bits = word.bits;
    for page in 0.. {
        if bits == 0 {
            break;
        }
        let bit = bits & bits.wrapping_neg();
        bits &= !bit;
        let at = page * PAGE_BYTES;
        // Check the copy, not the guest's memory, which may change.
        if contents.get(at..at + PAGE_BYTES) == Some(&ZEROS[..]) {
            zeros |= bit;
            continue;
        }
        data |= bit;
        if kept < at {
            contents.copy_within(at..at + PAGE_BYTES, kept);
        }
        kept += PAGE_BYTES;
    }
    Ok((data, zeros, contents.get(..kept).unwrap_or_default()))
}

/// Bytes of the pages of a word.
const WORD_BYTES: usize = 64 * PAGE_BYTES;

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

#[cfg(test)]
mod tests {
    use page_set::PageRange;

    use super::*;
    use crate::traits::MachineError;

    /// Every third page is zeros, the others hold their number.
    struct Numbers;

    impl ReadPages for Numbers {
        fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError> {
            for (page, out) in (pages.start()..pages.end()).zip(out.chunks_mut(PAGE_BYTES)) {
                out.fill(if page % 3 == 0 { 0 } else { page.to_le_bytes()[0] });
            }
            Ok(())
        }
    }

    #[test]
    fn zero_pages_are_reported_and_the_others_are_contiguous() {
        let word = Word { start: 1, bits: 0b1011_0111 | 1 << 63 };
        let mut space = vec![9; 100];
        let (data, zeros, contents) = read_word(&Numbers, word, &mut space).unwrap();
        // Pages 3 and 6.
        assert_eq!(zeros, 0b10_0100);
        assert_eq!(data, word.bits & !zeros);
        let pages: Vec<u8> = contents.chunks(PAGE_BYTES).map(|page| page[4095]).collect();
        assert_eq!(pages, [1, 2, 5, 8, 64]);
    }
}
