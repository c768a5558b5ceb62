//! Our driver in unmodified Debian kernels, on QEMU's own balloon device.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bench::Qmp;
use lab::debian::{self, Release};
use lab::{Guest, Waker, guest_build};

/// Memory of the guests, in MiB: emulation is slow.
const MEMORY_MIB: u64 = 512;

/// Size of a file in guest memory.
const KEPT_MIB: u64 = 100;

/// Balloon target.
const INFLATED_MIB: u64 = 256;

/// Memory that the guest's kernel may use meanwhile.
const FREE_SLACK_MIB: u64 = 8;

/// Host memory that reading all guest memory may add, in MiB. If the balloon were read, it would be
/// all of it.
const READING_MIB: u64 = 64;

/// Taint of a module built out of tree and unsigned: TAINT_OOT_MODULE and TAINT_UNSIGNED_MODULE
/// (admin-guide/tainted-kernels).
const ALLOWED_TAINT: u64 = (1 << 12) | (1 << 13);

/// Status register of a device in use: ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK (virtio 1.2,
/// 2.1).
const READY: &str = "15";

const MIB: u64 = 1 << 20;

const PAGES_PER_MIB: u64 = 256;

/// Timeout for the driver to mark ballooned pages. An emulated guest is slow.
const MARK_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn debian_6_12_runs_our_driver() {
    runs_our_driver(Release::Cloud6_12);
}

#[test]
fn debian_6_1_runs_our_driver() {
    runs_our_driver(Release::Cloud6_1);
}

fn runs_our_driver(release: Release) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp");
    let kernel = debian::kernel(release).unwrap();
    let own = guest_build::balloon_module(&kernel.tree().unwrap()).unwrap();
    let mut needed = kernel.modules(&["virtio_pci"]).unwrap();
    if release == Release::Cloud6_1 {
        // Older kernels do not reset the device at shutdown.
        needed.push(guest_build::lab_bus_module(&kernel.tree().unwrap()).unwrap());
    }
    let trace = directory.path().join("trace");
    let mut guest = Guest::qemu(&kernel)
        .memory_mib(MEMORY_MIB)
        .modules(&needed)
        .module(&own)
        // Print warnings too.
        .kernel_argument("ignore_loglevel")
        .machine_arguments(["-device", "virtio-balloon-pci,deflate-on-oom=on"])
        .machine_arguments([
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", socket.display()),
        ])
        // Shared memory: reading a released page allocates it again. (Private memory would map the
        // zero page, which costs nothing.)
        .machine_arguments([
            "-object".to_owned(),
            format!("memory-backend-memfd,id=ram,share=on,size={MEMORY_MIB}M"),
        ])
        .machine_arguments(["-machine", "memory-backend=ram"])
        // Each write of the driver to the device's status register.
        .machine_arguments(["-trace", "virtio_set_status", "-D"])
        .machine_arguments([trace.display().to_string()])
        .boot()
        .unwrap();
    let mut qmp = Qmp::connect(&socket).unwrap();
    guest.load(&needed).unwrap();
    let tainted_before = number(&mut guest, "cat /proc/sys/kernel/tainted");
    assert_eq!(tainted_before & !ALLOWED_TAINT, 0);
    guest.load(&[own]).unwrap();
    let devices = guest.run("ls /sys/bus/virtio/drivers/aerostat_balloon").unwrap().lines;
    assert!(devices.contains(&"virtio0".to_owned()), "{devices:?}");

    inflates_and_deflates(&mut guest, &mut qmp);

    let tainted = number(&mut guest, "cat /proc/sys/kernel/tainted");
    assert_eq!(tainted & !ALLOWED_TAINT, 0, "{}", guest.console_log());
    let log = guest.console_log();
    assert!(log.contains("aerostat_balloon virtio0: balloon ready: page numbers"), "{log}");
    for word in ["WARNING", "BUG", "Oops", "objtool", "unpatched", "disagrees"] {
        assert!(!log.contains(word), "{word} in\n{log}");
    }
    resets_the_device_at_shutdown(guest, &mut qmp, &trace);
}

/// The next kernel must not meet a device that still uses the old kernel's memory: the driver
/// resets it at shutdown.
fn resets_the_device_at_shutdown(mut guest: Guest, qmp: &mut Qmp, trace: &Path) {
    guest.run("drop all").unwrap();
    guest.run("insmod aerostat_balloon").unwrap();
    qmp.balloon((MEMORY_MIB - INFLATED_MIB) * MIB).unwrap();
    let status = || {
        let log = fs::read_to_string(trace).unwrap();
        log.lines().rev().find_map(|line| line.rsplit_once(" val ")).map(|(_, v)| v.to_owned())
    };
    assert_eq!(status().as_deref(), Some(READY), "the driver is ready");
    assert!(guest.power_off().unwrap().success());
    assert_eq!(status().as_deref(), Some("0"), "the device was reset");
}

fn inflates_and_deflates(guest: &mut Guest, qmp: &mut Qmp) {
    guest.run(&format!("fill kept {KEPT_MIB} 1")).unwrap();
    let free_mib = number(guest, "free-mib");
    assert!(free_mib > INFLATED_MIB + FREE_SLACK_MIB, "{free_mib}");
    // Touches all pages once, so that later growth is due to the test.
    guest.run("read-kcore").unwrap();
    guest.run(&format!("touch {}", INFLATED_MIB + FREE_SLACK_MIB)).unwrap();
    let before = resident_mib(guest);
    qmp.balloon((MEMORY_MIB - INFLATED_MIB) * MIB).unwrap();
    // QEMU released the touched pages.
    let fell_mib = before - resident_mib(guest);
    assert!(fell_mib >= INFLATED_MIB * 3 / 4, "{fell_mib} of {INFLATED_MIB} MiB");
    verify(guest, "kept", KEPT_MIB, 1);
    reading_all_memory_skips_the_balloon(guest);
    qmp.balloon((MEMORY_MIB - INFLATED_MIB / 2) * MIB).unwrap();
    guest.run(&format!("fill more {} 2", INFLATED_MIB / 4)).unwrap();
    qmp.balloon((MEMORY_MIB - INFLATED_MIB / 2 - 1) * MIB).unwrap();
    verify(guest, "more", INFLATED_MIB / 4, 2);
    verify(guest, "kept", KEPT_MIB, 1);
    guest.run("drop more").unwrap();

    // A suspend resets the device. The balloon inflates again after it.
    let messages = "cat /sys/bus/virtio/devices/virtio0/balloon/messages";
    let (left, sent) = (qmp.left_bytes().unwrap(), number(guest, messages));
    guest.sleep(Waker::SerialLine("ttyS1")).unwrap();
    qmp.balloon(left).unwrap();
    assert!(number(guest, messages) > sent);
    verify(guest, "kept", KEPT_MIB, 1);

    guest.run("rmmod aerostat_balloon").unwrap();
    assert_eq!(qmp.left_bytes().unwrap(), MEMORY_MIB * MIB);
    // All memory that was free is usable again.
    let fill_mib = free_mib - FREE_SLACK_MIB;
    guest.run(&format!("fill all {fill_mib} 3")).unwrap();
    verify(guest, "all", fill_mib, 3);
    verify(guest, "kept", KEPT_MIB, 1);
}

/// A memory dump taken inside the guest brings no ballooned page back to the host.
fn reading_all_memory_skips_the_balloon(guest: &mut Guest) {
    // The driver marks pages right after the host has acknowledged them.
    let end = Instant::now() + MARK_LIMIT;
    while number(guest, "offline") != INFLATED_MIB * PAGES_PER_MIB {
        assert!(Instant::now() < end, "{} pages are marked", number(guest, "offline"));
    }
    let before = resident_mib(guest);
    let reply = guest.run("read-kcore").unwrap().text;
    let after = resident_mib(guest);
    println!("{before} MiB before all of memory was read, {after} after: {reply}");
    assert!(after < before + READING_MIB, "{before} MiB before, {after} after: {reply}");
}

fn verify(guest: &mut Guest, file: &str, mib: u64, seed: u64) {
    assert_eq!(number(guest, &format!("verify {file} {mib} {seed}")), 0, "wrong pages in {file}");
}

fn number(guest: &mut Guest, command: &str) -> u64 {
    let reply = guest.run(command).unwrap();
    let text = if reply.text.is_empty() { reply.lines.join("") } else { reply.text };
    text.parse().unwrap_or_else(|_| panic!("{command}: {text}"))
}

/// Memory of the QEMU process, in MiB (proc(5), `statm`).
fn resident_mib(guest: &Guest) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{}/statm", guest.pid())).unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages / PAGES_PER_MIB
}
