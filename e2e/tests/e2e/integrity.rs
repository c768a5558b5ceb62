//! What a guest holds outside of its balloon stays as it is, and what it gave
//! really goes back to the host.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bench::Driver;
use bench::soak::plan::{Plan, Step};
use bench::soak::soak_run::SoakRun;
use lab::Backing;

use crate::fixture::{Fixture, Host, LIMIT, pages, well};
use crate::requests::random_request;

/// Makes each walk last so many minutes.
const MINUTES_VARIABLE: &str = "AEROSTAT_E2E_MINUTES";

/// Repeats a walk.
const SEED_VARIABLE: &str = "AEROSTAT_E2E_SEED";

/// Steps of a walk that is not measured in minutes.
const STEPS: u32 = 60;

/// Memory of a small guest, in MiB.
const SMALL_MIB: u64 = 1024;

/// Memory of the large one: page numbers beyond 32 bits of bytes, and more than
/// one chunk of everything.
const LARGE_MIB: u64 = 4096;

/// Targets that are set and taken back at once.
const TAKEN_BACK: u32 = 20;

/// How often the guest takes back all that it just gave. Where pages were
/// released that it had taken back, one time in two would tell.
const ROUNDS: u64 = 8;

/// Most memory used at once then, in MiB: what comes later is not in time.
const MOST_USED_MIB: u64 = 256;

/// Part of free memory that cannot be filled: page tables, and the guest's own
/// reserve.
const UNFILLED_DIVISOR: u64 = 20;

/// Between two requests of the host.
const REQUEST_PAUSE: Duration = Duration::from_millis(3);

#[test]
fn stock_driver_on_small_pages() {
    keeps_every_byte("stock-4k", Driver::Stock, Backing::Small, SMALL_MIB);
}

#[test]
fn stock_driver_on_huge_pages() {
    keeps_every_byte("stock-huge", Driver::Stock, Backing::Huge, SMALL_MIB);
}

#[test]
fn own_driver_on_small_pages() {
    keeps_every_byte("own-4k", Driver::Own, Backing::Small, SMALL_MIB);
}

#[test]
fn own_driver_on_huge_pages() {
    keeps_every_byte("own-huge", Driver::Own, Backing::Huge, SMALL_MIB);
}

#[test]
fn own_driver_in_a_large_guest() {
    keeps_every_byte("own-large", Driver::Own, Backing::Small, LARGE_MIB);
}

#[test]
fn stock_driver_that_also_reports_free_pages() {
    let seed = seed();
    println!("repeat with {SEED_VARIABLE}={seed}");
    let host = Host::start("stock-reports", Backing::Small, SMALL_MIB);
    let mut fixture = host.boot(Driver::Stock);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    walk(&mut fixture, seed, free_mib);
    // Linux begins 2 s after it could; a walk may be over sooner.
    host.until("reported", |status| status.reports.released_bytes > 0);
    everything_is_usable_again(&mut fixture, free_mib);
    let status = host.status();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
}

fn keeps_every_byte(name: &str, driver: Driver, backing: Backing, memory_mib: u64) {
    let seed = seed();
    println!("{name}: repeat with {SEED_VARIABLE}={seed}");
    // What goes back by itself would hide what the balloon gave.
    let host = Host::start_with(name, backing, memory_mib, &["--without", "reporting"]);
    let mut fixture = host.boot(driver);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    what_is_given_comes_back_to_the_host(&mut fixture);
    targets_taken_back_at_once_are_over(&fixture, seed);
    what_is_taken_back_at_once_stays(&mut fixture, seed);
    match driver {
        Driver::Own => walk_beside_requests(&host, &mut fixture, seed, free_mib),
        Driver::Stock => walk(&mut fixture, seed, free_mib),
    }
    everything_is_usable_again(&mut fixture, free_mib);
    assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
}

/// The host asks for something all the time, whether or not there is a driver.
fn walk_beside_requests(host: &Host, fixture: &mut Fixture<'_>, seed: u64, free_mib: u64) {
    let over = AtomicBool::new(false);
    let asked = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut asked, mut done) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                asked += 1;
                done += u32::from(random_request(host, &mut rng));
                // A guest asked without a pause does nothing else.
                thread::sleep(REQUEST_PAUSE);
            }
            (asked, done)
        });
        // Told also where the walk fails: it would be waited for in vain.
        let ended = catch_unwind(AssertUnwindSafe(|| walk(fixture, seed, free_mib)));
        over.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap();
        ended.map_or_else(|panic| resume_unwind(panic), |()| asked)
    });
    // There may be none.
    let _ = host.client.release_free_pages(LIMIT);
    println!("{asked:?} requests asked and done: {:?}", host.status().requests.ended);
    assert!(asked.1 > 0, "{:?}", host.status().requests);
}

fn walk(fixture: &mut Fixture<'_>, seed: u64, free_mib: u64) {
    let end = minutes().map(|minutes| Instant::now() + minutes);
    let plan = Plan::of_balloon(seed, free_mib);
    let mut walk = SoakRun::new(fixture.bench(), plan);
    let mut told = |step: &Step| println!("{step:?}");
    for step in 1.. {
        well(walk.step(&mut told));
        if end.map_or(step >= STEPS, |end| Instant::now() >= end) {
            break;
        }
    }
    well(walk.end(&mut told));
}

/// All that is free was touched, so all that is inflated was the host's memory,
/// and must be missing there to the last page that can be.
fn what_is_given_comes_back_to_the_host(fixture: &mut Fixture<'_>) {
    let free_mib = fixture.free_mib();
    fixture.run(&format!("touch {}", free_mib - free_mib / UNFILLED_DIVISOR));
    let before = fixture.status().resident_bytes.unwrap();
    let given_mib = free_mib / 2;
    fixture.set_target(pages(given_mib));
    let inflated = fixture.wait_at_target();
    let fell_mib = (before - inflated.resident_bytes.unwrap()) >> 20;
    let touched_of_it_mib = given_mib - free_mib / UNFILLED_DIVISOR;
    assert!(fell_mib >= touched_of_it_mib, "{fell_mib} of {given_mib} MiB: {inflated:?}");
    fixture.set_target(0);
    fixture.wait_at_target();
}

/// The guest sees some of these targets, and of others nothing.
fn targets_taken_back_at_once_are_over(fixture: &Fixture<'_>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..TAKEN_BACK {
        fixture.set_target(rng.u32(1..=pages(SMALL_MIB / 2)));
        fixture.set_target(0);
        fixture.wait_at_target();
    }
}

/// The guest takes everything back and uses it while the host still releases.
/// In pieces, it takes the host longest.
fn what_is_taken_back_at_once_stays(fixture: &mut Fixture<'_>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let free_mib = fixture.free_mib();
    fixture.fragment(free_mib / UNFILLED_DIVISOR);
    let usable_mib = fixture.free_mib() - 2 * free_mib / UNFILLED_DIVISOR;
    let used_mib = usable_mib.min(MOST_USED_MIB);
    for round in 0..ROUNDS {
        fixture.run(&format!("touch {usable_mib}"));
        fixture.set_target(pages(usable_mib));
        let enough = rng.u32(0..=pages(usable_mib));
        fixture.until("on its way", |status| status.balloon.actual_pages >= enough);
        fixture.set_target(0);
        fixture.until("empty", |status| status.balloon.actual_pages == 0);
        fixture.fill_and_verify("used", used_mib, round);
        fixture.run("drop used");
        fixture.wait_at_target();
    }
    fixture.defragment();
}

/// As much can be filled as before the driver came. What the guest calls free
/// would not tell: up to an eighth of it is in lists of its processors.
fn everything_is_usable_again(fixture: &mut Fixture<'_>, free_mib: u64) {
    fixture.unload_driver();
    let fill_mib = free_mib - free_mib / UNFILLED_DIVISOR;
    fixture.fill_and_verify("all", fill_mib, 1);
    let resident_mib = fixture.status().resident_bytes.unwrap() >> 20;
    assert!(resident_mib >= fill_mib, "{fill_mib} MiB hold a pattern in {resident_mib}");
}

fn seed() -> u64 {
    match std::env::var(SEED_VARIABLE) {
        Ok(seed) => seed.parse().expect("a seed is a number"),
        Err(_) => fastrand::u64(..),
    }
}

fn minutes() -> Option<Duration> {
    let minutes = std::env::var(MINUTES_VARIABLE).ok()?;
    let minutes: u64 = minutes.parse().expect("minutes are a number");
    Some(Duration::from_secs(60 * minutes))
}
