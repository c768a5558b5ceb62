//! The messages of QEMU's `vhost-user-device` (hw/virtio/vhost-user-base.c,
//! vhost.c and vhost-user.c), without REPLY_ACK, which is not offered.

use std::collections::BTreeSet;
use std::time::Duration;

use balloon_abi::Features;
use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, DEFLATE, INFLATE, Vm, Vmm, is_readable};
use crate::support::front_end::{
    CONFIG_CHANGE, FrontEnd, PROTOCOL_FEATURES, channel_message, eventfd, request,
};
use crate::support::guest::{Guest, data_pages};
use crate::support::server::Server;
use crate::{assert_balloons, assert_serves, some_pages};

/// Like QEMU, writes the whole configuration space, with the last read values in the
/// fields that the guest did not write.
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
        assert_serves(&server, Vmm::Qemu, features);
    }
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn a_write_of_the_whole_config_space_writes_only_driver_fields() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
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

/// The VM is paused and resumed: the vrings continue at their position.
#[test]
fn vrings_resume_at_their_position() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    let page = |i| BTreeSet::from([data_pages().start + i]);
    vm.inflate(&page(0));
    vm.inflate(&page(1));
    vm.deflate(&page(1));
    vm.front.write_actual(1);
    let bases = vm.stop_qemu();
    assert_eq!(bases, [2, 1]);
    // The guest kicks while no back end serves the vring.
    let third = vm.name_pages(&page(2));
    let head = vm.post(INFLATE, &third);
    vm.start_qemu(CLASSIC, bases);
    assert_eq!(vm.wait_used(INFLATE), u32::from(head), "served without a kick");
    server.settle();
    assert!(vm.guest.is_zero(data_pages().start + 2));
    vm.deflate(&page(2));
    assert_eq!(server.status().balloon.actual_pages, 1, "the guest still has its balloon");
    vm.deflate(&page(0));
    assert_eq!(vm.stop_qemu(), [3, 3]);
    assert_eq!(server.status().faults.total(), 0, "all pages were in the balloon");

    // A driver that starts at 0 is a new one, and so is one with other features.
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

/// QEMU repeats the features when it starts or stops dirty logging.
#[test]
fn repeated_features_change_nothing_while_queues_run() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
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

/// Call files are sent before the features, and again while queues run, when the
/// guest masks its interrupts.
#[test]
fn the_last_call_file_is_used() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    let page = BTreeSet::from([data_pages().start]);
    let message = vm.name_pages(&page);
    let head = vm.post(INFLATE, &message);
    vm.kick(INFLATE);
    assert!(
        is_readable(&vm.calls[INFLATE], TEST_TIMEOUT),
        "the call file from before the features is lost"
    );
    assert_eq!(vm.wait_used(INFLATE), u32::from(head));
    let masked = std::mem::replace(&mut vm.calls[DEFLATE], eventfd());
    vm.front.send_fd(request::SET_VRING_CALL, 1, &vm.calls[DEFLATE]);
    vm.front.barrier();
    vm.deflate(&page);
    assert!(!is_readable(&masked, Duration::ZERO));
    // No call file: the driver polls.
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

/// A new memory table is sent while queues run, for memory hotplug.
#[test]
fn memory_is_replaced_while_queues_run() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, BITMAP);
    for _ in 0..3 {
        vm.send_memory(crate::support::guest::USER_BASE, 1);
        vm.front.barrier();
        assert_balloons(&server, &mut vm);
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

/// QEMU forwards the driver's writes immediately, and the features when the device starts.
#[test]
fn a_poison_sent_before_the_features_is_used() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::new(Vmm::Qemu, front, Guest::new());
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

/// A driver resumes under a restarted back end without its state: it may use any
/// poison.
#[test]
fn an_unknown_poison_forbids_zeros() {
    let features = CLASSIC | Features::PAGE_POISON;
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, features);
    vm.inflate(&BTreeSet::from([data_pages().start]));
    let other = Server::new(ReleaseMode::Background);
    let (front, _served) = other.connect();
    vm.front = front;
    vm.attach();
    vm.start_qemu(features, [1, 0]);
    vm.front.barrier();
    assert_eq!(other.status().guest.poison_val, Some(u32::MAX));
}

/// QEMU 8.2 does not forward the driver's config writes.
#[test]
fn actual_falls_back_to_the_counted_pages() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    let pages = some_pages();
    let count = pages.len() as u32;
    let generation = server.balloon.set_target(count).unwrap();
    vm.inflate(&pages);
    assert_eq!(server.status().balloon.actual_pages, 0, "a config write may still arrive");
    let status = server.balloon.wait_change(generation, TEST_TIMEOUT);
    assert!(status.at_target && status.actual_pages == count, "{status:?}");
    vm.guest.assert_gone(&pages);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}
