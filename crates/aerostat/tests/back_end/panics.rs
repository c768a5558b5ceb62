//! A closed log or a panic in one session does not affect other guests.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::PROGRAM;
use crate::support::driver::{CLASSIC, Vm, Vmm};
use crate::support::guest::{Guest, data_pages};
use crate::support::process::Program;

fn two_guests(panics: &str) -> Program {
    let mut program = Program::new(PROGRAM, &["-v"]);
    for name in ["one", "two"] {
        let socket = program.path(&format!("{name}.vhost"));
        program.argument("--guest");
        program.argument(format!("{name}={}", socket.display()));
    }
    program.variable("AEROSTAT_TEST_PANIC", panics);
    // A backtrace would open files, for which the sandbox kills the process.
    program.variable("RUST_BACKTRACE", "1");
    program.start();
    program
}

fn vm(program: &mut Program, socket: &str) -> Vm {
    let mut vm = Vm::new(Vmm::Qemu, program.connect(socket), Guest::sealed());
    vm.attach();
    vm.probe(CLASSIC);
    vm
}

fn assert_served(vm: &mut Vm) {
    let pages = data_pages().take(100).collect();
    vm.inflate(&pages);
    vm.deflate(&pages);
}

/// The thread that serves a guest logs when its front end disconnects.
#[test]
fn a_closed_log_does_not_affect_guests() {
    let mut program = two_guests("");
    let mut two = vm(&mut program, "two.vhost");
    assert_served(&mut two);
    program.close_its_log();
    for _ in 0..20 {
        drop(program.connect("one.vhost"));
        drop(UnixStream::connect(program.path("one.vhost")).unwrap());
    }
    let mut one = vm(&mut program, "one.vhost");
    assert_served(&mut one);
    assert_served(&mut two);
    let lost = program.client("one").status().unwrap().faults.host["log_line_dropped"];
    assert!(lost > 0, "{lost}");
    assert_eq!(program.end(Signal::TERM).0.code(), Some(0));
}

#[test]
fn a_panic_ends_only_its_session() {
    let mut program = two_guests("kick");
    let mut two = vm(&mut program, "two.vhost");
    let one = vm(&mut program, "one.vhost");
    one.kick(0);
    let end = Instant::now() + Duration::from_secs(20);
    while program.client("one").status().unwrap().guest.connected {
        assert!(Instant::now() < end, "the session continues");
    }
    let faults = program.client("one").status().unwrap().faults;
    assert_eq!(faults.front_end["session_panicked"], 1, "{faults:?}");
    assert_served(&mut two);
    let mut one = vm(&mut program, "one.vhost");
    assert_served(&mut one);
    assert_served(&mut two);
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    let told = "the thread `guest one` panicked at";
    assert!(log.contains(told) && log.contains("the front end's connection was closed"), "{log}");
}

/// A panic between two sessions, which only the thread's own loop can catch.
#[test]
fn accepting_front_ends_continues_after_a_panic() {
    let mut program = two_guests("accept,times=3");
    for _ in 0..3 {
        drop(program.connect("one.vhost"));
    }
    let mut one = vm(&mut program, "one.vhost");
    assert_served(&mut one);
    let (status, log) = program.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("serving the guest panicked and is restarted"), "{log}");
}

/// The thread that releases memory, and the log thread.
#[test]
fn shared_threads_survive_a_panic() {
    for point in ["reclaimer", "log"] {
        let mut program = two_guests(point);
        let mut one = vm(&mut program, "one.vhost");
        assert_served(&mut one);
        let held = data_pages().take(300).collect();
        one.inflate(&held);
        let end = Instant::now() + Duration::from_secs(20);
        while program.client("one").status().unwrap().release.released_bytes < 300 * 4096 {
            assert!(Instant::now() < end, "{point}: memory is not released");
        }
        let (status, log) = program.end(Signal::TERM);
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(log.contains(&format!("requested by a test at `{point}`")), "{log}");
    }
}
