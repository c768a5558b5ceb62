//! The request queue.

use std::time::{Duration, Instant};

use balloon_abi::request::{ANSWER_HEADER_BYTES, REQUEST_BYTES};
use balloon_abi::{AnswerHeader, Caches, Command, Features, Outcome, Request, Vq};
use balloon_device::{
    DeviceRequest, Fault, HoldState, MAX_OUTCOMES, MAX_QUEUED_REQUESTS, MemoryLayout,
    RequestFailure, RequestKind, SubmitError,
};
use guest_ring::{Buffer, Used};
use page_set::PageSet;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{BITMAP, Guest, MESSAGE, MIB, RING_SIZE, STATUS, Side, record_bytes};

pub(crate) const WITH_REQUESTS: Features = BITMAP.union(Features::REQUEST_VQ);
const REQUEST_RING: u64 = MIB + 0x2000;
const SLOTS: u64 = MIB + 0x3000;
pub(crate) const DROP: DeviceRequest = DeviceRequest::DropCaches(Caches::ALL);
pub(crate) const SNAPSHOT: DeviceRequest = DeviceRequest::ReportFree { min_granule_shift: 12 };
pub(crate) const HOLD: DeviceRequest = DeviceRequest::HoldFree { reserve_pages: 7 };

/// A guest with a request queue.
pub(crate) struct Fixture {
    pub(crate) guest: Guest,
    pub(crate) queue: Side,
    pub(crate) start: Instant,
}

/// What the device returned on the request queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Returned {
    Request(Request),
    Empty,
    Status(u32),
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let guest = Guest::new(WITH_REQUESTS);
        Self { guest, queue: Side::new(REQUEST_RING), start: Instant::now() }
    }

    /// The time `seconds` after the start.
    pub(crate) fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    pub(crate) fn submit(&mut self, ask: DeviceRequest) -> u32 {
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

    pub(crate) fn returned(&mut self) -> Option<Returned> {
        let Used { head, written_bytes } = self.queue.ring.take_used(&self.guest.memory)?;
        Some(match written_bytes {
            0 => Returned::Empty,
            4 => Returned::Status(self.guest.status()),
            16 => {
                let mut bytes = [0; REQUEST_BYTES];
                let at = GuestAddress(SLOTS + u64::from(head) * 16);
                self.guest.memory.read_slice(&mut bytes, at).unwrap();
                Returned::Request(Request::from_bytes(&bytes).unwrap())
            }
            other => panic!("{other} bytes"),
        })
    }

    /// Posts one waiting chain, and expects a request in it.
    fn take(&mut self) -> Request {
        self.post_waiting();
        self.serve();
        match self.returned() {
            Some(Returned::Request(request)) => request,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, id: u32, outcome: Outcome, values: [u64; 4], records: &[u8]) -> u32 {
        self.post_answer(&answer(id, outcome, values, records));
        self.serve();
        match self.returned() {
            Some(Returned::Status(status)) => status,
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
fn chains_wait_until_there_is_a_request() {
    let mut fixture = Fixture::new();
    for _ in 0..3 {
        fixture.post_waiting();
    }
    fixture.serve();
    assert_eq!(fixture.returned(), None);
    let (first, second) = (fixture.submit(DROP), fixture.submit(SNAPSHOT));
    assert!(first != 0 && second != first);
    fixture.serve();
    let command = Command::DropCaches(Caches::ALL);
    assert_eq!(fixture.returned(), Some(Returned::Request(Request { id: first, command })));
    assert_eq!(fixture.returned(), None, "one at a time");
    assert_eq!(fixture.answer(first, Outcome::Done, [1, 2, 3, 4], &[]), 0);
    let command = Command::ReportFree { min_granule_shift: 12 };
    assert_eq!(fixture.returned(), Some(Returned::Request(Request { id: second, command })));
    let outcome = fixture.guest.balloon.requests_mut().take_outcome(first);
    assert_eq!(outcome.unwrap().unwrap().values, [1, 2, 3, 4]);
    assert_eq!(fixture.guest.balloon.requests_mut().take_outcome(first), None, "taken once");
}

#[test]
fn next_deadline_is_the_earliest_and_ends_its_request() {
    let mut fixture = Fixture::new();
    let (soon, later) = (fixture.at(3), fixture.at(9));
    let requests = fixture.guest.balloon.requests_mut();
    assert_eq!(requests.next_deadline(), None);
    let first = requests.submit(DROP, later).unwrap();
    let second = requests.submit(DROP, soon).unwrap();
    assert_eq!(requests.next_deadline(), Some(soon));
    assert_eq!(fixture.take().id, first);
    let requests = fixture.guest.balloon.requests_mut();
    assert!(!requests.expire(soon.checked_sub(Duration::from_nanos(1)).unwrap()));
    assert!(requests.expire(soon));
    assert_eq!(requests.next_deadline(), Some(later));
    assert!(requests.expire(later));
    assert_eq!(requests.next_deadline(), None);
    assert_eq!(fixture.failure(first), RequestFailure::TimedOut { sent: true });
    assert_eq!(fixture.failure(second), RequestFailure::TimedOut { sent: false });
    assert_eq!(fixture.take(), Request { id: first, command: Command::Cancel });
}

#[test]
fn a_cancel_precedes_queued_requests_and_an_unsent_request_needs_none() {
    let mut fixture = Fixture::new();
    let (first, second, third) = (fixture.submit(DROP), fixture.submit(DROP), fixture.submit(DROP));
    assert_eq!(fixture.take().id, first);
    let deadline = fixture.at(1);
    let requests = fixture.guest.balloon.requests_mut();
    assert!(requests.cancel(second, deadline));
    assert!(requests.cancel(first, deadline) && requests.cancel(first, deadline));
    assert!(!requests.cancel(second, deadline) && !requests.cancel(77, deadline));
    assert_eq!(requests.next_deadline(), Some(deadline), "the cancel shortens the deadline");
    assert_eq!(fixture.take(), Request { id: first, command: Command::Cancel });
    // The driver had completed it already.
    assert_eq!(fixture.answer(first, Outcome::Done, [0; 4], &[]), 0);
    assert!(fixture.guest.balloon.requests_mut().take_outcome(first).unwrap().is_ok());
    assert_eq!(fixture.failure(second), RequestFailure::Cancelled);
    assert_eq!(fixture.take().id, third);
}

#[test]
fn a_running_report_shows_its_pages_so_far() {
    let mut fixture = Fixture::new();
    let (first, second) = (fixture.submit(DROP), fixture.submit(SNAPSHOT));
    fixture.take();
    assert_eq!(
        fixture.guest.balloon.requests().named_so_far(first),
        None,
        "not a free-page report"
    );
    assert_eq!(fixture.guest.balloon.requests().named_so_far(second), None, "not running yet");
    fixture.post_waiting();
    fixture.answer(first, Outcome::Done, [0; 4], &[]);
    fixture.returned();
    let named = |fixture: &Fixture| fixture.guest.balloon.requests().named_so_far(second).cloned();
    assert_eq!(named(&fixture), Some(PageSet::new()));
    let records = record_bytes(0x400, 12, &[0b101]);
    assert_eq!(fixture.answer(second, Outcome::More, [0; 4], &records), 0);
    let pages: Vec<_> =
        named(&fixture).unwrap().ranges().map(|run| (run.start(), run.pages())).collect();
    assert_eq!(pages, [(0x400, 1), (0x402, 1)]);
    fixture.answer(second, Outcome::Done, [0; 4], &[]);
    assert_eq!(named(&fixture), None, "it has ended");
}

#[test]
fn an_impossible_request_is_refused() {
    let mut fixture = Fixture::new();
    let now = fixture.start;
    let submit = |fixture: &mut Fixture, ask| fixture.guest.balloon.requests_mut().submit(ask, now);
    assert_eq!(submit(&mut fixture, DeviceRequest::ReleaseHold), Err(SubmitError::NoHold));
    for _ in 0..MAX_QUEUED_REQUESTS {
        submit(&mut fixture, DROP).unwrap();
    }
    assert_eq!(submit(&mut fixture, DROP), Err(SubmitError::TooMany));
    fixture.guest.balloon.suspend();
    assert_eq!(submit(&mut fixture, DROP), Err(SubmitError::Stopped));
    fixture.guest.balloon.reset(BITMAP);
    assert_eq!(submit(&mut fixture, DROP), Err(SubmitError::NoQueue));
    let ended = fixture.guest.balloon.requests().totals().iter().collect::<Vec<_>>();
    let all = MAX_QUEUED_REQUESTS as u64;
    assert_eq!(ended, [(RequestKind::DropCaches, "queues-stopped", all)]);
}

#[test]
fn a_hold_ends_on_release_loss_or_driver_reset() {
    let mut fixture = Fixture::new();
    let hold = |fixture: &mut Fixture| {
        let id = fixture.submit(HOLD);
        assert_eq!(fixture.take().command, Command::HoldFree { reserve_pages: 7 });
        assert_eq!(fixture.answer(id, Outcome::Done, [16; 4], &record_bytes(0x400, 16, &[])), 0);
        let kept = fixture.guest.balloon.requests().hold().expect("a hold");
        assert_eq!((kept.pages.id, kept.state), (id, HoldState::Kept));
        assert_eq!(kept.pages.pages.len(), 16);
        id
    };
    let state = |fixture: &Fixture| fixture.guest.balloon.requests().hold().map(|hold| hold.state);

    let id = hold(&mut fixture);
    assert_eq!(fixture.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 0);
    assert_eq!(state(&fixture), None);
    assert_eq!(fixture.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 4, "the hold is gone");

    let id = hold(&mut fixture);
    let release = fixture.submit(DeviceRequest::ReleaseHold);
    assert_eq!(fixture.take().command, Command::ReleaseHold { hold: id });
    assert_eq!(state(&fixture), Some(HoldState::Releasing));
    assert_eq!(fixture.answer(release, Outcome::Done, [16, 0, 0, 0], &[]), 0);
    assert_eq!(state(&fixture), None);

    // Lost while the release is in flight.
    let id = hold(&mut fixture);
    let release = fixture.submit(DeviceRequest::ReleaseHold);
    fixture.take();
    assert_eq!(fixture.answer(id, Outcome::HoldLost, [16, 0, 0, 0], &[]), 0);
    assert_eq!(fixture.answer(release, Outcome::BadArgument, [0; 4], &[]), 0);
    assert_eq!(fixture.failure(release), RequestFailure::HoldLost);

    // A release that gets no answer may be requested again.
    hold(&mut fixture);
    fixture.submit(DeviceRequest::ReleaseHold);
    fixture.take();
    let late = fixture.at(1000);
    assert!(fixture.guest.balloon.requests_mut().expire(late));
    assert_eq!(state(&fixture), Some(HoldState::Releasing));
    fixture.submit(DeviceRequest::ReleaseHold);

    fixture.guest.balloon.suspend();
    assert_eq!(state(&fixture), Some(HoldState::Releasing));
    fixture.guest.balloon.reset(WITH_REQUESTS);
    assert_eq!(state(&fixture), None);
    assert!(fixture.guest.balloon.requests().newest().is_none());
}

#[test]
fn a_paused_hold_resumes() {
    let mut fixture = Fixture::new();
    let id = fixture.submit(HOLD);
    fixture.take();
    assert_eq!(fixture.answer(id, Outcome::Done, [0; 4], &[]), 0);
    fixture.guest.balloon.suspend();
    let state = |fixture: &Fixture| fixture.guest.balloon.requests().hold().unwrap().state;
    assert_eq!(state(&fixture), HoldState::Paused);
    fixture.serve();
    assert_eq!(state(&fixture), HoldState::Kept);
}

#[test]
fn pending_chains_are_returned_before_the_queue_stops() {
    let mut fixture = Fixture::new();
    for _ in 0..2 {
        fixture.post_waiting();
    }
    fixture.serve();
    let Fixture { guest, queue, .. } = &mut fixture;
    let notify = guest.balloon.return_unused(Vq::Request, &guest.memory, &mut queue.queue);
    assert!(notify.unwrap());
    assert_eq!(
        [fixture.returned(), fixture.returned(), fixture.returned()],
        [Some(Returned::Empty), Some(Returned::Empty), None]
    );
    // Chains of a vring that is gone are dropped.
    fixture.post_waiting();
    fixture.serve();
    fixture.guest.balloon.forget_pending(Vq::Request);
    fixture.submit(DROP);
    fixture.serve();
    assert_eq!(fixture.returned(), None);
}

#[test]
fn chains_beyond_the_ring_size_do_not_wait() {
    let mut fixture = Fixture::new();
    for _ in 0..RING_SIZE {
        fixture.post_waiting();
    }
    fixture.serve();
    assert_eq!(fixture.returned(), None);
    for head in 0..RING_SIZE {
        fixture.queue.ring.publish(&fixture.guest.memory, head);
        fixture.serve();
        assert_eq!(fixture.returned(), Some(Returned::Empty));
    }
    assert_eq!(fixture.guest.balloon.faults().get(Fault::RepeatedChain), u64::from(RING_SIZE));
}

#[test]
fn a_bad_ring_ends_all_requests() {
    let mut fixture = Fixture::new();
    let id = fixture.submit(DROP);
    fixture.take();
    let memory = fixture.guest.memory.clone();
    fixture.queue.ring.set_avail_idx(&memory, 0x8000);
    let Fixture { guest, queue, .. } = &mut fixture;
    assert!(guest.balloon.process_queue(Vq::Request, &guest.memory, &mut queue.queue).is_err());
    assert_eq!(fixture.failure(id), RequestFailure::BadRing);
    fixture.guest.still_works();
}

#[test]
fn a_new_layout_forgets_the_newest_free_pages() {
    let mut fixture = Fixture::new();
    let id = fixture.submit(SNAPSHOT);
    fixture.take();
    assert_eq!(fixture.answer(id, Outcome::Done, [0; 4], &record_bytes(0x400, 12, &[])), 0);
    assert_eq!(fixture.guest.balloon.requests().newest().unwrap().pages.len(), 1);
    fixture.guest.balloon.set_layout(MemoryLayout::new([(MIB, MIB)]).unwrap());
    assert!(fixture.guest.balloon.requests().newest().is_none());
}

#[test]
fn only_the_last_outcomes_are_kept() {
    let mut fixture = Fixture::new();
    let ids: Vec<_> = (0..MAX_OUTCOMES + 3)
        .map(|_| {
            let id = fixture.submit(DROP);
            fixture.take();
            assert_eq!(fixture.answer(id, Outcome::Done, [0; 4], &[]), 0);
            id
        })
        .collect();
    let requests = fixture.guest.balloon.requests_mut();
    let kept = ids.into_iter().filter(|id| requests.take_outcome(*id).is_some()).count();
    assert_eq!(kept, MAX_OUTCOMES);
}

#[test]
fn an_answer_without_a_status_buffer_counts() {
    let mut fixture = Fixture::new();
    let id = fixture.submit(DROP);
    fixture.take();
    fixture.guest.write(MESSAGE, &answer(id, Outcome::Done, [1; 4], &[]));
    let buffers = [Buffer::readable(MESSAGE, ANSWER_HEADER_BYTES as u32)];
    fixture.queue.ring.send(&fixture.guest.memory, &buffers);
    fixture.serve();
    assert_eq!(fixture.returned(), Some(Returned::Empty));
    assert!(fixture.guest.balloon.requests_mut().take_outcome(id).unwrap().is_ok());
}
