//! An idle back end uses no CPU time.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use control::api::ReleaseMode;
use rustix::event::EventfdFlags;
use vhost_device_balloon::End;

use crate::support::driver::{CLASSIC, INFLATE, Vm, Vmm};
use crate::support::front_end::{eventfd, request};
use crate::support::guest::data_pages;
use crate::support::server::{Served, Server};

/// Measured interval.
const WATCH: Duration = Duration::from_millis(60);
/// Most CPU time in the interval: a busy loop takes all of it, or half of it
/// on a shared CPU.
const IDLE_NS: u64 = 5_000_000;

/// The kernel accounts CPU time at a context switch, so a busy loop is visible.
fn assert_idle(served: &Served) {
    let before = served.cpu_ns();
    std::thread::sleep(WATCH);
    let spent = served.cpu_ns() - before;
    assert!(spent < IDLE_NS, "the back end spins: {spent} ns in {WATCH:?}");
}

/// Runs a guest, replaces its kick files with `replace`, and expects that the back end is
/// idle and serves the other queue.
fn assert_idle_after(replace: impl FnOnce(&mut Vm)) {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.inflate(&data_pages().take(4).collect());
    replace(&mut vm);
    vm.front.barrier();
    assert_idle(&served);
    vm.deflate(&data_pages().take(4).collect());
    assert_idle(&served);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

#[test]
fn an_idle_guest_costs_no_cpu_time() {
    assert_idle_after(|_| {});
}

#[test]
fn a_replaced_kick_is_not_polled() {
    assert_idle_after(|vm| {
        let old = std::mem::replace(&mut vm.kicks[INFLATE], eventfd());
        vm.front.send_fd(request::SET_VRING_KICK, 0, &vm.kicks[INFLATE]);
        vm.front.barrier();
        rustix::io::write(&old, &1u64.to_ne_bytes()).unwrap();
        // The new one is polled.
        vm.inflate(&data_pages().take(4).collect());
    });
}

#[test]
fn a_kick_of_a_stopped_vring_is_not_polled() {
    assert_idle_after(|vm| {
        vm.stop_ring(0);
        vm.kick(INFLATE);
    });
}

#[test]
fn a_kick_of_a_disabled_vring_causes_no_busy_loop() {
    assert_idle_after(|vm| {
        vm.front.send_state(request::SET_VRING_ENABLE, 0, 0);
        vm.front.barrier();
        vm.kick(INFLATE);
    });
}

/// Such a file stays readable.
#[test]
fn a_kick_with_a_closed_peer_causes_no_busy_loop() {
    assert_idle_after(|vm| {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(write);
        vm.front.send_fd(request::SET_VRING_KICK, 0, read);
    });
    assert_idle_after(|vm| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        vm.front.send_fd(request::SET_VRING_KICK, 0, theirs);
        drop(ours);
    });
}

#[test]
fn a_semaphore_eventfd_as_kick_causes_no_busy_loop() {
    assert_idle_after(|vm| {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE;
        let kick = rustix::event::eventfd(u32::MAX, flags).unwrap();
        vm.front.send_fd(request::SET_VRING_KICK, 0, kick);
    });
}

/// Readable files that cannot be read.
#[test]
fn a_kick_that_cannot_be_read_causes_no_busy_loop() {
    assert_idle_after(|vm| {
        let full = eventfd();
        rustix::io::write(&full, &1u64.to_ne_bytes()).unwrap();
        let poll: OwnedFd =
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let event = rustix::event::epoll::EventData::new_u64(0);
        rustix::event::epoll::add(&poll, &full, event, rustix::event::epoll::EventFlags::IN)
            .unwrap();
        vm.front.send_fd(request::SET_VRING_KICK, 0, &poll);
        vm.front.barrier();
        // It stays readable while the back end has it open.
        std::mem::forget(full);
        std::mem::forget(poll);
    });
}

#[test]
fn a_kick_through_a_pipe_or_a_socket_is_served_and_then_quiet() {
    let pipe = || {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (read, write)
    };
    let socket = || {
        let (read, write) = UnixStream::pair().unwrap();
        (OwnedFd::from(read), OwnedFd::from(write))
    };
    for pair in [pipe as fn() -> (OwnedFd, OwnedFd), socket] {
        assert_idle_after(|vm| {
            let (read, write) = pair();
            vm.front.send_fd(request::SET_VRING_KICK, 0, read);
            vm.kicks[INFLATE] = write;
            // More than the file's capacity, so that unread kicks would block.
            for _ in 0..20_000 {
                vm.kick(INFLATE);
            }
            vm.inflate(&data_pages().take(4).collect());
        });
    }
}

#[test]
fn a_call_with_a_closed_peer_causes_no_busy_loop() {
    assert_idle_after(|vm| {
        let (read, write) = rustix::pipe::pipe().unwrap();
        vm.front.send_fd(request::SET_VRING_CALL, 0, write);
        drop(read);
        vm.front.barrier();
        let message = vm.name_pages(&data_pages().take(4).collect());
        vm.post(INFLATE, &message);
        vm.kick(INFLATE);
    });
}

#[test]
fn a_closed_channel_causes_no_busy_loop() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.channel = None;
    server.balloon.set_target(5).unwrap();
    vm.front.barrier();
    assert_idle(&served);
    assert_eq!(vm.front.num_pages(), 5);
    // Not a socket at all.
    for file in [eventfd(), rustix::pipe::pipe().unwrap().1] {
        vm.front.send(request::SET_BACKEND_REQ_FD, &[], &[file.as_fd()]);
        server.balloon.set_target(6).unwrap();
        server.balloon.set_target(7).unwrap();
        vm.front.barrier();
        assert_idle(&served);
    }
    assert!(server.front_end_faults("channel_blocked") > 0);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}
