//! Several guests in one process do not disturb each other.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::Signal;

use crate::PROGRAM;
use crate::support::driver::{CLASSIC, Monitor, Vm, mem_table};
use crate::support::front_end::request;
use crate::support::guest::{BASE, BYTES, FILE_OFFSET, Guest, data_pages};
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
    let mut vm = Vm::new(Monitor::Qemu, program.connect(socket), Guest::sealed());
    vm.attach();
    vm.probe(CLASSIC);
    vm
}

/// Serves a guest as long as another one's front end does what it should not.
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
fn a_front_end_that_hangs_or_lies_disturbs_nobody_else() {
    let mut program = two_guests(&[]);
    let mut vm = sealed_vm(&mut program, "two.vhost");
    assert_two_is_served(&mut program, &mut vm);
    // Half a message, and then nothing.
    let mut hanging = UnixStream::connect(program.path("one.vhost")).unwrap();
    hanging.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    assert_two_is_served(&mut program, &mut vm);
    drop(hanging);
    for _ in 0..50 {
        let lying = program.connect("one.vhost");
        lying.try_send(1000, &[0; 100], &[]);
        lying.wait_closed();
    }
    assert_two_is_served(&mut program, &mut vm);
    // Memory that could end the process for both.
    let lying = program.connect("one.vhost");
    let file = memfd_create("shrinks", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, FILE_OFFSET + BYTES).unwrap();
    let table = mem_table(&[[BASE, BYTES, BASE, FILE_OFFSET]]);
    lying.try_send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
    lying.wait_closed();
    assert_two_is_served(&mut program, &mut vm);
    let one = program.client("one").status().unwrap();
    assert_eq!(one.faults.front_end.get("protocol_violation"), Some(&51), "{:?}", one.faults);
    // The guest whose front end lied can be served as well.
    let mut vm = sealed_vm(&mut program, "one.vhost");
    vm.inflate(&data_pages().take(5).collect());
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    for name in ["one.vhost", "two.vhost", "one.sock", "two.sock"] {
        assert!(!program.path(name).exists(), "{name}");
    }
}

#[test]
fn what_one_front_end_makes_the_log_say_is_bounded() {
    let mut program = two_guests(&[]);
    for _ in 0..200 {
        let lying = program.connect("one.vhost");
        lying.try_send(1000, &[0; 100], &[]);
        lying.wait_closed();
    }
    let (_, log) = program.end(Signal::TERM);
    assert!(log.lines().count() < 40, "{} lines\n{log}", log.lines().count());
}

#[test]
fn unsealed_memory_is_taken_where_that_is_said() {
    let mut program = two_guests(&["--unsealed-memory", "accept"]);
    let front = program.connect("one.vhost");
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    vm.inflate(&data_pages().take(5).collect());
    assert_eq!(program.client("one").status().unwrap().faults.total(), 0);
    let seals = SealFlags::SHRINK;
    assert!(fcntl_add_seals(&vm.guest.file, seals).is_err(), "it was not sealable");
}
