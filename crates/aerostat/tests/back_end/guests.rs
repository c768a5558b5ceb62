//! Several guests in one process do not disturb each other.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::process::Signal;

use crate::PROGRAM;
use crate::support::driver::{CLASSIC, INFLATE, RING_SIZE, Vm, Vmm, mem_table, vring_addr};
use crate::support::front_end::{FrontEnd, PROTOCOL_FEATURES, eventfd, request};
use crate::support::guest::{BASE, BYTES, FILE_OFFSET, Guest, USER_BASE, data_pages};
use crate::support::process::Program;

fn two_guests(arguments: &[&str]) -> Program {
    let mut program = Program::new(PROGRAM, arguments);
    for name in ["one", "two"] {
        let socket = program.path(&format!("{name}.vhost"));
        program.argument("--guest");
        program.argument(format!("{name}={}", socket.display()));
    }
    program.start();
    program
}

fn sealed_vm(program: &mut Program, socket: &str) -> Vm {
    let mut vm = Vm::new(Vmm::Qemu, program.connect(socket), Guest::sealed());
    vm.attach();
    vm.probe(CLASSIC);
    vm
}

/// Checks that guest two is served while guest one's front end misbehaves.
fn assert_two_is_served(program: &mut Program, vm: &mut Vm) {
    let pages = data_pages().take(200).collect();
    let started = Instant::now();
    vm.inflate(&pages);
    vm.deflate(&pages);
    vm.guest.write_patterns(pages);
    let status = program.client("two").status().unwrap();
    assert!(status.guest.connected);
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    assert!(started.elapsed() < Duration::from_secs(3), "it had to wait: {:?}", started.elapsed());
}

#[test]
fn a_hanging_or_faulty_front_end_does_not_affect_other_guests() {
    let mut program = two_guests(&[]);
    let mut vm = sealed_vm(&mut program, "two.vhost");
    assert_two_is_served(&mut program, &mut vm);
    // Half a message.
    let mut hanging = UnixStream::connect(program.path("one.vhost")).unwrap();
    hanging.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    assert_two_is_served(&mut program, &mut vm);
    drop(hanging);
    for _ in 0..50 {
        let faulty = program.connect("one.vhost");
        faulty.try_send(1000, &[0; 100], &[]);
        faulty.wait_closed();
    }
    assert_two_is_served(&mut program, &mut vm);
    // Memory that could end the process for both.
    let faulty = program.connect("one.vhost");
    let file = memfd_create("shrinks", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, FILE_OFFSET + BYTES).unwrap();
    let table = mem_table(&[[BASE, BYTES, BASE, FILE_OFFSET]]);
    faulty.try_send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
    faulty.wait_closed();
    assert_two_is_served(&mut program, &mut vm);
    let one = program.client("one").status().unwrap();
    assert_eq!(one.faults.front_end.get("protocol_violation"), Some(&51), "{:?}", one.faults);
    // The guest of the faulty front end can be served again.
    let mut vm = sealed_vm(&mut program, "one.vhost");
    vm.inflate(&data_pages().take(5).collect());
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    for name in ["one.vhost", "two.vhost", "one.sock", "two.sock"] {
        assert!(!program.path(name).exists(), "{name}");
    }
}

#[test]
fn the_log_lines_of_one_front_end_are_limited() {
    let mut program = two_guests(&[]);
    for _ in 0..200 {
        let faulty = program.connect("one.vhost");
        faulty.try_send(1000, &[0; 100], &[]);
        faulty.wait_closed();
    }
    let (_, log) = program.end(Signal::TERM);
    assert!(log.lines().count() < 40, "{} lines\n{log}", log.lines().count());
}

#[test]
fn unsealed_memory_is_accepted_with_the_option() {
    let mut program = two_guests(&["--unsealed-memory", "accept"]);
    let front = program.connect("one.vhost");
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    vm.inflate(&data_pages().take(5).collect());
    assert_eq!(program.client("one").status().unwrap().faults.total(), 0);
    let seals = SealFlags::SHRINK;
    assert!(fcntl_add_seals(&vm.guest.file, seals).is_err(), "it was not sealable");
}

/// Checks the documented bound, which applies if one page of every 2 MiB is in the balloon, plus
/// slack for other allocations.
#[test]
fn the_back_ends_memory_is_bounded_by_the_guests_memory() {
    const CLAIMED: u64 = 512 << 30;
    const START: u64 = 1 << 40;
    const KEPT_MIB_PER_TIB: u64 = 70;
    const SLACK_MIB: u64 = 10;
    let mut program = Program::one_guest(PROGRAM, &["--max-guest-memory", "600GiB"]);
    program.start();
    let front = program.connect("vm.vhost");
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    let sparse = memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&sparse, CLAIMED).unwrap();
    let regions = [[BASE, BYTES, USER_BASE, FILE_OFFSET], [START, CLAIMED, START, 0]];
    let files = [vm.guest.file.as_fd(), sparse.as_fd()];
    vm.front.send(request::SET_MEM_TABLE, &mem_table(&regions), &files);
    vm.front.barrier();
    let before = resident_mib(&program);
    let pages: Vec<u64> = (START / 4096..(START + CLAIMED) / 4096).step_by(512).collect();
    for some in pages.chunks(8192) {
        let message: Vec<u8> = some.iter().flat_map(|page| (*page as u32).to_le_bytes()).collect();
        vm.transact(INFLATE, &message);
    }
    let bound = CLAIMED * KEPT_MIB_PER_TIB / (1 << 40) + SLACK_MIB;
    let grown = resident_mib(&program) - before;
    assert!(grown <= bound, "{grown} MiB, and at most {bound} are documented");
    assert!(grown >= bound / 4, "{grown} MiB: nothing was kept");
    assert_eq!(program.client("vm").status().unwrap().faults.total(), 0);
    // The error for a front end that claims more has both numbers.
    let more = program.connect("vm.vhost");
    drop(vm);
    more.send_u64(request::SET_FEATURES, CLASSIC.0 | PROTOCOL_FEATURES);
    let table = mem_table(&[[START, 2 * CLAIMED, START, 0]]);
    more.try_send(request::SET_MEM_TABLE, &table, &[sparse.as_fd()]);
    more.wait_closed();
    let (_, log) = program.end(Signal::TERM);
    for number in [2 * CLAIMED, 600 << 30] {
        assert!(log.contains(&number.to_string()), "{log}");
    }
}

fn resident_mib(program: &Program) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

const HUGE: u64 = 2 << 20;
/// Size of the memory that a front end shares in these tests.
const SHARED: u64 = 4 * HUGE;

/// Creates a sealable file of huge pages, as QEMU does for a guest.
fn huge_memfd(pages: u64) -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("huge", flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).ok()?;
    rustix::fs::ftruncate(&file, pages * HUGE).ok()?;
    Some(file)
}

/// Shares memory and starts a virtqueue in it. The test itself does not touch the memory.
fn start_queue(front: &FrontEnd, file: impl AsFd) -> OwnedFd {
    front.send_u64(request::SET_FEATURES, CLASSIC.0 | PROTOCOL_FEATURES);
    let table = mem_table(&[[BASE, SHARED, BASE, 0]]);
    front.send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
    let queue = INFLATE as u32;
    front.send_state(request::SET_VRING_NUM, queue, u32::from(RING_SIZE));
    front.send_state(request::SET_VRING_BASE, queue, 0);
    // Each part in its own huge page.
    let places = [BASE, BASE + 2 * HUGE, BASE + HUGE];
    front.send(request::SET_VRING_ADDR, &vring_addr(queue, places), &[]);
    let kick = eventfd();
    front.send_fd(request::SET_VRING_KICK, queue.into(), &kick);
    front.try_send(request::SET_VRING_ENABLE, &[queue, 1].map(u32::to_ne_bytes).concat(), &[]);
    kick
}

/// Checks that only the faulty session ends, with the reason, and that the other guest is served.
fn assert_only_session_one_ended(program: &mut Program, vm: &mut Vm, front: &FrontEnd) {
    front.wait_closed();
    assert_two_is_served(program, vm);
    let one = program.client("one").status().unwrap();
    assert!(!one.guest.connected);
    assert_eq!(one.faults.front_end.get("unbacked_memory"), Some(&1), "{:?}", one.faults);
    assert_eq!(one.faults.total(), 1, "{:?}", one.faults);
    // A front end with valid memory can connect afterwards.
    sealed_vm(program, "one.vhost").inflate(&data_pages().take(5).collect());
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("there is no memory behind guest address"), "{log}");
    assert!(log.contains("vm.nr_hugepages"), "{log}");
}

#[test]
fn missing_huge_pages_end_only_their_session() {
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(free).ok().and_then(|text| text.trim().parse().ok());
    let (Some(free), Some(file)) = (free, huge_memfd(SHARED / HUGE)) else {
        return eprintln!("SKIPPED: no huge pages here");
    };
    // Allocates all free pages of the pool.
    let pool = huge_memfd(free).unwrap();
    if free > 0 {
        fallocate(&pool, FallocateFlags::empty(), 0, free * HUGE).unwrap();
    }
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let mut program = two_guests(&[]);
    let mut vm = sealed_vm(&mut program, "two.vhost");
    let front = program.connect("one.vhost");
    let _kick = start_queue(&front, &file);
    assert_only_session_one_ended(&mut program, &mut vm, &front);
}

#[test]
fn a_file_that_shrinks_ends_only_its_session() {
    let file = memfd_create("shrinks", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, SHARED).unwrap();
    let mut program = two_guests(&["--unsealed-memory", "accept"]);
    let mut vm = sealed_vm(&mut program, "two.vhost");
    let front = program.connect("one.vhost");
    let kick = start_queue(&front, &file);
    front.barrier();
    rustix::fs::ftruncate(&file, HUGE).unwrap();
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    assert_only_session_one_ended(&mut program, &mut vm, &front);
}
