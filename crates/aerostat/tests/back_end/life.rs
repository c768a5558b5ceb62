//! Start, stop, state file, and a front end that listens.

use std::os::unix::net::{UnixListener, UnixStream};

use rustix::process::Signal;

use crate::PROGRAM;
use crate::support::driver::{CLASSIC, Vm, Vmm};
use crate::support::front_end::FrontEnd;
use crate::support::guest::data_pages;
use crate::support::process::Program;

#[test]
fn a_stop_finishes_the_release_and_removes_the_sockets() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut program = Program::one_guest(PROGRAM, &[]);
        program.start();
        let front = program.connect("vm.vhost");
        let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
        let pages = data_pages().take(700).collect();
        vm.inflate(&pages);
        let (status, log) = program.end(signal);
        assert_eq!(status.code(), Some(0), "{log}");
        vm.guest.assert_gone(&pages);
        for name in ["vm.vhost", "vm.sock"] {
            assert!(!program.path(name).exists(), "{name} still exists");
        }
        assert!(program.path("vm.state").exists(), "the next process reads it");
    }
}

/// Only the process that bound the socket last removes it.
#[test]
fn a_stop_leaves_the_socket_of_a_successor() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    program.connect("vm.vhost").barrier();
    let path = program.path("vm.vhost");
    std::fs::remove_file(&path).unwrap();
    let successor = UnixListener::bind(&path).unwrap();
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    UnixStream::connect(&path).expect("the successor can still be connected to");
    drop(successor);
    // A stale socket is replaced, and removed at the end.
    program.start();
    program.connect("vm.vhost").barrier();
    program.end(Signal::TERM);
    assert!(!path.exists());
}

/// The front end listens, starts after the back end, and restarts.
#[test]
fn a_front_end_that_listens() {
    let mut program = Program::one_guest(PROGRAM, &["--connect"]);
    program.start();
    for _ in 0..2 {
        let listener = UnixListener::bind(program.path("vm.vhost")).unwrap();
        let (stream, _) = listener.accept().unwrap();
        drop(listener);
        std::fs::remove_file(program.path("vm.vhost")).unwrap();
        let mut vm = Vm::boot(Vmm::Qemu, FrontEnd::new(stream), CLASSIC);
        let pages = data_pages().take(100).collect();
        vm.inflate(&pages);
        vm.deflate(&pages);
    }
    let status = program.client("vm").status().unwrap();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

/// As by systemd-tmpfiles; the back end is sandboxed.
#[test]
fn a_removed_state_file_is_created_again() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    let front = program.connect("vm.vhost");
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    std::fs::remove_file(program.path("vm.state")).unwrap();
    program.client("vm").set_balloon(300 * 4096, std::time::Duration::ZERO).unwrap();
    vm.inflate(&data_pages().take(300).collect());
    vm.front.write_actual(300);
    vm.front.barrier();
    assert!(program.path("vm.state").exists());
    let (_, log) = program.end(Signal::KILL);
    assert!(log.contains("the state file was removed, and is created again"), "{log}");
    drop(vm);
    program.start();
    let status = program.client("vm").status().unwrap();
    assert_eq!(status.balloon.target_pages, 300);
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

#[test]
fn an_invalid_state_file_is_ignored() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    std::fs::write(program.path("vm.state"), [0xa5; 4096]).unwrap();
    program.start();
    let status = program.client("vm").status().unwrap();
    assert_eq!((status.balloon.target_pages, status.balloon.actual_pages), (0, 0));
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

/// The target survives a clean stop; a driver that starts has an empty balloon.
#[test]
fn the_target_survives_a_restart_and_the_balloon_its_driver_only() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    let front = program.connect("vm.vhost");
    program.client("vm").set_balloon(300 * 4096, std::time::Duration::ZERO).unwrap();
    let mut vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    vm.inflate(&data_pages().take(300).collect());
    vm.front.write_actual(300);
    vm.front.barrier();
    program.end(Signal::TERM);
    drop(vm);
    program.start();
    let front = program.connect("vm.vhost");
    let vm = Vm::boot(Vmm::Qemu, front, CLASSIC);
    assert_eq!(vm.front.num_pages(), 300);
    let status = program.client("vm").status().unwrap();
    assert_eq!((status.balloon.target_pages, status.balloon.actual_pages), (300, 0));
    // So a client that sets the same target again waits for it.
    assert!(!status.balloon.at_target, "{:?}", status.balloon);
}
