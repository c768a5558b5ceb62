//! Contents: 64 pages of memory, ranges that read as a pattern, parts of a machine's state.
//!
//! Contents have an end-to-end checksum: the source computes it from the copy that it read from the
//! guest, before compression, and the destination checks it after decompression, just before it
//! writes to the guest. It is seeded with the place, so that contents under another page's number
//! are detected.

use page_set::PageRange;
use rapidhash::v3::{RapidSecrets, rapidhash_v3_seeded};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::codec::{Reader, Writer};
use crate::dirty::Word;
use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::limits::{MAX_FILL_RANGES, MAX_NAME_BYTES, MAX_PAYLOAD_BYTES, MAX_STATE_BYTES};

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A round ends because it announced its pages; frames without a page could continue infinitely.
const NO_PAGE: MigrationError = MigrationError::Peer { what: "a frame that names no page" };

/// Compression of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Raw,
    Zstd,
}

/// Pages of one word of the dirty bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) round: u32,
    pub(crate) encoding: Encoding,
    /// The page of bit 0.
    pub(crate) start: u64,
    /// Pages whose contents are in the payload, in order.
    pub(crate) data: u64,
    /// Pages that are zeros. The chunk does not concern pages in neither.
    pub(crate) zeros: u64,
    /// Checksum of the uncompressed contents.
    pub(crate) sum: u64,
}

impl Chunk {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let encoding = match self.encoding {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
        };
        let body = Writer::default().u32(self.round).u32(encoding).u64(self.start);
        body.u64(self.data).u64(self.zeros).u64(self.sum).0
    }

    /// Decodes a chunk that lies in `layout` and belongs to `round`.
    pub(crate) fn decode(
        body: &[u8],
        layout: &GuestLayout,
        round: u32,
    ) -> Result<Self, MigrationError> {
        let mut body = Reader::new(body);
        let its_round = body.u32()?;
        let encoding = match body.u32()? {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            _ => return Err(MigrationError::Peer { what: "an unknown compression" }),
        };
        let (start, data, zeros, sum) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        body.finish()?;
        if its_round != round {
            return Err(MigrationError::Peer { what: "pages of another round" });
        }
        if data & zeros != 0 {
            return Err(MigrationError::Peer { what: "a page both with contents and zero" });
        }
        let outside = MigrationError::Peer { what: "pages outside the guest's memory" };
        let all = Word { start, bits: data | zeros };
        if all.bits == 0 {
            return Err(NO_PAGE);
        }
        let mut counted = 0;
        for run in all.runs() {
            if !layout.holds(run) {
                return Err(outside);
            }
            counted += run.pages();
        }
        // The iterator skips runs beyond the largest page number.
        if counted != u64::from(all.bits.count_ones()) {
            return Err(outside);
        }
        Ok(Self { round, encoding, start, data, zeros, sum })
    }

    /// Bytes of the uncompressed contents.
    pub(crate) const fn content_bytes(&self) -> usize {
        self.data.count_ones() as usize * PAGE_BYTES
    }

    /// The checksum of `contents` in this chunk.
    pub(crate) fn sum_of(&self, contents: &[u8]) -> u64 {
        content_sum(contents, [u64::from(self.round), self.start, self.data, self.zeros])
    }

    pub(crate) const fn data_word(&self) -> Word {
        Word { start: self.start, bits: self.data }
    }

    pub(crate) const fn zero_word(&self) -> Word {
        Word { start: self.start, bits: self.zeros }
    }
}

/// rapidhash multiplies words, so it is fast without vector instructions too: XXH3 took a sixth of
/// the time of a migration on an emulated CPU.
pub(crate) fn content_sum(contents: &[u8], place: [u64; 4]) -> u64 {
    let key: Vec<u8> = place.iter().flat_map(|part| part.to_le_bytes()).collect();
    let secrets = RapidSecrets::seed_cpp(xxh3_64_with_seed(&key, 0));
    rapidhash_v3_seeded(contents, &secrets)
}

/// Ranges that read as a pattern of four bytes, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fill {
    pub(crate) round: u32,
    pub(crate) pattern: u32,
    /// Each in one region, at most [`MAX_FILL_RANGES`].
    pub(crate) ranges: Vec<PageRange>,
}

impl Fill {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = Writer::default().u32(self.round).u32(self.pattern);
        let body = body.count(self.ranges.len()).u32(0);
        let each = |body: Writer, range: &PageRange| body.u64(range.start()).u64(range.pages());
        self.ranges.iter().fold(body, each).0
    }

    pub(crate) fn decode(
        body: &[u8],
        layout: &GuestLayout,
        round: u32,
    ) -> Result<Self, MigrationError> {
        let mut body = Reader::new(body);
        let (its_round, pattern) = (body.u32()?, body.u32()?);
        let count = body.count(MAX_FILL_RANGES)?;
        body.reserved(4)?;
        if its_round != round {
            return Err(MigrationError::Peer { what: "pages of another round" });
        }
        let mut ranges = Vec::new();
        for _ in 0..count {
            let range = PageRange::new(body.u64()?, body.u64()?).ok();
            let range = range.filter(|range| !range.is_empty() && layout.holds(*range));
            let outside = MigrationError::Peer { what: "pages outside the guest's memory" };
            ranges.push(range.ok_or(outside)?);
        }
        body.finish()?;
        if ranges.is_empty() { Err(NO_PAGE) } else { Ok(Self { round, pattern, ranges }) }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.pages()))
    }
}

/// A part of one state section; its bytes are the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatePart {
    /// Index of the section, from 0.
    pub(crate) index: u32,
    pub(crate) version: u32,
    /// Bytes of the whole section, and the offset of these.
    pub(crate) total: u64,
    pub(crate) offset: u64,
    pub(crate) sum: u64,
    pub(crate) name: String,
}

impl StatePart {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = Writer::default().u32(self.index).u32(self.version);
        let body = body.u64(self.total).u64(self.offset).u64(self.sum);
        body.text(&self.name, MAX_NAME_BYTES).0
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, MigrationError> {
        let mut body = Reader::new(body);
        let (index, version) = (body.u32()?, body.u32()?);
        let (total, offset, sum) = (body.u64()?, body.u64()?, body.u64()?);
        let name = body.text(MAX_NAME_BYTES)?;
        body.finish()?;
        if total > MAX_STATE_BYTES {
            return Err(MigrationError::Peer { what: "more state than the limit" });
        }
        Ok(Self { index, version, total, offset, sum, name })
    }

    pub(crate) fn sum_of(&self, bytes: &[u8]) -> u64 {
        content_sum(
            bytes,
            [u64::from(self.index), u64::from(self.version), self.total, self.offset],
        )
    }
}

/// Compresses contents if that makes them smaller.
pub(crate) struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    /// `level` is zstd's, 1 to 19.
    pub(crate) fn new(level: i32) -> Result<Self, MigrationError> {
        let compressor = zstd::bulk::Compressor::new(level);
        compressor
            .map(Self)
            .map_err(|source| MigrationError::Link { what: "starting zstd", source })
    }

    /// Returns the compressed contents, if they are smaller.
    pub(crate) fn compress<'a>(
        &mut self,
        contents: &[u8],
        space: &'a mut Vec<u8>,
    ) -> Option<&'a [u8]> {
        // zstd fails if its output does not fit the size of the contents.
        space.resize(contents.len(), 0);
        let len = self.0.compress_to_buffer(contents, space.as_mut_slice()).ok()?;
        space.get(..len).filter(|compressed| compressed.len() < contents.len())
    }
}

/// Decompresses contents of a known size.
pub(crate) struct Decompressor(zstd::bulk::Decompressor<'static>);

impl Decompressor {
    pub(crate) fn new() -> Result<Self, MigrationError> {
        let decompressor = zstd::bulk::Decompressor::new();
        decompressor
            .map(Self)
            .map_err(|source| MigrationError::Link { what: "starting zstd", source })
    }

    /// The checked contents of `chunk`: `payload`, decompressed if necessary.
    pub(crate) fn decompress<'a>(
        &mut self,
        chunk: &Chunk,
        payload: &'a [u8],
        space: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], MigrationError> {
        let bytes = chunk.content_bytes();
        debug_assert!(bytes <= MAX_PAYLOAD_BYTES);
        let contents = match chunk.encoding {
            Encoding::Raw => payload,
            Encoding::Zstd => {
                space.resize(bytes, 0);
                let len = self.0.decompress_to_buffer(payload, space.as_mut_slice());
                let bad = |_| MigrationError::Peer { what: "contents cannot be decompressed" };
                space.get(..len.map_err(bad)?).unwrap_or_default()
            }
        };
        if contents.len() != bytes {
            return Err(MigrationError::Peer { what: "contents of another size than announced" });
        }
        if chunk.sum_of(contents) != chunk.sum {
            return Err(MigrationError::Damaged { what: "memory" });
        }
        Ok(contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> GuestLayout {
        GuestLayout::new(vec![PageRange::new(0, 64).unwrap(), PageRange::new(100, 10).unwrap()])
            .unwrap()
    }

    fn chunk() -> Chunk {
        let encoding = Encoding::Raw;
        Chunk { round: 2, encoding, start: 0, data: 0b101, zeros: 0b10, sum: 0 }
    }

    #[test]
    fn chunks_outside_memory_or_of_another_round_are_refused() {
        assert_eq!(Chunk::decode(&chunk().encode(), &layout(), 2).unwrap(), chunk());
        let refused =
            |chunk: Chunk, round| Chunk::decode(&chunk.encode(), &layout(), round).is_err();
        assert!(refused(chunk(), 3));
        assert!(refused(Chunk { zeros: 1, ..chunk() }, 2));
        assert!(refused(Chunk { start: 62, ..chunk() }, 2));
        assert!(refused(Chunk { start: u64::MAX - 1, ..chunk() }, 2));
        assert!(refused(Chunk { start: (1 << 52) - 1, ..chunk() }, 2));
        assert!(!refused(Chunk { start: 107, ..chunk() }, 2));
        for start in [0, u64::MAX] {
            assert!(refused(Chunk { start, data: 0, zeros: 0, ..chunk() }, 2), "no page");
        }
    }

    #[test]
    fn fills_outside_memory_are_refused() {
        let range = |start, pages| PageRange::new(start, pages).unwrap();
        let fill = |ranges| Fill { round: 1, pattern: 0xaaaa_aaaa, ranges };
        let good = fill(vec![range(0, 64), range(101, 2)]);
        assert_eq!(good.pages(), 66);
        assert_eq!(Fill::decode(&good.encode(), &layout(), 1).unwrap(), good);
        assert!(Fill::decode(&fill(vec![]).encode(), &layout(), 1).is_err(), "no page");
        for bad in [range(63, 2), range(64, 36), range(5, 0)] {
            assert!(Fill::decode(&fill(vec![bad]).encode(), &layout(), 1).is_err());
        }
    }

    #[test]
    fn changed_or_misplaced_contents_are_detected() {
        let contents: Vec<u8> = (0..2 * PAGE_BYTES).map(|i| (i / 100).to_le_bytes()[0]).collect();
        let mut good = chunk();
        good.sum = good.sum_of(&contents);
        let mut decompressor = Decompressor::new().unwrap();
        let mut space = Vec::new();
        assert!(decompressor.decompress(&good, &contents, &mut space).is_ok());
        let mut changed = contents.clone();
        changed[5000] ^= 1;
        assert!(decompressor.decompress(&good, &changed, &mut space).is_err());
        assert!(decompressor.decompress(&good, &contents[1..], &mut space).is_err());
        // The same contents under another number.
        assert!(
            decompressor.decompress(&Chunk { start: 1, ..good }, &contents, &mut space).is_err()
        );

        let mut compressed = Vec::new();
        let compressed =
            Compressor::new(1).unwrap().compress(&contents, &mut compressed).unwrap().to_vec();
        let zstd = Chunk { encoding: Encoding::Zstd, ..good };
        assert_eq!(decompressor.decompress(&zstd, &compressed, &mut space).unwrap(), contents);
        // Contents that decompress to more than announced are refused.
        let less = Chunk { data: 1, ..zstd };
        assert!(decompressor.decompress(&less, &compressed, &mut space).is_err());
        assert!(decompressor.decompress(&zstd, &compressed[..20], &mut space).is_err());
    }

    #[test]
    fn incompressible_contents_are_not_compressed() {
        let mut seed = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_le_bytes()[4]
        })
        .take(PAGE_BYTES)
        .collect();
        assert!(Compressor::new(1).unwrap().compress(&noise, &mut Vec::new()).is_none());
    }

    #[test]
    fn the_size_of_state_is_limited() {
        let name = "cpu0".to_owned();
        let part = StatePart { index: 1, version: 2, total: 10, offset: 4, sum: 0, name };
        assert_eq!(StatePart::decode(&part.encode()).unwrap(), part);
        let more = StatePart { total: MAX_STATE_BYTES + 1, ..part };
        assert!(StatePart::decode(&more.encode()).is_err());
    }
}
