//! Invalid inflight regions.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use control::api::ReleaseMode;
use vhost_device_balloon::{SessionError, Violation};
use vm_memory::{Bytes, GuestAddress};

use crate::assert_serves;
use crate::support::driver::{CLASSIC, INFLATE, RING_SIZE, Vm, Vmm, WITH_REQUESTS};
use crate::support::front_end::{FrontEnd, PROTOCOL_FEATURES, request};
use crate::support::guest::{Guest, USER_BASE, data_pages, memfd};
use crate::support::server::Server;

/// `mmap_size`, `mmap_offset`, `num_queues`, `queue_size`.
fn description(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let longs = [size, offset].map(u64::to_ne_bytes).concat();
    [longs, [queues, queue_size].map(u16::to_ne_bytes).concat()].concat()
}

fn attached(front: FrontEnd) -> Vm {
    let mut vm = Vm::new(Vmm::Qemu, front, Guest::new());
    vm.attach();
    vm
}

#[test]
fn an_invalid_description_is_refused() {
    let server = Server::new(ReleaseMode::Background);
    let queue = 64 + u64::from(RING_SIZE) * 16;
    let file = memfd(3 * queue);
    let refused = |code, payload: Vec<u8>, with_file: bool| {
        let (front, served) = server.connect();
        let vm = attached(front);
        let fds = [file.as_fd()];
        vm.front.send(code, &payload, if with_file { &fds } else { &[] });
        vm.front.finish();
        match served.outcome() {
            Err(SessionError::Violation(Violation::Inflight)) => {}
            other => panic!("{payload:?}: {other:?}"),
        }
    };
    for (queues, size) in [(0, 256), (7, 256), (u16::MAX, 1), (2, 0), (2, 1025), (2, u16::MAX)] {
        refused(request::GET_INFLIGHT_FD, description(0, 0, queues, size), false);
        refused(request::SET_INFLIGHT_FD, description(3 * queue, 0, queues, size), true);
    }
    for (size, offset) in [(0, 0), (queue, 0), (u64::MAX, u64::MAX), (3 * queue, 1 << 40)] {
        refused(request::SET_INFLIGHT_FD, description(size, offset, 3, RING_SIZE), true);
    }
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

#[test]
fn an_invalid_file_is_refused() {
    let server = Server::new(ReleaseMode::Background);
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let files: [std::os::fd::OwnedFd; 2] = [one.into(), File::open("/dev/zero").unwrap().into()];
    for file in files {
        let (front, served) = server.connect();
        let vm = attached(front);
        let payload = description(1 << 20, 0, 2, RING_SIZE);
        vm.front.send(request::SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
        vm.front.finish();
        let outcome = served.outcome();
        assert!(
            matches!(outcome, Err(SessionError::Violation(Violation::Inflight))),
            "{outcome:?}"
        );
    }
}

/// Runs a guest with `file` as its inflight region, with any content.
fn run(server: &Server, file: &File, features: balloon_abi::Features) -> Result<(), SessionError> {
    let (front, served) = server.connect();
    let mut vm = attached(front);
    let len = file.metadata().unwrap().len();
    let payload = description(len, 0, 3, RING_SIZE);
    vm.front.send(request::SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
    vm.probe(features);
    let pages: BTreeSet<u64> = data_pages().take(20).collect();
    let message = vm.name_pages(&pages);
    vm.post(INFLATE, &message);
    vm.kick(INFLATE);
    if vm.front.try_send(request::GET_FEATURES, &[], &[]) {
        let _ = vm.front.try_reply(request::GET_FEATURES);
    }
    vm.front.finish();
    let outcome = served.outcome();
    // With any content, at most the sent chains are returned.
    let used: u16 =
        vm.guest.memory.read_obj(GuestAddress(vm.rings[INFLATE].used_idx_addr())).unwrap();
    assert!(u16::from_le(used) <= 1, "{used} chains were returned");
    for page in data_pages().filter(|page| !pages.contains(page)) {
        assert!(vm.guest.has_pattern(page), "page {page:#x} has lost its contents");
    }
    outcome.map(drop)
}

#[test]
fn invalid_contents_are_ignored() {
    let server = Server::new(ReleaseMode::Background);
    let queue = u64::from(64 * (16 + RING_SIZE * 16).div_ceil(64));
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..200u32 {
        let file = memfd(3 * queue);
        let mut bytes = vec![0u8; 3 * queue as usize];
        for (at, byte) in bytes.iter_mut().enumerate() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *byte = match round % 4 {
                0 => 0xff,
                1 => random as u8,
                // Plausible numbers in every field.
                2 => [0, 0, 0, 1, 1, 2][random as usize % 6],
                // A valid header, with all descriptors in flight.
                _ => u8::from(at % 16 == 0),
            };
        }
        if round % 4 > 1 {
            for part in bytes.chunks_mut(queue as usize) {
                part[8..12].copy_from_slice(&[1, 0, 0, 1]);
                part[14..16].copy_from_slice(&[0, 0]);
            }
        }
        file.write_all_at(&bytes, 0).unwrap();
        run(&server, &file, if round % 2 == 0 { CLASSIC } else { WITH_REQUESTS }).unwrap();
    }
    assert_eq!(server.status().faults.total(), 0);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// A truncated region cannot be written: this is the front end's fault and ends its
/// session.
#[test]
fn a_truncated_region_ends_the_session() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = attached(front);
    let queue = u64::from(64 * (16 + RING_SIZE * 16).div_ceil(64));
    let file = memfd(2 * queue);
    let payload = description(2 * queue, 0, 2, RING_SIZE);
    vm.front.send(request::SET_INFLIGHT_FD, &payload, &[file.as_fd()]);
    vm.front.barrier();
    file.set_len(0).unwrap();
    vm.front.send_u64(request::SET_FEATURES, CLASSIC.0 | PROTOCOL_FEATURES);
    vm.send_memory(USER_BASE, 1);
    vm.reset_rings();
    vm.send_ring(INFLATE, USER_BASE, 0);
    vm.front.send_fd(request::SET_VRING_KICK, 0, &vm.kicks[INFLATE]);
    vm.front.send_state(request::SET_VRING_ENABLE, 0, 1);
    vm.front.finish();
    let outcome = served.outcome();
    assert!(matches!(outcome, Err(SessionError::Violation(Violation::Inflight))), "{outcome:?}");
    assert_serves(&server, Vmm::Uml, CLASSIC);
}
