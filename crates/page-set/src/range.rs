//! Half-open runs of 4 KiB page numbers.

use crate::PageSetError;

/// Page numbers are below 2^52.
///
/// 2^52 pages of 2^12 bytes are the whole 64-bit address space, and page numbers on the
/// wire have 52 bits.
pub const PAGE_NUMBER_END: u64 = 1 << 52;

/// A half-open run of 4 KiB pages: `start .. start + pages`, below 2^52.
///
/// The fields are private so that the bound always holds; a run may be empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    start: u64,
    pages: u64,
}

impl PageRange {
    /// The run of `pages` pages at page number `start`.
    ///
    /// # Errors
    /// [`PageSetError::PastEnd`] if it ends beyond [`PAGE_NUMBER_END`].
    pub const fn new(start: u64, pages: u64) -> Result<Self, PageSetError> {
        match start.checked_add(pages) {
            Some(end) if end <= PAGE_NUMBER_END => Ok(Self { start, pages }),
            _ => Err(PageSetError::PastEnd { start, pages }),
        }
    }

    /// The run from page `start` up to, not including, page `end`.
    ///
    /// # Errors
    /// [`PageSetError::PastEnd`] if `end` is before `start` or beyond
    /// [`PAGE_NUMBER_END`].
    pub const fn from_bounds(start: u64, end: u64) -> Result<Self, PageSetError> {
        match end.checked_sub(start) {
            Some(pages) => Self::new(start, pages),
            None => Err(PageSetError::PastEnd { start, pages: 0 }),
        }
    }

    /// The caller guarantees `start <= end <= PAGE_NUMBER_END`.
    pub(crate) const fn known(start: u64, end: u64) -> Self {
        debug_assert!(start <= end && end <= PAGE_NUMBER_END);
        Self { start, pages: end - start }
    }

    /// First page number.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Number of 4 KiB pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.pages
    }

    /// First page number after the run.
    #[must_use]
    pub const fn end(self) -> u64 {
        // Cannot overflow: checked at creation.
        self.start + self.pages
    }

    /// True if it has no page.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.pages == 0
    }

    /// True if it contains `page`.
    #[must_use]
    pub const fn contains(self, page: u64) -> bool {
        page >= self.start && page < self.end()
    }

    /// True if all of `self` lies inside `outer`: check a peer's range with this before
    /// inserting it.
    #[must_use]
    pub const fn is_within(self, outer: Self) -> bool {
        self.start >= outer.start && self.end() <= outer.end()
    }

    /// Splits into the pages below `at` and those from `at` on.
    #[must_use]
    pub fn split_at(self, at: u64) -> (Self, Self) {
        let at = at.clamp(self.start, self.end());
        (Self::known(self.start, at), Self::known(at, self.end()))
    }

    /// The pages in both ranges.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::known(start, self.end().min(other.end()).max(start))
    }
}

impl core::fmt::Debug for PageRange {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}
