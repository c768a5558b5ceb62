//! Guest memory statistics (virtio 1.3, section 5.5.6.3): packed entries of a
//! `u16` tag and a `u64` value, little-endian, in any order.

/// Bytes of one entry; there is no padding.
pub const STAT_BYTES: usize = 10;

/// Most entries that a device takes from a buffer. The specification has 10 tags and
/// Linux 6.12 has 16; the rest is for future tags. So a guest can make the device store at most
/// 640 bytes.
pub const MAX_STATS: usize = 64;

/// Bytes of the longest buffer that a device takes.
pub const MAX_STATS_BYTES: usize = MAX_STATS * STAT_BYTES;

/// Names of the tags 0 to 15, with the unit last if there is one. 0 to 9 are from the
/// specification, the others from Linux 6.12 (`include/uapi/linux/virtio_balloon.h`).
const NAMES: [&str; 16] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cached_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scanned_bytes",
    "direct_scanned_bytes",
    "async_reclaimed_bytes",
    "direct_reclaimed_bytes",
];

/// The tag of a statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StatTag(pub u16);

impl StatTag {
    /// Swapped in since the guest started, in bytes.
    pub const SWAP_IN: Self = Self(0);
    /// Free memory, in bytes.
    pub const MEM_FREE: Self = Self(4);
    /// Memory that the guest's kernel manages, in bytes.
    pub const MEM_TOTAL: Self = Self(5);
    /// Estimate of memory available without swapping, in bytes.
    pub const AVAILABLE: Self = Self(6);
    /// Memory in file caches, in bytes.
    pub const CACHES: Self = Self(7);
    /// The last tag with a name.
    pub const LAST_NAMED: Self = Self(15);

    /// Returns the name; `None` for an unknown tag.
    pub fn name(self) -> Option<&'static str> {
        NAMES.get(usize::from(self.0)).copied()
    }

    /// Returns true for a counter, which only grows while the guest runs. The others are
    /// gauges. An unknown tag is not assumed to be a counter.
    pub const fn is_counter(self) -> bool {
        matches!(self.0, 0..=3 | 8..=15)
    }
}

/// One statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The tag.
    pub tag: StatTag,
    /// The value, in the tag's unit.
    pub value: u64,
}

impl Stat {
    /// Returns the wire format.
    pub fn to_bytes(self) -> [u8; STAT_BYTES] {
        let mut bytes = [0; STAT_BYTES];
        let (tag, value) = bytes.split_at_mut(2);
        tag.copy_from_slice(&self.tag.0.to_le_bytes());
        value.copy_from_slice(&self.value.to_le_bytes());
        bytes
    }

    const fn from_bytes(bytes: &[u8; STAT_BYTES]) -> Self {
        let [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = *bytes;
        Self {
            tag: StatTag(u16::from_le_bytes([t0, t1])),
            value: u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]),
        }
    }
}

/// Iterates over the entries of a buffer. Ignores an incomplete entry at the end.
pub fn decode(buffer: &[u8]) -> impl Iterator<Item = Stat> {
    buffer.as_chunks::<STAT_BYTES>().0.iter().map(Stat::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_packed_and_little_endian() {
        let stat = Stat { tag: StatTag(0x0201), value: 0x0a09_0807_0605_0403 };
        assert_eq!(stat.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        let buffer = [&stat.to_bytes()[..], &[4, 0, 9, 0, 0, 0, 0, 0, 0, 0], &[7; 9]].concat();
        let free = Stat { tag: StatTag::MEM_FREE, value: 9 };
        assert!(decode(&buffer).eq([stat, free]), "an incomplete entry is ignored");
    }

    #[test]
    fn every_tag_of_linux_has_a_unique_name() {
        for tag in 0..=StatTag::LAST_NAMED.0 {
            let name = StatTag(tag).name().unwrap();
            assert_eq!(NAMES.iter().filter(|other| **other == name).count(), 1);
        }
        assert_eq!(StatTag(16).name(), None);
        assert!(StatTag::SWAP_IN.is_counter() && !StatTag::MEM_FREE.is_counter());
        assert!(!StatTag(16).is_counter());
    }
}
