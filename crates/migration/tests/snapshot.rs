//! Snapshots: written while the guest runs, restored, damaged, and restored lazily.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{
    BALLOONED, Destination, FREE, POISON, Source, World, compare, quick_destination, quick_source,
};
use migration::observer::Silent;
use migration::snapshot::{After, SnapshotFile, restore, snapshot};
use migration::{MigrationError, SourceGuest};

/// Writes a snapshot of a new guest.
fn write(path: &Path, writes: u64, pattern: u32, after: After) -> (Arc<World>, Source) {
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, writes, pattern);
    let summary = snapshot(&quick_source(), &mut source, path, after, &mut Silent).unwrap();
    assert_eq!(summary.free_pages, FREE.1);
    assert_eq!(source.runs(), after == After::Resume);
    assert!(after == After::Stop || !source.logging);
    (world, source)
}

#[test]
fn a_restored_guest_equals_the_one_written() {
    let dir = tempfile::tempdir().unwrap();
    for (writes, pattern) in [(0, 0), (2000, 0), (2000, POISON)] {
        let path = dir.path().join(format!("{writes}-{pattern}"));
        let (world, source) = write(&path, writes, pattern, After::Stop);
        assert!(world.relinquished.load(Ordering::SeqCst));
        let mut destination = Destination::new(&world);
        restore(&quick_destination(), &mut destination, &path, &mut Silent).unwrap();
        assert!(destination.runs());
        compare(&source, &destination);
    }
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn a_guest_runs_on_after_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut source) = write(&dir.path().join("a"), 500, 0, After::Resume);
    // It can be written again, with the same contents.
    let path = dir.path().join("b");
    snapshot(&quick_source(), &mut source, &path, After::Stop, &mut Silent).unwrap();
    let mut destination = Destination::new(&source.world);
    restore(&quick_destination(), &mut destination, &path, &mut Silent).unwrap();
    compare(&source, &destination);
}

#[test]
fn unused_pages_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0, 0, After::Stop);
    let metadata = fs::metadata(&path).unwrap();
    let used = 330 - FREE.1 - BALLOONED.1 - 30;
    assert!(metadata.len() > 331 * 4096 + 300_000);
    let blocks = metadata.blocks() * 512;
    assert!(blocks < (used + 4) * 4096 + 320_000, "{blocks} bytes of {}", metadata.len());
}

#[test]
fn pages_can_be_read_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let (_, source) = write(&path, 100, 0, After::Stop);
    let file = SnapshotFile::open(&path).unwrap();
    let mut page = [0; 4096];
    assert!(file.read_page(3, &mut page).unwrap());
    assert_eq!(page[..], source.memory.bytes.read().unwrap()[3 * 4096..4 * 4096]);
    assert!(!file.read_page(BALLOONED.0, &mut page).unwrap());
    assert!(file.read_page(250, &mut page).is_err());
}

#[test]
fn a_damaged_file_is_refused_and_no_guest_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let (world, _) = write(&path, 0, 0, After::Stop);
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        let changed = dir.path().join("changed");
        fs::write(&changed, bytes).unwrap();
        let mut destination = Destination::new(&world);
        let restored = restore(&quick_destination(), &mut destination, &changed, &mut Silent);
        assert!(destination.memory.is_none() && !destination.runs());
        restored.unwrap_err()
    };
    // Header, memory, table, description, state.
    let tail = 331 * 4096;
    for at in [0, 8, 17, 4000, 5 * 4096 + 7, tail, tail + 1000, tail + 330 * 8 + 5, good.len() - 1]
    {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        let error = refused(&bytes);
        assert!(error.to_string().starts_with("file: "), "{at}: wrong culprit: {error}");
    }
    for len in [0, 100, 4096, 300 * 4096, good.len() - 1] {
        refused(&good[..len]);
    }
    refused(&[&good[..], &[0]].concat());
    assert!(!world.destination_runs.load(Ordering::SeqCst));
}

#[test]
fn a_failed_snapshot_leaves_the_guest_running_and_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 100, 0);
    let there = dir.path().join("there");
    fs::write(&there, b"x").unwrap();
    let nowhere = dir.path().join("no/such/directory");
    for path in [&there, &nowhere] {
        let failed = snapshot(&quick_source(), &mut source, path, After::Stop, &mut Silent);
        let failure = failed.unwrap_err();
        assert!(matches!(failure.guest, SourceGuest::Runs), "{failure:?}");
        assert!(source.runs() && !source.logging);
    }
    for step in ["save", "pause", "dirty"] {
        source.fails_at = Some(step);
        let path = dir.path().join(step);
        snapshot(&quick_source(), &mut source, &path, After::Stop, &mut Silent).unwrap_err();
        assert!(source.runs() && !path.exists());
    }
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

/// Opening a pipe does not block.
#[test]
fn a_pipe_is_refused_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    for path in [&pipe, dir.path()] {
        let error = SnapshotFile::open(path).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
    }
}

/// Another guest's valid snapshot of the same size is copied over an open one.
#[test]
fn a_file_that_changes_while_open_is_detected() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("a"), dir.path().join("b"));
    write(&path, 0, 0, After::Stop);
    write(&other, 2000, 0, After::Stop);
    let file = SnapshotFile::open(&path).unwrap();
    let before = fs::read(&path).unwrap();
    let after = fs::read(&other).unwrap();
    let differs = |page: &usize| {
        let at = 4096 * (1 + page);
        before[at..at + 4096] != after[at..at + 4096]
    };
    let page = (0..100).find(differs).unwrap() as u64;
    let mut out = [0; 4096];
    file.read_page(page, &mut out).unwrap();
    fs::write(&path, &after).unwrap();
    let read = file.read_page(page, &mut out);
    assert!(matches!(read, Err(MigrationError::DamagedFile { .. })), "{read:?}");
}

/// Another VMM with the same name writes the part.
#[test]
fn two_guests_are_not_written_into_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, part) = (dir.path().join("a"), dir.path().join("a.part"));
    fs::write(&part, b"another guest").unwrap();
    fs::set_permissions(&part, fs::Permissions::from_mode(0o600)).unwrap();
    let other = fs::File::open(&part).unwrap();
    other.lock().unwrap();
    let mut source = Source::new(&Arc::new(World::default()), 0, 0);
    let failed = snapshot(&quick_source(), &mut source, &path, After::Resume, &mut Silent);
    assert!(source.runs());
    let error = failed.unwrap_err().error;
    assert!(matches!(error, MigrationError::Operator { .. }), "{error:?}");
    assert_eq!(fs::read(&part).unwrap(), b"another guest");
    // Its process died, so its part is overwritten.
    drop(other);
    snapshot(&quick_source(), &mut source, &path, After::Resume, &mut Silent).unwrap();
    assert!(path.exists() && !part.exists());
}

/// All contents are written by then, and the disk may be slow.
#[test]
fn a_guest_is_resumed_before_its_file_is_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let mut source = Source::new(&Arc::new(World::default()), 100, 0);
    source.absent_at_resume = Some(path.clone());
    snapshot(&quick_source(), &mut source, &path, After::Resume, &mut Silent).unwrap();
    assert!(source.runs() && path.exists());
    // If the file cannot get its name, the snapshot fails and the guest runs on.
    let path = dir.path().join("b");
    source.absent_at_resume = None;
    source.takes = Some(path.clone());
    let failed = snapshot(&quick_source(), &mut source, &path, After::Resume, &mut Silent);
    let failure = failed.unwrap_err();
    assert!(source.runs() && matches!(failure.guest, SourceGuest::Runs), "{failure:?}");
    assert_eq!(fs::read(&path).unwrap(), b"another's");
}

/// A file system that is too small; unmounted on drop.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Option<Self> {
        use rustix::mount::{MountFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        match mount("none", dir.path(), "tmpfs", MountFlags::empty(), c"size=400k") {
            Ok(()) => Some(Self(dir)),
            Err(errno) => {
                eprintln!("SKIPPED: mounting tmpfs was refused: {errno}");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_leaves_the_guest_running_and_no_file() {
    let Some(small) = Small::mount() else { return };
    let world = Arc::new(World::default());
    let mut source = Source::new(&world, 100, 0);
    let path = small.0.path().join("a");
    let failed = snapshot(&quick_source(), &mut source, &path, After::Stop, &mut Silent);
    let failure = failed.unwrap_err();
    assert!(failure.error.chain().contains("No space left"), "{failure:?}");
    assert!(matches!(failure.guest, SourceGuest::Runs) && source.runs() && !source.logging);
    assert_eq!(fs::read_dir(small.0.path()).unwrap().count(), 0);
}

mod lazily {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};
    use std::sync::{Condvar, Mutex};
    use std::time::{Duration, Instant};

    use migration::snapshot::restore_lazily;
    use migration::traits::{
        Description, DestinationMachine, MachineError, PlacePages, StateSection, WritePages,
    };

    use super::*;

    #[derive(Default)]
    struct Missing {
        state: Mutex<State>,
        changed: Condvar,
        /// Discards this page when another one is being placed. The file's contents of both were
        /// read by then, or are about to be.
        discards: Mutex<Option<(u64, u64)>>,
    }

    #[derive(Default)]
    struct State {
        there: BTreeMap<u64, Vec<u8>>,
        awaited: VecDeque<u64>,
        discarded: BTreeSet<u64>,
    }

    impl Missing {
        /// The guest touches a page, and waits for it.
        fn touch(&self, page: u64) -> Vec<u8> {
            let mut state = self.state.lock().unwrap();
            if !state.there.contains_key(&page) {
                state.awaited.push_back(page);
            }
            let is_missing = |state: &mut State| !state.there.contains_key(&page);
            let time = Duration::from_secs(10);
            let waited = self.changed.wait_timeout_while(state, time, is_missing);
            waited.unwrap().0.there[&page].clone()
        }

        fn discard(&self, page: u64) {
            let mut state = self.state.lock().unwrap();
            state.discarded.insert(page);
            state.there.remove(&page);
        }

        fn put(&self, page: u64, contents: Option<&[u8; 4096]>) {
            let contents = contents.map_or_else(|| vec![0; 4096], |contents| contents.to_vec());
            self.state.lock().unwrap().there.entry(page).or_insert(contents);
            self.changed.notify_all();
        }
    }

    impl PlacePages for Missing {
        fn next_missing(&self, wait: Duration) -> Result<Option<u64>, MachineError> {
            if self.state.lock().unwrap().awaited.is_empty() {
                std::thread::sleep(wait.min(Duration::from_millis(1)));
            }
            Ok(self.state.lock().unwrap().awaited.pop_front())
        }

        fn place_page(
            &self,
            page: u64,
            contents: Option<&[u8; 4096]>,
        ) -> Result<bool, MachineError> {
            // So that the guest mostly runs before every page was placed.
            std::thread::sleep(Duration::from_micros(100));
            match *self.discards.lock().unwrap() {
                Some((now, discarded)) if now == page => self.discard(discarded),
                _ => {}
            }
            if self.was_discarded(page) {
                return Ok(false);
            }
            self.put(page, contents);
            Ok(true)
        }

        fn place_zeros(&self, page: u64) -> Result<(), MachineError> {
            self.put(page, None);
            Ok(())
        }

        fn was_discarded(&self, page: u64) -> bool {
            self.state.lock().unwrap().discarded.contains(&page)
        }
    }

    #[derive(Default)]
    struct Machine {
        memory: Arc<Missing>,
        runs: bool,
        destroyed: bool,
    }

    impl DestinationMachine for Machine {
        fn cpu_features(&self) -> migration::cpu::CpuFeatures {
            common::description().cpu
        }

        fn create(&mut self, _: &Description) -> Result<Arc<dyn WritePages>, MachineError> {
            Err("unsupported".into())
        }

        fn create_missing(&mut self, _: &Description) -> Result<Arc<dyn PlacePages>, MachineError> {
            Ok(Arc::clone(&self.memory) as _)
        }

        fn load_state(&mut self, _: Vec<StateSection>) -> Result<(), MachineError> {
            // As a device that reads its virtqueues.
            self.memory.touch(320);
            Ok(())
        }

        fn resume(&mut self) -> Result<(), MachineError> {
            self.runs = true;
            Ok(())
        }

        fn destroy(&mut self) {
            self.destroyed = true;
        }
    }

    #[test]
    fn pages_are_placed_on_touch_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (_, source) = write(&path, 500, 0, After::Stop);
        let mut machine = Machine::default();
        let filling = restore_lazily(&quick_destination(), &mut machine, &path, &mut Silent);
        let filling = filling.unwrap();
        assert!(machine.runs);
        let bytes = source.memory.bytes.read().unwrap();
        for page in [429, 3, 199, 300] {
            let at = page as usize * 4096;
            assert!(machine.memory.touch(page) == bytes[at..at + 4096], "page {page}");
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while filling.pages() != (330, 330) {
            assert!(!filling.has_failed() && Instant::now() < deadline, "{:?}", filling.pages());
            std::thread::sleep(Duration::from_millis(1));
        }
        // Inflated and deflated.
        machine.memory.discard(3);
        assert_eq!(machine.memory.touch(3), vec![0; 4096]);
        filling.finish().unwrap();
    }

    /// A page is discarded before its turn, while it is being placed, and while a thread waits for
    /// it: it is not placed, and reads as zeros.
    #[test]
    fn a_page_discarded_during_a_lazy_restore_is_never_placed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, 0, 0, After::Stop);
        for discarded in [150, 90, 320] {
            let memory = Arc::new(Missing::default());
            // Loading the state waits for page 320.
            let now = if discarded == 150 { 89 } else { discarded };
            *memory.discards.lock().unwrap() = Some((now, discarded));
            let mut machine = Machine { memory: Arc::clone(&memory), ..Machine::default() };
            let filling = restore_lazily(&quick_destination(), &mut machine, &path, &mut Silent);
            let filling = filling.unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            while filling.pages() != (330, 330) {
                assert!(!filling.has_failed() && Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(1));
            }
            let there = memory.state.lock().unwrap().there.get(&discarded).cloned();
            // The waiting thread has read zeros.
            let expected = (discarded == 320).then(|| vec![0; 4096]);
            assert_eq!(there, expected, "page {discarded}");
            assert_eq!(memory.touch(discarded), vec![0; 4096]);
            filling.finish().unwrap();
        }
    }

    #[test]
    fn a_damaged_page_is_never_placed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, 0, 0, After::Stop);
        let mut bytes = fs::read(&path).unwrap();
        bytes[4096 * (1 + 150) + 5] ^= 1;
        bytes[4096 * (1 + 90) + 5] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut machine = Machine::default();
        let restored = restore_lazily(&quick_destination(), &mut machine, &path, &mut Silent);
        let error = match restored {
            Ok(filling) => {
                let deadline = Instant::now() + Duration::from_secs(20);
                while !filling.has_failed() {
                    assert!(Instant::now() < deadline);
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(!machine.memory.state.lock().unwrap().there.contains_key(&90));
                filling.finish().unwrap_err()
            }
            // It was detected before the guest ran.
            Err(error) => {
                assert!(machine.destroyed && !machine.runs);
                error
            }
        };
        assert!(matches!(error, MigrationError::DamagedFile { .. }), "{error:?}");
    }

    /// The VMM itself reads the damaged page while it loads the state.
    #[test]
    fn a_vmm_that_waits_for_a_damaged_page_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, 0, 0, After::Stop);
        let mut bytes = fs::read(&path).unwrap();
        bytes[4096 * (1 + 220) + 5] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut machine = Machine::default();
        let restored = restore_lazily(&quick_destination(), &mut machine, &path, &mut Silent);
        let error = restored.unwrap_err();
        assert!(matches!(error, MigrationError::DamagedFile { .. }), "{error:?}");
        assert!(machine.destroyed && !machine.runs);
    }

    #[test]
    fn a_vmm_without_missing_pages_leaves_no_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (world, _) = write(&path, 0, 0, After::Stop);
        let mut destination = Destination::new(&world);
        let restored = restore_lazily(&quick_destination(), &mut destination, &path, &mut Silent);
        restored.unwrap_err();
        assert!(destination.memory.is_none() && !destination.runs());
    }
}
