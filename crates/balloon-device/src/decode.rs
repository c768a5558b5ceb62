//! Decodes messages to sets of pages within guest memory.

use balloon_abi::record::Record;
use balloon_abi::{Records, pfn_array};
use page_set::{PageRange, PageSet};

use crate::fault::{Fault, Faults};
use crate::layout::MemoryLayout;

/// Decodes a page-bitmap message, all or nothing.
///
/// Checks each record against the bounds of guest memory, and the sum of all records
/// against its size, before it adds the record to a set. So the guest's size bounds the
/// allocation for a message, even if guest memory is sparse. Linear in words.
pub fn decode_bitmap(message: &[u8], layout: &MemoryLayout) -> Result<PageSet, Fault> {
    let (first, end) = layout.bounds();
    let mut pages = PageSet::new();
    let mut claimed = 0;
    for record in Records::new(message) {
        let record = record.map_err(|_| Fault::MalformedRecord)?;
        let header = record.header();
        let Some((span_first, span_end)) = record.span() else { continue };
        if span_first.0 < first || span_end.0 > end {
            return Err(Fault::OutsideMemory);
        }
        let blocks: u64 = record.words().map(|word| u64::from(word.count_ones())).sum();
        claimed += blocks * header.block_pages();
        if claimed > layout.pages() {
            let outside = names_outside(&record, layout);
            return Err(if outside { Fault::OutsideMemory } else { Fault::RepeatedPage });
        }
        let added = pages.insert_bitmap(header.start_pfn.0, header.block_pages(), record.words());
        if added.ok() != Some(blocks * header.block_pages()) {
            return Err(Fault::RepeatedPage);
        }
    }
    debug_assert_eq!(claimed, pages.len());
    // Every record is within the bounds. Check gap by gap: memory has few gaps, and a
    // set may have millions of ranges.
    if layout.gaps().any(|gap| pages.intersects_range(gap)) {
        return Err(Fault::OutsideMemory);
    }
    Ok(pages)
}

/// Returns true if a block of the record is not completely in guest memory.
fn names_outside(record: &Record<'_>, layout: &MemoryLayout) -> bool {
    let (start, pages) = (record.header().start_pfn.0, record.header().block_pages());
    let blocks = (0u64..).step_by(64).zip(record.words()).flat_map(|(first, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
    });
    let mut blocks = blocks.map(|block| PageRange::new(start + block * pages, pages));
    !blocks.all(|block| block.is_ok_and(|block| layout.covers(block)))
}

/// Decodes an array of page numbers. Counts and skips pages outside of guest memory, as
/// QEMU does.
pub fn decode_pfn_array(message: &[u8], layout: &MemoryLayout, faults: &mut Faults) -> PageSet {
    let mut pages = PageSet::new();
    let mut run = Run::default();
    let mut add = |run: Run| {
        if run.pages == 0 {
            return;
        }
        match PageRange::new(run.start, run.pages) {
            Ok(range) if layout.covers(range) => {
                pages.insert(range);
            }
            _ => add_page_by_page(run, layout, &mut pages, faults),
        }
    };
    for pfn in pfn_array::decode(message) {
        if !run.extend(pfn.0) {
            add(std::mem::replace(&mut run, Run { start: pfn.0, pages: 1 }));
        }
    }
    add(run);
    pages
}

fn add_page_by_page(run: Run, layout: &MemoryLayout, pages: &mut PageSet, faults: &mut Faults) {
    for page in run.start..run.start + run.pages {
        match PageRange::new(page, 1) {
            Ok(range) if layout.covers(range) => {
                pages.insert(range);
            }
            _ => faults.count(Fault::OutsideMemory),
        }
    }
}

/// A run of adjacent page numbers. Linux allocates them in descending order as often as
/// in ascending order, so a run grows at both ends.
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    pages: u64,
}

impl Run {
    fn extend(&mut self, page: u64) -> bool {
        if self.pages > 0 && page == self.start + self.pages {
            self.pages += 1;
        } else if self.pages > 0 && page + 1 == self.start {
            self.start = page;
            self.pages += 1;
        } else {
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> MemoryLayout {
        MemoryLayout::new([(0x10_0000, 0x10_0000), (0x30_0000, 0x10_0000)]).unwrap()
    }

    fn runs(pages: &PageSet) -> Vec<(u64, u64)> {
        pages.ranges().map(|range| (range.start(), range.pages())).collect()
    }

    #[test]
    fn a_run_grows_at_both_ends() {
        let mut run = Run::default();
        assert!(!run.extend(5), "the first page begins a run");
        run = Run { start: 5, pages: 1 };
        assert!(run.extend(6) && run.extend(4));
        assert!(!run.extend(4) && !run.extend(8) && !run.extend(2));
        assert_eq!((run.start, run.pages), (4, 3));
        let mut at_zero = Run { start: 0, pages: 1 };
        assert!(!at_zero.extend(u64::from(u32::MAX)), "no page precedes page 0");
    }

    #[test]
    fn a_run_across_the_end_of_memory_is_cut_there() {
        let message: Vec<u8> = (0x1fe..0x202u32).flat_map(u32::to_le_bytes).collect();
        let mut faults = Faults::default();
        let pages = decode_pfn_array(&message, &layout(), &mut faults);
        assert_eq!(runs(&pages), [(0x1fe, 2)]);
        assert_eq!(faults.get(Fault::OutsideMemory), 2);
    }

    #[test]
    fn more_pages_than_memory_are_outside_or_repeated() {
        let one_page = |pfn: u64| (pfn | 12 << 52).to_le_bytes();
        let layout = MemoryLayout::new([(0x3000, 0x1000)]).unwrap();
        let twice = [3, 3].map(one_page).concat();
        assert_eq!(decode_bitmap(&twice, &layout), Err(Fault::RepeatedPage));
        // Two pages far apart, and three between them.
        let layout = MemoryLayout::new([(0x1000, 0x1000), (1 << 40, 0x1000)]).unwrap();
        let between = [3, 4, 5].map(one_page).concat();
        assert_eq!(decode_bitmap(&between, &layout), Err(Fault::OutsideMemory));
    }

    #[test]
    fn a_bitmap_may_span_a_gap_but_not_name_a_block_in_it() {
        let record =
            |word: u64| [(0x100u64 | 20 << 52 | 1 << 58).to_le_bytes(), word.to_le_bytes()];
        let decode = |word| decode_bitmap(&record(word).concat(), &layout());
        assert_eq!(runs(&decode(0b101).unwrap()), [(0x100, 0x100), (0x300, 0x100)]);
        assert_eq!(decode(0b111), Err(Fault::OutsideMemory));
        assert_eq!(decode(0b1001), Err(Fault::OutsideMemory));
    }
}
