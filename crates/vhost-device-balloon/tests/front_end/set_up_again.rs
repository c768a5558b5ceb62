//! Queues that are set up again, completely or partly, while they run.

use std::os::fd::AsFd;

use balloon_abi::Outcome;
use control::GuestRequest;
use control::api::ReleaseMode;
use guest_ring::Buffer;
use vm_memory::{Bytes, GuestAddress};

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{REQUEST, RING_SIZE, Vm, Vmm, WITH_REQUESTS, is_readable, vring_addr};
use crate::support::front_end::request;
use crate::support::guest::{BASE, Guest, USER_BASE};
use crate::support::requests::{answer_bytes, ask};
use crate::support::server::Server;

const QUEUE: u32 = REQUEST as u32;
const DROP: GuestRequest = GuestRequest::DropCaches(control::api::Caches::All);
/// Buffers for requests, one for each descriptor, and for answers.
const ROOM: u64 = BASE + 0x38000;
const ANSWER: u64 = BASE + 0x3c000;
/// Bytes of a request.
const REQUEST_BYTES: u32 = 16;
/// Chains that wait for requests.
const WAITING: usize = 3;

/// A driver that tracks which of its chains the device has.
struct Driver {
    vm: Vm,
    /// Heads of chains that the device has.
    lent: Vec<u16>,
}

impl Driver {
    fn lend(&mut self, buffers: &[Buffer]) {
        self.lent.push(self.vm.rings[REQUEST].send(&self.vm.guest.memory, buffers));
    }

    fn wait_for_request(&mut self) {
        let slot = u64::from(self.vm.rings[REQUEST].next_slot());
        self.lend(&[Buffer::writable(ROOM + slot * 64, REQUEST_BYTES)]);
    }

    /// Takes the returned chains, each once, and makes them available again. Returns the heads
    /// of chains with a request.
    fn take_back(&mut self) -> Vec<u64> {
        let mut requested = Vec::new();
        while let Some(used) = self.vm.rings[REQUEST].take_used(&self.vm.guest.memory) {
            let at = self.lent.iter().position(|head| u32::from(*head) == used.head);
            let at = at.unwrap_or_else(|| panic!("{used:?} was not the device's"));
            self.lent.remove(at);
            if used.written_bytes == REQUEST_BYTES {
                requested.push(u64::from(used.head));
            }
        }
        while self.lent.len() < WAITING {
            self.wait_for_request();
        }
        self.vm.kick(REQUEST);
        requested
    }

    fn wait(&self) {
        assert!(is_readable(&self.vm.calls[REQUEST], TEST_TIMEOUT), "no chain is returned");
        rustix::io::read(&self.vm.calls[REQUEST], &mut [0; 8]).unwrap();
    }

    /// Answers one request. Returns the number of chains returned with a request.
    fn answer_one(&mut self) -> usize {
        let mut requested = self.take_back();
        while requested.is_empty() {
            self.wait();
            requested = self.take_back();
        }
        let mut bytes = [0; REQUEST_BYTES as usize];
        let place = GuestAddress(ROOM + requested[0] * 64);
        self.vm.guest.memory.read_slice(&mut bytes, place).unwrap();
        let asked_of = balloon_abi::Request::from_bytes(&bytes).unwrap();
        let answer = answer_bytes(asked_of.id, Outcome::Done, [1, 2, 3, 4], &[]);
        self.vm.guest.write(ANSWER, &answer);
        self.lend(&[Buffer::readable(ANSWER, answer.len() as u32)]);
        self.vm.kick(REQUEST);
        requested.len()
    }
}

/// The front end's addresses of the request queue.
fn places(vm: &Vm) -> [u64; 3] {
    let ring = &vm.rings[REQUEST];
    [ring.table(), ring.used(), ring.avail()].map(|at| at - BASE + USER_BASE)
}

fn set_addresses(vm: &Vm) {
    vm.front.send(request::SET_VRING_ADDR, &vring_addr(QUEUE, places(vm)), &[]);
}

/// One way to set up a queue again.
type Way = fn(&Vm);

/// The ways to set up a running queue again.
fn ways() -> [(&'static str, Way); 5] {
    [
        ("the same addresses", set_addresses),
        ("other addresses and back", |vm| {
            let [table, used, available] = places(vm);
            let elsewhere = [table + 16 * u64::from(RING_SIZE) * 4, used, available];
            vm.front.send(request::SET_VRING_ADDR, &vring_addr(QUEUE, elsewhere), &[]);
            set_addresses(vm);
        }),
        ("its size", |vm| {
            vm.front.send_state(request::SET_VRING_NUM, QUEUE, u32::from(RING_SIZE));
            set_addresses(vm);
        }),
        ("its base", |vm| {
            let base = u32::from(vm.rings[REQUEST].avail_idx());
            vm.front.send_state(request::SET_VRING_BASE, QUEUE, base);
            set_addresses(vm);
        }),
        ("a stop and a start", |vm| {
            for enable in [0, 1] {
                vm.front.send_state(request::SET_VRING_ENABLE, QUEUE, enable);
            }
        }),
    ]
}

fn run(what: &str, way: Way, inflight: bool) {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let mut vm = Vm::new(Vmm::Qemu, front, Guest::new());
    vm.attach();
    if inflight {
        let requested = [0u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
        let requested = [requested, [3, RING_SIZE].map(u16::to_ne_bytes).concat()].concat();
        let (answer, file) = vm.front.request_file(request::GET_INFLIGHT_FD, &requested);
        vm.front.send(request::SET_INFLIGHT_FD, &answer, &[file.as_fd()]);
    }
    vm.probe(WITH_REQUESTS);
    let mut driver = Driver { vm, lent: Vec::new() };
    for _ in 0..WAITING {
        driver.wait_for_request();
    }
    driver.vm.kick(REQUEST);
    driver.vm.front.barrier();
    for round in 0..4 {
        // The second request uses a chain between the waiting ones, so that they are returned in
        // another order than they were made available.
        let operator = ask(&server.balloon, DROP, TEST_TIMEOUT);
        assert_eq!(driver.answer_one(), 1, "{what}, inflight region: {inflight}, round {round}");
        operator.join().unwrap().unwrap();
        way(&driver.vm);
        driver.vm.front.barrier();
        assert_eq!(driver.take_back(), [] as [u64; 0], "{what}: there was no request");
        driver.vm.front.barrier();
    }
    let status = server.status();
    assert_eq!(
        status.faults.total(),
        0,
        "{what}, inflight region: {inflight}: {:?}",
        status.faults
    );
    assert!(status.guest.connected);
}

#[test]
fn no_chain_is_returned_twice() {
    for (what, way) in ways() {
        for inflight in [false, true] {
            run(what, way, inflight);
        }
    }
}
