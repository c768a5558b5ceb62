//! Free pages as a bitmap, generated while it is sent.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use page_set::{PageRange, PageSet};

/// Bytes generated at once: the bits of 2 GiB. A whole number of the set's slabs, unless a region
/// boundary falls between.
const CHUNK_BYTES: usize = 64 * 1024;

/// Header: number of the first page of guest memory.
pub const FIRST_PAGE_HEADER: &str = "aerostat-first-page";
/// Header: number of pages of guest memory, that is, bits in the bitmap.
pub const PAGES_HEADER: &str = "aerostat-pages";
/// Header: the regions of guest memory as decimal `first+pages`, separated by commas.
pub const REGIONS_HEADER: &str = "aerostat-regions";
/// Header: ID of the request.
pub const ID_HEADER: &str = "aerostat-request-id";

/// One bit for each page of guest memory, in ascending order, from bit 0 of byte 0. Holes between
/// regions have no bits.
pub(crate) struct Bitmap {
    free: Arc<PageSet>,
    /// Regions not sent yet, in reverse order.
    rest: Vec<PageRange>,
    left_bytes: u64,
}

impl Bitmap {
    pub(crate) fn new(regions: &[PageRange], free: Arc<PageSet>) -> Self {
        let rest = regions.iter().rev().copied().collect();
        Self { free, rest, left_bytes: pages(regions).div_ceil(8) }
    }

    /// Returns the next bytes, at most [`CHUNK_BYTES`].
    fn next_chunk(&mut self) -> Option<Bytes> {
        let len = usize::try_from(self.left_bytes).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        if len == 0 {
            return None;
        }
        let mut bytes = vec![0u8; len];
        let (mut bit, bits) = (0, len as u64 * 8);
        while bit < bits {
            let Some(region) = self.rest.pop() else { break };
            let (now, later) = region.split_at(region.start().saturating_add(bits - bit));
            for run in self.free.ranges_in(now) {
                let from = bit + (run.start() - now.start());
                set_bits(&mut bytes, from, from + run.pages());
            }
            bit += now.pages();
            if !later.is_empty() {
                self.rest.push(later);
            }
        }
        self.left_bytes -= len as u64;
        Some(bytes.into())
    }
}

/// Returns the number of pages in all regions.
pub(crate) fn pages(regions: &[PageRange]) -> u64 {
    regions.iter().fold(0, |sum, range| sum.saturating_add(range.pages()))
}

/// Formats the value of [`REGIONS_HEADER`].
pub(crate) fn regions_text(regions: &[PageRange]) -> String {
    let all: Vec<_> =
        regions.iter().map(|range| format!("{}+{}", range.start(), range.pages())).collect();
    all.join(",")
}

fn set_bits(bytes: &mut [u8], from: u64, end: u64) {
    let place = |bit: u64| usize::try_from(bit / 8).unwrap_or(usize::MAX);
    let (first, last) = (place(from), place(end));
    let (low, high) = (0xffu8 << (from % 8), !(0xffu8 << (end % 8)));
    if first == last {
        bytes[first] |= low & high;
        return;
    }
    bytes[first] |= low;
    bytes[first + 1..last].fill(0xff);
    if high != 0 {
        bytes[last] |= high;
    }
}

impl Body for Bitmap {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.get_mut().next_chunk().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(regions: &[PageRange], free: PageSet) -> Vec<u8> {
        let mut bitmap = Bitmap::new(regions, Arc::new(free));
        let mut bytes = Vec::new();
        while let Some(chunk) = bitmap.next_chunk() {
            assert!(chunk.len() <= CHUNK_BYTES);
            bytes.extend(chunk);
        }
        bytes
    }

    proptest! {
        #[test]
        fn each_page_has_its_bit(
            gaps in prop::collection::vec((1..300u64, 1..300u64), 1..4),
            free in prop::collection::vec((0..2000u64, 1..100u64), 0..20),
        ) {
            let mut regions = Vec::new();
            let mut at = 0;
            for (gap, pages) in gaps {
                regions.push(PageRange::new(at + gap, pages).unwrap());
                at += gap + pages;
            }
            let runs = free.iter().map(|(start, pages)| PageRange::new(*start, *pages).unwrap());
            let free: PageSet = runs.collect();
            let all: Vec<u64> = regions.iter().flat_map(|r| r.start()..r.end()).collect();
            let bytes = whole(&regions, free.clone());
            prop_assert_eq!(bytes.len(), all.len().div_ceil(8));
            for bit in 0..bytes.len() * 8 {
                let set = bytes[bit / 8] >> (bit % 8) & 1 == 1;
                prop_assert_eq!(set, all.get(bit).is_some_and(|page| free.contains(*page)));
            }
        }
    }

    #[test]
    fn the_bitmap_of_a_large_guest_is_sent_in_bounded_chunks() {
        let pages = 3 * CHUNK_BYTES as u64 * 8 + 5;
        let regions = [PageRange::new(7, pages).unwrap()];
        let last = PageRange::new(7 + pages - 1, 1).unwrap();
        let bytes = whole(&regions, PageSet::from_iter([last]));
        assert_eq!(bytes.len(), 3 * CHUNK_BYTES + 1);
        assert_eq!(bytes.iter().position(|byte| *byte != 0), Some(3 * CHUNK_BYTES));
        assert_eq!(bytes[3 * CHUNK_BYTES], 1 << 4);
    }
}
