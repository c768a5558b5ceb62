//! Valid but unusual front ends.

use std::io::Write;

use control::api::ReleaseMode;
use vhost_device_balloon::End;

use crate::assert_serves;
use crate::hostile::{Stage, outcome_of};
use crate::support::driver::{CLASSIC, DEFLATE, INFLATE, Vm, Vmm, is_readable};
use crate::support::front_end::{FLAGS, message, request};
use crate::support::guest::{BASE, FIRST_PAGE, Guest, data_pages};
use crate::support::server::Server;

/// A guest may inflate the pages of its own vring. They read as
/// zeros then, and the vring is invalid.
#[test]
fn inflated_pages_of_the_vring_stop_the_queue() {
    let server = Server::new(ReleaseMode::Immediate);
    let outcome = outcome_of(&server, Stage::Running, |vm| {
        vm.features = CLASSIC;
        let ring_pages = FIRST_PAGE..FIRST_PAGE + 16;
        let message = vm.name_pages(&ring_pages.collect());
        vm.post(INFLATE, &message);
        vm.kick(INFLATE);
        vm.front.barrier();
        vm.post(INFLATE, &message);
        vm.kick(INFLATE);
        vm.front.barrier();
        vm.deflate(&data_pages().take(9).collect());
    });
    assert_eq!(outcome.unwrap(), End::HungUp);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// One guest at a time: the next front end waits until the first disconnects.
#[test]
fn a_second_front_end_waits_for_the_first() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let (second, second_served) = server.connect();
    second.send(request::GET_FEATURES, &[], &[]);
    crate::assert_balloons(&server, &mut vm);
    assert!(!is_readable(&second.socket, std::time::Duration::from_millis(20)));
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    second.reply(request::GET_FEATURES);
    assert!(server.status().guest.connected);
    drop(second);
    assert_eq!(second_served.outcome().unwrap(), End::HungUp);
}

/// Messages in several pieces are no fault.
#[test]
fn a_message_byte_by_byte_is_served() {
    let server = Server::new(ReleaseMode::Background);
    let outcome = outcome_of(&server, Stage::Fresh, |vm| {
        for byte in message(request::GET_FEATURES, FLAGS, &[]) {
            (&vm.front.socket).write_all(&[byte]).unwrap();
        }
        vm.front.reply(request::GET_FEATURES);
    });
    assert_eq!(outcome.unwrap(), End::HungUp);
}

/// A front end may set up a queue in any order. An incomplete setup
/// is no fault.
#[test]
fn queues_start_with_any_order_of_setup() {
    type Step = fn(&Vm, usize);
    let ring: Step = |vm, queue| vm.send_ring(queue, BASE, 0);
    let kick: Step =
        |vm, queue| vm.front.send_fd(request::SET_VRING_KICK, queue as u64, &vm.kicks[queue]);
    let enable: Step = |vm, queue| vm.front.send_state(request::SET_VRING_ENABLE, queue as u32, 1);
    let call: Step =
        |vm, queue| vm.front.send_fd(request::SET_VRING_CALL, queue as u64, &vm.calls[queue]);
    let orders =
        [[ring, kick, enable, call], [call, enable, kick, ring], [kick, ring, call, enable]];
    for order in orders {
        let server = Server::new(ReleaseMode::Background);
        let (front, served) = server.connect();
        let mut vm = Vm::new(Vmm::Uml, front, Guest::new());
        Stage::Memory.reach(&mut vm);
        vm.features = CLASSIC;
        vm.reset_rings();
        // The guest is faster than the front end.
        let message = vm.name_pages(&data_pages().take(2).collect());
        let head = vm.post(INFLATE, &message);
        vm.kick(INFLATE);
        for step in order {
            step(&vm, INFLATE);
            step(&vm, DEFLATE);
            vm.front.barrier();
        }
        // In one of the orders it is returned before the call is set.
        let used = std::iter::repeat_with(|| vm.rings[INFLATE].take_used(&vm.guest.memory));
        let used = used.take(1000).flatten().next().expect("the first message is served");
        assert_eq!(used.head, u32::from(head));
        vm.deflate(&data_pages().take(2).collect());
        vm.inflate(&data_pages().take(2).collect());
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
        assert_eq!(server.status().faults.total(), 0);
    }
}
