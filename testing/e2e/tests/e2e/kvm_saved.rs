//! Snapshots of running guests, their restore, and disks.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use control::api::{MigrationState, MigrationStatus, MigrationSummary};
use lab::{Guest, LabError};

use crate::kvm::{
    BLOCK, INITRAMFS, MIB, NESTED_MODULES, OURS, STOCK, VMLINUX, VMLINUZ, builder, inside_of_a_kvm,
    load, number, run, signal, verify,
};
use crate::kvm_move::{leave_in_doubt, loses_the_commit, migrate, receiver, resolve};
use crate::program::{lab_program, outcome, program};

/// Memory of the guest, balloon target, and size of a file in guest memory, in MiB.
const MEMORY_MIB: u64 = 256;
const INFLATED_MIB: u64 = 64;
const KEPT_MIB: u64 = 32;

/// Size of a file system that is too small for a snapshot.
const SMALL_MIB: u64 = 8;

/// Size of a snapshot without memory: header, table, state.
const OVERHEAD_BYTES: u64 = 2 << 20;

/// Header of the snapshot file. Pages of memory follow.
const HEAD_BYTES: u64 = 4096;

/// Size of a disk, and of a hole punched in it.
const DISK_MIB: u64 = 24;
const HOLE_MIB: u64 = 4;

/// Timeout of a copy of such a disk by an emulated guest that migrates meanwhile.
const COPY_LIMIT: Duration = Duration::from_secs(120);

/// Kernel message for a new generation ID mixed into the random pool, and how to print it: it is a
/// notice (level 5), and the guests' kernels are quiet.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
const PRINTS_NOTICES: &str = "write /proc/sys/kernel/printk 6";
const QUIET: &str = "write /proc/sys/kernel/printk 1";

/// Random values drawn in each copy of a guest.
const DRAWN: usize = 4;

/// Timeout for the end of a guest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Guests with memory at a time: source and destination, or the file of one.
const GUESTS: u64 = 2;

#[test]
fn guests_restore_from_snapshots_and_use_disks() {
    inside_of_a_kvm("kvm_saved::inside", GUESTS * MEMORY_MIB);
}

#[test]
#[ignore = "another test runs it on a KVM"]
fn inside() {
    assert!(std::env::var_os(VMLINUZ).is_some(), "another test runs this on a machine with a KVM");
    let start = Instant::now();
    a_guest_restores_from_a_snapshot();
    println!("files after {:.1?}", start.elapsed());
    a_guest_that_uses_nested_kvm_cannot_migrate();
    println!("nested after {:.1?}", start.elapsed());
    disks_work_before_and_after_a_migration();
    println!("disks after {:.1?}", start.elapsed());
    the_demo_shows_a_live_migration();
    println!("demo after {:.1?}", start.elapsed());
}

fn a_guest_restores_from_a_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("guest.snapshot");
    let mut guest = builder(OURS, VMLINUX).memory_mib(MEMORY_MIB).boot().unwrap();
    load(&mut guest, OURS);
    run(&mut guest, &format!("fill kept {KEPT_MIB} 1"));
    let balloon = ["balloon", OURS, "64MiB", "--timeout", "60s"];
    assert_eq!(aerostat(&balloon).0, Some(0));
    a_full_disk_leaves_no_file(&mut guest, &directory.path().join("small"));

    assert!(!virtualizes(&mut guest));
    // The vCPU does not have virtualisation.
    let (last, first) = nested_modules();
    first.iter().for_each(|module| drop(run(&mut guest, &format!("insmod {module}"))));
    guest.run(&format!("insmod {last}")).unwrap_err();
    run(&mut guest, PRINTS_NOTICES);
    let summary = saved(&file, &["--drop-caches"]);
    let mut values = drawn(&mut guest);
    assert!(!guest.console_log().contains(RESEEDED), "{}", guest.console_log());
    assert_eq!(summary.balloon_bytes, INFLATED_MIB * MIB);
    assert!(summary.free_bytes > 0 && summary.downtime.total_ms > 0.0, "{summary:?}");
    let size = fs::metadata(&file).unwrap();
    assert!(size.len() > MEMORY_MIB * MIB);
    // Free, ballooned and zero pages take no space.
    let most = summary.sent_bytes + OVERHEAD_BYTES;
    let allocated = size.blocks() * 512;
    println!("{} MiB allocated, {summary:?}", allocated / MIB);
    assert!(allocated <= most && most < MEMORY_MIB * MIB / 2, "{allocated} of {most}");
    let path = file.to_str().unwrap();
    let (code, text) = aerostat(&["snapshot", OURS, path]);
    assert!(code == Some(1) && text.contains("exists"), "{text}");
    // The guest continues, and its later writes are not in the file.
    run(&mut guest, "drop kept");
    run(&mut guest, &format!("fill kept {KEPT_MIB} 2"));
    assert!(guest.power_off().unwrap().success());

    for lazy in [false, true] {
        let mut guest = restored(&file, lazy);
        reseeds(&guest);
        values.extend(drawn(&mut guest));
        run(&mut guest, QUIET);
        verify(&mut guest, "kept", KEPT_MIB, 1);
        if lazy {
            // Uses the ballooned memory and the pages not loaded yet.
            let (code, text) = aerostat(&["balloon", "again", "0", "--timeout", "60s"]);
            assert_eq!(code, Some(0), "{text}");
            let free_mib = number(&mut guest, "free-mib") - MEMORY_MIB / 8;
            run(&mut guest, &format!("fill all {free_mib} 3"));
            verify(&mut guest, "all", free_mib, 3);
            verify(&mut guest, "kept", KEPT_MIB, 1);
            assert!(guest.power_off().unwrap().success());
        } else {
            // A reset ends it too, and is no failure.
            let end = guest.run_within("write /proc/sysrq-trigger b", ANSWER_TIMEOUT).unwrap_err();
            assert!(matches!(end, LabError::Ended { .. }), "{end}");
            assert!(guest.wait().unwrap().success(), "{}", guest.console_log());
        }
    }
    println!("{values:?}");
    let different: BTreeSet<_> = values.iter().collect();
    assert_eq!((different.len(), values.len()), (3 * DRAWN, 3 * DRAWN), "{values:?}");
    damaged_files_are_refused(&file);
}

/// Waits until the kernel has detected the new generation ID.
fn reseeds(guest: &Guest) {
    let end = Instant::now() + ANSWER_TIMEOUT;
    while !guest.console_log().contains(RESEEDED) {
        assert!(Instant::now() < end, "{}", guest.console_log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Random values as a program in the guest gets them.
fn drawn(guest: &mut Guest) -> Vec<String> {
    let draw = |_| run(guest, "cat /proc/sys/kernel/random/uuid").lines.concat();
    (0..DRAWN).map(draw).collect()
}

/// The guest's kernel has virtualization enabled, as where a distribution loads KVM at boot.
fn a_guest_that_uses_nested_kvm_cannot_migrate() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("guest.snapshot");
    let path = file.to_str().unwrap();
    let nested = builder(STOCK, VMLINUX).machine_arguments(["--nested"]);
    let mut guest = nested.memory_mib(MEMORY_MIB).boot().unwrap();
    assert!(virtualizes(&mut guest));
    let (last, first) = nested_modules();
    first.iter().for_each(|module| drop(run(&mut guest, &format!("insmod {module}"))));
    let refused = |guest: &mut Guest, name: &str| {
        run(guest, &format!("insmod {last}"));
        // The command fails before it connects: there is no listener.
        for command in [&["snapshot", name, path][..], &["migrate", name, "127.0.0.1:1", "--plain"]]
        {
            let (code, text) = aerostat(command);
            let said = text.contains("virtualization enabled") && text.contains("rmmod");
            assert!(code == Some(1) && said && text.contains("still runs"), "{command:?} {text}");
        }
        assert!(fs::read_dir(directory.path()).unwrap().next().is_none());
        // The kernel's module names have underscores, whatever the file name.
        run(guest, &format!("rmmod {}", last.replace('-', "_")));
    };
    refused(&mut guest, STOCK);
    let summary = saved_as(STOCK, &file, &[]);
    println!("nested: {summary:?}");
    assert!(guest.power_off().unwrap().success());
    let mut guest = restored(&file, false);
    fs::remove_file(&file).unwrap();
    assert!(virtualizes(&mut guest));
    refused(&mut guest, "again");
    assert!(guest.power_off().unwrap().success());
}

/// Whether a guest's vCPU has virtualisation.
fn virtualizes(guest: &mut Guest) -> bool {
    let lines = run(guest, "cat /proc/cpuinfo").lines;
    let flags = lines.iter().find(|line| line.starts_with("flags")).unwrap();
    flags.split_whitespace().any(|flag| ["svm", "vmx"].contains(&flag))
}

/// The module that switches virtualization on, and its dependencies.
fn nested_modules() -> (String, Vec<String>) {
    let names = std::env::var(NESTED_MODULES).unwrap();
    let mut names: Vec<_> = names.split(' ').map(str::to_owned).collect();
    (names.pop().unwrap(), names)
}

fn a_full_disk_leaves_no_file(guest: &mut Guest, small: &Path) {
    fs::create_dir(small).unwrap();
    let size = format!("size={SMALL_MIB}m");
    let small = small.to_str().unwrap();
    let mount = ["-t", "tmpfs", "-o", &size, "tmpfs", small];
    assert!(Command::new("mount").args(mount).status().unwrap().success());
    let (code, text) = aerostat(&["snapshot", OURS, &format!("{small}/guest")]);
    let left = fs::read_dir(small).unwrap().count();
    assert!(Command::new("umount").arg(small).status().unwrap().success());
    assert!(code == Some(1) && text.contains("No space left"), "{code:?} {text}");
    assert!(text.contains("still runs"), "{text}");
    assert_eq!(left, 0);
    verify(guest, "kept", KEPT_MIB, 1);
}

fn damaged_files_are_refused(file: &Path) {
    let open = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let len = open.metadata().unwrap().len();
    let page = first_data(&open);
    let mut byte = [0];
    open.read_exact_at(&mut byte, page).unwrap();
    open.write_all_at(&[!byte[0]], page).unwrap();
    let path = file.to_str().unwrap();
    let (code, text) = aerostat(&["restore", path, "--name", "again"]);
    assert!(code == Some(1) && text.contains("damaged"), "{code:?} {text}");
    // A lazy restore finds the damage when it loads the page, and ends the guest.
    let (code, text) = aerostat(&["restore", path, "--name", "again", "--lazy"]);
    assert!(code == Some(1) && text.contains("damaged"), "{code:?} {text}");
    open.write_all_at(&byte, page).unwrap();

    open.set_len(len - 1).unwrap();
    let (code, text) = aerostat(&["restore", path, "--name", "again"]);
    let both = format!("it has {} bytes of the {len} that were written", len - 1);
    assert!(code == Some(1) && text.contains(&both), "{code:?} {text}");
}

/// Offset of the first memory byte in the file.
fn first_data(file: &File) -> u64 {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Data(HEAD_BYTES)).unwrap()
}

fn restored(file: &Path, lazy: bool) -> Guest {
    let mut words = vec![file.to_str().unwrap(), "--name", "again"];
    words.extend(lazy.then_some("--lazy"));
    let began = Instant::now();
    let mut guest = Guest::restored(program()).machine_arguments(words).boot().unwrap();
    run(&mut guest, "free-mib");
    println!(
        "restored{} and answers after {:.1?}",
        if lazy { " lazily" } else { "" },
        began.elapsed()
    );
    guest
}

fn saved(file: &Path, arguments: &[&str]) -> MigrationSummary {
    saved_as(OURS, file, arguments)
}

fn saved_as(name: &str, file: &Path, arguments: &[&str]) -> MigrationSummary {
    let mut command = Command::new(program());
    command.args(["snapshot", name, file.to_str().unwrap(), "--json"]).args(arguments);
    let (code, out, err) = outcome(&command.output().unwrap());
    assert_eq!(code, Some(0), "{out}{err}");
    let status: MigrationStatus = serde_json::from_str(&out).unwrap();
    assert_eq!(status.state, MigrationState::Saved);
    status.summary.unwrap()
}

/// A read-only disk, and one to which it is copied while the guest migrates.
fn disks_work_before_and_after_a_migration() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).into_os_string().into_string().unwrap();
    let (from, to) = (path("from"), path("to"));
    let mut contents = vec![0; usize::try_from(DISK_MIB * MIB).unwrap()];
    fastrand::Rng::with_seed(7).fill(&mut contents);
    fs::write(&from, &contents).unwrap();
    File::create(&to).unwrap().set_len(DISK_MIB * MIB).unwrap();

    let disks = ["--disk", &format!("{from},readonly"), "--disk", &to];
    let mut first =
        builder(STOCK, VMLINUX).memory_mib(MEMORY_MIB).machine_arguments(disks).boot().unwrap();
    load(&mut first, STOCK);
    run(&mut first, &format!("insmod {BLOCK}"));
    let sectors = run(&mut first, "cat /sys/block/vdb/size").lines;
    assert_eq!(sectors, [(DISK_MIB * MIB / 512).to_string()]);
    assert_eq!(run(&mut first, "cat /sys/block/vda/ro").lines, ["1"]);
    assert!(first.run("copy /dev/vdb /dev/vda 1").is_err());
    run(&mut first, "copy /dev/vda /dev/vdb 4");
    assert_eq!(fs::read(&to).unwrap()[..4 << 20], contents[..4 << 20]);
    let (code, text) = aerostat(&["snapshot", STOCK, &path("snapshot")]);
    assert!(code == Some(1) && text.contains("a writable disk"), "{text}");
    is_in_use(&to);

    let control = path("control");
    // Connections need it, as in `kvm_move`.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    let (mut without, address) = receiver(STOCK, &["--plain", "--control", &control]);
    let (code, text) = aerostat(&["migrate", STOCK, &address, "--plain"]);
    assert!(code == Some(1) && text.contains("still runs here"), "{text}");
    assert!(without.console_log().contains("had the disks"), "{}", without.console_log());
    signal(&without, "KILL");
    without.wait().unwrap();

    let there = [&["--plain", "--control", &control], &disks[..]].concat();
    let (mut second, address) = receiver(STOCK, &there);
    only_one_side_owns_the_disks(&first, &control, &address, &to);
    assert!(first.wait().unwrap().success(), "{}", first.console_log());
    run(&mut second, "copy /dev/vda /dev/vdb 8");
    assert_eq!(fs::read(&to).unwrap()[..8 << 20], contents[..8 << 20]);
    is_in_use(&to);

    let (mut third, address) = receiver(STOCK, &[&["--plain"], &disks[..]].concat());
    let copy = format!("copy /dev/vda /dev/vdb {DISK_MIB}");
    let copying = second.send(&copy).unwrap();
    let summary = migrate(&control, &address, &["--plain"]);
    println!("with disks: {:?}", summary.downtime);
    assert!(second.wait().unwrap().success(), "{}", second.console_log());
    // The copy may end before or after the migration.
    third.continue_from(&mut second);
    let copied = third.answer(copying, &copy, COPY_LIMIT);
    copied.unwrap_or_else(|error| panic!("{error}\n{}", third.console_log()));
    run(&mut third, "sync");
    assert!(fs::read(&to).unwrap() == contents, "the disk has not what the guest wrote");

    let blocks = fs::metadata(&to).unwrap().blocks();
    run(&mut third, &format!("punch /dev/vdb 8 {HOLE_MIB}"));
    let hole = usize::try_from(8 * MIB).unwrap()..usize::try_from((8 + HOLE_MIB) * MIB).unwrap();
    contents[hole].fill(0);
    assert!(fs::read(&to).unwrap() == contents, "a hole is not where it should be");
    assert!(blocks - fs::metadata(&to).unwrap().blocks() >= HOLE_MIB * MIB / 512);
    signal(&third, "INT");
    assert!(third.wait().unwrap().success(), "{}", third.console_log());
}

/// Asserts that no other guest can use this disk.
fn is_in_use(disk: &str) {
    let kernel = std::env::var(VMLINUX).unwrap();
    let other = ["run", "--name", "other", "--memory", "32MiB", "--kernel", &kernel, "--disk"];
    for disk in [disk.to_owned(), format!("{disk},readonly")] {
        let (code, text) = aerostat(&[&other[..], &[&disk]].concat());
        let said = text.contains("is in use: another guest has this disk");
        assert!(code == Some(1) && said && text.contains("end that guest first"), "{text}");
    }
}

/// The commit is lost. No other guest can use the disks meanwhile. If two operators each run the
/// guest on their side, one of them fails.
fn only_one_side_owns_the_disks(first: &Guest, control: &str, address: &str, disk: &str) {
    let network = loses_the_commit(address);
    leave_in_doubt(first, STOCK, control, &network.address);
    is_in_use(disk);
    let text = resolve(control, &["--run-here"]).unwrap();
    assert!(text.contains("runs here"), "{text}");
    let text = resolve(STOCK, &["--run-here"]).unwrap_err();
    assert!(text.contains("is in use"), "{text}");
    let text = resolve(STOCK, &[]).unwrap();
    assert!(text.contains("runs on the other side"), "{text}");
}

/// Runs the demo as on a host with KVM.
fn the_demo_shows_a_live_migration() {
    let [kernel, initramfs] = [VMLINUX, INITRAMFS].map(|name| std::env::var(name).unwrap());
    let words = ["demo", "--migrate", "--parts", &kernel, &initramfs, "virtio_mmio", OURS];
    let (code, text) = run_to_end(&lab_program(), &words);
    assert_eq!(code, Some(0), "{text}");
    let lines = |what: &str| text.lines().filter(|line| line.contains(what)).count();
    // The guest answers before, during and after the migration.
    assert!(lines("first process   the guest answers: up for") > 4, "{text}");
    assert!(lines("second process  the guest answers: up for") >= 4, "{text}");
    for expected in ["round 0", "written before are unchanged", "migrated to the second"] {
        assert_eq!(lines(expected), 1, "{expected} in {text}");
    }
}

/// Runs `aerostat`. Returns its exit code and all output.
fn aerostat(words: &[&str]) -> (Option<i32>, String) {
    run_to_end(program(), words)
}

fn run_to_end(program: &Path, words: &[&str]) -> (Option<i32>, String) {
    let (code, out, err) = outcome(&Command::new(program).args(words).output().unwrap());
    (code, out + &err)
}
