//! One bit for each page of a guest, in the format of KVM's dirty log.

use page_set::{PageRange, PageSet};

use crate::layout::GuestLayout;

/// Pages of a word.
pub const WORD_PAGES: u64 = 64;

/// A bit for each page of a guest, region by region; bit `i` of a region's words is the page
/// `region.start() + i`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    regions: Vec<RegionBits>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RegionBits {
    pages: PageRange,
    /// Bits behind the last page are clear.
    words: Vec<u64>,
}

/// A word of a bitmap, and its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The page of bit 0.
    pub start: u64,
    /// The bits.
    pub bits: u64,
}

impl DirtyBitmap {
    /// The empty set.
    #[must_use]
    pub fn none(layout: &GuestLayout) -> Self {
        let region = |pages: &PageRange| RegionBits { pages: *pages, words: words_of(*pages, 0) };
        Self { regions: layout.regions().iter().map(region).collect() }
    }

    /// Every page.
    #[must_use]
    pub fn all(layout: &GuestLayout) -> Self {
        let mut all = Self::none(layout);
        for region in &mut all.regions {
            region.words = words_of(region.pages, u64::MAX);
        }
        all
    }

    /// Adds the pages of `words` to region number `region`. Ignores bits behind the region: KVM
    /// rounds the size of its bitmap up.
    pub fn merge(&mut self, region: usize, words: &[u64]) {
        let Some(region) = self.regions.get_mut(region) else { return };
        for (mine, theirs) in region.words.iter_mut().zip(words) {
            *mine |= theirs;
        }
        region.cut_tail();
    }

    /// Adds the pages of `range` that exist.
    pub fn insert(&mut self, range: PageRange) {
        self.each_mask(range, |_, word, mask| *word |= mask);
    }

    /// Adds every page of `other`, which has the same layout.
    pub fn union_with(&mut self, other: &Self) {
        for (number, theirs) in other.regions.iter().enumerate() {
            self.merge(number, &theirs.words);
        }
    }

    /// Removes every page of `pages`; returns those that were in the set.
    ///
    /// AND NOT: all other pages stay.
    pub fn subtract(&mut self, pages: &PageSet) -> PageSet {
        let mut taken = PageSet::new();
        // The last run that was removed, which mostly continues in the next word.
        let mut open = Run::default();
        for index in 0..self.regions.len() {
            let Some(region) = self.regions.get(index).map(|region| region.pages) else { break };
            for run in pages.ranges_in(region) {
                self.each_mask(run, |start, word, mask| {
                    let bits = *word & mask;
                    *word &= !mask;
                    Word { start, bits }.runs().for_each(|run| open.add(run, &mut taken));
                });
            }
        }
        open.close(&mut taken);
        taken
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.regions.iter_mut().for_each(|region| region.words.fill(0));
    }

    /// True if `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let region = self.regions.iter().find(|region| region.pages.contains(page));
        region.is_some_and(|region| {
            let offset = page - region.pages.start();
            let word =
                usize::try_from(offset / WORD_PAGES).ok().and_then(|at| region.words.get(at));
            word.is_some_and(|word| word >> (offset % WORD_PAGES) & 1 == 1)
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The words that are not empty, by address.
    pub fn words(&self) -> impl Iterator<Item = Word> + '_ {
        self.regions.iter().flat_map(|region| {
            let starts = (region.pages.start()..).step_by(64);
            let words = starts.zip(&region.words).map(|(start, &bits)| Word { start, bits });
            words.filter(|word| word.bits != 0)
        })
    }

    /// Calls `change` for each word that `range` overlaps, with the word's first page and the mask
    /// of its pages in the range.
    fn each_mask(&mut self, range: PageRange, mut change: impl FnMut(u64, &mut u64, u64)) {
        for region in &mut self.regions {
            let inside = region.pages.intersection(range);
            let mut from = inside.start().saturating_sub(region.pages.start());
            let end = from + inside.pages();
            while from < end {
                let next = (from / WORD_PAGES + 1) * WORD_PAGES;
                let mask = bits_between(from % WORD_PAGES, end.min(next) - from);
                let at = usize::try_from(from / WORD_PAGES).unwrap_or(usize::MAX);
                if let Some(word) = region.words.get_mut(at) {
                    change(region.pages.start() + next - WORD_PAGES, word, mask);
                }
                from = next;
            }
        }
    }
}

/// A run of pages that is being merged.
#[derive(Default)]
struct Run(Option<PageRange>);

impl Run {
    fn add(&mut self, next: PageRange, to: &mut PageSet) {
        let joined = self.0.filter(|open| open.end() == next.start());
        let joined = joined.and_then(|open| PageRange::from_bounds(open.start(), next.end()).ok());
        if joined.is_none() {
            self.close(to);
        }
        self.0 = Some(joined.unwrap_or(next));
    }

    fn close(&mut self, to: &mut PageSet) {
        if let Some(open) = self.0.take() {
            to.insert(open);
        }
    }
}

impl RegionBits {
    fn cut_tail(&mut self) {
        let rest = self.pages.pages() % WORD_PAGES;
        if rest != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= bits_between(0, rest);
        }
    }
}

/// `count` ones from bit `first` on; 1 to 64, within the word.
const fn bits_between(first: u64, count: u64) -> u64 {
    (u64::MAX >> (WORD_PAGES - count)) << first
}

fn words_of(pages: PageRange, value: u64) -> Vec<u64> {
    let count = usize::try_from(pages.pages().div_ceil(WORD_PAGES)).unwrap_or(usize::MAX);
    let mut region = RegionBits { pages, words: vec![value; count] };
    region.cut_tail();
    region.words
}

impl Word {
    /// The runs of pages whose bits are set, lowest first.
    pub fn runs(self) -> impl Iterator<Item = PageRange> {
        let mut rest = self.bits;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = u64::from(rest.trailing_zeros());
            let count = u64::from((!(rest >> first)).trailing_zeros());
            let count = count.min(WORD_PAGES - first);
            rest &= !bits_between(first, count);
            PageRange::new(self.start.checked_add(first)?, count).ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    fn layout() -> GuestLayout {
        GuestLayout::new(vec![range(3, 130), range(200, 64), range(264, 1)]).unwrap()
    }

    fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
        bitmap.words().flat_map(Word::runs).flat_map(|run| run.start()..run.end()).collect()
    }

    #[test]
    fn all_has_every_page_and_none_has_none() {
        let all = DirtyBitmap::all(&layout());
        assert_eq!(all.count(), 195);
        assert_eq!(pages(&all), (3..133).chain(200..265).collect());
        assert_eq!(DirtyBitmap::none(&layout()).count(), 0);
    }

    #[test]
    fn bits_behind_a_region_are_ignored() {
        let mut bitmap = DirtyBitmap::none(&layout());
        bitmap.merge(0, &[0, 0, u64::MAX, u64::MAX]);
        bitmap.merge(2, &[u64::MAX]);
        bitmap.merge(7, &[u64::MAX]);
        assert_eq!(pages(&bitmap), BTreeSet::from([131, 132, 264]));
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_set(
            steps in prop::collection::vec((any::<bool>(), 0u64..280, 0u64..150), 0..20)
        ) {
            let exists = pages(&DirtyBitmap::all(&layout()));
            let mut bitmap = DirtyBitmap::none(&layout());
            let mut model = BTreeSet::new();
            for (add, start, count) in steps {
                let run = range(start, count);
                let named = (start..start + count).filter(|page| exists.contains(page));
                if add {
                    bitmap.insert(run);
                    model.extend(named);
                } else {
                    let held = named.filter(|page| model.contains(page)).count() as u64;
                    let taken = bitmap.subtract(&PageSet::from(run));
                    prop_assert_eq!(taken.len(), held);
                    prop_assert!(taken.ranges().all(|taken| taken.is_within(run)));
                    model.retain(|page| !run.contains(*page));
                }
                prop_assert_eq!(&pages(&bitmap), &model);
                prop_assert_eq!(bitmap.count(), model.len() as u64);
                prop_assert_eq!(bitmap.contains(start), model.contains(&start));
            }
        }
    }
}
