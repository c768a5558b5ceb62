//! Releases free pages that were never given, while a balloon is being released.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host_memory::{
    Discard, DiscardReport, PartialHuge, Reclaimer, ReclaimerOptions, ReleaseMode, WAKE_PAGES,
};
use page_set::{CHUNK_PAGES, PageRange, PageSet};

const TEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Ballooned pages are below this, free pages from here on.
const FREE: u64 = 1 << 20;

fn pages(start: u64, count: u64) -> PageSet {
    PageRange::new(start, count).unwrap().into()
}

/// A host with huge pages that releases free pages at once, and ballooned ones when the
/// test permits it.
struct Host {
    begun: Sender<()>,
    go: Mutex<Receiver<()>>,
    seen: Mutex<Vec<PageSet>>,
    panics: bool,
}

impl Discard for Host {
    fn largest_host_page(&self) -> u64 {
        CHUNK_PAGES
    }

    fn take_partial(&self, pages: &mut PageSet, rule: PartialHuge) -> PageSet {
        if rule == PartialHuge::Split {
            return PageSet::new();
        }
        let whole = pages.take_full_chunks(u64::MAX);
        std::mem::replace(pages, whole)
    }

    fn resident_pages(&self) -> Option<u64> {
        None
    }

    fn discard(&self, pages: &PageSet) -> DiscardReport {
        assert!(!self.panics, "a panic of the test");
        if pages.first().is_some_and(|first| first < FREE) {
            self.begun.send(()).unwrap();
            self.go.lock().unwrap().recv().expect("the test permits it");
        } else {
            self.seen.lock().unwrap().push(pages.clone());
        }
        let calls = pages.ranges().count() as u64;
        DiscardReport { calls, pages: pages.len(), ..DiscardReport::default() }
    }

    fn discard_per_page(&self, pages: &PageSet) -> DiscardReport {
        self.discard(pages)
    }
}

struct Fixture {
    go: Sender<()>,
    begun: Receiver<()>,
    host: Arc<Host>,
    reclaimer: Reclaimer,
}

fn fixture(partial_huge: PartialHuge, panics: bool) -> Fixture {
    let (begun_tx, begun) = channel();
    let (go, go_rx) = channel();
    let host =
        Host { begun: begun_tx, go: Mutex::new(go_rx), seen: Mutex::new(Vec::new()), panics };
    let host = Arc::new(host);
    let options = ReclaimerOptions { mode: ReleaseMode::Background, partial_huge };
    let reclaimer = Reclaimer::new(Arc::clone(&host) as _, options).unwrap();
    Fixture { go, begun, host, reclaimer }
}

/// A guest waits for the release of its reported pages, not for that of ballooned ones.
#[test]
fn free_pages_do_not_wait_for_the_balloon_and_have_their_own_counters() {
    let fixture = fixture(PartialHuge::Split, false);
    fixture.reclaimer.release(&pages(0, WAKE_PAGES));
    fixture.begun.recv_timeout(TEST_TIMEOUT).expect("the worker is busy");
    fixture.reclaimer.release(&pages(WAKE_PAGES, 3));
    let mut free = pages(FREE, 10);
    free.union_with(&pages(FREE + 20, 5));
    fixture.reclaimer.release_free(&free);
    assert_eq!(*fixture.host.seen.lock().unwrap(), [free]);
    let done = fixture.reclaimer.counters();
    assert_eq!((done.free_pages, done.free_calls, done.free_partial_pages), (15, 2, 0));
    assert_eq!((done.discarded_pages, done.calls, done.last_batch_at), (0, 0, None));
    assert_eq!(done.pending_pages + done.in_flight_pages, WAKE_PAGES + 3);
    for _ in 0..2 {
        fixture.go.send(()).unwrap();
    }
    assert!(fixture.reclaimer.wait_idle(TEST_TIMEOUT));
    let done = fixture.reclaimer.counters();
    assert_eq!((done.discarded_pages, done.free_pages), (WAKE_PAGES + 3, 15));
}

/// Nothing of a report is released after it was returned to the guest.
#[test]
fn reported_parts_of_huge_pages_are_neither_released_nor_recorded() {
    let fixture = fixture(PartialHuge::Wait, false);
    let whole = FREE.next_multiple_of(CHUNK_PAGES);
    fixture.reclaimer.release_free(&pages(whole, CHUNK_PAGES + 7));
    assert_eq!(*fixture.host.seen.lock().unwrap(), [pages(whole, CHUNK_PAGES)]);
    let done = fixture.reclaimer.counters();
    assert_eq!((done.free_pages, done.free_partial_pages), (CHUNK_PAGES, 7));
    assert_eq!((done.waiting_pages, done.pending_pages), (0, 0));
    // A report of the rest of that huge page does not release the first part.
    fixture.reclaimer.release_free(&pages(whole + CHUNK_PAGES + 7, CHUNK_PAGES - 7));
    assert_eq!(fixture.reclaimer.counters().free_pages, CHUNK_PAGES);
}

#[test]
fn a_panic_is_counted_and_the_call_returns() {
    let fixture = fixture(PartialHuge::Split, true);
    fixture.reclaimer.release_free(&pages(FREE, 4));
    let done = fixture.reclaimer.counters();
    assert_eq!((done.panics, done.failed_pages, done.free_pages), (1, 4, 0));
    assert!(fixture.reclaimer.is_idle());
}
