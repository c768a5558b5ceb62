//! Collects blocks into page-bitmap records.
//!
//! A buddy allocator returns adjacent blocks, but in descending order as often as in ascending
//! order, and alternately from several areas. So blocks are collected in a few windows on a
//! fixed grid, each as wide as one record. A window becomes a record when its slot is needed
//! or when the message ends.

use balloon_abi::limits::{MAX_RECORD_BLOCKS, MAX_RECORD_WORDS};
use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::{Pfn, record};

/// Number of open windows: one for each area that an allocator is likely to alternate
/// between (zones, and the two ends of one).
const WINDOWS: usize = 4;

/// Most bytes of the records of one window.
pub(crate) const MAX_RECORD_BYTES: usize = (MAX_RECORD_WORDS + 1) * record::WORD_BYTES;

#[derive(Clone, Copy)]
struct Window {
    /// Number of the first block; a multiple of [`MAX_RECORD_BLOCKS`].
    base: u64,
    words: [u64; MAX_RECORD_WORDS],
    /// Bits set; an empty window has none.
    blocks: u32,
}

impl Window {
    const EMPTY: Self = Self { base: 0, words: [0; MAX_RECORD_WORDS], blocks: 0 };
}

/// Blocks of one granule that are not encoded yet.
pub(crate) struct Encoder {
    granule_shift: u32,
    windows: [Window; WINDOWS],
    /// Window to close next.
    oldest: usize,
}

/// A record to write.
pub(crate) struct Run<'a> {
    pub(crate) start_pfn: Pfn,
    pub(crate) granule_shift: u32,
    pub(crate) bitmap: &'a [u64],
}

impl Encoder {
    pub(crate) const fn new() -> Self {
        Self { granule_shift: BALLOON_PAGE_SHIFT, windows: [Window::EMPTY; WINDOWS], oldest: 0 }
    }

    /// Drops all blocks.
    pub(crate) fn clear(&mut self) {
        for window in &mut self.windows {
            *window = Window::EMPTY;
        }
    }

    /// Adds a block. Passes records of windows that must be closed for it to `emit`.
    pub(crate) fn add<E>(
        &mut self,
        pfn: Pfn,
        granule_shift: u32,
        emit: &mut impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if granule_shift != self.granule_shift {
            self.finish(emit)?;
            self.granule_shift = granule_shift;
        }
        let block = pfn.0 >> (granule_shift - BALLOON_PAGE_SHIFT);
        let base = block / MAX_RECORD_BLOCKS * MAX_RECORD_BLOCKS;
        let open = |window: &Window| window.blocks > 0 && window.base == base;
        let at = match self.windows.iter().position(open) {
            Some(at) => at,
            None => self.open(base, emit)?,
        };
        let window = &mut self.windows[at];
        let bit = block - base;
        window.words[(bit / 64) as usize] |= 1 << (bit % 64);
        window.blocks += 1;
        Ok(())
    }

    /// Closes all windows.
    pub(crate) fn finish<E>(
        &mut self,
        emit: &mut impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for at in 0..WINDOWS {
            self.close(at, emit)?;
        }
        Ok(())
    }

    fn open<E>(
        &mut self,
        base: u64,
        emit: &mut impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let at = match self.windows.iter().position(|window| window.blocks == 0) {
            Some(free) => free,
            None => {
                let at = self.oldest;
                self.oldest = (at + 1) % WINDOWS;
                self.close(at, emit)?;
                at
            }
        };
        self.windows[at].base = base;
        Ok(at)
    }

    /// Encodes a window as one bitmap or as single blocks, whichever is shorter. Empties the
    /// window even if `emit` fails, which means that the device is gone.
    fn close<E>(
        &mut self,
        at: usize,
        emit: &mut impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let window = core::mem::replace(&mut self.windows[at], Window::EMPTY);
        let Some(first) = window.words.iter().position(|word| *word != 0) else { return Ok(()) };
        let last = window.words.iter().rposition(|word| *word != 0).unwrap_or(first);
        let granule_shift = self.granule_shift;
        let pfn_of = |bit: u64| Pfn((window.base + bit) << (granule_shift - BALLOON_PAGE_SHIFT));
        let bitmap = &window.words[first..=last];
        if window.blocks as usize > bitmap.len() + 1 {
            return emit(Run { start_pfn: pfn_of(first as u64 * 64), granule_shift, bitmap });
        }
        for (i, word) in bitmap.iter().enumerate() {
            let mut rest = *word;
            while rest != 0 {
                let bit = (first + i) as u64 * 64 + u64::from(rest.trailing_zeros());
                emit(Run { start_pfn: pfn_of(bit), granule_shift, bitmap: &[] })?;
                rest &= rest - 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::convert::Infallible;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    fn encode(blocks: &[(u64, u32)]) -> (BTreeSet<(u64, u32)>, usize) {
        let mut seen = Vec::new();
        let mut bytes = 0;
        let mut emit = |run: Run<'_>| -> Result<(), Infallible> {
            bytes += (run.bitmap.len() + 1) * record::WORD_BYTES;
            let mut message = [0; MAX_RECORD_BYTES];
            let len = record::encode(&mut message, run.start_pfn, run.granule_shift, run.bitmap)
                .expect("a valid record")
                .expect("space");
            let record = balloon_abi::Records::new(&message[..len]).next().unwrap().unwrap();
            for (i, word) in record.words().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let block = i as u64 * 64 + bit;
                    let start = run.start_pfn.0 + block * record.header().block_pages();
                    seen.push((start, run.granule_shift));
                }
            }
            Ok(())
        };
        let mut encoder = Encoder::new();
        for (pfn, shift) in blocks {
            let Ok(()) = encoder.add(Pfn(*pfn), *shift, &mut emit);
        }
        let Ok(()) = encoder.finish(&mut emit);
        let set: BTreeSet<_> = seen.iter().copied().collect();
        assert_eq!(set.len(), seen.len(), "a block was encoded twice");
        (set, bytes)
    }

    #[test]
    fn adjacent_blocks_in_descending_order_become_one_record() {
        let blocks: Vec<_> = (0..768).rev().map(|i| (i * 1024, 22)).collect();
        let (set, bytes) = encode(&blocks);
        assert_eq!(set.len(), 768);
        assert_eq!(bytes, 13 * 8);
    }

    #[test]
    fn scattered_blocks_need_no_bitmap_each() {
        let blocks: Vec<_> = (0..8).map(|i| (i * 512, 12)).collect();
        assert_eq!(encode(&blocks).1, 8 * 8);
    }

    proptest! {
        #[test]
        fn every_block_is_encoded_once(
            blocks in prop::collection::btree_set((0..40_000u64, 0..3u32), 0..300),
            seed in any::<usize>(),
        ) {
            let mut blocks: Vec<_> =
                blocks.into_iter().map(|(block, o)| (block << (o * 5), 12 + o * 5)).collect();
            let len = blocks.len().max(1);
            for i in 0..blocks.len() {
                blocks.swap(i, seed.wrapping_mul(i + 1) % len);
            }
            let (encoded, _) = encode(&blocks);
            prop_assert_eq!(encoded, blocks.into_iter().collect::<BTreeSet<_>>());
        }
    }
}
