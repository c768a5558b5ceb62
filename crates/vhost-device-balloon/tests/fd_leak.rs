//! A session gives back every file descriptor that it was given, however it ends.
//! Alone in its process, where nobody else opens files.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers of our own")]

mod support;

use std::os::fd::AsFd;

use control::api::ReleaseMode;

use support::driver::{BITMAP, Monitor, Vm};
use support::front_end::request;
use support::guest::data_pages;
use support::server::Server;

const SESSIONS: usize = 120;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn bad_session(server: &Server, kind: usize) {
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Monitor::Uml, front, BITMAP);
    vm.inflate(&data_pages().take(8).collect());
    let many = |count| vec![vm.guest.file.as_fd(); count];
    match kind {
        0 => vm.front.send(request::SET_MEM_TABLE, &[0; 8], &many(32)),
        1 => vm.front.send(request::SET_MEM_TABLE, &[0; 8], &many(33)),
        2 => vm.front.send(request::SET_VRING_KICK, &[0; 8], &many(7)),
        3 => vm.front.send_fd(request::SET_VRING_KICK, 200, &vm.guest.file),
        4 => vm.front.send(1000, &[], &many(32)),
        5 => {
            // Files with a message that never ends.
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
    assert!(served.outcome().is_err(), "session of kind {kind} was no bad one");
}

#[test]
fn bad_sessions_leave_no_file_open() {
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
