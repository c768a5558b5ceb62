//! What the guest's kernel is told of ballooned pages: that nobody may look at them (who copies its
//! memory from within goes by that, as `debian.rs` shows), and how many came and went.

use std::time::Instant;

use bench::Driver;
use lab::Backing;

use crate::fixture::{Fixture, Host, pages};
use crate::requests::{LIMIT, hold};

/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 1024;

/// What the balloon takes.
const INFLATED_MIB: u64 = 700;

/// What stays free when all is filled, in MiB: the kernel needs some.
const UNFILLED_MIB: u64 = 48;

/// What a hold leaves, in MiB.
const RESERVE_MIB: u64 = 150;

#[test]
fn stock_driver_marks_what_it_holds() {
    marks_what_it_holds("stock-types", Driver::Stock);
}

#[test]
fn own_driver_marks_what_it_holds() {
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
fn a_hold_marks_what_it_holds() {
    let host = Host::start("held-types", Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    let held = host.client.ask_free_pages(&hold(RESERVE_MIB)).unwrap();
    let held_pages = held.total_bytes / control::BALLOON_PAGE_BYTES;
    assert!(held_pages > 0, "{held:?}");
    until_offline(&mut fixture, held_pages);
    host.client.release_free_pages(LIMIT).unwrap();
    assert_eq!(offline_pages(&mut fixture), 0);
    // A hold is no balloon.
    assert_eq!(events(&mut fixture), (0, 0));
}

/// Our driver marks pages right after the host was told of them.
fn until_offline(fixture: &mut Fixture<'_>, pages: u64) {
    let end = Instant::now() + LIMIT;
    while offline_pages(fixture) != pages {
        assert!(Instant::now() < end, "{} of {pages} pages are marked", offline_pages(fixture));
    }
}

/// Pages that nobody but their owner may look at.
fn offline_pages(fixture: &mut Fixture<'_>) -> u64 {
    fixture.run("offline").parse().unwrap()
}

/// The balloon as the kernel counted it. (Ours may give back more than it takes at last.)
fn held_by_events(fixture: &mut Fixture<'_>) -> u64 {
    let (taken, given_back) = events(fixture);
    taken - given_back
}

/// What the kernel counted of all balloons, in pages: taken, given back.
fn events(fixture: &mut Fixture<'_>) -> (u64, u64) {
    let lines = fixture.lines("cat /proc/vmstat");
    let count = |name: &str| -> u64 {
        let value = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {lines:?}")).parse().unwrap()
    };
    (count("balloon_inflate"), count("balloon_deflate"))
}
