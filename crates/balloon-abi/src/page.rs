//! The unit in which a balloon counts.

/// log2 of [`BALLOON_PAGE_BYTES`]; `VIRTIO_BALLOON_PFN_SHIFT` in Linux.
pub const BALLOON_PAGE_SHIFT: u32 = 12;

/// Bytes of a balloon page: 4 KiB, whatever the page size of guest or host
/// (virtio 1.3, section 5.5.6).
pub const BALLOON_PAGE_BYTES: u64 = 1 << BALLOON_PAGE_SHIFT;

/// Number of a balloon page: guest physical address divided by 4 KiB.
///
/// A wire value is only a claim: it may lie outside of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pfn(pub u64);

impl Pfn {
    /// Guest physical address of the first byte, or `None` where it would not
    /// fit 64 bits.
    pub const fn address(self) -> Option<u64> {
        self.0.checked_mul(BALLOON_PAGE_BYTES)
    }

    /// The page that holds `address`.
    pub const fn containing(address: u64) -> Self {
        Self(address >> BALLOON_PAGE_SHIFT)
    }

    /// True when the page starts on a multiple of `pages` (a power of two).
    pub const fn is_aligned_to(self, pages: u64) -> bool {
        self.0 & (pages - 1) == 0
    }
}
