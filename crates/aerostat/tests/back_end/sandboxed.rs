//! Every thread of the back end is sandboxed.

use crate::PROGRAM;
use crate::support::driver::{Vm, Vmm, WITH_REQUESTS};
use crate::support::guest::data_pages;
use crate::support::process::{Program, of_each_thread};

fn threads_of(arguments: &[&str], name: &str) -> Vec<String> {
    let mut program = Program::one_guest(PROGRAM, arguments);
    program.start();
    let front = program.connect("vm.vhost");
    let mut vm = Vm::boot(Vmm::Qemu, front, WITH_REQUESTS);
    vm.inflate(&data_pages().take(10).collect());
    program.client("vm").status().unwrap();
    let threads = of_each_thread(program.pid(), name);
    assert!(threads.len() >= 4, "main, guest, reclaimer, control: {threads:?}");
    threads
}

#[test]
fn every_thread_has_seccomp_and_no_new_privileges() {
    let filtered = threads_of(&[], "Seccomp");
    assert!(filtered.iter().all(|mode| mode == "2"), "{filtered:?}");
    let no_new = threads_of(&["--no-seccomp"], "NoNewPrivs");
    assert!(no_new.iter().all(|set| set == "1"), "Landlock alone requires it: {no_new:?}");
    let no_new = threads_of(&["--no-landlock"], "NoNewPrivs");
    assert!(no_new.iter().all(|set| set == "1"), "{no_new:?}");
}

#[test]
fn the_sandbox_can_be_disabled() {
    let filtered = threads_of(&["--no-seccomp", "--no-landlock"], "Seccomp");
    assert!(filtered.iter().all(|mode| mode == "0"), "{filtered:?}");
}
