//! The operator's requests, and guests that answer correctly, wrongly or not at all.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use balloon_abi::{Caches, Command, Outcome};
use control::api::HoldState;
use control::{GuestErrorKind, GuestRequest};

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, REQUEST, Vm, Vmm, WITH_REQUESTS};
use crate::support::guest::{BASE, FIRST_PAGE, PAGE, PAGES, data_pages};
use crate::support::requests::{Returned, answer_bytes, ask, blocks, why};
use crate::support::server::{Served, Server};
use crate::{assert_balloons, assert_serves};

const ACCEPTED: u32 = 0;
const MALFORMED: u32 = 1;
const OUTSIDE: u32 = 2;
const REPEATED: u32 = 3;
const UNWANTED: u32 = 4;

/// A short timeout.
const SHORT: Duration = Duration::from_millis(60);

const DROP: GuestRequest = GuestRequest::DropCaches(control::api::Caches::All);
const SNAPSHOT: GuestRequest = GuestRequest::Snapshot { min_block_bytes: PAGE };
const HOLD: GuestRequest = GuestRequest::Hold { reserve_bytes: 16 * PAGE };

/// Boots a guest whose driver has posted two waiting chains.
fn guest_with_requests(vmm: Vmm) -> (Server, Vm, Served) {
    let server = Server::new(control::ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(vmm, front, WITH_REQUESTS);
    vm.wait_for_requests(2);
    vm.front.barrier();
    (server, vm, served)
}

/// Polls until `done`, for a state without a notification.
fn until(done: impl Fn() -> bool) {
    let end = Instant::now() + TEST_TIMEOUT;
    while !done() {
        assert!(Instant::now() < end, "timed out");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Expects that a request is answered and the balloon works.
fn assert_still_asks(server: &Server, vm: &mut Vm) {
    let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
    let id = loop {
        vm.wait_for_requests(1);
        match vm.returned() {
            Returned::Request(request) if request.command == Command::DropCaches(Caches::ALL) => {
                break request.id;
            }
            _ => {}
        }
    };
    assert_eq!(vm.answer(id, Outcome::Done, [9, 4, 3, 1], &[]), ACCEPTED);
    assert_eq!(operator.join().unwrap().unwrap().values, [9, 4, 3, 1]);
    assert_balloons(server, vm);
}

#[test]
fn drop_caches_returns_its_values() {
    for vmm in [Vmm::Uml, Vmm::Qemu] {
        let (server, mut vm, _served) = guest_with_requests(vmm);
        let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
        let request = vm.next_request();
        assert_eq!(request.command, Command::DropCaches(Caches::ALL));
        assert_eq!(server.status().requests.running.as_deref(), Some("drop-caches"));
        assert_eq!(vm.answer(request.id, Outcome::Done, [100, 40, 7, 5], &[]), ACCEPTED);
        let answer = operator.join().unwrap().unwrap();
        assert_eq!((answer.id, answer.values), (request.id, [100, 40, 7, 5]));
        assert!((answer.guest_ms - 1.5).abs() < 1e-9, "{}", answer.guest_ms);
        let requests = server.status().requests;
        assert_eq!((requests.running, requests.ended["drop-caches"]["done"]), (None, 1));
        assert_still_asks(&server, &mut vm);
        assert_eq!(server.status().faults.total(), 0);
    }
}

#[test]
fn a_free_page_report_in_several_answers_is_kept() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
    let request = vm.next_request();
    assert_eq!(request.command, Command::ReportFree { min_granule_shift: 12 });
    let first = data_pages().start;
    let more = blocks(first, 16, &[0b1011]);
    assert_eq!(vm.answer(request.id, Outcome::More, [48, 99, 5, 0], &more), ACCEPTED);
    assert!(server.balloon.free_pages().is_none(), "not complete yet");
    // One block is reported again, merged with its neighbour.
    let last = [blocks(first, 32, &[1]), blocks(first + 500, 1, &[1])].concat();
    assert_eq!(vm.answer(request.id, Outcome::Done, [81, 99, 7, 0], &last), ACCEPTED);
    let free = operator.join().unwrap().unwrap().free.unwrap();
    assert_eq!(free.summary.total_bytes, 49 * PAGE);
    let sizes: Vec<_> = free.summary.blocks.iter().map(|b| (b.block_bytes, b.count)).collect();
    assert_eq!(sizes, [(32 * PAGE, 1), (16 * PAGE, 3), (PAGE, 1)]);
    assert_eq!((free.summary.guest_free_bytes, free.summary.lock_ns_max), (99 * PAGE, 7));
    let kept = server.balloon.free_pages().unwrap();
    assert_eq!(kept.free, free.free);
    let cells = kept.summarize().map;
    assert_eq!((cells.cell_pages, cells.regions.len()), (2, 1));
    assert_eq!(cells.regions[0].free_pages.iter().sum::<u64>(), 49);
    assert_still_asks(&server, &mut vm);
}

#[test]
fn a_hold_can_be_released_or_lost() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Qemu);
    let first = data_pages().start;
    let state = || server.status().requests.hold;
    for lost in [false, true] {
        let operator = ask(&server.balloon, HOLD, TEST_TIMEOUT);
        vm.wait_for_requests(1);
        let request = vm.next_request();
        assert_eq!(request.command, Command::HoldFree { reserve_pages: 16 });
        let named = blocks(first, 64, &[0b11]);
        assert_eq!(vm.answer(request.id, Outcome::Done, [128, 200, 0, 0], &named), ACCEPTED);
        let answer = operator.join().unwrap().unwrap();
        assert_eq!(answer.free.unwrap().summary.hold, Some(HoldState::Kept));
        let again = ask(&server.balloon, HOLD, TEST_TIMEOUT).join().unwrap();
        assert_eq!(
            why(again),
            (GuestErrorKind::NotPossible, "the guest already holds free pages".into())
        );
        if lost {
            assert_eq!(vm.answer(request.id, Outcome::HoldLost, [128, 0, 0, 0], &[]), ACCEPTED);
        } else {
            let operator = ask(&server.balloon, GuestRequest::ReleaseHold, TEST_TIMEOUT);
            vm.wait_for_requests(1);
            let release = vm.next_request();
            assert_eq!(release.command, Command::ReleaseHold { hold: request.id });
            assert_eq!(state(), Some(HoldState::Releasing));
            assert_eq!(vm.answer(release.id, Outcome::Done, [128, 0, 0, 0], &[]), ACCEPTED);
            assert_eq!(operator.join().unwrap().unwrap().values[0], 128);
        }
        assert_eq!(state(), None);
        assert_eq!(
            server.balloon.free_pages().unwrap().summary.hold,
            None,
            "the hold has ended, but its pages are known"
        );
    }
    let nothing = ask(&server.balloon, GuestRequest::ReleaseHold, TEST_TIMEOUT).join().unwrap();
    assert_eq!(why(nothing).0, GuestErrorKind::NotPossible);
    assert_still_asks(&server, &mut vm);
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn an_impossible_request_is_refused_immediately() {
    let server = Server::new(control::ReleaseMode::Background);
    let refused = |what| {
        let start = Instant::now();
        assert_eq!(
            why(ask(&server.balloon, DROP, TEST_TIMEOUT).join().unwrap()),
            (GuestErrorKind::NotPossible, String::from(what))
        );
        assert!(start.elapsed() < TEST_TIMEOUT / 4, "it is refused immediately");
    };
    refused("no guest is connected that could drop caches");
    let (front, _served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, BITMAP);
    vm.front.barrier();
    refused("the guest's driver cannot drop caches: it has no request queue");
}

#[test]
fn each_unanswered_request_times_out() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    let start = Instant::now();
    let operators = [ask(&server.balloon, DROP, SHORT), ask(&server.balloon, DROP, SHORT)];
    let request = vm.next_request();
    for operator in operators {
        let (why, what) = why(operator.join().unwrap());
        assert_eq!(why, GuestErrorKind::TimedOut, "{what}");
    }
    assert!(start.elapsed() >= SHORT);
    // It was cancelled, and confirms that late.
    let cancel = vm.next_request();
    assert_eq!((cancel.id, cancel.command), (request.id, Command::Cancel));
    assert_eq!(vm.answer(request.id, Outcome::Cancelled, [0; 4], &[]), UNWANTED);
    let status = server.status();
    assert_eq!((status.requests.late_answers, status.faults.total()), (1, 0));
    // A second confirmation is a fault.
    assert_eq!(vm.answer(request.id, Outcome::Cancelled, [0; 4], &[]), UNWANTED);
    assert_eq!(server.guest_faults("answered_twice"), 1);
    assert_still_asks(&server, &mut vm);
}

#[test]
fn a_driver_without_waiting_chains_is_reported() {
    let server = Server::new(control::ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, WITH_REQUESTS);
    vm.front.barrier();
    let (reason, what) = why(ask(&server.balloon, DROP, SHORT).join().unwrap());
    assert_eq!(reason, GuestErrorKind::TimedOut);
    assert!(what.contains("did not accept a request"), "{what}");
    // A timed-out request is not sent to a driver that recovers late.
    vm.wait_for_requests(2);
    assert_eq!(vm.returned_within(SHORT), None);
    assert_still_asks(&server, &mut vm);
}

#[test]
fn an_operator_cancels_the_running_request() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Qemu);
    let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
    let request = vm.next_request();
    let cancelled = server.balloon.cancel_request(None).unwrap();
    assert_eq!((cancelled.id, cancelled.command.as_str()), (request.id, "report-free"));
    assert_eq!(vm.next_request().command, Command::Cancel);
    assert_eq!(vm.answer(request.id, Outcome::Cancelled, [0; 4], &[]), ACCEPTED);
    assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::Stopped);
    assert!(server.balloon.cancel_request(None).is_err(), "nothing runs");
    // The wait for a guest that ignores the cancel is short.
    let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
    vm.wait_for_requests(2);
    vm.next_request();
    let start = Instant::now();
    server.balloon.cancel_request(None).unwrap();
    assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::Stopped);
    assert!(start.elapsed() < TEST_TIMEOUT / 2);
    assert_still_asks(&server, &mut vm);
}

#[test]
fn too_many_requests_are_refused_immediately() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    let mut operators = vec![ask(&server.balloon, DROP, TEST_TIMEOUT)];
    let mut request = vm.next_request();
    operators.extend((0..8).map(|_| ask(&server.balloon, DROP, TEST_TIMEOUT)));
    until(|| server.status().requests.waiting >= 8);
    let (reason, what) = why(ask(&server.balloon, DROP, TEST_TIMEOUT).join().unwrap());
    assert_eq!(
        (reason, what.as_str()),
        (GuestErrorKind::TooMany, "8 requests to the guest are queued already")
    );
    let mut last = 0;
    while !operators.is_empty() {
        assert!(request.id > last, "in order of submission");
        last = request.id;
        assert_eq!(vm.answer(last, Outcome::Done, [0; 4], &[]), ACCEPTED);
        until(|| operators.iter().any(JoinHandle::is_finished));
        let at = operators.iter().position(JoinHandle::is_finished).unwrap();
        operators.swap_remove(at).join().unwrap().unwrap();
        if !operators.is_empty() {
            vm.wait_for_requests(1);
            request = vm.next_request();
        }
    }
    assert_still_asks(&server, &mut vm);
}

/// Answers that violate the protocol, with their status and fault.
fn invalid_answers(id: u32) -> Vec<(&'static str, u32, Vec<u8>)> {
    let done = |records: &[u8]| answer_bytes(id, Outcome::Done, [0; 4], records);
    let with = |at: usize, byte: u8| {
        let mut bytes = done(&[]);
        bytes[at] = byte;
        bytes
    };
    let page = data_pages().start;
    vec![
        ("malformed_answer", MALFORMED, done(&[])[..47].to_vec()),
        ("malformed_answer", MALFORMED, with(4, 8)),
        ("malformed_answer", MALFORMED, answer_bytes(id, Outcome::HoldLost, [0; 4], &[])),
        ("malformed_record", MALFORMED, done(&[0; 12])),
        ("outside_memory", OUTSIDE, done(&blocks(FIRST_PAGE + PAGES, 1, &[1]))),
        ("outside_memory", OUTSIDE, done(&blocks(FIRST_PAGE - 64, 1, &[1]))),
        ("repeated_page", REPEATED, done(&[blocks(page, 1, &[1]), blocks(page, 1, &[1])].concat())),
    ]
}

#[test]
fn an_invalid_answer_ends_only_its_request() {
    for case in 0..invalid_answers(1).len() {
        let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
        let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
        let request = vm.next_request();
        let (fault, status, bytes) = invalid_answers(request.id).swap_remove(case);
        assert_eq!(vm.answer_raw(&bytes), status, "{fault}");
        let (reason, what) = why(operator.join().unwrap());
        assert_eq!(reason, GuestErrorKind::Refused);
        assert!(what.contains("violates the protocol"), "{what}");
        assert_eq!(server.guest_faults(fault), 1, "{fault}");
        assert_eq!(server.status().requests.ended["report-free"]["guest_fault"], 1);
        assert!(server.balloon.free_pages().is_none());
        assert_still_asks(&server, &mut vm);
    }
}

#[test]
fn pages_in_the_balloon_cannot_be_reported_as_free() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    let page = data_pages().start;
    vm.inflate(&(page..page + 8).collect());
    let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
    let request = vm.next_request();
    let status = vm.answer(request.id, Outcome::Done, [0; 4], &blocks(page + 7, 1, &[0b11]));
    assert_eq!((status, server.guest_faults("free_in_balloon")), (OUTSIDE, 1));
    assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::Refused);
    // A page that is inflated during the report was free before.
    vm.wait_for_requests(1);
    let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
    let request = vm.next_request();
    vm.inflate(&(page + 8..page + 10).collect());
    let named = blocks(page + 8, 1, &[0b111]);
    assert_eq!(vm.answer(request.id, Outcome::Done, [0; 4], &named), ACCEPTED);
    let free = operator.join().unwrap().unwrap().free.unwrap();
    assert_eq!(free.summary.total_bytes, PAGE, "the third is left");
    vm.deflate(&(page..page + 10).collect());
    assert_still_asks(&server, &mut vm);
}

#[test]
fn endless_partial_answers_are_cut_off() {
    for records in [Vec::new(), blocks(data_pages().start, 1, &[u64::MAX; 4])] {
        let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
        let operator = ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT);
        let request = vm.next_request();
        let mut chunks = 0u64;
        while vm.answer(request.id, Outcome::More, [0; 4], &records) == ACCEPTED {
            chunks += 1;
            assert!(chunks <= 2 * PAGES, "no end");
        }
        assert_eq!(chunks, if records.is_empty() { 2 * PAGES } else { 2 * PAGES / 256 });
        assert_eq!(server.guest_faults("too_many_pages"), 1);
        assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::Refused);
        assert_eq!(vm.answer(request.id, Outcome::More, [0; 4], &records), UNWANTED);
        assert_eq!(
            server.guest_faults("unknown_request"),
            0,
            "the request was sent, and the answer is late"
        );
        assert_still_asks(&server, &mut vm);
    }
}

#[test]
fn an_unsolicited_answer_is_unwanted() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    for id in [0, 1, 77, u32::MAX] {
        assert_eq!(vm.answer(id, Outcome::Done, [0; 4], &[]), UNWANTED);
    }
    assert_eq!(server.guest_faults("unknown_request"), 4);
    let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
    let id = vm.next_request().id;
    assert_eq!(vm.answer(id + 1, Outcome::Done, [0; 4], &[]), UNWANTED);
    assert_eq!(vm.answer(id, Outcome::Done, [0; 4], &[]), ACCEPTED);
    operator.join().unwrap().unwrap();
    assert_eq!(vm.answer(id, Outcome::Done, [0; 4], &[]), UNWANTED);
    assert_eq!(server.guest_faults("answered_twice"), 1);
    assert_still_asks(&server, &mut vm);
}

#[test]
fn the_error_of_the_guests_kernel_is_reported() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    for (errno, text) in [(12, "Cannot allocate memory"), (u64::MAX, "error 18446744073709551615")]
    {
        let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
        vm.wait_for_requests(1);
        let id = vm.next_request().id;
        assert_eq!(vm.answer(id, Outcome::Failed, [errno, 0, 0, 0], &[]), ACCEPTED);
        let (reason, what) = why(operator.join().unwrap());
        assert_eq!(reason, GuestErrorKind::Refused);
        assert!(what.contains(text), "{what}");
    }
    assert_still_asks(&server, &mut vm);
}

#[test]
fn an_unloaded_driver_gets_its_chains_back() {
    for enable in [true, false] {
        let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
        if !enable {
            vm.remove_uml(true);
            vm.probe_uml(WITH_REQUESTS, false);
            vm.wait_for_requests(2);
            // The front end sends GET_FEATURES when it removes a driver.
            vm.front.read_config(16);
        }
        let operators =
            [ask(&server.balloon, DROP, TEST_TIMEOUT), ask(&server.balloon, HOLD, TEST_TIMEOUT)];
        vm.next_request();
        until(|| server.status().requests.waiting >= 1);
        vm.remove_uml(enable);
        for operator in operators {
            let (reason, what) = why(operator.join().unwrap());
            assert_eq!(reason, GuestErrorKind::Stopped);
            assert!(what.contains("unloaded"), "{what}");
        }
        assert_eq!(vm.returned(), Returned::Empty, "the waiting chain is returned");
        let (reason, what) = why(ask(&server.balloon, DROP, TEST_TIMEOUT).join().unwrap());
        assert_eq!(reason, GuestErrorKind::NotPossible);
        assert!(what.contains("unloaded"), "{what}");
        // The next driver starts with no state.
        vm.probe_uml(WITH_REQUESTS, enable);
        vm.wait_for_requests(1);
        vm.front.read_config(16);
        assert_still_asks(&server, &mut vm);
        assert_eq!(server.status().faults.total(), 0);
    }
}

#[test]
fn a_pause_keeps_the_hold_and_ends_the_request() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Qemu);
    // Queues at position 0 are those of a driver that starts.
    let page = data_pages().start + 100;
    vm.inflate(&(page..page + 1).collect());
    vm.deflate(&(page..page + 1).collect());
    let operator = ask(&server.balloon, HOLD, TEST_TIMEOUT);
    let hold = vm.next_request().id;
    let named = blocks(data_pages().start, 64, &[1]);
    assert_eq!(vm.answer(hold, Outcome::Done, [64, 64, 0, 0], &named), ACCEPTED);
    operator.join().unwrap().unwrap();
    vm.wait_for_requests(1);
    let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
    let late = vm.next_request().id;
    let bases = vm.stop_qemu();
    assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::Stopped);
    assert_eq!(server.status().requests.hold, Some(HoldState::Paused));
    assert_eq!(vm.returned(), Returned::Empty);
    vm.start_qemu(WITH_REQUESTS, bases);
    vm.wait_for_requests(1);
    assert_eq!(vm.answer(late, Outcome::Done, [0; 4], &[]), UNWANTED);
    assert_eq!(server.status().requests.late_answers, 1);
    assert_eq!(server.status().requests.hold, Some(HoldState::Kept));
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn a_disconnect_ends_every_request() {
    let (server, mut vm, served) = guest_with_requests(Vmm::Uml);
    let operators =
        [ask(&server.balloon, SNAPSHOT, TEST_TIMEOUT), ask(&server.balloon, DROP, TEST_TIMEOUT)];
    vm.next_request();
    until(|| server.status().requests.waiting >= 1);
    drop(vm);
    served.outcome().unwrap();
    for operator in operators {
        let (reason, what) = why(operator.join().unwrap());
        assert_eq!(reason, GuestErrorKind::Stopped);
        assert!(what.contains("disconnected"), "{what}");
    }
    assert_eq!(server.status().requests.ended["drop-caches"]["hung_up"], 1);
    assert_serves(&server, Vmm::Uml, WITH_REQUESTS);
}

#[test]
fn chains_that_cannot_wait_are_returned_unused() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    let memory = vm.guest.memory.clone();
    // Too short for a request, empty, and the chain at 0 again.
    let short = [guest_ring::Buffer::writable(BASE + 0x39000, 15)];
    vm.rings[REQUEST].send(&memory, &short);
    vm.rings[REQUEST].send(&memory, &[]);
    vm.rings[REQUEST].publish(&memory, 0);
    vm.kick(REQUEST);
    assert_eq!([vm.returned(), vm.returned(), vm.returned()], [Returned::Empty; 3]);
    assert_eq!(server.guest_faults("empty_message"), 2);
    assert_eq!(server.guest_faults("repeated_chain"), 1);
    // An address outside of memory is detected on the write.
    vm.rings[REQUEST].send(&memory, &[guest_ring::Buffer::writable(PAGE, 16)]);
    vm.kick(REQUEST);
    for _ in 0..2 {
        let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
        let id = vm.next_request().id;
        assert_eq!(vm.answer(id, Outcome::Done, [0; 4], &[]), ACCEPTED);
        operator.join().unwrap().unwrap();
    }
    let operator = ask(&server.balloon, DROP, SHORT);
    assert_eq!(vm.returned(), Returned::Empty);
    assert_eq!(why(operator.join().unwrap()).0, GuestErrorKind::TimedOut);
    assert_eq!(server.guest_faults("bad_descriptor"), 1);
    assert_still_asks(&server, &mut vm);
}

/// Without protocol features a front end cannot stop a queue, only send GET_FEATURES. From
/// then on the driver's memory may have another use.
#[test]
fn a_request_does_not_access_the_vring_of_a_removed_driver() {
    let (server, mut vm, _served) = guest_with_requests(Vmm::Uml);
    vm.remove_uml(true);
    vm.probe_uml(WITH_REQUESTS, false);
    vm.wait_for_requests(2);
    vm.front.read_config(16);
    vm.remove_uml(false);
    let ring = &vm.rings[REQUEST];
    let (at, bytes) = (ring.table(), guest_ring::GuestRing::bytes(ring.size()));
    let mut other = vec![0xa5; bytes as usize];
    vm.guest.write(at, &other);
    for _ in 0..20 {
        let outcome = ask(&server.balloon, DROP, SHORT).join().unwrap();
        assert_eq!(why(outcome).0, GuestErrorKind::NotPossible);
        server.balloon.set_target(5).unwrap();
        server.balloon.set_target(0).unwrap();
        vm.front.read_config(16);
    }
    vm_memory::Bytes::read_slice(&vm.guest.memory, &mut other, vm_memory::GuestAddress(at))
        .unwrap();
    assert!(other.iter().all(|byte| *byte == 0xa5), "the device wrote into it");
}
