//! Requests to a guest's kernel: drop caches, report and hold free pages.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bench::Driver;
use control::api::{Caches, FreeKind, FreePages, FreePagesRequest, HoldState};
use fastrand::Rng;
use lab::Backing;

use crate::fixture::{Fixture, Host};

/// Memory of most guests, in MiB.
const MEMORY_MIB: u64 = 1024;

/// Memory of guests with a measurement.
const LARGE_MIB: u64 = 4096;

const MIB: u64 = 1 << 20;

/// Timeout of a request on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Size of a file that the guest reads into its page cache, in MiB.
const CACHED_MIB: u64 = 2048;

/// Pages that a guest may allocate while it answers.
const NOISE_PAGES: u64 = 256;

/// Page ranges in one command line: the guest's terminal accepts 4 KiB.
const RANGES: usize = 200;

/// Size of a file in guest memory during requests, in MiB.
const KEPT_MIB: u64 = 100;

/// Free memory that a hold leaves, in MiB.
const RESERVE_MIB: u64 = 200;

/// Allocation of the guest then: more than that, less than all.
const NEEDED_MIB: u64 = 500;

/// Requests that are cancelled, with and without a busy process.
const CANCELS: u64 = 40;

/// Requests of random kinds, while the guest allocates.
const RANDOM_REQUESTS: u32 = 200;

pub(crate) fn snapshot() -> FreePagesRequest {
    request(FreeKind::Snapshot, None)
}

pub(crate) fn hold(reserve_mib: u64) -> FreePagesRequest {
    request(FreeKind::Hold, Some(reserve_mib * MIB))
}

fn request(kind: FreeKind, reserve_bytes: Option<u64>) -> FreePagesRequest {
    let timeout_ms = u64::try_from(LIMIT.as_millis()).unwrap();
    FreePagesRequest { kind, min_block_bytes: None, reserve_bytes, timeout_ms }
}

fn boot(host: &Host) -> Fixture<'_> {
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    fixture
}

/// Asserts that neither back end nor guest kernel reports a fault.
fn all_well(fixture: &Fixture<'_>) {
    assert_eq!(fixture.status().faults.total(), 0, "{:?}", fixture.status().faults);
    let complaints = bench::guest_complaints(&fixture.log());
    assert!(complaints.is_empty(), "{complaints:?} in\n{}", fixture.log());
}

fn near(found: u64, wanted: u64, slack: u64) -> bool {
    found.abs_diff(wanted) <= (wanted / 50).max(slack)
}

#[test]
fn drop_caches_frees_cached_files() {
    let host = Host::start("drops", Backing::Small, LARGE_MIB);
    let mut fixture = boot(&host);
    let files = tempfile::tempdir().unwrap();
    let file = File::create(files.path().join("cached")).unwrap();
    file.set_len(CACHED_MIB * MIB).unwrap();
    fixture.run(&format!("mount-host {}", files.path().display()));
    fixture.run("drop-caches");
    let free = fixture.meminfo_bytes(&["MemFree"]);
    fixture.run(&format!("read-file /host/cached {CACHED_MIB}"));
    let left = fixture.meminfo_bytes(&["MemFree"]);
    assert!(left <= free - CACHED_MIB * MIB / 100 * 98, "{free} {left}");

    let cache = |fixture: &mut Fixture<'_>| {
        fixture.meminfo_bytes(&["Cached", "Buffers"]) - fixture.meminfo_bytes(&["Shmem"])
    };
    let (cached, slab) = (cache(&mut fixture), fixture.meminfo_bytes(&["Slab"]));
    let dropped = host.client.drop_caches(Caches::All, LIMIT).unwrap();
    println!("dropped: {dropped:?}");
    assert!(near(dropped.page_cache.before_bytes, cached, MIB), "{cached}, {dropped:?}");
    assert!(near(dropped.slab.before_bytes, slab, MIB), "{slab}, {dropped:?}");
    assert!(near(dropped.page_cache.after_bytes, cache(&mut fixture), MIB), "{dropped:?}");
    assert!(near(dropped.slab.after_bytes, fixture.meminfo_bytes(&["Slab"]), MIB), "{dropped:?}");
    assert!(dropped.page_cache.freed_bytes >= CACHED_MIB * MIB / 100 * 98, "{dropped:?}");
    let back = fixture.meminfo_bytes(&["MemFree"]);
    assert!(back >= free - CACHED_MIB * MIB / 50, "{free} before the file, {back} after");

    // Each kind of cache can be dropped alone.
    fixture.run("read-file /host/cached 100");
    let slab_alone = host.client.drop_caches(Caches::Slab, LIMIT).unwrap();
    assert!(slab_alone.page_cache.after_bytes >= 99 * MIB, "{slab_alone:?}");
    let files_alone = host.client.drop_caches(Caches::PageCache, LIMIT).unwrap();
    assert!(files_alone.page_cache.freed_bytes >= 98 * MIB, "{files_alone:?}");
    all_well(&fixture);
}

#[test]
fn a_free_page_report_matches_the_free_lists() {
    let host = Host::start("snapshot", Backing::Small, LARGE_MIB);
    let mut fixture = boot(&host);
    reports_free_memory(&mut fixture, "idle");
    fixture.fragment(LARGE_MIB / 16);
    reports_free_memory(&mut fixture, "fragmented");
    fixture.defragment();
    fixture.run(&format!("fill kept {} 1", LARGE_MIB * 3 / 4));
    reports_free_memory(&mut fixture, "nearly full");
    // Only larger blocks.
    let large = FreePagesRequest { min_block_bytes: Some(2 * MIB), ..snapshot() };
    let large = host.client.request_free_pages(&large).unwrap();
    assert!(large.blocks.iter().all(|block| block.block_bytes >= 2 * MIB), "{large:?}");
    all_well(&fixture);
}

fn reports_free_memory(fixture: &mut Fixture<'_>, state: &str) {
    let free = fixture.client.request_free_pages(&snapshot()).unwrap();
    println!(
        "{state}: {} of {} MiB in {:.1} ms, guest {:.1} ms, lock {} ns, {:?}",
        free.total_bytes / MIB,
        free.guest_free_bytes / MIB,
        free.elapsed_ms,
        free.guest_ms,
        free.lock_ns_max,
        free.blocks
    );
    let mem_free = fixture.meminfo_bytes(&["MemFree"]);
    assert!(free.total_bytes >= mem_free / 100 * 98, "{mem_free}: {free:?}");
    assert!(near(free.guest_free_bytes, mem_free, MIB), "{mem_free}: {free:?}");
    let used = used_pages(fixture);
    assert!(used <= NOISE_PAGES, "{used} pages named are in use: {state}");
}

/// Pages of the newest report that the guest's kernel does not count as free.
fn used_pages(fixture: &mut Fixture<'_>) -> u64 {
    let mut bitmap = Vec::new();
    let place = fixture.client.free_pages_bitmap(&mut bitmap).unwrap();
    let first_page = place.regions.split('+').next().unwrap().parse::<u64>().unwrap();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in (0..place.pages).filter(|page| bitmap[(page / 8) as usize] >> (page % 8) & 1 == 1) {
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == first_page + page => *count += 1,
            _ => ranges.push((first_page + page, 1)),
        }
    }
    let mut used = 0;
    for some in ranges.chunks(RANGES) {
        let words: Vec<_> = some.iter().map(|(first, count)| format!("{first},{count}")).collect();
        let answer = fixture.run(&format!("not-free {}", words.join(" ")));
        used += answer.rsplit_once("used=").unwrap().1.parse::<u64>().unwrap();
    }
    used
}

#[test]
fn a_hold_is_kept_until_it_is_released() {
    let host = Host::start("held", Backing::Small, MEMORY_MIB);
    let mut fixture = boot(&host);
    fixture.run(&format!("fill kept {KEPT_MIB} 1"));
    let free = fixture.meminfo_bytes(&["MemFree"]);
    let held = host.client.request_free_pages(&hold(RESERVE_MIB)).unwrap();
    println!(
        "held: {} MiB in {:.1} ms, {:?}",
        held.total_bytes / MIB,
        held.elapsed_ms,
        held.blocks
    );
    assert_eq!(held.hold, Some(HoldState::Kept));
    let left = fixture.meminfo_bytes(&["MemFree"]);
    assert!(near(left, RESERVE_MIB * MIB, 4 * MIB), "{left}: {held:?}");
    assert!(near(held.total_bytes, free - left, 4 * MIB), "{free} {left}: {held:?}");
    // The guest works with the rest, and with a balloon.
    fixture.fill_and_verify("more", KEPT_MIB / 2, 2);
    assert!(host.client.request_free_pages(&hold(0)).is_err(), "a second hold");
    host.client.drop_caches(Caches::All, LIMIT).unwrap();
    let released = host.client.release_free_pages(LIMIT).unwrap();
    assert_eq!(released.released_bytes, held.total_bytes);
    fixture.run("drop more");
    let back = fixture.meminfo_bytes(&["MemFree"]);
    assert!(near(back, free, 4 * MIB), "{free} {back}");
    assert_eq!(host.status().requests.hold, None);
    // The smallest reserve is not zero.
    host.client.request_free_pages(&hold(0)).unwrap();
    let floor = fixture.meminfo_bytes(&["MemFree"]);
    assert!(floor >= MEMORY_MIB * MIB / 33, "{floor}");
    fixture.verify("kept", KEPT_MIB, 1);
    assert_eq!(host.status().requests.hold, Some(HoldState::Kept));
    all_well(&fixture);
}

#[test]
fn a_guest_under_pressure_takes_its_hold_back() {
    let host = Host::start("lost", Backing::Small, MEMORY_MIB);
    let mut fixture = boot(&host);
    fixture.run(&format!("fill kept {KEPT_MIB} 1"));
    for round in 0..5 {
        host.client.request_free_pages(&hold(RESERVE_MIB)).unwrap();
        let reply = fixture.run(&format!("pressure {NEEDED_MIB} 0"));
        assert_eq!(reply, format!("taken_mib={NEEDED_MIB} end=complete"), "{round}");
        assert_eq!(host.status().requests.hold, None, "{round}");
        fixture.fill_and_verify("used", NEEDED_MIB, round);
        fixture.run("drop used");
    }
    assert_eq!(fixture.counter("holds_lost"), 5);
    assert!(fixture.log().contains("back from the host"), "{}", fixture.log());
    fixture.verify("kept", KEPT_MIB, 1);
    all_well(&fixture);
}

#[test]
fn a_request_can_be_cancelled() {
    let host = Host::start("cancelled", Backing::Small, MEMORY_MIB);
    let mut fixture = boot(&host);
    fixture.fragment(MEMORY_MIB / 16);
    let free = fixture.meminfo_bytes(&["MemFree"]);
    // With a busy process a report takes tens of milliseconds, which is time to cancel it. Alone,
    // most are done before.
    fixture.run("busy 100");
    let stopped = (0..CANCELS).filter(|round| request_and_cancel(&host, *round)).count();
    fixture.run("idle");
    println!("{stopped} of {CANCELS} were stopped");
    assert!(stopped > 0, "no request was stopped");
    for round in 0..CANCELS {
        request_and_cancel(&host, round);
    }
    let back = fixture.meminfo_bytes(&["MemFree"]);
    assert!(near(back, free, 4 * MIB), "{free} {back}");
    reports_free_memory(&mut fixture, "after cancels");
    all_well(&fixture);
}

/// Sends a request and cancels until it ends. Returns whether it was cancelled.
fn request_and_cancel(host: &Host, round: u64) -> bool {
    let request = if round.is_multiple_of(2) { snapshot() } else { hold(RESERVE_MIB) };
    let asked = thread::scope(|scope| {
        let asking = scope.spawn(|| host.client.request_free_pages(&request));
        thread::sleep(Duration::from_micros(100 * round));
        while !asking.is_finished() {
            let _ = host.client.cancel();
        }
        asking.join().unwrap()
    });
    if matches!(asked, Ok(FreePages { kind: FreeKind::Hold, .. })) {
        // A busy guest may have taken the hold back.
        let _ = host.client.release_free_pages(LIMIT);
    }
    asked.is_err()
}

#[test]
fn the_driver_unloads_during_requests() {
    let host = Host::start("leaves", Backing::Small, MEMORY_MIB);
    let mut fixture = boot(&host);
    let free = fixture.meminfo_bytes(&["MemFree"]);
    for round in 0..12u64 {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = Rng::with_seed(round);
                while !over.load(Ordering::Relaxed) {
                    random_request(&host, &mut rng);
                }
            });
            thread::sleep(Duration::from_millis(5 * round));
            let began = Instant::now();
            fixture.unload_driver();
            assert!(began.elapsed() < LIMIT / 10, "{:?}", began.elapsed());
            over.store(true, Ordering::Relaxed);
        });
        let back = fixture.meminfo_bytes(&["MemFree"]);
        assert!(near(back, free, 8 * MIB), "{round}: {free} {back}");
        fixture.load_driver();
        let ready = host.until("ready for requests", |status| status.requests.possible);
        assert_eq!(ready.requests.hold, None, "{round}");
    }
    all_well(&fixture);
}

#[test]
fn random_requests_while_the_guest_allocates() {
    let host = Host::start("random", Backing::Small, MEMORY_MIB);
    let mut fixture = boot(&host);
    fixture.run(&format!("fill kept {KEPT_MIB} 1"));
    fixture.run("busy 300");
    let mut rng = Rng::with_seed(7);
    let done = (0..RANDOM_REQUESTS).filter(|_| random_request(&host, &mut rng)).count();
    fixture.run("idle");
    println!("{done} of {RANDOM_REQUESTS} done: {:?}", host.status().requests.ended);
    assert!(done >= RANDOM_REQUESTS as usize / 3, "{:?}", host.status().requests);
    fixture.verify("kept", KEPT_MIB, 1);
    fixture.fill_and_verify("more", KEPT_MIB, 2);
    all_well(&fixture);
}

/// Sends a random request. Returns whether the guest did it. An impossible request is no error.
pub(crate) fn random_request(host: &Host, rng: &mut Rng) -> bool {
    let client = &host.client;
    match rng.u8(0..5) {
        0 => client.drop_caches(Caches::All, LIMIT).is_ok(),
        1 => client.request_free_pages(&hold(rng.u64(64..400))).is_ok(),
        2 => client.release_free_pages(LIMIT).is_ok(),
        _ => client.request_free_pages(&snapshot()).is_ok(),
    }
}
