//! Allows or forbids transparent huge pages.

use std::fs;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::{Backing, HostMemoryError, Piece};

/// The host's settings of transparent huge pages: for all sizes, and in a directory for each size
/// (`Documentation/admin-guide/mm/transhuge.rst`).
const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// Sizes of huge pages of private memory on a host with 4 KiB pages.
const SIZES_KIB: [u32; 8] = [16, 32, 64, 128, 256, 512, 1024, 2048];

/// Whether memory may have transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Huge {
    /// If the host has some.
    May,
    /// Only small pages.
    Never,
}

impl Huge {
    const fn advice(self) -> Advice {
        match self {
            Self::May => Advice::LinuxHugepage,
            Self::Never => Advice::LinuxNoHugepage,
        }
    }
}

/// Advises the host to use transparent huge pages for a region from now on, or none. The host may
/// still have none free, or be configured not to use them.
///
/// # Errors
/// The host's kernel does not support transparent huge pages.
pub fn advise_huge<B: Bitmap>(
    region: &GuestRegionMmap<B>,
    huge: Huge,
) -> Result<(), HostMemoryError> {
    let (start, len) = (region.as_ptr(), region.size());
    // SAFETY: `start` and `len` are those of one mapping that `region` keeps mapped.
    // The advice sets a flag of the mapping; it changes neither the contents of the
    // memory nor its address.
    let result = unsafe { madvise(start.cast(), len, huge.advice()) };
    debug_assert_eq!(len as u64, region.len());
    result.map_err(|e| HostMemoryError::Host { what: "madvise(MADV_HUGEPAGE)", source: e.into() })
}

/// The same for a part of private memory.
pub(crate) fn advise(piece: &Piece<'_>, huge: Huge) -> Result<(), Errno> {
    let Backing::Anonymous(_) = piece.region.backing() else { return Err(Errno::INVAL) };
    let start = usize::try_from(piece.start_bytes()).map_err(|_| Errno::OVERFLOW)?;
    let len = usize::try_from(piece.len_bytes()).map_err(|_| Errno::OVERFLOW)?;
    // SAFETY: a part of the region's mapping, which stays mapped as long as the region exists. The
    // advice sets a flag of it; it changes neither the contents of the memory nor its address.
    unsafe { madvise(ptr::with_exposed_provenance_mut(start), len, huge.advice()) }
}

/// True if the host uses huge pages of any size without advice.
#[must_use]
pub fn huge_by_default() -> bool {
    let setting = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let all = setting(&format!("{SETTINGS}/enabled")).contains("[always]");
    // By name: a sandboxed process cannot list directories. Kernels before 6.8 have none of these.
    let mut sizes =
        SIZES_KIB.iter().map(|kib| setting(&format!("{SETTINGS}/hugepages-{kib}kB/enabled")));
    let of_a_size =
        sizes.any(|size| size.contains("[always]") || (all && size.contains("[inherit]")));
    all || of_a_size
}
