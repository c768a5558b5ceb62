//! Which disks a guest goes on with, with guests that need no Linux.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use control::api::{MigrationPhase, MigrationStatus, StartMigration};
use lab::bare::{BareBuilder, BareGuest};
use lab::fuse::{Fuse, Has};

use crate::bare::{aerostat, builder, client, on_a_kvm, receiver};
use crate::program::program;

/// Bytes of a disk, with something in each of its 4 KiB.
const DISK_BYTES: usize = 2 << 20;

/// For a process that does not begin a guest.
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

/// Moves the guest to a destination with these arguments; what both sides said where it fails.
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
fn a_guest_moves_to_its_own_disks_in_their_order() {
    on_a_kvm("bare_disks::a_guest_moves_to_its_own_disks_in_their_order", || {
        let directory = tempfile::tempdir().unwrap();
        let [first, second, other] = [("a", 1), ("b", 2), ("other", 3)]
            .map(|(name, seed)| image(directory.path(), name, seed));
        let mut guest = with_disks(builder("disks"), &[&first, &second], "").boot().unwrap();
        guest.ask("fill 8 8 1").unwrap();

        let said = migrate(&guest, &words(&[&second, &first])).err().unwrap();
        assert!(said.contains("is not disk 1 of the guest"), "{said}");
        assert!(said.contains("the order is wrong") && said.contains("disk 2"), "{said}");
        let said = migrate(&guest, &words(&[&first, &other])).err().unwrap();
        assert!(said.contains("is not disk 2 of the guest"), "{said}");
        assert!(said.contains("inode ") && said.contains("--accept-disks"), "{said}");
        // It runs on with what it had.
        guest.ask("check 8 8 1").unwrap();

        // The same files by other names.
        let link = directory.path().join("link");
        fs::hard_link(&first, &link).unwrap();
        let mut there = migrate(&guest, &words(&[&link, &second])).unwrap();
        there.ask("check 8 8 1").unwrap();
        assert!(guest.wait_for_end(LIMIT).unwrap().success());
        // And from there on.
        let said = migrate(&there, &words(&[&second, &first])).err().unwrap();
        assert!(said.contains("the order is wrong"), "{said}");
        let mut last = migrate(&there, &words(&[&first, &second])).unwrap();
        last.ask("check 8 8 1").unwrap();
        last.power_off().unwrap();

        // Others that the operator wants.
        let guest = with_disks(builder("disks"), &[&first], "").boot().unwrap();
        let mut accepted = words(&[&other]);
        accepted.push("--accept-disks".into());
        let mut there = migrate(&guest, &accepted).unwrap();
        let warned = |text: &str| text.contains("another disk is accepted").then_some(());
        there.wait_for_error("a warning", warned).unwrap();
        there.power_off().unwrap();
    });
}

/// A request to its only disk: its status.
fn request(guest: &mut BareGuest, kind: u32, sector: u32) -> u64 {
    let before = guest.number("done").unwrap();
    guest.ask(&format!("disk 1 {kind:x} {sector:x}")).unwrap();
    let end = Instant::now() + LIMIT;
    while guest.number("done").unwrap() == before {
        assert!(Instant::now() < end, "{}", guest.errors());
    }
    guest.number("status").unwrap()
}

const WRITES: u32 = 1;
const FLUSHES: u32 = 4;

/// A kernel tells of an error once, and whoever moves the guest asks before it does.
#[test]
fn a_guest_hears_what_its_disk_lost_and_is_not_moved_before() {
    on_a_kvm("bare_disks::a_guest_hears_what_its_disk_lost_and_is_not_moved_before", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Has::ALL).unwrap());
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
        assert_eq!(request(&mut guest, FLUSHES, 0), 1, "it was not told");
        assert_eq!(request(&mut guest, FLUSHES, 0), 0, "it was told twice");
        let (code, out, err) = aerostat(&guest, &migrate);
        assert_eq!(code, Some(0), "{out}{err}{}", there.errors());
        assert_eq!(request(&mut there, FLUSHES, 0), 0);
        there.power_off().unwrap();
    });
}

/// A driver that resets its disk does not hear what the flush came to that was under way.
#[test]
fn a_driver_that_resets_its_disk_hears_of_an_error_when_it_flushes_again() {
    on_a_kvm(
        "bare_disks::a_driver_that_resets_its_disk_hears_of_an_error_when_it_flushes_again",
        || {
            let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Has::ALL).unwrap());
            fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
            let path = fuse.path().join("disk");
            let mut guest = with_disks(builder("disks"), &[&path], "").boot().unwrap();
            assert_eq!(request(&mut guest, WRITES, 3), 0);
            fuse.slow_syncs(LIMIT * 10);
            fuse.fail_syncs(1);
            guest.ask(&format!("disk 1 {FLUSHES:x} 0")).unwrap();
            fuse.wait_for_sync();
            guest.ask("reset 1").unwrap();
            fuse.slow_syncs(Duration::ZERO);
            // The ring begins anew.
            guest.ask(&format!("disk 1 {FLUSHES:x} 0")).unwrap();
            let end = Instant::now() + LIMIT;
            while guest.number("done").unwrap() != 1 {
                assert!(Instant::now() < end, "{}", guest.errors());
            }
            assert_eq!(guest.number("status").unwrap(), 1, "it was not told");
            assert_eq!(request(&mut guest, FLUSHES, 0), 0, "it was told twice");
            guest.power_off().unwrap();
        },
    );
}

/// What it wrote long ago may take a while, in which nobody waits at the other side and its operator
/// sees what is waited for.
#[test]
fn disks_are_synced_before_anybody_is_spoken_to_and_not_for_ever() {
    on_a_kvm("bare_disks::disks_are_synced_before_anybody_is_spoken_to_and_not_for_ever", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Has::ALL).unwrap());
        fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
        let path = fuse.path().join("disk");
        let mut guest = with_disks(builder("disks"), &[&path], "").boot().unwrap();
        assert_eq!(request(&mut guest, WRITES, 3), 0);
        // Longer than anybody would wait.
        fuse.slow_syncs(LIMIT * 10);
        let monitor = client(&guest, "disks");
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        nobody.set_nonblocking(true).unwrap();
        let to = nobody.local_addr().unwrap().to_string();
        monitor.start_migration(&StartMigration { to, ..StartMigration::default() }).unwrap();
        let wait_for = |what: &str, is: &dyn Fn(&MigrationStatus) -> bool| {
            let end = Instant::now() + LIMIT;
            loop {
                let status = monitor.migration().unwrap();
                if is(&status) {
                    return status;
                }
                assert!(Instant::now() < end, "{what}: {status:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        wait_for("a sync", &|status| status.phase == Some(MigrationPhase::SyncDisks));
        let accepted = nobody.accept().map(drop).unwrap_err();
        assert_eq!(accepted.kind(), std::io::ErrorKind::WouldBlock);
        monitor.cancel_migration().unwrap();
        let status = wait_for("the end", &|status| status.state.is_over());
        assert_eq!(status.error.as_deref(), Some("cancelled"));
        assert_eq!(guest.ask("ping 7").unwrap(), "7");
        // One that is under way is not forgotten, and the guest is moved when the disk answers.
        let (there, to) = receiver("disks", &["--disk", path.to_str().unwrap()]);
        let (code, out, err) = aerostat(&guest, &["migrate", "disks", &to, "--plain"]);
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(path.to_str().unwrap()), "{out}{err}");
        fuse.slow_syncs(Duration::ZERO);
        let (code, out, err) = aerostat(&guest, &["migrate", "disks", &to, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}{}", there.errors());
        there.power_off().unwrap();
    });
}

/// However long the names are, and whatever is in them.
#[test]
fn a_refusal_says_what_to_do_and_hides_nothing() {
    on_a_kvm("bare_disks::a_refusal_says_what_to_do_and_hides_nothing", || {
        let directory = tempfile::tempdir().unwrap();
        // Read from right to left, in another line.
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

/// What is read of a disk takes some seconds on both sides, and each piece of it little.
#[test]
fn a_guest_with_a_slow_disk_is_moved() {
    on_a_kvm("bare_disks::a_guest_with_a_slow_disk_is_moved", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Has::ALL).unwrap());
        fuse.put("disk", fs::read(image(directory.path(), "a", 1)).unwrap());
        let path = fuse.path().join("disk");
        let guest = with_disks(builder("disks"), &[&path], ",readonly").boot().unwrap();
        // Of 192 pieces.
        fuse.slow_down(Duration::from_millis(30), u64::MAX);
        let word = format!("{},readonly", path.display());
        let there = migrate(&guest, &["--disk".into(), word]).unwrap();
        there.power_off().unwrap();
    });
}

/// Neither the source nor the next guest waits for it.
#[test]
fn a_destination_whose_disk_is_dead_says_so_and_waits_again() {
    on_a_kvm("bare_disks::a_destination_whose_disk_is_dead_says_so_and_waits_again", || {
        let (directory, fuse) = (tempfile::tempdir().unwrap(), Fuse::mount(Has::ALL).unwrap());
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
        assert_eq!(guest.ask("ping 7").unwrap(), "7");
        fuse.revive();
        let end = Instant::now() + LIMIT;
        loop {
            let (code, out, err) = aerostat(&guest, &migrate);
            if code == Some(0) {
                break;
            }
            // The read of before comes back in its own time.
            assert!(Instant::now() < end && err.contains("an earlier read"), "{out}{err}");
        }
        there.power_off().unwrap();
    });
}

/// Runs a guest from its file: what was said where it is not begun.
fn restore(file: &Path, disks: &[&Path], more: &[&str]) -> Result<BareGuest, String> {
    let restore = BareBuilder::command(program(), "restore", "restored").unwrap();
    let restore = with_disks(restore.argument(file), disks, ",readonly");
    let mut guest = restore.arguments(more.iter().copied()).start().unwrap();
    match guest.ask("check 8 8 1") {
        Ok(_) => Ok(guest),
        Err(error) => {
            let status = guest.wait_for_end(LIMIT).unwrap();
            assert_eq!(status.code(), Some(1), "{error}");
            Err(guest.errors())
        }
    }
}

#[test]
fn a_guest_is_restored_with_its_own_disks_or_copies_of_them() {
    on_a_kvm("bare_disks::a_guest_is_restored_with_its_own_disks_or_copies_of_them", || {
        let directory = tempfile::tempdir().unwrap();
        let [first, second, other] = [("a", 1), ("b", 2), ("other", 3)]
            .map(|(name, seed)| image(directory.path(), name, seed));
        let run = with_disks(builder("disks"), &[&first, &second], ",readonly");
        let mut guest = run.boot().unwrap();
        guest.ask("fill 8 8 1").unwrap();
        let file = directory.path().join("snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "disks", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");

        let said = restore(&file, &[&second, &first], &[]).err().unwrap();
        assert!(said.contains("the order is wrong"), "{said}");
        let said = restore(&file, &[&first, &other], &[]).err().unwrap();
        assert!(said.contains("samples differ") && said.contains("--accept-disks"), "{said}");
        restore(&file, &[&first, &other], &["--accept-disks"]).unwrap().power_off().unwrap();
        restore(&file, &[&first, &second], &[]).unwrap().power_off().unwrap();
        // Once that guest has gone, copies do as well, and its own files do not once they changed.
        guest.power_off().unwrap();
        let copy = directory.path().join("copy");
        fs::copy(&first, &copy).unwrap();
        restore(&file, &[&copy, &second], &["--lazy"]).unwrap().power_off().unwrap();
        image(directory.path(), "a", 4);
        let said = restore(&file, &[&first, &second], &[]).err().unwrap();
        assert!(said.contains("is not disk 1 of the guest"), "{said}");
    });
}
