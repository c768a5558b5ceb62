//! A session closes every file descriptor that it received, however it ends.
//! Runs in its own process, where no other test opens files.
#![allow(clippy::unwrap_used, reason = "a test fails on any error")]
#![allow(clippy::cast_possible_truncation, reason = "small constants")]

mod support;

use std::os::fd::AsFd;

use control::api::ReleaseMode;

use support::driver::{BITMAP, Vm, Vmm};
use support::front_end::request;
use support::guest::data_pages;
use support::server::Server;

const SESSIONS: usize = 120;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn bad_session(server: &Server, kind: usize) {
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, BITMAP);
    vm.inflate(&data_pages().take(8).collect());
    let many = |count| vec![vm.guest.file.as_fd(); count];
    match kind {
        0 => vm.front.send(request::SET_MEM_TABLE, &[0; 8], &many(32)),
        1 => vm.front.send(request::SET_MEM_TABLE, &[0; 8], &many(33)),
        2 => vm.front.send(request::SET_VRING_KICK, &[0; 8], &many(7)),
        3 => vm.front.send_fd(request::SET_VRING_KICK, 200, &vm.guest.file),
        4 => vm.front.send(1000, &[], &many(32)),
        5 => {
            // Files with an incomplete message.
            vm.front.send_raw(&[1, 0, 0], &many(10)).unwrap();
        }
        6 => {
            for _ in 0..3 {
                vm.send_memory(support::guest::BASE, 1);
                vm.send_channel();
                vm.probe(BITMAP);
            }
            vm.front.send(1000, &[], &[]);
        }
        _ => vm.front.send_fd(request::SET_VRING_CALL, 1, std::fs::File::open("/").unwrap()),
    }
    vm.front.finish();
    assert!(served.outcome().is_err(), "session of kind {kind} did not fail");
}

#[test]
fn failed_sessions_leak_no_files() {
    let server = Server::new(ReleaseMode::Background);
    for kind in 0..8 {
        bad_session(&server, kind);
    }
    let before = open_files();
    for i in 0..SESSIONS {
        bad_session(&server, i % 8);
    }
    assert_eq!(open_files(), before);
}
