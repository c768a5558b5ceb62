//! No page is released while the guest may use it.

use std::collections::BTreeSet;
use std::io::Write;

use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::some_pages;
use crate::support::driver::{BITMAP, CLASSIC, DEFLATE, INFLATE, NO_TELL_HOST, Vm, Vmm};
use crate::support::front_end::request;
use crate::support::guest::data_pages;
use crate::support::server::Server;

/// Rounds of a race, each with different timing.
const ROUNDS: usize = 60;

/// After the driver was stopped, the guest may use every page, and its writes must
/// survive. `stop` stops the driver and returns when the VMM would run the guest
/// again.
fn assert_nothing_is_released_after(vmm: Vmm, stop: impl Fn(&Vm)) {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(vmm, front, CLASSIC);
    let pages = some_pages();
    for round in 0..ROUNDS {
        vm.inflate(&pages);
        // A different number of messages each time, to vary the timing.
        for _ in 0..round % 8 {
            vm.front.barrier();
        }
        stop(&vm);
        vm.guest.write_patterns(data_pages());
        let release = server.status().release;
        assert_eq!((release.pending_bytes, release.in_flight_bytes), (0, 0));
        vm.probe(CLASSIC);
        vm.guest.assert_gone(&BTreeSet::new());
    }
    // Longer than any delay of the release.
    std::thread::sleep(std::time::Duration::from_millis(3 * host_memory::QUIET_MS));
    vm.guest.assert_gone(&BTreeSet::new());
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// When a guest resets the device or reboots, the VMM stops the vrings, and the guest
/// may use all of its memory from then on.
#[test]
fn nothing_is_released_after_the_vrings_were_stopped() {
    assert_nothing_is_released_after(Vmm::Qemu, |vm| {
        vm.stop_qemu();
    });
}

#[test]
fn nothing_is_released_after_only_get_vring_base() {
    assert_nothing_is_released_after(Vmm::Qemu, |vm| {
        vm.stop_ring(0);
        vm.stop_ring(1);
    });
}

#[test]
fn nothing_is_released_after_the_queues_were_disabled() {
    assert_nothing_is_released_after(Vmm::Uml, |vm| vm.remove_uml(true));
}

#[test]
fn nothing_is_released_after_reset_owner() {
    assert_nothing_is_released_after(Vmm::Uml, |vm| {
        vm.front.send(request::RESET_OWNER, &[], &[]);
        vm.front.barrier();
    });
}

/// Queues that cannot be disabled: User Mode Linux only sends GET_FEATURES.
#[test]
fn nothing_is_released_after_a_removal_without_bit_30() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.remove_uml(true);
    for _ in 0..ROUNDS {
        vm.probe_uml(CLASSIC, false);
        vm.inflate(&some_pages());
        vm.remove_uml(false);
        vm.guest.write_patterns(data_pages());
        assert_eq!(server.status().release.pending_bytes, 0);
        vm.guest.assert_gone(&BTreeSet::new());
    }
}

/// A driver that starts on queues that cannot be disabled.
#[test]
fn nothing_is_released_after_features_without_bit_30() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.remove_uml(true);
    for _ in 0..ROUNDS {
        vm.probe_uml(CLASSIC, false);
        vm.inflate(&some_pages());
        vm.front.send_u64(request::SET_FEATURES, CLASSIC.0);
        vm.front.barrier();
        vm.guest.write_patterns(data_pages());
        assert_eq!(server.status().release.pending_bytes, 0);
        vm.guest.assert_gone(&BTreeSet::new());
    }
}

#[test]
fn nothing_is_released_after_the_session_ended() {
    let server = Server::new(ReleaseMode::Background);
    for round in 0..ROUNDS {
        let (front, served) = server.connect();
        let mut vm = Vm::boot(Vmm::Uml, front, if round % 2 == 0 { CLASSIC } else { BITMAP });
        vm.inflate(&some_pages());
        match round % 3 {
            // In the middle of a message, between two messages, and by a fault.
            0 => (&vm.front.socket).write_all(&[1, 0, 0, 0, 1, 0]).unwrap(),
            1 => {}
            _ => vm.front.send(1000, &[], &[]),
        }
        vm.front.finish();
        assert_eq!(served.outcome().is_ok(), round % 3 == 1);
        vm.guest.write_patterns(data_pages());
        let release = server.status().release;
        assert_eq!((release.pending_bytes, release.in_flight_bytes), (0, 0));
        vm.guest.assert_gone(&BTreeSet::new());
    }
}

/// Without MUST_TELL_HOST the guest may write to a page as soon as its inflate
/// message is returned.
#[test]
fn without_must_tell_host_pages_are_released_before_the_message_is_returned() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
        let server = Server::new(mode);
        let (front, _served) = server.connect();
        let mut vm = Vm::boot(Vmm::Uml, front, NO_TELL_HOST);
        let pages = some_pages();
        for _ in 0..20 {
            vm.guest.write_patterns(data_pages());
            vm.inflate(&pages);
            vm.guest.assert_gone(&pages);
            vm.guest.write_patterns(data_pages());
            vm.front.write_actual(pages.len() as u32);
            vm.front.barrier();
            vm.guest.assert_gone(&BTreeSet::new());
        }
        std::thread::sleep(std::time::Duration::from_millis(3 * host_memory::QUIET_MS));
        vm.guest.assert_gone(&BTreeSet::new());
    }
}

/// Random sets are inflated and deflated while the worker releases. The guest's pages must
/// keep their content, and the balloon's pages must be released at the end.
#[test]
fn contents_survive_deflates_that_race_with_the_release() {
    let server = Server::new(ReleaseMode::Background);
    for features in [CLASSIC, BITMAP] {
        let (front, served) = server.connect();
        let mut vm = Vm::boot(Vmm::Uml, front, features);
        let mut random = Random(0x1234_5678_9abc_def1 ^ features.0);
        let mut held = BTreeSet::new();
        for round in 0..300 {
            let free: BTreeSet<u64> = data_pages().filter(|page| !held.contains(page)).collect();
            let given = random.some_of(&free);
            if !given.is_empty() {
                vm.inflate(&given);
                held.extend(&given);
            }
            if round % 7 == 0 {
                // The driver's final write, which flushes.
                let actual = held.len() as u32;
                server.balloon.set_target(actual).unwrap();
                vm.front.write_actual(actual);
            }
            if round % 50 == 49 {
                server.settle();
                vm.guest.assert_gone(&held);
            }
            let taken = random.some_of(&held);
            if !taken.is_empty() {
                vm.deflate(&taken);
                vm.guest.write_patterns(taken.iter().copied());
                held.retain(|page| !taken.contains(page));
            }
        }
        server.settle();
        vm.guest.assert_gone(&held);
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
    }
    assert_eq!(server.status().faults.total(), 0);
}

/// Inflate and deflate of the same pages are available on both queues at the same time.
#[test]
fn pages_of_a_returned_deflate_are_kept_in_any_queue_order() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let message = vm.name_pages(&some_pages());
    for round in 0..300 {
        let (first, second) = if round % 2 == 0 { (INFLATE, DEFLATE) } else { (DEFLATE, INFLATE) };
        vm.post(first, &message);
        vm.post(second, &message);
        vm.kick(first);
        vm.kick(second);
        vm.wait_used(INFLATE);
        vm.wait_used(DEFLATE);
        // The intended order is unknown to the device; a second deflate,
        // after the inflate is returned, is unambiguous.
        vm.deflate(&some_pages());
        vm.guest.write_patterns(some_pages());
        vm.guest.assert_gone(&BTreeSet::new());
    }
    std::thread::sleep(std::time::Duration::from_millis(3 * host_memory::QUIET_MS));
    vm.guest.assert_gone(&BTreeSet::new());
}

/// xorshift64: the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a run and some single pages of `from`.
    fn some_of(&mut self, from: &BTreeSet<u64>) -> BTreeSet<u64> {
        let skip = self.next() as usize % (from.len() + 1);
        let run = from.iter().skip(skip).take(self.next() as usize % 200);
        let mut some: BTreeSet<u64> = run.copied().collect();
        some.extend(from.iter().filter(|_| self.next().is_multiple_of(16)));
        some
    }
}
