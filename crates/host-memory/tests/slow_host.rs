//! A slow host: the guest can give up and take back pages meanwhile.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use host_memory::{
    BATCH_PAGES, Discard, DiscardReport, PartialHuge, Reclaimer, ReclaimerOptions, ReleaseMode,
    WAKE_PAGES,
};
use page_set::{CHUNK_PAGES, PageRange, PageSet};

/// Long enough for any machine; only a failing test waits this long.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq, Eq)]
enum Call {
    Resident,
    Partial,
    Discard(PageSet),
}

/// Reports each call, and returns when the test permits it.
struct Host {
    calls: Sender<Call>,
    go: Mutex<Receiver<()>>,
}

impl Host {
    fn wait(&self, call: Call) {
        // A test that has ended no longer receives.
        if self.calls.send(call).is_ok() {
            let _ = self.go.lock().unwrap().recv();
        }
    }
}

impl Discard for Host {
    fn largest_host_page(&self) -> u64 {
        CHUNK_PAGES
    }

    fn take_partial(&self, pages: &mut PageSet, rule: PartialHuge) -> PageSet {
        if rule == PartialHuge::Split {
            return PageSet::new();
        }
        self.wait(Call::Partial);
        let whole = pages.take_full_chunks(u64::MAX);
        std::mem::replace(pages, whole)
    }

    fn resident_pages(&self) -> Option<u64> {
        self.wait(Call::Resident);
        Some(7)
    }

    fn discard(&self, pages: &PageSet) -> DiscardReport {
        self.wait(Call::Discard(pages.clone()));
        DiscardReport { calls: 1, pages: pages.len(), ..DiscardReport::default() }
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        self.discard(pages)
    }
}

struct Fixture {
    // Dropped first: then waiting threads continue.
    go: Sender<()>,
    calls: Receiver<Call>,
    reclaimer: Arc<Reclaimer>,
}

impl Fixture {
    fn new() -> Self {
        let (calls_tx, calls) = channel();
        let (go, go_rx) = channel();
        let host = Host { calls: calls_tx, go: Mutex::new(go_rx) };
        let reclaimer = Reclaimer::new(Arc::new(host), ReclaimerOptions::default()).unwrap();
        Self { go, calls, reclaimer: Arc::new(reclaimer) }
    }

    fn asked(&self) -> Call {
        self.calls.recv_timeout(TEST_TIMEOUT).expect("a call of the host")
    }

    fn answer(&self) {
        self.go.send(()).unwrap();
    }

    /// Acts as the thread that serves a guest while the host does not answer.
    fn serve(&self, given: u64, taken_back: u64) {
        let (done, end) = channel();
        let reclaimer = Arc::clone(&self.reclaimer);
        let guest = thread::spawn(move || {
            reclaimer.release(&pages(given, 3));
            reclaimer.retain(&pages(taken_back, 1));
            let pending = reclaimer.counters().pending_pages;
            reclaimer.retain(&pages(given, 3));
            done.send(pending).unwrap();
        });
        assert_eq!(end.recv_timeout(TEST_TIMEOUT), Ok(3), "the guest waits for a slow host");
        guest.join().unwrap();
    }
}

fn pages(start: u64, count: u64) -> PageSet {
    PageRange::new(start, count).unwrap().into()
}

#[test]
fn a_check_for_huge_pages_does_not_block_the_guest() {
    let fixture = Fixture::new();
    fixture.reclaimer.release(&pages(0, 100));
    assert_eq!(fixture.asked(), Call::Discard(pages(0, 100)));
    fixture.answer();
    // Resident pages, the choice of pages, and resident pages again at the end.
    assert_eq!(fixture.asked(), Call::Resident);
    fixture.serve(1000, 20);
    fixture.answer();
    assert_eq!(fixture.asked(), Call::Partial);
    fixture.serve(1000, 40);
    fixture.answer();
    // Pages taken back meanwhile are not released, at any progress of the check.
    let mut swept = pages(0, 100);
    [20, 40].into_iter().for_each(|page| swept.subtract(&pages(page, 1)));
    assert_eq!(fixture.asked(), Call::Discard(swept));
    fixture.answer();
    assert_eq!(fixture.asked(), Call::Resident);
    fixture.serve(1000, 60);
}

/// Changing the mode may release gigabytes first. A guest that takes a page back waits for one
/// batch as usual, not for all of that.
#[test]
fn changing_the_mode_does_not_block_the_guest() {
    let fixture = Fixture::new();
    // The worker has a batch, so everything else is pending.
    fixture.reclaimer.release(&pages(0, 4 * BATCH_PAGES));
    assert_eq!(fixture.asked(), Call::Discard(pages(0, BATCH_PAGES)));
    let operator = thread::spawn({
        let reclaimer = Arc::clone(&fixture.reclaimer);
        move || reclaimer.set_mode(ReleaseMode::Immediate)
    });
    for batch in 1..4 {
        fixture.answer();
        assert_eq!(fixture.asked(), Call::Discard(pages(batch * BATCH_PAGES, BATCH_PAGES)));
        assert_eq!(fixture.reclaimer.mode(), ReleaseMode::Background);
    }
    fixture.answer();
    operator.join().unwrap();
    assert_eq!(fixture.reclaimer.mode(), ReleaseMode::Immediate);
}

/// The rule for parts changes while a batch runs under the old one.
#[test]
fn pages_left_waiting_by_an_old_rule_are_released() {
    let fixture = Fixture::new();
    fixture.reclaimer.set_partial_huge(PartialHuge::Wait);
    fixture.reclaimer.release(&pages(0, 3));
    fixture.reclaimer.flush();
    assert_eq!(fixture.asked(), Call::Partial);
    fixture.reclaimer.set_partial_huge(PartialHuge::Split);
    fixture.answer();
    assert_eq!(fixture.asked(), Call::Discard(PageSet::new()));
    fixture.answer();
    assert_eq!(fixture.asked(), Call::Discard(pages(0, 3)));
    fixture.answer();
}

/// During each release the guest gives up as many pages as are released.
struct Inflating {
    reclaimer: OnceLock<Weak<Reclaimer>>,
    released: Mutex<PageSet>,
}

impl Discard for Inflating {
    fn largest_host_page(&self) -> u64 {
        1
    }

    fn take_partial(&self, _: &mut PageSet, _: PartialHuge) -> PageSet {
        PageSet::new()
    }

    fn resident_pages(&self) -> Option<u64> {
        None
    }

    fn discard(&self, batch: &PageSet) -> DiscardReport {
        self.released.lock().unwrap().union_with(batch);
        if let Some(reclaimer) = self.reclaimer.get().and_then(Weak::upgrade) {
            let end = self.released.lock().unwrap().ranges().last().unwrap().end();
            reclaimer.release(&pages(end + WAKE_PAGES * 8, WAKE_PAGES));
        }
        DiscardReport { calls: 1, pages: batch.len(), ..DiscardReport::default() }
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        self.discard(pages)
    }
}

#[test]
fn changing_the_mode_ends_while_the_guest_keeps_inflating() {
    let memory = Arc::new(Inflating { reclaimer: OnceLock::new(), released: Mutex::default() });
    let host = Arc::clone(&memory) as Arc<dyn Discard>;
    let reclaimer = Arc::new(Reclaimer::new(host, ReclaimerOptions::default()).unwrap());
    memory.reclaimer.set(Arc::downgrade(&reclaimer)).unwrap();
    let given = pages(0, 3 * BATCH_PAGES + 5);
    reclaimer.release(&given);
    let (changed_tx, changed) = channel();
    thread::spawn(move || {
        reclaimer.set_mode(ReleaseMode::Background);
        let released = memory.released.lock().unwrap().clone();
        changed_tx.send(released).unwrap();
    });
    let released = changed.recv_timeout(TEST_TIMEOUT).expect("the mode is changed");
    let mut left = given;
    left.subtract(&released);
    assert!(left.is_empty(), "{left:?} was pending before");
}
