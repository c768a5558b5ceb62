//! Disks of guests that migrate or restore, with guests that need no Linux.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use control::api::{MigrationPhase, MigrationStatus, StartMigration};
use lab::bare::{BareBuilder, BareGuest};
use lab::fuse::{Features, Fuse};

use crate::bare::{aerostat, builder, client, on_a_kvm, receiver};
use crate::program::program;

/// Bytes of a disk. Each of its 4 KiB blocks has data.
const DISK_BYTES: usize = 2 << 20;

/// Timeout of a process whose guest does not start, and of a disk request.
const LIMIT: Duration = Duration::from_secs(20);

fn image(directory: &Path, name: &str, seed: u64) -> PathBuf {
    let path = directory.join(name);
    let words = (0..DISK_BYTES as u64 / 8).map(|at| (at ^ (seed << 40)).to_le_bytes());
    fs::write(&path, words.flatten().collect::<Vec<_>>()).unwrap();
    path
}

fn with_disks(builder: BareBuilder, disks: &[&Path], suffix: &str) -> BareBuilder {
    disks.iter().fold(builder, |builder, disk| {
        builder.argument("--disk").argument(format!("{}{suffix}", disk.display()))
    })
}

fn words(disks: &[&Path]) -> Vec<String> {
    disks.iter().flat_map(|disk| ["--disk".to_owned(), disk.display().to_string()]).collect()
}

/// Migrates the guest to a destination with these arguments. An error has the output of both sides.
fn migrate(guest: &BareGuest, arguments: &[String]) -> Result<BareGuest, String> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let (there, address) = receiver("disks", &arguments);
    let (code, out, err) = aerostat(guest, &["migrate", "disks", &address, "--plain"]);
    match code {
        Some(0) => Ok(there),
        _ => Err(format!("{out}{err}{}", there.errors())),
    }
}

#[test]
fn a_guest_migrates_only_to_its_own_disks_in_order() {
    on_a_kvm("bare_disks::a_guest_migrates_only_to_its_own_disks_in_order", || {
        let directory = tempfile::tempdir().unwrap();
        let [first, second, other] = [("a", 1), ("b", 2), ("other", 3)]
            .map(|(name, seed)| image(directory.path(), name, seed));
        let mut guest = with_disks(builder("disks"), &[&first, &second], "").boot().unwrap();
        guest.run("fill 8 8 1").unwrap();

        let said = migrate(&guest, &words(&[&second, &first])).err().unwrap();
        assert!(said.contains("is not disk 1 of the guest"), "{said}");
        assert!(said.contains("the order is wrong") && said.contains("disk 2"), "{said}");
        let said = migrate(&guest, &words(&[&first, &other])).err().unwrap();
        assert!(said.contains("is not disk 2 of the guest"), "{said}");
        assert!(said.contains("inode ") && said.contains("--accept-disks"), "{said}");
        // The guest continues unchanged.
        guest.run("check 8 8 1").unwrap();

        // The same files under other names.
        let link = directory.path().join("link");
        fs::hard_link(&first, &link).unwrap();
        let mut there = migrate(&guest, &words(&[&link, &second])).unwrap();
        there.run("check 8 8 1").unwrap();
        assert!(guest.wait_for_end(LIMIT).unwrap().success());
        // A second migration, back.
        let said = migrate(&there, &words(&[&second, &first])).err().unwrap();
        assert!(said.contains("the order is wrong"), "{said}");
        let mut last = migrate(&there, &words(&[&first, &second])).unwrap();
        last.run("check 8 8 1").unwrap();
        last.power_off().unwrap();

        // A different disk that the operator accepts.
        let guest = with_disks(builder("disks"), &[&first], "").boot().unwrap();
        let mut accepted = words(&[&other]);
        accepted.push("--accept-disks".into());
        let mut there = migrate(&guest, &accepted).unwrap();
        let warned = |text: &str| text.contains("another disk is accepted").then_some(());
        there.wait_for_error("a warning", warned).unwrap();
        there.power_off().unwrap();
    });
}

/// Sends a request to the guest's only disk and returns its status.
fn request(guest: &mut BareGuest, kind: u32, sector: u32) -> u64 {
    let before = guest.number("done").unwrap();
    guest.run(&format!("disk 1 {kind:x} {sector:x}")).unwrap();
    let end = Instant::now() + LIMIT;
    while guest.number("done").unwrap() == before {
        assert!(Instant::now() < end, "{}", guest.errors());
    }
    guest.number("status").unwrap()
}

const WRITES: u32 = 1;
const FLUSHES: u32 = 4;

/// The kernel reports a write error once, and the migration syncs the disk before the guest
/// flushes.
#[test]
fn a_disk_write_error_reaches_the_guest_before_it_migrates() {
    on_a_kvm("bare_disks::a_disk_write_error_reaches_the_guest_before_it_migrates", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Features::ALL).unwrap());
        fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
        let path = fuse.path().join("disk");
        let mut guest = with_disks(builder("disks"), &[&path], "").boot().unwrap();
        assert_eq!(request(&mut guest, WRITES, 3), 0);
        let arguments = ["--disk", path.to_str().unwrap()];
        let (mut there, address) = receiver("disks", &arguments);
        let migrate = ["migrate", "disks", &address, "--plain"];
        fuse.fail_syncs(1);
        for _ in 0..2 {
            let (code, out, err) = aerostat(&guest, &migrate);
            assert_eq!(code, Some(1), "{out}{err}");
            assert!(err.contains(path.to_str().unwrap()), "{out}{err}");
            assert!(err.contains("lost writes of the guest"), "{out}{err}");
            assert!(err.contains("hint: check the host's disk"), "{out}{err}");
        }
        assert_eq!(request(&mut guest, FLUSHES, 0), 1, "the error was not reported");
        assert_eq!(request(&mut guest, FLUSHES, 0), 0, "the error was reported twice");
        let (code, out, err) = aerostat(&guest, &migrate);
        assert_eq!(code, Some(0), "{out}{err}{}", there.errors());
        assert_eq!(request(&mut there, FLUSHES, 0), 0);
        there.power_off().unwrap();
    });
}

/// A driver that resets its disk receives no status of a pending flush.
#[test]
fn a_flush_error_survives_a_disk_reset() {
    on_a_kvm("bare_disks::a_flush_error_survives_a_disk_reset", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Features::ALL).unwrap());
        fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
        let path = fuse.path().join("disk");
        let mut guest = with_disks(builder("disks"), &[&path], "").boot().unwrap();
        assert_eq!(request(&mut guest, WRITES, 3), 0);
        fuse.slow_syncs(LIMIT * 10);
        fuse.fail_syncs(1);
        guest.run(&format!("disk 1 {FLUSHES:x} 0")).unwrap();
        fuse.wait_for_sync();
        guest.run("reset 1").unwrap();
        fuse.slow_syncs(Duration::ZERO);
        // The virtqueue restarts.
        guest.run(&format!("disk 1 {FLUSHES:x} 0")).unwrap();
        let end = Instant::now() + LIMIT;
        while guest.number("done").unwrap() != 1 {
            assert!(Instant::now() < end, "{}", guest.errors());
        }
        assert_eq!(guest.number("status").unwrap(), 1, "the error was not reported");
        assert_eq!(request(&mut guest, FLUSHES, 0), 0, "the error was reported twice");
        guest.power_off().unwrap();
    });
}

/// Old writes may take a while to sync. The peer does not wait meanwhile, and the operator sees the
/// phase.
#[test]
fn disks_are_synced_before_connecting_and_the_sync_can_be_cancelled() {
    on_a_kvm(
        "bare_disks::disks_are_synced_before_connecting_and_the_sync_can_be_cancelled",
        || {
            let (directory, fuse) =
                (tempfile::tempdir().unwrap(), Fuse::mount(Features::ALL).unwrap());
            fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
            let path = fuse.path().join("disk");
            let mut guest = with_disks(builder("disks"), &[&path], "").boot().unwrap();
            assert_eq!(request(&mut guest, WRITES, 3), 0);
            // Longer than any timeout.
            fuse.slow_syncs(LIMIT * 10);
            let vmm = client(&guest, "disks");
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let to = listener.local_addr().unwrap().to_string();
            vmm.start_migration(&StartMigration { to, ..StartMigration::default() }).unwrap();
            let wait_for = |what: &str, is: &dyn Fn(&MigrationStatus) -> bool| {
                let end = Instant::now() + LIMIT;
                loop {
                    let status = vmm.migration().unwrap();
                    if is(&status) {
                        return status;
                    }
                    assert!(Instant::now() < end, "{what}: {status:?}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            };
            wait_for("a sync", &|status| status.phase == Some(MigrationPhase::SyncDisks));
            let accepted = listener.accept().map(drop).unwrap_err();
            assert_eq!(accepted.kind(), std::io::ErrorKind::WouldBlock);
            vmm.cancel_migration().unwrap();
            let status = wait_for("the end", &|status| status.state.is_over());
            assert_eq!(status.error.as_deref(), Some("cancelled"));
            assert_eq!(guest.run("ping 7").unwrap(), "7");
            // A pending sync is not forgotten. The guest migrates once the disk has answered.
            let (there, to) = receiver("disks", &["--disk", path.to_str().unwrap()]);
            let (code, out, err) = aerostat(&guest, &["migrate", "disks", &to, "--plain"]);
            assert_eq!(code, Some(1), "{out}{err}");
            assert!(err.contains(path.to_str().unwrap()), "{out}{err}");
            fuse.slow_syncs(Duration::ZERO);
            let (code, out, err) = aerostat(&guest, &["migrate", "disks", &to, "--plain"]);
            assert_eq!(code, Some(0), "{out}{err}{}", there.errors());
            there.power_off().unwrap();
        },
    );
}

/// For names of any length and content.
#[test]
fn a_disk_mismatch_error_escapes_names_and_has_a_hint() {
    on_a_kvm("bare_disks::a_disk_mismatch_error_escapes_names_and_has_a_hint", || {
        let directory = tempfile::tempdir().unwrap();
        // A right-to-left override and a line separator.
        let names =
            ["x\u{202e}y".repeat(20), "\u{2028}z".repeat(40), "n".repeat(200), "o".repeat(200)];
        let deep = directory.path().join(names.iter().collect::<PathBuf>());
        fs::create_dir_all(&deep).unwrap();
        let [disk, other] = [("a", 1), ("other", 2)].map(|(name, seed)| image(&deep, name, seed));
        let guest = with_disks(builder("disks"), &[&disk], "").boot().unwrap();
        let (mut there, address) = receiver("disks", &["--disk", other.to_str().unwrap()]);
        let (code, out, err) = aerostat(&guest, &["migrate", "disks", &address, "--plain"]);
        assert_eq!(code, Some(1), "{out}{err}");
        let refused = |text: &str| text.contains("is not disk 1").then(|| text.to_owned());
        let log = there.wait_for_error("the refusal", refused).unwrap();
        for said in [err, log] {
            let said = said.lines().find(|line| line.contains("is not disk 1")).unwrap();
            assert!(said.contains("oo/other is not disk 1 of the guest"), "{said}");
            assert!(said.contains("oo/a: it"), "{said}");
            assert!(said.contains("or give --accept-disks to use these instead"), "{said}");
            assert!(!said.contains(['\u{202e}', '\u{2028}']), "{said}");
        }
    });
}

/// Sampling the disk takes seconds on both sides, each piece of it little.
#[test]
fn a_guest_with_a_slow_disk_migrates() {
    on_a_kvm("bare_disks::a_guest_with_a_slow_disk_migrates", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Features::ALL).unwrap());
        fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
        let path = fuse.path().join("disk");
        let guest = with_disks(builder("disks"), &[&path], ",readonly").boot().unwrap();
        // For each of 192 pieces.
        fuse.slow_down(Duration::from_millis(30), u64::MAX);
        let word = format!("{},readonly", path.display());
        let there = migrate(&guest, &["--disk".into(), word]).unwrap();
        there.power_off().unwrap();
    });
}

/// It blocks neither the source nor the next migration.
#[test]
fn a_destination_with_a_dead_disk_reports_it_and_accepts_the_next_migration() {
    on_a_kvm(
        "bare_disks::a_destination_with_a_dead_disk_reports_it_and_accepts_the_next_migration",
        || {
            let (directory, fuse) =
                (tempfile::tempdir().unwrap(), Fuse::mount(Features::ALL).unwrap());
            let disk = image(directory.path(), "a", 1);
            fuse.put("disk", fs::read(&disk).unwrap());
            let mut guest = with_disks(builder("disks"), &[&disk], ",readonly").boot().unwrap();
            let path = fuse.path().join("disk");
            let word = format!("{},readonly", path.display());
            let (there, to) = receiver("disks", &["--disk", &word]);
            let migrate = ["migrate", "disks", &to, "--plain"];
            fuse.die();
            for says in ["did not finish a request in", "an earlier read has not returned"] {
                let (code, out, err) = aerostat(&guest, &migrate);
                assert_eq!(code, Some(1), "{out}{err}");
                assert!(err.contains(path.to_str().unwrap()) && err.contains(says), "{out}{err}");
            }
            assert_eq!(guest.run("ping 7").unwrap(), "7");
            fuse.revive();
            let end = Instant::now() + LIMIT;
            loop {
                let (code, out, err) = aerostat(&guest, &migrate);
                if code == Some(0) {
                    break;
                }
                // The earlier read returns eventually.
                assert!(Instant::now() < end && err.contains("an earlier read"), "{out}{err}");
            }
            there.power_off().unwrap();
        },
    );
}

/// Restores a guest from a snapshot. An error has the output of a failed start.
fn restore(file: &Path, disks: &[&Path], more: &[&str]) -> Result<BareGuest, String> {
    let restore = BareBuilder::command(program(), "restore", "restored").unwrap();
    let restore = with_disks(restore.argument(file), disks, ",readonly");
    let mut guest = restore.arguments(more.iter().copied()).start().unwrap();
    match guest.run("check 8 8 1") {
        Ok(_) => Ok(guest),
        Err(error) => {
            let status = guest.wait_for_end(LIMIT).unwrap();
            assert_eq!(status.code(), Some(1), "{error}");
            Err(guest.errors())
        }
    }
}

#[test]
fn a_guest_restores_with_its_own_disks_or_copies() {
    on_a_kvm("bare_disks::a_guest_restores_with_its_own_disks_or_copies", || {
        let directory = tempfile::tempdir().unwrap();
        let [first, second, other] = [("a", 1), ("b", 2), ("other", 3)]
            .map(|(name, seed)| image(directory.path(), name, seed));
        let run = with_disks(builder("disks"), &[&first, &second], ",readonly");
        let mut guest = run.boot().unwrap();
        guest.run("fill 8 8 1").unwrap();
        let file = directory.path().join("snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "disks", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");

        let said = restore(&file, &[&second, &first], &[]).err().unwrap();
        assert!(said.contains("the order is wrong"), "{said}");
        let said = restore(&file, &[&first, &other], &[]).err().unwrap();
        assert!(said.contains("samples differ") && said.contains("--accept-disks"), "{said}");
        restore(&file, &[&first, &other], &["--accept-disks"]).unwrap().power_off().unwrap();
        restore(&file, &[&first, &second], &[]).unwrap().power_off().unwrap();
        // After that guest ended, copies work too. Its own files do not once they have changed.
        guest.power_off().unwrap();
        let copy = directory.path().join("copy");
        fs::copy(&first, &copy).unwrap();
        restore(&file, &[&copy, &second], &["--lazy"]).unwrap().power_off().unwrap();
        image(directory.path(), "a", 4);
        let said = restore(&file, &[&first, &second], &[]).err().unwrap();
        assert!(said.contains("is not disk 1 of the guest"), "{said}");
    });
}
