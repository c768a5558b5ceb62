//! A message parsed bit by bit into a `BTreeSet` of page numbers.
//!
//! The reference model for the device. It is written from `docs/protocol.md` and shares no code
//! with the crates under test, so it shares no bug with them.

use std::collections::BTreeSet;

/// Meaning of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// These pages, and the number of pages outside of memory, which are ignored (classic messages
    /// only).
    Pages(BTreeSet<u64>, u64),
    /// The message is invalid, for one of these reasons.
    Refused(Vec<Reason>),
}

/// Why a page-bitmap message is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Not a sequence of records.
    Malformed,
    /// A page that does not exist.
    Outside,
    /// A duplicate page.
    Repeated,
}

/// Parses an array of page numbers.
pub fn page_numbers(message: &[u8], exists: impl Fn(u64) -> bool) -> Meaning {
    let named = message.chunks_exact(4).map(number);
    let (inside, outside): (Vec<u64>, Vec<u64>) = named.partition(|page| exists(*page));
    Meaning::Pages(inside.into_iter().collect(), outside.len() as u64)
}

/// Parses page-bitmap records.
pub fn records(message: &[u8], exists: impl Fn(u64) -> bool) -> Meaning {
    let mut pages = BTreeSet::new();
    let (mut outside, mut repeated) = (false, false);
    let mut rest = message;
    let mut next = || {
        let (word, behind) = rest.split_at_checked(8)?;
        rest = behind;
        Some(number(word))
    };
    let mut malformed = !message.len().is_multiple_of(8);
    while let Some(header) = next() {
        let (start, shift, words) = (header % (1 << 52), header >> 52 & 63, header >> 58);
        if !(12..=30).contains(&shift) || !start.is_multiple_of(1 << (shift - 12)) {
            malformed = true;
            break;
        }
        let bitmap: Vec<u64> =
            if words == 0 { vec![1] } else { (0..words).map_while(|_| next()).collect() };
        if (bitmap.len() as u64) < words {
            malformed = true;
            break;
        }
        for (i, word) in (0..).zip(bitmap) {
            for block in (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| i * 64 + bit) {
                let first = start + (block << (shift - 12));
                let end = first + (1 << (shift - 12));
                if exists(first) && exists(end - 1) && (first..end).all(&exists) {
                    (first..end).for_each(|page| repeated |= !pages.insert(page));
                } else {
                    outside = true;
                }
            }
        }
    }
    // Duplicates of a page that does not exist are not checked.
    let reasons = [
        (malformed, Reason::Malformed),
        (outside, Reason::Outside),
        (repeated || outside, Reason::Repeated),
    ];
    let reasons: Vec<_> = reasons.into_iter().filter_map(|(is, why)| is.then_some(why)).collect();
    if reasons.is_empty() { Meaning::Pages(pages, 0) } else { Meaning::Refused(reasons) }
}

/// A little-endian number of at most eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start: u64, shift: u64, words: &[u64]) -> Vec<u8> {
        let header = start | shift << 52 | (words.len() as u64) << 58;
        std::iter::once(&header).chain(words).flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn messages_parse_as_documented() {
        let all = |page| page < 0x1000;
        let pages = |pages: &[u64]| Meaning::Pages(pages.iter().copied().collect(), 0);
        assert_eq!(records(&record(3, 12, &[]), all), pages(&[3]));
        assert_eq!(records(&record(2, 13, &[0b101]), all), pages(&[2, 3, 6, 7]));
        assert_eq!(records(&record(0, 12, &[0, 1 << 63]), all), pages(&[127]));
        assert_eq!(page_numbers(&[1, 0, 0, 0, 2, 1, 0, 0, 9], all), pages(&[1, 0x102]));
    }

    #[test]
    fn invalid_messages_have_the_right_reason() {
        let all = |page| page < 0x1000;
        let refused = |message: &[u8], why| match records(message, all) {
            Meaning::Refused(reasons) => assert!(reasons.contains(&why), "{reasons:?}"),
            Meaning::Pages(pages, _) => panic!("{pages:?}"),
        };
        refused(&record(3, 13, &[]), Reason::Malformed);
        refused(&record(0, 11, &[]), Reason::Malformed);
        refused(&record(0, 31, &[]), Reason::Malformed);
        refused(&record(0, 12, &[1])[..15], Reason::Malformed);
        refused(&record(0, 12, &[1])[..8], Reason::Malformed);
        refused(&record(0x1000, 12, &[]), Reason::Outside);
        refused(&[record(0, 13, &[]), record(1, 12, &[])].concat(), Reason::Repeated);
    }
}
