//! Discards real memory: the given pages read as zeros and are released to the host, and
//! every other byte stays.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use host_memory::resident::resident_bytes;
use host_memory::{
    Discard, DiscardCall, HostMemoryError, HostPages, HugePool, MemoryMap, PartialHuge, Reclaimer,
    ReclaimerOptions, Region, ReleaseMode, reserve_file,
};
use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(start, pages).unwrap()
}

fn bytes(pages: u64) -> usize {
    usize::try_from(pages * PAGE_BYTES).unwrap()
}

fn memfd(len_bytes: u64, flags: MemfdFlags) -> Result<Arc<File>, Errno> {
    let file = File::from(memfd_create("guest", flags | MemfdFlags::CLOEXEC)?);
    file.set_len(len_bytes).map_err(|_| Errno::NOSPC)?;
    Ok(Arc::new(file))
}

/// A guest with its memory and its map.
struct Guest {
    memory: GuestMemoryMmap,
    map: MemoryMap,
}

impl Guest {
    /// Regions `(first page, pages)`, contiguous in a file, or anonymous.
    fn new(regions: &[(u64, u64)], file: Option<&Arc<File>>) -> Self {
        let mut offset = 0;
        let described: Vec<_> = regions
            .iter()
            .map(|&(start, pages)| {
                let from = file.map(|file| FileOffset::from_arc(Arc::clone(file), offset));
                offset += pages * PAGE_BYTES;
                (GuestAddress(start * PAGE_BYTES), bytes(pages), from)
            })
            .collect();
        let memory = GuestMemoryMmap::from_ranges_with_files(described).unwrap();
        let map = MemoryMap::of_guest_memory(&memory).unwrap();
        let guest = Self { memory, map };
        guest.fill();
        guest
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        self.map.regions().iter().flat_map(|region| region.pages().start()..region.pages().end())
    }

    /// Writes to both ends of every page.
    fn fill(&self) {
        self.pages().for_each(|page| self.write(page));
    }

    fn write(&self, page: u64) {
        let at = page * PAGE_BYTES;
        self.memory.write_obj(page + 1, GuestAddress(at)).unwrap();
        self.memory.write_obj(!page, GuestAddress(at + PAGE_BYTES - 8)).unwrap();
    }

    fn is_intact(&self, page: u64) -> bool {
        self.read(page) == (page + 1, !page)
    }

    fn read(&self, page: u64) -> (u64, u64) {
        let at = page * PAGE_BYTES;
        (
            self.memory.read_obj(GuestAddress(at)).unwrap(),
            self.memory.read_obj(GuestAddress(at + PAGE_BYTES - 8)).unwrap(),
        )
    }

    /// Measures before it reads: reading a hole of a file fills it.
    fn assert_gone(&self, gone: &PageSet, before_bytes: u64) {
        let after = resident_bytes(&self.map).unwrap();
        assert_eq!(before_bytes - after, gone.len() * PAGE_BYTES, "bytes released");
        for page in self.pages() {
            if gone.contains(page) {
                assert_eq!(self.read(page), (0, 0), "page {page} was released");
            } else {
                assert!(self.is_intact(page), "page {page} was not released");
            }
        }
    }
}

/// A mounted file system, unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(name: &str, options: &str) -> Option<Self> {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("none", &path, "tmpfs", flags, options.as_c_str()) {
            Ok(()) => Some(Self(path)),
            Err(errno) => {
                eprintln!("SKIPPED: mounting tmpfs with {options:?} was refused: {errno}");
                fs::remove_dir(&path).unwrap();
                None
            }
        }
    }

    fn file(&self, len_bytes: u64) -> Arc<File> {
        let path = self.0.join("guest");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(len_bytes).unwrap();
        Arc::new(file)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Runs across holes and region borders, single pages, whole chunks.
fn mixed_set() -> PageSet {
    let mut set: PageSet = (0..900).step_by(3).map(|page| range(10 + page, 1)).collect();
    set.insert(range(1000, 700));
    set.insert(range(2048 + 5, CHUNK_PAGES));
    set
}

/// Two regions with a hole between them that no memory backs: 0..1500 and
/// 2048..3500.
const REGIONS: [(u64, u64); 2] = [(0, 1500), (2048, 1452)];
const HOLE: (u64, u64) = (1500, 548);

fn backings() -> [(&'static str, Option<Arc<File>>); 2] {
    let file = memfd(8 << 20 << 2, MemfdFlags::empty()).unwrap();
    [("anonymous", None), ("memfd", Some(file))]
}

#[test]
fn exactly_the_given_pages_are_released() {
    for (name, file) in backings() {
        let guest = Guest::new(&REGIONS, file.as_ref());
        let before = resident_bytes(&guest.map).unwrap();
        assert_eq!(before, (1500 + 1452) * PAGE_BYTES, "{name}");
        let mut set = mixed_set();
        let report = guest.map.discard(&set);
        set.remove(range(HOLE.0, HOLE.1));
        guest.assert_gone(&set, before);
        assert_eq!(report.pages, set.len());
        assert_eq!(report.outside_pages, 200, "1500..1700 lies in the hole");
        assert_eq!((report.failed_pages, report.failure_count), (0, 0));
        let ranges = set.ranges().count() as u64;
        assert_eq!(report.ranges, ranges);
        if file.is_some() {
            assert_eq!(report.calls, ranges, "one call for each range");
        } else {
            assert!(report.calls <= ranges);
        }
    }
}

#[test]
fn page_by_page_releases_the_same_pages_with_one_call_each() {
    for (_, file) in backings() {
        let guest = Guest::new(&REGIONS, file.as_ref());
        let before = resident_bytes(&guest.map).unwrap();
        let mut set = mixed_set();
        let report = guest.map.discard_per_page(&set);
        set.remove(range(HOLE.0, HOLE.1));
        guest.assert_gone(&set, before);
        assert_eq!((report.calls, report.ranges, report.pages), (set.len(), set.len(), set.len()));
        assert_eq!(report.outside_pages, 200);
        assert!(report.release > report.translate, "a call costs more than a look-up");
    }
}

#[test]
fn a_range_across_regions_takes_one_call_per_region() {
    let file = memfd(4 * MIB, MemfdFlags::empty()).unwrap();
    let guest = Guest::new(&[(0, 100), (100, 100), (200, 100)], Some(&file));
    let before = resident_bytes(&guest.map).unwrap();
    let report = guest.map.discard(&range(50, 200).into());
    assert_eq!((report.calls, report.pages), (3, 200));
    guest.assert_gone(&range(50, 200).into(), before);
}

#[test]
fn untouched_pages_can_be_released() {
    let file = memfd(64 * MIB, MemfdFlags::empty()).unwrap();
    let region = Region::shared(range(0, 64 * MIB / PAGE_BYTES), file, 0).unwrap();
    let map = MemoryMap::new(vec![region]).unwrap();
    let report = map.discard(&range(0, 64 * MIB / PAGE_BYTES).into());
    assert_eq!((report.calls, report.failure_count), (1, 0));
    assert_eq!(resident_bytes(&map).unwrap(), 0);
}

#[test]
fn a_refusal_is_reported_with_its_errno_and_the_rest_is_released() {
    let dir = std::env::temp_dir().join(format!("read-only-{}", std::process::id()));
    fs::write(&dir, vec![1; bytes(10)]).unwrap();
    let read_only = Arc::new(File::open(&dir).unwrap());
    fs::remove_file(&dir).unwrap();
    let good = memfd(MIB, MemfdFlags::empty()).unwrap();
    let guest = Guest::new(&[(10, 100)], Some(&good));
    let map = MemoryMap::new(vec![
        Region::shared(range(0, 10), read_only, 0).unwrap(),
        guest.map.regions()[0].clone(),
    ])
    .unwrap();
    let before = resident_bytes(&guest.map).unwrap();
    let report = map.discard(&range(0, 110).into());
    assert_eq!((report.failed_pages, report.failure_count, report.pages), (10, 1, 100));
    assert_eq!(report.failures.len(), 1);
    let failure = report.failures[0];
    assert_eq!(failure.pages, range(0, 10));
    assert_eq!((failure.call, failure.errno), (DiscardCall::PunchHole, Errno::BADF));
    assert!(failure.to_string().contains("punching"));
    guest.assert_gone(&range(10, 100).into(), before);
}

#[test]
fn memory_that_cannot_be_released_is_refused() {
    let file = memfd(MIB, MemfdFlags::empty()).unwrap();
    let region = |start, pages| Region::shared(range(start, pages), Arc::clone(&file), 0).unwrap();
    let overlap = MemoryMap::new(vec![region(5, 5), region(0, 6)]);
    assert!(matches!(overlap, Err(HostMemoryError::Overlap { .. })), "{overlap:?}");
    for offset in [1, PAGE_BYTES - 1, i64::MAX as u64 + 1, u64::MAX - 4095] {
        let error = Region::shared(range(0, 1), Arc::clone(&file), offset);
        assert!(matches!(error, Err(HostMemoryError::FileOffset { .. })), "{error:?}");
    }
    let null = open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
    let error = Region::shared(range(0, 1), Arc::new(File::from(null)), 0);
    assert!(matches!(error, Err(HostMemoryError::NotAFile { .. })), "{error:?}");

    // A private mapping of a file: releasing it would expose the file's bytes.
    let private = vm_memory::mmap::MmapRegionBuilder::<()>::new(bytes(1))
        .with_file_offset(FileOffset::from_arc(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE)
        .build()
        .unwrap();
    let private = vm_memory::GuestRegionMmap::new(private, GuestAddress(0)).unwrap();
    let error = Region::of_mapping(&private);
    assert!(matches!(error, Err(HostMemoryError::NotReleasable { .. })), "{error:?}");
}

#[test]
fn translation_splits_at_borders_and_reports_pages_outside() {
    let guest = Guest::new(&[(10, 10), (20, 10), (40, 10)], None);
    let pieces: Vec<_> = guest
        .map
        .translate(range(0, 60))
        .map(|piece| match piece {
            Ok(piece) => (piece.pages, true),
            Err(outside) => (outside.pages, false),
        })
        .collect();
    let expected = [
        (range(0, 10), false),
        (range(10, 10), true),
        (range(20, 10), true),
        (range(30, 10), false),
        (range(40, 10), true),
        (range(50, 10), false),
    ];
    assert_eq!(pieces, expected);
    assert!(guest.map.check(range(10, 20)).is_ok());
    let outside = guest.map.check(range(25, 20)).unwrap_err();
    assert_eq!(outside.pages, range(30, 10));
    assert_eq!(outside.to_string(), "page 0x1e lies outside guest memory");
    assert!(guest.map.check(range(60, 0)).is_ok(), "an empty range is not outside");
    assert!(guest.map.find(9).is_none() && guest.map.find(30).is_none());
    assert!(guest.map.find(u64::MAX).is_none());
    let piece = guest.map.find(25).unwrap();
    assert_eq!(piece.pages, range(25, 1));
    assert_eq!(piece.start_bytes() - guest.map.find(20).unwrap().start_bytes(), 5 * PAGE_BYTES);
    assert_eq!(guest.map.pages(), 30);
}

#[test]
fn memory_on_small_pages_is_detected() {
    let file = memfd(MIB, MemfdFlags::empty()).unwrap();
    let seen = HostPages::of_file(&file).unwrap();
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let huge = setting
        .is_ok_and(|s| ["[always]", "[within_size]", "[force]"].iter().any(|w| s.contains(w)));
    assert_eq!(seen, if huge { HostPages::Transparent } else { HostPages::Small });
    if let Some(mount) = Mount::tmpfs("small", "size=1m") {
        assert_eq!(HostPages::of_file(&*mount.file(4096)).unwrap(), HostPages::Small);
    }
}

/// A front end's memory may be on a mount that this process cannot see.
#[test]
fn huge_pages_are_detected_on_an_invisible_mount() {
    let Some(mount) = Mount::tmpfs("unseen", "size=4m,huge=always") else { return };
    let file = mount.file(MIB);
    rustix::mount::unmount(&mount.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(HostPages::of_file(&file).unwrap(), HostPages::Transparent);
}

#[test]
fn a_huge_page_that_came_back_for_one_page_is_released_again() {
    let Some(mount) = Mount::tmpfs("returned", "size=20m,huge=always") else { return };
    let file = mount.file(16 * MIB);
    let guest = Guest::new(&[(0, 16 * MIB / PAGE_BYTES)], Some(&file));
    let map: Arc<dyn Discard> = Arc::new(guest.map.clone());
    let reclaimer = Reclaimer::new(map, ReclaimerOptions::default()).unwrap();
    let given = range(0, 4 * CHUNK_PAGES);
    reclaimer.release(&given.into());
    reclaimer.flush();
    assert!(reclaimer.wait_idle(TEST_TIMEOUT));
    assert_eq!(resident_bytes(&guest.map).unwrap(), 8 * MIB);

    let (page, last) = (CHUNK_PAGES + 5, 3 * CHUNK_PAGES + 511);
    for page in [page, last] {
        reclaimer.retain(&range(page, 1).into());
        guest.write(page);
    }
    assert_eq!(resident_bytes(&guest.map).unwrap(), 12 * MIB, "two huge pages for two small ones");
    let end = Instant::now() + TEST_TIMEOUT;
    while resident_bytes(&guest.map).unwrap() > 8 * MIB + 2 * PAGE_BYTES {
        assert!(Instant::now() < end, "they stay: {:?}", reclaimer.counters());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(guest.is_intact(page) && guest.is_intact(last));
    assert_eq!(reclaimer.counters().swept_pages, 2 * (CHUNK_PAGES - 1));
}

/// The page is given up again before the next check: the guest then uses nothing of the
/// huge page, and releasing only the last part would leave the rest allocated.
#[test]
fn a_huge_page_that_came_back_briefly_is_released_again() {
    for partial_huge in [PartialHuge::Split, PartialHuge::Wait] {
        let Some(mount) = Mount::tmpfs("moment", "size=20m,huge=always") else { return };
        let file = mount.file(16 * MIB);
        let guest = Guest::new(&[(0, 16 * MIB / PAGE_BYTES)], Some(&file));
        let map: Arc<dyn Discard> = Arc::new(guest.map.clone());
        let options = ReclaimerOptions { partial_huge, ..ReclaimerOptions::default() };
        let reclaimer = Reclaimer::new(map, options).unwrap();
        reclaimer.release(&range(0, 4 * CHUNK_PAGES).into());
        reclaimer.flush();
        assert!(reclaimer.wait_idle(TEST_TIMEOUT));
        let page = range(CHUNK_PAGES + 5, 1);
        reclaimer.retain(&page.into());
        guest.write(page.start());
        assert_eq!(resident_bytes(&guest.map).unwrap(), 10 * MIB);
        reclaimer.release(&page.into());
        reclaimer.flush();
        let end = Instant::now() + TEST_TIMEOUT;
        while resident_bytes(&guest.map).unwrap() > 8 * MIB {
            assert!(Instant::now() < end, "it stays: {:?}", reclaimer.counters());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The guest keeps one small page of every second huge page and gives up the rest: on a
/// kernel that splits, all given pages are released.
#[test]
fn parts_of_transparent_huge_pages_are_released() {
    let Some(mount) = Mount::tmpfs("huge", "size=80m,huge=always") else { return };
    let file = mount.file(64 * MIB);
    assert_eq!(HostPages::of_file(&file).unwrap(), HostPages::Transparent);
    let guest = Guest::new(&[(0, 64 * MIB / PAGE_BYTES)], Some(&file));
    let before = resident_bytes(&guest.map).unwrap();
    let mut set = PageSet::from(range(0, 64 * MIB / PAGE_BYTES));
    for chunk in (0..32).step_by(2) {
        set.remove(range(chunk * CHUNK_PAGES + 100, 1));
    }

    let mut whole = set.clone();
    let partial = Discard::take_partial(&guest.map, &mut whole, PartialHuge::Wait);
    assert_eq!(partial.len(), 16 * (CHUNK_PAGES - 1));
    assert_eq!(whole.full_chunk_pages(), whole.len());
    let mut split = set.clone();
    assert!(Discard::take_partial(&guest.map, &mut split, PartialHuge::Split).is_empty());

    let _ = guest.map.discard(&set);
    guest.assert_gone(&set, before);
}

/// Restores the kernel's setting on drop. Locked by one test at a time.
struct HugePages(String, #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

static POOL: Mutex<()> = Mutex::new(());

impl HugePages {
    const SETTING: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: u64) -> Option<Self> {
        let alone = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(Self::SETTING).ok()?;
        let have: u64 = before.trim().parse().ok()?;
        fs::write(Self::SETTING, (have + count).to_string()).ok()?;
        let this = Self(before, alone);
        let now: u64 = fs::read_to_string(Self::SETTING).ok()?.trim().parse().ok()?;
        (now >= have + count).then_some(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::SETTING, &self.0);
    }
}

#[test]
fn hugetlb_pages_are_released_whole_or_wait() {
    let Some(_reserved) = HugePages::reserve(8) else {
        eprintln!("SKIPPED: no huge pages can be reserved here (needs root and free memory)");
        return;
    };
    let file = memfd(16 * MIB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    assert_eq!(
        HostPages::of_file(&file).unwrap(),
        HostPages::Hugetlb { host_page_pages: CHUNK_PAGES }
    );
    // The guest's pages are offset by half a huge page against the host's.
    let start = CHUNK_PAGES / 2;
    let guest = Guest::new(&[(start, 8 * CHUNK_PAGES)], Some(&file));
    let map: Arc<dyn Discard> = Arc::new(guest.map.clone());
    let reclaimer = Reclaimer::new(map, ReclaimerOptions::default()).unwrap();
    let before = resident_bytes(&guest.map).unwrap();
    assert_eq!(before, 16 * MIB);

    // From the middle of host page 1 to the middle of host page 4.
    reclaimer.release(&range(start + CHUNK_PAGES + 7, 3 * CHUNK_PAGES).into());
    reclaimer.flush();
    assert!(reclaimer.wait_idle(TEST_TIMEOUT));
    let gone = PageSet::from(range(start + 2 * CHUNK_PAGES, 2 * CHUNK_PAGES));
    assert_eq!(reclaimer.counters().waiting_pages, CHUNK_PAGES);
    assert_eq!(before - resident_bytes(&guest.map).unwrap(), 4 * MIB);

    // The rest of host page 1 is given up, so it is released too.
    reclaimer.release(&range(start + CHUNK_PAGES, 7).into());
    reclaimer.flush();
    assert!(reclaimer.wait_idle(TEST_TIMEOUT));
    let mut gone = gone;
    gone.insert(range(start + CHUNK_PAGES, CHUNK_PAGES));
    let snapshot = reclaimer.counters();
    assert_eq!((snapshot.waiting_pages, snapshot.errors), (7, 0));
    guest.assert_gone(&gone, before);
}

/// Another process may use the pages that the balloon returned to a pool when the guest deflates.
#[test]
fn pool_pages_are_reserved_until_released_and_reserved_again() {
    let Some(_reserved) = HugePages::reserve(8) else {
        eprintln!("SKIPPED: no huge pages can be reserved here (needs root and free memory)");
        return;
    };
    let pool = HugePool::of(2 * MIB);
    let len = 8 * 2 * MIB;
    let file = memfd(len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    reserve_file(&file, len).unwrap();
    // Takes all remaining pages.
    let other =
        memfd((pool.total + 8) * 2 * MIB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    reserve_file(&other, HugePool::of(2 * MIB).free * 2 * MIB).unwrap();
    assert_eq!(HugePool::of(2 * MIB).free, 0);
    let third = memfd(2 * 2 * MIB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    reserve_file(&third, 2 * MIB).unwrap_err();

    // All of it is backed, though the mapping itself reserves nothing.
    let guest = Guest::new(&[(0, 8 * CHUNK_PAGES)], Some(&file));
    let given = PageSet::from(range(CHUNK_PAGES, 2 * CHUNK_PAGES));
    let map: Arc<dyn Discard> = Arc::new(guest.map.clone());
    let reclaimer = Reclaimer::new(map, ReclaimerOptions::default()).unwrap();
    reclaimer.release(&given);
    reclaimer.flush();
    assert!(reclaimer.wait_idle(TEST_TIMEOUT));
    reserve_file(&third, 2 * 2 * MIB).unwrap();
    let error = guest.map.reserve(&given).unwrap_err().to_string();
    assert!(error.contains("2 huge pages of 2 MiB are needed, and 0 of"), "{error}");
    drop(third);
    guest.map.reserve(&given).unwrap();
    assert_eq!(HugePool::of(2 * MIB).free, 0);
    reclaimer.retain(&given);
    guest.fill();

    // Pages that the guest may use again without a message are not released.
    let before = resident_bytes(&guest.map).unwrap();
    reclaimer.release_free(&given);
    assert_eq!(resident_bytes(&guest.map).unwrap(), before);
    assert_eq!(reclaimer.counters().free_partial_pages, given.len());
}

/// A guest that gives up, takes back and writes pages at random: its writes stay.
#[test]
fn the_guests_writes_are_preserved() {
    const PAGES: u64 = 6 * CHUNK_PAGES;
    let memfd = memfd(16 * MIB, MemfdFlags::empty()).unwrap();
    let huge = Mount::tmpfs("huge-guest", "size=20m,huge=always");
    let mut backings = vec![("anonymous", None), ("memfd", Some(memfd))];
    if let Some(mount) = &huge {
        backings.push(("tmpfs, huge pages", Some(mount.file(16 * MIB))));
    }
    for (name, file) in &backings {
        let guest = Guest::new(&[(7, PAGES)], file.as_ref());
        let map: Arc<dyn Discard> = Arc::new(guest.map.clone());
        for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
            let options = ReclaimerOptions { mode, ..ReclaimerOptions::default() };
            let reclaimer = Reclaimer::new(Arc::clone(&map), options).unwrap();
            let mut balloon: BTreeSet<u64> = BTreeSet::new();
            let mut seed = 0x2545_f491_4f6c_dd1d_u64;
            for _ in 0..400 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
                let start = 7 + (seed >> 33) % (PAGES - 1);
                let count = (1 + (seed >> 17) % 700).min(7 + PAGES - start);
                let pages = range(start, count);
                if seed >> 16 & 1 == 0 {
                    reclaimer.release(&pages.into());
                    balloon.extend(pages.start()..pages.end());
                } else {
                    reclaimer.retain(&pages.into());
                    for page in pages.start()..pages.end() {
                        balloon.remove(&page);
                        guest.write(page);
                    }
                }
            }
            reclaimer.flush();
            assert!(reclaimer.wait_idle(TEST_TIMEOUT));
            let lost =
                guest.pages().find(|page| !balloon.contains(page) && !guest.is_intact(*page));
            assert_eq!(lost, None, "{name}, {mode:?}");
            let kept = balloon.iter().find(|&&page| guest.read(page) != (0, 0));
            assert_eq!(kept, None, "{name}, {mode:?}: released");
            assert_eq!(reclaimer.counters().errors, 0);
            drop(reclaimer);
            guest.fill();
        }
    }
}
