//! Front ends that violate the protocol: the session ends with an error that says
//! whose fault it was, and the next one is served.

use std::fs::File;
use std::io::Seek;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use balloon_abi::Features;
use control::api::ReleaseMode;
use rustix::fs::{Mode, OFlags, open};
use vhost_device_balloon::{End, SessionError, Violation};

use crate::assert_serves;
use crate::support::driver::{CLASSIC, DEFLATE, INFLATE, Vm, Vmm, mem_table, vring_addr};
use crate::support::front_end::{
    FLAGS, PROTOCOL_FEATURES, eventfd, longs, message, request, words,
};
use crate::support::guest::{BASE, BYTES, FILE_OFFSET, Guest, PAGE, data_pages, memfd};
use crate::support::server::Server;

/// State of the session when the front end misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No message was sent.
    Fresh,
    /// Protocol features and the channel are set up.
    Attached,
    /// Features are negotiated.
    Negotiated,
    /// The memory table is set.
    Memory,
    /// Both queues are set up but have no kick.
    Placed,
    /// A driver runs and has pages in the balloon.
    Running,
    /// The queues were stopped.
    Stopped,
}

impl Stage {
    pub(crate) const ALL: [Self; 7] = [
        Self::Fresh,
        Self::Attached,
        Self::Negotiated,
        Self::Memory,
        Self::Placed,
        Self::Running,
        Self::Stopped,
    ];

    pub(crate) fn reach(self, vm: &mut Vm) {
        if self == Self::Fresh {
            return;
        }
        vm.attach();
        if matches!(self, Self::Running | Self::Stopped) {
            vm.probe(CLASSIC);
            vm.inflate(&data_pages().take(9).collect());
            if self == Self::Stopped {
                vm.stop_ring(0);
                vm.stop_ring(1);
            }
            return;
        }
        if self != Self::Attached {
            vm.front.send_u64(request::SET_FEATURES, CLASSIC.0 | PROTOCOL_FEATURES);
        }
        if matches!(self, Self::Memory | Self::Placed) {
            vm.send_memory(BASE, 2);
        }
        if self == Self::Placed {
            vm.send_ring(INFLATE, BASE, 0);
            vm.send_ring(DEFLATE, BASE, 0);
        }
    }
}

/// Brings a session to `stage`, runs `attack`, and returns the session's outcome. Checks
/// that no fault is attributed to the host.
#[track_caller]
pub(crate) fn outcome_of(
    server: &Server,
    stage: Stage,
    attack: impl FnOnce(&mut Vm),
) -> Result<End, SessionError> {
    let (front, served) = server.connect();
    let mut vm = Vm::new(Vmm::Uml, front, Guest::sparse());
    stage.reach(&mut vm);
    attack(&mut vm);
    vm.front.finish();
    let outcome = served.outcome();
    if let Err(error) = &outcome {
        assert!(error.to_string().starts_with("front end: "), "at {stage:?}: {error}");
    }
    let host = server.status().faults.host;
    assert!(host.is_empty(), "at {stage:?}: {host:?}");
    outcome
}

/// Runs `attack`; expects this violation, its count, and a back end that still serves.
#[track_caller]
fn assert_violation(stage: Stage, expected: Violation, attack: impl FnOnce(&mut Vm)) {
    let server = Server::new(ReleaseMode::Background);
    match outcome_of(&server, stage, attack) {
        Err(SessionError::Violation(found)) => assert_eq!(found, expected, "at {stage:?}"),
        other => panic!("expected {expected:?} at {stage:?}, found {other:?}"),
    }
    assert_eq!(server.front_end_faults("protocol_violation"), 1);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// A sparse file of any size costs its front end nothing.
#[test]
fn guest_memory_above_the_limit_is_refused() {
    let host = rustix::system::sysinfo();
    let host = host.totalram * u64::from(host.mem_unit);
    // One of the two regions would be accepted; the first sizes exceed the address space.
    for (bytes, is_taken) in [(1 << 47, false), (2 * host + (2 << 20), false), (host, true)] {
        let bytes = bytes / PAGE * PAGE;
        let server = Server::new(ReleaseMode::Background);
        let outcome = outcome_of(&server, Stage::Negotiated, |vm| {
            let files = [memfd(bytes), memfd(bytes)];
            let table = mem_table(&[[0, bytes, 0, 0], [1 << 48, bytes, 1 << 48, 0]]);
            vm.front.send(request::SET_MEM_TABLE, &table, &[files[0].as_fd(), files[1].as_fd()]);
        });
        match outcome {
            Ok(_) if is_taken => {}
            Err(SessionError::Violation(Violation::TooMuchMemory { bytes: total, limit }))
                if !is_taken =>
            {
                assert_eq!((total, limit), (2 * bytes, 4 * host));
            }
            other => panic!("{bytes} bytes twice, of a host of {host}: {other:?}"),
        }
        assert_serves(&server, Vmm::Uml, CLASSIC);
    }
}

/// Runs `attack`; expects an error for memory that cannot be mapped.
#[track_caller]
fn assert_unmappable(attack: impl FnOnce(&mut Vm)) {
    let server = Server::new(ReleaseMode::Background);
    match outcome_of(&server, Stage::Negotiated, attack) {
        Err(SessionError::Map(_)) => {}
        other => panic!("expected unmappable memory, found {other:?}"),
    }
    assert_eq!(server.front_end_faults("unmappable_memory"), 1);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

fn dir() -> OwnedFd {
    open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn null() -> OwnedFd {
    open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn urandom() -> OwnedFd {
    open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn path_only(path: &str) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn an_invalid_header_is_refused() {
    for flags in [0, 2, 3, FLAGS | 4, 5 | 8, u32::MAX] {
        for stage in [Stage::Fresh, Stage::Running] {
            assert_violation(stage, Violation::Header { flags }, |vm| {
                vm.front.send_raw(&message(request::GET_FEATURES, flags, &[]), &[]).unwrap();
            });
        }
    }
}

#[test]
fn an_oversized_payload_is_refused() {
    for size in [4097, 1 << 20, 1 << 31, u32::MAX] {
        let expected =
            Violation::PayloadSize { request: request::SET_MEM_TABLE, size: size as usize };
        assert_violation(Stage::Negotiated, expected, |vm| {
            vm.front.send_raw(&words(&[request::SET_MEM_TABLE, FLAGS, size]), &[]).unwrap();
        });
    }
}

#[test]
fn a_disconnect_in_the_middle_of_a_message_is_a_fault() {
    let server = Server::new(ReleaseMode::Background);
    let bytes = message(request::SET_FEATURES, FLAGS, &longs(&[CLASSIC.0]));
    for len in 1..bytes.len() {
        for stage in [Stage::Fresh, Stage::Running] {
            match outcome_of(&server, stage, |vm| vm.front.send_raw(&bytes[..len], &[]).unwrap()) {
                Err(SessionError::Truncated) => {}
                other => panic!("after {len} bytes at {stage:?}: {other:?}"),
            }
        }
    }
    assert_eq!(server.front_end_faults("truncated_message"), 2 * (bytes.len() as u64 - 1));
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

#[test]
fn a_disconnect_between_messages_is_no_fault() {
    let server = Server::new(ReleaseMode::Background);
    for stage in Stage::ALL {
        assert_eq!(outcome_of(&server, stage, |_| {}).unwrap(), End::HungUp);
        assert_serves(&server, Vmm::Uml, CLASSIC);
    }
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn an_unknown_request_is_refused() {
    for code in [0, 6, 7, 19, 20, 22, 23, 26, 33, 36, 40, 44, 100, u32::MAX] {
        assert_violation(Stage::Running, Violation::UnknownRequest { request: code }, |vm| {
            vm.front.send(code, &[0; 8], &[]);
        });
    }
}

#[test]
fn a_short_payload_is_refused() {
    let sizes = [
        (request::SET_FEATURES, 7, 7),
        (request::SET_PROTOCOL_FEATURES, 0, 0),
        (request::SET_VRING_NUM, 7, 3),
        (request::SET_VRING_BASE, 4, 0),
        (request::SET_VRING_ADDR, 31, 7),
        (request::SET_VRING_KICK, 4, 4),
        (request::SET_VRING_CALL, 1, 1),
        (request::GET_VRING_BASE, 3, 3),
        (request::SET_VRING_ENABLE, 5, 1),
        (request::GET_CONFIG, 11, 3),
        (request::SET_CONFIG, 8, 0),
        (request::SET_MEM_TABLE, 39, 7),
    ];
    for (code, len, left) in sizes {
        let expected = Violation::PayloadSize { request: code, size: left };
        assert_violation(Stage::Memory, expected, |vm| {
            let mut payload = vec![0; len];
            // One region, and queue 0 if the request names a queue.
            payload.splice(..4.min(len), 1u32.to_ne_bytes().into_iter().take(len));
            let file = eventfd();
            let fds = if code == request::SET_MEM_TABLE { vec![file.as_fd()] } else { vec![] };
            vm.front.send(code, &payload, &fds);
        });
    }
}

/// Bytes after the request's fields are ignored, as in the memory table of User
/// Mode Linux.
#[test]
fn a_long_payload_is_accepted() {
    let server = Server::new(ReleaseMode::Background);
    let outcome = outcome_of(&server, Stage::Running, |vm| {
        for code in [request::SET_OWNER, request::GET_FEATURES, request::GET_QUEUE_NUM] {
            vm.front.send(code, &[0xff; 4096], &[]);
        }
        let mut features = longs(&[CLASSIC.0 | PROTOCOL_FEATURES]);
        features.resize(4096, 0xff);
        vm.front.send(request::SET_FEATURES, &features, &[]);
    });
    assert_eq!(outcome.unwrap(), End::HungUp);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

#[test]
fn configuration_beyond_the_end_is_refused() {
    for (offset, size) in [(0, 257), (256, 1), (257, 0), (u32::MAX, u32::MAX), (0, u32::MAX)] {
        let expected = Violation::PayloadSize { request: request::GET_CONFIG, size: size as usize };
        assert_violation(Stage::Attached, expected, |vm| {
            vm.front.send(request::GET_CONFIG, &words(&[offset, size, 0]), &[]);
        });
    }
    for size in [1, 5, 4096, u32::MAX] {
        let expected = Violation::PayloadSize { request: request::SET_CONFIG, size: 0 };
        assert_violation(Stage::Attached, expected, |vm| {
            vm.front.send(request::SET_CONFIG, &words(&[4, size, 0]), &[]);
        });
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for bit in [6, 26, 33, 34, 35, 40, 62, 63] {
        let features = 1u64 << bit;
        assert_violation(Stage::Attached, Violation::Features { features }, |vm| {
            vm.front.send_u64(request::SET_FEATURES, features | CLASSIC.0);
        });
    }
    for bit in [1, 3, 4, 11, 13, 15, 63] {
        let features = 1u64 << bit;
        assert_violation(Stage::Fresh, Violation::Features { features }, |vm| {
            vm.front.send_u64(request::SET_PROTOCOL_FEATURES, features | 1 << 9);
        });
    }
}

#[test]
fn a_change_of_features_while_queues_run_is_refused() {
    assert_violation(Stage::Running, Violation::FeaturesWhileRunning, |vm| {
        vm.front.send_u64(request::SET_FEATURES, Features::VERSION_1.0 | PROTOCOL_FEATURES);
    });
    assert_violation(Stage::Running, Violation::FeaturesWhileRunning, |vm| {
        vm.front.send_u64(request::SET_FEATURES, CLASSIC.0);
    });
}

#[test]
fn a_queue_that_does_not_exist_is_refused() {
    for index in [6, 7, 255, 65536, u32::MAX] {
        let expected = Violation::NoSuchQueue { index };
        let states = [
            request::SET_VRING_NUM,
            request::SET_VRING_BASE,
            request::GET_VRING_BASE,
            request::SET_VRING_ENABLE,
        ];
        for code in states {
            assert_violation(Stage::Placed, expected, |vm| vm.front.send_state(code, index, 16));
        }
        assert_violation(Stage::Placed, expected, |vm| {
            let places = [BASE + 0x1000, BASE + 0x2000, BASE + 0x3000];
            vm.front.send(request::SET_VRING_ADDR, &vring_addr(index, places), &[]);
        });
    }
    for code in [request::SET_VRING_KICK, request::SET_VRING_CALL] {
        assert_violation(Stage::Placed, Violation::NoSuchQueue { index: 0xff }, |vm| {
            vm.front.send_fd(code, 0xff, eventfd());
        });
    }
}

#[test]
fn an_invalid_queue_size_or_base_is_refused() {
    for size in [0, 3, 255, 257, 1000, 2048, 32768, 65535, 65536, u32::MAX] {
        assert_violation(Stage::Memory, Violation::QueueSetup { index: 1 }, |vm| {
            vm.front.send_state(request::SET_VRING_NUM, 1, size);
        });
    }
    for base in [65536, 1 << 31, u32::MAX] {
        assert_violation(Stage::Memory, Violation::QueueSetup { index: 0 }, |vm| {
            vm.front.send_state(request::SET_VRING_BASE, 0, base);
        });
    }
}

#[test]
fn a_vring_outside_of_memory_is_refused() {
    let end = BASE + BYTES;
    let good = [BASE + 0x1000, BASE + 0x3000, BASE + 0x4000];
    for part in 0..3 {
        for address in [0, PAGE, BASE - 1, end, end + PAGE, u64::MAX, !0xfff, 1 << 63] {
            assert_violation(Stage::Placed, Violation::NoSuchAddress { address }, |vm| {
                let mut places = good;
                places[part] = address;
                vm.front.send(request::SET_VRING_ADDR, &vring_addr(0, places), &[]);
            });
        }
        // It starts in memory and ends outside.
        for address in [end - 16, end - PAGE + 0xc00] {
            assert_violation(Stage::Placed, Violation::QueueSetup { index: 0 }, |vm| {
                vm.front.send_state(request::SET_VRING_NUM, 0, 1024);
                let mut places = good;
                places[part] = address;
                vm.front.send(request::SET_VRING_ADDR, &vring_addr(0, places), &[]);
            });
        }
        let unaligned = [1, 2, 1][part];
        assert_violation(Stage::Placed, Violation::QueueSetup { index: 0 }, |vm| {
            let mut places = good;
            places[part] += unaligned;
            vm.front.send(request::SET_VRING_ADDR, &vring_addr(0, places), &[]);
        });
    }
    assert_violation(Stage::Negotiated, Violation::MemoryTable, |vm| {
        vm.front.send(request::SET_VRING_ADDR, &vring_addr(0, good), &[]);
    });
}

/// Overlapping parts of a vring, and wrong base indices, affect only the guest itself: the
/// vring is stopped or runs on, and the other queue works.
#[test]
fn an_overlapping_vring_or_a_wrong_base_affects_no_other_queue() {
    let server = Server::new(ReleaseMode::Background);
    let spots = [BASE + 0x1000, BASE + 0x1002, BASE + 0x1004, BASE + 0x1010, BASE + 0x2000];
    for table in [0, 3, 4].map(|i| spots[i]) {
        for used in [0, 2, 4].map(|i| spots[i]) {
            for avail in spots {
                for base in [0, 1, 255, 256, 0x8000, 0xffff] {
                    let outcome = outcome_of(&server, Stage::Running, |vm| {
                        vm.front.send_state(request::SET_VRING_BASE, 0, base);
                        let places = [table, used, avail];
                        vm.front.send(request::SET_VRING_ADDR, &vring_addr(0, places), &[]);
                        vm.guest.write(BASE + 0x1000, &[1; 0x2000]);
                        for _ in 0..3 {
                            vm.kick(INFLATE);
                            vm.front.barrier();
                        }
                        // The other queue is not affected.
                        vm.deflate(&data_pages().take(9).collect());
                    });
                    assert_eq!(outcome.unwrap(), End::HungUp);
                }
            }
        }
    }
    assert!(server.guest_faults("bad_ring") > 0);
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

#[test]
fn an_invalid_memory_table_is_refused() {
    let user = 0x7000_0000;
    let tables: [&[[u64; 4]]; 9] = [
        &[[BASE, 0, user, 0]],
        &[[BASE + 1, PAGE, user, 0]],
        &[[BASE, PAGE + 1, user, 0]],
        &[[BASE, 0x800, user, 0]],
        &[[!0xfff, 2 * PAGE, user, 0]],
        &[[0, u64::MAX, user, 0]],
        &[[BASE, 2 * PAGE, user, 0], [BASE + PAGE, PAGE, user + PAGE * 2, PAGE * 2]],
        // The file offset wraps around.
        &[[BASE, PAGE, user, u64::MAX]],
        // Ends after the end of the file.
        &[[BASE, BYTES, user, FILE_OFFSET + PAGE]],
    ];
    for (i, regions) in tables.into_iter().enumerate() {
        for stage in [Stage::Fresh, Stage::Negotiated] {
            println!("table {i} at {stage:?}");
            assert_violation(stage, Violation::MemoryTable, |vm| {
                let fds: Vec<BorrowedFd<'_>> =
                    regions.iter().map(|_| vm.guest.file.as_fd()).collect();
                vm.front.send(request::SET_MEM_TABLE, &mem_table(regions), &fds);
            });
        }
    }
}

#[test]
fn a_memory_table_without_the_running_vrings_is_refused() {
    assert_violation(Stage::Running, Violation::MemoryTable, |vm| {
        let table = mem_table(&[[0, BYTES, BASE, FILE_OFFSET]]);
        vm.front.send(request::SET_MEM_TABLE, &table, &[vm.guest.file.as_fd()]);
    });
}

#[test]
fn memory_that_cannot_be_mapped_is_refused() {
    let table = mem_table(&[[BASE, BYTES, BASE, FILE_OFFSET]]);
    // Read-only.
    assert_unmappable(|vm| {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&vm.guest.file));
        let read_only = File::open(path).unwrap();
        vm.front.send(request::SET_MEM_TABLE, &table, &[read_only.as_fd()]);
    });
    // Not at a page boundary of the file.
    assert_unmappable(|vm| {
        let table = mem_table(&[[BASE, BYTES - PAGE, BASE, FILE_OFFSET + 1]]);
        vm.front.send(request::SET_MEM_TABLE, &table, &[vm.guest.file.as_fd()]);
    });
    // Up to the last byte of the address space, so its end overflows.
    assert_unmappable(|vm| {
        let table = mem_table(&[[!0xfff, PAGE, BASE, 0]]);
        vm.front.send(request::SET_MEM_TABLE, &table, &[vm.guest.file.as_fd()]);
    });
    // Sealed against writing.
    assert_unmappable(|vm| {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("sealed", flags).unwrap());
        file.set_len(FILE_OFFSET + BYTES).unwrap();
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        vm.front.send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
    });
}

#[test]
fn a_file_that_is_no_memory_is_refused() {
    let table = mem_table(&[[BASE, BYTES, BASE, FILE_OFFSET]]);
    let short = memfd(FILE_OFFSET + BYTES - 1);
    let files: [OwnedFd; 6] =
        [short.into(), dir(), null(), eventfd(), urandom(), path_only("/dev/null")];
    for file in files {
        let server = Server::new(ReleaseMode::Background);
        let outcome = outcome_of(&server, Stage::Negotiated, |vm| {
            vm.front.send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
        });
        assert!(outcome.is_err(), "{file:?} was accepted as memory");
        assert_serves(&server, Vmm::Uml, CLASSIC);
    }
}

#[test]
fn the_wrong_number_of_files_is_refused() {
    let request = request::SET_MEM_TABLE;
    let table = |count| mem_table(&vec![[BASE, BYTES, BASE, FILE_OFFSET]; count]);
    for (regions, count) in [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (33, 32), (100, 1)] {
        assert_violation(Stage::Negotiated, Violation::FdCount { request, count }, |vm| {
            let fds = vec![vm.guest.file.as_fd(); count];
            vm.front.send(request, &table(regions), &fds);
        });
    }
    // More regions than fit in the payload.
    assert_violation(Stage::Negotiated, Violation::FdCount { request, count: 1 }, |vm| {
        vm.front.send(request, &words(&[u32::MAX, 0]), &[vm.guest.file.as_fd()]);
    });
    for request in [request::SET_VRING_KICK, request::SET_VRING_CALL] {
        for count in [0, 2, 32] {
            assert_violation(Stage::Placed, Violation::FdCount { request, count }, |vm| {
                vm.front.send(request, &longs(&[0]), &vec![vm.kicks[0].as_fd(); count]);
            });
        }
    }
    for count in [0, 2] {
        let request = request::SET_BACKEND_REQ_FD;
        assert_violation(Stage::Fresh, Violation::FdCount { request, count }, |vm| {
            vm.front.send(request, &[], &vec![vm.kicks[0].as_fd(); count]);
        });
    }
    assert_violation(Stage::Placed, Violation::NoKick { index: 1 }, |vm| {
        vm.front.send_u64(request::SET_VRING_KICK, 1 | 1 << 8);
    });
}

#[test]
fn too_many_files_in_a_message_are_refused() {
    for request in [request::SET_MEM_TABLE, request::SET_OWNER, 1000] {
        assert_violation(Stage::Negotiated, Violation::TooManyFds, |vm| {
            vm.front.send(request, &[0; 8], &[vm.guest.file.as_fd(); 33]);
        });
    }
    // Some with each byte of the header.
    assert_violation(Stage::Negotiated, Violation::TooManyFds, |vm| {
        for byte in words(&[request::SET_MEM_TABLE, FLAGS, 0]) {
            if vm.front.send_raw(&[byte], &[vm.guest.file.as_fd(); 30]).is_err() {
                break;
            }
        }
    });
}

/// Files in messages that need none are closed.
#[test]
fn unexpected_files_are_closed() {
    let server = Server::new(ReleaseMode::Background);
    let outcome = outcome_of(&server, Stage::Running, |vm| {
        let fds = [vm.guest.file.as_fd(); 32];
        vm.front.send(request::SET_OWNER, &[], &fds);
        vm.front.send_u64(request::SET_VRING_CALL, 1 << 8);
        vm.front.send(request::SET_VRING_ENABLE, &words(&[0, 1]), &fds);
        // With the second part of a message.
        vm.front.send_raw(&words(&[request::SET_FEATURES, FLAGS, 8]), &[]).unwrap();
        vm.front.send_raw(&longs(&[CLASSIC.0 | PROTOCOL_FEATURES]), &fds[..5]).unwrap();
        vm.front.send_raw(&message(request::SET_MEM_TABLE, FLAGS, &mem_table(&[])), &[]).unwrap();
    });
    let expected = Violation::FdCount { request: request::SET_MEM_TABLE, count: 0 };
    assert!(matches!(outcome, Err(SessionError::Violation(found)) if found == expected));
    assert_serves(&server, Vmm::Uml, CLASSIC);
}

/// Only an eventfd, pipe or socket can be a kick or call: writing to a file on a disk
/// could block the loop, and would fill the disk.
#[test]
fn a_kick_or_call_of_a_wrong_file_type_is_refused() {
    let regular = || OwnedFd::from(tempfile::tempfile().unwrap());
    let files: [fn() -> OwnedFd; 6] =
        [dir, null, urandom, || path_only("/"), || path_only("/dev/null"), || memfd(PAGE).into()];
    for (i, file) in files.into_iter().chain([regular as fn() -> OwnedFd]).enumerate() {
        for code in [request::SET_VRING_KICK, request::SET_VRING_CALL] {
            println!("file {i} for request {code}");
            assert_violation(Stage::Placed, Violation::NotifyFile { index: 0 }, |vm| {
                vm.front.send_fd(code, 0, file());
            });
        }
    }
}

#[test]
fn a_refused_call_file_is_not_written() {
    let server = Server::new(ReleaseMode::Background);
    let mut file = tempfile::tempfile().unwrap();
    let outcome = outcome_of(&server, Stage::Running, |vm| {
        vm.front.send_fd(request::SET_VRING_CALL, 0, &file);
    });
    assert!(outcome.is_err());
    assert_eq!(file.seek(std::io::SeekFrom::End(0)).unwrap(), 0);
}
