//! The messages of Cloud Hypervisor's `--generic-vhost-user`
//! (virtio-devices/src/vhost_user/{generic_vhost_user,vu_common_ctrl}.rs), without
//! REPLY_ACK, which is not offered.
//!
//! It passes only transport features to the guest, so its driver is a classic one
//! without `MUST_TELL_HOST`. The base of a queue is the guest's available index
//! at that time, the channel is set up last, and a lost connection
//! is set up again with the first one's inflight region.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;

use balloon_abi::Features;
use control::api::ReleaseMode;
use vhost_device_balloon::End;
use vm_memory::{Bytes, GuestAddress};

use crate::some_pages;
use crate::support::driver::{
    DEFLATE, INFLATE, NO_TELL_HOST, RING_SIZE, Vm, Vmm, mem_table, vring_addr,
};
use crate::support::front_end::{FrontEnd, OFFERED_PROTOCOL, PROTOCOL_FEATURES, eventfd, request};
use crate::support::guest::{BASE, BYTES, FILE_OFFSET, Guest, PAGE, USER_BASE, data_pages};
use crate::support::server::Server;

const FEATURES: Features = NO_TELL_HOST.union(Features::RING_EVENT_IDX);

/// Like `negotiate_features_vhost_user`.
fn negotiate(vm: &Vm) {
    let front = &vm.front;
    front.send(request::SET_OWNER, &[], &[]);
    assert_ne!(front.request_u64(request::GET_FEATURES) & PROTOCOL_FEATURES, 0);
    assert_eq!(front.request_u64(request::GET_PROTOCOL_FEATURES), OFFERED_PROTOCOL);
    front.send_u64(request::SET_PROTOCOL_FEATURES, OFFERED_PROTOCOL);
    assert_eq!(front.request_u64(request::GET_QUEUE_NUM), 6);
}

/// Like `setup_vhost_user`. Guest memory is two regions of one file, as around the
/// hole below 4 GiB.
fn set_up(vm: &mut Vm, inflight: &mut Option<(Vec<u8>, File)>) {
    vm.features = FEATURES;
    vm.front.send_u64(request::SET_FEATURES, FEATURES.0 | PROTOCOL_FEATURES);
    let half = BYTES / 2;
    let table = mem_table(&[
        [BASE, half, USER_BASE, FILE_OFFSET],
        [BASE + half, half, USER_BASE + (1 << 40), FILE_OFFSET + half],
    ]);
    vm.front.send(request::SET_MEM_TABLE, &table, &[vm.guest.file.as_fd(); 2]);
    for index in [0, 1] {
        vm.front.send_state(request::SET_VRING_NUM, index, u32::from(RING_SIZE));
    }
    let (description, file) = inflight.get_or_insert_with(|| {
        let requested = [vec![0; 16], 2u16.to_ne_bytes().into(), RING_SIZE.to_ne_bytes().into()];
        let (answer, fd) = vm.front.request_file(request::GET_INFLIGHT_FD, &requested.concat());
        (answer, File::from(fd))
    });
    vm.front.send(request::SET_INFLIGHT_FD, description, &[file.as_fd()]);
    for index in [INFLATE, DEFLATE] {
        let ring = &vm.rings[index];
        let user = |address: u64| address - BASE + USER_BASE;
        let places = [user(ring.table()), user(ring.used()), user(ring.avail())];
        vm.front.send(request::SET_VRING_ADDR, &vring_addr(index as u32, places), &[]);
        let available: u16 = vm.guest.memory.read_obj(GuestAddress(ring.avail() + 2)).unwrap();
        vm.front.send_state(request::SET_VRING_BASE, index as u32, u32::from(available));
        vm.calls[index] = eventfd();
        vm.kicks[index] = eventfd();
        vm.front.send_fd(request::SET_VRING_CALL, index as u64, &vm.calls[index]);
        vm.front.send_fd(request::SET_VRING_KICK, index as u64, &vm.kicks[index]);
    }
    for index in [0, 1] {
        vm.front.send_state(request::SET_VRING_ENABLE, index, 1);
    }
    vm.send_channel();
}

fn boot(front: FrontEnd) -> (Vm, Option<(Vec<u8>, File)>) {
    let mut vm = Vm::new(Vmm::Qemu, front, Guest::new());
    vm.reset_rings();
    negotiate(&vm);
    let mut inflight = None;
    set_up(&mut vm, &mut inflight);
    (vm, inflight)
}

#[test]
fn balloons_with_memory_in_two_regions() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let (mut vm, _) = boot(front);
    let pages = some_pages();
    // On both sides of the boundary.
    let border = (BASE + BYTES / 2) / PAGE;
    assert!(pages.contains(&border) && pages.contains(&(border - 1)));
    vm.inflate(&pages);
    vm.guest.assert_gone(&pages);
    vm.front.write_actual(pages.len() as u32);
    vm.deflate(&pages);
    vm.guest.write_patterns(pages);
    vm.guest.assert_gone(&BTreeSet::new());
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

/// A message that was available before the queue ran, or when the connection was lost,
/// is served although it is before the base.
#[test]
fn a_lost_connection_is_set_up_again() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let (mut vm, mut inflight) = boot(front);
    let page = |i| BTreeSet::from([data_pages().start + i]);
    vm.inflate(&page(0));
    vm.front.write_actual(1);
    vm.front.finish();
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    let message = vm.name_pages(&page(1));
    let head = vm.post(INFLATE, &message);
    for _ in 0..3 {
        let (front, served) = server.connect();
        vm.front = front;
        negotiate(&vm);
        set_up(&mut vm, &mut inflight);
        vm.front.barrier();
        assert_eq!(server.status().balloon.actual_pages, 1);
        vm.front.finish();
        assert_eq!(served.outcome().unwrap(), End::HungUp);
    }
    assert_eq!(vm.wait_used(INFLATE), u32::from(head));
    assert!(vm.rings[INFLATE].take_used(&vm.guest.memory).is_none(), "once");
    vm.guest.assert_gone(&page(0).union(&page(1)).copied().collect());
    assert_eq!(server.status().faults.total(), 0);
}
