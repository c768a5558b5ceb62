//! Page contents that differ in every page and for every seed.

use std::fmt;

/// Bytes in a page of the guest.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Step between the words of a page: the golden ratio in 64 bits, odd, so words do not repeat.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Fills `buffer` with the contents of the pages that start with number `first_page`.
pub(crate) fn generate(buffer: &mut [u8], seed: u64, first_page: u64) {
    for (page, number) in buffer.chunks_mut(PAGE_BYTES).zip(first_page..) {
        let mut word = page_key(seed, number);
        for bytes in page.chunks_mut(8) {
            word = word.wrapping_add(STEP);
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
    }
}

/// The word that a page of one word repeats.
pub(crate) fn word_of(seed: u64, page: u64) -> u64 {
    page_key(seed, page)
}

/// A page whose contents differ from [`generate`]'s.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WrongPage {
    /// Page number.
    pub(crate) page: u64,
    /// The first byte that differs, and the word around it: zeros mean lost memory, another page's
    /// pattern means memory allocated twice.
    pub(crate) byte: usize,
    pub(crate) found: u64,
    pub(crate) wanted: u64,
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, byte, found, wanted } = self;
        write!(f, "page {page} holds {found:#018x} and not {wanted:#018x} at byte {byte}")
    }
}

/// Returns pages of `found` that differ from [`generate`]'s. `wanted` is scratch space.
pub(crate) fn wrong_pages<'a>(
    found: &'a [u8],
    wanted: &'a mut [u8],
    seed: u64,
    first_page: u64,
) -> impl Iterator<Item = WrongPage> + 'a {
    let wanted = &mut wanted[..found.len()];
    generate(wanted, seed, first_page);
    let pages = found.chunks(PAGE_BYTES).zip(wanted.chunks(PAGE_BYTES)).zip(first_page..);
    pages.filter(|((found, wanted), _)| found != wanted).map(|((found, wanted), page)| {
        let byte = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        let byte = byte.unwrap_or_default();
        WrongPage { page, byte, found: word_at(found, byte), wanted: word_at(wanted, byte) }
    })
}

/// The word of a page that byte `byte` belongs to.
fn word_at(page: &[u8], byte: usize) -> u64 {
    let (words, _) = page.as_chunks::<8>();
    words.get(byte / 8).copied().map_or(0, u64::from_le_bytes)
}

/// A number that differs for every seed and page (the finaliser of SplitMix64).
fn page_key(seed: u64, page: u64) -> u64 {
    let mut key = seed.wrapping_mul(STEP).wrapping_add(page).wrapping_add(1);
    key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_differ_by_number_and_by_seed() {
        let mut first = vec![0; 2 * PAGE_BYTES];
        generate(&mut first, 7, 0);
        let (one, two) = first.split_at(PAGE_BYTES);
        assert_ne!(one, two);
        let mut other = vec![0; PAGE_BYTES];
        generate(&mut other, 8, 0);
        assert_ne!(one, other);
        generate(&mut other, 7, 1);
        assert_eq!(two, other);
    }

    #[test]
    fn every_wrong_page_is_reported_once() {
        let mut pages = vec![0; 4 * PAGE_BYTES];
        let mut scratch = vec![0; 4 * PAGE_BYTES];
        generate(&mut pages, 1, 10);
        assert_eq!(wrong_pages(&pages, &mut scratch, 1, 10).count(), 0);
        let intact = word_at(&pages[PAGE_BYTES..], 0);
        pages[PAGE_BYTES] ^= 1;
        pages[2 * PAGE_BYTES - 1] ^= 1;
        pages[4 * PAGE_BYTES - 1] ^= 1;
        let wrong: Vec<_> = wrong_pages(&pages, &mut scratch, 1, 10).collect();
        assert_eq!(wrong[0], WrongPage { page: 11, byte: 0, found: intact ^ 1, wanted: intact });
        assert_eq!((wrong.len(), wrong[1].page, wrong[1].byte), (2, 13, PAGE_BYTES - 1));
    }
}
