//! Removes and returns part of a set, for releasing in batches.

use crate::range::PageRange;
use crate::set::{PageSet, first_page};
use crate::slab::SLAB_PAGES;

impl PageSet {
    /// Removes and returns whole 2 MiB chunks, lowest first, at most `max_pages` pages in
    /// total. Partly filled chunks stay.
    ///
    /// Cost: O(slabs) to skip those that have no full chunk.
    pub fn take_full_chunks(&mut self, max_pages: u64) -> Self {
        let mut left = max_pages / crate::CHUNK_PAGES;
        let mut taken = Self::new();
        let mut from = 0;
        while left > 0 && self.full_chunk_pages() > 0 {
            let Some((&number, slab)) =
                self.slabs.range(from..).find(|(_, slab)| slab.full_chunks() > 0)
            else {
                break;
            };
            from = number + 1;
            let full_chunks = slab.full_chunks();
            if full_chunks <= left && full_chunks * crate::CHUNK_PAGES == slab.pages() {
                left -= full_chunks;
                self.move_slab(number, &mut taken);
                continue;
            }
            self.edit(number, |slab| {
                let part = slab.take_full_chunks(left);
                left -= part.full_chunks();
                taken.attach(number, part);
            });
        }
        taken
    }

    /// Removes and returns the lowest pages, at most `max_pages`.
    pub fn take_up_to(&mut self, max_pages: u64) -> Self {
        let mut left = max_pages;
        let mut taken = Self::new();
        while left > 0 {
            let Some((&number, slab)) = self.slabs.first_key_value() else { break };
            if slab.pages() <= left {
                left -= slab.pages();
                self.move_slab(number, &mut taken);
                continue;
            }
            let cut = slab.position_of(left);
            self.split_slab(number, 0, cut, &mut taken);
            break;
        }
        taken
    }

    /// Removes and returns the pages that lie in `range`.
    pub fn take_range(&mut self, range: PageRange) -> Self {
        let mut taken = Self::new();
        let mut from = range.start();
        while let Some((number, start, end)) = self.next_slab(from, range.end()) {
            from = first_page(number + 1);
            if end - start == SLAB_PAGES {
                self.move_slab(number, &mut taken);
            } else {
                self.split_slab(number, start, end, &mut taken);
            }
        }
        taken
    }

    /// A copy of the pages that lie in `range`.
    #[must_use]
    pub fn copy_range(&self, range: PageRange) -> Self {
        let mut copied = Self::new();
        let mut from = range.start();
        while let Some((number, start, end)) = self.next_slab(from, range.end()) {
            from = first_page(number + 1);
            let Some(mut part) = self.slabs.get(&number).cloned() else { continue };
            if end - start < SLAB_PAGES {
                part.remove(0, start);
                part.remove(end, SLAB_PAGES);
            }
            copied.attach(number, part);
        }
        copied
    }

    fn move_slab(&mut self, number: u64, to: &mut Self) {
        if let Some(slab) = self.detach(number) {
            to.attach(number, slab);
        }
    }

    /// Moves pages `start..end` of slab `number`.
    fn split_slab(&mut self, number: u64, start: usize, end: usize, to: &mut Self) {
        self.edit(number, |slab| {
            let mut part = slab.clone();
            part.remove(0, start);
            part.remove(end, SLAB_PAGES);
            slab.remove(start, end);
            to.attach(number, part);
        });
    }
}
