//! Inserts bitmaps and lists in their wire format.

use crate::bits::{BITS, Bits512};
use crate::range::{PAGE_NUMBER_END, PageRange};
use crate::set::{PageSet, locate};
use crate::slab::{CHUNK_PAGES, Slab};
use crate::{PageSetError, SLAB_PAGES};

/// Bits in a bitmap word.
const WORD_BITS: u64 = u64::BITS as u64;
/// Words of pages in a chunk.
const CHUNK_WORDS: u64 = BITS as u64 / WORD_BITS;
/// Words of chunks in a slab.
const SLAB_CHUNK_WORDS: u64 = BITS as u64 / WORD_BITS;

impl PageSet {
    /// Adds the blocks whose bits are set: bit `i` of word `w` stands for the
    /// `granule_pages` pages at `start_page + (64 * w + i) * granule_pages`.
    /// Returns how many pages were new.
    ///
    /// Linear in the words. Granules of one page and of 512 pages (2 MiB) are inserted
    /// by whole words, others by runs of set bits. Zero words are only read.
    ///
    /// # Errors
    /// [`PageSetError::GranuleNotPowerOfTwo`] and
    /// [`PageSetError::StartNotAligned`] before anything is added;
    /// [`PageSetError::PastEnd`] at the first word with a set bit beyond page
    /// 2^52: words before it have been added.
    pub fn insert_bitmap(
        &mut self,
        start_page: u64,
        granule_pages: u64,
        words: impl IntoIterator<Item = u64>,
    ) -> Result<u64, PageSetError> {
        if !granule_pages.is_power_of_two() {
            return Err(PageSetError::GranuleNotPowerOfTwo { granule_pages });
        }
        if !start_page.is_multiple_of(granule_pages) {
            return Err(PageSetError::StartNotAligned { start: start_page, granule_pages });
        }
        PageRange::new(start_page, 0)?;
        let words = words.into_iter();
        let before = self.len();
        match granule_pages {
            1 => self.insert_page_words(start_page, words)?,
            crate::CHUNK_PAGES => self.insert_chunk_words(start_page, words)?,
            _ => self.insert_runs(start_page, granule_pages, words)?,
        }
        Ok(self.len() - before)
    }

    /// Adds single pages, in any order, for lists of page numbers. Returns how many
    /// were new.
    ///
    /// Consecutive pages of one 2 MiB chunk, in any order, cost a few nanoseconds each;
    /// [`insert`](Self::insert) page by page would look up the slab for each.
    ///
    /// # Errors
    /// [`PageSetError::PastEnd`] at the first page beyond 2^52: pages
    /// before it have been added.
    pub fn insert_pages(
        &mut self,
        pages: impl IntoIterator<Item = u64>,
    ) -> Result<u64, PageSetError> {
        let before = self.len();
        let mut writer = Writer::new(self);
        let mut open = (0, Bits512::EMPTY);
        let mut result = Ok(());
        for page in pages {
            if page >= PAGE_NUMBER_END {
                result = Err(PageSetError::PastEnd { start: page, pages: 1 });
                break;
            }
            let chunk = page / crate::CHUNK_PAGES;
            if chunk != open.0 {
                writer.or_chunk(open.0, open.1);
                open = (chunk, Bits512::EMPTY);
            }
            open.1.set(in_block(page, crate::CHUNK_PAGES));
        }
        writer.or_chunk(open.0, open.1);
        drop(writer);
        result.map(|()| self.len() - before)
    }

    /// One bit per page: words are gathered into chunks, and each chunk is inserted at once.
    fn insert_page_words(
        &mut self,
        start_page: u64,
        words: impl Iterator<Item = u64>,
    ) -> Result<(), PageSetError> {
        let mut writer = Writer::new(self);
        let mut open = (0, Bits512::EMPTY);
        for (index, word) in Aligned::new(start_page, words) {
            if index >= PAGE_NUMBER_END / WORD_BITS {
                writer.or_chunk(open.0, open.1);
                return Err(past_end(index, 1));
            }
            if index / CHUNK_WORDS != open.0 {
                writer.or_chunk(open.0, open.1);
                open = (index / CHUNK_WORDS, Bits512::EMPTY);
            }
            open.1.or_word(in_block(index, CHUNK_WORDS), word);
        }
        writer.or_chunk(open.0, open.1);
        Ok(())
    }

    /// One bit per chunk: words go directly into the slabs' full bits.
    fn insert_chunk_words(
        &mut self,
        start_page: u64,
        words: impl Iterator<Item = u64>,
    ) -> Result<(), PageSetError> {
        let mut writer = Writer::new(self);
        for (index, word) in Aligned::new(start_page / crate::CHUNK_PAGES, words) {
            if index >= PAGE_NUMBER_END / crate::CHUNK_PAGES / WORD_BITS {
                return Err(past_end(index, crate::CHUNK_PAGES));
            }
            let chunks = Bits512::with_word(in_block(index, SLAB_CHUNK_WORDS), word);
            writer.slab(index / SLAB_CHUNK_WORDS).or_full_chunks(chunks);
        }
        Ok(())
    }

    /// Any granule: each run of set bits is one range.
    fn insert_runs(
        &mut self,
        start_page: u64,
        granule_pages: u64,
        words: impl Iterator<Item = u64>,
    ) -> Result<(), PageSetError> {
        let overflow = PageSetError::PastEnd { start: start_page, pages: granule_pages };
        for (index, word) in (0u64..).zip(words) {
            let mut rest = word;
            while rest != 0 {
                let bit = rest.trailing_zeros();
                let run = (!(rest >> bit)).trailing_zeros();
                let start = index
                    .checked_mul(WORD_BITS)
                    .and_then(|bits| bits.checked_add(u64::from(bit)))
                    .and_then(|blocks| blocks.checked_mul(granule_pages))
                    .and_then(|pages| pages.checked_add(start_page))
                    .ok_or(overflow)?;
                let pages = u64::from(run).checked_mul(granule_pages).ok_or(overflow)?;
                self.insert(PageRange::new(start, pages)?);
                rest &= u64::MAX.checked_shl(bit + run).unwrap_or(0);
            }
        }
        Ok(())
    }
}

fn past_end(word: u64, granule_pages: u64) -> PageSetError {
    let pages = WORD_BITS * granule_pages;
    PageSetError::PastEnd { start: word.saturating_mul(pages), pages }
}

#[expect(clippy::cast_possible_truncation, reason = "a remainder of a small number")]
fn in_block(index: u64, per_block: u64) -> usize {
    (index % per_block) as usize
}

/// Aligns words that start at any bit. Yields the words that are not zero, each with
/// its index counted from bit zero.
struct Aligned<I> {
    words: I,
    index: u64,
    shift: u32,
    carry: u64,
    ended: bool,
}

impl<I: Iterator<Item = u64>> Aligned<I> {
    fn new(start_bit: u64, words: I) -> Self {
        let shift = (start_bit % WORD_BITS) as u32;
        Self { words, index: start_bit / WORD_BITS, shift, carry: 0, ended: false }
    }
}

impl<I: Iterator<Item = u64>> Iterator for Aligned<I> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while !self.ended {
            let word = self.words.next();
            self.ended = word.is_none();
            let word = word.unwrap_or(0);
            let low = word << self.shift | self.carry;
            self.carry = word.checked_shr(u64::BITS - self.shift).unwrap_or(0);
            let index = self.index;
            self.index += 1;
            if low != 0 {
                return Some((index, low));
            }
        }
        None
    }
}

/// Keeps the slab that is being written outside the map, so that a run of words costs
/// one look-up per gigabyte. Puts it back on drop.
struct Writer<'a> {
    set: &'a mut PageSet,
    number: u64,
    /// `None` if the slab does not exist and nothing was written to it yet.
    slab: Option<Slab>,
}

impl<'a> Writer<'a> {
    fn new(set: &'a mut PageSet) -> Self {
        let slab = set.detach(0);
        Self { set, number: 0, slab }
    }

    fn slab(&mut self, number: u64) -> &mut Slab {
        if number != self.number {
            self.put_back();
            self.slab = self.set.detach(number);
            self.number = number;
        }
        self.slab.get_or_insert_with(Slab::empty)
    }

    fn put_back(&mut self) {
        if let Some(slab) = self.slab.take() {
            self.set.attach(self.number, slab);
        }
    }

    fn or_chunk(&mut self, chunk: u64, bits: Bits512) {
        if !bits.is_empty() {
            let (number, page) = locate(chunk * CHUNK_PAGES as u64);
            self.slab(number).or_chunk(page / CHUNK_PAGES, bits);
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.put_back();
    }
}

const _: () = assert!(SLAB_CHUNK_WORDS * WORD_BITS * crate::CHUNK_PAGES == SLAB_PAGES);
