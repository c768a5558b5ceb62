//! Errors of page sets.

use core::fmt;

use crate::PAGE_NUMBER_END;

/// An invalid page number or block size.
///
/// Always the fault of the side that chose the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PageSetError {
    /// A run of pages ends beyond page number 2^52, or before it starts.
    PastEnd {
        /// First page number.
        start: u64,
        /// Number of pages.
        pages: u64,
    },
    /// The pages of one bitmap bit are not a power of two.
    GranuleNotPowerOfTwo {
        /// Pages per bit.
        granule_pages: u64,
    },
    /// A bitmap does not start at a multiple of its granule.
    StartNotAligned {
        /// First page number.
        start: u64,
        /// Pages per bit.
        granule_pages: u64,
    },
}

impl fmt::Display for PageSetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PastEnd { start, pages } => {
                write!(f, "{pages} pages at page {start:#x} end beyond {PAGE_NUMBER_END:#x}")
            }
            Self::GranuleNotPowerOfTwo { granule_pages } => {
                write!(f, "a bitmap granule of {granule_pages} pages is not a power of two")
            }
            Self::StartNotAligned { start, granule_pages } => {
                write!(f, "page {start:#x} is not aligned to a granule of {granule_pages} pages")
            }
        }
    }
}

impl core::error::Error for PageSetError {}
