//! Page types and counters of ballooned pages in the guest's kernel. A memory dump inside the guest
//! skips pages that are marked offline (see `debian.rs`).

use std::time::Instant;

use bench::Driver;
use lab::Backing;

use crate::fixture::{Fixture, Host, pages};
use crate::requests::{LIMIT, hold};

/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 1024;

/// Balloon target.
const INFLATED_MIB: u64 = 700;

/// Memory left unfilled for the kernel, in MiB.
const UNFILLED_MIB: u64 = 48;

/// Free memory that a hold leaves, in MiB.
const RESERVE_MIB: u64 = 150;

#[test]
fn stock_driver_marks_ballooned_pages_offline() {
    marks_what_it_holds("stock-types", Driver::Stock);
}

#[test]
fn aerostat_driver_marks_ballooned_pages_offline() {
    marks_what_it_holds("own-types", Driver::Own);
}

fn marks_what_it_holds(name: &str, driver: Driver) {
    let host = Host::start(name, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(driver);
    let free_mib = fixture.free_mib();
    fixture.load_driver();
    host.set_target(pages(INFLATED_MIB));
    host.wait_at_target();
    let inflated = u64::from(pages(INFLATED_MIB));
    until_offline(&mut fixture, inflated);
    assert_eq!(held_by_events(&mut fixture), inflated);

    host.set_target(pages(INFLATED_MIB / 2));
    host.wait_at_target();
    let left = u64::from(pages(INFLATED_MIB / 2));
    assert_eq!(offline_pages(&mut fixture), left);
    assert_eq!(held_by_events(&mut fixture), left);
    fixture.unload_driver();
    assert_eq!(offline_pages(&mut fixture), 0);
    assert_eq!(held_by_events(&mut fixture), 0);
    fixture.fill_and_verify("all", free_mib - UNFILLED_MIB, 1);
    let complaints = bench::guest_complaints(&fixture.log());
    assert!(complaints.is_empty(), "{complaints:?} in\n{}", fixture.log());
}

#[test]
fn held_pages_are_marked_offline() {
    let host = Host::start("held-types", Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    let held = host.client.request_free_pages(&hold(RESERVE_MIB)).unwrap();
    let held_pages = held.total_bytes / control::BALLOON_PAGE_BYTES;
    assert!(held_pages > 0, "{held:?}");
    until_offline(&mut fixture, held_pages);
    host.client.release_free_pages(LIMIT).unwrap();
    assert_eq!(offline_pages(&mut fixture), 0);
    // Held pages are not counted as ballooned.
    assert_eq!(events(&mut fixture), (0, 0));
}

/// Our driver marks pages right after the host has acknowledged them.
fn until_offline(fixture: &mut Fixture<'_>, pages: u64) {
    let end = Instant::now() + LIMIT;
    while offline_pages(fixture) != pages {
        assert!(Instant::now() < end, "{} of {pages} pages are marked", offline_pages(fixture));
    }
}

/// Pages that the guest's kernel has marked offline.
fn offline_pages(fixture: &mut Fixture<'_>) -> u64 {
    fixture.run("offline").parse().unwrap()
}

/// Size of the balloon by the kernel's event counters. (Ours may return more than it takes.)
fn held_by_events(fixture: &mut Fixture<'_>) -> u64 {
    let (taken, given_back) = events(fixture);
    taken - given_back
}

/// The kernel's counters of all balloons, in pages: inflated, deflated.
fn events(fixture: &mut Fixture<'_>) -> (u64, u64) {
    let lines = fixture.lines("cat /proc/vmstat");
    let count = |name: &str| -> u64 {
        let value = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {lines:?}")).parse().unwrap()
    };
    (count("balloon_inflate"), count("balloon_deflate"))
}
