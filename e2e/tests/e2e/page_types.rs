//! What the guest's kernel is told of ballooned pages: that nobody may look at them (who copies its
//! memory from within goes by that, as `debian.rs` shows), and how many came and went.

use std::time::Instant;

use bench::Driver;
use lab::Backing;

use crate::bed::{Bed, Host, pages};
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
    let mut bed = host.boot(driver);
    let free_mib = bed.free_mib();
    bed.load_driver();
    host.set_target(pages(INFLATED_MIB));
    host.settle();
    let inflated = u64::from(pages(INFLATED_MIB));
    until_offline(&mut bed, inflated);
    assert_eq!(held_by_events(&mut bed), inflated);

    host.set_target(pages(INFLATED_MIB / 2));
    host.settle();
    let left = u64::from(pages(INFLATED_MIB / 2));
    assert_eq!(offline_pages(&mut bed), left);
    assert_eq!(held_by_events(&mut bed), left);
    bed.unload_driver();
    assert_eq!(offline_pages(&mut bed), 0);
    assert_eq!(held_by_events(&mut bed), 0);
    bed.fill_and_verify("all", free_mib - UNFILLED_MIB, 1);
    let complaints = bench::guest_complaints(&bed.log());
    assert!(complaints.is_empty(), "{complaints:?} in\n{}", bed.log());
}

#[test]
fn a_hold_marks_what_it_holds() {
    let host = Host::start("held-types", Backing::Small, MEMORY_MIB);
    let mut bed = host.boot(Driver::Own);
    bed.load_driver();
    host.until("ready for requests", |status| status.requests.possible);
    let held = host.client.ask_free_pages(&hold(RESERVE_MIB)).unwrap();
    let held_pages = held.total_bytes / control::BALLOON_PAGE_BYTES;
    assert!(held_pages > 0, "{held:?}");
    until_offline(&mut bed, held_pages);
    host.client.release_free_pages(LIMIT).unwrap();
    assert_eq!(offline_pages(&mut bed), 0);
    // A hold is no balloon.
    assert_eq!(events(&mut bed), (0, 0));
}

/// Our driver marks pages right after the host was told of them.
fn until_offline(bed: &mut Bed<'_>, pages: u64) {
    let end = Instant::now() + LIMIT;
    while offline_pages(bed) != pages {
        assert!(Instant::now() < end, "{} of {pages} pages are marked", offline_pages(bed));
    }
}

/// Pages that nobody but their owner may look at.
fn offline_pages(bed: &mut Bed<'_>) -> u64 {
    bed.run("offline").parse().unwrap()
}

/// The balloon as the kernel counted it. (Ours may give back more than it takes at last.)
fn held_by_events(bed: &mut Bed<'_>) -> u64 {
    let (taken, given_back) = events(bed);
    taken - given_back
}

/// What the kernel counted of all balloons, in pages: taken, given back.
fn events(bed: &mut Bed<'_>) -> (u64, u64) {
    let lines = bed.lines("cat /proc/vmstat");
    let count = |name: &str| -> u64 {
        let value = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {lines:?}")).parse().unwrap()
    };
    (count("balloon_inflate"), count("balloon_deflate"))
}
