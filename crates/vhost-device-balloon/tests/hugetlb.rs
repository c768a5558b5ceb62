//! Guest memory in huge pages of the host's pool. Runs in its own process, where no other test
//! maps files.
#![allow(clippy::unwrap_used, reason = "a test fails on any error")]
#![allow(clippy::cast_possible_truncation, reason = "small constants")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;

use control::api::ReleaseMode;
use lab::huge_pool::{HUGE_PAGE_BYTES, HugePool};
use vhost_device_balloon::{End, SessionError, Violation};

use support::driver::{BITMAP, Vm, Vmm, mem_table};
use support::front_end::request;
use support::guest::{BASE, BYTES, FIRST_PAGE, Guest, PAGES, data_pages};
use support::server::Server;

/// Huge pages of a guest; the vrings are in the first one.
const HUGE_PAGES: u64 = BYTES / HUGE_PAGE_BYTES;

fn pool(pages: u64) -> Option<HugePool> {
    HugePool::new(pages).inspect_err(|error| eprintln!("SKIPPED: {error:?}")).ok()
}

/// Returns the number of mappings of a file of this name.
fn mappings(name: &str) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.ends_with(&format!("/{name}"))).count()
}

/// The kernel maps a complete huge page for a partial request, and cannot unmap a part.
#[test]
fn a_region_with_a_partial_huge_page_is_refused_and_not_mapped() {
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

/// Deflated pages are reserved, but not the balloon of a guest that is gone.
#[test]
fn a_disconnect_reserves_no_huge_pages() {
    let Some(pool) = pool(HUGE_PAGES) else { return };
    let server = Server::new(ReleaseMode::Immediate);
    let (front, served) = server.connect();
    let guest = Guest::at(pool.file("guest", HUGE_PAGES).unwrap(), 0);
    guest.write_patterns(data_pages());
    let mut vm = Vm::new(Vmm::Uml, front, guest);
    vm.attach();
    vm.probe(BITMAP);
    assert_eq!(pool.reserved().unwrap(), HUGE_PAGES);
    let second: BTreeSet<u64> = (FIRST_PAGE + PAGES / HUGE_PAGES..FIRST_PAGE + PAGES).collect();
    vm.inflate(&second);
    assert_eq!(pool.reserved().unwrap(), HUGE_PAGES - 1);
    vm.deflate(&second);
    assert_eq!(pool.reserved().unwrap(), HUGE_PAGES);

    vm.guest.write_patterns(second.iter().copied());
    vm.inflate(&second);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(pool.reserved().unwrap(), HUGE_PAGES - 1, "reserved for a guest that is gone");
    assert_eq!(mappings("guest"), 0);
}
