//! Page contents that differ in every page and for every seed.

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

/// Counts the pages of `found` that are not what [`generate`] wrote; `wanted` is scratch space.
pub(crate) fn count_wrong(found: &[u8], wanted: &mut [u8], seed: u64, first_page: u64) -> u64 {
    let wanted = &mut wanted[..found.len()];
    generate(wanted, seed, first_page);
    let pages = found.chunks(PAGE_BYTES).zip(wanted.chunks(PAGE_BYTES));
    pages.filter(|(found, wanted)| found != wanted).count() as u64
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
    fn each_wrong_page_is_counted_once() {
        let mut pages = vec![0; 4 * PAGE_BYTES];
        let mut scratch = vec![0; 4 * PAGE_BYTES];
        generate(&mut pages, 1, 10);
        assert_eq!(count_wrong(&pages, &mut scratch, 1, 10), 0);
        pages[PAGE_BYTES] ^= 1;
        pages[2 * PAGE_BYTES - 1] ^= 1;
        pages[4 * PAGE_BYTES - 1] ^= 1;
        assert_eq!(count_wrong(&pages, &mut scratch, 1, 10), 2);
    }
}
