//! Compares every operation with a `BTreeSet` of page numbers, around chunk and slab borders.

use std::collections::BTreeSet;

use page_set::{CHUNK_PAGES, PAGE_NUMBER_END, PageRange, PageSet, PageSetError, SLAB_PAGES};
use proptest::collection::vec;
use proptest::prelude::*;

/// Two windows: one across the first slab border, one at the largest page number.
const WINDOW: u64 = 3 * CHUNK_PAGES;
const BASES: [u64; 2] = [SLAB_PAGES - CHUNK_PAGES - 100, PAGE_NUMBER_END - WINDOW];

type Model = BTreeSet<u64>;

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(start, pages).expect("below 2^52")
}

/// A range in a window; lengths favour whole chunks and single pages.
fn ranges_in_window() -> impl Strategy<Value = PageRange> {
    (prop::sample::select(&BASES[..]), 0..WINDOW, 0..WINDOW, 0..4u8).prop_map(
        |(base, offset, pages, kind)| {
            let offset = if kind == 0 { offset / CHUNK_PAGES * CHUNK_PAGES } else { offset };
            let start = base / CHUNK_PAGES * CHUNK_PAGES + offset;
            let pages = match kind {
                0 => pages / CHUNK_PAGES * CHUNK_PAGES,
                1 => pages % 3,
                _ => pages,
            };
            range(start, pages.min(PAGE_NUMBER_END - start))
        },
    )
}

fn sets() -> impl Strategy<Value = (PageSet, Model)> {
    (vec(ranges_in_window(), 0..6), vec(ranges_in_window(), 0..4), 0..3u64).prop_map(
        |(add, cut, comb)| {
            let mut set: PageSet = add.iter().copied().collect();
            let mut model: Model = add.iter().flat_map(|r| r.start()..r.end()).collect();
            for r in cut {
                set.remove(r);
                model.retain(|&page| !r.contains(page));
            }
            // Many partial chunks, for the pass that rebuilds a slab.
            for i in 0..comb * 16 {
                let page = i * CHUNK_PAGES + i;
                set.insert(range(page, 2));
                model.extend([page, page + 1]);
            }
            (set, model)
        },
    )
}

fn runs(model: &Model) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::new();
    for &page in model {
        match out.last_mut() {
            Some(last) if last.end() == page => *last = range(last.start(), last.pages() + 1),
            _ => out.push(range(page, 1)),
        }
    }
    out
}

/// Checks that every query of the set agrees with the model.
fn assert_same(set: &PageSet, model: &Model) {
    assert_eq!(set.ranges().collect::<Vec<_>>(), runs(model));
    assert_eq!(set.len(), model.len() as u64);
    assert_eq!(set.is_empty(), model.is_empty());
    assert_eq!(set.first(), model.first().copied());
    assert_eq!(*set, set.ranges().collect::<PageSet>(), "equal sets have one representation");
    let full = full_chunks(model);
    assert_eq!(set.full_chunk_pages(), full.len() as u64 * CHUNK_PAGES);
}

fn full_chunks(model: &Model) -> Vec<u64> {
    let mut chunks: Vec<u64> = model.iter().map(|page| page / CHUNK_PAGES).collect();
    chunks.dedup();
    chunks.retain(|chunk| {
        model.range(chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES).count() as u64 == CHUNK_PAGES
    });
    chunks
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn insert_and_remove((mut set, mut model) in sets(), ops in vec((any::<bool>(), ranges_in_window()), 1..8)) {
        assert_same(&set, &model);
        for (add, r) in ops {
            let before = model.len();
            if add {
                model.extend(r.start()..r.end());
                prop_assert_eq!(set.insert(r), (model.len() - before) as u64);
            } else {
                model.retain(|&page| !r.contains(page));
                prop_assert_eq!(set.remove(r), (before - model.len()) as u64);
            }
            assert_same(&set, &model);
        }
        set.clear();
        assert_same(&set, &Model::new());
    }

    #[test]
    fn contains_and_intersects((set, model) in sets(), (other, theirs) in sets(), r in ranges_in_window()) {
        for page in r.start()..r.end() {
            prop_assert_eq!(set.contains(page), model.contains(&page));
        }
        let inside = !r.is_empty() && model.range(r.start()..r.end()).next().is_some();
        prop_assert_eq!(set.intersects_range(r), inside);
        prop_assert_eq!(set.intersects(&other), !model.is_disjoint(&theirs));
        prop_assert_eq!(other.intersects(&set), !model.is_disjoint(&theirs));
        prop_assert_eq!(set == other, model == theirs);
    }

    #[test]
    fn union_and_subtract((set, model) in sets(), (other, theirs) in sets()) {
        let mut union = set.clone();
        union.union_with(&other);
        assert_same(&union, &model.union(&theirs).copied().collect());
        let mut rest = set.clone();
        rest.subtract(&other);
        assert_same(&rest, &model.difference(&theirs).copied().collect());
        rest.union_with(&other);
        prop_assert_eq!(rest, union);
    }

    #[test]
    fn take_up_to((mut set, mut model) in sets(), max in 0..3 * WINDOW) {
        let taken = set.take_up_to(max);
        let lowest: Model = model.iter().take(usize::try_from(max).unwrap()).copied().collect();
        model.retain(|page| !lowest.contains(page));
        assert_same(&taken, &lowest);
        assert_same(&set, &model);
    }

    #[test]
    fn take_full_chunks((mut set, mut model) in sets(), max in 0..3 * WINDOW) {
        let taken = set.take_full_chunks(max);
        let allowed = usize::try_from(max / CHUNK_PAGES).unwrap();
        let chunks: BTreeSet<u64> = full_chunks(&model).into_iter().take(allowed).collect();
        let lowest: Model = model.iter().filter(|&page| chunks.contains(&(page / CHUNK_PAGES))).copied().collect();
        model.retain(|page| !lowest.contains(page));
        assert_same(&taken, &lowest);
        assert_same(&set, &model);
    }

    #[test]
    fn take_range((mut set, mut model) in sets(), r in ranges_in_window()) {
        let copied = set.copy_range(r);
        assert_same(&set, &model);
        let taken = set.take_range(r);
        assert_same(&taken, &copied.ranges().flat_map(|range| range.start()..range.end()).collect());
        let inside: Model = model.iter().filter(|&&page| r.contains(page)).copied().collect();
        model.retain(|&page| !r.contains(page));
        assert_same(&taken, &inside);
        assert_same(&set, &model);
    }

    #[test]
    fn insert_pages((mut set, mut model) in sets(), pages in vec((prop::sample::select(&BASES[..]), 0..WINDOW), 0..200), run in ranges_in_window()) {
        let pages: Vec<u64> = pages.into_iter().map(|(base, offset)| base + offset)
            .filter(|&page| page < PAGE_NUMBER_END)
            .chain((run.start()..run.end()).rev()).collect();
        let before = model.len();
        model.extend(&pages);
        prop_assert_eq!(set.insert_pages(pages), Ok((model.len() - before) as u64));
        assert_same(&set, &model);
    }

    #[test]
    fn insert_bitmap(
        (mut set, mut model) in sets(),
        shift in 0..12u32,
        block in 0..700u64,
        high in any::<bool>(),
        words in vec(prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), Just(1 << 63 | 1)], 0..9),
    ) {
        let granule = 1u64 << shift;
        // Keep the model small: few blocks of large granules.
        let words: Vec<u64> = words.into_iter().take(if shift > 6 { 1 } else { 9 })
            .map(|word| if shift > 6 { word & 0x8000_0100_0000_0007 } else { word }).collect();
        let base = if high { SLAB_PAGES - 4096 } else { 0 };
        let start = base + block / granule.min(8) * granule;
        let before = model.len();
        for (w, word) in words.iter().enumerate() {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let first = start + (w as u64 * 64 + bit) * granule;
                model.extend(first..first + granule);
            }
        }
        let added = set.insert_bitmap(start, granule, words).expect("in bounds");
        prop_assert_eq!(added, (model.len() - before) as u64);
        assert_same(&set, &model);
    }
}

#[test]
fn pages_beyond_the_largest_number_are_refused() {
    assert!(PageRange::new(PAGE_NUMBER_END, 0).is_ok());
    assert!(PageRange::new(PAGE_NUMBER_END - 1, 2).is_err());
    assert!(PageRange::new(u64::MAX, u64::MAX).is_err());
    assert!(PageRange::from_bounds(2, 1).is_err());

    let mut set = PageSet::new();
    assert_eq!(
        set.insert_bitmap(0, 3, [1]),
        Err(PageSetError::GranuleNotPowerOfTwo { granule_pages: 3 })
    );
    assert_eq!(
        set.insert_bitmap(0, 0, [1]),
        Err(PageSetError::GranuleNotPowerOfTwo { granule_pages: 0 })
    );
    assert_eq!(
        set.insert_bitmap(8, 16, [1]),
        Err(PageSetError::StartNotAligned { start: 8, granule_pages: 16 })
    );
    for granule in (0..64).map(|shift| 1u64 << shift) {
        let last = PAGE_NUMBER_END.saturating_sub(granule) / granule * granule;
        assert!(set.insert_bitmap(last, granule, [0, 0]).is_ok(), "clear bits name no page");
        assert!(set.insert_bitmap(last, granule, [0, 1]).is_err(), "granule {granule}");
        assert!(set.insert_bitmap(0, granule, [0; 3]).is_ok());
    }
    assert!(set.is_empty());
    assert!(set.insert_bitmap(u64::MAX, 1, [1]).is_err());
    for page in [PAGE_NUMBER_END, u64::MAX] {
        assert!(set.insert_pages([5, page, 6]).is_err());
        assert_eq!(set.len(), 1, "pages before the error are in the set, later ones are not");
    }
}

#[test]
fn the_largest_page_number_can_be_inserted() {
    let mut set = PageSet::new();
    let last = PAGE_NUMBER_END - 1;
    assert_eq!(set.insert_bitmap(PAGE_NUMBER_END - 64, 1, [1 << 63]), Ok(1));
    assert!(set.contains(last));
    assert_eq!(set.insert(range(last - CHUNK_PAGES, CHUNK_PAGES + 1)), CHUNK_PAGES);
    assert_eq!(set.remove(range(0, PAGE_NUMBER_END)), CHUNK_PAGES + 1);
    assert!(!set.contains(u64::MAX));
}

#[test]
fn queries_and_removals_of_a_giant_range_cost_only_the_contents() {
    let everything = range(0, PAGE_NUMBER_END);
    let mut set = PageSet::from(range(1 << 40, 5));
    assert!(set.intersects_range(everything));
    assert_eq!(set.remove(everything), 5, "did not iterate over 2^34 slabs");
    assert!(!set.intersects_range(everything));
}

#[test]
fn debug_output_is_short() {
    let set: PageSet = (0..1000).map(|i| range(i * 2, 1)).collect();
    let text = format!("{set:?}");
    assert!(text.starts_with("{0x0..0x1, 0x2..0x3,"), "{text}");
    assert!(text.ends_with("and 984 pages}"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Full slabs have too many pages for the model; their complement does not.
    #[test]
    fn full_slabs((mut small, _) in sets(), max in 0..3 * SLAB_PAGES) {
        let whole = range(0, 3 * SLAB_PAGES);
        small.remove(range(whole.end(), PAGE_NUMBER_END - whole.end()));
        let mut most = PageSet::from(whole);
        prop_assert_eq!(most.full_chunk_pages(), whole.pages());
        prop_assert_eq!(most.intersects(&small), !small.is_empty());
        most.subtract(&small);
        prop_assert_eq!(most.len(), whole.pages() - small.len());
        prop_assert!(!most.intersects(&small));
        prop_assert!(small.ranges().all(|r| !most.intersects_range(r)));
        let gaps: u64 = most.ranges().map(PageRange::pages).sum();
        prop_assert_eq!(gaps, most.len());

        let mut rest = most.clone();
        let low = rest.take_up_to(max);
        prop_assert_eq!(low.len(), max.min(most.len()));
        prop_assert!(low.ranges().last().map_or(0, PageRange::end) <= rest.first().unwrap_or(u64::MAX));
        let chunks = rest.take_full_chunks(max);
        prop_assert_eq!(chunks.len(), chunks.full_chunk_pages());
        rest.union_with(&chunks);
        rest.union_with(&low);
        prop_assert_eq!(&rest, &most);

        rest.union_with(&small);
        prop_assert_eq!(&rest, &PageSet::from(whole));
        prop_assert_eq!(rest.take_range(range(5, SLAB_PAGES)).len(), SLAB_PAGES);
        prop_assert_eq!(rest.insert(range(5, SLAB_PAGES)), SLAB_PAGES);
        prop_assert_eq!(rest, PageSet::from(whole));
    }
}
