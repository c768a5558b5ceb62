//! Where things are in the guest's physical addresses.

use crate::error::Error;

/// Processors that a guest may have: each is a thread of this process, and the APIC identifiers
/// of the tables here have 8 bits, of which the I/O APIC takes one.
pub const MAX_CPUS: u8 = 64;

/// Memory below this does not hold a kernel with what it unpacks.
pub(crate) const MIN_MEMORY_BYTES: u64 = 32 << 20;

/// Memory above this is beyond any machine that this monitor is for; the page tables that the
/// guest starts with need no thought below it.
pub const MAX_MEMORY_BYTES: u64 = 16 << 40;

/// Memory comes in pieces of so many bytes: a huge page, which a guest can then use to its end.
pub(crate) const MEMORY_STEP_BYTES: u64 = 2 << 20;

/// The last GiB below 4 GiB has no memory: devices and interrupt controllers are there.
pub(crate) const HOLE_START: u64 = 3 << 30;
pub(crate) const HOLE_END: u64 = 4 << 30;

/// First virtio-mmio window; one page for each device.
pub(crate) const MMIO_START: u64 = HOLE_START;
pub(crate) const MMIO_BYTES: u64 = 0x1000;

/// Where Intel's and AMD's processors have their interrupt controllers, and KVM's as well.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that KVM needs on Intel's processors (KVM_SET_TSS_ADDR), in the hole.
pub(crate) const TSS: usize = 0xfffb_d000;

/// What the guest starts with, in the memory below 640 KiB that no kernel is loaded to.
pub(crate) const GDT: u64 = 0x500;
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6800;
pub(crate) const PVH_MODULES: u64 = 0x6c00;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;

/// Bytes of a command line with its final zero (`COMMAND_LINE_SIZE` of x86).
pub(crate) const MAX_COMMAND_LINE_BYTES: usize = 2048;

/// End of the conventional memory, where firmware would have its own data.
pub(crate) const LOW_END: u64 = 0x9_fc00;

/// Where firmware would be: the ACPI tables are there.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
pub(crate) const HIGH_START: u64 = 0x10_0000;

/// The VM generation ID, alone in a page that is neither memory nor ACPI tables (`generation`).
pub(crate) const GENERATION_ID: u64 = 0xf_e000;
const GENERATION_ID_END: u64 = 0xf_f000;

/// Kinds of a memory map's entries, the same in e820 and in PVH.
pub(crate) const KIND_RAM: u32 = 1;
pub(crate) const KIND_RESERVED: u32 = 2;
pub(crate) const KIND_ACPI: u32 = 3;

/// Interrupts: the serial line has that of the PC's, events of the machine have one that is free in
/// every PC, devices have those after the PC's own.
pub(crate) const SERIAL_GSI: u32 = 4;
pub(crate) const EVENT_GSI: u32 = 5;
pub(crate) const FIRST_DEVICE_GSI: u32 = 16;

/// `(start, bytes)` of the memory of a guest, with the hole left out.
pub(crate) fn ranges(memory_bytes: u64) -> Result<Vec<(u64, u64)>, Error> {
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes)
        || !memory_bytes.is_multiple_of(MEMORY_STEP_BYTES)
    {
        let what = format!(
            "a guest cannot have {memory_bytes} bytes of memory: multiples of {} MiB from {} MiB \
             to {} TiB are possible",
            MEMORY_STEP_BYTES >> 20,
            MIN_MEMORY_BYTES >> 20,
            MAX_MEMORY_BYTES >> 40
        );
        return Err(Error::Option { what });
    }
    let low = memory_bytes.min(HOLE_START);
    let high = memory_bytes - low;
    let mut ranges = vec![(0, low)];
    if high > 0 {
        ranges.push((HOLE_END, high));
    }
    Ok(ranges)
}

/// `(start, bytes, kind)` of the map that the guest is given.
pub(crate) fn memory_map(ranges: &[(u64, u64)]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_END, KIND_RAM),
        (ACPI_TABLES, GENERATION_ID - ACPI_TABLES, KIND_ACPI),
        (GENERATION_ID, GENERATION_ID_END - GENERATION_ID, KIND_RESERVED),
        (GENERATION_ID_END, HIGH_START - GENERATION_ID_END, KIND_ACPI),
    ];
    map.extend(ranges.iter().map(|&(start, bytes)| {
        let from = start.max(HIGH_START);
        (from, start + bytes - from, KIND_RAM)
    }));
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ranges(GIB).unwrap(), [(0, GIB)]);
        assert_eq!(ranges(3 * GIB).unwrap(), [(0, 3 * GIB)]);
        let step = MEMORY_STEP_BYTES;
        assert_eq!(ranges(3 * GIB + step).unwrap(), [(0, 3 * GIB), (4 * GIB, step)]);
        assert_eq!(ranges(8 * GIB).unwrap(), [(0, 3 * GIB), (4 * GIB, 5 * GIB)]);
    }

    #[test]
    fn sizes_that_no_guest_can_have_are_refused() {
        for bytes in [0, GIB - 1, GIB + 4096, MIN_MEMORY_BYTES / 2, MAX_MEMORY_BYTES * 2, u64::MAX]
        {
            let error = ranges(bytes).unwrap_err().to_string();
            assert!(error.starts_with("operator: "), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_map_is_sorted_and_within_memory_and_not_in_the_hole(steps in 16u64..1 << 20) {
            let bytes = steps * MEMORY_STEP_BYTES;
            let ranges = ranges(bytes).unwrap();
            prop_assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), bytes);
            let map = memory_map(&ranges);
            for pair in map.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            for (start, bytes, _) in map {
                let end = start + bytes;
                prop_assert!(bytes > 0);
                prop_assert!(end <= HOLE_START || start >= HOLE_END);
                prop_assert!(ranges.iter().any(|range| range.0 <= start && end <= range.0 + range.1));
            }
        }
    }
}
