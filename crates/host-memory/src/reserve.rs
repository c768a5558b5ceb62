//! Reserves host memory, so that a guest's page is there when it is touched.
//!
//! A mapping guarantees nothing: touching a page that the host cannot back raises SIGBUS. So memory is
//! reserved when it is mapped. Releasing it ends the reservation, so deflated pages are reserved again
//! before the deflate message is returned.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::OnceLock;

use page_set::{PAGE_BYTES, PageSet};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Backing, HostMemoryError, HostPages, MemoryMap, Piece};

/// Where the kernel tells of its pools of huge pages (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Whether the kernel lets processes be promised more memory than it has
/// (`Documentation/mm/overcommit-accounting.rst`), and the word for "never".
const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
const NEVER: &str = "2";

/// A pool of huge pages as the host has it now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePool {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages in it.
    pub total: u64,
    /// Pages that nobody has and that are promised to nobody.
    pub free: u64,
}

impl HugePool {
    /// The pool of pages of this size; empty where there is none.
    #[must_use]
    pub fn of(page_bytes: u64) -> Self {
        let read = |what: &str| {
            let path = format!("{POOLS}/hugepages-{}kB/{what}", page_bytes >> 10);
            fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0u64)
        };
        let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
        Self { page_bytes, total: read("nr_hugepages"), free }
    }
}

/// Reserves what backs all of a new file of guest memory, which has `bytes`.
///
/// # Errors
/// The host does not have it: [`HostMemoryError::HugePages`] or [`HostMemoryError::Commit`].
pub fn reserve_file(file: &File, bytes: u64) -> Result<(), HostMemoryError> {
    match HostPages::of_file(file)? {
        HostPages::Hugetlb { host_page_pages } => {
            let page_bytes = host_page_pages * PAGE_BYTES;
            reserve_huge(file, 0, bytes).map_err(|errno| refused(bytes, page_bytes, errno))
        }
        HostPages::Small | HostPages::Transparent if never_overcommits() => commit(file, 0, bytes),
        HostPages::Small | HostPages::Transparent => Ok(()),
    }
}

impl MemoryMap {
    /// Reserves again what backs `pages`, which were released and are to be used. Costs nothing
    /// where the host has promised nothing that it could break.
    ///
    /// # Errors
    /// As [`reserve_file`]; what comes behind in `pages` is tried all the same.
    pub fn reserve(&self, pages: &PageSet) -> Result<(), HostMemoryError> {
        let breaks = |piece: &Piece<'_>| match (piece.region.backing(), piece.region.host_pages()) {
            (Backing::Anonymous(_), _) => false,
            (Backing::Shared { .. }, HostPages::Hugetlb { .. }) => true,
            (Backing::Shared { .. }, _) => never_overcommits(),
        };
        let pieces = pages.ranges().flat_map(|range| self.translate(range)).flatten();
        let mut outcome = Ok(());
        for piece in pieces.filter(breaks) {
            outcome = outcome.and(reserve_piece(&piece));
        }
        outcome
    }

    /// Takes out of `pages` those that may be used again without a word, and could then not be
    /// backed: of a pool, which somebody else may have emptied. Returns them.
    pub(crate) fn take_unpromised(&self, pages: &mut PageSet) -> PageSet {
        let hugetlb =
            |piece: &Piece<'_>| matches!(piece.region.host_pages(), HostPages::Hugetlb { .. });
        let mut taken = PageSet::new();
        if self
            .regions()
            .iter()
            .any(|region| matches!(region.host_pages(), HostPages::Hugetlb { .. }))
        {
            let pieces = pages.ranges().flat_map(|range| self.translate(range)).flatten();
            taken.extend(pieces.filter(hugetlb).map(|piece| piece.pages));
            pages.subtract(&taken);
        }
        taken
    }
}

fn reserve_piece(piece: &Piece<'_>) -> Result<(), HostMemoryError> {
    let Backing::Shared { file, .. } = piece.region.backing() else { return Ok(()) };
    let (start, len) = (piece.start_bytes(), piece.len_bytes());
    let HostPages::Hugetlb { host_page_pages } = piece.region.host_pages() else {
        return commit(file, start, len);
    };
    let page_bytes = host_page_pages * PAGE_BYTES;
    let from = start / page_bytes * page_bytes;
    let end = (start + len).next_multiple_of(page_bytes);
    reserve_huge(file, from, end - from).map_err(|errno| refused(end - from, page_bytes, errno))
}

fn refused(bytes: u64, page_bytes: u64, errno: Errno) -> HostMemoryError {
    let needed = bytes.div_ceil(page_bytes);
    let HugePool { total, free, .. } = HugePool::of(page_bytes);
    // One more at least: what is free now may not have been.
    let wanted = total + needed.saturating_sub(free).max(1);
    let page_mib = page_bytes >> 20;
    HostMemoryError::HugePages { needed, page_mib, free, total, wanted, source: errno.into() }
}

/// Reserves pages of the pool for a part of a file. The kernel does so when it is mapped, and keeps
/// the promise with the file when the mapping is gone (`hugetlb_reserve_pages` in `mm/hugetlb.c`),
/// until a hole is punched there. Pages are not cleared, so it costs no time.
fn reserve_huge(file: impl AsFd, offset: u64, bytes: u64) -> Result<(), Errno> {
    let len = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    if len == 0 {
        return Ok(());
    }
    let (prot, flags) = (ProtFlags::empty(), MapFlags::SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody can touch and which
    // is unmapped at once; no other mapping is changed.
    unsafe {
        let start = mmap(ptr::null_mut(), len, prot, flags, file, offset)?;
        munmap(start, len)
    }
}

/// Has the kernel back a part of a file in memory, which it counts page by page otherwise.
fn commit(file: &File, offset: u64, bytes: u64) -> Result<(), HostMemoryError> {
    loop {
        match fallocate(file, FallocateFlags::empty(), offset, bytes) {
            Err(Errno::INTR) => {}
            Ok(()) => return Ok(()),
            Err(errno) => {
                return Err(HostMemoryError::Commit { bytes, source: io::Error::from(errno) });
            }
        }
    }
}

/// Read once: who changes it does so when the host starts.
fn never_overcommits() -> bool {
    static NEVER_DOES: OnceLock<bool> = OnceLock::new();
    *NEVER_DOES
        .get_or_init(|| fs::read_to_string(OVERCOMMIT).is_ok_and(|text| text.trim() == NEVER))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags, fstat, ftruncate, memfd_create};

    use super::*;

    const HUGE_BYTES: u64 = 2 << 20;

    fn file(flags: MemfdFlags, bytes: u64) -> File {
        let file = memfd_create("reserve", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, bytes).unwrap();
        file.into()
    }

    /// Others may use the pool, so more is asked for than it has in all.
    #[test]
    fn more_than_the_pool_has_is_refused_with_what_to_do() {
        let pool = HugePool::of(HUGE_BYTES);
        let needed = pool.total + 100_000;
        let file = file(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, needed * HUGE_BYTES);
        let error = reserve_file(&file, needed * HUGE_BYTES).unwrap_err().to_string();
        assert!(error.contains(&format!("{needed} huge pages of 2 MiB")), "{error}");
        assert!(error.contains("vm.nr_hugepages="), "{error}");
    }

    /// What `vm.overcommit_memory=2` makes of a file, on a machine that may have another value.
    #[test]
    fn committed_memory_is_there_or_refused() {
        let small = file(MemfdFlags::ALLOW_SEALING, 1 << 20);
        commit(&small, 0, 1 << 20).unwrap();
        assert_eq!(fstat(&small).unwrap().st_blocks * 512, 1 << 20);
        // Sealed, so that it is refused whatever the host has.
        rustix::fs::fcntl_add_seals(&small, SealFlags::GROW).unwrap();
        let error = commit(&small, 0, 2 << 20).unwrap_err().to_string();
        assert!(error.contains("vm.overcommit_memory"), "{error}");
    }
}
