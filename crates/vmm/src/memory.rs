//! The guest's memory.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host_memory::{
    HostPages, Huge, MemoryMap, ObserveDiscards, Region, advise_huge, huge_by_default,
    log_bus_errors, reserve_file,
};
use page_set::{PAGE_BYTES, PageRange, PageSet};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::error::Error;
use crate::layout;

/// What backs a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryKind {
    /// A memfd, which can be shared with another process, instead of private memory.
    pub shared: bool,
    /// Huge pages: from the pool (hugetlbfs) if shared, else transparent ones.
    pub huge: bool,
}

/// Guest memory with a bitmap of the pages that devices in this process write. It does not see
/// writes by vCPUs.
pub(crate) type Ram = GuestMemoryMmap<AtomicBitmap>;

/// One region of guest memory.
type RamRegion = GuestRegionMmap<AtomicBitmap>;

/// Marks discarded pages as dirty while the dirty log is on. They read as zeros afterwards; a copy
/// at a destination that was sent before would keep using memory, because the guest does not
/// inflate or report a page a second time.
pub(crate) struct DiscardLog {
    guest: Ram,
    on: AtomicBool,
}

impl DiscardLog {
    pub(crate) fn switch(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }
}

impl ObserveDiscards for DiscardLog {
    /// Called after the discard, so that a migration that read the page before it finds it dirty
    /// later.
    fn after(&self, pages: &PageSet) {
        if !self.on.load(Ordering::SeqCst) {
            return;
        }
        for region in self.guest.iter() {
            let start = region.start_addr().raw_value() / PAGE_BYTES;
            let Ok(all) = PageRange::new(start, region.len() / PAGE_BYTES) else { continue };
            for run in pages.ranges_in(all) {
                let bytes = |pages: u64| usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
                region.bitmap().mark_dirty(bytes(run.start() - start), bytes(run.pages()));
            }
        }
    }
}

/// A guest's memory and the data on its pages.
pub(crate) struct MachineMemory {
    pub(crate) guest: Ram,
    /// The map for discarding pages.
    pub(crate) map: MemoryMap,
    /// Observes all discards.
    pub(crate) discards: Arc<DiscardLog>,
    pub(crate) ranges: Vec<(u64, u64)>,
}

impl MachineMemory {
    pub(crate) fn new(bytes: u64, kind: MemoryKind) -> Result<Self, Error> {
        let ranges = layout::ranges(bytes)?;
        // Memory can still be missing: a cgroup limit, a failed memory module.
        log_bus_errors().map_err(Error::host::<std::io::Error>("a signal handler"))?;
        let file = kind.shared.then(|| memory_file(bytes, kind.huge)).transpose()?;
        let mut offset = 0;
        let mut regions = Vec::new();
        for &(start, bytes) in &ranges {
            let size = usize::try_from(bytes).map_err(Error::memory("mapping"))?;
            let file = file.as_ref().map(|file| FileOffset::from_arc(Arc::clone(file), offset));
            let region = RamRegion::from_range(GuestAddress(start), size, file)
                .map_err(Error::memory("mapping"))?;
            regions.push(region);
            offset += bytes;
        }
        let known = |region: &RamRegion| host_region(region, kind);
        let host = regions.iter().map(known).collect::<Result<_, Error>>()?;
        let map = MemoryMap::new(host).map_err(Error::memory("mapping"))?.committing();
        let guest = Ram::from_regions(regions).map_err(Error::memory("mapping"))?;
        let discards = Arc::new(DiscardLog { guest: guest.clone(), on: AtomicBool::new(false) });
        map.observe(Arc::clone(&discards) as _);
        Ok(Self { guest, map, discards, ranges })
    }
}

/// A region with the kind of its host pages.
fn host_region(region: &RamRegion, kind: MemoryKind) -> Result<Region, Error> {
    let known = Region::of_mapping(region).map_err(Error::memory("mapping"))?;
    match kind {
        MemoryKind { shared: true, .. } => Ok(known),
        MemoryKind { huge: true, .. } => {
            let advised = advise_huge(region, Huge::May);
            advised.map_err(Error::memory("enabling huge pages"))?;
            Ok(known.with_host_pages(HostPages::Transparent))
        }
        // The host uses huge pages for all processes.
        _ if huge_by_default() => Ok(known.with_host_pages(HostPages::Transparent)),
        _ => {
            // Also keeps the host from using huge pages later, which would take back ballooned
            // memory. A kernel without huge pages returns an error, which does not matter.
            let _ = advise_huge(region, Huge::Never);
            Ok(known)
        }
    }
}

fn memory_file(bytes: u64, huge: bool) -> Result<Arc<File>, Error> {
    let flags = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let fd = memfd_create("guest-memory", MemfdFlags::CLOEXEC | flags)
        .map_err(Error::memory("memfd_create"))?;
    ftruncate(&fd, bytes).map_err(Error::memory("ftruncate"))?;
    let file = File::from(fd);
    // Without the reservation, touching a page that the host does not have raises SIGBUS.
    reserve_file(&file, bytes).map_err(Error::memory("reserving"))?;
    Ok(Arc::new(file))
}

#[cfg(test)]
mod tests {
    use host_memory::{Discard, HugePool};
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn discarded_pages_are_dirty_while_the_dirty_log_is_on() {
        for kind in [false, true].map(|shared| MemoryKind { shared, huge: false }) {
            let memory = MachineMemory::new(BYTES, kind).unwrap();
            // A clone, as the balloon has it.
            let map = memory.map.clone();
            let above = layout::HOLE_END / PAGE_BYTES;
            let mut pages = PageSet::from(PageRange::new(100, 70).unwrap());
            pages.insert(PageRange::new(above + 3, 1).unwrap());
            let noted = || {
                let noted =
                    memory.guest.iter().map(|region| region.get_mmap().bitmap().get_and_reset());
                noted.flatten().map(u64::count_ones).sum::<u32>()
            };
            let _ = map.discard(&pages);
            assert_eq!(noted(), 0);
            memory.discards.switch(true);
            let _ = map.discard(&pages);
            let high = memory.guest.find_region(GuestAddress(layout::HOLE_END)).unwrap();
            assert!(high.bitmap().dirty_at(3 * 4096) && !high.bitmap().dirty_at(4 * 4096));
            assert_eq!(noted(), 71);
            memory.discards.switch(false);
            let _ = map.discard_per_page(&pages);
            assert_eq!(noted(), 0);
        }
    }

    /// A guest that would get SIGBUS later must not start: `run`, `receive` and `restore` all
    /// allocate memory this way.
    #[test]
    fn missing_huge_pages_are_an_error_before_they_are_touched() {
        let kind = MemoryKind { shared: true, huge: true };
        let pages = HugePool::of(2 << 20).total + 1000;
        let error = MachineMemory::new(pages * (2 << 20), kind).err().unwrap();
        let message = std::error::Error::source(&error).unwrap().to_string();
        assert!(message.contains(&format!("{pages} huge pages of 2 MiB are needed")), "{message}");
        assert!(message.contains("vm.nr_hugepages"), "{message}");
    }

    /// Reaches above the hole; untouched pages cost nothing.
    const BYTES: u64 = 4 << 30;

    #[test]
    fn each_kind_of_memory_works_on_both_sides_of_the_hole() {
        for (shared, huge) in [(false, false), (false, true), (true, false)] {
            let memory = MachineMemory::new(BYTES, MemoryKind { shared, huge }).unwrap();
            assert_eq!(memory.map.pages(), BYTES / 4096);
            assert_eq!(memory.guest.iter().count(), 2);
            for (start, bytes) in &memory.ranges {
                for at in [*start, start + bytes - 8] {
                    memory.guest.write_obj(at, GuestAddress(at)).unwrap();
                    assert_eq!(memory.guest.read_obj::<u64>(GuestAddress(at)).unwrap(), at);
                }
            }
            let hole = memory.guest.write_obj(1u8, GuestAddress(layout::HOLE_START));
            assert!(hole.is_err());
        }
    }
}
