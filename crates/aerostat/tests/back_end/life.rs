//! Start, stop, and a monitor that listens.

use std::os::unix::net::{UnixListener, UnixStream};

use rustix::process::Signal;

use crate::PROGRAM;
use crate::support::driver::{CLASSIC, Monitor, Vm};
use crate::support::front_end::FrontEnd;
use crate::support::guest::data_pages;
use crate::support::process::Program;

#[test]
fn a_stop_finishes_the_release_and_removes_the_sockets() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut program = Program::one_guest(PROGRAM, &[]);
        program.start();
        let front = program.connect("vm.vhost");
        let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
        let pages = data_pages().take(700).collect();
        vm.inflate(&pages);
        let (status, log) = program.end(signal);
        assert_eq!(status.code(), Some(0), "{log}");
        vm.guest.assert_gone(&pages);
        for name in ["vm.vhost", "vm.sock"] {
            assert!(!program.path(name).exists(), "{name} is still there");
        }
        assert!(program.path("vm.state").exists(), "it is for the next one");
    }
}

/// The socket's path belongs to who bound it last.
#[test]
fn a_stop_leaves_the_socket_of_a_successor() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    drop(program.connect("vm.vhost"));
    let path = program.path("vm.vhost");
    std::fs::remove_file(&path).unwrap();
    let successor = UnixListener::bind(&path).unwrap();
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    UnixStream::connect(&path).expect("the successor can still be connected to");
    drop(successor);
    // What a dead one left behind is replaced, and removed at the end.
    program.start();
    drop(program.connect("vm.vhost"));
    program.end(Signal::TERM);
    assert!(!path.exists());
}

/// The monitor listens, is there later than the back end, and comes again.
#[test]
fn a_monitor_that_listens() {
    let mut program = Program::one_guest(PROGRAM, &["--connect"]);
    program.start();
    for _ in 0..2 {
        let listener = UnixListener::bind(program.path("vm.vhost")).unwrap();
        let (stream, _) = listener.accept().unwrap();
        drop(listener);
        std::fs::remove_file(program.path("vm.vhost")).unwrap();
        let mut vm = Vm::boot(Monitor::Qemu, FrontEnd::new(stream), CLASSIC);
        let pages = data_pages().take(100).collect();
        vm.inflate(&pages);
        vm.deflate(&pages);
    }
    let status = program.client("vm").status().unwrap();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

/// As a cleaner of old files does it, in the sandbox.
#[test]
fn a_state_file_that_was_removed_is_made_again() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    let front = program.connect("vm.vhost");
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    std::fs::remove_file(program.path("vm.state")).unwrap();
    program.client("vm").set_balloon(300 * 4096, std::time::Duration::ZERO).unwrap();
    vm.inflate(&data_pages().take(300).collect());
    vm.front.write_actual(300);
    vm.front.barrier();
    assert!(program.path("vm.state").exists());
    let (_, log) = program.end(Signal::KILL);
    assert!(log.contains("the state file was removed, and is made again"), "{log}");
    drop(vm);
    program.start();
    let status = program.client("vm").status().unwrap();
    assert_eq!(status.balloon.target_pages, 300);
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

#[test]
fn a_state_file_that_makes_no_sense_is_as_good_as_none() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    std::fs::write(program.path("vm.state"), [0xa5; 4096]).unwrap();
    program.start();
    let status = program.client("vm").status().unwrap();
    assert_eq!((status.balloon.target_pages, status.balloon.actual_pages), (0, 0));
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

/// The target outlives a clean stop, and a driver that starts holds nothing.
#[test]
fn a_target_outlives_the_process_and_a_balloon_only_its_driver() {
    let mut program = Program::one_guest(PROGRAM, &[]);
    program.start();
    let front = program.connect("vm.vhost");
    program.client("vm").set_balloon(300 * 4096, std::time::Duration::ZERO).unwrap();
    let mut vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    vm.inflate(&data_pages().take(300).collect());
    vm.front.write_actual(300);
    vm.front.barrier();
    program.end(Signal::TERM);
    drop(vm);
    program.start();
    let front = program.connect("vm.vhost");
    let vm = Vm::boot(Monitor::Qemu, front, CLASSIC);
    assert_eq!(vm.front.num_pages(), 300);
    let status = program.client("vm").status().unwrap();
    assert_eq!((status.balloon.target_pages, status.balloon.actual_pages), (300, 0));
    // So whoever asks for the same once more waits for it.
    assert!(!status.balloon.at_target, "{:?}", status.balloon);
}
