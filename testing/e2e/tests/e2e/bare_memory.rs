//! Guest memory that the balloon takes during a snapshot, a lazy restore, or dirty logging.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::bare::{self, BareBuilder, BareGuest};
use lab::fuse::{Features, Fuse};
use page_set::{PageRange, PageSet};
use vmm::{End, HostOptions, Machine, MemoryKind, RunOptions, Signals};

use crate::bare::{aerostat, boot, client, on_a_kvm};
use crate::program::program;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Guest memory. The balloon takes its second half.
const MEMORY_BYTES: u64 = 32 * MIB;
const BALLOON_PAGES: u64 = MEMORY_BYTES / 2 / PAGE;

/// Time to read a slow page of the snapshot: the second half would take 16 s. The balloon must be
/// faster.
const SLOW: Duration = Duration::from_millis(4);

/// Allowed difference in process memory besides the guest's.
const SLACK_BYTES: u64 = 4 * MIB;

/// After this time without a read, loading is complete.
const QUIET: Duration = Duration::from_millis(500);

/// Timeout of everything else.
const LIMIT: Duration = Duration::from_secs(60);

/// Restores the guest in `file`.
fn restored(name: &str, file: &Path, words: &[&str]) -> BareGuest {
    let restore = BareBuilder::command(program(), "restore", name).unwrap();
    let restore = restore.argument(file).arguments(words.iter().copied());
    restore.start().unwrap_or_else(|error| panic!("{error}"))
}

/// Anonymous memory of a process, without the kernel's zero page.
fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Takes a snapshot of a guest that has written almost all of its memory, in its socket's
/// directory.
fn snapshot(guest: &mut BareGuest) -> PathBuf {
    guest.run("fill 8 18 1").unwrap();
    let file = guest.directory().join("snapshot");
    let words = ["snapshot", "whole", file.to_str().unwrap()];
    let (code, out, err) = aerostat(guest, &words);
    assert_eq!(code, Some(0), "{out}{err}\n{}", guest.errors());
    file
}

#[test]
fn a_page_ballooned_during_a_lazy_restore_is_not_loaded() {
    on_a_kvm("bare_memory::a_page_ballooned_during_a_lazy_restore_is_not_loaded", || {
        let mut guest = boot("whole");
        let file = snapshot(&mut guest);
        let mut eager = restored("eager", &file, &[]);
        eager.run(&format!("balloon {BALLOON_PAGES:x}")).unwrap();
        let expected = anonymous_bytes(eager.pid());
        assert!(eager.power_off().unwrap().success());

        let slow = Fuse::mount(Features::ALL).unwrap();
        slow.put("snapshot", std::fs::read(&file).unwrap());
        slow.slow_down(SLOW, PAGE + MEMORY_BYTES);
        let mut lazy = restored("lazy", &slow.path().join("snapshot"), &["--lazy"]);
        lazy.run(&format!("balloon {BALLOON_PAGES:x}")).unwrap();
        let first_half = PAGE + MEMORY_BYTES / 2;
        assert!(slow.furthest() < first_half, "memory was loaded too fast");
        slow.slow_down(Duration::ZERO, PAGE + MEMORY_BYTES);
        wait_until_quiet(&slow, first_half);

        let resident = client(&lazy, "lazy").status().unwrap().resident_bytes.unwrap();
        let anonymous = anonymous_bytes(lazy.pid());
        println!("{resident} resident, {anonymous} anonymous, {expected} when restored at once");
        assert!(resident <= MEMORY_BYTES / 2, "{resident} bytes are with the host");
        assert!(anonymous <= expected + SLACK_BYTES, "{anonymous} bytes and not {expected}");
        lazy.run("check 8 8 1").unwrap();
        lazy.run("balloon 0").unwrap();
        assert_eq!(lazy.number("zero 10 10").unwrap(), BALLOON_PAGES);
        lazy.run("fill 10 10 2").unwrap();
        lazy.run("check 10 10 2").unwrap();
        lazy.run("check 8 8 1").unwrap();
        assert!(lazy.power_off().unwrap().success());
        assert!(guest.power_off().unwrap().success());
    });
}

/// Waits until reads have reached `end` and paused.
fn wait_until_quiet(slow: &Fuse, end: u64) {
    let limit = Instant::now() + LIMIT;
    let (mut furthest, mut since) = (0, Instant::now());
    while furthest < end || since.elapsed() < QUIET {
        assert!(Instant::now() < limit, "memory is loaded up to {furthest}");
        std::thread::sleep(Duration::from_millis(20));
        if slow.furthest() != furthest {
            (furthest, since) = (slow.furthest(), Instant::now());
        }
    }
}

/// Output of the guest.
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
    /// Types a command, unless it is empty, and waits until this many lines begin with `ok` or
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

/// A copy made of a page before its release must not keep host memory. So a released page counts as
/// dirty and is sent again, as zeros.
#[test]
fn a_page_released_during_dirty_logging_is_dirty() {
    on_a_kvm("bare_memory::a_page_released_during_dirty_logging_is_dirty", || {
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

/// Inflates the balloon during dirty logging and returns the dirty pages.
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
