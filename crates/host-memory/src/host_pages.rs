//! The sizes of host pages that back a region.

use std::os::fd::AsFd;

use page_set::{CHUNK_PAGES, PAGE_BYTES};
use rustix::fs::{FsWord, fstat, fstatfs};
use rustix::io::retry_on_intr;

use crate::HostMemoryError;

/// `f_type` of hugetlbfs (`include/uapi/linux/magic.h`).
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;
/// `f_type` of tmpfs, which memfd files are on too.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// The host pages that back a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPages {
    /// 4 KiB pages: any page can be released alone.
    Small,
    /// Pages of up to 2 MiB that the kernel can split (tmpfs with `huge=`, transparent
    /// huge pages): a part can be released, which splits the huge page.
    Transparent,
    /// hugetlbfs: a host page is released whole or not at all.
    Hugetlb {
        /// Size of a host page in 4 KiB pages (512 or 262144).
        host_page_pages: u64,
    },
}

impl HostPages {
    /// Size of the largest host page, in 4 KiB pages.
    #[must_use]
    pub const fn largest_pages(self) -> u64 {
        match self {
            Self::Small => 1,
            Self::Transparent => CHUNK_PAGES,
            Self::Hugetlb { host_page_pages } => host_page_pages,
        }
    }

    /// Determines what backs `file`, by the block size: on hugetlbfs that of the file
    /// system; on tmpfs (memfd files too) that of the file, which is a huge page's if the
    /// kernel would use one (`shmem_getattr` in `mm/shmem.c`, Linux 4.18). Mount options
    /// do not suffice: the mount may be in another namespace, or in none.
    ///
    /// `huge=advise` counts as small pages, since advice cannot be detected; set it with
    /// [`Region::with_host_pages`](crate::Region::with_host_pages) if it was given.
    ///
    /// # Errors
    /// `fstatfs` or `fstat` fails.
    pub fn of_file(file: impl AsFd) -> Result<Self, HostMemoryError> {
        let failed = |what| {
            move |error: rustix::io::Errno| HostMemoryError::Host { what, source: error.into() }
        };
        let stats = retry_on_intr(|| fstatfs(&file)).map_err(failed("fstatfs of guest memory"))?;
        if stats.f_type == HUGETLBFS_MAGIC {
            let bytes = u64::try_from(stats.f_bsize).unwrap_or(PAGE_BYTES);
            return Ok(Self::Hugetlb { host_page_pages: (bytes / PAGE_BYTES).max(1) });
        }
        if stats.f_type != TMPFS_MAGIC {
            return Ok(Self::Small);
        }
        let stat = retry_on_intr(|| fstat(&file)).map_err(failed("fstat of guest memory"))?;
        let block_bytes = stat.st_blksize;
        let huge = u64::try_from(block_bytes).is_ok_and(|bytes| bytes >= CHUNK_PAGES * PAGE_BYTES);
        Ok(if huge { Self::Transparent } else { Self::Small })
    }
}
