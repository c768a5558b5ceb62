//! Which pages are sent, and which need not be.
//!
//! Everything is to be sent at first, and whatever is written is to be sent again. From that,
//! pages are taken away whose contents the guest does not rely on. Such knowledge is old when it
//! arrives, so it may only take away what was to be sent **before the guest was asked**: writes
//! that the log told of later stay. docs/migration.md has the argument, `tests/selection.rs` the
//! model.

use std::collections::BTreeMap;

use page_set::PageSet;

use crate::dirty::{DirtyBitmap, Word};
use crate::layout::GuestLayout;
use crate::traits::FreePages;

/// What is left to be sent of a guest.
#[derive(Clone, Debug)]
pub struct Selection {
    pending: DirtyBitmap,
    /// Pages that were sent at least once: the others read as zeros at the destination.
    sent: DirtyBitmap,
    /// Pages to be filled with a pattern instead of being sent. Disjoint from one another.
    fills: BTreeMap<u32, PageSet>,
    /// How often writes were added.
    additions: u64,
}

/// That the guest is going to be asked now: answers to it may take away only what is to be sent at
/// this moment.
#[derive(Clone, Copy, Debug)]
pub struct SelectionMark {
    additions: u64,
}

/// What one round has to send.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Pages, 64 to a word.
    pub words: Vec<Word>,
    /// How many pages that is.
    pub pages: u64,
    /// Pages that are to read as a pattern of four bytes, little-endian; none is in `words`.
    pub fills: BTreeMap<u32, PageSet>,
}

impl Selection {
    /// Every page of a guest is to be sent, to a destination whose memory reads as zeros.
    #[must_use]
    pub fn all(layout: &GuestLayout) -> Self {
        Self {
            pending: DirtyBitmap::all(layout),
            sent: DirtyBitmap::none(layout),
            fills: BTreeMap::new(),
            additions: 0,
        }
    }

    /// Pages that were written, by the log's word: they are to be sent, whatever was said of them.
    pub fn add_written(&mut self, written: &DirtyBitmap) {
        self.additions += 1;
        self.pending.union_with(written);
    }

    /// Must be called after the log was last read ([`add_written`](Self::add_written)) and before
    /// the guest is asked.
    #[must_use]
    pub const fn mark(&self) -> SelectionMark {
        SelectionMark { additions: self.additions }
    }

    /// Takes away what the guest says it does not use; returns how many pages were to be sent and
    /// are not any more. Pages that do not exist are left out.
    ///
    /// Nothing is taken away where writes were added since the guest was asked: those among them
    /// that came after the answer could not be told from the others.
    pub fn skip(&mut self, asked: SelectionMark, unused: &FreePages) -> u64 {
        if asked.additions != self.additions {
            return 0;
        }
        let skipped = self.pending.subtract(&unused.pages);
        let fill = if unused.pattern == 0 {
            // Zeros are there already where nothing was ever sent.
            self.sent.clone().subtract(&skipped)
        } else {
            skipped.clone()
        };
        for set in self.fills.values_mut() {
            set.subtract(&fill);
        }
        self.fills.entry(unused.pattern).or_default().union_with(&fill);
        skipped.len()
    }

    /// How many pages are to be sent.
    #[must_use]
    pub fn pending_pages(&self) -> u64 {
        self.pending.count()
    }

    /// Everything that is to be sent now; afterwards nothing is. If the round fails, so does the
    /// migration.
    pub fn take_round(&mut self) -> Plan {
        let words: Vec<Word> = self.pending.words().collect();
        let pages = words.iter().map(|word| u64::from(word.bits.count_ones())).sum();
        let mut fills = std::mem::take(&mut self.fills);
        for set in fills.values_mut() {
            // Written since: the contents count, and order between connections does not exist.
            let written = self.pending.clone().subtract(set);
            set.subtract(&written);
            set.ranges().for_each(|range| self.sent.insert(range));
        }
        fills.retain(|_, set| !set.is_empty());
        self.sent.union_with(&self.pending);
        self.pending.clear();
        Plan { words, pages, fills }
    }
}

#[cfg(test)]
mod tests {
    use page_set::PageRange;

    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    fn free(start: u64, pages: u64, pattern: u32) -> FreePages {
        FreePages { pages: PageSet::from(range(start, pages)), pattern }
    }

    fn layout() -> GuestLayout {
        GuestLayout::new(vec![range(0, 200)]).unwrap()
    }

    fn written(start: u64, pages: u64) -> DirtyBitmap {
        let mut written = DirtyBitmap::none(&layout());
        written.insert(range(start, pages));
        written
    }

    #[test]
    fn free_pages_cost_nothing_before_the_first_round() {
        let mut selection = Selection::all(&layout());
        let asked = selection.mark();
        assert_eq!(selection.skip(asked, &free(100, 1000, 0)), 100);
        let plan = selection.take_round();
        assert_eq!((plan.pages, plan.fills.len()), (100, 0));
        assert_eq!(selection.pending_pages(), 0);
    }

    #[test]
    fn writes_are_sent_whatever_is_free() {
        let mut selection = Selection::all(&layout());
        let asked = selection.mark();
        selection.add_written(&written(150, 1));
        assert_eq!(selection.skip(asked, &free(100, 100, 0)), 0, "the log was read after asking");
        let asked = selection.mark();
        assert_eq!(selection.skip(asked, &free(100, 100, 0)), 100);
        selection.add_written(&written(150, 1));
        assert_eq!(selection.take_round().pages, 101);
    }

    #[test]
    fn what_is_free_later_is_made_zero() {
        let mut selection = Selection::all(&layout());
        selection.take_round();
        selection.add_written(&written(10, 20));
        let asked = selection.mark();
        assert_eq!(selection.skip(asked, &free(15, 100, 0)), 15);
        selection.add_written(&written(16, 1));
        let plan = selection.take_round();
        assert_eq!(plan.pages, 6);
        let zeros = PageSet::from_iter([range(15, 1), range(17, 13)]);
        assert_eq!(plan.fills, BTreeMap::from([(0, zeros)]));
    }

    #[test]
    fn poisoned_pages_are_filled_with_poison() {
        let mut selection = Selection::all(&layout());
        let asked = selection.mark();
        selection.skip(asked, &free(0, 10, 0xaaaa_aaaa));
        selection.skip(asked, &free(5, 10, 0));
        let plan = selection.take_round();
        assert_eq!(plan.pages, 185);
        assert_eq!(plan.fills, BTreeMap::from([(0xaaaa_aaaa, PageSet::from(range(0, 10)))]));
    }
}
