//! The back end outlives its guests, and ends on SIGTERM.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use bench::Driver;
use lab::Backing;

use crate::fixture::{Host, pages};

/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 1024;

/// Touched memory, so that its release takes the host a while.
const TOUCHED_MIB: u64 = 800;

/// Balloon target when the guest dies.
const INFLATED_MIB: u64 = 700;

/// Size of a file in the next guest's memory.
const KEPT_MIB: u64 = 100;

#[test]
fn back_end_outlives_guests_with_the_stock_driver() {
    outlives_guests("stock-dies", Driver::Stock);
}

#[test]
fn back_end_outlives_guests_with_the_aerostat_driver() {
    outlives_guests("own-dies", Driver::Own);
}

fn outlives_guests(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(driver);
    fixture.load_driver();
    fixture.run(&format!("touch {TOUCHED_MIB}"));
    host.set_target(pages(INFLATED_MIB));
    // The stock driver is still inflating. Ours is done, and the host still releases.
    let dying = host.until("in the middle", |status| status.balloon.actual_pages > 0);
    drop(fixture);
    println!("died at {:?}, {:?}", dying.balloon, dying.release);
    assert_disconnected(&host);

    let mut next = host.boot(driver);
    next.load_driver();
    // The target remains set.
    let status = host.wait_at_target();
    assert_eq!(status.balloon.actual_pages, pages(INFLATED_MIB), "{status:?}");
    next.fill_and_verify("kept", KEPT_MIB, 1);
    host.set_target(0);
    host.wait_at_target();
    next.fill_and_verify("more", INFLATED_MIB, 2);
    next.verify("kept", KEPT_MIB, 1);
    next.run("drop more");
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    // The balloon is not at its target when the guest disconnects.
    drop(next);
    assert_disconnected(&host);
    assert!(host.stop().success());
}

fn assert_disconnected(host: &Host) {
    let left = host.until("gone", |status| !status.guest.connected);
    assert_eq!(left.pid, host.backend.pid());
    assert_eq!((left.guest.driver, left.guest.memory_bytes), (control::Driver::None, 0));
    assert_eq!((left.balloon.actual_pages, left.balloon.max_bytes), (0, None));
    assert_eq!(left.balloon.target_pages, pages(INFLATED_MIB));
    assert!(!left.balloon.at_target, "{:?}", left.balloon);
    assert_eq!((left.release.pending_bytes, left.release.in_flight_bytes), (0, 0));
    assert_eq!((left.release.waiting_bytes, left.resident_bytes), (0, None));
    assert_eq!(left.faults.total(), 0, "{:?}", left.faults);
}

#[test]
fn sigterm_ends_the_back_end_during_a_balloon_change() {
    let host = Host::start("stopped", Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Stock);
    fixture.load_driver();
    fixture.run(&format!("touch {TOUCHED_MIB}"));
    host.set_target(pages(INFLATED_MIB));
    host.until("in the middle", |status| status.balloon.actual_pages > 0);
    let sockets = [host.backend.socket(), host.backend.control()].map(Path::to_owned);
    assert!(sockets.iter().all(|socket| socket.exists()));
    let _guest = fixture.into_guest();
    let ended = host.stop();
    assert!(ended.success(), "{ended}");
    assert!(!sockets.iter().any(|socket| socket.exists()), "{sockets:?}");
}

#[test]
fn a_panic_ends_the_back_end() {
    let mut process = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let host = Host::start("panics", Backing::Small, MEMORY_MIB);
        process = Some(format!("/proc/{}", host.backend.pid()));
        assert!(Path::new(process.as_ref().unwrap()).exists());
        resume_unwind(Box::new("a failing test"));
    }));
    assert!(outcome.is_err());
    assert!(!Path::new(&process.unwrap()).exists());
}
