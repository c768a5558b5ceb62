//! Guest memory outside the balloon keeps its contents, and ballooned memory returns to the host.

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

/// Environment variable: minutes of each random run.
const MINUTES_VARIABLE: &str = "AEROSTAT_E2E_MINUTES";

/// Environment variable: seed of a random run to repeat.
const SEED_VARIABLE: &str = "AEROSTAT_E2E_SEED";

/// Steps of a random run without a duration.
const STEPS: u32 = 60;

/// Memory of a small guest, in MiB.
const SMALL_MIB: u64 = 1024;

/// Memory of the large guest: byte addresses over 32 bits, and more than one chunk of every bitmap.
const LARGE_MIB: u64 = 4096;

/// Targets that are set and withdrawn at once.
const TAKEN_BACK: u32 = 20;

/// How often the guest deflates all that it just inflated. A host that releases pages after their
/// deflate fails one round in two.
const ROUNDS: u64 = 8;

/// Maximum memory used at once then, in MiB: later use misses the race.
const MOST_USED_MIB: u64 = 256;

/// Part of free memory that cannot be filled: page tables, and the guest's own reserve.
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
fn aerostat_driver_on_small_pages() {
    keeps_every_byte("own-4k", Driver::Own, Backing::Small, SMALL_MIB);
}

#[test]
fn aerostat_driver_on_huge_pages() {
    keeps_every_byte("own-huge", Driver::Own, Backing::Huge, SMALL_MIB);
}

#[test]
fn aerostat_driver_in_a_large_guest() {
    keeps_every_byte("own-large", Driver::Own, Backing::Small, LARGE_MIB);
}

#[test]
fn stock_driver_with_free_page_reporting() {
    let seed = seed();
    println!("repeat with {SEED_VARIABLE}={seed}");
    let host = Host::start("stock-reports", Backing::Small, SMALL_MIB);
    let mut fixture = host.boot(Driver::Stock);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    random_run(&mut fixture, seed, free_mib);
    // Linux reports after 2 s. A run may end sooner.
    host.until("reported", |status| status.reports.released_bytes > 0);
    all_memory_is_usable_again(&mut fixture, free_mib);
    let status = host.status();
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);
}

fn keeps_every_byte(name: &str, driver: Driver, backing: Backing, memory_mib: u64) {
    let seed = seed();
    println!("{name}: repeat with {SEED_VARIABLE}={seed}");
    // Free page reporting would hide what the balloon released.
    let host = Host::start_with(name, backing, memory_mib, &["--without", "reporting"]);
    let mut fixture = host.boot(driver);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    ballooned_memory_returns_to_the_host(&mut fixture);
    withdrawn_targets_take_effect(&fixture, seed);
    pages_deflated_at_once_keep_their_contents(&mut fixture, seed);
    match driver {
        Driver::Own => run_with_requests(&host, &mut fixture, seed, free_mib),
        Driver::Stock => random_run(&mut fixture, seed, free_mib),
    }
    all_memory_is_usable_again(&mut fixture, free_mib);
    assert_eq!(host.status().faults.total(), 0, "{:?}", host.status().faults);
}

/// Requests free memory from the guest all the time, with or without a driver.
fn run_with_requests(host: &Host, fixture: &mut Fixture<'_>, seed: u64, free_mib: u64) {
    let over = AtomicBool::new(false);
    let asked = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut asked, mut done) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                asked += 1;
                done += u32::from(random_request(host, &mut rng));
                // Without a pause the guest would do nothing else.
                thread::sleep(REQUEST_PAUSE);
            }
            (asked, done)
        });
        // Stop the thread also if the run panics, since the scope joins it.
        let ended = catch_unwind(AssertUnwindSafe(|| random_run(fixture, seed, free_mib)));
        over.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap();
        ended.map_or_else(|panic| resume_unwind(panic), |()| asked)
    });
    // There may be no hold.
    let _ = host.client.release_free_pages(LIMIT);
    println!("{asked:?} requests sent and done: {:?}", host.status().requests.ended);
    assert!(asked.1 > 0, "{:?}", host.status().requests);
}

fn random_run(fixture: &mut Fixture<'_>, seed: u64, free_mib: u64) {
    let end = minutes().map(|minutes| Instant::now() + minutes);
    let plan = Plan::of_balloon(seed, free_mib);
    let mut run = SoakRun::new(fixture.bench(), plan);
    let mut print_step = |step: &Step| println!("{step:?}");
    for step in 1.. {
        well(run.step(&mut print_step));
        if end.map_or(step >= STEPS, |end| Instant::now() >= end) {
            break;
        }
    }
    well(run.end(&mut print_step));
}

/// All free memory was touched, so every ballooned page was host memory. The host must get back
/// every page that it can.
fn ballooned_memory_returns_to_the_host(fixture: &mut Fixture<'_>) {
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

/// The guest sees only some of these targets.
fn withdrawn_targets_take_effect(fixture: &Fixture<'_>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..TAKEN_BACK {
        fixture.set_target(rng.u32(1..=pages(SMALL_MIB / 2)));
        fixture.set_target(0);
        fixture.wait_at_target();
    }
}

/// The guest deflates everything and uses the memory while the host still releases it. Fragmented
/// memory takes the host longest.
fn pages_deflated_at_once_keep_their_contents(fixture: &mut Fixture<'_>, seed: u64) {
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

/// As much memory can be filled as before the driver loaded. The guest's free count is too low: up
/// to an eighth is in per-CPU lists.
fn all_memory_is_usable_again(fixture: &mut Fixture<'_>, free_mib: u64) {
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
