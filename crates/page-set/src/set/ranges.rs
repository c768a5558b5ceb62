//! Iterates over a set as runs.

use std::collections::btree_map;

use crate::bits::Bits512;
use crate::range::PageRange;
use crate::set::{PageSet, first_page};
use crate::slab::{CHUNK_PAGES, Chunk, Slab};

/// Iterator over the runs of a [`PageSet`], lowest first; adjacent runs are joined across
/// chunk and slab borders.
pub struct Ranges<'a> {
    pieces: Pieces<'a>,
    /// The run being joined.
    open: Option<PageRange>,
}

impl<'a> Ranges<'a> {
    pub(crate) fn new(set: &'a PageSet) -> Self {
        Self::from_slab(set, 0)
    }

    /// The runs from slab `number` on.
    pub(crate) fn from_slab(set: &'a PageSet, number: u64) -> Self {
        let pieces = Pieces { slabs: set.slabs.range(number..), slab: None, chunk: None };
        Self { pieces, open: None }
    }
}

impl Iterator for Ranges<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        loop {
            let piece = self.pieces.next();
            match (self.open, piece) {
                (Some(open), Some(piece)) if open.end() == piece.start() => {
                    self.open = Some(PageRange::known(open.start(), piece.end()));
                }
                (None, Some(piece)) => self.open = Some(piece),
                (_, piece) => return core::mem::replace(&mut self.open, piece),
            }
        }
    }
}

impl core::iter::FusedIterator for Ranges<'_> {}

/// The runs inside single chunks, and runs of full chunks inside a slab.
struct Pieces<'a> {
    slabs: btree_map::Range<'a, u64, Slab>,
    /// The current slab: its first page, itself, the next chunk.
    slab: Option<(u64, &'a Slab, usize)>,
    /// The current partial chunk: its first page, its bits, the next bit.
    chunk: Option<(u64, Bits512, usize)>,
}

impl Iterator for Pieces<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        loop {
            if let Some((base, bits, next)) = &mut self.chunk {
                if let Some((start, end)) = bits.next_run(*next) {
                    *next = end;
                    return Some(PageRange::known(*base + start as u64, *base + end as u64));
                }
                self.chunk = None;
            }
            let Some((base, slab, next)) = &mut self.slab else {
                let (&number, slab) = self.slabs.next()?;
                self.slab = Some((first_page(number), slab, 0));
                continue;
            };
            let page_of = |chunk: usize| *base + (chunk * CHUNK_PAGES) as u64;
            match slab.next_chunk(*next) {
                Some((chunk, Chunk::FullUntil(end))) => {
                    *next = end;
                    return Some(PageRange::known(page_of(chunk), page_of(end)));
                }
                Some((chunk, Chunk::Partial(bits))) => {
                    self.chunk = Some((page_of(chunk), bits, 0));
                    *next = chunk + 1;
                }
                None => self.slab = None,
            }
        }
    }
}
