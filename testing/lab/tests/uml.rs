//! Boots User Mode Linux.

#![allow(clippy::unwrap_used)]

use lab::{Backing, Guest, GuestMemoryDir, LabError};

/// Guest memory: small, since no test here depends on its size.
const MEMORY_MIB: u64 = 512;

/// Memory that the tests fill: most of the guest's.
const FILLED_MIB: u64 = 300;

fn boot(builder: impl FnOnce(lab::GuestBuilder) -> lab::GuestBuilder) -> Guest {
    let kernel = lab::uml::kernel().unwrap();
    builder(Guest::uml(&kernel).memory_mib(MEMORY_MIB)).boot().unwrap()
}

fn number(guest: &mut Guest, command: &str) -> u64 {
    guest.run(command).unwrap().text.parse().unwrap()
}

#[test]
fn memory_is_filled_verified_and_freed() {
    for backing in [Backing::Small, Backing::Huge] {
        let directory = GuestMemoryDir::mount(backing, MEMORY_MIB + 64).unwrap();
        let mut guest = boot(|guest| guest.memory_dir(directory.path()));
        let free_mib = number(&mut guest, "free-mib");
        let used_mib = directory.used_bytes().unwrap() >> 20;
        guest.run(&format!("fill data {FILLED_MIB} 7")).unwrap();
        assert!(directory.used_bytes().unwrap() >> 20 >= used_mib + FILLED_MIB / 2);
        assert!(number(&mut guest, "free-mib") <= free_mib - FILLED_MIB);
        assert_eq!(number(&mut guest, &format!("verify data {FILLED_MIB} 7")), 0);
        // `verify` must report every page if the pattern differs.
        let pages = FILLED_MIB * 256;
        assert_eq!(number(&mut guest, &format!("verify data {FILLED_MIB} 8")), pages);
        guest.run("drop data").unwrap();
        guest.run(&format!("touch {FILLED_MIB}")).unwrap();
        assert!(number(&mut guest, "free-mib") >= free_mib - 8);
        assert!(guest.power_off().unwrap().success());
    }
}

#[test]
fn every_command_has_an_answer_or_an_error() {
    let mut guest = boot(|guest| guest);
    assert!(guest.run("meminfo").unwrap().lines[0].starts_with("MemTotal:"));
    let release = guest.run("cat /proc/sys/kernel/osrelease").unwrap().lines.join("");
    assert!(release.starts_with("6.12."), "{release}");
    guest.run("write /proc/sys/vm/swappiness 7").unwrap();
    assert_eq!(guest.run("cat /proc/sys/vm/swappiness").unwrap().lines, ["7"]);
    guest.run("drop-caches").unwrap();
    guest.run("sync").unwrap();
    let wrong = ["", "frobnicate", "touch", "touch much", "insmod nothing", "rmmod nothing"];
    for command in wrong.into_iter().chain(["cat /none", "verify none 1 1", "fill ../x 1 1"]) {
        let error = guest.run(command).unwrap_err();
        assert!(matches!(error, LabError::Refused { .. }), "{command}: {error}");
    }
}

#[test]
fn init_survives_pressure_beyond_the_guests_memory() {
    let mut guest = boot(|guest| guest);
    let reply = guest.run(&format!("pressure {} 10", 2 * MEMORY_MIB)).unwrap().text;
    assert!(reply.ends_with("end=killed"), "{reply}");
    let reply = guest.run(&format!("pressure {} 10", MEMORY_MIB / 4)).unwrap().text;
    assert_eq!(reply, format!("taken_mib={} end=complete", MEMORY_MIB / 4));
}

#[test]
fn the_stock_driver_loads_and_unloads() {
    let kernel = lab::uml::kernel().unwrap();
    let mut guest = boot(|guest| guest.modules(&kernel.stock_modules));
    guest.load(&kernel.stock_modules).unwrap();
    assert!(guest.run("insmod virtio_balloon").is_err());
    guest.run("rmmod virtio_balloon").unwrap();
}

#[test]
fn memory_is_fragmented_and_defragmented() {
    let kernel = lab::uml::kernel().unwrap();
    let module = lab::guest_build::lab_module(&kernel.tree()).unwrap();
    let mut guest = boot(|guest| guest.module(module));
    guest.run("insmod lab_memory").unwrap();
    let blocks = |guest: &mut Guest| largest_blocks(&guest.run("cat /proc/buddyinfo").unwrap());
    let (free_mib, whole) = (number(&mut guest, "free-mib"), blocks(&mut guest));
    let pinned = guest.fragment(64).unwrap();
    // One page in every second 2 MiB of what was free.
    assert!(pinned.abs_diff((free_mib - 64) / 4) <= 16, "{pinned} of {free_mib} MiB");
    // Only these pages are pinned: the rest is free, in smaller blocks.
    assert!(number(&mut guest, "free-mib") + pinned / 256 + 8 >= free_mib);
    assert!(blocks(&mut guest) <= whole / 4, "{} of {whole}", blocks(&mut guest));
    guest.run("rmmod lab_memory").unwrap();
    // The pages are in a per-CPU list until others push them out.
    guest.run(&format!("touch {FILLED_MIB}")).unwrap();
    assert!(blocks(&mut guest) >= whole * 3 / 4, "{} of {whole}", blocks(&mut guest));
}

/// Free blocks of the largest order, 4 MiB, in all zones.
fn largest_blocks(buddyinfo: &lab::Reply) -> u64 {
    let counts = buddyinfo.lines.iter().filter_map(|line| line.split_whitespace().last());
    counts.map(|count| count.parse::<u64>().unwrap()).sum()
}
