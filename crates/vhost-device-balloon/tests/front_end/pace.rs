//! Front ends and guests that stall or flood: each wait for them has a
//! time limit.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use control::api::ReleaseMode;
use guest_ring::Buffer;
use vhost_device_balloon::{End, SessionError};

use crate::assert_serves;
use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, INFLATE, MESSAGE, RING_SIZE, Vm, Vmm};
use crate::support::front_end::{FLAGS, FrontEnd, eventfd, message, request, words};
use crate::support::guest::data_pages;
use crate::support::server::Server;

/// The back end's time limit for a message, and slack for a
/// slow machine.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
const SLACK: Duration = Duration::from_secs(3);

/// The cases run in parallel, since each takes the full timeout.
#[test]
fn a_stalled_front_end_times_out() {
    let stalls: [fn(&FrontEnd); 4] = [
        |front| front.send_raw(&message(1, FLAGS, &[])[..3], &[]).unwrap(),
        |front| front.send_raw(&words(&[request::SET_FEATURES, FLAGS, 8]), &[]).unwrap(),
        drip,
        request_without_reading,
    ];
    thread::scope(|scope| {
        for stall in stalls {
            scope.spawn(move || {
                let server = Server::new(ReleaseMode::Background);
                let (front, served) = server.connect();
                let started = Instant::now();
                stall(&front);
                match served.outcome() {
                    Err(SessionError::Receive(_) | SessionError::Send(_)) => {}
                    other => panic!("{other:?}"),
                }
                assert!(started.elapsed() < MESSAGE_TIMEOUT + SLACK);
                assert_eq!(server.front_end_faults("broken_connection"), 1);
                assert_serves(&server, Vmm::Uml, CLASSIC);
            });
        }
    });
}

/// The limit applies to the complete message, even in many pieces.
fn drip(front: &FrontEnd) {
    let started = Instant::now();
    let header = words(&[request::SET_MEM_TABLE, FLAGS, 4096]);
    for byte in header.into_iter().chain(std::iter::repeat_n(0, 4096)) {
        if (&front.socket).write_all(&[byte]).is_err() {
            break;
        }
        assert!(started.elapsed() < MESSAGE_TIMEOUT + SLACK, "the session does not time out");
        thread::sleep(Duration::from_millis(300));
    }
}

/// Sends requests without reading the replies.
fn request_without_reading(front: &FrontEnd) {
    let started = Instant::now();
    let question = message(request::GET_FEATURES, FLAGS, &[]);
    while (&front.socket).write_all(&question).is_ok() {
        assert!(started.elapsed() < MESSAGE_TIMEOUT + SLACK);
    }
}

/// Full call files and channels do not block the back end.
#[test]
fn unread_calls_and_channels_do_not_block() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let (read, write) = rustix::pipe::pipe().unwrap();
    vm.front.send_fd(request::SET_VRING_CALL, 0, write);
    vm.front.barrier();
    let message = vm.name_pages(&data_pages().take(2).collect());
    // 8 bytes each; a pipe holds 64 KiB.
    let started = Instant::now();
    for _ in 0..10_000 {
        vm.post(INFLATE, &message);
        vm.kick(INFLATE);
        while vm.rings[INFLATE].take_used(&vm.guest.memory).is_none() {
            assert!(started.elapsed() < TEST_TIMEOUT, "a call blocks the back end");
            thread::yield_now();
        }
    }
    for pages in 1..20_000 {
        server.balloon.set_target(pages % 1000 + 1).unwrap();
    }
    vm.front.barrier();
    assert_eq!(vm.front.num_pages(), 19_999 % 1000 + 1);
    drop((vm, read));
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// O_NONBLOCK belongs to the open file description, which the front end shares, so it can
/// change at any time.
#[test]
fn a_call_that_becomes_blocking_does_not_block() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let (read, write) = rustix::pipe::pipe().unwrap();
    vm.front.send_fd(request::SET_VRING_CALL, 0, &write);
    vm.front.barrier();
    while rustix::io::write(&write, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&write, false).unwrap();
    let message = vm.name_pages(&data_pages().take(2).collect());
    vm.post(INFLATE, &message);
    vm.kick(INFLATE);
    let before = Instant::now();
    while vm.rings[INFLATE].take_used(&vm.guest.memory).is_none() {
        assert!(before.elapsed() < TEST_TIMEOUT);
        thread::yield_now();
    }
    vm.front.barrier();
    drop((vm, read));
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

/// Runs `flood` in another thread until `vm`'s front end has received many replies, the
/// operator too, and the front end has disconnected.
fn assert_answers_during(mut vm: Vm, server: &Server, flood: impl Fn(&mut Vm) + Send + Sync) {
    let over = AtomicBool::new(false);
    let socket = vm.front.socket.try_clone().unwrap();
    let front = FrontEnd::new(socket);
    thread::scope(|scope| {
        let flooder = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                flood(&mut vm);
            }
        });
        // Runs even if an assertion fails.
        let end = SetOnDrop(&over);
        for round in 0..20 {
            let started = Instant::now();
            front.barrier();
            let _ = server.status();
            server.balloon.set_target(round % 2 + 1).unwrap();
            assert_eq!(front.num_pages(), round % 2 + 1);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(2), "answers took {took:?}");
        }
        drop(end);
        flooder.join().unwrap();
    });
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_flood_of_kicks_does_not_starve_the_socket() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    assert_answers_during(vm, &server, |vm| {
        vm.kick(0);
        vm.kick(1);
    });
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// The driver makes chains available as fast as it can, so that the vring is never
/// empty.
#[test]
fn a_queue_that_is_never_empty_does_not_starve_the_socket() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    let named = vm.name_pages(&data_pages().take(200).collect());
    vm.guest.write(MESSAGE, &named);
    vm.rings[INFLATE].send(&vm.guest.memory, &[Buffer::readable(MESSAGE, named.len() as u32)]);
    assert_answers_during(vm, &server, |vm| {
        // Every slot is the same chain; the index is a full ring ahead.
        let ring = &mut vm.rings[INFLATE];
        let mut returned = 0;
        while ring.take_used(&vm.guest.memory).is_some() {
            returned += 1;
        }
        let _ = returned;
        let seen: u16 = vm_memory::Bytes::read_obj(
            &vm.guest.memory,
            vm_memory::GuestAddress(ring.used_idx_addr()),
        )
        .unwrap();
        ring.set_avail_idx(&vm.guest.memory, u16::from_le(seen).wrapping_add(RING_SIZE));
        vm.kick(INFLATE);
    });
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// A full vring of the most expensive messages does not block the operator.
#[test]
fn a_full_ring_of_large_messages_does_not_block_the_device() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate] {
        let server = Server::new(mode);
        let (front, served) = server.connect();
        let mut vm = Vm::boot(Vmm::Uml, front, BITMAP);
        // Almost 64 KiB: records that name no page, then every second page.
        let mut bytes = Vec::new();
        let header = |words: u64, start: u64| (start | 12 << 52 | words << 58).to_le_bytes();
        while bytes.len() < 64 * 1024 - 2 * 512 {
            bytes.extend(header(63, data_pages().start));
            bytes.extend([0; 63 * 8]);
        }
        bytes.extend(header(14, data_pages().start));
        bytes.extend([0x55; 14 * 8]);
        vm.guest.write(MESSAGE, &bytes);
        for _ in 0..RING_SIZE {
            let buffers = [Buffer::readable(MESSAGE, bytes.len() as u32)];
            vm.rings[INFLATE].send(&vm.guest.memory, &buffers);
        }
        vm.kick(INFLATE);
        let mut answers = 0;
        let mut returned = 0;
        while returned < RING_SIZE {
            vm.front.barrier();
            answers += 1;
            while vm.rings[INFLATE].take_used(&vm.guest.memory).is_some() {
                returned += 1;
            }
        }
        assert!(answers >= 16, "the socket was answered {answers} times in 256 messages");
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
        assert_eq!(server.status().faults.total(), 0);
    }
}

/// Collects the log as text.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A client can connect, set up invalid vrings or leave its channel unread many
/// times a second; the log's rate limit applies.
#[test]
fn the_log_cannot_be_flooded() {
    let lines = Lines::default();
    let writer = lines.clone();
    let server = Server::new(ReleaseMode::Background);
    let backend = server.backend();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    let listening = thread::spawn(move || {
        let log = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(log, || backend.listen(&listener, &stopped))
    });
    let connect = || FrontEnd::new(UnixStream::connect(&path).unwrap());
    for _ in 0..300 {
        let front = connect();
        front.send(1000, &[], &[]);
        front.wait_closed();
        drop(connect());
    }
    let mut vm = Vm::boot(Vmm::Uml, connect(), CLASSIC);
    for _ in 0..300 {
        // A vring with more available chains than entries.
        vm.rings[INFLATE].set_avail_idx(&vm.guest.memory, 0x8000);
        vm.kick(INFLATE);
        vm.front.barrier();
        vm.send_channel();
        server.balloon.set_target(1).unwrap();
        vm.front.send_fd(request::SET_BACKEND_REQ_FD, 0, eventfd());
        vm.remove_uml(true);
        vm.probe_uml(CLASSIC | Features::DEFLATE_ON_OOM, true);
    }
    vm.front.barrier();
    assert!(server.guest_faults("bad_ring") >= 300);
    drop(vm);
    (&stop).write_all(&[1]).unwrap();
    listening.join().unwrap().unwrap();
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let count = text.lines().count();
    assert!(count >= 3, "nothing is logged at all:\n{text}");
    assert!(count < 200, "{count} lines, from\n{}", text.lines().next().unwrap_or_default());
}
