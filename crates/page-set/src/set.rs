//! [`PageSet`].

mod ranges;

use core::fmt;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::range::PageRange;
use crate::slab::{SLAB_PAGES, Slab};

pub use self::ranges::Ranges;

/// Ranges that `Debug` prints before it only prints the number of remaining pages.
const DEBUG_RANGES: usize = 16;

/// A set of 4 KiB page numbers below 2^52. See the crate for structure and cost.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// By gigabyte number; never contains an empty slab.
    pub(crate) slabs: BTreeMap<u64, Slab>,
    pages: u64,
    full_chunks: u64,
}

impl PageSet {
    /// The empty set. Allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { slabs: BTreeMap::new(), pages: 0, full_chunks: 0 }
    }

    /// True if the set is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Number of pages.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.pages
    }

    /// Number of pages that lie in full 2 MiB chunks.
    #[must_use]
    pub const fn full_chunk_pages(&self) -> u64 {
        self.full_chunks * crate::CHUNK_PAGES
    }

    /// The lowest page.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.ranges().next().map(PageRange::start)
    }

    /// True if the set contains `page`.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let (number, offset) = locate(page);
        self.slabs.get(&number).is_some_and(|slab| slab.contains(offset))
    }

    /// Adds a range; returns how many of its pages were new.
    pub fn insert(&mut self, range: PageRange) -> u64 {
        let before = self.pages;
        for (number, start, end) in slab_parts(range) {
            self.edit(number, |slab| {
                if end - start == SLAB_PAGES {
                    *slab = Slab::Full;
                } else {
                    slab.insert(start, end);
                }
            });
        }
        self.pages - before
    }

    /// Removes a range; returns how many of its pages were in the set.
    pub fn remove(&mut self, range: PageRange) -> u64 {
        let before = self.pages;
        let mut from = range.start();
        while let Some((number, start, end)) = self.next_slab(from, range.end()) {
            self.edit(number, |slab| {
                if end - start == SLAB_PAGES {
                    *slab = Slab::empty();
                } else {
                    slab.remove(start, end);
                }
            });
            from = first_page(number + 1);
        }
        before - self.pages
    }

    /// Adds every page of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (&number, theirs) in &other.slabs {
            if let Entry::Vacant(vacant) = self.slabs.entry(number) {
                vacant.insert(theirs.clone());
                self.count(theirs);
            } else {
                self.edit(number, |slab| slab.union_with(theirs));
            }
        }
    }

    /// Removes every page of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for number in self.common_slabs(other) {
            if let Some(theirs) = other.slabs.get(&number) {
                self.edit(number, |slab| slab.subtract(theirs));
            }
        }
    }

    /// True if the sets have a page in common.
    #[must_use]
    pub fn intersects(&self, other: &Self) -> bool {
        self.common_slabs(other).iter().any(|number| {
            match (self.slabs.get(number), other.slabs.get(number)) {
                (Some(a), Some(b)) => a.intersects(b),
                _ => false,
            }
        })
    }

    /// True if the set contains a page of `range`.
    #[must_use]
    pub fn intersects_range(&self, range: PageRange) -> bool {
        let mut from = range.start();
        while let Some((number, start, end)) = self.next_slab(from, range.end()) {
            if self.slabs.get(&number).is_some_and(|slab| slab.intersects_range(start, end)) {
                return true;
            }
            from = first_page(number + 1);
        }
        false
    }

    /// The pages as the fewest runs, lowest first.
    #[must_use]
    pub fn ranges(&self) -> Ranges<'_> {
        Ranges::new(self)
    }

    /// The pages of `range` as the fewest runs, lowest first. Linear in the contents of the
    /// set from the 1 GiB slab in which `range` begins to the end of `range`.
    pub fn ranges_in(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let runs = Ranges::from_slab(self, locate(range.start()).0);
        let inside = runs.take_while(move |run| run.start() < range.end());
        inside.map(move |run| run.intersection(range)).filter(|run| !run.is_empty())
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// Changes slab `number` (a new one if it does not exist) and updates the counts; removes
    /// it if it is empty afterwards.
    pub(crate) fn edit(&mut self, number: u64, change: impl FnOnce(&mut Slab)) {
        let slab = self.slabs.entry(number).or_insert_with(Slab::empty);
        let (pages, full_chunks) = (slab.pages(), slab.full_chunks());
        change(slab);
        self.pages = self.pages - pages + slab.pages();
        self.full_chunks = self.full_chunks - full_chunks + slab.full_chunks();
        if slab.is_empty() {
            self.slabs.remove(&number);
        }
    }

    /// Removes slab `number` from the map and the counts.
    pub(crate) fn detach(&mut self, number: u64) -> Option<Slab> {
        let slab = self.slabs.remove(&number)?;
        self.pages -= slab.pages();
        self.full_chunks -= slab.full_chunks();
        Some(slab)
    }

    /// Adds a slab whose place is empty.
    pub(crate) fn attach(&mut self, number: u64, slab: Slab) {
        if !slab.is_empty() {
            self.count(&slab);
            let old = self.slabs.insert(number, slab);
            debug_assert!(old.is_none(), "slab {number} exists already");
        }
    }

    fn count(&mut self, new: &Slab) {
        self.pages += new.pages();
        self.full_chunks += new.full_chunks();
    }

    /// Numbers of the slabs that both sets may have, by look-ups of the shorter map.
    fn common_slabs(&self, other: &Self) -> Vec<u64> {
        let (short, long) = if self.slabs.len() <= other.slabs.len() {
            (&self.slabs, &other.slabs)
        } else {
            (&other.slabs, &self.slabs)
        };
        short.keys().filter(|number| long.contains_key(number)).copied().collect()
    }

    /// The first slab at or after page `from` and before page `end`, and its part between
    /// them.
    pub(crate) fn next_slab(&self, from: u64, end: u64) -> Option<(u64, usize, usize)> {
        if from >= end {
            return None;
        }
        let (&number, _) = self.slabs.range(locate(from).0..=locate(end - 1).0).next()?;
        Some(part_of(number, from, end))
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

impl Extend<PageRange> for PageSet {
    fn extend<I: IntoIterator<Item = PageRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl From<PageRange> for PageSet {
    fn from(range: PageRange) -> Self {
        Self::from_iter([range])
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = 0;
        let mut out = f.debug_set();
        for range in self.ranges().take(DEBUG_RANGES) {
            shown += range.pages();
            out.entry(&range);
        }
        if shown < self.pages {
            out.entry(&format_args!("and {} pages", self.pages - shown));
        }
        out.finish()
    }
}

/// Number of the slab that contains `page`, and the page's offset in it.
pub(crate) const fn locate(page: u64) -> (u64, usize) {
    (page / crate::SLAB_PAGES, (page % crate::SLAB_PAGES) as usize)
}

/// First page of slab `number`.
pub(crate) const fn first_page(number: u64) -> u64 {
    number * crate::SLAB_PAGES
}

/// Splits `range` at slab borders: slab number, start and end inside the slab.
fn slab_parts(range: PageRange) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut from = range.start();
    core::iter::from_fn(move || {
        if from >= range.end() {
            return None;
        }
        let part = part_of(locate(from).0, from, range.end());
        from = first_page(part.0 + 1);
        Some(part)
    })
}

/// The part of slab `number` that lies in pages `from..end`.
fn part_of(number: u64, from: u64, end: u64) -> (u64, usize, usize) {
    let base = first_page(number);
    let start = from.max(base) - base;
    let end = end.min(base + crate::SLAB_PAGES) - base;
    // Both are at most SLAB_PAGES, so they fit.
    let fit = |n: u64| usize::try_from(n).unwrap_or(SLAB_PAGES);
    (number, fit(start), fit(end))
}
