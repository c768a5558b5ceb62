//! Page-bitmap records: the message format of `PAGE_BITMAP`.
//!
//! ```text
//!  63      58 57           52 51                                     0
//! +----------+---------------+----------------------------------------+
//! |  words   | granule_shift |               start_pfn                |  u64, little-endian
//! +----------+---------------+----------------------------------------+
//! |  words x u64 bitmap, little-endian; bit i of the bitmap names     |
//! |  the block of 2^granule_shift bytes i blocks after start_pfn      |
//! +-------------------------------------------------------------------+
//! ```
//!
//! `words == 0` names the single block at `start_pfn`. A message is a sequence of
//! records and nothing else.

use crate::limits::{MAX_GRANULE_SHIFT, MAX_RECORD_PFN, MAX_RECORD_WORDS, MIN_GRANULE_SHIFT};
use crate::page::{BALLOON_PAGE_SHIFT, Pfn};

/// Bytes of a header, and of a bitmap word.
pub const WORD_BYTES: usize = 8;

const START_BITS: u32 = 52;
const SHIFT_BITS: u32 = 6;
const FIELD_MASK: u64 = (1 << SHIFT_BITS) - 1;

/// The first word of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// First block's first balloon page; a multiple of the granule.
    pub start_pfn: Pfn,
    /// log2 of a block's bytes, within the limits.
    pub granule_shift: u32,
    /// Bitmap words that follow, 0 to 63.
    pub words: usize,
}

/// Why a record is invalid. Always the sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordError {
    /// The message ends within a header or within a bitmap.
    Truncated,
    /// The granule is outside of the limits.
    Granule {
        /// Value in the header.
        granule_shift: u32,
    },
    /// The first page is not aligned to the granule, or needs more than 52 bits.
    Start {
        /// Value in the header.
        start_pfn: Pfn,
    },
    /// More words than fit in six bits (encoding only).
    Words {
        /// Requested number of words.
        words: usize,
    },
}

impl RecordHeader {
    /// Returns the balloon pages of one block.
    pub const fn block_pages(&self) -> u64 {
        1 << (self.granule_shift - BALLOON_PAGE_SHIFT)
    }

    /// Checks and packs the header.
    pub fn to_word(self) -> Result<u64, RecordError> {
        self.check()?;
        Ok(self.start_pfn.0
            | u64::from(self.granule_shift) << START_BITS
            | (self.words as u64) << (START_BITS + SHIFT_BITS))
    }

    /// Unpacks and checks a header.
    pub fn from_word(word: u64) -> Result<Self, RecordError> {
        let header = Self {
            start_pfn: Pfn(word & (MAX_RECORD_PFN - 1)),
            granule_shift: (word >> START_BITS & FIELD_MASK) as u32,
            words: (word >> (START_BITS + SHIFT_BITS)) as usize,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), RecordError> {
        if !(MIN_GRANULE_SHIFT..=MAX_GRANULE_SHIFT).contains(&self.granule_shift) {
            return Err(RecordError::Granule { granule_shift: self.granule_shift });
        }
        if self.start_pfn.0 >= MAX_RECORD_PFN || !self.start_pfn.is_aligned_to(self.block_pages()) {
            return Err(RecordError::Start { start_pfn: self.start_pfn });
        }
        if self.words > MAX_RECORD_WORDS {
            return Err(RecordError::Words { words: self.words });
        }
        Ok(())
    }
}

/// A checked record within a message.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    header: RecordHeader,
    bitmap: &'a [u8],
}

impl<'a> Record<'a> {
    /// The checked header.
    pub const fn header(&self) -> RecordHeader {
        self.header
    }

    /// Iterates over the bitmap words; a record without a bitmap has one word with bit 0 set.
    pub fn words(&self) -> impl Iterator<Item = u64> + Clone + use<'a> {
        let single = (self.header.words == 0).then_some(1);
        let (words, _) = self.bitmap.as_chunks::<WORD_BYTES>();
        words.iter().map(|raw| u64::from_le_bytes(*raw)).chain(single)
    }

    /// Returns the first page of the first named block and the end of the last one, as page
    /// numbers; `None` if the record names no block. The rest of the bitmap may be outside
    /// of guest memory. Cannot overflow, since a start has 52 bits.
    pub fn span(&self) -> Option<(Pfn, Pfn)> {
        let mut named = self.words().enumerate().filter(|(_, word)| *word != 0);
        let (i, word) = named.next()?;
        let first = i as u64 * 64 + u64::from(word.trailing_zeros());
        let (i, word) = named.last().unwrap_or((i, word));
        let end = i as u64 * 64 + 64 - u64::from(word.leading_zeros());
        let pfn = |block| Pfn(self.header.start_pfn.0 + block * self.header.block_pages());
        Some((pfn(first), pfn(end)))
    }
}

/// Iterator over the records of a message; ends after the first error.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Records<'a> {
    /// Starts at the first record of `message`.
    pub const fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn read(&mut self) -> Result<Record<'a>, RecordError> {
        let (raw, rest) =
            self.rest.split_first_chunk::<WORD_BYTES>().ok_or(RecordError::Truncated)?;
        let header = RecordHeader::from_word(u64::from_le_bytes(*raw))?;
        let (bitmap, rest) =
            rest.split_at_checked(header.words * WORD_BYTES).ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(Record { header, bitmap })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.read();
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}

/// Writes a record to the start of `out` and returns its length; `None` if it does not
/// fit.
pub fn encode(
    out: &mut [u8],
    start_pfn: Pfn,
    granule_shift: u32,
    bitmap: &[u64],
) -> Result<Option<usize>, RecordError> {
    let header = RecordHeader { start_pfn, granule_shift, words: bitmap.len() }.to_word()?;
    let len = (bitmap.len() + 1) * WORD_BYTES;
    let Some(out) = out.get_mut(..len) else { return Ok(None) };
    let (slots, _) = out.as_chunks_mut::<WORD_BYTES>();
    for (slot, word) in slots.iter_mut().zip(core::iter::once(&header).chain(bitmap)) {
        *slot = word.to_le_bytes();
    }
    Ok(Some(len))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn one(message: &[u8]) -> Result<Record<'_>, RecordError> {
        let mut records = Records::new(message);
        let record = records.next().expect("a message");
        if record.is_err() {
            assert!(records.next().is_none(), "reading continues after an error");
        }
        record
    }

    #[test]
    fn the_header_is_packed_as_documented() {
        let word = RecordHeader { start_pfn: Pfn(0x400), granule_shift: 22, words: 5 }.to_word();
        assert_eq!(word, Ok(0x400 | 22 << 52 | 5 << 58));
    }

    #[test]
    fn three_gibibytes_of_4_mib_blocks_are_104_bytes() {
        let mut message = [0; 256];
        let len = encode(&mut message, Pfn(0), 22, &[u64::MAX; 12]).unwrap().unwrap();
        assert_eq!(len, 104);
        let record = one(&message[..len]).unwrap();
        assert_eq!(record.span(), Some((Pfn(0), Pfn(3 << 18))));
    }

    #[test]
    fn a_record_without_words_is_one_block() {
        let mut message = [0; 8];
        encode(&mut message, Pfn(512), 21, &[]).unwrap().unwrap();
        let record = one(&message).unwrap();
        assert_eq!(record.words().collect::<Vec<_>>(), [1]);
        assert_eq!(record.span(), Some((Pfn(512), Pfn(1024))));
    }

    #[test]
    fn the_span_covers_only_named_blocks() {
        let mut message = [0; 40];
        encode(&mut message, Pfn(0), 21, &[0, 1 << 3, 1 << 5, 0]).unwrap().unwrap();
        assert_eq!(one(&message).unwrap().span(), Some((Pfn(67 * 512), Pfn(134 * 512))));
        encode(&mut message, Pfn(0), 21, &[0; 4]).unwrap().unwrap();
        assert_eq!(one(&message).unwrap().span(), None);
    }

    #[test]
    fn invalid_records_are_refused() {
        let word =
            |start: u64, shift: u64, words: u64| (start | shift << 52 | words << 58).to_le_bytes();
        assert_eq!(one(&word(1, 21, 0)).unwrap_err(), RecordError::Start { start_pfn: Pfn(1) });
        assert_eq!(one(&word(0, 11, 0)).unwrap_err(), RecordError::Granule { granule_shift: 11 });
        assert_eq!(one(&word(0, 31, 0)).unwrap_err(), RecordError::Granule { granule_shift: 31 });
        assert_eq!(one(&word(0, 63, 63)).unwrap_err(), RecordError::Granule { granule_shift: 63 });
        assert_eq!(one(&word(0, 12, 1)).unwrap_err(), RecordError::Truncated);
        assert_eq!(one(&[0; 7]).unwrap_err(), RecordError::Truncated);
        let top = MAX_RECORD_PFN - 1;
        assert_eq!(one(&word(top, 12, 0)).unwrap().span(), Some((Pfn(top), Pfn(MAX_RECORD_PFN))));
        assert!(
            encode(&mut [0; 1024], Pfn(0), 12, &[1; 64]).is_err(),
            "64 words do not fit in six bits"
        );
        assert_eq!(encode(&mut [0; 15], Pfn(0), 12, &[1]), Ok(None), "the buffer is too short");
    }

    fn records() -> impl Strategy<Value = Vec<(u64, u32, Vec<u64>)>> {
        let record = (
            0..1u64 << 20,
            MIN_GRANULE_SHIFT..=MAX_GRANULE_SHIFT,
            prop::collection::vec(any::<u64>(), 0..=63),
        )
            .prop_map(|(block, shift, words)| (block << (shift - 12), shift, words));
        prop::collection::vec(record, 0..8)
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(records in records()) {
            let mut message = [0; 8 * 64 * WORD_BYTES];
            let mut len = 0;
            for (start, shift, words) in &records {
                len += encode(&mut message[len..], Pfn(*start), *shift, words).unwrap().unwrap();
            }
            let read: Vec<_> = Records::new(&message[..len])
                .map(|record| {
                    let record = record.unwrap();
                    let header = record.header();
                    let mut words: Vec<_> = record.words().collect();
                    if header.words == 0 { words.clear(); }
                    (header.start_pfn.0, header.granule_shift, words)
                })
                .collect();
            prop_assert_eq!(read, records);
        }

        #[test]
        fn any_bytes_can_be_decoded(message in prop::collection::vec(any::<u8>(), 0..2048)) {
            for record in Records::new(&message).flatten() {
                prop_assert!(record.header().start_pfn.0 < MAX_RECORD_PFN);
                if let Some((start, end)) = record.span() {
                    prop_assert!(record.header().start_pfn <= start && start < end);
                }
                prop_assert!(record.words().count() <= MAX_RECORD_WORDS);
            }
        }
    }
}
