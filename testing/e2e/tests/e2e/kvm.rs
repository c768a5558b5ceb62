//! `aerostat run` on a real KVM, with unmodified Debian guests.
//!
//! On a machine without a usable KVM, the tests run inside an emulated machine with KVM: this test
//! program runs there again, and environment variables name its files.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{Caches, Driver, FreeKind, FreePagesRequest, Status};
use lab::debian::{self, Release};
use lab::kvm::{self, KvmMachine};
use lab::{Guest, GuestBuilder, LabError, guest_build};

use crate::kvm_restore::a_guest_continues_in_another_machine;
use crate::program::{outcome, program};

/// Memory of the guests and balloon target, in MiB, with the variables that override them.
/// Emulation below the KVM is slow.
const MEMORY: (&str, u64) = ("AEROSTAT_TEST_MEMORY_MIB", 384);
const INFLATED: (&str, u64) = ("AEROSTAT_TEST_INFLATED_MIB", 192);

/// Size of a file in guest memory.
const KEPT_MIB: u64 = 32;

/// What a hold leaves free.
const RESERVED_MIB: u64 = 64;

/// Guest memory that is not filled: without some for the kernel, the guest would panic ("System is
/// deadlocked on memory").
const NOT_FILLED: u64 = 16;

/// Size of a page cache that is then dropped: zeros of a RAM disk.
const CACHED_MIB: u64 = 32;
const DISK: &str = "brd";

/// Driver of the VMM's disks.
pub(crate) const BLOCK: &str = "virtio_blk";

/// Memory that the guest may use while it reports its free memory.
const NOISE_MIB: u64 = 8;

/// Timeout of reports: a driver sends statistics within milliseconds, and freed pages within two
/// seconds (Linux's `page_reporting.c`). Emulation is slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const STATS_INTERVAL_MS: u64 = 100;

/// Maximum exits of a balloon change with our driver.
const MOST_EXITS: u64 = 100;

/// Timeout of all tests in the machine with KVM, per 384 MiB of guest memory.
const LIMIT: Duration = Duration::from_secs(600);

/// Timeout of one guest command, likewise.
const COMMAND_LIMIT: Duration = Duration::from_secs(240);

/// Timeout of a panic, its report, and the second that the kernel waits.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A running guest answers much faster.
const PAUSE: Duration = Duration::from_secs(3);

pub(crate) const MIB: u64 = 1 << 20;

/// Modules of the guests besides the balloon driver.
const NEEDED: [&str; 2] = ["virtio_mmio", "pvpanic_mmio"];
pub(crate) const STOCK: &str = "virtio_balloon";
pub(crate) const OURS: &str = "aerostat_balloon";

const PROGRAM: &str = "AEROSTAT_PROGRAM";
pub(crate) const VMLINUZ: &str = "AEROSTAT_TEST_VMLINUZ";
pub(crate) const VMLINUX: &str = "AEROSTAT_TEST_VMLINUX";
pub(crate) const INITRAMFS: &str = "AEROSTAT_TEST_INITRAMFS";
pub(crate) const MODULES: &str = "AEROSTAT_TEST_MODULES";

/// KVM modules for a guest that runs nested guests, in loading order.
pub(crate) const NESTED_MODULES: &str = "AEROSTAT_TEST_NESTED_MODULES";

/// One machine for all tests inside, since its boot takes most of the time.
#[test]
fn debian_guests_of_our_vmm_balloon_pause_and_end() {
    inside_of_a_kvm("kvm::inside", mib(MEMORY));
}

/// Runs an ignored test of this program on a KVM, with this much guest memory.
pub(crate) fn inside_of_a_kvm(test: &str, guests_mib: u64) {
    inside_of_a_kvm_with(test, guests_mib, &[]);
}

/// As [`inside_of_a_kvm`], with more environment variables.
pub(crate) fn inside_of_a_kvm_with(test: &str, guests_mib: u64, more: &[(&str, &OsStr)]) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = debian::kernel(Release::Cloud6_12).unwrap();
    let own = guest_build::balloon_module(&kernel.tree().unwrap()).unwrap();
    let mut modules = kernel.modules(&NEEDED).unwrap();
    let names = names(&modules);
    let nested = kernel.modules(&[nested_kvm_module()]).unwrap();
    let nested_names = self::names(&nested);
    modules.extend(nested);
    modules.extend(kernel.modules(&[STOCK, DISK, BLOCK]).unwrap());
    modules.push(own);
    let initramfs = directory.path().join("initramfs.cpio");
    Guest::qemu(&kernel).modules(&modules).write_initramfs(&initramfs).unwrap();
    let vmlinux = kernel.vmlinux().unwrap();
    let sizes = [MEMORY, INFLATED].map(|size| (size.0, mib(size).to_string()));
    let mut variables: Vec<(&str, &OsStr)> = vec![
        (PROGRAM, program().as_os_str()),
        (VMLINUZ, kernel.vmlinuz.as_os_str()),
        (VMLINUX, vmlinux.as_os_str()),
        (INITRAMFS, initramfs.as_os_str()),
        (MODULES, OsStr::new(&names)),
        (NESTED_MODULES, OsStr::new(&nested_names)),
    ];
    variables.extend(more);
    variables.extend(sizes.iter().map(|(name, size)| (*name, OsStr::new(size))));
    let this = std::env::current_exe().unwrap();
    let words = ["--exact", test, "--ignored", "--nocapture"];
    let (code, text) = if kvm::hardware() {
        let output =
            Command::new(this).args(words).envs(variables.iter().copied()).output().unwrap();
        let (code, out, err) = outcome(&output);
        (code, out + &err)
    } else {
        let mut machine = KvmMachine::boot(guests_mib).unwrap();
        let outcome = machine.run(&this, &words.map(OsStr::new), &variables, scaled(LIMIT));
        let outcome = outcome.unwrap_or_else(|error| panic!("{error}\n{}", machine.console_log()));
        (outcome.code, outcome.lines.join("\n"))
    };
    println!("{text}");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

fn names(modules: &[PathBuf]) -> String {
    let names = modules.iter().map(|path| path.file_stem().unwrap().to_str().unwrap());
    names.collect::<Vec<_>>().join(" ")
}

/// KVM module for a guest with nested virtualisation. The emulated machine has an AMD CPU.
fn nested_kvm_module() -> &'static str {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let is_intel = kvm::hardware() && cpuinfo.contains("GenuineIntel");
    if is_intel { "kvm_intel" } else { "kvm_amd" }
}

#[test]
#[ignore = "another test runs it on a KVM"]
fn inside() {
    assert!(std::env::var_os(VMLINUZ).is_some(), "another test runs this on a machine with a KVM");
    let start = Instant::now();
    let path = |variable: &str| PathBuf::from(std::env::var_os(variable).unwrap());
    let modules = std::env::var(MODULES).unwrap();
    let modules: Vec<&str> = modules.split(' ').chain([OURS]).collect();
    a_guest_continues_in_another_machine(path(VMLINUX), path(INITRAMFS), &modules);
    println!("migrated after {:.1?}", start.elapsed());
    let stock = inflates_and_deflates(STOCK, VMLINUX);
    println!("stock after {:.1?}", start.elapsed());
    let ours = inflates_and_deflates(OURS, VMLINUX);
    assert!(ours.inflate <= MOST_EXITS && ours.deflate <= MOST_EXITS, "{ours:?}");
    assert!(stock.inflate > ours.inflate, "{stock:?} {ours:?}");
    println!("ours after {:.1?}", start.elapsed());
    reports_and_is_ended();
    println!("all after {:.1?}", start.elapsed());
}

/// Exits of balloon changes.
#[derive(Debug)]
struct Exits {
    inflate: u64,
    deflate: u64,
}

fn inflates_and_deflates(driver: &str, kernel: &str) -> Exits {
    let start = Instant::now();
    // Free page reporting would release the pages before the balloon does.
    let arguments = ["--cpus", "2", "--without", "reporting"];
    let mut guest = builder(driver, kernel).machine_arguments(arguments).boot().unwrap();
    println!("{driver}: booted in {:.1?}", start.elapsed());
    load(&mut guest, driver);
    assert_eq!(run(&mut guest, "cat /sys/devices/system/cpu/online").lines, ["0-1"]);
    run(&mut guest, &format!("fill kept {KEPT_MIB} 1"));
    if driver == OURS {
        drops_caches_and_reports_free_pages(&mut guest);
    } else {
        reports_statistics_and_hints(&mut guest);
    }
    let free_mib = number(&mut guest, "free-mib");
    let inflated_mib = mib(INFLATED);
    assert!(free_mib > inflated_mib, "{free_mib} MiB are free");
    run(&mut guest, &format!("touch {inflated_mib}"));

    let before = status(driver);
    let expected = if driver == OURS { Driver::Aerostat } else { Driver::Classic };
    assert_eq!(before.guest.driver, expected);
    let inflated = balloon(driver, inflated_mib);
    let fell = before.resident_bytes.unwrap() - inflated.resident_bytes.unwrap();
    assert!(fell >= inflated_mib * MIB * 3 / 4, "{} MiB", fell / MIB);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    let deflated = balloon(driver, 0);
    // All memory that was free is usable again.
    let fill_mib = free_mib - mib(MEMORY) / NOT_FILLED;
    run(&mut guest, &format!("fill all {fill_mib} 2"));
    verify(&mut guest, "all", fill_mib, 2);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    assert_eq!(deflated.faults.total(), 0, "{:?}", deflated.faults);
    if driver == OURS {
        pauses_and_resumes(guest);
    } else {
        panics(guest);
    }

    let exits = |status: &Status| status.exits.unwrap();
    Exits {
        inflate: exits(&inflated) - exits(&before),
        deflate: exits(&deflated) - exits(&inflated),
    }
}

/// Requests that need our driver.
fn drops_caches_and_reports_free_pages(guest: &mut Guest) {
    run(guest, &format!("insmod {DISK} rd_nr=1 rd_size={}", CACHED_MIB << 10));
    run(guest, &format!("read-file /dev/ram0 {CACHED_MIB}"));
    let client = client(OURS);
    let dropped = client.drop_caches(Caches::All, ANSWER_TIMEOUT).unwrap();
    println!("{dropped:?}");
    assert!(dropped.page_cache.freed_bytes >= CACHED_MIB * MIB * 98 / 100, "{dropped:?}");
    assert!(dropped.slab.after_bytes > 0, "{dropped:?}");

    let free_mib = number(guest, "free-mib");
    let named = client.request_free_pages(&free_pages(FreeKind::Snapshot)).unwrap();
    println!("{} MiB free, {} ms", named.total_bytes / MIB, named.elapsed_ms);
    assert_eq!((named.kind, named.memory_bytes), (FreeKind::Snapshot, mib(MEMORY) * MIB));
    let named_mib = named.total_bytes / MIB;
    assert!(named_mib.abs_diff(free_mib) <= NOISE_MIB, "{named_mib} of {free_mib} MiB");
    let held = client.request_free_pages(&free_pages(FreeKind::Hold)).unwrap();
    let held_mib = held.total_bytes / MIB;
    assert!(held_mib >= free_mib - RESERVED_MIB - NOISE_MIB, "{held_mib} of {free_mib} MiB");
    assert!(number(guest, "free-mib") <= RESERVED_MIB + NOISE_MIB);
    assert_eq!(client.release_free_pages(ANSWER_TIMEOUT).unwrap().released_bytes, held.total_bytes);

    let ended = client.status().unwrap().requests.ended;
    let done = |command: &str| ended[command]["done"];
    assert_eq!([done("drop-caches"), done("report-free"), done("hold-free")], [1, 1, 1]);
}

fn free_pages(kind: FreeKind) -> FreePagesRequest {
    let reserve_bytes = (kind == FreeKind::Hold).then_some(RESERVED_MIB * MIB);
    let timeout_ms = u64::try_from(ANSWER_TIMEOUT.as_millis()).unwrap();
    FreePagesRequest { kind, min_block_bytes: None, reserve_bytes, timeout_ms }
}

/// Requests that every driver supports.
fn reports_statistics_and_hints(guest: &mut Guest) {
    let client = client(STOCK);
    // A driver sends its first statistics unrequested.
    let faults = |status: &Status| status.stats.values["minor_faults"];
    let before = faults(&client.status().unwrap());
    run(guest, &format!("touch {KEPT_MIB}"));
    assert_eq!(faults(&client.status().unwrap()), before);
    client.set_stats(STATS_INTERVAL_MS).unwrap();
    until(STOCK, |status| faults(status) > before);
    client.set_stats(0).unwrap();

    let free_mib = number(guest, "free-mib");
    let named = client.request_free_pages(&free_pages(FreeKind::Hint)).unwrap();
    println!("{} MiB hinted, {} ms", named.total_bytes / MIB, named.elapsed_ms);
    assert_eq!(named.kind, FreeKind::Hint);
    // Hints are blocks of 4 MiB, without smaller free blocks.
    let named_mib = named.total_bytes / MIB;
    // The driver has returned the pages. While it allocates, per-CPU lists are drained, so there
    // may be more free memory after than before.
    let after_mib = number(guest, "free-mib");
    assert!(after_mib + NOISE_MIB >= free_mib, "{after_mib} of {free_mib} MiB");
    assert!(named_mib <= after_mib + NOISE_MIB, "{named_mib} of {after_mib} MiB");
    assert!(named_mib >= free_mib * 9 / 10, "{named_mib} of {free_mib} MiB");
    let refused = client.drop_caches(Caches::All, ANSWER_TIMEOUT).unwrap_err();
    assert!(refused.to_string().contains("no request queue"), "{refused}");
}

/// Polls the status until a condition holds.
fn until(guest: &str, holds: impl Fn(&Status) -> bool) -> Status {
    let end = Instant::now() + ANSWER_TIMEOUT;
    loop {
        let status = status(guest);
        if holds(&status) {
            return status;
        }
        assert!(Instant::now() < end, "{status:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sets the balloon with the command line and prints its cost.
fn balloon(guest: &str, target_mib: u64) -> Status {
    let before = status(guest);
    let size = format!("{target_mib}MiB");
    let mut command = Command::new(program());
    let output = command.args(["balloon", guest, &size, "--timeout", "120s"]).output().unwrap();
    let (code, out, err) = outcome(&output);
    assert_eq!(code, Some(0), "{out}{err}");
    let after = status(guest);
    assert_eq!(after.balloon.actual_bytes, target_mib * MIB);
    let exits = after.exits.unwrap() - before.exits.unwrap();
    println!("{exits} exits; {out}");
    after
}

/// A guest panic, which is a failure with the guest at fault.
fn panics(mut guest: Guest) {
    guest.run_within("write /proc/sysrq-trigger c", END_LIMIT).unwrap_err();
    let end = guest.wait().unwrap();
    let log = guest.console_log();
    assert_eq!(end.code(), Some(1), "{log}");
    assert!(log.contains(&format!("guest: the kernel of {STOCK} panicked")), "{log}");
}

/// Pauses the guest, whose balloon stays readable, resumes it, and powers it off.
fn pauses_and_resumes(mut guest: Guest) {
    signal(&guest, "USR1");
    let timeout = guest.run_within("free-mib", PAUSE).unwrap_err();
    assert!(matches!(timeout, LabError::Timeout { .. }), "{timeout}");
    assert!(status(OURS).guest.connected);
    let refused = client(OURS).drop_caches(Caches::All, ANSWER_TIMEOUT).unwrap_err();
    assert!(refused.to_string().contains("paused"), "{refused}");
    signal(&guest, "USR2");
    assert!(number(&mut guest, "free-mib") > 0);
    client(OURS).drop_caches(Caches::All, ANSWER_TIMEOUT).unwrap();
    assert!(guest.power_off().unwrap().success());
}

/// Boots the installed, compressed kernel. Free pages are reported, and SIGTERM ends the VMM.
fn reports_and_is_ended() {
    let mut guest = builder("ends", VMLINUZ).boot().unwrap();
    load(&mut guest, STOCK);
    let reports = until("ends", |status| status.reports.released_bytes > 0).reports;
    println!("{reports:?}");
    signal(&guest, "TERM");
    assert!(guest.wait().unwrap().success());
}

pub(crate) fn signal(guest: &Guest, name: &str) {
    let mut kill = Command::new("kill");
    assert!(kill.args(["-s", name, &guest.pid().to_string()]).status().unwrap().success());
}

pub(crate) fn builder(name: &str, kernel: &str) -> GuestBuilder {
    let path = |variable: &str| PathBuf::from(std::env::var_os(variable).unwrap());
    Guest::vmm(program(), path(kernel))
        .memory_mib(mib(MEMORY))
        .initramfs(path(INITRAMFS))
        .machine_arguments(["--name", name])
}

/// A size from its environment variable, or its default.
fn mib((variable, default): (&str, u64)) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// A timeout, scaled by the guests' memory.
fn scaled(limit: Duration) -> Duration {
    limit * u32::try_from(mib(MEMORY).div_ceil(MEMORY.1)).unwrap()
}

pub(crate) fn load(guest: &mut Guest, driver: &str) {
    let needed = std::env::var(MODULES).unwrap();
    for module in needed.split(' ').chain([driver]).filter(|name| !name.is_empty()) {
        run(guest, &format!("insmod {module}"));
    }
}

pub(crate) fn status(guest: &str) -> Status {
    client(guest).status().unwrap()
}

pub(crate) fn client(guest: &str) -> Client {
    let path: &Path = &control::socket_path(&guest.parse().unwrap()).unwrap();
    Client::connect(path).unwrap()
}

/// Runs a command. The panic of a failure has all guest output.
pub(crate) fn run(guest: &mut Guest, command: &str) -> lab::Reply {
    let reply = guest.run_within(command, scaled(COMMAND_LIMIT));
    reply.unwrap_or_else(|error| panic!("{error}\n{}", guest.console_log()))
}

pub(crate) fn verify(guest: &mut Guest, file: &str, mib: u64, seed: u64) {
    assert_eq!(number(guest, &format!("verify {file} {mib} {seed}")), 0, "wrong pages in {file}");
}

pub(crate) fn number(guest: &mut Guest, command: &str) -> u64 {
    run(guest, command).text.parse().unwrap()
}
