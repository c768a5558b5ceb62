//! Statistics, hints, reports and poison, with the messages of real front ends.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use balloon_abi::{Features, Stat, StatTag};
use control::api::ReleaseMode;
use control::{HintOutcome, StatsStatus};
use guest_ring::Buffer;
use vhost_device_balloon::{End, SessionError, Violation};

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{CLASSIC, INFLATE, MESSAGE, Vm, Vmm};
use crate::support::front_end::{CONFIG_CHANGE, channel_message, request};
use crate::support::guest::{PAGE, data_pages};
use crate::support::server::{Served, Server};
use crate::{assert_balloons, some_pages};

/// The queue after inflate and deflate, with one feature that has a queue.
const THIRD: usize = 2;

const STATS: Features = CLASSIC.union(Features::STATS_VQ);
const HINTS: Features = CLASSIC.union(Features::FREE_PAGE_HINT);
const REPORTS: Features = CLASSIC.union(Features::REPORTING);
const POISON: Features = REPORTS.union(Features::PAGE_POISON);

const INTERVAL: Duration = Duration::from_millis(100);

fn booted(vmm: Vmm, features: Features) -> (Server, Vm, Served) {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let vm = Vm::boot(vmm, front, features);
    (server, vm, served)
}

impl Vm {
    /// Puts a chain on the third queue.
    fn send(&mut self, chain: &[Buffer]) -> u32 {
        let head = self.rings[THIRD].send(&self.guest.memory, chain);
        self.kick(THIRD);
        head.into()
    }

    /// Posts statistics with this free memory.
    fn tell(&mut self, free_bytes: u64) -> u32 {
        let stat = Stat { tag: StatTag::MEM_FREE, value: free_bytes };
        self.guest.write(MESSAGE, &stat.to_bytes());
        self.send(&[Buffer::readable(MESSAGE, 10)])
    }

    /// Sends a command id on the hint queue.
    fn say(&mut self, number: u32) {
        self.guest.write(MESSAGE, &number.to_le_bytes());
        let head = self.send(&[Buffer::readable(MESSAGE, 4)]);
        assert_eq!(self.wait_used(THIRD), head);
    }

    /// Names free pages and waits until the chain is returned.
    fn name_free(&mut self, runs: &[(u64, u64)]) {
        let chain: Vec<Buffer> = runs
            .iter()
            .map(|(start, pages)| Buffer::writable(start * PAGE, (pages * PAGE) as u32))
            .collect();
        let head = self.send(&chain);
        assert_eq!(self.wait_used(THIRD), head);
    }

    fn hint_command(&self) -> u32 {
        u32::from_le_bytes(self.front.read_config(16)[8..12].try_into().unwrap())
    }
}

/// Polls until statistics fulfil `done`.
fn until_stats(server: &Server, done: impl Fn(&StatsStatus) -> bool) -> StatsStatus {
    let end = Instant::now() + TEST_TIMEOUT;
    loop {
        let stats = server.status().stats;
        if done(&stats) {
            return stats;
        }
        assert!(Instant::now() < end, "{stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn free_bytes(stats: &StatsStatus) -> Option<u64> {
    stats.values.get("free_bytes").copied()
}

#[test]
fn statistics_are_requested_at_the_interval() {
    let (server, mut vm, served) = booted(Vmm::Uml, STATS);
    let mut head = vm.tell(7);
    let stats = until_stats(&server, |stats| free_bytes(stats) == Some(7));
    assert!(stats.stale, "no interval is set: {stats:?}");
    assert!(vm.rings[THIRD].take_used(&vm.guest.memory).is_none(), "the buffer is kept");

    // Before it is set: the first request may be sent before that returns.
    let started = Instant::now();
    server.balloon.set_stats_interval(Some(INTERVAL)).unwrap();
    for value in 100..105 {
        assert_eq!(vm.wait_used(THIRD), head);
        head = vm.tell(value);
        let stats = until_stats(&server, |stats| free_bytes(stats) == Some(value));
        assert_eq!((stats.stale, stats.interval_ms), (false, 100));
    }
    // The first request is immediate; five requests span four intervals.
    assert!(started.elapsed() >= 4 * INTERVAL, "{:?}", started.elapsed());

    // A guest that does not answer gets no new request, and its values become stale.
    assert_eq!(vm.wait_used(THIRD), head);
    until_stats(&server, |stats| stats.stale);
    assert!(vm.rings[THIRD].take_used(&vm.guest.memory).is_none());
    vm.tell(9);
    until_stats(&server, |stats| !stats.stale && free_bytes(stats) == Some(9));
    server.balloon.set_stats_interval(None).unwrap();
    assert_balloons(&server, &mut vm);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    let stats = server.status().stats;
    assert!(stats.stale && free_bytes(&stats) == Some(9), "{stats:?}");
    assert_eq!(server.status().faults.total(), 0);
}

/// The back end sleeps between statistics requests.
#[test]
fn statistics_requests_cost_no_cpu_time() {
    let (server, mut vm, served) = booted(Vmm::Uml, STATS);
    vm.tell(7);
    server.balloon.set_stats_interval(Some(INTERVAL)).unwrap();
    vm.wait_used(THIRD);
    let before = served.cpu_ns();
    std::thread::sleep(5 * INTERVAL);
    let spent = Duration::from_nanos(served.cpu_ns() - before);
    assert!(spent < INTERVAL / 2, "{spent:?}");
}

#[test]
fn a_stopped_queue_gets_its_buffer_back_and_resumes() {
    let (server, mut vm, _served) = booted(Vmm::Qemu, STATS);
    let head = vm.tell(7);
    until_stats(&server, |stats| free_bytes(stats) == Some(7));
    let bases = vm.stop_qemu();
    assert_eq!(vm.wait_used(THIRD), head);
    // The driver sees the buffer when it runs again, and answers.
    vm.start_qemu(STATS, bases);
    let head = vm.tell(8);
    until_stats(&server, |stats| free_bytes(stats) == Some(8));
    server.balloon.set_stats_interval(Some(INTERVAL)).unwrap();
    assert_eq!(vm.wait_used(THIRD), head);
    assert_eq!(server.status().faults.total(), 0);
}

/// If a driver clears an offered feature, User Mode Linux negotiates again,
/// without bit 30. It also does so when a module is inserted again.
#[test]
fn drivers_that_clear_features_can_be_reloaded() {
    let (server, mut vm, _served) = booted(Vmm::Uml, STATS | Features::PAGE_POISON);
    vm.front.barrier();
    server.balloon.set_stats_interval(Some(INTERVAL)).unwrap();
    for value in 0..3 {
        vm.remove_uml(value == 0);
        vm.probe_uml(STATS, false);
        let head = vm.tell(value);
        until_stats(&server, |stats| !stats.stale && free_bytes(stats) == Some(value));
        assert_eq!(vm.wait_used(THIRD), head);
        assert_balloons(&server, &mut vm);
    }
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn hints_are_requested_reported_and_returned() {
    let (server, mut vm, _served) = booted(Vmm::Uml, HINTS);
    vm.front.barrier();
    let first = data_pages().start;
    let mut last = 0;
    for _ in 0..3 {
        let id = server.balloon.start_hints().unwrap();
        assert!(id > last && id >= 0x8000_0000, "{id:#x}");
        last = id;
        assert_eq!(channel_message(vm.channel.as_ref().unwrap()), CONFIG_CHANGE);
        assert_eq!(vm.hint_command(), id);
        assert!(server.balloon.start_hints().is_err(), "one at a time");
        vm.say(id);
        vm.name_free(&[(first, 100)]);
        vm.name_free(&[(first + 200, 1), (first + 100, 3)]);
        let early = server.balloon.wait_hints(id, Duration::ZERO);
        assert_eq!((early.outcome, early.pages), (HintOutcome::InProgress, 104));
        vm.say(0);
        let hints = server.balloon.wait_hints(id, TEST_TIMEOUT);
        assert_eq!((hints.outcome, hints.pages, hints.runs), (HintOutcome::Complete, 104, 2));
        let list: Vec<_> = hints.list.iter().map(|run| (run.start, run.pages)).collect();
        assert_eq!(list, [(first, 103), (first + 200, 1)]);
        server.balloon.end_hints(id).unwrap();
        assert_eq!(channel_message(vm.channel.as_ref().unwrap()), CONFIG_CHANGE);
        assert_eq!(vm.hint_command(), 1);
    }
    server.settle();
    vm.guest.assert_gone(&BTreeSet::new());
    assert_balloons(&server, &mut vm);
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn unanswered_hints_time_out() {
    let (server, mut vm, served) = booted(Vmm::Uml, HINTS);
    vm.front.barrier();
    let id = server.balloon.start_hints().unwrap();
    let started = Instant::now();
    let silent = server.balloon.wait_hints(id, INTERVAL);
    assert_eq!((silent.outcome, silent.pages), (HintOutcome::InProgress, 0));
    assert!(started.elapsed() >= INTERVAL);
    server.balloon.end_hints(id).unwrap();
    // A late answer is ignored, and is no fault.
    vm.say(id);
    vm.name_free(&[(data_pages().start, 1)]);
    vm.say(0);
    let next = server.balloon.start_hints().unwrap();
    assert_eq!(server.balloon.wait_hints(id, TEST_TIMEOUT).outcome, HintOutcome::Replaced);
    server.balloon.end_hints(id).unwrap();
    assert_eq!(vm.hint_command(), next, "the end of another request ends nothing");
    vm.say(next);
    drop(vm);
    assert_eq!(server.balloon.wait_hints(next, TEST_TIMEOUT).outcome, HintOutcome::Lost);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    server.balloon.end_hints(next).unwrap();
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn hints_are_not_requested_without_the_feature() {
    let (server, vm, _served) = booted(Vmm::Uml, CLASSIC);
    vm.front.barrier();
    assert!(server.balloon.start_hints().is_err());
    assert_eq!(vm.hint_command(), 0);
}

/// When a report is returned its pages are released, whatever else is pending.
#[test]
fn reports_are_released_before_they_are_returned() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
        let server = Server::new(mode);
        let (front, served) = server.connect();
        let mut vm = Vm::boot(Vmm::Uml, front, REPORTS);
        let balloon: BTreeSet<u64> = some_pages().into_iter().take(40).collect();
        vm.inflate(&balloon);
        let last = data_pages().end;
        vm.name_free(&[(last - 8, 4), (last - 4, 4), (last - 20, 1)]);
        let reported: BTreeSet<u64> = (last - 8..last).chain([last - 20]).collect();
        assert!(reported.iter().all(|page| vm.guest.is_zero(*page)), "before it is returned");
        server.settle();
        vm.guest.assert_gone(&balloon.union(&reported).copied().collect());
        // The guest uses the pages, and their content is not lost later.
        vm.guest.write_patterns(reported);
        vm.deflate(&balloon);
        vm.guest.write_patterns(balloon);
        server.settle();
        vm.guest.assert_gone(&BTreeSet::new());
        let status = server.status();
        assert_eq!(status.reports.messages, 1);
        assert_eq!(status.reports.reported_bytes, 9 * PAGE);
        assert_eq!(status.reports.released_bytes, 9 * PAGE);
        assert_eq!(status.reports.release_calls, 2, "one for each range");
        assert_eq!(status.balloon.actual_pages, 0);
        assert_eq!(status.faults.total(), 0);
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
    }
}

#[test]
fn a_report_does_not_count_in_the_last_change() {
    let (server, mut vm, _served) = booted(Vmm::Uml, REPORTS);
    assert_balloons(&server, &mut vm);
    let before = server.status();
    std::thread::sleep(Duration::from_millis(5));
    vm.name_free(&[(data_pages().start, 16)]);
    let after = server.status();
    assert_eq!(after.balloon, before.balloon);
    assert_eq!(after.release, before.release);
    assert_eq!(after.reports.released_bytes, 16 * PAGE);
}

#[test]
fn a_poison_prevents_the_release_of_reports() {
    for (poison_val, releases) in [(0xaaaa_aaaau32, false), (0, true)] {
        let (server, mut vm, _served) = booted(Vmm::Uml, POISON);
        vm.front.write_config(12, &poison_val.to_le_bytes());
        vm.front.barrier();
        assert_eq!(server.status().guest.poison_val, Some(poison_val));
        let page = data_pages().start;
        vm.name_free(&[(page, 1)]);
        assert_eq!(vm.guest.is_zero(page), releases);
        let reports = server.status().reports;
        assert_eq!(reports.poisoned_bytes, if releases { 0 } else { PAGE });
        assert_eq!(server.status().faults.total(), 0);
    }
}

/// QEMU writes the whole space, including `poison_val`, with any
/// features.
#[test]
fn a_write_of_the_whole_space_sets_no_poison_without_the_feature() {
    let (server, vm, _served) = booted(Vmm::Qemu, CLASSIC);
    vm.front.write_config(0, &[0x55; 16]);
    vm.front.barrier();
    let config = vm.front.read_config(16);
    assert_eq!(config[4..], [0x55, 0x55, 0x55, 0x55, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((server.status().guest.poison_val, server.status().faults.total()), (None, 0));
    vm.front.write_config(12, &[1; 4]);
    vm.front.barrier();
    assert_eq!(server.guest_faults("config_write"), 1);
}

#[test]
fn features_can_be_withheld() {
    let server = Server::new(ReleaseMode::Background);
    let withheld = Features::REPORTING | Features::STATS_VQ;
    server.backend().withhold(withheld);
    let (front, served) = server.connect();
    let offered = Features(front.request_u64(request::GET_FEATURES));
    assert_eq!((offered & withheld).0, 0);
    assert!(offered.contains(Features::FREE_PAGE_HINT | Features::PAGE_POISON));
    front.send_u64(request::SET_FEATURES, (HINTS | Features::REPORTING).0);
    let outcome = served.outcome();
    let features = Features::REPORTING.0;
    assert!(
        matches!(&outcome, Err(SessionError::Violation(Violation::Features { features: f })) if *f == features),
        "{outcome:?}"
    );
}

/// Hostile messages on one queue do not affect the other queues and the next
/// driver.
#[test]
fn hostile_messages_affect_only_their_queue() {
    let first = data_pages().start;
    let lies: [Vec<Buffer>; 7] = [
        vec![],
        vec![Buffer::writable(0, 4096)],
        vec![Buffer::writable(u64::MAX, u32::MAX)],
        vec![Buffer::writable(1 << 52, 4096)],
        vec![Buffer::writable(first * PAGE, u32::MAX)],
        vec![Buffer::readable(MESSAGE, 3)],
        vec![Buffer::readable(u64::MAX - 3, 4), Buffer::writable(first * PAGE, 4096)],
    ];
    for features in [STATS, HINTS, REPORTS] {
        let (server, mut vm, served) = booted(Vmm::Uml, features);
        for round in 0..2000usize {
            let lie = &lies[round % lies.len()];
            let head = vm.rings[THIRD].send(&vm.guest.memory, lie);
            // The device keeps one statistics buffer; all others are returned.
            if round > 0 || features != STATS {
                vm.kick(THIRD);
                let back = vm.wait_used(THIRD);
                assert!(back == u32::from(head) || features == STATS);
            }
        }
        vm.guest.assert_gone(&BTreeSet::new());
        assert!(server.status().faults.guest.values().sum::<u64>() >= 1700);
        let page = BTreeSet::from([first]);
        vm.inflate(&page);
        server.settle();
        vm.guest.assert_gone(&page);
        vm.deflate(&page);
        vm.guest.write_patterns(page);
        assert!(vm.rings[INFLATE].take_used(&vm.guest.memory).is_none());
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
        let (front, _served) = server.connect();
        assert_balloons(&server, &mut Vm::boot(Vmm::Uml, front, CLASSIC));
    }
}
