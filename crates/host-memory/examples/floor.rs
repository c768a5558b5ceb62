//! The cost of releasing memory on this host: the floor for everything above it, and the
//! cost of parts of huge pages.
//!
//! `cargo run --release -p host-memory --example floor [MIB [NAME]]` (root, to mount
//! tmpfs; 3072 MiB by default, and as much free memory).

use std::error::Error;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use host_memory::resident::resident_bytes;
use host_memory::{
    BATCH_PAGES, Discard, MemoryMap, Reclaimer, ReclaimerCounters, ReclaimerOptions, ReleaseMode,
};
use page_set::{CHUNK_PAGES, PAGE_BYTES, PageRange, PageSet};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
const DEFAULT_MIB: u64 = 3072;
/// Timeout for a release by the worker.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let mib = std::env::args().nth(1).map_or(Ok(DEFAULT_MIB), |arg| arg.parse())?;
    println!(
        "{:<20} {:<44} {:>8} {:>10} {:>9} {:>9}",
        "memory", "release", "calls", "ms", "MiB left", "MiB huge"
    );
    let only = std::env::args().nth(2);
    for (name, options) in [
        ("tmpfs 4k", Some("huge=never")),
        ("tmpfs huge=always", Some("huge=always")),
        ("anonymous", None),
    ] {
        if only.as_ref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        match options {
            Some(options) => {
                let mounted = Mounted::new(&format!("size={}m,{options}", mib + 64))?;
                let path = mounted.0.join("guest");
                let file = File::options().read(true).write(true).create_new(true).open(path)?;
                file.set_len(mib * MIB)?;
                measure(name, mib, Some(Arc::new(file)))?;
            }
            None => measure(name, mib, None)?,
        }
    }
    Ok(())
}

struct Mounted(PathBuf);

impl Mounted {
    fn new(options: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("floor-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        let options = std::ffi::CString::new(options)?;
        mount("none", &path, "tmpfs", MountFlags::empty(), options.as_c_str())?;
        Ok(Self(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

fn measure(name: &str, mib: u64, file: Option<Arc<File>>) -> Result<()> {
    let len = usize::try_from(mib * MIB)?;
    let from = file.map(|file| FileOffset::from_arc(file, 0));
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, from)])?;
    let map = MemoryMap::of_guest_memory(&memory)?;
    let all = PageRange::new(0, mib * MIB / PAGE_BYTES)?;
    let case = |what: &str, release: &dyn Fn() -> Result<u64>| -> Result<()> {
        // Release everything first, so that split huge pages can be allocated again.
        let _ = map.discard(&all.into());
        for page in 0..all.pages() {
            memory.write_obj(1u8, GuestAddress(page * PAGE_BYTES))?;
        }
        let huge = system_huge_mib();
        let started = Instant::now();
        let calls = release()?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        let left = resident_bytes(&map)? / MIB;
        println!("{name:<20} {what:<44} {calls:>8} {ms:>10.1} {left:>9} {huge:>9}");
        Ok(())
    };
    let by = |pages: u64| {
        let mut calls = 0;
        for start in (0..all.pages()).step_by(usize::try_from(pages)?) {
            let part = PageRange::new(start, pages.min(all.pages() - start))?;
            calls += map.discard(&part.into()).calls;
        }
        Ok(calls)
    };
    case("everything at once", &|| Ok(map.discard(&all.into()).calls))?;
    case("everything at once, never touched since", &|| {
        let _ = map.discard(&all.into());
        let started = Instant::now();
        let calls = map.discard(&all.into()).calls;
        println!("{:<65} {:>18.1}", "  of that, untouched:", started.elapsed().as_secs_f64() * 1e3);
        Ok(calls)
    })?;
    case("batches of 32 MiB", &|| by(BATCH_PAGES))?;
    case("chunks of 2 MiB", &|| by(CHUNK_PAGES))?;
    case("page by page", &|| {
        let report = map.discard_per_page(&all.into());
        println!("  translate {:?}, release {:?}", report.translate, report.release);
        Ok(report.calls)
    })?;
    for (what, step) in
        [("one page kept in every second 2 MiB", 2), ("one page kept in every 2 MiB", 1)]
    {
        let mut pages = PageSet::from(all);
        for chunk in (0..all.pages() / CHUNK_PAGES).step_by(step) {
            pages.remove(PageRange::new(chunk * CHUNK_PAGES + CHUNK_PAGES / 2, 1)?);
        }
        case(what, &|| Ok(map.discard(&pages).calls))?;
    }
    let shared: Arc<dyn Discard> = Arc::new(map.clone());
    background("in the background, one message", &case, &shared, all.pages(), all)?;
    background("in the background, 256 pages a message", &case, &shared, 256, all)
}

/// Shared memory on huge pages in the whole system, to see whether a mount with huge pages
/// got any.
fn system_huge_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("ShmemHugePages:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

type Case<'a> = &'a dyn Fn(&str, &dyn Fn() -> Result<u64>) -> Result<()>;

/// Releases everything in messages of `step` pages; prints how long the caller took.
fn background(
    what: &str,
    case: Case<'_>,
    memory: &Arc<dyn Discard>,
    step: u64,
    all: PageRange,
) -> Result<()> {
    let options = ReclaimerOptions { mode: ReleaseMode::Background, ..Default::default() };
    let reclaimer = Reclaimer::new(Arc::clone(memory), options)?;
    case(what, &|| {
        let started = Instant::now();
        for start in (0..all.pages()).step_by(usize::try_from(step)?) {
            reclaimer.release(&PageRange::new(start, step.min(all.pages() - start))?.into());
        }
        let given = started.elapsed();
        reclaimer.flush();
        if !reclaimer.wait_idle(RELEASE_TIMEOUT) {
            return Err("the release timed out".into());
        }
        let ReclaimerCounters { calls, batches, release_ns, .. } = reclaimer.counters();
        let released = Duration::from_nanos(release_ns);
        println!("  given in {given:?}, {batches} batches, {released:?} in calls");
        Ok(calls)
    })
}
