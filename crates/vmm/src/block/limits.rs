//! Block limits: the block sizes and discard granularity that a disk reports to its guest.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use super::file::SECTOR_BYTES;
use super::work::DISCARD;

/// Block devices by their numbers in sysfs (`Documentation/ABI/stable/sysfs-block`).
const DEVICES: &str = "/sys/dev/block";

/// Largest block size that is reported: drivers refuse a block larger than a page. Requests of any
/// number of sectors work anyway.
const MAX_BLOCK_BYTES: u64 = 4096;

/// The default for a file system with an invalid unit and a device that reports nothing.
const DEFAULT_BLOCK_BYTES: u64 = 4096;

/// Largest file system unit that is reported; a network file system reports its transfer size.
const MAX_UNIT_BYTES: u64 = 64 << 10;

/// Largest log2 of blocks per physical block: 128 MiB for blocks of 4 KiB.
const MAX_PHYSICAL_EXP: u8 = 15;

/// The limits reported to the guest (virtio 1.3, 5.2.4). A migration keeps them, because the driver
/// reads them only once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskLimits {
    /// The logical block size.
    pub(crate) block_bytes: u32,
    /// log2 of blocks per physical block.
    pub(crate) physical_exp: u8,
    /// Blocks before the first aligned one.
    pub(crate) alignment_offset: u8,
    /// Minimum and optimal I/O size in blocks; 0 if unknown.
    pub(crate) min_io_blocks: u16,
    pub(crate) opt_io_blocks: u32,
    /// Discard granularity in sectors.
    pub(crate) discard_sectors: u32,
}

/// Limits in bytes, as in sysfs.
struct Sizes {
    logical: u64,
    physical: u64,
    offset: u64,
    min_io: u64,
    opt_io: u64,
    discard: u64,
}

impl DiskLimits {
    /// Returns the limits of an open file, and the unit in bytes of discard and write-zeroes on the
    /// host.
    pub(super) fn of(metadata: &Metadata) -> (Self, u64) {
        if metadata.file_type().is_block_device() {
            let sizes = Sizes::of_device(&device_directory(metadata.rdev()));
            return (Self::from_sizes(&sizes), sizes.logical);
        }
        (Self::of_file_system(metadata.blksize()), 1)
    }

    /// A file system discards whole blocks, zeroes partial ones, and allows writes of single bytes.
    pub(crate) fn of_file_system(unit_bytes: u64) -> Self {
        let is_unit =
            unit_bytes.is_power_of_two() && (SECTOR_BYTES..=MAX_UNIT_BYTES).contains(&unit_bytes);
        let unit = if is_unit { unit_bytes } else { DEFAULT_BLOCK_BYTES };
        let (logical, physical, min_io, discard) = (SECTOR_BYTES, unit, unit, unit);
        Self::from_sizes(&Sizes { logical, physical, offset: 0, min_io, opt_io: 0, discard })
    }

    fn from_sizes(sizes: &Sizes) -> Self {
        let block = sizes.logical.clamp(SECTOR_BYTES, MAX_BLOCK_BYTES);
        let physical = (sizes.physical / block).max(1).ilog2();
        let discard = sizes.discard.max(sizes.logical) / SECTOR_BYTES;
        Self {
            // All values are limited to below 2^32.
            block_bytes: u32::try_from(block).unwrap_or_default(),
            physical_exp: u8::try_from(physical).unwrap_or(u8::MAX).min(MAX_PHYSICAL_EXP),
            alignment_offset: u8::try_from(sizes.offset / block).unwrap_or(0),
            min_io_blocks: u16::try_from(sizes.min_io / block).unwrap_or(0),
            opt_io_blocks: u32::try_from(sizes.opt_io / block).unwrap_or(0),
            discard_sectors: u32::try_from(discard).unwrap_or(u32::MAX).min(DISCARD.sectors),
        }
    }

    /// Maximum sectors of a discard, in whole units.
    pub(super) const fn max_discard_sectors(self) -> u32 {
        DISCARD.sectors - DISCARD.sectors % self.discard_sectors
    }

    /// Whether the limits are valid for a disk of this VMM.
    pub(crate) fn are_valid(self) -> bool {
        let block = u64::from(self.block_bytes);
        block.is_power_of_two()
            && (SECTOR_BYTES..=MAX_BLOCK_BYTES).contains(&block)
            && self.physical_exp <= MAX_PHYSICAL_EXP
            && (1..=DISCARD.sectors).contains(&self.discard_sectors)
    }
}

impl Sizes {
    /// Reads a device's limits from its sysfs directory.
    fn of_device(directory: &Path) -> Self {
        let read = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        // A partition uses its disk's queue directory.
        let queues = [directory.join("queue"), directory.join("../queue")];
        let queue = |what: &str| queues.iter().find_map(|queue| read(queue.join(what)));
        let is_block = |bytes: &u64| bytes.is_power_of_two() && *bytes >= SECTOR_BYTES;
        let logical = queue("logical_block_size").filter(is_block).unwrap_or(DEFAULT_BLOCK_BYTES);
        let physical = queue("physical_block_size").filter(is_block).unwrap_or(logical);
        Self {
            logical,
            physical: physical.max(logical),
            offset: read(directory.join("alignment_offset")).unwrap_or(0),
            min_io: queue("minimum_io_size").unwrap_or(0),
            opt_io: queue("optimal_io_size").unwrap_or(0),
            // 0 if it does not support discard.
            discard: queue("discard_granularity").unwrap_or(0),
        }
    }
}

pub(super) fn device_directory(device: u64) -> PathBuf {
    Path::new(DEVICES).join(format!("{}:{}", major(device), minor(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_a_device_are_in_its_logical_blocks() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("disk/queue")).unwrap();
        fs::create_dir_all(directory.path().join("disk/part")).unwrap();
        for (name, value) in [
            ("queue/logical_block_size", "4096\n"),
            ("queue/physical_block_size", "16384\n"),
            ("queue/minimum_io_size", "65536\n"),
            ("queue/optimal_io_size", "1048576\n"),
            ("queue/discard_granularity", "32768\n"),
            ("part/alignment_offset", "8192\n"),
        ] {
            fs::write(directory.path().join("disk").join(name), value).unwrap();
        }
        let sizes = Sizes::of_device(&directory.path().join("disk/part"));
        let limits = DiskLimits::from_sizes(&sizes);
        let expected = DiskLimits {
            block_bytes: 4096,
            physical_exp: 2,
            alignment_offset: 2,
            min_io_blocks: 16,
            opt_io_blocks: 256,
            discard_sectors: 64,
        };
        assert_eq!((limits, sizes.logical), (expected, 4096));
        assert!(limits.are_valid());
        assert_eq!(limits.max_discard_sectors() % 64, 0);
        // Without any sysfs file the defaults apply.
        let nothing = Sizes::of_device(directory.path());
        assert_eq!((nothing.logical, DiskLimits::from_sizes(&nothing).block_bytes), (4096, 4096));
    }

    #[test]
    fn any_sizes_give_valid_limits() {
        for logical in [512, 4096, 65536] {
            for large in [0, 1, 511, 513, 1 << 20, 1 << 40, u64::MAX] {
                let sizes = Sizes {
                    logical,
                    physical: large.max(logical),
                    offset: large,
                    min_io: large,
                    opt_io: large,
                    discard: large,
                };
                assert!(DiskLimits::from_sizes(&sizes).are_valid(), "{logical} {large}");
            }
            assert!(DiskLimits::of_file_system(logical).are_valid());
        }
        assert_eq!(DiskLimits::of_file_system(1 << 20), DiskLimits::of_file_system(4096));
        assert!(!DiskLimits { block_bytes: 0, ..DiskLimits::of_file_system(512) }.are_valid());
    }
}
