//! Memory of a guest that is written to a file, comes lazily, or moves, while its balloon takes
//! some of it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::bare::{self, BareBuilder, BareGuest};
use lab::fuse::{Fuse, Has};
use page_set::{PageRange, PageSet};
use vmm::{End, HostOptions, Machine, MemoryKind, RunOptions, Signals};

use crate::bare::{aerostat, boot, client, on_a_kvm};
use crate::program::program;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Memory of the guest, of which the balloon takes the second half.
const MEMORY_BYTES: u64 = 32 * MIB;
const BALLOON_PAGES: u64 = MEMORY_BYTES / 2 / PAGE;

/// How long it takes to read a page of the snapshot, while that is to be slow: the whole second
/// half takes 16 s, and the balloon has to have it before.
const SLOW: Duration = Duration::from_millis(4);

/// Memory of the process besides the guest's, by which one may differ from another.
const SLACK_BYTES: u64 = 4 * MIB;

/// After so long without a read nothing comes any more.
const QUIET: Duration = Duration::from_millis(500);

/// For everything else.
const LIMIT: Duration = Duration::from_secs(60);

/// Restores the guest in `file`.
fn restored(name: &str, file: &Path, words: &[&str]) -> BareGuest {
    let restore = BareBuilder::command(program(), "restore", name).unwrap();
    let restore = restore.argument(file).arguments(words.iter().copied());
    restore.start().unwrap_or_else(|error| panic!("{error}"))
}

/// Anonymous memory of a process, without the kernel's page of zeros.
fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// A snapshot of a guest that has written almost all of its memory, in the directory of its socket.
fn snapshot(guest: &mut BareGuest) -> PathBuf {
    guest.ask("fill 8 18 1").unwrap();
    let file = guest.directory().join("snapshot");
    let words = ["snapshot", "whole", file.to_str().unwrap()];
    let (code, out, err) = aerostat(guest, &words);
    assert_eq!(code, Some(0), "{out}{err}\n{}", guest.errors());
    file
}

#[test]
fn what_the_balloon_takes_while_memory_comes_stays_away() {
    on_a_kvm("bare_memory::what_the_balloon_takes_while_memory_comes_stays_away", || {
        let mut guest = boot("whole");
        let file = snapshot(&mut guest);
        let mut eager = restored("eager", &file, &[]);
        eager.ask(&format!("balloon {BALLOON_PAGES:x}")).unwrap();
        let expected = anonymous_bytes(eager.pid());
        assert!(eager.power_off().unwrap().success());

        let slow = Fuse::mount(Has::ALL).unwrap();
        slow.put("snapshot", std::fs::read(&file).unwrap());
        slow.slow_down(SLOW, PAGE + MEMORY_BYTES);
        let mut lazy = restored("lazy", &slow.path().join("snapshot"), &["--lazy"]);
        lazy.ask(&format!("balloon {BALLOON_PAGES:x}")).unwrap();
        let first_half = PAGE + MEMORY_BYTES / 2;
        assert!(slow.furthest() < first_half, "memory came too fast");
        slow.slow_down(Duration::ZERO, PAGE + MEMORY_BYTES);
        until_it_is_quiet(&slow, first_half);

        let resident = client(&lazy, "lazy").status().unwrap().resident_bytes.unwrap();
        let anonymous = anonymous_bytes(lazy.pid());
        println!("{resident} resident, {anonymous} anonymous, {expected} when restored at once");
        assert!(resident <= MEMORY_BYTES / 2, "{resident} bytes are with the host");
        assert!(anonymous <= expected + SLACK_BYTES, "{anonymous} bytes and not {expected}");
        lazy.ask("check 8 8 1").unwrap();
        lazy.ask("balloon 0").unwrap();
        assert_eq!(lazy.number("zero 10 10").unwrap(), BALLOON_PAGES);
        lazy.ask("fill 10 10 2").unwrap();
        lazy.ask("check 10 10 2").unwrap();
        lazy.ask("check 8 8 1").unwrap();
        assert!(lazy.power_off().unwrap().success());
        assert!(guest.power_off().unwrap().success());
    });
}

/// All that comes has come: reads went to `end`, and no further for a while.
fn until_it_is_quiet(slow: &Fuse, end: u64) {
    let limit = Instant::now() + LIMIT;
    let (mut furthest, mut since) = (0, Instant::now());
    while furthest < end || since.elapsed() < QUIET {
        assert!(Instant::now() < limit, "memory came up to {furthest}");
        std::thread::sleep(Duration::from_millis(20));
        if slow.furthest() != furthest {
            (furthest, since) = (slow.furthest(), Instant::now());
        }
    }
}

/// What the guest prints.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<String>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Printed {
    /// Types a command, where there is one, and waits until so many lines begin with `ok` or
    /// `ready`.
    fn wait(&self, machine: &Machine, command: &str, lines: usize) {
        machine.type_in(command.as_bytes()).unwrap();
        let end = Instant::now() + LIMIT;
        loop {
            let text = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let good = |line: &&str| line.starts_with("ok") || line.starts_with("ready");
            if whole.lines().filter(good).count() == lines {
                return;
            }
            assert!(Instant::now() < end, "{text}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn options() -> RunOptions {
    RunOptions {
        host: HostOptions {
            name: "logged".into(),
            control: PathBuf::new(),
            memory: MemoryKind::default(),
            disks: Vec::new(),
            accept_disks: false,
            release: control::ReleaseMode::Background,
            partial_huge: control::PartialHuge::Split,
        },
        memory_bytes: MEMORY_BYTES,
        cpus: 1,
        kernel: bare::kernel().unwrap(),
        initrd: None,
        command_line: String::new(),
        without: vmm::Features::NONE,
        nested: false,
    }
}

/// A copy that was made of a page before it went to the balloon must not keep its memory: so a
/// page that is released counts as written, and goes once more as zeros.
#[test]
fn what_is_released_while_writes_are_noted_counts_as_written() {
    on_a_kvm("bare_memory::what_is_released_while_writes_are_noted_counts_as_written", || {
        let (options, printed) = (options(), Printed::default());
        let machine = Machine::new(&options, Box::new(printed.clone())).unwrap();
        machine.load_kernel(&options).unwrap();
        let requests = Signals::new().unwrap();
        let stop = requests.stopper();
        let written = std::thread::scope(|scope| {
            let serving = scope.spawn(|| machine.serve(&requests));
            machine.resume();
            let deed = std::panic::AssertUnwindSafe(|| released(&machine, &printed));
            let outcome = std::panic::catch_unwind(deed);
            stop();
            assert_eq!(serving.join().unwrap().unwrap(), End::Stopped);
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let first = (MEMORY_BYTES / PAGE) - BALLOON_PAGES;
        let in_balloon = PageRange::new(first, BALLOON_PAGES).unwrap();
        let noted: u64 = written.ranges_in(in_balloon).map(PageRange::pages).sum();
        assert_eq!(noted, BALLOON_PAGES);
    });
}

/// Has the balloon take its pages while writes are noted; all that was noted.
fn released(machine: &Machine, printed: &Printed) -> PageSet {
    printed.wait(machine, "", 1);
    printed.wait(machine, "fill 8 18 1\n", 2);
    machine.start_dirty_log().unwrap();
    printed.wait(machine, &format!("balloon {BALLOON_PAGES:x}\n"), 3);
    machine.pause().unwrap();
    let (regions, mut pages) = (machine.regions(), PageSet::new());
    let noted = machine.take_dirty(|region, words| {
        pages.insert_bitmap(regions[region].start(), 1, words.iter().copied()).unwrap();
    });
    noted.unwrap();
    pages
}
