//! Checks the state of background release with a model that records the place of each page.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;

use host_memory::{Batch, PendingRelease, Retained, Take};
use page_set::{CHUNK_PAGES, PageRange, PageSet};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

const WINDOW: u64 = 4 * CHUNK_PAGES;

type Model = BTreeSet<u64>;

#[derive(Clone, Debug)]
enum Op {
    Add(PageRange),
    Retain(PageRange),
    Begin(Take),
    /// Finish the batch; its pages in the range were partial.
    Finish(PageRange),
    Retry,
    Forget,
    /// Mark the released pages in the range to be swept.
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

/// The state, and the model of it.
#[derive(Default)]
struct Watched {
    state: PendingRelease,
    batch: Option<Batch>,
    /// Pages added and not retained since, and not released: only these may be discarded
    /// for the first time.
    allowed: Model,
    /// Pages added and not retained since: only these may be swept.
    given: Model,
}

impl Watched {
    fn apply(&mut self, op: Op, largest: u64) -> Result<(), TestCaseError> {
        match op {
            Op::Add(range) => {
                self.state.add(&range.into());
                self.allowed.extend(range.start()..range.end());
                self.given.extend(range.start()..range.end());
            }
            Op::Retain(range) => self.retain(range)?,
            Op::Begin(take) => {
                let began = self.state.begin(take, largest);
                self.began(began, false)?;
            }
            Op::Finish(range) => self.finish(range),
            Op::Retry => self.state.retry_waiting(),
            Op::Forget => {
                self.state.forget();
                self.given.clear();
                let flying = self.batch.as_ref().map(|b| pages(b.pages())).unwrap_or_default();
                self.allowed.retain(|page| flying.contains(page));
            }
            // Chosen at any earlier time: pages that were released then, or no longer are.
            Op::Sweep(range) => self.state.sweep(range.into()),
            Op::BeginSweep(limit) => {
                let began = self.state.begin_sweep(limit);
                prop_assert!(began.as_ref().is_none_or(|began| began.pages().len() <= limit));
                self.began(began, true)?;
            }
        }
        Ok(())
    }

    fn retain(&mut self, range: PageRange) -> Result<(), TestCaseError> {
        let asked = PageSet::from(range);
        let (answer, cancelled) = self.state.retain(&asked);
        let flying = self.batch.as_ref().is_some_and(|b| b.pages().intersects(&asked));
        prop_assert_eq!(answer == Retained::InFlight, flying);
        prop_assert!(cancelled <= range.pages());
        self.given.retain(|&page| !range.contains(page));
        if answer == Retained::Yes {
            self.allowed.retain(|&page| !range.contains(page));
        }
        Ok(())
    }

    fn began(&mut self, began: Option<Batch>, swept: bool) -> Result<(), TestCaseError> {
        prop_assert!(!(self.batch.is_some() && began.is_some()), "one batch at a time");
        if let Some(began) = began {
            prop_assert!(!began.pages().is_empty());
            prop_assert_eq!(began.is_swept(), swept);
            let may = if swept { &self.given } else { &self.allowed };
            prop_assert!(pages(began.pages()).is_subset(may));
            // A sweep does not change the first release.
            let asked_for = if swept { 0 } else { began.pages().len() };
            prop_assert_eq!(self.state.in_flight_pages(), asked_for);
            self.batch = Some(began);
        }
        Ok(())
    }

    fn finish(&mut self, range: PageRange) {
        let Some(done) = self.batch.take() else { return };
        let (held, swept) = (done.pages().clone(), done.is_swept());
        let partial = only(&held, range);
        self.state.finish(done, &partial);
        if swept {
            return;
        }
        let mut gone = held;
        gone.subtract(&partial);
        gone.subtract(self.state.pending());
        for range in gone.ranges() {
            self.allowed.retain(|&page| !range.contains(page));
        }
    }

    /// Checks that the state contains no page that must not be discarded, and has lost no
    /// given page.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut all = pages(self.state.pending());
        prop_assert!(all.is_disjoint(&pages(self.state.waiting())));
        all.extend(pages(self.state.waiting()));
        prop_assert_eq!(&pages(self.state.given()), &self.given);
        if let Some(batch) = self.batch.as_ref().filter(|batch| !batch.is_swept()) {
            all.extend(pages(batch.pages()));
        }
        // A retain that found a batch in flight is not complete: its pages are no longer
        // pending, and still allowed while the batch is in flight.
        prop_assert!(all.is_subset(&self.allowed), "{:?}", all.difference(&self.allowed).next());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_batch_contains_only_given_pages(
        ops in vec(ops(), 1..40),
        largest in prop::sample::select(vec![1, CHUNK_PAGES]),
    ) {
        let mut watched = Watched::default();
        for op in ops {
            watched.apply(op, largest)?;
            watched.check()?;
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
fn waiting_pages_join_the_batch_of_the_rest_of_their_host_page() {
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

#[test]
fn completing_a_chunk_sweeps_all_of_it() {
    let mut state = PendingRelease::default();
    let release = |state: &mut PendingRelease, range| {
        state.add(&PageSet::from(range));
        let batch = state.begin(Take::All, CHUNK_PAGES).unwrap();
        state.finish(batch, &PageSet::new());
    };
    let page = |number| PageRange::new(number, 1).unwrap();
    release(&mut state, PageRange::new(0, 3 * CHUNK_PAGES).unwrap());
    assert!(!state.is_to_be_swept(), "the chunk was complete");
    for number in [1, CHUNK_PAGES, CHUNK_PAGES + 1] {
        assert_eq!(state.retain(&page(number).into()), (Retained::Yes, 0));
    }
    release(&mut state, page(CHUNK_PAGES));
    assert!(!state.is_to_be_swept(), "the guest uses a page of it");
    release(&mut state, PageRange::from_bounds(1, 2).unwrap());
    release(&mut state, page(CHUNK_PAGES + 1));
    let batch = state.begin_sweep(2 * CHUNK_PAGES).unwrap();
    assert_eq!(*batch.pages(), PageRange::new(0, 2 * CHUNK_PAGES).unwrap().into());
    state.finish(batch, &PageSet::new());
    assert!(!state.is_to_be_swept());
}
