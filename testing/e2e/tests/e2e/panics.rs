//! Blocked logs and panicking threads: guests continue, and after a migration a guest runs on
//! exactly one side.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{MigrationState, ResolveAction, StartMigration};
use lab::bare::{BareBuilder, BareGuest, Stream};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::bare::{aerostat, boot, builder, client, on_a_kvm};
use crate::program::program;

/// Far longer than any step, and shorter than the timeout of a test.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Environment variable: where a test build panics (`crates/diagnostics`).
pub(crate) const PANIC: &str = "AEROSTAT_TEST_PANIC";

/// A log that is not read: its reader has closed it, or does not read.
const BLOCKED_LOGS: [Stream; 2] = [Stream::Closed, Stream::Unread];

/// Fills the pipe that is the standard error of a process and that the test does not read. Every
/// write to it now blocks.
fn fill_log(guest: &BareGuest, stream: Stream) {
    if stream != Stream::Unread {
        return;
    }
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let mut pipe = options.open(format!("/proc/{}/fd/2", guest.pid())).unwrap();
    for chunk in [4096, 1] {
        loop {
            match pipe.write(&vec![b'.'; chunk]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

pub(crate) fn signal(guest: &BareGuest, signal: Signal) {
    let pid = Pid::from_raw(guest.pid().cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Starts `aerostat receive` at a known address, so that its log need not be read.
fn receiver(name: &str, stream: Stream, panics: &str) -> (BareGuest, String) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let receiver = BareBuilder::command(program(), "receive", name).unwrap();
    let words = ["--listen", &address.to_string(), "--plain", "-vv"];
    let receiver = receiver.arguments(words).variable(PANIC, panics);
    let receiver = receiver.streams(Stream::Read, stream).start().unwrap();
    let end = Instant::now() + TEST_TIMEOUT;
    // A connection that closes at once is also logged.
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < end, "{}", receiver.errors());
        thread::sleep(Duration::from_millis(5));
    }
    (receiver, address.to_string())
}

/// Waits until the destination waits for a guest.
fn until_it_waits(receiver: &BareGuest, name: &str) {
    let socket = receiver.directory().join(format!("{name}.sock"));
    let state = || Client::connect(&socket)?.migration().map(|status| status.state);
    let end = Instant::now() + TEST_TIMEOUT;
    while !matches!(state(), Ok(MigrationState::Waiting)) {
        assert!(Instant::now() < end, "{}", receiver.errors());
        thread::sleep(Duration::from_millis(5));
    }
}

/// States of an ended migration.
const OVER: [MigrationState; 4] =
    [MigrationState::Failed, MigrationState::Moved, MigrationState::InDoubt, MigrationState::Stuck];

/// Waits until the guest has answered all earlier commands, and this one.
fn answers(guest: &mut BareGuest) {
    guest.send("\nping 70\n").unwrap();
    guest.wait_for("an answer", |line| line == "ok 70").unwrap();
}

/// Waits until the newest migration has one of these states.
fn until_state(client: &Client, states: &[MigrationState]) -> MigrationState {
    let end = Instant::now() + TEST_TIMEOUT;
    loop {
        let status = client.migration().unwrap();
        if states.contains(&status.state) {
            return status.state;
        }
        assert!(Instant::now() < end, "{status:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_blocked_log_does_not_stop_a_migration() {
    on_a_kvm("panics::a_blocked_log_does_not_stop_a_migration", || {
        for stream in BLOCKED_LOGS {
            let name = "moves";
            let here = builder(name).argument("-vv").streams(Stream::Read, stream);
            let mut here = here.boot().unwrap();
            fill_log(&here, stream);
            here.run("fill 8 8 1").unwrap();
            let (mut there, address) = receiver(name, stream, "");
            fill_log(&there, stream);
            let (code, out, err) = aerostat(&here, &["migrate", name, &address, "--plain"]);
            assert_eq!(code, Some(0), "{stream:?}: {out}{err}");
            there.run("check 8 8 1").unwrap();
            assert!(here.wait_for_end(TEST_TIMEOUT).unwrap().success(), "{stream:?}");
            let host = client(&there, name).status().unwrap().faults.host;
            assert!(!host.contains_key("thread_panicked"), "{stream:?}: {host:?}");
            assert!(there.power_off().unwrap().success(), "{stream:?}");
        }
    });
}

#[test]
fn a_blocked_log_does_not_stop_a_failed_migration() {
    on_a_kvm("panics::a_blocked_log_does_not_stop_a_failed_migration", || {
        for stream in BLOCKED_LOGS {
            let mut here = builder("stays").streams(Stream::Read, stream).boot().unwrap();
            fill_log(&here, stream);
            // The port of a closed listener.
            let closed_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let source = client(&here, "stays");
            start_migration(&source, &closed_port.to_string());
            assert_eq!(until_state(&source, &OVER), MigrationState::Failed, "{stream:?}");
            assert_eq!(here.number("ping 7").unwrap(), 7);
            assert!(here.power_off().unwrap().success(), "{stream:?}");
        }
    });
}

#[test]
fn a_blocked_log_does_not_stop_pause_and_resume() {
    on_a_kvm("panics::a_blocked_log_does_not_stop_pause_and_resume", || {
        for stream in BLOCKED_LOGS {
            let here = builder("paused").argument("-v").streams(Stream::Read, stream);
            let mut here = here.boot().unwrap();
            fill_log(&here, stream);
            // Each is logged. The order of two concurrent signals is not defined, so the guest is
            // resumed until it answers.
            signal(&here, Signal::USR1);
            here.send("ping 70\n").unwrap();
            let end = Instant::now() + TEST_TIMEOUT;
            while !here.lines().contains(&"ok 70".to_owned()) {
                signal(&here, Signal::USR2);
                assert!(Instant::now() < end, "{stream:?}: the guest is paused");
                thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(here.status().unwrap(), None, "{stream:?}");
            let began = Instant::now();
            signal(&here, Signal::TERM);
            assert!(here.wait_for_end(TEST_TIMEOUT).unwrap().success(), "{stream:?}");
            assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        }
    });
}

/// Drives the guest's first disk from here, by reads and writes of its memory and registers.
struct Disk<'a>(&'a mut BareGuest);

/// The window of device 1, guest addresses of a virtqueue of four and of a request.
const DISK: u32 = 0xc000_1000;
const RING: u32 = 0x00a0_0000;
const REQUEST: u32 = 0x00a1_0000;

/// Registers of virtio-mmio, request types and status of a block device (virtio 1.3, 4.2.2, 5.2.6).
const NOTIFY: u32 = 0x050;
const WRITE: u32 = 1;
const GET_ID: u32 = 8;
const OK: u32 = 0;
const IO_ERROR: u32 = 1;
const UNWRITTEN: u32 = 0xff;

impl Disk<'_> {
    fn write(&mut self, address: u32, value: u32) {
        self.0.run(&format!("write {address:x} {value:x}")).unwrap();
    }

    fn start(&mut self) {
        let set = [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x24, 0),
            (0x20, 0),
            (0x70, 11),
            (0x30, 0),
            (0x38, 4),
            (0x80, RING),
            (0x84, 0),
            (0x90, RING + 0x1000),
            (0x94, 0),
            (0xa0, RING + 0x2000),
            (0xa4, 0),
            (0x44, 1),
            (0x70, 15),
        ];
        set.into_iter().for_each(|(register, value)| self.write(DISK + register, value));
    }

    /// Sends request number `number`, from 1, and returns its status byte once it is back.
    fn request(&mut self, number: u32, kind: u32) -> u32 {
        const NEXT: u32 = 1;
        const DEVICE_WRITES: u32 = 2;
        let of_data = if kind == WRITE { 0 } else { DEVICE_WRITES };
        let bytes = if kind == WRITE { 512 } else { 20 };
        for (at, value) in [(0, kind), (4, 0), (8, 0), (12, 0), (0x1000, UNWRITTEN)] {
            self.write(REQUEST + at, value);
        }
        let chain = [
            (REQUEST, 16, NEXT | 1 << 16),
            (REQUEST + 0x800, bytes, NEXT | of_data | 2 << 16),
            (REQUEST + 0x1000, 1, DEVICE_WRITES),
        ];
        for (at, (address, bytes, flags)) in (RING..).step_by(16).zip(chain) {
            for (at, value) in [(at, address), (at + 4, 0), (at + 8, bytes), (at + 12, flags)] {
                self.write(at, value);
            }
        }
        // Every available entry is the chain at 0.
        self.write(RING + 0x1000, number << 16);
        self.write(DISK + NOTIFY, 0);
        let end = Instant::now() + TEST_TIMEOUT;
        while self.0.number(&format!("read {:x}", RING + 0x2000)).unwrap() >> 16
            != u64::from(number)
        {
            assert!(Instant::now() < end, "the request never ends\n{}", self.0.errors());
        }
        let status = self.0.number(&format!("read {:x}", REQUEST + 0x1000)).unwrap();
        u32::try_from(status & 0xff).unwrap()
    }
}

/// A disk that can be opened but not written: its file is sealed.
fn sealed_disk() -> (std::os::fd::OwnedFd, String) {
    let file = memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    (file, path)
}

#[test]
fn a_blocked_log_does_not_stop_a_disk_error() {
    on_a_kvm("panics::a_blocked_log_does_not_stop_a_disk_error", || {
        for stream in BLOCKED_LOGS {
            let (_file, path) = sealed_disk();
            let guest = builder("disk").arguments(["--disk", &path]);
            let mut guest = guest.streams(Stream::Read, stream).boot().unwrap();
            fill_log(&guest, stream);
            let mut disk = Disk(&mut guest);
            disk.start();
            assert_eq!(disk.request(1, WRITE), IO_ERROR, "{stream:?}");
            assert_eq!(disk.request(2, GET_ID), OK, "the disk continues: {stream:?}");
            assert!(guest.power_off().unwrap().success(), "{stream:?}");
        }
    });
}

/// Whether the program is a test build, which can panic on demand.
fn panics_on_demand() -> bool {
    let bytes = std::fs::read(program()).unwrap();
    let can = bytes.windows(PANIC.len()).any(|bytes| bytes == PANIC.as_bytes());
    if !can {
        println!("SKIPPED: {} is built without debug assertions", program().display());
    }
    can
}

/// Starts a migration slow enough for guest activity.
fn start_migration(client: &Client, address: &str) {
    let bandwidth = Some(8 << 20);
    let ask = StartMigration {
        to: address.to_owned(),
        bandwidth_bytes_per_s: bandwidth,
        ..StartMigration::default()
    };
    client.start_migration(&ask).unwrap();
}

/// A panic before the commit aborts the migration, and the guest continues at its source.
#[test]
fn a_panic_before_the_commit_aborts_the_migration() {
    let name = "panics::a_panic_before_the_commit_aborts_the_migration";
    on_a_kvm(name, || {
        if !panics_on_demand() {
            return;
        }
        for point in ["connect", "round", "share", "pause", "last round", "pause limit"] {
            assert_aborted(point, "", "");
        }
        for point in ["state", "commit"] {
            assert_aborted(point, "", "");
        }
        // A notification of the balloon, and another register access.
        assert_aborted("device,after=round", "", "write c0000050 0\n");
        assert_aborted("processor,after=round", "", "write c0000024 0\n");
        for point in ["taken round", "share", "loaded", "start"] {
            assert_aborted("", point, "");
        }
    });
}

/// Types `meanwhile` during the migration.
fn assert_aborted(at_source: &str, at_destination: &str, meanwhile: &str) {
    let what = format!("source {at_source:?}, destination {at_destination:?}");
    let mut here = builder("stays").variable(PANIC, at_source).boot().unwrap();
    here.run("fill 8 4 1").unwrap();
    let (mut there, address) = receiver("stays", Stream::Read, at_destination);
    let source = client(&here, "stays");
    start_migration(&source, &address);
    let end = Instant::now() + TEST_TIMEOUT;
    while !(here.errors() + &there.errors()).contains("panicked at") {
        here.send(meanwhile).unwrap();
        assert!(Instant::now() < end, "{what}\n{}\n{}", here.errors(), there.errors());
        thread::sleep(Duration::from_millis(20));
    }
    let state = until_state(&source, &OVER);
    assert_eq!(state, MigrationState::Failed, "{what}\n{}\n{}", here.errors(), there.errors());
    answers(&mut here);
    here.run("check 8 4 1").unwrap();
    assert!(there.lines().is_empty(), "{what}: it runs there");
    // Both sides still work: the next migration succeeds.
    assert_eq!(there.status().unwrap(), None, "{what}: {}", there.errors());
    let (code, out, err) = aerostat(&here, &["migrate", "stays", &address, "--plain"]);
    assert_eq!(code, Some(0), "{what}: {out}{err}\n{}\n{}", here.errors(), there.errors());
    there.run("check 8 4 1").unwrap();
    assert!(here.wait_for_end(TEST_TIMEOUT).unwrap().success(), "{what}");
    assert!(there.power_off().unwrap().success(), "{what}");
}

/// A panic after the commit leaves the migration in doubt. It can be resolved, and the guest runs
/// once.
#[test]
fn a_panic_after_the_commit_leaves_the_guest_on_one_side() {
    on_a_kvm("panics::a_panic_after_the_commit_leaves_the_guest_on_one_side", || {
        if !panics_on_demand() {
            return;
        }
        assert_on_one_side("switched over", "");
        assert_on_one_side("", "prepared");
        assert_on_one_side("", "running");
        // The thread that resolves it panics, on either side.
        assert_on_one_side("resolve", "running");
        assert_on_one_side("switched over", "answer");
    });
}

fn assert_on_one_side(at_source: &str, at_destination: &str) {
    let what = format!("source {at_source:?}, destination {at_destination:?}");
    let mut here = builder("doubt").variable(PANIC, at_source).boot().unwrap();
    here.run("fill 8 4 1").unwrap();
    let (mut there, address) = receiver("doubt", Stream::Read, at_destination);
    let source = client(&here, "doubt");
    start_migration(&source, &address);
    let state = until_state(&source, &OVER);
    assert_eq!(state, MigrationState::InDoubt, "{what}\n{}\n{}", here.errors(), there.errors());
    // A failed resolve changes nothing, and can be repeated.
    let mut resolved = source.resolve_migration(ResolveAction::Ask);
    if resolved.is_err() {
        assert_eq!(source.migration().unwrap().state, MigrationState::InDoubt, "{what}");
        resolved = source.resolve_migration(ResolveAction::Ask);
    }
    resolved.unwrap_or_else(|error| panic!("{what}: {error}\n{}", there.errors()));
    for (guest, point) in [(&mut here, at_source), (&mut there, at_destination)] {
        let expected = format!("requested by a test at `{point}`");
        let is_logged = |text: &str| (point.is_empty() || text.contains(&expected)).then_some(());
        guest.wait_for_error(&what, is_logged).unwrap();
    }
    there.run("check 8 4 1").unwrap();
    assert!(here.wait_for_end(TEST_TIMEOUT).unwrap().success(), "{what}");
    assert!(there.power_off().unwrap().success(), "{what}");
}

/// A destination that cannot accept connections for a while answers its source later.
#[test]
fn a_destination_that_ran_out_of_file_descriptors_answers_its_source() {
    let name = "panics::a_destination_that_ran_out_of_file_descriptors_answers_its_source";
    on_a_kvm(name, || {
        if !panics_on_demand() {
            return;
        }
        let mut here = builder("asks").variable(PANIC, "switched over").boot().unwrap();
        let (mut there, address) = receiver("asks", Stream::Read, "");
        let pid = Pid::from_raw(there.pid().cast_signed()).unwrap();
        let usual = getrlimit(Resource::Nofile);
        // A process has at least three open files.
        let limit = |files| {
            let limits = Rlimit { current: files, maximum: usual.maximum };
            prlimit(Some(pid), Resource::Nofile, limits).unwrap();
        };
        let refused = |text: &str, count| {
            let said = text.matches("Too many open files").count() >= count;
            said.then_some(())
        };
        let source = client(&here, "asks");
        // The destination waits, and has opened all files that waiting needs.
        until_it_waits(&there, "asks");
        limit(Some(3));
        let late = TcpStream::connect(&address).unwrap();
        there.wait_for_error("an error", |text| refused(text, 1)).unwrap();
        drop(late);
        limit(usual.current);
        start_migration(&source, &address);
        assert_eq!(until_state(&source, &OVER), MigrationState::InDoubt, "{}", there.errors());
        // The destination has the guest, and already serves its devices.
        there.run("balloon 1").unwrap();
        let said = there.errors().matches("Too many open files").count();
        limit(Some(3));
        thread::scope(|scope| {
            let asks = scope.spawn(|| source.resolve_migration(ResolveAction::Ask));
            there.wait_for_error("an error", |text| refused(text, said + 1)).unwrap();
            limit(usual.current);
            // The earlier attempt may have failed.
            if asks.join().unwrap().is_err() {
                let resolved = source.resolve_migration(ResolveAction::Ask);
                resolved.unwrap_or_else(|error| panic!("{error}\n{}", there.errors()));
            }
        });
        assert!(here.wait_for_end(TEST_TIMEOUT).unwrap().success());
        answers(&mut there);
        assert!(there.power_off().unwrap().success());
    });
}

/// A panic of any thread leaves the guest running, and the status counts it.
#[test]
fn a_thread_panic_does_not_end_the_guest() {
    on_a_kvm("panics::a_thread_panic_does_not_end_the_guest", || {
        if !panics_on_demand() {
            return;
        }
        // With the guest action that reaches the point: a notification, and a register write.
        assert_continues("device", "write c0000050 0\n");
        assert_continues("processor,after=loop", "write c0000024 0\n");
        for point in ["loop", "stdin", "control", "log", "reclaimer"] {
            assert_continues(point, "");
        }
    });
}

fn assert_continues(point: &str, typed: &str) {
    let mut guest = builder("panics").argument("-v").variable(PANIC, point).boot().unwrap();
    let set = |guest: &BareGuest| {
        let client = Client::connect(&guest.directory().join("panics.sock"));
        client.and_then(|client| client.set_balloon(1 << 20, Duration::ZERO))
    };
    let first = set(&guest);
    // The accepting thread drops the connection on which it panics.
    assert!(first.is_ok() || point == "control", "{point}: {first:?}");
    set(&guest).unwrap();
    guest.send(typed).unwrap();
    // The panic is logged.
    signal(&guest, Signal::USR2);
    let expected = format!("requested by a test at `{}`", point.split(',').next().unwrap());
    let expected = |text: &str| text.contains(&expected).then_some(());
    guest.send("\n").unwrap();
    guest.wait_for_error(point, expected).unwrap();
    answers(&mut guest);
    let faults = client(&guest, "panics").status().unwrap().faults;
    assert_eq!(faults.host["thread_panicked"], 1, "{point}: {faults:?}");
    signal(&guest, Signal::TERM);
    assert!(guest.wait_for_end(TEST_TIMEOUT).unwrap().success(), "{point}");
}

/// A panic aborts a snapshot like a migration, and the guest continues.
#[test]
fn a_panic_during_a_snapshot_leaves_the_guest_running() {
    on_a_kvm("panics::a_panic_during_a_snapshot_leaves_the_guest_running", || {
        if !panics_on_demand() {
            return;
        }
        for point in ["round", "pause", "last round", "state", "commit", "switched over"] {
            let mut guest = builder("saved").variable(PANIC, point).boot().unwrap();
            guest.run("fill 8 4 1").unwrap();
            let file = guest.directory().join("saved.aero");
            let words = ["snapshot", "saved", file.to_str().unwrap()];
            let (code, out, err) = aerostat(&guest, &words);
            assert_eq!(code, Some(1), "{point}: {out}{err}");
            assert!(err.contains("panicked") && !file.exists(), "{point}: {err}");
            guest.run("check 8 4 1").unwrap();
            let (code, out, err) = aerostat(&guest, &words);
            assert_eq!(code, Some(0), "{point}: {out}{err}");
            guest.run("check 8 4 1").unwrap();
            assert!(guest.power_off().unwrap().success(), "{point}");
        }
    });
}

/// A guest whose memory cannot be loaded ends, with the reason. The thread that watches may panic.
#[test]
fn only_a_panic_of_the_loading_thread_ends_a_lazy_restore() {
    on_a_kvm("panics::only_a_panic_of_the_loading_thread_ends_a_lazy_restore", || {
        if !panics_on_demand() {
            return;
        }
        let mut guest = boot("lazy");
        guest.run("fill 8 4 1").unwrap();
        let file = guest.directory().join("lazy.aero");
        let file = file.to_str().unwrap();
        let (code, out, err) = aerostat(&guest, &["snapshot", "lazy", file]);
        assert_eq!(code, Some(0), "{out}{err}");
        let restore = |panics: &str| {
            let restored = BareBuilder::command(program(), "restore", "again").unwrap();
            restored.arguments(["--lazy", file]).variable(PANIC, panics).start().unwrap()
        };
        let mut watched = restore("watch,times=3");
        watched.run("check 8 4 1").unwrap();
        assert!(watched.power_off().unwrap().success());
        let mut lost = restore("filling");
        assert_eq!(lost.wait_for_end(TEST_TIMEOUT).unwrap().code(), Some(1), "{}", lost.errors());
        let reason = "filling memory: a thread panicked";
        lost.wait_for_error("the reason", |text| text.contains(reason).then_some(())).unwrap();
        assert!(guest.power_off().unwrap().success());
    });
}

/// The disk's request fails, and the next one succeeds.
#[test]
fn a_panic_of_a_disk_thread_fails_its_request() {
    on_a_kvm("panics::a_panic_of_a_disk_thread_fails_its_request", || {
        if !panics_on_demand() {
            return;
        }
        let (_file, path) = sealed_disk();
        let guest = builder("disk").arguments(["--disk", &path]).variable(PANIC, "disk");
        let mut guest = guest.boot().unwrap();
        let mut disk = Disk(&mut guest);
        disk.start();
        assert_eq!(disk.request(1, GET_ID), IO_ERROR);
        assert_eq!(disk.request(2, GET_ID), OK);
        let is_named = |text: &str| text.contains("disk0").then_some(());
        guest.wait_for_error("the thread's name", is_named).unwrap();
        assert!(guest.power_off().unwrap().success());
    });
}

/// A loop that panics in every iteration ends the process, with a reason.
#[test]
fn a_device_loop_that_always_panics_ends_the_process() {
    on_a_kvm("panics::a_device_loop_that_always_panics_ends_the_process", || {
        if !panics_on_demand() {
            return;
        }
        let mut guest = boot_with("loop,times=1000000");
        let client = client(&guest, "loop");
        let end = Instant::now() + TEST_TIMEOUT;
        for mib in (0..16).cycle() {
            if guest.status().unwrap().is_some() {
                break;
            }
            // Each new target wakes the loop.
            let _ = client.set_balloon(mib << 20, Duration::ZERO);
            assert!(Instant::now() < end, "{}", guest.errors());
        }
        assert_eq!(guest.wait_for_end(TEST_TIMEOUT).unwrap().code(), Some(1));
        let expected = "host: serving the guest's devices failed: a thread panicked";
        guest.wait_for_error("the reason", |text| text.contains(expected).then_some(())).unwrap();
    });
}

fn boot_with(panics: &str) -> BareGuest {
    builder("loop").variable(PANIC, panics).boot().unwrap()
}

/// Without the variable, the same guest reports no panic: the points are harmless.
#[test]
fn no_point_panics_without_the_variable() {
    on_a_kvm("panics::no_point_panics_without_the_variable", || {
        let mut guest = boot("calm");
        assert_eq!(guest.number("ping 7").unwrap(), 7);
        let faults = client(&guest, "calm").status().unwrap().faults;
        assert_eq!(faults.total(), 0, "{faults:?}");
        assert!(guest.power_off().unwrap().success());
    });
}
