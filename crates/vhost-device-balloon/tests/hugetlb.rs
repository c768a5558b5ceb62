//! Guest memory in huge pages of the host's pool. Alone in its process, where nobody else maps
//! files.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers of our own")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;

use control::api::ReleaseMode;
use lab::huge_pool::{HUGE_PAGE_BYTES, HugePool};
use vhost_device_balloon::{End, SessionError, Violation};

use support::driver::{BITMAP, Monitor, Vm, mem_table};
use support::front_end::request;
use support::guest::{BASE, BYTES, FIRST_PAGE, Guest, PAGES, data_pages};
use support::server::Server;

/// Huge pages of a guest: the rings are in the first one.
const HUGE_PAGES: u64 = BYTES / HUGE_PAGE_BYTES;

fn pool(pages: u64) -> Option<HugePool> {
    HugePool::new(pages).inspect_err(|error| eprintln!("SKIPPED: {error:?}")).ok()
}

/// Mappings of a file of this name.
fn mappings(name: &str) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.ends_with(&format!("/{name}"))).count()
}

/// The kernel maps a whole huge page where a part was asked for, and unmaps no part.
#[test]
fn regions_of_parts_of_huge_pages_are_refused_and_leave_no_mapping() {
    let Some(pool) = pool(HUGE_PAGES) else { return };
    let file = pool.file("odd", HUGE_PAGES).unwrap();
    let server = Server::new(ReleaseMode::Background);
    let half = HUGE_PAGE_BYTES / 2;
    for (bytes, file_offset) in
        [(half, 0), (HUGE_PAGE_BYTES, half), (4096, 0), (half, half)].repeat(5)
    {
        let (front, served) = server.connect();
        let table = mem_table(&[[BASE, bytes, BASE, file_offset]]);
        front.send(request::SET_MEM_TABLE, &table, &[file.as_fd()]);
        front.finish();
        let expected =
            Violation::PartialHugePages { bytes, file_offset, page_bytes: HUGE_PAGE_BYTES };
        match served.outcome() {
            Err(SessionError::Violation(found)) => assert_eq!(found, expected),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(mappings("odd"), 0);
    assert_eq!(server.front_end_faults("protocol_violation"), 20);
}

/// What is taken back is reserved; what a guest held that is gone is not.
#[test]
fn nothing_is_reserved_for_a_guest_that_is_gone() {
    let Some(pool) = pool(HUGE_PAGES) else { return };
    let server = Server::new(ReleaseMode::Immediate);
    let (front, served) = server.connect();
    let guest = Guest::at(pool.file("guest", HUGE_PAGES).unwrap(), 0);
    guest.write_patterns(data_pages());
    let mut vm = Vm::new(Monitor::Uml, front, guest);
    vm.attach();
    vm.probe(BITMAP);
    assert_eq!(pool.promised().unwrap(), HUGE_PAGES);
    let second: BTreeSet<u64> = (FIRST_PAGE + PAGES / HUGE_PAGES..FIRST_PAGE + PAGES).collect();
    vm.inflate(&second);
    assert_eq!(pool.promised().unwrap(), HUGE_PAGES - 1);
    vm.deflate(&second);
    assert_eq!(pool.promised().unwrap(), HUGE_PAGES);

    vm.guest.write_patterns(second.iter().copied());
    vm.inflate(&second);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(pool.promised().unwrap(), HUGE_PAGES - 1, "reserved for nobody");
    assert_eq!(mappings("guest"), 0);
}
