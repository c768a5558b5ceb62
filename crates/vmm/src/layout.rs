//! The guest's physical address layout.

use crate::error::Error;

/// Maximum number of vCPUs. Each is a thread of this process, and APIC IDs have 8 bits, of which
/// the I/O APIC uses one value.
pub const MAX_CPUS: u8 = 64;

/// Minimum guest memory: less does not fit a decompressed kernel.
pub(crate) const MIN_MEMORY_BYTES: u64 = 32 << 20;

/// Maximum guest memory, more than the machines that this VMM is for; the initial page tables work
/// for all of it.
pub const MAX_MEMORY_BYTES: u64 = 16 << 40;

/// Memory sizes are multiples of a huge page, so that the guest can use huge pages to the end.
pub(crate) const MEMORY_STEP_BYTES: u64 = 2 << 20;

/// The last GiB below 4 GiB has no memory, but devices and interrupt controllers.
pub(crate) const HOLE_START: u64 = 3 << 30;
pub(crate) const HOLE_END: u64 = 4 << 30;

/// First virtio-mmio window; one page for each device.
pub(crate) const MMIO_START: u64 = HOLE_START;
pub(crate) const MMIO_BYTES: u64 = 0x1000;

/// Standard x86 addresses of the interrupt controllers, also used by KVM.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that KVM needs on Intel CPUs (KVM_SET_TSS_ADDR), in the hole.
pub(crate) const TSS: usize = 0xfffb_d000;

/// Boot data, in the memory below 640 KiB, where no kernel is loaded.
pub(crate) const GDT: u64 = 0x500;
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6800;
pub(crate) const PVH_MODULES: u64 = 0x6c00;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;

/// Maximum bytes of a command line with its NUL (`COMMAND_LINE_SIZE` of x86).
pub(crate) const MAX_COMMAND_LINE_BYTES: usize = 2048;

/// End of conventional memory, above which firmware keeps its data.
pub(crate) const LOW_END: u64 = 0x9_fc00;

/// The ACPI tables are in the firmware's area.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
pub(crate) const HIGH_START: u64 = 0x10_0000;

/// The VM generation ID, in a reserved page of its own (`generation`).
pub(crate) const GENERATION_ID: u64 = 0xf_e000;
const GENERATION_ID_END: u64 = 0xf_f000;

/// Types of memory map entries, the same for e820 and PVH.
pub(crate) const KIND_RAM: u32 = 1;
pub(crate) const KIND_RESERVED: u32 = 2;
pub(crate) const KIND_ACPI: u32 = 3;

/// Interrupts: the PC's for the serial port, a free one for ACPI events, and those above the PC's
/// own for devices.
pub(crate) const SERIAL_GSI: u32 = 4;
pub(crate) const EVENT_GSI: u32 = 5;
pub(crate) const FIRST_DEVICE_GSI: u32 = 16;

/// `(start, bytes)` of each memory range, without the hole.
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

/// `(start, bytes, kind)` of each entry of the guest's memory map.
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
    fn memory_does_not_overlap_the_hole() {
        assert_eq!(ranges(GIB).unwrap(), [(0, GIB)]);
        assert_eq!(ranges(3 * GIB).unwrap(), [(0, 3 * GIB)]);
        let step = MEMORY_STEP_BYTES;
        assert_eq!(ranges(3 * GIB + step).unwrap(), [(0, 3 * GIB), (4 * GIB, step)]);
        assert_eq!(ranges(8 * GIB).unwrap(), [(0, 3 * GIB), (4 * GIB, 5 * GIB)]);
    }

    #[test]
    fn invalid_memory_sizes_are_refused() {
        for bytes in [0, GIB - 1, GIB + 4096, MIN_MEMORY_BYTES / 2, MAX_MEMORY_BYTES * 2, u64::MAX]
        {
            let error = ranges(bytes).unwrap_err().to_string();
            assert!(error.starts_with("operator: "), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_memory_map_is_sorted_and_within_memory_without_the_hole(steps in 16u64..1 << 20) {
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
