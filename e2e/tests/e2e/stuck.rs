//! Nobody reads, nothing answers, a disk is dead: the guest goes on where it can, its operator is
//! answered, and the process ends when it is told to.

use std::time::{Duration, Instant};

use lab::bare::{BareGuest, Stream};
use rustix::process::{Pid, Signal, kill_process};

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};

/// A process ends within this time of SIGTERM, whatever is stuck.
const END: Duration = Duration::from_secs(10);

/// For what takes milliseconds on a quiet machine.
const SOON: Duration = Duration::from_secs(20);

/// Prints 16 KiB, more than a pipe of the laboratory has room for that nobody reads (4 KiB).
const FLOOD: &str = "flood 4000";
const FLOOD_BYTES: usize = 0x4000;

/// What the VMM writes in place of what nobody read in time begins so.
const DROPPED: &str = "[host: ";

/// A guest that goes on printing on a console that nobody reads, whose pipe is full.
fn unread(name: &str) -> BareGuest {
    let mut guest = builder(name).streams(Stream::Unread, Stream::Read).start().unwrap();
    is_up(&guest, name);
    guest.send(&format!("{FLOOD}\n")).unwrap();
    guest.send("tick 1\n").unwrap();
    guest.wait_for_full_pipes().unwrap();
    guest
}

fn is_up(guest: &BareGuest, name: &str) {
    let end = Instant::now() + SOON;
    while aerostat(guest, &["status", name]).0 != Some(0) {
        assert!(Instant::now() < end, "{}", guest.errors());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends SIGTERM; how the process ended, and how long that took.
fn terminate(guest: &mut BareGuest) -> (std::process::ExitStatus, Duration) {
    let pid = Pid::from_raw(guest.pid().cast_signed()).unwrap();
    let began = Instant::now();
    kill_process(pid, Signal::TERM).unwrap();
    (guest.wait_for_end(2 * END).unwrap(), began.elapsed())
}

/// The numbers of `tick N`.
fn ticks(lines: &[String]) -> Vec<u32> {
    let numbers = lines.iter().filter_map(|line| line.strip_prefix("tick "));
    numbers.map(|number| u32::from_str_radix(number, 16).unwrap()).collect()
}

#[test]
fn a_console_that_nobody_reads_stops_nobody() {
    on_a_kvm("stuck::a_console_that_nobody_reads_stops_nobody", || {
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
        // It prints there, and what it printed here is still to be had here.
        there.wait_for("a tick", |line| line.starts_with("tick ")).unwrap();
        guest.read_on();
        assert!(guest.wait_for_end(SOON).unwrap().success());
        let is_never = |_: &str| false;
        guest.wait_for("the end of the pipe", is_never).unwrap_err();
        // A line may be printed in part on each side.
        let (here, there_lines) = (guest.lines(), there.lines());
        assert!(here[0].starts_with("ready ") && flooded(&here) > 0, "{here:?}");
        assert_eq!(flooded(&here) + flooded(&there_lines), FLOOD_BYTES / 64 * 63);
        let both = [ticks(&here), ticks(&there_lines)].concat();
        assert!(both.windows(2).all(|pair| pair[0] < pair[1]), "{both:?}");
        let (status, took) = terminate(&mut there);
        assert!(status.success() && took < END, "{status} {took:?} {}", there.errors());
    });
}

#[test]
fn a_process_whose_console_nobody_reads_ends_when_told() {
    on_a_kvm("stuck::a_process_whose_console_nobody_reads_ends_when_told", || {
        let mut guest = unread("deaf");
        let (status, took) = terminate(&mut guest);
        assert!(status.success() && took < END, "{status} {took:?}");
        let said = |text: &str| text.contains("nobody read the console in time").then_some(());
        guest.wait_for_error("what is lost", said).unwrap();
        guest.read_on();
        assert!(guest.wait_for("the first line", |line| line.starts_with("ready ")).is_ok());
    });
}

#[test]
fn what_nobody_read_comes_in_order_when_somebody_does() {
    on_a_kvm("stuck::what_nobody_read_comes_in_order_when_somebody_does", || {
        let mut guest = unread("late");
        guest.read_on();
        guest.wait_for("a tick", |line| line.starts_with("tick ")).unwrap();
        guest.ask("tick 0").unwrap();
        assert_eq!(guest.ask("ping 7").unwrap(), "7");
        let lines = guest.lines();
        assert!(!lines.iter().any(|line| line.contains(DROPPED)), "{lines:?}");
        assert_eq!(flooded(&lines), FLOOD_BYTES / 64 * 63);
        let ticks = ticks(&lines);
        assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
        assert!(guest.power_off().unwrap().success());
    });
}

/// What is printed last is there although the process ends at once.
#[test]
fn who_reads_a_flood_gets_all_of_it() {
    on_a_kvm("stuck::who_reads_a_flood_gets_all_of_it", || {
        let mut guest = boot("flood");
        guest.send(&format!("{FLOOD}\noff\n")).unwrap();
        assert!(guest.wait_for_end(SOON).unwrap().success());
        // The pipe has ended, and all of it was read.
        guest.wait_for("what is not printed", |_| false).unwrap_err();
        let lines = guest.lines();
        assert!(!lines.iter().any(|line| line.contains(DROPPED)), "{lines:?}");
        assert_eq!(flooded(&lines), FLOOD_BYTES / 64 * 63);
        assert_eq!(lines.last().unwrap(), "ok");
    });
}

/// How much of the flood is there, without line feeds.
fn flooded(lines: &[String]) -> usize {
    lines.iter().filter(|line| line.starts_with('x')).map(String::len).sum()
}
