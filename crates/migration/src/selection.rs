//! Which pages are sent, and which need not be.
//!
//! At first every page is pending, and a written page becomes pending again. Pages on whose
//! contents the guest does not depend are subtracted. Such an answer is out of date when it
//! arrives, so it may only subtract what was pending **before the guest was queried**: writes that
//! the dirty log reports later stay. docs/migration.md has the argument, `tests/selection.rs` the
//! model.

use std::collections::BTreeMap;

use page_set::PageSet;

use crate::dirty::{DirtyBitmap, Word};
use crate::layout::GuestLayout;
use crate::traits::FreePages;

/// The pending pages of a guest.
#[derive(Clone, Debug)]
pub struct Selection {
    pending: DirtyBitmap,
    /// Pages that were sent at least once. All others read as zeros at the destination.
    sent: DirtyBitmap,
    /// Pages to fill with a pattern instead of sending them. The sets are disjoint.
    fills: BTreeMap<u32, PageSet>,
    /// Number of times that writes were added.
    additions: u64,
}

/// The moment just before the guest is queried. Its answer may subtract only what is pending at
/// this moment.
#[derive(Clone, Copy, Debug)]
pub struct SelectionMark {
    additions: u64,
}

/// The pages of one round.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Pages, 64 to a word.
    pub words: Vec<Word>,
    /// Number of pages in `words`.
    pub pages: u64,
    /// Pages to fill with a pattern of four bytes, little-endian; none is in `words`.
    pub fills: BTreeMap<u32, PageSet>,
}

impl Selection {
    /// Every page is pending, for a destination whose memory reads as zeros.
    #[must_use]
    pub fn all(layout: &GuestLayout) -> Self {
        Self {
            pending: DirtyBitmap::all(layout),
            sent: DirtyBitmap::none(layout),
            fills: BTreeMap::new(),
            additions: 0,
        }
    }

    /// Adds the pages of the dirty log: they are pending, even if they were named as free.
    pub fn add_written(&mut self, written: &DirtyBitmap) {
        self.additions += 1;
        self.pending.union_with(written);
    }

    /// Marks the moment of a query. Call it after the last reading of the dirty log
    /// ([`add_written`](Self::add_written)) and before the guest is queried.
    #[must_use]
    pub const fn mark(&self) -> SelectionMark {
        SelectionMark { additions: self.additions }
    }

    /// Subtracts the pages that the guest does not use; returns how many of them were pending.
    /// Ignores pages that do not exist.
    ///
    /// Subtracts nothing if writes were added since the query: those that followed the answer could
    /// not be distinguished from the others.
    pub fn skip(&mut self, asked: SelectionMark, unused: &FreePages) -> u64 {
        if asked.additions != self.additions {
            return 0;
        }
        let skipped = self.pending.subtract(&unused.pages);
        let fill = if unused.pattern == 0 {
            // Pages that were never sent are zeros already.
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

    /// Number of pending pages.
    #[must_use]
    pub fn pending_pages(&self) -> u64 {
        self.pending.count()
    }

    /// Takes all pending pages for a round. If the round fails, so does the migration.
    pub fn take_round(&mut self) -> Plan {
        let words: Vec<Word> = self.pending.words().collect();
        let pages = words.iter().map(|word| u64::from(word.bits.count_ones())).sum();
        let mut fills = std::mem::take(&mut self.fills);
        for set in fills.values_mut() {
            // Written since: send the contents only, since frames of different connections are not
            // ordered.
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
    fn pages_free_before_the_first_round_are_neither_sent_nor_filled() {
        let mut selection = Selection::all(&layout());
        let asked = selection.mark();
        assert_eq!(selection.skip(asked, &free(100, 1000, 0)), 100);
        let plan = selection.take_round();
        assert_eq!((plan.pages, plan.fills.len()), (100, 0));
        assert_eq!(selection.pending_pages(), 0);
    }

    #[test]
    fn pages_written_after_the_query_are_sent_even_if_free() {
        let mut selection = Selection::all(&layout());
        let asked = selection.mark();
        selection.add_written(&written(150, 1));
        assert_eq!(
            selection.skip(asked, &free(100, 100, 0)),
            0,
            "the log was read after the query"
        );
        let asked = selection.mark();
        assert_eq!(selection.skip(asked, &free(100, 100, 0)), 100);
        selection.add_written(&written(150, 1));
        assert_eq!(selection.take_round().pages, 101);
    }

    #[test]
    fn pages_that_become_free_later_are_zeroed() {
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
