//! The reclaimer with a model of the host, which records each discard. No test depends on
//! a timeout to prove that something happens; some wait for the timer that they test.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use host_memory::{
    BATCH_PAGES, Discard, DiscardReport, PARTIAL_LIMIT_PAGES, PartialHuge, QUIET_MS, Reclaimer,
    ReclaimerOptions, ReleaseMode, WAKE_PAGES,
};
use page_set::{CHUNK_PAGES, PageRange, PageSet};

const TEST_TIMEOUT: Duration = Duration::from_secs(60);

fn pages(start: u64, count: u64) -> PageSet {
    PageRange::new(start, count).unwrap().into()
}

fn options(mode: ReleaseMode) -> ReclaimerOptions {
    ReclaimerOptions { mode, ..ReclaimerOptions::default() }
}

/// A host that reports each batch and blocks until the test continues it.
struct Gate {
    huge: bool,
    /// Pages that the host reports as resident.
    resident: Arc<AtomicU64>,
    begun: Sender<PageSet>,
    go: Mutex<Receiver<Act>>,
}

enum Act {
    Release,
    Panic,
    Refuse,
}

fn take_partial(huge: bool, pages: &mut PageSet, rule: PartialHuge) -> PageSet {
    if !huge || rule == PartialHuge::Split {
        return PageSet::new();
    }
    let whole = pages.take_full_chunks(u64::MAX);
    std::mem::replace(pages, whole)
}

impl Discard for Gate {
    fn largest_host_page(&self) -> u64 {
        if self.huge { CHUNK_PAGES } else { 1 }
    }

    fn take_partial(&self, pages: &mut PageSet, rule: PartialHuge) -> PageSet {
        take_partial(self.huge, pages, rule)
    }

    fn resident_pages(&self) -> Option<u64> {
        Some(self.resident.load(Ordering::SeqCst))
    }

    fn discard(&self, pages: &PageSet) -> DiscardReport {
        if pages.is_empty() {
            return DiscardReport::default();
        }
        self.begun.send(pages.clone()).unwrap();
        let mut report = DiscardReport { calls: 1, ..DiscardReport::default() };
        let act = self.go.lock().unwrap().recv().expect("the test continues it");
        match act {
            Act::Release => report.pages = pages.len(),
            Act::Refuse => {
                report.failed_pages = pages.len();
                report.failure_count = 1;
            }
            // The lock is released, so only this call fails.
            Act::Panic => panic!("a panic of the test"),
        }
        report
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        DiscardReport { calls: pages.len(), ..self.discard(pages) }
    }
}

struct Fixture {
    // Dropped first: then a batch that the test no longer continues ends by itself.
    go: Sender<Act>,
    begun: Receiver<PageSet>,
    resident: Arc<AtomicU64>,
    reclaimer: Reclaimer,
}

impl Fixture {
    fn new(huge: bool, mode: ReleaseMode) -> Self {
        let (begun_tx, begun) = channel();
        let (go, go_rx) = channel();
        let resident = Arc::default();
        let gate =
            Gate { huge, resident: Arc::clone(&resident), begun: begun_tx, go: Mutex::new(go_rx) };
        let reclaimer = Reclaimer::new(Arc::new(gate), options(mode)).unwrap();
        Self { reclaimer, begun, resident, go }
    }

    fn open(self, batches: usize) -> Self {
        (0..batches).for_each(|_| self.go.send(Act::Release).unwrap());
        self
    }

    fn next_batch(&self) -> PageSet {
        self.begun.recv_timeout(TEST_TIMEOUT).expect("a batch begins")
    }
}

#[test]
fn retain_waits_only_for_the_batch_in_flight() {
    let fixture = Fixture::new(false, ReleaseMode::Background);
    fixture.reclaimer.release(&pages(0, WAKE_PAGES));
    assert_eq!(fixture.next_batch(), pages(0, WAKE_PAGES));
    // These pages are not in flight, so this does not wait.
    fixture.reclaimer.release(&pages(WAKE_PAGES, 10));
    fixture.reclaimer.retain(&pages(WAKE_PAGES, 10));
    assert_eq!(fixture.reclaimer.counters().retained_pages, 10);

    let returned = AtomicBool::new(false);
    thread::scope(|scope| {
        let retainer = scope.spawn(|| {
            fixture.reclaimer.retain(&pages(5, 1));
            returned.store(true, Ordering::SeqCst);
        });
        // The counter shows that it has begun to wait.
        while fixture.reclaimer.counters().retain_waits == 0 {
            thread::yield_now();
        }
        assert!(!returned.load(Ordering::SeqCst), "page 5 is being discarded");
        fixture.go.send(Act::Release).unwrap();
        retainer.join().unwrap();
    });
    assert!(returned.load(Ordering::SeqCst));
    assert!(fixture.reclaimer.is_idle(), "what was retained is not released later");
    assert!(fixture.begun.try_recv().is_err());
}

#[test]
fn pages_that_came_back_with_a_huge_page_are_released_again() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(3);
    fixture.reclaimer.release(&pages(0, 2 * CHUNK_PAGES));
    assert_eq!(fixture.next_batch(), pages(0, 2 * CHUNK_PAGES));
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    let before = fixture.reclaimer.counters();
    // The guest takes a page back and touches it, and the host allocates 512.
    fixture.resident.store(CHUNK_PAGES, Ordering::SeqCst);
    fixture.reclaimer.retain(&pages(7, 1));
    let mut rest = pages(0, CHUNK_PAGES);
    rest.subtract(&pages(7, 1));
    assert_eq!(fixture.next_batch(), rest, "neither the guest's page nor the complete chunk");
    let after = fixture.reclaimer.counters();
    assert_eq!(after.discarded_pages, before.discarded_pages, "no new release");
}

#[test]
fn a_page_that_is_being_swept_is_retained_only_afterwards() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(1);
    fixture.resident.store(CHUNK_PAGES, Ordering::SeqCst);
    fixture.reclaimer.release(&pages(0, 3));
    assert_eq!(fixture.next_batch(), pages(0, 3));
    assert_eq!(fixture.next_batch(), pages(0, 3), "swept");
    let returned = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            fixture.reclaimer.retain(&pages(1, 1));
            returned.store(true, Ordering::SeqCst);
        });
        while fixture.reclaimer.counters().retain_waits == 0 {
            thread::yield_now();
        }
        assert!(!returned.load(Ordering::SeqCst), "page 1 is being discarded");
        assert!(fixture.reclaimer.counters().in_flight_pages == 0, "a sweep is not counted");
        fixture.go.send(Act::Release).unwrap();
    });
    let mut rest = pages(0, 3);
    rest.subtract(&pages(1, 1));
    let swept = loop {
        match fixture.begun.try_recv() {
            Ok(batch) => break batch,
            Err(_) => fixture.resident.fetch_add(1, Ordering::SeqCst),
        };
        thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(swept, rest, "and afterwards no more");
}

#[test]
fn small_requests_are_merged_before_the_worker_wakes() {
    let fixture = Fixture::new(false, ReleaseMode::Background).open(9);
    let step = 256;
    for start in (0..WAKE_PAGES).step_by(step) {
        fixture.reclaimer.release(&pages(start, step as u64));
    }
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    let batches: Vec<PageSet> = fixture.begun.try_iter().collect();
    let sum: u64 = batches.iter().map(PageSet::len).sum();
    assert_eq!(sum, WAKE_PAGES);
    // One batch, unless the machine paused between two calls.
    assert!(batches.len() < 9, "{} batches for 32 requests", batches.len());
    assert!(batches.iter().all(|batch| batch.ranges().count() == 1), "merged");
}

#[test]
fn batches_are_bounded() {
    let fixture = Fixture::new(false, ReleaseMode::Background).open(20);
    fixture.reclaimer.release(&pages(7, 10 * BATCH_PAGES));
    fixture.reclaimer.flush();
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    let batches: Vec<PageSet> = fixture.begun.try_iter().collect();
    assert!(batches.iter().all(|batch| batch.len() <= BATCH_PAGES));
    assert_eq!(batches.iter().map(PageSet::len).sum::<u64>(), 10 * BATCH_PAGES);
    assert_eq!(fixture.reclaimer.counters().discarded_pages, 10 * BATCH_PAGES);
}

#[test]
fn a_few_pages_are_released_after_the_pause() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(1);
    let given = Instant::now();
    fixture.reclaimer.release(&pages(1, 3));
    assert_eq!(fixture.next_batch(), pages(1, 3));
    assert!(given.elapsed() >= Duration::from_millis(QUIET_MS), "not before");
}

#[test]
fn flush_does_not_wait_for_the_pause() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(2);
    // Keep the guest busy, so that there is never a pause.
    let busy = AtomicBool::new(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            while busy.load(Ordering::SeqCst) {
                fixture.reclaimer.release(&pages(1, 3));
            }
        });
        fixture.reclaimer.release(&pages(1, 3));
        fixture.reclaimer.flush();
        assert_eq!(fixture.next_batch(), pages(1, 3));
        busy.store(false, Ordering::SeqCst);
    });
}

#[test]
fn whole_chunks_are_released_first_and_parts_after_the_pause() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(9);
    let mut given = pages(100, CHUNK_PAGES - 100 + WAKE_PAGES);
    given.union_with(&pages(100 * CHUNK_PAGES, 1));
    fixture.reclaimer.release(&given);
    assert_eq!(fixture.next_batch(), pages(CHUNK_PAGES, WAKE_PAGES), "only whole chunks");
    let mut rest = pages(100, CHUNK_PAGES - 100);
    rest.union_with(&pages(100 * CHUNK_PAGES, 1));
    assert_eq!(fixture.next_batch(), rest);
}

#[test]
fn parts_are_released_even_if_the_guest_never_pauses() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(1000);
    // All pages of each chunk except one, without a pause, until a batch begins.
    let mut chunk = 0;
    let batch = loop {
        fixture.reclaimer.release(&pages(chunk * CHUNK_PAGES, CHUNK_PAGES - 1));
        chunk += 1;
        if let Ok(batch) = fixture.begun.try_recv() {
            break batch;
        }
        assert!(chunk < 1000 * PARTIAL_LIMIT_PAGES / CHUNK_PAGES, "never released");
        thread::yield_now();
    };
    assert_eq!(batch.full_chunk_pages(), 0);
}

#[test]
fn parts_of_huge_pages_wait_if_configured_and_are_released_together() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(9);
    fixture.reclaimer.set_partial_huge(PartialHuge::Wait);
    fixture.reclaimer.release(&pages(0, 300));
    fixture.reclaimer.flush();
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    let snapshot = fixture.reclaimer.counters();
    assert_eq!((snapshot.waiting_pages, snapshot.discarded_pages), (300, 0));

    fixture.reclaimer.release(&pages(300, CHUNK_PAGES - 300));
    fixture.reclaimer.flush();
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    assert_eq!(fixture.reclaimer.counters().waiting_pages, 0);
    assert_eq!(fixture.next_batch(), pages(0, CHUNK_PAGES));

    // Waiting pages can be taken back, and the setting can change.
    fixture.reclaimer.retain(&pages(0, CHUNK_PAGES));
    fixture.reclaimer.release(&pages(0, 300));
    fixture.reclaimer.flush();
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    fixture.reclaimer.retain(&pages(0, 100));
    assert_eq!(fixture.reclaimer.counters().waiting_pages, 200);
    fixture.reclaimer.set_partial_huge(PartialHuge::Split);
    assert_eq!(fixture.next_batch(), pages(100, 200));
}

#[test]
fn immediate_mode_releases_before_it_returns() {
    for mode in [ReleaseMode::Immediate, ReleaseMode::PerPage] {
        let fixture = Fixture::new(true, mode).open(2);
        let mut given = pages(3, 5 * BATCH_PAGES);
        given.union_with(&pages(10 * BATCH_PAGES, 1));
        fixture.reclaimer.release(&given);
        let snapshot = fixture.reclaimer.counters();
        // The next batch may be a sweep by the worker.
        assert_eq!(fixture.next_batch(), given, "in one batch");
        assert_eq!((snapshot.pending_pages, snapshot.discarded_pages), (0, given.len()));
        assert_eq!(snapshot.calls, if mode == ReleaseMode::PerPage { given.len() } else { 1 });
    }
}

#[test]
fn changing_the_mode_releases_what_is_pending_first() {
    let fixture = Fixture::new(true, ReleaseMode::Background).open(3);
    fixture.reclaimer.release(&pages(0, 3));
    fixture.reclaimer.set_mode(ReleaseMode::Immediate);
    let snapshot = fixture.reclaimer.counters();
    assert_eq!((snapshot.pending_pages, snapshot.discarded_pages), (0, 3));
}

#[test]
fn a_panic_or_a_refusal_is_counted_and_the_next_batch_runs() {
    let fixture = Fixture::new(false, ReleaseMode::Background);
    for act in [Act::Panic, Act::Refuse, Act::Release] {
        fixture.go.send(act).unwrap();
        fixture.reclaimer.release(&pages(0, WAKE_PAGES));
        assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
        // No longer in flight, so this must return.
        fixture.reclaimer.retain(&pages(0, WAKE_PAGES));
    }
    let snapshot = fixture.reclaimer.counters();
    assert_eq!((snapshot.panics, snapshot.errors, snapshot.batches), (1, 1, 3));
    assert_eq!(snapshot.failed_pages, 2 * WAKE_PAGES);
    assert_eq!(snapshot.discarded_pages, WAKE_PAGES);
}

#[test]
fn retain_all_and_new_memory_forget_pending_pages() {
    let fixture = Fixture::new(true, ReleaseMode::Background);
    fixture.reclaimer.release(&pages(0, 3));
    fixture.reclaimer.retain_all();
    assert!(fixture.reclaimer.is_idle());
    fixture.reclaimer.release(&pages(0, 3));
    let (begun_tx, begun) = channel();
    let (go, go_rx) = channel();
    go.send(Act::Release).unwrap();
    let gate =
        Gate { huge: false, resident: Arc::default(), begun: begun_tx, go: Mutex::new(go_rx) };
    fixture.reclaimer.replace_memory(Arc::new(gate));
    fixture.reclaimer.release(&pages(50, 1));
    fixture.reclaimer.flush();
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    assert_eq!(begun.try_iter().collect::<Vec<_>>(), [pages(50, 1)]);
    assert!(fixture.begun.try_recv().is_err(), "the old memory is not touched");
}

#[test]
fn dropping_waits_for_the_batch_in_flight_and_forgets_the_rest() {
    let fixture = Fixture::new(false, ReleaseMode::Background);
    fixture.reclaimer.release(&pages(0, 3 * BATCH_PAGES));
    assert_eq!(fixture.next_batch(), pages(0, BATCH_PAGES));
    let Fixture { reclaimer, begun, go, .. } = fixture;
    let dropped = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            drop(reclaimer);
            dropped.store(true, Ordering::SeqCst);
        });
        assert!(!dropped.load(Ordering::SeqCst), "the host is still busy with it");
        go.send(Act::Release).unwrap();
        // A second batch may have begun before the worker was stopped.
        let _ = go.send(Act::Release);
        let _ = go.send(Act::Release);
    });
    assert!(begun.try_iter().map(|batch| batch.len()).sum::<u64>() <= 2 * BATCH_PAGES);
}

#[test]
fn wait_idle_times_out() {
    let fixture = Fixture::new(false, ReleaseMode::Background);
    fixture.reclaimer.release(&pages(0, WAKE_PAGES));
    assert!(!fixture.reclaimer.wait_idle(Duration::from_millis(1)));
    fixture.go.send(Act::Release).unwrap();
    assert!(fixture.reclaimer.wait_idle(Duration::MAX));
}

/// The owner of each page from the guest's view.
struct Owners {
    owner: Vec<AtomicU8>,
    huge: bool,
    broken: AtomicU64,
    seen: AtomicU64,
    looks: AtomicU64,
}

const GUEST: u8 = 0;
const BALLOON: u8 = 1;

impl Owners {
    fn new(pages: u64, huge: bool) -> Self {
        Self {
            owner: (0..pages).map(|_| AtomicU8::new(GUEST)).collect(),
            huge,
            broken: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            looks: AtomicU64::new(0),
        }
    }

    fn check(&self, pages: &PageSet) {
        for range in pages.ranges() {
            for page in range.start()..range.end() {
                let owner = self.owner[usize::try_from(page).unwrap()].load(Ordering::SeqCst);
                self.broken.fetch_add(u64::from(owner != BALLOON), Ordering::SeqCst);
            }
        }
    }
}

impl Discard for Owners {
    fn largest_host_page(&self) -> u64 {
        if self.huge { CHUNK_PAGES } else { 1 }
    }

    fn take_partial(&self, pages: &mut PageSet, rule: PartialHuge) -> PageSet {
        take_partial(self.huge, pages, rule)
    }

    fn resident_pages(&self) -> Option<u64> {
        // Never the same value, so that released pages are swept repeatedly.
        self.huge.then(|| self.looks.fetch_add(1, Ordering::SeqCst))
    }

    /// Checks the pages at the start, in the middle and at the end of the call.
    fn discard(&self, pages: &PageSet) -> DiscardReport {
        for _ in 0..3 {
            self.check(pages);
            thread::yield_now();
        }
        self.seen.fetch_add(pages.len(), Ordering::SeqCst);
        DiscardReport { pages: pages.len(), calls: 1, ..DiscardReport::default() }
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        self.discard(pages)
    }
}

/// A small xorshift generator, so that the test needs no other crate.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Two guest threads, each with its own memory, give up and take back pages at random, while
/// a third changes modes. Every page must belong to the balloon during its whole discard.
#[test]
fn no_page_is_discarded_after_it_was_retained() {
    const SIDE: u64 = 16 * CHUNK_PAGES;
    let rounds = if cfg!(debug_assertions) { 3000 } else { 20_000 };
    for huge in [false, true] {
        let owners = Arc::new(Owners::new(2 * SIDE, huge));
        let memory: Arc<dyn Discard> = Arc::clone(&owners) as _;
        let reclaimer = Reclaimer::new(memory, ReclaimerOptions::default()).unwrap();
        let guest = |side: u64| {
            let mut dice = Dice(0x9e37_79b9 + side);
            for _ in 0..rounds {
                let start = side * SIDE + dice.below(SIDE);
                let count = 1 + dice.below(3 * CHUNK_PAGES).min((side + 1) * SIDE - 1 - start);
                let range = PageRange::new(start, count).unwrap();
                let set = |owner| {
                    for page in start..start + count {
                        owners.owner[usize::try_from(page).unwrap()].store(owner, Ordering::SeqCst);
                    }
                };
                if dice.below(2) == 0 {
                    set(BALLOON);
                    reclaimer.release(&range.into());
                } else {
                    reclaimer.retain(&range.into());
                    set(GUEST);
                }
                if dice.below(8) == 0 {
                    reclaimer.flush();
                }
            }
        };
        let running = AtomicBool::new(true);
        let guest = &guest;
        thread::scope(|scope| {
            let sides = [0, 1].map(|side| scope.spawn(move || guest(side)));
            scope.spawn(|| {
                let mut dice = Dice(7);
                while running.load(Ordering::SeqCst) {
                    match dice.below(4) {
                        0 => reclaimer.set_mode(ReleaseMode::Immediate),
                        1 => reclaimer.set_partial_huge(PartialHuge::Wait),
                        2 => reclaimer.set_partial_huge(PartialHuge::Split),
                        _ => reclaimer.set_mode(ReleaseMode::Background),
                    }
                    thread::yield_now();
                }
            });
            let joined = sides.map(|side| side.join());
            running.store(false, Ordering::SeqCst);
            joined.into_iter().for_each(|side| side.unwrap());
        });
        reclaimer.set_partial_huge(PartialHuge::Split);
        reclaimer.set_mode(ReleaseMode::Immediate);
        // A sweep may be in progress, which `wait_idle` ignores.
        assert!(reclaimer.wait_idle(TEST_TIMEOUT));
        assert_eq!(owners.broken.load(Ordering::SeqCst), 0, "discarded under the guest");
        let (snapshot, seen) = (reclaimer.counters(), owners.seen.load(Ordering::SeqCst));
        assert_eq!(snapshot.discarded_pages + snapshot.swept_pages, seen);
        assert!(
            seen > 0 && snapshot.retained_pages > 0 && snapshot.retain_waits > 0,
            "{snapshot:?}"
        );
        // Nothing is pending or waiting: every ballooned page was discarded at least once.
        assert_eq!(snapshot.waiting_pages + snapshot.pending_pages, 0);
    }
}

#[test]
fn concurrent_immediate_releases_lose_no_pages() {
    let fixture = Arc::new(Mutex::new(HashSet::new()));
    struct Note(Arc<Mutex<HashSet<u64>>>);
    impl Discard for Note {
        fn largest_host_page(&self) -> u64 {
            1
        }
        fn take_partial(&self, _: &mut PageSet, _: PartialHuge) -> PageSet {
            PageSet::new()
        }
        fn resident_pages(&self) -> Option<u64> {
            None
        }
        fn discard(&self, pages: &PageSet) -> DiscardReport {
            self.0.lock().unwrap().extend(pages.ranges().flat_map(|r| r.start()..r.end()));
            DiscardReport::default()
        }
        fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
            self.discard(pages)
        }
    }
    let memory = Arc::new(Note(Arc::clone(&fixture)));
    let reclaimer = Reclaimer::new(memory, options(ReleaseMode::Immediate)).unwrap();
    thread::scope(|scope| {
        for thread in 0..4 {
            let (reclaimer, fixture) = (&reclaimer, &fixture);
            scope.spawn(move || {
                for page in (thread..2000).step_by(4) {
                    reclaimer.release(&pages(page, 1));
                    assert!(fixture.lock().unwrap().contains(&page), "released when it returns");
                }
            });
        }
    });
    assert_eq!(fixture.lock().unwrap().len(), 2000);
}

/// Reported pages: the guest may use them as soon as the report is returned.
#[test]
fn release_now_leaves_nothing_pending_in_any_mode() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate] {
        let fixture = Fixture::new(true, mode).open(1);
        fixture.reclaimer.set_partial_huge(PartialHuge::Wait);
        let whole = pages(CHUNK_PAGES, 2 * CHUNK_PAGES);
        let mut given = whole.clone();
        given.union_with(&pages(9 * CHUNK_PAGES, 5));
        fixture.reclaimer.release_now(&given);
        assert_eq!(
            fixture.begun.try_iter().collect::<Vec<_>>(),
            [whole],
            "released when it returns"
        );
        let snapshot = fixture.reclaimer.counters();
        assert_eq!(
            (snapshot.waiting_pages, snapshot.pending_pages),
            (0, 0),
            "the rest is taken back"
        );
        assert_eq!(snapshot.retained_pages, 5);
    }
}
