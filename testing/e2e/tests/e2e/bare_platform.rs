//! Platform of a guest without Linux: CPUID and VM generation ID, across migration, snapshot and
//! restore.

use std::time::Duration;

use lab::bare::{BareBuilder, BareGuest};

use crate::bare::{aerostat, boot, on_a_kvm, receiver};
use crate::program::program;

/// Leaves of CPUID and their sub-leaves: the vendor, and all with feature bits.
const LEAVES: [(u32, u32); 13] = [
    (0, 0),
    (1, 0),
    (7, 0),
    (7, 1),
    (7, 2),
    (0xd, 0),
    (0xd, 1),
    (0x4000_0001, 0),
    (0x8000_0001, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_000a, 0),
    (0x8000_0021, 0),
];

/// Address of the VMM's ACPI tables, and the bytes searched: without disks, the first 8 KiB include
/// the DSDT.
const TABLES: u32 = 0xe_0000;
const TABLES_BYTES: u32 = 8 << 10;

/// Timeout for the end of a process whose guest has migrated.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// CPUID as the guest reads it.
fn cpuid(guest: &mut BareGuest) -> Vec<String> {
    let ask = |(leaf, subleaf): &(u32, u32)| {
        format!(
            "{leaf:x} {subleaf}: {}",
            guest.run(&format!("cpuid {leaf:x} {subleaf:x}")).unwrap()
        )
    };
    LEAVES.iter().map(ask).collect()
}

/// Migrates a guest to a new process and returns that.
fn migrate(mut guest: BareGuest, name: &str) -> BareGuest {
    let (there, address) = receiver(name, &[]);
    let (code, out, err) = aerostat(&guest, &["migrate", name, &address, "--plain"]);
    assert_eq!(code, Some(0), "{out}{err}\n{}\n{}", guest.errors(), there.errors());
    assert!(guest.wait_for_end(ANSWER_TIMEOUT).unwrap().success(), "{}", guest.errors());
    there
}

/// Takes a snapshot of a running guest, in its directory.
fn saved(guest: &BareGuest, name: &str) -> String {
    let path = guest.directory().join(format!("{name}.snapshot"));
    let path = path.into_os_string().into_string().unwrap();
    let (code, out, err) = aerostat(guest, &["snapshot", name, &path]);
    assert_eq!(code, Some(0), "{out}{err}\n{}", guest.errors());
    path
}

/// Restores a guest from a snapshot.
fn restored(file: &str, name: &str, words: &[&str]) -> BareGuest {
    let builder = BareBuilder::command(program(), "restore", name).unwrap();
    let mut guest = builder.argument(file).arguments(words.iter().copied()).start().unwrap();
    guest.run("ping 1").unwrap_or_else(|error| panic!("{error}"));
    guest
}

/// Each host sends the guest's CPUID to the next one, so an error shows one migration later.
#[test]
fn cpuid_survives_migration_and_restore() {
    on_a_kvm("bare_platform::cpuid_survives_migration_and_restore", || {
        let mut guest = boot("ring");
        let born = cpuid(&mut guest);
        for stop in 1..=3 {
            guest = migrate(guest, "ring");
            assert_eq!(cpuid(&mut guest), born, "stop {stop}");
        }
        let file = saved(&guest, "ring");
        for words in [&[][..], &["--lazy"]] {
            let mut copy = restored(&file, "copy", words);
            assert_eq!(cpuid(&mut copy), born, "restored {words:?}");
            let again = saved(&copy, "copy");
            let mut copy = migrate(restored(&again, "copy", &[]), "copy");
            assert_eq!(cpuid(&mut copy), born, "restored twice and migrated {words:?}");
            assert!(copy.power_off().unwrap().success());
        }
        assert!(guest.power_off().unwrap().success());
    });
}

/// Address of the VM generation ID in the guest's ACPI tables: `Name (ADDR, Package (2) {LOW,
/// HIGH})`, with LOW in 32 bits (ACPI 6.5, 20.2).
fn generation_address(guest: &mut BareGuest) -> u32 {
    let mut tables = Vec::new();
    for address in (TABLES..TABLES + TABLES_BYTES).step_by(4) {
        tables.extend(word(guest, address).to_le_bytes());
        let Some(at) = tables.windows(4).position(|name| name == b"ADDR") else { continue };
        let Some(package) = tables.get(at + 4..at + 12) else { continue };
        assert_eq!([package[0], package[2], package[3]], [0x12, 2, 0x0c], "{package:x?}");
        return u32::from_le_bytes(package[4..].try_into().unwrap());
    }
    panic!("no device of the tables has an ADDR");
}

fn word(guest: &mut BareGuest, address: u32) -> u32 {
    guest.number(&format!("read {address:x}")).unwrap().try_into().unwrap()
}

fn generation(guest: &mut BareGuest, address: u32) -> [u32; 4] {
    [0, 4, 8, 12].map(|offset| word(guest, address + offset))
}

#[test]
fn every_restore_has_a_new_vm_generation_id() {
    on_a_kvm("bare_platform::every_restore_has_a_new_vm_generation_id", || {
        let mut guest = boot("first");
        let address = generation_address(&mut guest);
        let mut seen = vec![generation(&mut guest, address)];
        assert_ne!(seen[0], [0; 4]);
        let mut guest = migrate(guest, "first");
        assert_eq!(generation(&mut guest, address), seen[0], "after a migration");
        let mut file = saved(&guest, "first");
        let mut copies = Vec::new();
        assert_eq!(generation(&mut guest, address), seen[0], "after a snapshot");
        for words in [&[][..], &["--lazy"], &[]] {
            let mut copy = restored(&file, "copy", words);
            let id = generation(&mut copy, address);
            assert!(!seen.contains(&id), "{words:?}: {id:x?} of {seen:x?}");
            seen.push(id);
            let mut copy = migrate(copy, "copy");
            assert_eq!(
                generation(&mut copy, address),
                id,
                "after a migration of a copy: {words:?}"
            );
            file = saved(&copy, "copy");
            assert_eq!(generation(&mut copy, address), id, "after a snapshot of a copy");
            // The next copy is made from this one.
            copies.push(copy);
        }
        for copy in copies {
            assert!(copy.power_off().unwrap().success());
        }
        assert!(guest.power_off().unwrap().success());
    });
}
