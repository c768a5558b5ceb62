//! A guest that continues in another machine of the same process: memory is copied while it runs,
//! then its dirty pages, then its state.

use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use control::GuestRequest;
use control::api::Caches;
use page_set::{PageRange, PageSet};
use vmm::{End, GuestRam, HostOptions, Machine, MemoryKind, RunOptions, Section, Signals};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Memory of the guest, balloon target, and size of files in guest memory, in MiB.
const MEMORY_MIB: u64 = 256;
const INFLATED_MIB: u64 = 64;
const KEPT_MIB: u64 = 32;
const INFLATED_PAGES: u64 = INFLATED_MIB * MIB / PAGE;

/// Memory that the guest writes while it is copied, in MiB.
const WRITTEN_MIB: u64 = 16;

/// Timeout of one answer.
const LIMIT: Duration = Duration::from_secs(60);

/// Sampling time of the guest's CPU time.
const WATCHED: Duration = Duration::from_secs(1);

/// Pages per copy.
const CHUNK_PAGES: u64 = 256;

pub(crate) fn a_guest_continues_in_another_machine(
    kernel: PathBuf,
    initramfs: PathBuf,
    modules: &[&str],
) {
    let options = options(kernel, initramfs);
    let mut console = GuestConsole::new();
    let first = Machine::new(&options, console.output()).unwrap();
    first.load_kernel(&options).unwrap();
    let (second, state) =
        running(&first, End::Stopped, || leaves(&first, &options, &mut console, modules));
    let bad = state.iter().skip(1).cloned().collect::<Vec<_>>();
    assert!(second.load(&bad).unwrap_err().to_string().starts_with("sender: "));
    drop(first);

    second.load(&state).unwrap();
    let (guest, host) = (second.cpu_features(), vmm::CpuFeatures::of_host().unwrap());
    assert_eq!(guest.vendor, host.vendor);
    // The guest has fewer features than the host if some are masked.
    let has = |(id, bits): &(u64, u64)| {
        host.words.iter().any(|(known, all)| known == id && bits & !all == 0)
    };
    assert!(!guest.words.is_empty() && guest.words.iter().all(has), "{guest:?} {host:?}");
    running(&second, End::PoweredOff, || goes_on(&second, &mut console));
}

/// CPU time of a busy guest in the sampling time, in ticks.
fn used(percent: u8, machine: &Machine) -> u64 {
    machine.set_throttle(percent);
    let ticks = || -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let stats = tasks
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok());
        let of_vcpus = stats.filter(|stat| stat.contains("(cpu"));
        // User and kernel time, fields 14 and 15 of proc(5); a guest's time is in the former.
        of_vcpus
            .map(|stat| {
                let fields = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
                fields.map(|field| field.parse::<u64>().unwrap()).sum::<u64>()
            })
            .sum()
    };
    let before = ticks();
    thread::sleep(WATCHED);
    ticks() - before
}

/// Copies memory and state of a guest, paused at the end, to a new machine.
fn leaves(
    first: &Machine,
    options: &RunOptions,
    console: &mut GuestConsole,
    modules: &[&str],
) -> (Machine, Vec<Section>) {
    console.until_ready();
    for module in modules {
        console.run(first, &format!("insmod {module}"));
    }
    console.run(first, &format!("fill kept {KEPT_MIB} 1"));
    set_target(first, INFLATED_PAGES);
    console.run(first, "busy 8");
    let [free, throttled] = [0, 90].map(|percent| used(percent, first));
    println!("{free} ticks, throttled {throttled}");
    // Throttled to a tenth. Its pauses are late on a busy host.
    assert!(throttled * 4 < free * 3, "{free} ticks, throttled {throttled}");
    first.set_throttle(0);
    console.run(first, "idle");
    first.start_dirty_log().unwrap();

    // The guest writes during the first copy of its memory.
    let second = Machine::new(options, console.output()).unwrap();
    let (from, to) = (first.ram(), second.ram());
    console.send(first, &format!("fill written {WRITTEN_MIB} 2"));
    for region in first.regions() {
        copy(&from, &to, region);
    }
    assert_eq!(console.answer(), "ok");
    console.run(first, &format!("fill late {WRITTEN_MIB} 3"));

    first.pause().unwrap();
    let start = Instant::now();
    let dirty = dirty(first);
    let written = 2 * WRITTEN_MIB * MIB / PAGE..MEMORY_MIB * MIB / PAGE / 2;
    assert!(written.contains(&dirty.len()), "{} pages", dirty.len());
    dirty.ranges().for_each(|run| copy(&from, &to, run));
    let state = first.save().unwrap();
    let bytes: usize = state.iter().map(|section| section.bytes.len()).sum();
    let elapsed = start.elapsed();
    println!("{} pages written meanwhile, {bytes} bytes of state, {elapsed:.1?}", dirty.len());
    // The guest writes nothing now, and ballooned pages need no copy.
    assert!(self::dirty(first).is_empty());
    let ballooned = first.ballooned_pages();
    assert_eq!(ballooned.len(), INFLATED_PAGES);
    ballooned.ranges().for_each(|run| fill(&to, run, 0xdd));
    (second, state)
}

/// The console continues, and all memory has its contents.
fn goes_on(second: &Machine, console: &mut GuestConsole) {
    verify(console, second, "kept", KEPT_MIB, 1);
    verify(console, second, "written", WRITTEN_MIB, 2);
    verify(console, second, "late", WRITTEN_MIB, 3);
    assert_eq!(console.run(second, "cat /sys/devices/system/cpu/online").0, ["0-1"]);
    let balloon = second.balloon();
    assert_eq!(u64::from(balloon.status().balloon.actual_pages), INFLATED_PAGES);
    let id = balloon.submit(GuestRequest::DropCaches(Caches::All), LIMIT).unwrap();
    balloon.wait_request(id, LIMIT).unwrap().unwrap();
    set_target(second, 0);
    let free: u64 = console.run(second, "free-mib").1.parse().unwrap();
    assert!(free > INFLATED_MIB, "{free} MiB");
    let all = free - MEMORY_MIB / 16;
    console.run(second, &format!("fill all {all} 4"));
    verify(console, second, "all", all, 4);
    verify(console, second, "kept", KEPT_MIB, 1);
    let status = balloon.status();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
    console.send(second, "poweroff");
}

/// Runs `action` while the machine's devices are served. The guest then ends as expected, or the
/// serving is stopped.
fn running<T>(machine: &Machine, end: End, action: impl FnOnce() -> T) -> T {
    let requests = Signals::new().unwrap();
    let stop = requests.stopper();
    thread::scope(|scope| {
        let serving = scope.spawn(|| machine.serve(&requests));
        machine.resume();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
        if end == End::Stopped || outcome.is_err() {
            stop();
        }
        let ended = serving.join().unwrap().unwrap();
        match outcome {
            Ok(value) => {
                assert_eq!(ended, end);
                value
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn options(kernel: PathBuf, initramfs: PathBuf) -> RunOptions {
    RunOptions {
        host: HostOptions {
            name: "moved".into(),
            control: PathBuf::new(),
            memory: MemoryKind::default(),
            disks: Vec::new(),
            accept_disks: false,
            release: control::ReleaseMode::Background,
            partial_huge: control::PartialHuge::Split,
        },
        memory_bytes: MEMORY_MIB * MIB,
        cpus: 2,
        kernel,
        initrd: Some(initramfs),
        command_line: "console=ttyS0 LAB_CONSOLE=ttyS0 quiet oops=panic panic=1".into(),
        without: vmm::Features::NONE,
        nested: false,
    }
}

fn set_target(machine: &Machine, pages: u64) {
    let balloon = machine.balloon();
    let generation = balloon.set_target(u32::try_from(pages).unwrap()).unwrap();
    let status = balloon.wait_change(generation, LIMIT);
    assert!(status.at_target && u64::from(status.actual_pages) == pages, "{status:?}");
}

fn copy(from: &GuestRam, to: &GuestRam, pages: PageRange) {
    let mut rest = pages;
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(rest.end().min(rest.start() + CHUNK_PAGES));
        let mut bytes = vec![0; usize::try_from(chunk.pages() * PAGE).unwrap()];
        from.read(chunk, &mut bytes).unwrap();
        to.write(chunk, &bytes).unwrap();
        rest = after;
    }
}

fn fill(ram: &GuestRam, pages: PageRange, byte: u8) {
    ram.write(pages, &vec![byte; usize::try_from(pages.pages() * PAGE).unwrap()]).unwrap();
}

/// Pages written since the last call.
fn dirty(machine: &Machine) -> PageSet {
    let (regions, mut pages) = (machine.regions(), PageSet::new());
    let noted = machine.take_dirty(|region, words| {
        pages.insert_bitmap(regions[region].start(), 1, words.iter().copied()).unwrap();
    });
    noted.unwrap();
    pages
}

fn verify(console: &mut GuestConsole, machine: &Machine, file: &str, mib: u64, seed: u64) {
    let (_, text) = console.run(machine, &format!("verify {file} {mib} {seed}"));
    assert_eq!(text, "0", "wrong pages in {file}");
}

/// The console of the guest's init, which outlives a machine.
struct GuestConsole {
    sender: Sender<Vec<u8>>,
    receiver: Receiver<Vec<u8>>,
    /// Output since the last complete line.
    open: Vec<u8>,
    number: u64,
    log: String,
}

/// Output of a serial line.
struct Output(Sender<Vec<u8>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl GuestConsole {
    fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver, open: Vec::new(), number: 0, log: String::new() }
    }

    fn output(&self) -> Box<dyn Write + Send> {
        Box::new(Output(self.sender.clone()))
    }

    fn line(&mut self) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.open.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.open.drain(..=at).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                self.log += &line;
                self.log.push('\n');
                return line;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.receiver.recv_timeout(left) {
                Ok(bytes) => self.open.extend(bytes),
                Err(_) => panic!("the guest prints nothing:\n{}", self.log),
            }
        }
    }

    fn until_ready(&mut self) {
        while !self.line().contains("@lab 0 ok") {}
    }

    fn send(&mut self, machine: &Machine, command: &str) {
        self.number += 1;
        machine.type_in(format!("{} {command}\n", self.number).as_bytes()).unwrap();
    }

    /// First word of the answer to the last command.
    fn answer(&mut self) -> String {
        self.read_answer().1.split(' ').next().unwrap().to_owned()
    }

    fn run(&mut self, machine: &Machine, command: &str) -> (Vec<String>, String) {
        self.send(machine, command);
        let (lines, answer) = self.read_answer();
        let text = answer.strip_prefix("ok");
        let text = text.unwrap_or_else(|| panic!("{command}: {answer}\n{}", self.log));
        (lines, text.trim().to_owned())
    }

    /// Lines of the answer, and its end.
    fn read_answer(&mut self) -> (Vec<String>, String) {
        let marker = format!("@lab {} ", self.number);
        let mut lines = Vec::new();
        loop {
            let line = self.line();
            let Some((_, answer)) = line.split_once(&marker) else { continue };
            match answer.strip_prefix("| ") {
                Some(text) => lines.push(text.to_owned()),
                None => return (lines, answer.to_owned()),
            }
        }
    }
}
