//! Reserves host memory, so that a guest's page can be backed when it is touched.
//!
//! A mapping guarantees nothing: touching a page that the host cannot back raises SIGBUS. So memory
//! is reserved when it is mapped. Releasing it ends the reservation, so deflated pages are reserved
//! again before the deflate message is returned.

use std::fs::{self, File};
use std::iter;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::OnceLock;

use page_set::{PAGE_BYTES, PageSet};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Backing, HostMemoryError, HostPages, MemoryMap, Piece, Region};

/// The kernel's pools of huge pages (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Whether the kernel overcommits memory (`Documentation/mm/overcommit-accounting.rst`), and the
/// value for "never".
const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
const NEVER: &str = "2";

/// The current state of a pool of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePool {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages in it.
    pub total: u64,
    /// Pages that are neither used nor reserved.
    pub free: u64,
}

impl HugePool {
    /// The pool of pages of this size; empty if there is none.
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

/// Reserves the host memory for a new file of guest memory with `bytes`.
///
/// # Errors
/// The host lacks the memory: [`HostMemoryError::HugePages`] or [`HostMemoryError::Commit`].
pub fn reserve_file(file: &File, bytes: u64) -> Result<(), HostMemoryError> {
    let host_pages = HostPages::of_file(file)?;
    let outcome = match host_pages {
        HostPages::Hugetlb { .. } => reserve_huge(file, 0, bytes),
        HostPages::Small | HostPages::Transparent if never_overcommits() => commit(file, 0, bytes),
        HostPages::Small | HostPages::Transparent => Ok(()),
    };
    outcome.map_err(|errno| Refused { bytes, errno }.error(host_pages))
}

/// A reservation that the host refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refused {
    bytes: u64,
    errno: Errno,
}

impl MemoryMap {
    /// Reserves again the host memory of `pages`, which were released and will be used. Costs
    /// nothing if the host makes no reservations for this memory, or not for
    /// [this process](Self::committing).
    ///
    /// # Errors
    /// As [`reserve_file`], for the first region that cannot be reserved completely. The other
    /// regions are tried all the same.
    pub fn reserve(&self, pages: &PageSet) -> Result<(), HostMemoryError> {
        self.reserve_or_commit(pages, self.commits && never_overcommits())
    }

    fn reserve_or_commit(&self, pages: &PageSet, commits: bool) -> Result<(), HostMemoryError> {
        let mut first = None;
        for region in self.regions() {
            let Backing::Shared { file, .. } = region.backing() else { continue };
            let outcome = match region.host_pages() {
                HostPages::Hugetlb { host_page_pages } => {
                    let reserve = |offset, bytes| reserve_huge(file, offset, bytes);
                    reserve_region(region, pages, host_page_pages * PAGE_BYTES, reserve)
                }
                HostPages::Small | HostPages::Transparent if commits => {
                    let commit = |offset, bytes| commit(file, offset, bytes);
                    reserve_region(region, pages, PAGE_BYTES, commit)
                }
                HostPages::Small | HostPages::Transparent => Ok(()),
            };
            if let Err(refused) = outcome {
                first = first.or(Some((region.host_pages(), refused)));
            }
        }
        // Once, since it reads the host's pool.
        first.map_or(Ok(()), |(host_pages, refused)| Err(refused.error(host_pages)))
    }

    /// Removes from `pages` those of a pool (hugetlbfs): the guest may use them again without a
    /// message, when another process may have emptied the pool. Returns them.
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

/// Reserves `pages` of one region, with one call for each run of host pages. Stops at the first
/// refusal, so that a host without enough memory does not cause thousands of calls.
fn reserve_region(
    region: &Region,
    pages: &PageSet,
    host_page_bytes: u64,
    mut reserve: impl FnMut(u64, u64) -> Result<(), Errno>,
) -> Result<(), Refused> {
    let mut runs = runs(region, pages, host_page_bytes);
    while let Some(run) = runs.next() {
        if let Err(errno) = reserve(run.start, run.end - run.start) {
            let left: u64 = runs.map(|run| run.end - run.start).sum();
            return Err(Refused { bytes: run.end - run.start + left, errno });
        }
    }
    Ok(())
}

/// The parts of a region's file that overlap `pages`, in whole host pages.
fn runs(
    region: &Region,
    pages: &PageSet,
    host_page_bytes: u64,
) -> impl Iterator<Item = Range<u64>> {
    let (base, first) = (region.base_bytes(), region.pages().start());
    let widened = pages.ranges_in(region.pages()).map(move |range| {
        // Cannot overflow: the region's end was checked to be within the largest file.
        let start = base + (range.start() - first) * PAGE_BYTES;
        let end = base + (range.end() - first) * PAGE_BYTES;
        start / host_page_bytes * host_page_bytes..end.next_multiple_of(host_page_bytes)
    });
    let mut widened = widened.peekable();
    iter::from_fn(move || {
        let mut run = widened.next()?;
        while let Some(next) = widened.next_if(|next| next.start <= run.end) {
            run.end = next.end;
        }
        Some(run)
    })
}

impl Refused {
    fn error(self, host_pages: HostPages) -> HostMemoryError {
        let Self { bytes, errno } = self;
        let HostPages::Hugetlb { host_page_pages } = host_pages else {
            return HostMemoryError::Commit { bytes, source: errno.into() };
        };
        let page_bytes = host_page_pages * PAGE_BYTES;
        let needed = bytes.div_ceil(page_bytes);
        let HugePool { total, free, .. } = HugePool::of(page_bytes);
        // At least one more: pages that are free now may not have been at the refusal.
        let wanted = total + needed.saturating_sub(free).max(1);
        let page_mib = page_bytes >> 20;
        HostMemoryError::HugePages { needed, page_mib, free, total, wanted, source: errno.into() }
    }
}

/// Reserves pages of the pool for a part of a file. The kernel does so when the part is mapped. The
/// reservation belongs to the file and outlives the mapping (`hugetlb_reserve_pages` in
/// `mm/hugetlb.c`), until a hole is punched there. Pages are not cleared, so this is fast.
fn reserve_huge(file: impl AsFd, offset: u64, bytes: u64) -> Result<(), Errno> {
    let len = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    if len == 0 {
        return Ok(());
    }
    let (prot, flags) = (ProtFlags::empty(), MapFlags::SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice, without access permissions, which
    // is unmapped at once; no other mapping is changed.
    unsafe {
        let start = mmap(ptr::null_mut(), len, prot, flags, file, offset)?;
        munmap(start, len)
    }
}

/// Allocates a part of a file now, which the kernel would otherwise commit page by page.
fn commit(file: &File, offset: u64, bytes: u64) -> Result<(), Errno> {
    retry_on_intr(|| fallocate(file, FallocateFlags::empty(), offset, bytes))
}

/// Read once: the setting is made when the host starts.
fn never_overcommits() -> bool {
    static NEVER_DOES: OnceLock<bool> = OnceLock::new();
    *NEVER_DOES
        .get_or_init(|| fs::read_to_string(OVERCOMMIT).is_ok_and(|text| text.trim() == NEVER))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use page_set::PageRange;
    use rustix::fs::{MemfdFlags, SealFlags, fstat, ftruncate, memfd_create};

    use super::*;

    const HUGE_BYTES: u64 = 2 << 20;

    fn file(flags: MemfdFlags, bytes: u64) -> File {
        let file = memfd_create("reserve", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, bytes).unwrap();
        file.into()
    }

    /// Other processes may use the pool, so this requests more than it has in total.
    #[test]
    fn exceeding_the_pool_is_refused_with_a_hint() {
        let pool = HugePool::of(HUGE_BYTES);
        let needed = pool.total + 100_000;
        let file = file(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, needed * HUGE_BYTES);
        let error = reserve_file(&file, needed * HUGE_BYTES).unwrap_err().to_string();
        assert!(error.contains(&format!("{needed} huge pages of 2 MiB")), "{error}");
        assert!(error.contains("vm.nr_hugepages="), "{error}");
    }

    /// The effect of `vm.overcommit_memory=2` on a file, on a machine that may have another value.
    #[test]
    fn committed_memory_is_allocated_or_refused() {
        let small = file(MemfdFlags::ALLOW_SEALING, 1 << 20);
        commit(&small, 0, 1 << 20).unwrap();
        assert_eq!(fstat(&small).unwrap().st_blocks * 512, 1 << 20);
        // Sealed, so that it is refused even if the host has the memory.
        rustix::fs::fcntl_add_seals(&small, SealFlags::GROW).unwrap();
        let (bytes, host_pages) = (2 << 20, HostPages::Small);
        let errno = commit(&small, 0, bytes).unwrap_err();
        let error = Refused { bytes, errno }.error(host_pages).to_string();
        assert!(error.contains("vm.overcommit_memory"), "{error}");
    }

    /// A region of 8 MiB from guest page 100 on, at 64 KiB in its file.
    fn region() -> Region {
        let file = Arc::new(file(MemfdFlags::empty(), (8 << 20) + (64 << 10)));
        Region::shared(PageRange::new(100, 2048).unwrap(), file, 64 << 10).unwrap()
    }

    fn every_second_page() -> PageSet {
        (0..3000).step_by(2).map(|page| PageRange::new(page, 1).unwrap()).collect()
    }

    /// A peer's memory is charged to the peer, and not committed here.
    #[test]
    fn only_a_committing_map_commits_memory() {
        let region = region();
        let Backing::Shared { file, .. } = region.backing().clone() else { panic!() };
        let map = MemoryMap::new(vec![region]).unwrap();
        let there = || fstat(&file).unwrap().st_blocks * 512;
        assert!(!map.commits && map.clone().committing().commits);
        map.reserve_or_commit(&every_second_page(), map.commits).unwrap();
        assert_eq!(there(), 0);
        let map = map.committing();
        map.reserve_or_commit(&every_second_page(), map.commits).unwrap();
        assert_eq!(there(), 4 << 20);
    }

    #[test]
    fn each_host_page_is_reserved_once() {
        let (region, pages) = (region(), every_second_page());
        let whole: Vec<_> = runs(&region, &pages, HUGE_BYTES).collect();
        assert_eq!(whole, vec![0..10 << 20]);
        // A huge page between them that has none of the pages.
        let apart = PageSet::from_iter(
            [(100, 3), (105, 1), (1124, 1)]
                .map(|(start, pages)| PageRange::new(start, pages).unwrap()),
        );
        let apart: Vec<_> = runs(&region, &apart, HUGE_BYTES).collect();
        assert_eq!(apart, [0..2 << 20, 4 << 20..6 << 20]);
        assert_eq!(runs(&region, &pages, PAGE_BYTES).count(), 1024);
    }

    #[test]
    fn a_refusal_ends_the_calls_for_a_region() {
        let mut asked = Vec::new();
        let refused =
            reserve_region(&region(), &every_second_page(), PAGE_BYTES, |start, bytes| {
                asked.push((start, bytes));
                if asked.len() == 3 { Err(Errno::NOMEM) } else { Ok(()) }
            });
        let left = (1024 - 2) * PAGE_BYTES;
        assert_eq!(refused, Err(Refused { bytes: left, errno: Errno::NOMEM }));
        assert_eq!(asked.len(), 3);
    }
}
