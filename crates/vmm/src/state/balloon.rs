//! Encoding of the balloon's state.
//!
//! Balloon pages are encoded as runs or, if that takes more bytes, as a bitmap of the guest's
//! memory. So a peer cannot make this process allocate more than the bitmap.

use balloon_abi::Features;
use balloon_device::{BalloonState, MemoryLayout};
use page_set::{PageRange, PageSet};

use crate::codec::{Malformed, Reader, Writer};

const RUNS: u8 = 0;
const BITS: u8 = 1;

/// Pages of a bitmap word, and bytes of a run.
const WORD_PAGES: u64 = 64;
const RUN_BYTES: u64 = 16;

pub(crate) fn encode(state: &BalloonState, layout: &MemoryLayout) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.u64(state.negotiated.0).u32(state.target).u32(state.actual).u32(state.poison_val);
    writer.flag(state.inherited).u32(state.last_hint).u32(state.last_request).u32(state.hold);
    let runs = state.held.ranges().count() as u64;
    let words: u64 = layout.ranges().iter().map(|region| words_of(*region)).sum();
    if runs.saturating_mul(RUN_BYTES) <= words * 8 {
        writer.u8(RUNS).u64(runs);
        state.held.ranges().for_each(|run| {
            writer.u64(run.start()).u64(run.pages());
        });
    } else {
        writer.u8(BITS);
        for region in layout.ranges() {
            bits(&state.held, *region).into_iter().for_each(|word| {
                writer.u64(word);
            });
        }
    }
    writer.finish()
}

/// Decodes the state. The device validates the values itself.
pub(crate) fn decode(bytes: &[u8], layout: &MemoryLayout) -> Result<BalloonState, Malformed> {
    let mut reader = Reader::new(bytes);
    let mut state = BalloonState {
        negotiated: Features(reader.u64()?),
        target: reader.u32()?,
        actual: reader.u32()?,
        poison_val: reader.u32()?,
        inherited: reader.flag("whether pages are inherited")?,
        last_hint: reader.u32()?,
        last_request: reader.u32()?,
        hold: reader.u32()?,
        held: PageSet::new(),
    };
    match reader.u8()? {
        RUNS => {
            let max = layout.pages().div_ceil(2);
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            let mut end = 0;
            for [start, pages] in reader.list::<[u64; 2]>("runs of pages", max)? {
                let (start, pages) = (u64::from_le(start), u64::from_le(pages));
                let bad = |_| Malformed::Value { what: "a run of pages", value: start };
                let run = PageRange::new(start, pages).map_err(bad)?;
                // Runs must be in order, so that none occurs twice.
                if run.is_empty() || start < end || !layout.covers(run) {
                    return Err(Malformed::Value { what: "a run of pages", value: start });
                }
                end = run.end();
                state.held.insert(run);
            }
        }
        BITS => {
            for region in layout.ranges() {
                let count = usize::try_from(words_of(*region)).map_err(|_| Malformed::Short)?;
                let words = reader.bytes(count.checked_mul(8).ok_or(Malformed::Short)?)?;
                let words = words.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
                let mut held = PageSet::new();
                let value = region.start();
                held.insert_bitmap(value, 1, words)
                    .map_err(|_| Malformed::Value { what: "the bitmap of a region", value })?;
                state.held.union_with(&held);
            }
        }
        value => {
            return Err(Malformed::Value { what: "the encoding of pages", value: value.into() });
        }
    }
    reader.finish()?;
    Ok(state)
}

const fn words_of(region: PageRange) -> u64 {
    region.pages().div_ceil(WORD_PAGES)
}

fn bits(pages: &PageSet, region: PageRange) -> Vec<u64> {
    let mut words = vec![0; usize::try_from(words_of(region)).unwrap_or(usize::MAX)];
    for run in pages.ranges_in(region) {
        for page in run.start()..run.end() {
            let offset = page - region.start();
            let at = usize::try_from(offset / WORD_PAGES).unwrap_or(usize::MAX);
            if let Some(word) = words.get_mut(at) {
                *word |= 1 << (offset % WORD_PAGES);
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> MemoryLayout {
        MemoryLayout::new([(0, 100 << 12), (1 << 20, 300 << 12)]).unwrap()
    }

    fn state(held: PageSet) -> BalloonState {
        BalloonState {
            negotiated: Features::VERSION_1,
            target: 9,
            actual: 8,
            held,
            ..Default::default()
        }
    }

    fn in_memory(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new();
        for page in pages {
            let run = PageRange::new(page, 1).unwrap();
            if layout().covers(run) {
                set.insert(run);
            }
        }
        set
    }

    proptest! {
        #[test]
        fn any_balloon_round_trips(pages in prop::collection::btree_set(0u64..600, 0..300)) {
            let state = state(in_memory(pages));
            let bytes = encode(&state, &layout());
            // Never more than one bit per page and the header.
            prop_assert!(bytes.len() <= 34 + 8 + 7 * 8 + 16);
            prop_assert_eq!(decode(&bytes, &layout()), Ok(state));
        }

        #[test]
        fn any_bytes_decode_to_a_balloon_in_memory_or_fail(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200), form in 0u8..3, few in 0u64..9,
        ) {
            if bytes.len() > 42 {
                bytes[20] = 0;
                bytes[33] = form;
                bytes[34..42].copy_from_slice(&few.to_le_bytes());
            }
            if let Ok(state) = decode(&bytes, &layout()) {
                prop_assert!(state.held.len() <= 1 << 12);
            }
        }
    }

    #[test]
    fn runs_outside_memory_or_out_of_order_are_refused() {
        let mut bytes = encode(&state(in_memory(3..9)), &layout());
        let at = bytes.len() - 16;
        for (start, pages) in [(3u64, 0u64), (95, 10), (120, 2), (u64::MAX, 2), (3, u64::MAX)] {
            bytes[at..at + 8].copy_from_slice(&start.to_le_bytes());
            bytes[at + 8..].copy_from_slice(&pages.to_le_bytes());
            assert!(decode(&bytes, &layout()).is_err(), "{start} {pages}");
        }
    }
}
