//! Optional features of the virtio balloon specification, with the kernel's own driver.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use bench::Driver;
use control::api::{FreeKind, PageRun};
use control::{BALLOON_PAGE_BYTES, HintOutcome, PartialHuge, ReleaseMode, Status};
use lab::{Backing, Guest, GuestMemoryDir};
use rustix::fs::{FallocateFlags, fallocate};
use vhost_device_balloon::Backend;

use crate::fixture::{Fixture, Host, LIMIT, REPORTED_MIB, guest_memory, pages};

/// Memory of most guests here, in MiB.
const MEMORY_MIB: u64 = 1024;

/// Statistics interval.
const STATS_MS: u64 = 100;

/// Statistics of Linux 6.12 without huge pages in the guest.
const STATISTICS: [&str; 14] = [
    "allocation_stalls",
    "async_reclaimed_bytes",
    "async_scanned_bytes",
    "available_bytes",
    "cached_bytes",
    "direct_reclaimed_bytes",
    "direct_scanned_bytes",
    "free_bytes",
    "major_faults",
    "minor_faults",
    "oom_kills",
    "swapped_in_bytes",
    "swapped_out_bytes",
    "total_bytes",
];

/// Between two polls of a measured value.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Linux starts to report 2 s after memory was freed, and reports a part of it every 2 s
/// (mm/page_reporting.c).
const REPORTS_LIMIT: Duration = Duration::from_secs(10);

/// After this time without a report, reporting is complete.
const REPORTS_PAUSE: Duration = Duration::from_millis(4500);

/// Waits for statistics taken after this call: the next may be on its way, so the one after it.
fn fresh(host: &Host) -> Status {
    newer(host);
    newer(host)
}

fn newer(host: &Host) -> Status {
    let before = Instant::now();
    host.until("statistics", |status| {
        let age = status.stats.age_ms.map(Duration::from_millis);
        // The age is in whole milliseconds, rounded down.
        let age = age.map(|age| age + Duration::from_millis(1));
        !status.stats.stale && age.is_some_and(|age| age < before.elapsed())
    })
}

#[test]
fn statistics_match_the_guest() {
    let host = Host::start("statistics", Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Stock);
    assert_eq!(host.status().stats.age_ms, None);
    fixture.load_driver();
    // The driver's first buffer has its first values. No further ones are requested.
    let status = host.until("statistics", |status| status.stats.age_ms.is_some());
    assert!(status.stats.stale && status.stats.interval_ms == 0, "{status:?}");
    let names: Vec<&str> = status.stats.values.keys().map(String::as_str).collect();
    assert_eq!(names, STATISTICS);

    host.client.set_stats(STATS_MS).unwrap();
    let before = fresh(&host).stats.values;
    let free_mib = fixture.free_mib();
    let reported_mib = before["free_bytes"] >> 20;
    assert!(reported_mib.abs_diff(free_mib) <= 8, "{reported_mib} and {free_mib} MiB are free");
    let (total, available) = (before["total_bytes"], before["available_bytes"]);
    assert!((MEMORY_MIB * 9 / 10..=MEMORY_MIB).contains(&(total >> 20)), "{total}");
    assert!((total / 2..total).contains(&available), "{available}");

    fixture.run("fill some 300 1");
    let after = fresh(&host).stats.values;
    for (name, sign) in [("free_bytes", -1), ("cached_bytes", 1)] {
        let by_mib = (after[name] as i64 - before[name] as i64) >> 20;
        assert!((sign * by_mib - 300).abs() <= 16, "{name} by {by_mib} MiB");
    }
    assert_eq!(after["total_bytes"], total);

    fixture.unload_driver();
    let gone = host.until("stale", |status| status.stats.stale).stats;
    assert_eq!(gone.values["total_bytes"], total);
    fixture.load_driver();
    fresh(&host);
    host.client.set_stats(0).unwrap();
    assert!(host.status().stats.stale);
    assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
}

#[test]
fn the_command_line_shows_and_watches_statistics() {
    const NAME: &str = "watched";
    let host = Host::start(NAME, Backing::Small, MEMORY_MIB / 4);
    let mut fixture = host.boot(Driver::Stock);
    fixture.load_driver();
    host.client.set_stats(STATS_MS).unwrap();
    fresh(&host);
    let (code, out, err) = host.aerostat(&["status", NAME]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let line = out.lines().find(|line| line.starts_with("statistics")).unwrap();
    assert!(line.contains("free ") && line.contains("major faults "), "{line}");
    let metrics = host.client.metrics().unwrap();
    assert!(metrics.contains(r#"aerostat_guest_stat{guest="watched",stat="free_bytes"} "#));
}

/// Requests to a driver without a request queue, possible and not.
#[test]
fn a_stock_driver_reports_free_pages_and_has_no_request_queue() {
    const NAME: &str = "shown";
    let host = Host::start(NAME, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Stock);
    fixture.load_driver();
    host.until("a ready driver", |status| {
        status.guest.features.iter().any(|f| f == "free-page-hint")
    });
    fixture.run("fill some 300 1");
    let free_mib = fixture.free_mib();
    let (code, out, err) = host.aerostat(&["free-pages", NAME]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.contains("4 MiB") && out.contains("a character is"), "{out}");
    let shown = host.client.free_pages().unwrap();
    assert_eq!(shown.kind, FreeKind::Hint);
    let shown_mib = shown.total_bytes >> 20;
    assert!(shown_mib * 100 >= free_mib * 98, "{shown_mib} of {free_mib} MiB");
    assert!(shown_mib <= free_mib + 8, "{shown_mib} of {free_mib} MiB");
    assert_eq!(
        shown.map.regions.iter().map(|r| r.free_pages.iter().sum::<u64>()).sum::<u64>() * 4096,
        shown.total_bytes
    );
    for arguments in [&["drop-caches", NAME][..], &["free-pages", NAME, "--hold"]] {
        let (code, _, err) = host.aerostat(arguments);
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains("no request queue"), "{err}");
    }
    fixture.verify("some", 300, 1);
    // A driver that stops may only pause; one that starts has said nothing yet.
    fixture.unload_driver();
    fixture.load_driver();
    host.until("a ready driver", |status| {
        status.guest.features.iter().any(|f| f == "free-page-hint")
    });
    assert!(host.client.free_pages().is_err(), "the report of another driver");
}

/// A back end in this process, so that hinted pages can be inspected while the guest keeps them.
#[test]
fn hinted_pages_can_be_discarded() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("monitor");
    let listener = UnixListener::bind(&socket).unwrap();
    let backend = Backend::new("hints", ReleaseMode::Background, PartialHuge::Split).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    std::thread::scope(|threads| {
        let serving = threads.spawn(|| backend.listen(&listener, &stopped));
        // Also dropped if a test fails.
        let stop = stop;
        hints_are_tested(&backend, &socket);
        drop(stop);
        serving.join().unwrap().unwrap();
    });
}

fn hints_are_tested(backend: &Backend, socket: &Path) {
    let balloon = backend.balloon();
    let kernel = lab::uml::kernel().unwrap();
    let memory = GuestMemoryDir::mount(Backing::Small, MEMORY_MIB).unwrap();
    let mut guest = Guest::uml(&kernel)
        .memory_mib(MEMORY_MIB)
        .memory_dir(memory.path())
        .balloon(socket)
        .modules(kernel.stock_modules.clone())
        .boot()
        .unwrap();
    let mut run = |command: &str| guest.run(command).unwrap().text;
    assert!(balloon.start_hints().is_err(), "there is no driver");
    run("insmod virtio_balloon");
    run("touch 700");
    for round in 0..4 {
        // The guest is idle in the first round.
        if round == 1 {
            run("fill kept 300 7");
        }
        run("drop-caches");
        let free_mib: u64 = run("free-mib").parse().unwrap();
        let id = balloon.start_hints().unwrap();
        assert!(balloon.start_hints().is_err(), "one at a time");
        let hints = balloon.wait_hints(id, LIMIT);
        let hinted_mib = hints.bytes >> 20;
        println!("round {round}: {hinted_mib} of {free_mib} MiB, {hints:?}");
        assert_eq!(hints.outcome, HintOutcome::Complete);
        assert!(hinted_mib * 100 >= free_mib * 98, "{hinted_mib} of {free_mib} MiB");
        assert_eq!(hints.list.iter().map(|run| run.pages).sum::<u64>(), hints.pages);
        // The memory of a destination that did not receive these pages.
        lose(&hints.list);
        balloon.end_hints(id).unwrap();
        if round > 0 {
            assert_eq!(run("verify kept 300 7"), "0", "wrong pages");
        }
        // All memory is usable again.
        let usable_mib = free_mib * 9 / 10 - REPORTED_MIB;
        run(&format!("fill all {usable_mib} {round}"));
        assert_eq!(run(&format!("verify all {usable_mib} {round}")), "0");
        run("drop all");
    }
    let faults = balloon.status().faults;
    assert_eq!(faults.total(), 0, "{faults:?}");
    // A paused guest does not answer.
    let pid = rustix::process::Pid::from_raw(guest.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let id = balloon.start_hints().unwrap();
    let silent = balloon.wait_hints(id, Duration::from_millis(200));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert_eq!(silent.outcome, HintOutcome::InProgress);
    balloon.end_hints(id).unwrap();
    assert_eq!(guest.run("verify kept 300 7").unwrap().text, "0");
}

/// Punches these pages out of the guest's memory file, which the back end in this process has open.
fn lose(runs: &[PageRun]) {
    let file = guest_memory(std::process::id()).expect("the guest's memory is open here");
    for run in runs {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // User Mode Linux: file offsets are guest addresses.
        let (at, len) = (run.start * BALLOON_PAGE_BYTES, run.pages * BALLOON_PAGE_BYTES);
        assert!(at + len <= file.metadata().unwrap().size(), "{run:?}");
        fallocate(&file, how, at, len).unwrap();
    }
    let hinted: u64 = runs.iter().map(|run| run.pages * BALLOON_PAGE_BYTES).sum();
    let left = file.metadata().unwrap().blocks() * 512;
    assert!(left <= (MEMORY_MIB << 20) - hinted, "{left} bytes are left beside {hinted}");
}

/// Waits until the guest's reporting is complete.
fn until_reported(host: &Host) {
    let (mut last, mut since) = (u64::MAX, Instant::now());
    host.until("at rest", |status| {
        if status.reports.messages != last {
            (last, since) = (status.reports.messages, Instant::now());
        }
        std::thread::sleep(POLL_INTERVAL);
        since.elapsed() >= REPORTS_PAUSE
    });
}

#[test]
fn freed_memory_is_reported_and_returned_to_the_host() {
    const FREED_MIB: u64 = 1024;
    // With less memory Linux reports less at a time, and takes 9 s of the 10.
    let host = Host::start("reports", Backing::Small, 3 * MEMORY_MIB);
    let mut fixture = host.boot(Driver::Stock);
    fixture.load_driver();
    fixture.fill_and_verify("kept", 400, 1);
    until_reported(&host);
    fixture.fill_and_verify("freed", FREED_MIB, 2);
    let before = host.status();
    fixture.run("drop freed");
    let freed_at = Instant::now();
    let enough = before.resident_bytes.unwrap() - (FREED_MIB << 20) * 98 / 100;
    let after = host.until("back", |status| {
        std::thread::sleep(POLL_INTERVAL);
        status.resident_bytes.unwrap() <= enough || freed_at.elapsed() > 2 * REPORTS_LIMIT
    });
    let took = freed_at.elapsed();
    let back_mib = (before.resident_bytes.unwrap() - after.resident_bytes.unwrap()) >> 20;
    println!("{back_mib} MiB back in {took:?}: {:?}", after.reports);
    assert!(took <= REPORTS_LIMIT, "{back_mib} of {FREED_MIB} MiB in {took:?}");
    assert!(after.reports.released_bytes > before.reports.released_bytes);
    assert_eq!((after.balloon.actual_pages, after.reports.poisoned_bytes), (0, 0));
    assert_eq!(after.release.released_bytes, 0, "the balloon gave nothing");
    fixture.verify("kept", 400, 1);
    fixture.fill_and_verify("again", FREED_MIB, 3);
    fixture.verify("kept", 400, 1);
    assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
}

/// How a kernel clears free pages, and the poison that its driver reports.
struct Poison {
    name: &'static str,
    word: &'static str,
    poison_val: Option<u32>,
    releases_reports: bool,
}

const POISONS: [Poison; 3] = [
    Poison {
        name: "init-on-alloc",
        word: "init_on_alloc=1",
        poison_val: None,
        releases_reports: true,
    },
    Poison {
        name: "init-on-free",
        word: "init_on_free=1",
        poison_val: Some(0),
        releases_reports: true,
    },
    Poison {
        name: "page-poison",
        word: "page_poison=1",
        poison_val: Some(0xaaaa_aaaa),
        releases_reports: false,
    },
];

#[test]
fn guests_with_init_on_alloc_work() {
    serves(&POISONS[0]);
}

#[test]
fn guests_with_init_on_free_work() {
    serves(&POISONS[1]);
}

#[test]
fn guests_with_page_poison_work() {
    serves(&POISONS[2]);
}

fn serves(poison: &Poison) {
    let host = Host::start(poison.name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot_with(Driver::Stock, &[poison.word]);
    fixture.run("touch 700");
    fixture.load_driver();
    let status = host.until("a ready driver", |status| status.stats.age_ms.is_some());
    assert_eq!(status.guest.poison_val, poison.poison_val, "{status:?}");
    assert!(status.guest.features.iter().any(|name| name == "reporting"), "{status:?}");
    fixture.fill_and_verify("kept", 200, 1);
    until_reported(&host);
    for round in 0..3 {
        host.set_target(pages(400));
        host.wait_at_target();
        host.set_target(0);
        host.wait_at_target();
        fixture.fill_and_verify("used", 500, round);
        fixture.run("drop used");
        host.client.hints(LIMIT).unwrap();
    }
    until_reported(&host);
    let reports = host.status().reports;
    println!("{}: {reports:?}", poison.name);
    // All free pages are allocated once. The kernel checks them then.
    let free_mib = fixture.free_mib();
    fixture.fill_and_verify("all", free_mib - free_mib / 20, 9);
    fixture.verify("kept", 200, 1);
    not_corrupted(&fixture);
    assert!(reports.reported_bytes > 0);
    assert_eq!(reports.released_bytes > 0, poison.releases_reports, "{reports:?}");
    assert_eq!(reports.poisoned_bytes > 0, !poison.releases_reports, "{reports:?}");
    assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
}

/// Asserts that the kernel found no changed poison (mm/page_poison.c).
fn not_corrupted(fixture: &Fixture<'_>) {
    let log = fixture.log();
    for word in ["pagealloc:", "corruption", "bit error"] {
        assert!(!log.contains(word), "{log}");
    }
}

/// Without the feature, a driver that poisons does not report at all.
#[test]
fn a_guest_that_poisons_without_the_feature_reports_nothing() {
    let host =
        Host::start_with("no-poison", Backing::Small, MEMORY_MIB / 4, &["--without", "poison"]);
    let mut fixture = host.boot_with(Driver::Stock, &["page_poison=1"]);
    fixture.load_driver();
    let status = host.until("a ready driver", |status| status.stats.age_ms.is_some());
    for absent in ["reporting", "page-poison"] {
        assert!(!status.guest.features.iter().any(|name| name == absent), "{status:?}");
    }
}

/// Queue numbers differ with each feature set. Every queue works with every set.
#[test]
fn queue_numbers_match_the_kernel_for_every_feature_set() {
    for subset in 0..8u32 {
        let offers = |bit: u32| subset >> bit & 1 == 1;
        let names = ["stats", "hint", "reporting"];
        let without: Vec<&str> =
            (0..3).filter(|bit| !offers(*bit)).map(|bit| names[bit as usize]).collect();
        let without = without.join(",");
        let arguments = ["--without", &without];
        let arguments = if without.is_empty() { &[][..] } else { &arguments[..] };
        let name = format!("queues-{subset}");
        let host = Host::start_with(&name, Backing::Small, MEMORY_MIB / 4, arguments);
        let mut fixture = host.boot(Driver::Stock);
        fixture.load_driver();
        host.set_target(pages(64));
        host.wait_at_target();
        let status = if offers(0) {
            host.client.set_stats(STATS_MS).unwrap();
            fresh(&host)
        } else {
            host.status()
        };
        assert_eq!(status.stats.age_ms.is_some(), offers(0), "{status:?}");
        match host.client.hints(LIMIT) {
            Ok(hints) => assert!(offers(1) && hints.pages > 0, "{subset}: {hints:?}"),
            Err(error) => assert!(!offers(1), "{subset}: {error}"),
        }
        if offers(2) {
            host.until("reported", |status| status.reports.released_bytes > 0);
        }
        host.set_target(0);
        host.wait_at_target();
        fixture.fill_and_verify("used", 100, u64::from(subset));
        assert_eq!(host.status().reports.messages > 0, offers(2));
        assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
    }
}
