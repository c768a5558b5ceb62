//! What a guest without Linux finds of its machine, and what becomes of that when the guest is
//! moved, written to a file and restored.

use std::time::Duration;

use lab::bare::{BareBuilder, BareGuest};

use crate::bare::{aerostat, boot, on_a_kvm, receiver};
use crate::program::program;

/// Leaves of CPUID and their sub-leaves: the maker, and all those whose registers hold features.
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

/// Where the VMM has ACPI tables, and how much of it is looked at: the first 8 KiB have the DSDT of
/// a machine without disks.
const TABLES: u32 = 0xe_0000;
const TABLES_BYTES: u32 = 8 << 10;

/// For a process to end whose guest has left.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// What the guest's processor says of itself.
fn cpuid(guest: &mut BareGuest) -> Vec<String> {
    let ask = |(leaf, subleaf): &(u32, u32)| {
        format!(
            "{leaf:x} {subleaf}: {}",
            guest.ask(&format!("cpuid {leaf:x} {subleaf:x}")).unwrap()
        )
    };
    LEAVES.iter().map(ask).collect()
}

/// Moves a guest to a new process.
fn moved(mut guest: BareGuest, name: &str) -> BareGuest {
    let (there, address) = receiver(name, &[]);
    let (code, out, err) = aerostat(&guest, &["migrate", name, &address, "--plain"]);
    assert_eq!(code, Some(0), "{out}{err}\n{}\n{}", guest.errors(), there.errors());
    assert!(guest.wait_for_end(ANSWER_TIMEOUT).unwrap().success(), "{}", guest.errors());
    there
}

/// Writes a guest that goes on to a file in its directory.
fn saved(guest: &BareGuest, name: &str) -> String {
    let path = guest.directory().join(format!("{name}.snapshot"));
    let path = path.into_os_string().into_string().unwrap();
    let (code, out, err) = aerostat(guest, &["snapshot", name, &path]);
    assert_eq!(code, Some(0), "{out}{err}\n{}", guest.errors());
    path
}

/// A guest out of a file, beside the one whose directory the file is in.
fn restored(file: &str, name: &str, words: &[&str]) -> BareGuest {
    let builder = BareBuilder::command(program(), "restore", name).unwrap();
    let mut guest = builder.argument(file).arguments(words.iter().copied()).start().unwrap();
    guest.ask("ping 1").unwrap_or_else(|error| panic!("{error}"));
    guest
}

/// Each stop tells the next what the guest can do. So one that told anything else than what the
/// guest was given would be found at the one after it.
#[test]
fn a_guest_keeps_its_processor_wherever_it_goes() {
    on_a_kvm("bare_platform::a_guest_keeps_its_processor_wherever_it_goes", || {
        let mut guest = boot("ring");
        let born = cpuid(&mut guest);
        for stop in 1..=3 {
            guest = moved(guest, "ring");
            assert_eq!(cpuid(&mut guest), born, "stop {stop}");
        }
        let file = saved(&guest, "ring");
        for words in [&[][..], &["--lazy"]] {
            let mut copy = restored(&file, "copy", words);
            assert_eq!(cpuid(&mut copy), born, "restored {words:?}");
            let again = saved(&copy, "copy");
            let mut copy = moved(restored(&again, "copy", &[]), "copy");
            assert_eq!(cpuid(&mut copy), born, "restored twice and moved {words:?}");
            assert!(copy.power_off().unwrap().success());
        }
        assert!(guest.power_off().unwrap().success());
    });
}

/// Where the tables of the guest say that the VM generation ID is: `Name (ADDR, Package (2) {LOW,
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
fn a_copy_has_a_generation_of_its_own_and_keeps_it_when_it_moves() {
    on_a_kvm(
        "bare_platform::a_copy_has_a_generation_of_its_own_and_keeps_it_when_it_moves",
        || {
            let mut guest = boot("first");
            let address = generation_address(&mut guest);
            let mut seen = vec![generation(&mut guest, address)];
            assert_ne!(seen[0], [0; 4]);
            let mut guest = moved(guest, "first");
            assert_eq!(generation(&mut guest, address), seen[0], "it was moved");
            let mut file = saved(&guest, "first");
            let mut copies = Vec::new();
            assert_eq!(generation(&mut guest, address), seen[0], "it was written to a file");
            for words in [&[][..], &["--lazy"], &[]] {
                let mut copy = restored(&file, "copy", words);
                let id = generation(&mut copy, address);
                assert!(!seen.contains(&id), "{words:?}: {id:x?} of {seen:x?}");
                seen.push(id);
                let mut copy = moved(copy, "copy");
                assert_eq!(generation(&mut copy, address), id, "a copy was moved: {words:?}");
                file = saved(&copy, "copy");
                assert_eq!(generation(&mut copy, address), id, "a copy was written to a file");
                // The next one is a copy of this copy.
                copies.push(copy);
            }
            for copy in copies {
                assert!(copy.power_off().unwrap().success());
            }
            assert!(guest.power_off().unwrap().success());
        },
    );
}
