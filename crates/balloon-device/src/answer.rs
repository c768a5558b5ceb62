//! Answers of the guest.

use std::sync::Arc;

use balloon_abi::Records;
use balloon_abi::limits::{MAX_GRANULE_SHIFT, MIN_GRANULE_SHIFT};
use balloon_abi::request::ANSWER_VALUES;
use page_set::PageSet;

use crate::decode::decode_bitmap;
use crate::fault::Fault;
use crate::layout::MemoryLayout;

/// log2 of the largest block in bytes in which hints are counted: the block that one
/// Linux hint names (`MAX_PAGE_ORDER`, 4 MiB).
const MAX_HINT_SHIFT: u32 = 22;

const SIZES: usize = (MAX_GRANULE_SHIFT - MIN_GRANULE_SHIFT + 1) as usize;

/// The guest's complete answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Duration in the guest as it reported it, in nanoseconds.
    pub elapsed_ns: u64,
    /// Values by command; see docs/protocol.md. As the guest reported them, unchecked.
    pub values: [u64; ANSWER_VALUES],
    /// The pages, for requests for free pages.
    pub free: Option<Arc<FreePages>>,
}

/// What the guest guarantees about free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeKind {
    /// Free at some moment after the request was sent.
    Snapshot,
    /// Free until the hold ends.
    Hold,
    /// From free page hints; same guarantee as `Snapshot`.
    Hint,
}

/// Free pages that the guest named: all in guest memory, none in the balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreePages {
    /// Id of the request.
    pub id: u32,
    /// The guest's guarantee.
    pub kind: FreeKind,
    /// The pages.
    pub pages: Arc<PageSet>,
    /// The blocks in which the guest named them.
    pub blocks: Blocks,
    /// Free balloon pages when the guest started, as it reported.
    pub guest_free_pages: u64,
    /// Longest time that the guest held a lock, as it reported, in nanoseconds.
    pub lock_ns: u64,
    /// Duration in the guest as it reported it, in nanoseconds.
    pub elapsed_ns: u64,
}

/// Block counts by size. A block in two answers counts twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blocks([u64; SIZES]);

impl Blocks {
    /// Iterates over `(bytes, count)` of all sizes with a count above 0, largest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let sizes = self.0.iter().enumerate().rev().filter(|(_, count)| **count > 0);
        sizes.map(|(size, count)| (1 << (size + MIN_GRANULE_SHIFT as usize), *count))
    }

    /// Splits `pages` into the fewest aligned blocks of at most 4 MiB.
    pub(crate) fn of(pages: &PageSet) -> Self {
        let mut blocks = Self::default();
        for run in pages.ranges() {
            let mut from = run.start();
            while from < run.end() {
                let fits = (run.end() - from).ilog2();
                let order = from.trailing_zeros().min(fits).min(MAX_HINT_SHIFT - MIN_GRANULE_SHIFT);
                blocks.0[order as usize] += 1;
                from += 1 << order;
            }
        }
        blocks
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count = count.saturating_add(more);
        }
    }
}

/// Decodes records like [`decode_bitmap`] and counts their blocks.
pub(crate) fn decode_blocks(
    records: &[u8],
    layout: &MemoryLayout,
) -> Result<(PageSet, Blocks), Fault> {
    let pages = decode_bitmap(records, layout)?;
    let mut blocks = Blocks::default();
    for record in Records::new(records).flatten() {
        let count: u64 = record.words().map(|word| u64::from(word.count_ones())).sum();
        let size = record.header().granule_shift.checked_sub(MIN_GRANULE_SHIFT);
        if let Some(slot) = size.and_then(|size| blocks.0.get_mut(size as usize)) {
            *slot = slot.saturating_add(count);
        }
    }
    Ok((pages, blocks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use page_set::PageRange;

    #[test]
    fn a_run_is_counted_in_the_largest_aligned_blocks() {
        let pages = PageRange::new(1023, 1 + 1024 + 1024 + 3).unwrap().into();
        let counts: Vec<_> = Blocks::of(&pages).iter().collect();
        assert_eq!(counts, [(4 << 20, 2), (8192, 1), (4096, 2)]);
    }
}
