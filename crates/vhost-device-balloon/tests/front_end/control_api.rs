//! The operator's requests through the control API.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, Vm, Vmm};
use crate::support::guest::{PAGES, data_pages};
use crate::support::server::Server;
use crate::{assert_balloons, some_pages};

#[test]
fn a_wait_ends_when_the_target_is_reached() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let pages = some_pages();
    let generation = server.balloon.set_target(pages.len() as u32).unwrap();
    let (done, waited) = mpsc::channel();
    let balloon = Arc::clone(&server.balloon);
    let waiter = thread::spawn(move || {
        done.send(balloon.wait_change(generation, TEST_TIMEOUT)).unwrap();
    });
    vm.inflate(&pages);
    vm.front.write_actual(1);
    vm.front.barrier();
    assert!(waited.try_recv().is_err(), "the target is not reached");
    vm.front.write_actual(pages.len() as u32);
    let status = waited.recv_timeout(TEST_TIMEOUT).unwrap();
    assert!(status.at_target);
    vm.guest.assert_gone(&pages);
    waiter.join().unwrap();
}

#[test]
fn a_wait_ends_on_another_target_or_a_timeout() {
    let server = Server::new(ReleaseMode::Background);
    let first = server.balloon.set_target(5).unwrap();
    let started = Instant::now();
    let status = server.balloon.wait_change(first, Duration::from_millis(30));
    assert!(!status.at_target, "no guest is connected");
    assert!(started.elapsed() >= Duration::from_millis(30));

    let (done, waited) = mpsc::channel();
    let balloon = Arc::clone(&server.balloon);
    let waiter =
        thread::spawn(move || done.send(balloon.wait_change(first, TEST_TIMEOUT)).unwrap());
    let second = server.balloon.set_target(6).unwrap();
    assert_eq!(waited.recv_timeout(TEST_TIMEOUT).unwrap().generation, second);
    waiter.join().unwrap();
}

/// A driver does not write an unchanged `actual`.
#[test]
fn a_target_that_the_guest_already_has_is_reached() {
    let server = Server::new(ReleaseMode::Background);
    let generation = server.balloon.set_target(9).unwrap();
    assert!(!server.balloon.wait_change(generation, Duration::ZERO).at_target);
    let generation = server.balloon.set_target(0).unwrap();
    let status = server.balloon.wait_change(generation, Duration::from_millis(200));
    assert!(status.at_target, "{status:?}");
}

/// A new guest starts with an empty balloon.
#[test]
fn each_guest_must_reach_the_target() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let pages = some_pages();
    let generation = server.balloon.set_target(pages.len() as u32).unwrap();
    vm.inflate(&pages);
    vm.front.write_actual(pages.len() as u32);
    assert!(server.balloon.wait_change(generation, TEST_TIMEOUT).at_target);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    let status = server.status().balloon;
    assert_eq!(status.actual_pages, 0);
    assert!(!status.at_target, "the balloon is empty");

    // After a reset the balloon is empty, which is a target of zero.
    let (front, served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.front.write_actual(pages.len() as u32);
    vm.front.barrier();
    let generation = server.balloon.set_target(0).unwrap();
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    let status = server.balloon.wait_change(generation, Duration::from_millis(200));
    assert!(status.at_target, "{status:?}");
}

#[test]
fn a_target_above_guest_memory_is_refused() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.front.barrier();
    server.balloon.set_target(PAGES as u32).unwrap();
    for pages in [PAGES as u32 + 1, u32::MAX] {
        let error = server.balloon.set_target(pages).unwrap_err();
        assert!(matches!(error, control::ControlError::TargetTooLarge { .. }), "{error}");
    }
    assert_eq!(vm.front.num_pages(), PAGES as u32);
}

/// Without a guest any target is accepted. A guest with less memory still receives the
/// target, and the device works.
#[test]
fn a_target_set_before_the_guest_may_exceed_its_memory() {
    let server = Server::new(ReleaseMode::Background);
    server.balloon.set_target(u32::MAX).unwrap();
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, BITMAP);
    assert_eq!(vm.front.num_pages(), u32::MAX);
    vm.front.write_actual(u32::MAX);
    vm.front.barrier();
    let status = server.status().balloon;
    assert_eq!(status.actual_bytes, u64::from(u32::MAX) * 4096);
    assert_balloons(&server, &mut vm);
}

#[test]
fn the_release_mode_changes_while_the_guest_inflates() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let modes = [ReleaseMode::Immediate, ReleaseMode::PerPage, ReleaseMode::Background];
    let balloon = Arc::clone(&server.balloon);
    let (stop, stopped) = mpsc::channel::<()>();
    let switcher = thread::spawn(move || {
        let mut switches = 0;
        while stopped.try_recv().is_err() {
            balloon.set_release_mode(modes[switches % 3]).unwrap();
            switches += 1;
        }
        switches
    });
    let pages = some_pages();
    for _ in 0..100 {
        vm.inflate(&pages);
        vm.deflate(&pages);
        vm.guest.write_patterns(pages.iter().copied());
        vm.guest.assert_gone(&BTreeSet::new());
    }
    vm.inflate(&pages);
    server.settle();
    vm.guest.assert_gone(&pages);
    stop.send(()).unwrap();
    assert!(switcher.join().unwrap() > 10);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// In the modes that release before the reply, pending pages are released first.
#[test]
fn a_new_mode_applies_from_the_next_message_on() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    for mode in [ReleaseMode::Immediate, ReleaseMode::PerPage] {
        server.balloon.set_release_mode(ReleaseMode::Background).unwrap();
        let first: BTreeSet<u64> = data_pages().take(3).collect();
        vm.inflate(&first);
        server.balloon.set_release_mode(mode).unwrap();
        assert_eq!(server.status().release.mode, mode);
        vm.guest.assert_gone(&first);
        let second: BTreeSet<u64> = data_pages().skip(3).take(3).collect();
        vm.inflate(&second);
        vm.guest.assert_gone(&first.union(&second).copied().collect());
        vm.deflate(&first);
        vm.deflate(&second);
        vm.guest.write_patterns(data_pages());
    }
}

#[test]
fn a_stop_ends_the_session() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.front.barrier();
    server.stop();
    assert_eq!(served.outcome().unwrap(), End::Stopped);
    vm.front.wait_closed();
}
