//! Asking the host for huge pages.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::HostMemoryError;

/// Asks the host to use transparent huge pages for a region from now on. That the
/// host has some, or is set to use them, is not certain afterwards.
///
/// # Errors
/// The host's kernel knows no transparent huge pages.
pub fn advise_huge<B: Bitmap>(region: &GuestRegionMmap<B>) -> Result<(), HostMemoryError> {
    let (start, len) = (region.as_ptr(), region.size());
    // SAFETY: `start` and `len` are those of one mapping that `region` keeps mapped.
    // MADV_HUGEPAGE sets a flag of the mapping; it changes no byte of the memory and
    // where it is.
    let result =
        unsafe { rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxHugepage) };
    debug_assert_eq!(len as u64, region.len());
    result.map_err(|e| HostMemoryError::Host { what: "madvise(MADV_HUGEPAGE)", source: e.into() })
}
