//! Blocked consoles, silent peers and dead disks: the guest continues where it can, the operator is
//! answered, and the process ends on SIGTERM.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use guest_ring::{Buffer, GuestRing};
use lab::bare::{self, BareBuilder, BareGuest, Stream};
use lab::fuse::{Features, Fuse};
use rustix::process::{Pid, Signal, kill_process};
use vm_memory::{Bytes, GuestAddress};
use vmm::DiskOptions;
use vmm::raw::Disk;

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};
use crate::program::program;

/// A process ends within 10 s of SIGTERM, whatever is stuck. A busy machine takes longer to end it
/// (11.4 s seen). Without the watchdog it would not end at all.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Timeout of what takes milliseconds on an idle machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Prints 16 KiB, more than the capacity of an unread pipe here (4 KiB).
const FLOOD: &str = "flood 4000";
const FLOOD_BYTES: usize = 0x4000;

/// Start of the VMM's text in place of dropped console output.
const DROPPED: &str = "[host: ";

/// A guest that prints all the time on an unread console, whose pipe is full.
fn unread(name: &str) -> BareGuest {
    let mut guest = builder(name).streams(Stream::Unread, Stream::Read).start().unwrap();
    is_up(&guest, name);
    guest.send(&format!("{FLOOD}\n")).unwrap();
    guest.send("tick 1\n").unwrap();
    guest.wait_for_full_pipes().unwrap();
    guest
}

fn is_up(guest: &BareGuest, name: &str) {
    let end = Instant::now() + ANSWER_TIMEOUT;
    while aerostat(guest, &["status", name]).0 != Some(0) {
        assert!(Instant::now() < end, "{}", guest.errors());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends SIGTERM. Returns the exit status and the time to the end.
fn terminate(guest: &mut BareGuest) -> (std::process::ExitStatus, Duration) {
    let pid = Pid::from_raw(guest.pid().cast_signed()).unwrap();
    let began = Instant::now();
    kill_process(pid, Signal::TERM).unwrap();
    (guest.wait_for_end(2 * END_TIMEOUT).unwrap(), began.elapsed())
}

/// The numbers of `tick N`.
fn ticks(lines: &[String]) -> Vec<u32> {
    let numbers = lines.iter().filter_map(|line| line.strip_prefix("tick "));
    numbers.map(|number| u32::from_str_radix(number, 16).unwrap()).collect()
}

#[test]
fn an_unread_console_does_not_block_the_guest() {
    on_a_kvm("stuck::an_unread_console_does_not_block_the_guest", || {
        let mut guest = unread("unread");
        let file = guest.directory().join("unread.snapshot");
        let file = file.to_str().unwrap();
        let (code, out, err) = aerostat(&guest, &["snapshot", "unread", file]);
        assert_eq!(code, Some(0), "{out}{err}");
        let (code, out, err) = aerostat(&guest, &["balloon", "unread", "0", "--timeout", "5s"]);
        assert_eq!(code, Some(0), "{out}{err}");
        let (mut there, address) = receiver("unread", &[]);
        let (code, out, err) = aerostat(&guest, &["migrate", "unread", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}\n{}\n{}", guest.errors(), there.errors());
        // It prints there, and its earlier output is still readable here.
        there.wait_for("a tick", |line| line.starts_with("tick ")).unwrap();
        guest.resume_reading();
        assert!(guest.wait_for_end(ANSWER_TIMEOUT).unwrap().success());
        let is_never = |_: &str| false;
        guest.wait_for("the end of the pipe", is_never).unwrap_err();
        // A line may be printed in part on each side.
        let (here, there_lines) = (guest.lines(), there.lines());
        assert!(here[0].starts_with("ready ") && flooded(&here) > 0, "{here:?}");
        assert_eq!(flooded(&here) + flooded(&there_lines), FLOOD_BYTES / 64 * 63);
        let both = [ticks(&here), ticks(&there_lines)].concat();
        assert!(both.windows(2).all(|pair| pair[0] < pair[1]), "{both:?}");
        let (status, took) = terminate(&mut there);
        assert!(status.success() && took < END_TIMEOUT, "{status} {took:?} {}", there.errors());
    });
}

#[test]
fn an_unread_console_does_not_block_sigterm() {
    on_a_kvm("stuck::an_unread_console_does_not_block_sigterm", || {
        let mut guest = unread("deaf");
        let (status, took) = terminate(&mut guest);
        assert!(status.success() && took < END_TIMEOUT, "{status} {took:?}");
        let said = |text: &str| text.contains("the console was not read in time").then_some(());
        guest.wait_for_error("what is lost", said).unwrap();
        guest.resume_reading();
        assert!(guest.wait_for("the first line", |line| line.starts_with("ready ")).is_ok());
    });
}

/// A process that ends waits for the reader of its console, and still answers requests then.
#[test]
fn an_ending_process_does_not_migrate_its_guest() {
    on_a_kvm("stuck::an_ending_process_does_not_migrate_its_guest", || {
        let mut guest = unread("late");
        let (mut there, address) = receiver("late", &[]);
        let pid = Pid::from_raw(guest.pid().cast_signed()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        let mut refused = false;
        // A migration that starts before the process handles SIGTERM is aborted.
        while guest.status().unwrap().is_none() {
            let words = ["migrate", "late", &address, "--plain"];
            let (code, out, err) = aerostat(&guest, &words);
            assert_ne!(code, Some(0), "{out}{err}\n{}", guest.errors());
            refused |= err.contains("the guest ends here");
        }
        assert!(refused, "{}", guest.errors());
        assert!(guest.wait_for_end(ANSWER_TIMEOUT).unwrap().success());
        assert!(there.lines().is_empty() && there.status().unwrap().is_none());
    });
}

#[test]
fn late_console_output_arrives_in_order() {
    on_a_kvm("stuck::late_console_output_arrives_in_order", || {
        let mut guest = unread("late");
        guest.resume_reading();
        guest.wait_for("a tick", |line| line.starts_with("tick ")).unwrap();
        guest.run("tick 0").unwrap();
        assert_eq!(guest.run("ping 7").unwrap(), "7");
        let lines = guest.lines();
        assert!(!lines.iter().any(|line| line.contains(DROPPED)), "{lines:?}");
        assert_eq!(flooded(&lines), FLOOD_BYTES / 64 * 63);
        let ticks = ticks(&lines);
        assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
        assert!(guest.power_off().unwrap().success());
    });
}

/// The last output arrives although the process ends at once.
#[test]
fn no_console_output_is_lost_at_exit() {
    on_a_kvm("stuck::no_console_output_is_lost_at_exit", || {
        let mut guest = boot("flood");
        guest.send(&format!("{FLOOD}\noff\n")).unwrap();
        assert!(guest.wait_for_end(ANSWER_TIMEOUT).unwrap().success());
        // The pipe is closed, and all of it was read.
        guest.wait_for("what is not printed", |_| false).unwrap_err();
        let lines = guest.lines();
        assert!(!lines.iter().any(|line| line.contains(DROPPED)), "{lines:?}");
        assert_eq!(flooded(&lines), FLOOD_BYTES / 64 * 63);
        assert_eq!(lines.last().unwrap(), "ok");
    });
}

/// Bytes of the flood, without line feeds.
fn flooded(lines: &[String]) -> usize {
    lines.iter().filter(|line| line.starts_with('x')).map(String::len).sum()
}

/// Bytes of a disk.
const DISK_BYTES: usize = 64 << 10;

/// Name of the file on a file system that can die.
const DISK: &str = "disk";

/// A file system with a file of these contents.
fn disk_of(contents: Vec<u8>) -> Fuse {
    let disk = Fuse::mount(Features::ALL).unwrap();
    disk.put(DISK, contents);
    disk
}

/// A guest whose disk has answered once and is now dead, with a pending request.
fn with_a_dead_disk(name: &str) -> (BareGuest, Fuse) {
    let disk = disk_of(vec![7; DISK_BYTES]);
    let word = format!("{},readonly", disk.path().join(DISK).display());
    let mut guest = builder(name).argument("--disk").argument(word).boot().unwrap();
    guest.run("disk 1 0 3").unwrap();
    done(&mut guest, 1);
    disk.die();
    guest.run("disk 1 0 5").unwrap();
    (guest, disk)
}

/// Waits until this many requests to a disk have completed since its start.
fn done(guest: &mut BareGuest, count: u64) {
    let end = Instant::now() + ANSWER_TIMEOUT;
    while guest.number("done").unwrap() != count {
        assert!(Instant::now() < end, "{}", guest.errors());
    }
}

/// A guest with a pending disk request cannot be paused: it continues, and the caller receives the
/// reason. The request completes later.
#[test]
fn a_snapshot_with_a_dead_disk_fails_and_the_guest_continues() {
    on_a_kvm("stuck::a_snapshot_with_a_dead_disk_fails_and_the_guest_continues", || {
        let (mut guest, disk) = with_a_dead_disk("dead");
        let file = guest.directory().join("dead.snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "dead", file.to_str().unwrap()]);
        let path = disk.path().join(DISK);
        let path = path.to_str().unwrap();
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(path) && err.contains("did not finish a request"), "{out}{err}");
        assert!(!file.exists());
        assert_eq!(guest.run("ping 5").unwrap(), "5");
        disk.revive();
        done(&mut guest, 2);
        guest.run("disk 1 0 6").unwrap();
        done(&mut guest, 3);
        // A snapshot is possible now.
        let (code, out, err) = aerostat(&guest, &["snapshot", "dead", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");
        assert!(guest.power_off().unwrap().success());
    });
}

#[test]
fn a_dead_disk_does_not_block_shutdown() {
    on_a_kvm("stuck::a_dead_disk_does_not_block_shutdown", || {
        let (mut guest, _disk) = with_a_dead_disk("lost");
        let (status, took) = terminate(&mut guest);
        assert!(status.success() && took < END_TIMEOUT, "{status} {took:?} {}", guest.errors());
        let said =
            |text: &str| text.contains("requests of the guest to this disk are lost").then_some(());
        guest.wait_for_error("what is lost", said).unwrap();
    });
}

/// A driver resets a disk that does not answer. Neither the vCPU nor the device loop waits for that
/// disk.
#[test]
fn resetting_a_dead_disk_does_not_block_other_devices() {
    on_a_kvm("stuck::resetting_a_dead_disk_does_not_block_other_devices", || {
        let (dead, alive) = (disk_of(vec![7; DISK_BYTES]), disk_of(vec![8; DISK_BYTES]));
        let mut guest = builder("reset");
        for disk in [&dead, &alive] {
            let word = format!("{},readonly", disk.path().join(DISK).display());
            guest = guest.argument("--disk").argument(word);
        }
        let mut guest = guest.boot().unwrap();
        guest.run("disk 1 0 3").unwrap();
        done(&mut guest, 1);
        dead.die();
        guest.run("disk 1 0 5").unwrap();
        // Until the disk's I/O thread waits for its file.
        std::thread::sleep(Duration::from_millis(200));
        guest.run("reset 1").unwrap();
        // The console, the balloon, another disk, and the API.
        assert_eq!(guest.run("ping 5").unwrap(), "5");
        guest.run("follow 1").unwrap();
        let (code, out, err) = aerostat(&guest, &["balloon", "reset", "4MiB"]);
        assert_eq!(code, Some(0), "{out}{err}");
        guest.run("disk 2 0 3").unwrap();
        done(&mut guest, 1);
        // The pending request of before the reset still prevents a pause, and delays the next
        // request of the same disk.
        guest.run("disk 1 0 6").unwrap();
        let file = guest.directory().join("reset.snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "reset", file.to_str().unwrap()]);
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains("did not finish a request"), "{out}{err}");
        assert_eq!(guest.number("done").unwrap(), 0);
        dead.revive();
        done(&mut guest, 1);
        assert!(guest.power_off().unwrap().success());
    });
}

/// A driver that has reset its disk reuses the request's memory.
#[test]
fn a_reset_disk_writes_no_guest_memory() {
    const RING: u64 = 0x1000;
    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x1_0000;
    const MEMORY_BYTES: usize = 1 << 20;
    const STATUS: u64 = HEADER + 16;
    const OTHER: u64 = DATA + 0x1000;
    let file = Arc::new(disk_of(vec![7; DISK_BYTES]));
    let options = DiskOptions { path: file.path().join(DISK), read_only: true };
    let mut ring = GuestRing::new(RING, 16);
    let mut disk = Disk::new(&options, &[(0, MEMORY_BYTES)], ring.queue(), 512).unwrap();
    let features = disk.features();
    disk.start(features, ring.queue());
    // The header stays zero: a read of the first sector.
    let read = |ring: &mut GuestRing, disk: &Disk, at: u64| {
        let chain =
            [Buffer::readable(HEADER, 16), Buffer::writable(at, 512), Buffer::writable(STATUS, 1)];
        disk.memory().write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
        ring.send(disk.memory(), &chain);
    };
    let byte = |disk: &Disk, at: u64| disk.memory().read_obj::<u8>(GuestAddress(at)).unwrap();
    read(&mut ring, &disk, OTHER);
    assert!(disk.serve());
    assert_eq!((byte(&disk, OTHER), byte(&disk, STATUS)), (7, 0));
    file.die();
    read(&mut ring, &disk, DATA);
    assert!(disk.serve_once());
    disk.until_busy();
    ring.reset(disk.memory());
    // A reset that waited for the file would never return.
    let (is_reset, was_reset) = channel::<()>();
    let late = Arc::clone(&file);
    let late = std::thread::spawn(move || {
        if was_reset.recv_timeout(ANSWER_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            late.revive();
        }
    });
    disk.start(features, ring.queue());
    drop(is_reset);
    late.join().unwrap();
    assert_eq!((byte(&disk, DATA), byte(&disk, STATUS)), (0, 0xee));
    disk.memory().write_obj(0_u8, GuestAddress(OTHER)).unwrap();
    read(&mut ring, &disk, OTHER);
    assert!(disk.serve_once() && ring.take_used(disk.memory()).is_none());
    file.revive();
    assert!(disk.serve());
    assert_eq!((byte(&disk, OTHER), byte(&disk, STATUS)), (7, 0));
    assert_eq!(byte(&disk, DATA), 0);
}

/// A virtqueue in memory that cannot be loaded blocks the device loop: the watchdog ends the
/// process.
#[test]
fn the_watchdog_ends_a_stuck_process() {
    on_a_kvm("stuck::the_watchdog_ends_a_stuck_process", || {
        let (mut lazy, disk) = lazily("stuck");
        disk.die();
        // Restarts the balloon's first queue with 16 entries at 10 MiB.
        for (register, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, 16),
            (0x80, 10 << 20),
            (0x90, 11 << 20),
            (0xa0, 12 << 20),
            (0x44, 1),
            (0x70, 15),
        ] {
            lazy.send(&format!("write {:x} {value:x}\n", 0xc000_0000_u32 + register)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(500));
        let (status, took) = terminate(&mut lazy);
        assert!(took < END_TIMEOUT, "{took:?} {}", lazy.errors());
        assert_eq!(status.code(), Some(1));
        let said = |text: &str| text.contains("and is cut off").then_some(());
        lazy.wait_for_error("why it is cut off", said).unwrap();
    });
}

#[test]
fn a_snapshot_to_a_dead_disk_blocks_neither_guest_nor_shutdown() {
    on_a_kvm("stuck::a_snapshot_to_a_dead_disk_blocks_neither_guest_nor_shutdown", || {
        let mut guest = boot("save");
        let disk = Fuse::mount(Features::ALL).unwrap();
        disk.die();
        let mut command = Command::new(program());
        command.args(["snapshot", "save"]).arg(disk.path().join("save.snapshot"));
        command.env(bare::RUNTIME_VARIABLE, guest.directory()).stdin(Stdio::null());
        let snapshot = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut snapshot = snapshot.unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(aerostat(&guest, &["status", "save"]).0, Some(0));
        assert_eq!(guest.run("ping 5").unwrap(), "5");
        let (status, took) = terminate(&mut guest);
        assert!(status.success() && took < END_TIMEOUT, "{status} {took:?} {}", guest.errors());
        let said = |text: &str| text.contains("before the snapshot is complete").then_some(());
        guest.wait_for_error("what is lost", said).unwrap();
        assert!(!snapshot.wait().unwrap().success());
    });
}

/// A running guest whose memory from 8 to 16 MiB takes seconds to load.
fn lazily(name: &str) -> (BareGuest, Fuse) {
    let mut guest = boot("first");
    guest.run("fill 8 8 1").unwrap();
    let file = guest.directory().join("first.snapshot");
    let (code, out, err) = aerostat(&guest, &["snapshot", "first", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{out}{err}");
    let disk = disk_of(std::fs::read(&file).unwrap());
    assert!(guest.power_off().unwrap().success());
    disk.slow_down(Duration::from_millis(2), u64::MAX);
    let command = BareBuilder::command(program(), "restore", name).unwrap();
    let command = command.argument("--lazy").argument(disk.path().join(DISK));
    let mut lazy = command.start().unwrap();
    assert_eq!(lazy.run("ping 5").unwrap(), "5", "{}", lazy.errors());
    (lazy, disk)
}

/// The guest waits for memory that cannot be loaded.
#[test]
fn a_lazy_restore_from_a_dead_disk_does_not_block_shutdown() {
    on_a_kvm("stuck::a_lazy_restore_from_a_dead_disk_does_not_block_shutdown", || {
        let (mut lazy, disk) = lazily("lazy");
        disk.die();
        lazy.send("check 8 8 1\n").unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(aerostat(&lazy, &["status", "lazy"]).0, Some(0));
        let (status, took) = terminate(&mut lazy);
        assert!(took < END_TIMEOUT, "{status} {took:?} {}", lazy.errors());
        let said = |text: &str| text.contains("file does not answer").then_some(());
        lazy.wait_for_error("why", said).unwrap();
    });
}

/// The same for a process whose guest does not run yet.
#[test]
fn a_restore_from_a_dead_disk_does_not_block_shutdown() {
    on_a_kvm("stuck::a_restore_from_a_dead_disk_does_not_block_shutdown", || {
        let disk = disk_of(vec![0; DISK_BYTES]);
        disk.die();
        let command = BareBuilder::command(program(), "restore", "none").unwrap();
        let mut none = command.argument(disk.path().join(DISK)).start().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let (_, took) = terminate(&mut none);
        assert!(took < END_TIMEOUT, "{took:?} {}", none.errors());
    });
}
