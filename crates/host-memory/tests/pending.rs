//! The state behind background release against a model that knows, for each
//! page, where it is.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;

use host_memory::{Batch, PendingRelease, Retained, Take};
use page_set::{CHUNK_PAGES, PageRange, PageSet};
use proptest::collection::vec;
use proptest::prelude::*;

const WINDOW: u64 = 4 * CHUNK_PAGES;

type Model = BTreeSet<u64>;

#[derive(Clone, Debug)]
enum Op {
    Add(PageRange),
    Retain(PageRange),
    Begin(Take),
    /// Finish the batch; of its pages, those in the range were partial.
    Finish(PageRange),
    Retry,
    Forget,
    /// Of the released pages, those in the range shall be swept.
    Sweep(PageRange),
    BeginSweep(u64),
}

fn ranges() -> impl Strategy<Value = PageRange> {
    prop_oneof![
        (0..WINDOW, 0..WINDOW)
            .prop_map(|(a, b)| PageRange::from_bounds(a.min(b), a.max(b)).unwrap()),
        (0..4u64).prop_map(|chunk| PageRange::new(chunk * CHUNK_PAGES, CHUNK_PAGES).unwrap()),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    let takes = prop_oneof![
        (0..WINDOW).prop_map(Take::Chunks),
        (1..WINDOW).prop_map(Take::Any),
        Just(Take::All)
    ];
    prop_oneof![
        4 => ranges().prop_map(Op::Add),
        3 => ranges().prop_map(Op::Retain),
        4 => takes.prop_map(Op::Begin),
        4 => ranges().prop_map(Op::Finish),
        2 => ranges().prop_map(Op::Sweep),
        2 => (1..WINDOW).prop_map(Op::BeginSweep),
        1 => Just(Op::Retry),
        1 => Just(Op::Forget),
    ]
}

fn pages(set: &PageSet) -> Model {
    set.ranges().flat_map(|range| range.start()..range.end()).collect()
}

fn only(set: &PageSet, range: PageRange) -> PageSet {
    set.clone().take_range(range)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_page_is_in_a_batch_that_was_not_given(ops in vec(ops(), 1..40), largest in prop::sample::select(vec![1, CHUNK_PAGES])) {
        let mut state = PendingRelease::default();
        let mut batch: Option<Batch> = None;
        // Pages given and not retained since, and not released: only these may
        // ever be discarded.
        let mut allowed = Model::new();
        // Pages given and not retained since: only these may ever be swept.
        let mut given = Model::new();
        for op in ops {
            match op {
                Op::Add(range) => {
                    state.add(&range.into());
                    allowed.extend(range.start()..range.end());
                    given.extend(range.start()..range.end());
                }
                Op::Sweep(range) => state.sweep(|released| released.take_range(range)),
                Op::BeginSweep(limit) => {
                    let busy = batch.is_some();
                    let began = state.begin_sweep(limit);
                    prop_assert!(!(busy && began.is_some()), "one batch at a time");
                    if let Some(began) = began {
                        prop_assert!(began.is_swept() && !began.pages().is_empty());
                        prop_assert!(began.pages().len() <= limit);
                        prop_assert!(pages(began.pages()).is_subset(&given));
                        prop_assert_eq!(state.in_flight_pages(), 0, "nothing that was asked for");
                        batch = Some(began);
                    }
                }
                Op::Retain(range) => {
                    let asked = PageSet::from(range);
                    let (answer, cancelled) = state.retain(&asked);
                    let flying = batch.as_ref().is_some_and(|b| b.pages().intersects(&asked));
                    prop_assert_eq!(answer == Retained::InFlight, flying);
                    prop_assert!(cancelled <= range.pages());
                    given.retain(|&page| !range.contains(page));
                    if answer == Retained::Yes {
                        allowed.retain(|&page| !range.contains(page));
                    }
                }
                Op::Begin(take) => {
                    let busy = batch.is_some();
                    let began = state.begin(take, largest);
                    prop_assert!(!(busy && began.is_some()), "one batch at a time");
                    if let Some(began) = began {
                        prop_assert!(!began.pages().is_empty());
                        prop_assert!(pages(began.pages()).is_subset(&allowed));
                        batch = Some(began);
                    }
                }
                Op::Finish(range) => {
                    let Some(done) = batch.take() else { continue };
                    let held = done.pages().clone();
                    let partial = only(&held, range);
                    let swept = done.is_swept();
                    state.finish(done, &partial);
                    if swept {
                        allowed.extend(pages(&partial));
                        continue;
                    }
                    let mut gone = held;
                    gone.subtract(&partial);
                    gone.subtract(state.pending());
                    for range in gone.ranges() {
                        allowed.retain(|&page| !range.contains(page));
                    }
                }
                Op::Retry => state.retry_waiting(),
                Op::Forget => {
                    state.forget();
                    given.clear();
                    let flying = batch.as_ref().map(|b| pages(b.pages())).unwrap_or_default();
                    allowed.retain(|page| flying.contains(page));
                }
            }
            // Nothing that may not be discarded is anywhere in the state, and
            // nothing that was given is lost.
            let mut all = pages(state.pending());
            prop_assert!(all.is_disjoint(&pages(state.waiting())));
            all.extend(pages(state.waiting()));
            prop_assert_eq!(pages(state.given()), given.clone());
            if let Some(batch) = batch.as_ref().filter(|batch| !batch.is_swept()) {
                prop_assert_eq!(state.in_flight_pages(), batch.pages().len());
                all.extend(pages(batch.pages()));
            }
            // A retain that met a batch in flight is not done: its pages are no
            // longer pending, and still allowed for as long as the batch flies.
            prop_assert!(all.is_subset(&allowed), "{:?}", all.difference(&allowed).next());
        }
    }

    #[test]
    fn retain_after_finish_always_succeeds(add in ranges(), retain in ranges(), partial in ranges()) {
        let mut state = PendingRelease::default();
        state.add(&add.into());
        let Some(batch) = state.begin(Take::All, CHUNK_PAGES) else {
            prop_assert!(add.is_empty());
            return Ok(());
        };
        let _ = state.retain(&retain.into());
        let partial = only(batch.pages(), partial);
        state.finish(batch, &partial);
        prop_assert_eq!(state.retain(&retain.into()).0, Retained::Yes);
        prop_assert!(!state.waiting().intersects_range(retain), "partial pages are taken back too");
        prop_assert!(!state.pending().intersects_range(retain));
    }
}

#[test]
fn waiting_pages_come_along_with_the_rest_of_their_host_page() {
    let half = |start| PageSet::from(PageRange::new(start, CHUNK_PAGES / 2).unwrap());
    let mut state = PendingRelease::default();
    state.add(&half(CHUNK_PAGES));
    let batch = state.begin(Take::All, CHUNK_PAGES).unwrap();
    let all = batch.pages().clone();
    state.finish(batch, &all);
    assert_eq!(state.waiting().len(), CHUNK_PAGES / 2);

    state.add(&half(5 * CHUNK_PAGES));
    let batch = state.begin(Take::All, CHUNK_PAGES).unwrap();
    assert_eq!(batch.pages().len(), CHUNK_PAGES / 2, "too far away to share a host page");
    state.finish(batch, &PageSet::new());

    state.add(&half(CHUNK_PAGES + CHUNK_PAGES / 2));
    let batch = state.begin(Take::Any(CHUNK_PAGES), CHUNK_PAGES).unwrap();
    assert_eq!(batch.pages().full_chunk_pages(), CHUNK_PAGES, "both halves");
    state.finish(batch, &PageSet::new());
    assert!(state.waiting().is_empty());
}
