//! The messages of QEMU's `vhost-user-device` (hw/virtio/vhost-user-base.c,
//! vhost.c and vhost-user.c), without REPLY_ACK, which is not offered.

use std::collections::BTreeSet;
use std::time::Duration;

use balloon_abi::Features;
use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, DEFLATE, INFLATE, Monitor, Vm, is_readable};
use crate::support::front_end::{
    CONFIG_CHANGE, FrontEnd, PROTOCOL_FEATURES, channel_message, eventfd, request,
};
use crate::support::guest::{Guest, data_pages};
use crate::support::server::Server;
use crate::{assert_balloons, assert_serves, some_pages};

/// QEMU always writes the whole configuration space that it was told of, with
/// what it last read in the fields that the guest did not write.
fn write_actual_qemu(front: &FrontEnd, actual: u32) {
    let mut config = front.read_config(16);
    config[..4].copy_from_slice(&0x7777u32.to_le_bytes());
    config[4..8].copy_from_slice(&actual.to_le_bytes());
    front.write_config(0, &config);
}

#[test]
fn inflates_and_deflates() {
    let server = Server::new(ReleaseMode::Background);
    for features in [CLASSIC, BITMAP, BITMAP | Features::RING_EVENT_IDX] {
        assert_serves(&server, Monitor::Qemu, features);
    }
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn a_write_of_the_whole_configuration_space_is_a_write_of_the_driver_fields() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    let pages = some_pages();
    let count = pages.len() as u32;
    let generation = server.balloon.set_target(count).unwrap();
    assert_eq!(channel_message(vm.channel.as_ref().unwrap()), CONFIG_CHANGE);
    vm.inflate(&pages);
    write_actual_qemu(&vm.front, count);
    let status = server.balloon.wait_change(generation, TEST_TIMEOUT);
    assert!(status.at_target, "{status:?}");
    assert_eq!((status.actual_pages, status.target_pages), (count, count));
    vm.guest.assert_gone(&pages);
    assert_eq!(vm.front.num_pages(), count, "the target is the host's");
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

/// The virtual machine is paused and goes on: the rings go on where they were.
#[test]
fn rings_go_on_where_they_stopped() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    let page = |i| BTreeSet::from([data_pages().start + i]);
    vm.inflate(&page(0));
    vm.inflate(&page(1));
    vm.deflate(&page(1));
    vm.front.write_actual(1);
    let bases = vm.stop_qemu();
    assert_eq!(bases, [2, 1]);
    // The guest's kick comes while nobody serves the ring.
    let third = vm.name_pages(&page(2));
    let head = vm.post(INFLATE, &third);
    vm.start_qemu(CLASSIC, bases);
    assert_eq!(vm.wait_used(INFLATE), u32::from(head), "found without a kick");
    server.settle();
    assert!(vm.guest.is_zero(data_pages().start + 2));
    vm.deflate(&page(2));
    assert_eq!(server.status().balloon.actual_pages, 1, "the guest still has its balloon");
    vm.deflate(&page(0));
    assert_eq!(vm.stop_qemu(), [3, 3]);
    assert_eq!(server.status().faults.total(), 0, "all pages were in the balloon");

    // A driver that begins at 0 is a new one; so is one with other features.
    for features in [CLASSIC, BITMAP] {
        vm.start_qemu(features, [0; 2]);
        vm.front.barrier();
        assert_eq!(server.status().balloon.actual_pages, 0);
        vm.inflate(&page(3));
        vm.front.write_actual(1);
        vm.stop_qemu();
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// QEMU repeats features when it starts or stops to log writes.
#[test]
fn the_same_features_again_change_nothing_while_queues_run() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    let first = BTreeSet::from([data_pages().start]);
    vm.inflate(&first);
    vm.front.write_actual(1);
    vm.front.send_u64(request::SET_FEATURES, CLASSIC.0 | PROTOCOL_FEATURES);
    vm.front.barrier();
    assert_eq!(server.status().balloon.actual_pages, 1);
    vm.deflate(&first);
    assert_eq!(server.status().faults.total(), 0, "the page was still in the balloon");
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// Call files come before the features, and again while queues run, when the
/// guest masks its interrupts.
#[test]
fn calls_go_where_the_front_end_said_last() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    let page = BTreeSet::from([data_pages().start]);
    let message = vm.name_pages(&page);
    let head = vm.post(INFLATE, &message);
    vm.kick(INFLATE);
    assert!(
        is_readable(&vm.calls[INFLATE], TEST_TIMEOUT),
        "the call from before the features is lost"
    );
    assert_eq!(vm.wait_used(INFLATE), u32::from(head));
    let masked = std::mem::replace(&mut vm.calls[DEFLATE], eventfd());
    vm.front.send_fd(request::SET_VRING_CALL, 1, &vm.calls[DEFLATE]);
    vm.front.barrier();
    vm.deflate(&page);
    assert!(!is_readable(&masked, Duration::ZERO));
    // No file at all: the driver polls.
    vm.front.send_u64(request::SET_VRING_CALL, 1 << 8);
    vm.front.barrier();
    let head = vm.post(INFLATE, &0u32.to_le_bytes());
    vm.kick(INFLATE);
    vm.front.barrier();
    let seen = std::iter::repeat_with(|| {
        std::thread::yield_now();
        vm.rings[INFLATE].take_used(&vm.guest.memory)
    });
    let used = seen.take(10_000_000).flatten().next().expect("returned without a call");
    assert_eq!(used.head, u32::from(head));
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// The memory table comes anew while queues run, when memory is plugged in.
#[test]
fn memory_is_replaced_while_queues_run() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, BITMAP);
    for _ in 0..3 {
        vm.send_memory(crate::support::guest::USER_BASE, 1);
        vm.front.barrier();
        assert_balloons(&server, &mut vm);
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

/// QEMU passes the driver's writes on at once, and the features when it starts.
#[test]
fn a_poison_from_before_the_features_counts() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::new(Monitor::Qemu, front, Guest::new());
    vm.attach();
    let mut config = vm.front.read_config(16);
    config[12..].copy_from_slice(&0xaaaa_aaaau32.to_le_bytes());
    vm.front.write_config(0, &config);
    vm.probe(CLASSIC | Features::PAGE_POISON);
    vm.front.barrier();
    assert_eq!(server.status().guest.poison_val, Some(0xaaaa_aaaa));
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// A driver that goes on, in a back end that knows nothing of it: it may poison with
/// anything.
#[test]
fn an_unknown_poison_is_none_that_allows_zeros() {
    let features = CLASSIC | Features::PAGE_POISON;
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, features);
    vm.inflate(&BTreeSet::from([data_pages().start]));
    let other = Server::new(ReleaseMode::Background);
    let (front, _served) = other.connect();
    vm.front = front;
    vm.attach();
    vm.start_qemu(features, [1, 0]);
    vm.front.barrier();
    assert_eq!(other.status().guest.poison_val, Some(u32::MAX));
}

/// QEMU 8.2 keeps the driver's writes to itself.
#[test]
fn the_size_is_what_was_given_where_nobody_says_it() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    let pages = some_pages();
    let count = pages.len() as u32;
    let generation = server.balloon.set_target(count).unwrap();
    vm.inflate(&pages);
    assert_eq!(server.status().balloon.actual_pages, 0, "it may say so yet");
    let status = server.balloon.wait_change(generation, TEST_TIMEOUT);
    assert!(status.at_target && status.actual_pages == count, "{status:?}");
    vm.guest.assert_gone(&pages);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}
