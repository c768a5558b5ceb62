//! The request queue: what waits, what is sent, what comes back.

use std::time::{Duration, Instant};

use balloon_abi::request::{ANSWER_HEADER_BYTES, REQUEST_BYTES};
use balloon_abi::{AnswerHeader, Caches, Command, Features, Outcome, Request, Vq};
use balloon_device::{
    Ask, Fault, HoldState, MAX_OUTCOMES, MAX_QUEUED_REQUESTS, MemoryLayout, RequestFailure,
    RequestKind, SubmitError,
};
use guest_ring::{Buffer, Used};
use page_set::PageSet;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{BITMAP, Guest, MESSAGE, MIB, RING_SIZE, STATUS, Side, record_bytes};

pub(crate) const ASKABLE: Features = BITMAP.union(Features::REQUEST_VQ);
const REQUEST_RING: u64 = MIB + 0x2000;
const SLOTS: u64 = MIB + 0x3000;
pub(crate) const DROP: Ask = Ask::DropCaches(Caches::ALL);
pub(crate) const SNAPSHOT: Ask = Ask::ReportFree { min_granule_shift: 12 };
pub(crate) const HOLD: Ask = Ask::HoldFree { reserve_pages: 7 };

/// A guest with a request queue.
pub(crate) struct PostedRequest {
    pub(crate) guest: Guest,
    pub(crate) queue: Side,
    pub(crate) start: Instant,
}

/// What came back on the request queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    PostedRequest(Request),
    Empty,
    Status(u32),
}

impl PostedRequest {
    pub(crate) fn new() -> Self {
        let guest = Guest::new(ASKABLE);
        Self { guest, queue: Side::new(REQUEST_RING), start: Instant::now() }
    }

    /// So many seconds after the start.
    pub(crate) fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    pub(crate) fn submit(&mut self, ask: Ask) -> u32 {
        let deadline = self.at(100);
        self.guest.balloon.requests_mut().submit(ask, deadline).unwrap()
    }

    pub(crate) fn serve(&mut self) {
        let Self { guest, queue, .. } = self;
        guest.balloon.process_queue(Vq::Request, &guest.memory, &mut queue.queue).unwrap();
    }

    pub(crate) fn post_waiting(&mut self) -> u16 {
        let slot = self.queue.ring.next_slot();
        let at = SLOTS + u64::from(slot) * 16;
        let buffers = [Buffer::writable(at, REQUEST_BYTES as u32)];
        self.queue.ring.send(&self.guest.memory, &buffers)
    }

    pub(crate) fn post_answer(&mut self, message: &[u8]) {
        self.guest.write(MESSAGE, message);
        let buffers =
            [Buffer::readable(MESSAGE, message.len() as u32), Buffer::writable(STATUS, 4)];
        self.queue.ring.send(&self.guest.memory, &buffers);
    }

    pub(crate) fn back(&mut self) -> Option<Back> {
        let Used { head, written_bytes } = self.queue.ring.take_used(&self.guest.memory)?;
        Some(match written_bytes {
            0 => Back::Empty,
            4 => Back::Status(self.guest.status()),
            16 => {
                let mut bytes = [0; REQUEST_BYTES];
                let at = GuestAddress(SLOTS + u64::from(head) * 16);
                self.guest.memory.read_slice(&mut bytes, at).unwrap();
                Back::PostedRequest(Request::from_bytes(&bytes).unwrap())
            }
            other => panic!("{other} bytes"),
        })
    }

    /// Waits with one chain, and expects a request in it.
    fn take(&mut self) -> Request {
        self.post_waiting();
        self.serve();
        match self.back() {
            Some(Back::PostedRequest(request)) => request,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, id: u32, outcome: Outcome, values: [u64; 4], records: &[u8]) -> u32 {
        self.post_answer(&answer(id, outcome, values, records));
        self.serve();
        match self.back() {
            Some(Back::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    fn failure(&mut self, id: u32) -> RequestFailure {
        self.guest.balloon.requests_mut().take_outcome(id).unwrap().unwrap_err()
    }
}

pub(crate) fn answer(id: u32, outcome: Outcome, values: [u64; 4], records: &[u8]) -> Vec<u8> {
    let header = AnswerHeader { id, outcome, elapsed_ns: 5, values };
    [&header.to_bytes()[..], records].concat()
}

#[test]
fn waiting_chains_stay_until_there_is_something_to_ask() {
    let mut asked = PostedRequest::new();
    for _ in 0..3 {
        asked.post_waiting();
    }
    asked.serve();
    assert_eq!(asked.back(), None);
    let (first, second) = (asked.submit(DROP), asked.submit(SNAPSHOT));
    assert!(first != 0 && second != first);
    asked.serve();
    let command = Command::DropCaches(Caches::ALL);
    assert_eq!(asked.back(), Some(Back::PostedRequest(Request { id: first, command })));
    assert_eq!(asked.back(), None, "one at a time");
    assert_eq!(asked.answer(first, Outcome::Done, [1, 2, 3, 4], &[]), 0);
    let command = Command::ReportFree { min_granule_shift: 12 };
    assert_eq!(asked.back(), Some(Back::PostedRequest(Request { id: second, command })));
    let outcome = asked.guest.balloon.requests_mut().take_outcome(first);
    assert_eq!(outcome.unwrap().unwrap().values, [1, 2, 3, 4]);
    assert_eq!(asked.guest.balloon.requests_mut().take_outcome(first), None, "told once");
}

#[test]
fn the_deadline_that_comes_first_is_told_and_ends_what_it_is_of() {
    let mut asked = PostedRequest::new();
    let (soon, later) = (asked.at(3), asked.at(9));
    let requests = asked.guest.balloon.requests_mut();
    assert_eq!(requests.next_deadline(), None);
    let first = requests.submit(DROP, later).unwrap();
    let second = requests.submit(DROP, soon).unwrap();
    assert_eq!(requests.next_deadline(), Some(soon));
    assert_eq!(asked.take().id, first);
    let requests = asked.guest.balloon.requests_mut();
    assert!(!requests.expire(soon.checked_sub(Duration::from_nanos(1)).unwrap()));
    assert!(requests.expire(soon));
    assert_eq!(requests.next_deadline(), Some(later));
    assert!(requests.expire(later));
    assert_eq!(requests.next_deadline(), None);
    assert_eq!(asked.failure(first), RequestFailure::TimedOut { sent: true });
    assert_eq!(asked.failure(second), RequestFailure::TimedOut { sent: false });
    assert_eq!(asked.take(), Request { id: first, command: Command::Cancel });
}

#[test]
fn a_cancel_overtakes_what_waits_and_is_not_sent_for_what_was_never_sent() {
    let mut asked = PostedRequest::new();
    let (first, second, third) = (asked.submit(DROP), asked.submit(DROP), asked.submit(DROP));
    assert_eq!(asked.take().id, first);
    let deadline = asked.at(1);
    let requests = asked.guest.balloon.requests_mut();
    assert!(requests.cancel(second, deadline));
    assert!(requests.cancel(first, deadline) && requests.cancel(first, deadline));
    assert!(!requests.cancel(second, deadline) && !requests.cancel(77, deadline));
    assert_eq!(requests.next_deadline(), Some(deadline), "it has less time now");
    assert_eq!(asked.take(), Request { id: first, command: Command::Cancel });
    // It was done already.
    assert_eq!(asked.answer(first, Outcome::Done, [0; 4], &[]), 0);
    assert!(asked.guest.balloon.requests_mut().take_outcome(first).unwrap().is_ok());
    assert_eq!(asked.failure(second), RequestFailure::Cancelled);
    assert_eq!(asked.take().id, third);
}

#[test]
fn a_snapshot_under_way_shows_what_it_has_brought() {
    let mut asked = PostedRequest::new();
    let (first, second) = (asked.submit(DROP), asked.submit(SNAPSHOT));
    asked.take();
    assert_eq!(asked.guest.balloon.requests().named_so_far(first), None, "no snapshot");
    assert_eq!(asked.guest.balloon.requests().named_so_far(second), None, "not its turn");
    asked.post_waiting();
    asked.answer(first, Outcome::Done, [0; 4], &[]);
    asked.back();
    let named =
        |asked: &PostedRequest| asked.guest.balloon.requests().named_so_far(second).cloned();
    assert_eq!(named(&asked), Some(PageSet::new()));
    let records = record_bytes(0x400, 12, &[0b101]);
    assert_eq!(asked.answer(second, Outcome::More, [0; 4], &records), 0);
    let pages: Vec<_> =
        named(&asked).unwrap().ranges().map(|run| (run.start(), run.pages())).collect();
    assert_eq!(pages, [(0x400, 1), (0x402, 1)]);
    asked.answer(second, Outcome::Done, [0; 4], &[]);
    assert_eq!(named(&asked), None, "it has ended");
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let mut asked = PostedRequest::new();
    let now = asked.start;
    let submit =
        |asked: &mut PostedRequest, ask| asked.guest.balloon.requests_mut().submit(ask, now);
    assert_eq!(submit(&mut asked, Ask::ReleaseHold), Err(SubmitError::NoHold));
    for _ in 0..MAX_QUEUED_REQUESTS {
        submit(&mut asked, DROP).unwrap();
    }
    assert_eq!(submit(&mut asked, DROP), Err(SubmitError::TooMany));
    asked.guest.balloon.suspend();
    assert_eq!(submit(&mut asked, DROP), Err(SubmitError::Stopped));
    asked.guest.balloon.reset(BITMAP);
    assert_eq!(submit(&mut asked, DROP), Err(SubmitError::NoQueue));
    let ended = asked.guest.balloon.requests().totals().iter().collect::<Vec<_>>();
    let all = MAX_QUEUED_REQUESTS as u64;
    assert_eq!(ended, [(RequestKind::DropCaches, "queues-stopped", all)]);
}

#[test]
fn a_hold_ends_with_its_release_its_loss_or_its_driver() {
    let mut asked = PostedRequest::new();
    let hold = |asked: &mut PostedRequest| {
        let id = asked.submit(HOLD);
        assert_eq!(asked.take().command, Command::HoldFree { reserve_pages: 7 });
        assert_eq!(asked.answer(id, Outcome::Done, [16; 4], &record_bytes(0x400, 16, &[])), 0);
        let kept = asked.guest.balloon.requests().hold().expect("a hold");
        assert_eq!((kept.pages.id, kept.state), (id, HoldState::Kept));
        assert_eq!(kept.pages.pages.len(), 16);
        id
    };
    let state =
        |asked: &PostedRequest| asked.guest.balloon.requests().hold().map(|hold| hold.state);

    let id = hold(&mut asked);
    assert_eq!(asked.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 0);
    assert_eq!(state(&asked), None);
    assert_eq!(asked.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 4, "it is over");

    let id = hold(&mut asked);
    let release = asked.submit(Ask::ReleaseHold);
    assert_eq!(asked.take().command, Command::ReleaseHold { hold: id });
    assert_eq!(state(&asked), Some(HoldState::Releasing));
    assert_eq!(asked.answer(release, Outcome::Done, [16, 0, 0, 0], &[]), 0);
    assert_eq!(state(&asked), None);

    // Lost while the release is on its way.
    let id = hold(&mut asked);
    let release = asked.submit(Ask::ReleaseHold);
    asked.take();
    assert_eq!(asked.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 0);
    assert_eq!(asked.answer(release, Outcome::BadArgument, [0; 4], &[]), 0);
    assert_eq!(asked.failure(release), RequestFailure::HoldLost);

    // A release that is never answered may be asked for again.
    hold(&mut asked);
    asked.submit(Ask::ReleaseHold);
    asked.take();
    let late = asked.at(1000);
    assert!(asked.guest.balloon.requests_mut().expire(late));
    assert_eq!(state(&asked), Some(HoldState::Releasing));
    asked.submit(Ask::ReleaseHold);

    asked.guest.balloon.suspend();
    assert_eq!(state(&asked), Some(HoldState::Releasing));
    asked.guest.balloon.reset(ASKABLE);
    assert_eq!(state(&asked), None);
    assert!(asked.guest.balloon.requests().newest().is_none());
}

#[test]
fn a_hold_that_is_paused_goes_on() {
    let mut asked = PostedRequest::new();
    let id = asked.submit(HOLD);
    asked.take();
    assert_eq!(asked.answer(id, Outcome::Done, [0; 4], &[]), 0);
    asked.guest.balloon.suspend();
    let state = |asked: &PostedRequest| asked.guest.balloon.requests().hold().unwrap().state;
    assert_eq!(state(&asked), HoldState::Paused);
    asked.serve();
    assert_eq!(state(&asked), HoldState::Kept);
}

#[test]
fn kept_chains_come_back_before_the_queue_stops() {
    let mut asked = PostedRequest::new();
    for _ in 0..2 {
        asked.post_waiting();
    }
    asked.serve();
    let PostedRequest { guest, queue, .. } = &mut asked;
    let notify = guest.balloon.return_unused(Vq::Request, &guest.memory, &mut queue.queue);
    assert!(notify.unwrap());
    assert_eq!(
        [asked.back(), asked.back(), asked.back()],
        [Some(Back::Empty), Some(Back::Empty), None]
    );
    // Chains of a ring that is gone are nobody's.
    asked.post_waiting();
    asked.serve();
    asked.guest.balloon.forget_kept(Vq::Request);
    asked.submit(DROP);
    asked.serve();
    assert_eq!(asked.back(), None);
}

#[test]
fn more_chains_than_the_ring_has_entries_do_not_wait() {
    let mut asked = PostedRequest::new();
    for _ in 0..RING_SIZE {
        asked.post_waiting();
    }
    asked.serve();
    assert_eq!(asked.back(), None);
    for head in 0..RING_SIZE {
        asked.queue.ring.publish(&asked.guest.memory, head);
        asked.serve();
        assert_eq!(asked.back(), Some(Back::Empty));
    }
    assert_eq!(asked.guest.balloon.faults().get(Fault::RepeatedChain), u64::from(RING_SIZE));
}

#[test]
fn a_ring_that_breaks_ends_the_requests() {
    let mut asked = PostedRequest::new();
    let id = asked.submit(DROP);
    asked.take();
    let memory = asked.guest.memory.clone();
    asked.queue.ring.set_avail_idx(&memory, 0x8000);
    let PostedRequest { guest, queue, .. } = &mut asked;
    assert!(guest.balloon.process_queue(Vq::Request, &guest.memory, &mut queue.queue).is_err());
    assert_eq!(asked.failure(id), RequestFailure::BadRing);
    asked.guest.still_works();
}

#[test]
fn memory_that_moves_takes_the_newest_free_pages_with_it() {
    let mut asked = PostedRequest::new();
    let id = asked.submit(SNAPSHOT);
    asked.take();
    assert_eq!(asked.answer(id, Outcome::Done, [0; 4], &record_bytes(0x400, 12, &[])), 0);
    assert_eq!(asked.guest.balloon.requests().newest().unwrap().pages.len(), 1);
    asked.guest.balloon.set_layout(MemoryLayout::new([(MIB, MIB)]).unwrap());
    assert!(asked.guest.balloon.requests().newest().is_none());
}

#[test]
fn only_the_last_outcomes_are_kept() {
    let mut asked = PostedRequest::new();
    let ids: Vec<_> = (0..MAX_OUTCOMES + 3)
        .map(|_| {
            let id = asked.submit(DROP);
            asked.take();
            assert_eq!(asked.answer(id, Outcome::Done, [0; 4], &[]), 0);
            id
        })
        .collect();
    let requests = asked.guest.balloon.requests_mut();
    let kept = ids.into_iter().filter(|id| requests.take_outcome(*id).is_some()).count();
    assert_eq!(kept, MAX_OUTCOMES);
}

#[test]
fn an_answer_without_room_for_a_status_counts_all_the_same() {
    let mut asked = PostedRequest::new();
    let id = asked.submit(DROP);
    asked.take();
    asked.guest.write(MESSAGE, &answer(id, Outcome::Done, [1; 4], &[]));
    let buffers = [Buffer::readable(MESSAGE, ANSWER_HEADER_BYTES as u32)];
    asked.queue.ring.send(&asked.guest.memory, &buffers);
    asked.serve();
    assert_eq!(asked.back(), Some(Back::Empty));
    assert!(asked.guest.balloon.requests_mut().take_outcome(id).unwrap().is_ok());
}
