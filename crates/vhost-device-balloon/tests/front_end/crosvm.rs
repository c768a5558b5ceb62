//! The messages of crosvm's `--vhost-user balloon`
//! (devices/src/virtio/vhost_user_frontend/mod.rs). It sets the features for each
//! half that the guest writes, and sets a queue's base after its addresses. It enables each
//! queue during its setup, and gets the bases when the guest resets the device.

use std::os::fd::AsFd;

use balloon_abi::Features;
use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::assert_balloons;
use crate::support::driver::{BITMAP, CLASSIC, RING_SIZE, Vm, Vmm, vring_addr};
use crate::support::front_end::{OFFERED_PROTOCOL, PROTOCOL_FEATURES, eventfd, request};
use crate::support::guest::{BASE, Guest, USER_BASE};
use crate::support::server::Server;

/// Protocol features that both support: MQ, BACKEND_REQ, CONFIG.
const PROTOCOL: u64 = OFFERED_PROTOCOL & !(1 << 12);

fn connect(vm: &mut Vm) {
    vm.front.send(request::SET_OWNER, &[], &[]);
    assert_ne!(vm.front.request_u64(request::GET_FEATURES) & PROTOCOL_FEATURES, 0);
    assert_eq!(vm.front.request_u64(request::GET_PROTOCOL_FEATURES) & PROTOCOL, PROTOCOL);
    vm.front.send_u64(request::SET_PROTOCOL_FEATURES, PROTOCOL);
    vm.send_channel();
    assert_eq!(vm.front.request_u64(request::GET_QUEUE_NUM), 6);
}

fn activate(vm: &mut Vm, features: Features) {
    vm.features = features;
    vm.reset_rings();
    for half in [features.0 & 0xffff_ffff, features.0] {
        vm.front.send_u64(request::SET_FEATURES, half | PROTOCOL_FEATURES);
    }
    vm.send_memory(USER_BASE, 1);
    for index in 0..2 {
        vm.front.send_state(request::SET_VRING_NUM, index, u32::from(RING_SIZE));
        let ring = &vm.rings[index as usize];
        let user = |address: u64| address - BASE + USER_BASE;
        let places = [user(ring.table()), user(ring.used()), user(ring.avail())];
        vm.front.send(request::SET_VRING_ADDR, &vring_addr(index, places), &[]);
        vm.front.send_state(request::SET_VRING_BASE, index, 0);
        let (call, kick) = (eventfd(), eventfd());
        let payload = u64::from(index).to_ne_bytes();
        vm.front.send(request::SET_VRING_CALL, &payload, &[call.as_fd()]);
        vm.front.send(request::SET_VRING_KICK, &payload, &[kick.as_fd()]);
        vm.calls[index as usize] = call;
        vm.kicks[index as usize] = kick;
        vm.front.send_state(request::SET_VRING_ENABLE, index, 1);
    }
}

fn reset(vm: &Vm) {
    for index in 0..2 {
        vm.front.send_state(request::SET_VRING_ENABLE, index, 0);
        vm.stop_ring(index);
    }
}

#[test]
fn a_guest_boots_and_reboots() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::new(Vmm::Qemu, front, Guest::new());
    connect(&mut vm);
    for features in [CLASSIC, BITMAP, BITMAP | Features::RING_EVENT_IDX, CLASSIC] {
        activate(&mut vm, features);
        assert_balloons(&server, &mut vm);
        reset(&vm);
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}
