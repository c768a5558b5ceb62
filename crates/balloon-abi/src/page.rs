//! The balloon page, the unit of the protocol.

/// log2 of [`BALLOON_PAGE_BYTES`]; `VIRTIO_BALLOON_PFN_SHIFT` in Linux.
pub const BALLOON_PAGE_SHIFT: u32 = 12;

/// Bytes of a balloon page: 4 KiB, independent of the page size of guest and host
/// (virtio 1.3, section 5.5.6).
pub const BALLOON_PAGE_BYTES: u64 = 1 << BALLOON_PAGE_SHIFT;

/// Number of a balloon page: guest physical address divided by 4 KiB.
///
/// A value from the wire is unchecked: it may be outside of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pfn(pub u64);

impl Pfn {
    /// Returns the guest physical address of the first byte; `None` if it does not fit in
    /// 64 bits.
    pub const fn address(self) -> Option<u64> {
        self.0.checked_mul(BALLOON_PAGE_BYTES)
    }

    /// Returns the page that contains `address`.
    pub const fn containing(address: u64) -> Self {
        Self(address >> BALLOON_PAGE_SHIFT)
    }

    /// Returns true if the page number is a multiple of `pages` (a power of two).
    pub const fn is_aligned_to(self, pages: u64) -> bool {
        self.0 & (pages - 1) == 0
    }
}
