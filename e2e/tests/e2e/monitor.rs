//! Our own monitor on a real KVM, with unmodified Debian kernels in it.
//!
//! Where this machine's KVM is of no use, the tests run inside of a machine that has one: this
//! very program is started there again, with what it needs named by variables.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{Driver, Status};
use lab::debian::{self, Release};
use lab::kvm::{self, KvmMachine};
use lab::{Guest, GuestBuilder, guest_build};

use crate::program::{program, told};

/// Memory of the guests, in MiB: emulation below the KVM is slow.
const MEMORY_MIB: u64 = 512;

/// What the balloon takes.
const INFLATED_MIB: u64 = 320;

/// What a file keeps outside of the balloon.
const KEPT_MIB: u64 = 64;

/// How often a change of the balloon by our driver may interrupt the guest.
const MOST_EXITS: u64 = 100;

/// For all that happens in the machine with the KVM.
const LIMIT: Duration = Duration::from_secs(300);

const MIB: u64 = 1 << 20;

/// What the guests need besides the balloon's driver.
const NEEDED: [&str; 2] = ["virtio_mmio", "pvpanic_mmio"];
const STOCK: &str = "virtio_balloon";
const OURS: &str = "aerostat_balloon";

const PROGRAM: &str = "AEROSTAT_PROGRAM";
const VMLINUZ: &str = "AEROSTAT_TEST_VMLINUZ";
const VMLINUX: &str = "AEROSTAT_TEST_VMLINUX";
const INITRAMFS: &str = "AEROSTAT_TEST_INITRAMFS";
const MODULES: &str = "AEROSTAT_TEST_MODULES";

/// One machine for all that is to be seen there, since booting it takes most of the time.
#[test]
fn debian_guests_of_our_monitor_give_memory_and_end_as_they_should() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = debian::kernel(Release::Cloud6_12).unwrap();
    let own = guest_build::balloon_module(&kernel.tree().unwrap()).unwrap();
    let mut modules = kernel.modules(&NEEDED).unwrap();
    let names = modules.iter().map(|path| path.file_stem().unwrap().to_str().unwrap());
    let names = names.collect::<Vec<_>>().join(" ");
    modules.extend(kernel.modules(&[STOCK]).unwrap());
    modules.push(own);
    let initramfs = directory.path().join("initramfs.cpio");
    Guest::qemu(&kernel).modules(&modules).write_initramfs(&initramfs).unwrap();
    let vmlinux = kernel.vmlinux().unwrap();
    let variables: [(&str, &OsStr); 5] = [
        (PROGRAM, program().as_os_str()),
        (VMLINUZ, kernel.vmlinuz.as_os_str()),
        (VMLINUX, vmlinux.as_os_str()),
        (INITRAMFS, initramfs.as_os_str()),
        (MODULES, OsStr::new(&names)),
    ];
    let this = std::env::current_exe().unwrap();
    let words = ["--exact", "monitor::inside", "--ignored", "--nocapture"];
    let (code, text) = if kvm::hardware() {
        let output = Command::new(this).args(words).envs(variables).output().unwrap();
        let (code, out, err) = told(&output);
        (code, out + &err)
    } else {
        let mut machine = KvmMachine::boot(2 * MEMORY_MIB).unwrap();
        let outcome = machine.run(&this, &words.map(OsStr::new), &variables, LIMIT).unwrap();
        (outcome.code, outcome.lines.join("\n"))
    };
    println!("{text}");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "is started by another test where there is a KVM"]
fn inside() {
    // Started by hand it has nothing to work with.
    if std::env::var_os(VMLINUZ).is_none() {
        return;
    }
    let stock = memory_goes_and_comes_back(STOCK, VMLINUX);
    let ours = memory_goes_and_comes_back(OURS, VMLINUZ);
    assert!(ours.inflate <= MOST_EXITS && ours.deflate <= MOST_EXITS, "{ours:?}");
    assert!(stock.inflate > ours.inflate, "{stock:?} {ours:?}");
    guests_end_as_they_should();
}

/// How often changes of the balloon interrupted the guest.
#[derive(Debug)]
struct Exits {
    inflate: u64,
    deflate: u64,
}

fn memory_goes_and_comes_back(driver: &str, kernel: &str) -> Exits {
    let start = Instant::now();
    let mut guest = builder(driver, kernel).machine_arguments(["--cpus", "2"]).boot().unwrap();
    println!("{driver}: booted in {:.1?}", start.elapsed());
    load(&mut guest, driver);
    assert_eq!(guest.run("cat /sys/devices/system/cpu/online").unwrap().lines, ["0-1"]);
    guest.run(&format!("fill kept {KEPT_MIB} 1")).unwrap();
    let free_mib = number(&mut guest, "free-mib");
    assert!(free_mib > INFLATED_MIB, "{free_mib} MiB are free");
    guest.run(&format!("touch {INFLATED_MIB}")).unwrap();

    let before = status(driver);
    let expected = if driver == OURS { Driver::Aerostat } else { Driver::Classic };
    assert_eq!(before.guest.driver, expected);
    let inflated = balloon(driver, INFLATED_MIB);
    let fell = before.resident_bytes.unwrap() - inflated.resident_bytes.unwrap();
    assert!(fell >= INFLATED_MIB * MIB * 3 / 4, "{} MiB", fell / MIB);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    let deflated = balloon(driver, 0);
    // As much as was free before can be used again.
    let fill_mib = free_mib - 8;
    guest.run(&format!("fill all {fill_mib} 2")).unwrap();
    verify(&mut guest, "all", fill_mib, 2);
    verify(&mut guest, "kept", KEPT_MIB, 1);
    assert_eq!(deflated.faults.total(), 0, "{:?}", deflated.faults);
    assert!(guest.power_off().unwrap().success());

    let exits = |status: &Status| status.exits.unwrap();
    Exits {
        inflate: exits(&inflated) - exits(&before),
        deflate: exits(&deflated) - exits(&inflated),
    }
}

/// Sets the balloon by the command line, and tells what it took.
fn balloon(guest: &str, mib: u64) -> Status {
    let before = status(guest);
    let size = format!("{mib}MiB");
    let mut command = Command::new(program());
    let output = command.args(["balloon", guest, &size, "--timeout", "120s"]).output().unwrap();
    let (code, out, err) = told(&output);
    assert_eq!(code, Some(0), "{out}{err}");
    let after = status(guest);
    assert_eq!(after.balloon.actual_bytes, mib * MIB);
    let exits = after.exits.unwrap() - before.exits.unwrap();
    println!("{exits} exits; {out}");
    after
}

fn guests_end_as_they_should() {
    // A panic, which is the guest's fault and so a failure.
    let mut guest = builder("panics", VMLINUX).boot().unwrap();
    load(&mut guest, "");
    let end = guest.run("write /proc/sysrq-trigger c").unwrap_err().to_string();
    assert!(end.contains("exit status: 1"), "{end}");
    assert!(guest.console_log().contains("the kernel of panics panicked"), "{end}");
    drop(guest);

    // The monitor is asked to end.
    let guest = builder("ends", VMLINUX).boot().unwrap();
    let mut kill = Command::new("kill");
    assert!(kill.args(["-s", "TERM", &guest.pid().to_string()]).status().unwrap().success());
    assert!(guest.wait().unwrap().success());
}

fn builder(name: &str, kernel: &str) -> GuestBuilder {
    let path = |variable: &str| PathBuf::from(std::env::var_os(variable).unwrap());
    Guest::monitor(program(), path(kernel))
        .memory_mib(MEMORY_MIB)
        .initramfs(path(INITRAMFS))
        .machine_arguments(["--name", name])
}

fn load(guest: &mut Guest, driver: &str) {
    let needed = std::env::var(MODULES).unwrap();
    for module in needed.split(' ').chain([driver]).filter(|name| !name.is_empty()) {
        guest.run(&format!("insmod {module}")).unwrap();
    }
}

fn status(guest: &str) -> Status {
    let path: &Path = &control::socket_path(&guest.parse().unwrap()).unwrap();
    Client::connect(path).unwrap().status().unwrap()
}

fn verify(guest: &mut Guest, file: &str, mib: u64, seed: u64) {
    assert_eq!(number(guest, &format!("verify {file} {mib} {seed}")), 0, "wrong pages in {file}");
}

fn number(guest: &mut Guest, command: &str) -> u64 {
    guest.run(command).unwrap().text.parse().unwrap()
}
