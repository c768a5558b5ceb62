//! Tests of the back end with valid front ends, which send the messages of User Mode Linux
//! and QEMU, and with hostile front ends.
#![allow(clippy::unwrap_used, reason = "a test fails on any error")]
#![allow(clippy::cast_possible_truncation, reason = "small constants")]

#[path = "../support/mod.rs"]
mod support;

mod cloud_hypervisor;
mod control_api;
mod crosvm;
mod hostile;
mod inflight;
mod misuse;
mod pace;
mod qemu;
mod quiet;
mod requests;
mod safety;
mod set_up_again;
mod specification;
mod uml;
mod unusual;

use std::collections::BTreeSet;

use balloon_abi::Features;
use vhost_device_balloon::End;

use support::TEST_TIMEOUT;
use support::driver::{Vm, Vmm};
use support::guest::data_pages;
use support::server::Server;

/// Every second page of one area and all pages of another: ranges of all sizes.
fn some_pages() -> BTreeSet<u64> {
    let first = data_pages().start;
    (first + 5..first + 65).step_by(2).chain(first + 100..first + 700).collect()
}

/// Runs a complete session: target, inflate, release, deflate, end. Must work on any new
/// connection.
fn assert_serves(server: &Server, vmm: Vmm, features: Features) {
    let (front, served) = server.connect();
    let mut vm = Vm::boot(vmm, front, features);
    assert_balloons(server, &mut vm);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// Sets a target, inflates and deflates on an existing connection with an empty balloon.
fn assert_balloons(server: &Server, vm: &mut Vm) {
    let pages = some_pages();
    let count = pages.len() as u32;
    vm.guest.write_patterns(data_pages());
    let blocks = vm.guest.blocks();
    let generation = server.balloon.set_target(count).unwrap();

    vm.inflate(&pages);
    vm.front.write_actual(count);
    let status = server.balloon.wait_change(generation, TEST_TIMEOUT);
    assert!(status.at_target && status.generation == generation, "{status:?}");
    assert_eq!(status.actual_pages, count);
    // Before any read: a read through a mapping fills the hole.
    assert_eq!(blocks - vm.guest.blocks(), u64::from(count) * 8, "in units of 512 bytes");
    vm.guest.assert_gone(&pages);

    let generation = server.balloon.set_target(0).unwrap();
    vm.deflate(&pages);
    vm.front.write_actual(0);
    assert!(server.balloon.wait_change(generation, TEST_TIMEOUT).at_target);
    vm.guest.write_patterns(pages);
    vm.guest.assert_gone(&BTreeSet::new());
}
