//! A host that answers slowly: the guest goes on giving and taking back meanwhile.
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

/// Long enough for any machine; nothing waits for it but a test that fails.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq, Eq)]
enum Call {
    Resident,
    Partial,
    Discard(PageSet),
}

/// Announces what it is asked, and answers when it is told to.
struct Host {
    calls: Sender<Call>,
    go: Mutex<Receiver<()>>,
}

impl Host {
    fn wait(&self, call: Call) {
        // A test that has seen enough does not listen any more.
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

struct Stand {
    // Dropped first: whoever waits for it then goes on.
    go: Sender<()>,
    calls: Receiver<Call>,
    reclaimer: Arc<Reclaimer>,
}

impl Stand {
    fn new() -> Self {
        let (calls_tx, calls) = channel();
        let (go, go_rx) = channel();
        let host = Host { calls: calls_tx, go: Mutex::new(go_rx) };
        let reclaimer = Reclaimer::new(Arc::new(host), ReclaimerOptions::default()).unwrap();
        Self { go, calls, reclaimer: Arc::new(reclaimer) }
    }

    fn asked(&self) -> Call {
        self.calls.recv_timeout(TEST_TIMEOUT).expect("the host is asked")
    }

    fn answer(&self) {
        self.go.send(()).unwrap();
    }

    /// What the thread that serves a guest does while the host does not answer.
    fn serve(&self, given: u64, taken_back: u64) {
        let (done, end) = channel();
        let reclaimer = Arc::clone(&self.reclaimer);
        let guest = thread::spawn(move || {
            reclaimer.release(&pages(given, 3));
            reclaimer.retain(&pages(taken_back, 1));
            let pending = reclaimer.snapshot().pending_pages;
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
fn a_look_for_huge_pages_holds_nobody_up() {
    let stand = Stand::new();
    stand.reclaimer.release(&pages(0, 100));
    assert_eq!(stand.asked(), Call::Discard(pages(0, 100)));
    stand.answer();
    // How much the host spends, in which pages that may be, and once more at the end.
    assert_eq!(stand.asked(), Call::Resident);
    stand.serve(1000, 20);
    stand.answer();
    assert_eq!(stand.asked(), Call::Partial);
    stand.serve(1000, 40);
    stand.answer();
    // What was taken back meanwhile is not released, wherever the look had come to.
    let mut swept = pages(0, 100);
    [20, 40].into_iter().for_each(|page| swept.subtract(&pages(page, 1)));
    assert_eq!(stand.asked(), Call::Discard(swept));
    stand.answer();
    assert_eq!(stand.asked(), Call::Resident);
    stand.serve(1000, 60);
}

/// An operator may have gigabytes released before the mode is another; a guest that takes
/// a page back waits for a batch as ever, and not for all of that.
#[test]
fn another_mode_holds_nobody_up() {
    let stand = Stand::new();
    // The worker has a batch, so all else is pending.
    stand.reclaimer.release(&pages(0, 4 * BATCH_PAGES));
    assert_eq!(stand.asked(), Call::Discard(pages(0, BATCH_PAGES)));
    let operator = thread::spawn({
        let reclaimer = Arc::clone(&stand.reclaimer);
        move || reclaimer.set_mode(ReleaseMode::Immediate)
    });
    for batch in 1..4 {
        stand.answer();
        assert_eq!(stand.asked(), Call::Discard(pages(batch * BATCH_PAGES, BATCH_PAGES)));
        assert_eq!(stand.reclaimer.mode(), ReleaseMode::Background);
    }
    stand.answer();
    operator.join().unwrap();
    assert_eq!(stand.reclaimer.mode(), ReleaseMode::Immediate);
}

/// The rule changes while the old one is applied.
#[test]
fn what_a_release_leaves_by_a_rule_that_is_over_is_released() {
    let stand = Stand::new();
    stand.reclaimer.set_partial_huge(PartialHuge::Wait);
    stand.reclaimer.release(&pages(0, 3));
    stand.reclaimer.flush();
    assert_eq!(stand.asked(), Call::Partial);
    stand.reclaimer.set_partial_huge(PartialHuge::Split);
    stand.answer();
    assert_eq!(stand.asked(), Call::Discard(PageSet::new()));
    stand.answer();
    assert_eq!(stand.asked(), Call::Discard(pages(0, 3)));
    stand.answer();
}

/// Where as much is given during each release as is released.
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
fn changing_the_mode_waits_for_no_guest_that_goes_on_giving() {
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
