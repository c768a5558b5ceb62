//! Hostile sources that connect to a waiting destination.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bench::soak::moves::Receiver;
use control::api::MigrationState;
use migration::MigrationId;
use migration::raw::FrameWriter;

/// Kinds of frames (docs/migration.md).
const HELLO: u16 = 1;
const DESCRIBE: u16 = 3;
const CHUNK: u16 = 6;
const STATE_END: u16 = 11;
const COMMIT: u16 = 13;

/// Memory of a waiting process, with a margin.
const MOST_KIB: u64 = 48 << 10;

/// Timeout for the process to close the connection, and to wait again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

const ID: [u8; 16] = [9; 16];

/// The destination closes each connection, allocates nothing for it, and waits again.
pub(super) fn sources_get_nothing(receiver: &Receiver) {
    let before_kib = resident_kib(receiver.guest.pid());
    // A frame longer than allowed: the destination does not allocate it.
    let mut long = hello(1);
    long.extend(FrameWriter::keyed(MigrationId(ID), 0, true).frame(DESCRIBE, &[], &[]));
    let length = long.len() - 12;
    long[length..length + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let said = [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".to_vec(),
        vec![0xff; 1 << 16],
        long,
        // A valid hello, then every frame except the expected one.
        [hello(1), keyed(COMMIT, &[])].concat(),
        [hello(1), keyed(STATE_END, &[0; 16])].concat(),
        [hello(1), keyed(CHUNK, &[0; 40])].concat(),
        // More connections than allowed.
        hello(17),
        hello(0),
        // 16 TiB, twice that, and no memory at all.
        [hello(1), describe(&[(0, 1 << 32)])].concat(),
        [hello(1), describe(&[(0, 1 << 33), (1 << 40, 1 << 33)])].concat(),
        [hello(1), describe(&[])].concat(),
        [hello(1), describe(&[(u64::MAX, u64::MAX)])].concat(),
    ];
    for (number, bytes) in said.iter().enumerate() {
        let mut source = TcpStream::connect(&receiver.address).unwrap();
        source.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        // It may have closed the connection before all was sent.
        let _ = source.write_all(bytes);
        let began = Instant::now();
        let _ = source.read_to_end(&mut Vec::new());
        assert!(began.elapsed() < ANSWER_TIMEOUT, "{number} is still connected");
        let state = receiver.state();
        assert!(state.is_some(), "{number} ended it: {}", receiver.guest.console_log());
    }
    let end = Instant::now() + ANSWER_TIMEOUT;
    while receiver.state() != Some(MigrationState::Waiting) {
        assert!(Instant::now() < end, "{:?}", receiver.state());
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = receiver.guest.console_log();
    assert!(!log.contains("panicked at"), "{log}");
    let after_kib = resident_kib(receiver.guest.pid());
    assert!(after_kib < MOST_KIB, "{after_kib} KiB, and {before_kib} before");
}

/// A hello that announces `count` connections.
fn hello(count: u8) -> Vec<u8> {
    let mut body = b"AEROSTAT".to_vec();
    body.extend([1, 0, 1, 0, 1, 0, count, 0]);
    body.extend(ID);
    body.extend([0; 8]);
    FrameWriter::new().frame(HELLO, &body, &[])
}

fn keyed(kind: u16, body: &[u8]) -> Vec<u8> {
    FrameWriter::keyed(MigrationId(ID), 0, true).frame(kind, body, &[])
}

/// Describes a guest with this memory and the right name.
fn describe(regions: &[(u64, u64)]) -> Vec<u8> {
    let count = |count: usize| u32::try_from(count).unwrap().to_le_bytes();
    let text = |text: &[u8]| [&count(text.len())[..], text].concat();
    let mut body = text(bench::soak::moves::CASES[0].name.as_bytes());
    body.extend(count(regions.len()));
    for (start, pages) in regions {
        body.extend([start.to_le_bytes(), pages.to_le_bytes()].concat());
    }
    body.extend(text(b"AuthenticAMD"));
    body.extend(count(0));
    body.extend(text(&[0; 21]));
    keyed(DESCRIBE, &body)
}

/// Memory of a process (proc(5), `status`).
fn resident_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
