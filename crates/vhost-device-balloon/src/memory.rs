//! Guest memory according to the front end's memory table.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use balloon_abi::BALLOON_PAGE_BYTES;
use balloon_device::MemoryLayout;
use host_memory::{BackedMemory, HostPages, MemoryMap};
use page_set::PageRange;
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::error::{SessionError, Violation};
use crate::wire::{MAX_FDS, Message};

/// One region of the memory table.
#[derive(Debug)]
struct Region {
    guest_address: u64,
    bytes: u64,
    /// Address in the front end's address space, which the addresses of queues use.
    user_address: u64,
    file: Arc<File>,
    file_offset: u64,
}

/// A mapped memory table.
#[derive(Debug)]
pub(crate) struct MemoryTable {
    regions: Vec<Region>,
    pub(crate) layout: MemoryLayout,
    pub(crate) map: BackedMemory,
}

impl MemoryTable {
    /// Reads and maps the payload of `SET_MEM_TABLE`, for a guest of at most `limit` bytes.
    /// Ignores bytes after the table: User Mode Linux always sends space for two regions.
    pub(crate) fn from_message(message: &mut Message, limit: u64) -> Result<Self, SessionError> {
        let fds = std::mem::take(&mut message.fds);
        let mut fields = message.fields();
        let count = fields.u32()? as usize;
        fields.u32()?;
        if count == 0 || count > MAX_FDS || fds.len() != count {
            return Err(Violation::FdCount { request: message.request, count: fds.len() }.into());
        }
        let mut regions = Vec::with_capacity(count);
        for fd in fds {
            regions.push(Region::read(&mut fields, fd)?);
        }
        let layout = MemoryLayout::new(regions.iter().map(|r| (r.guest_address, r.bytes)))
            .map_err(|_| Violation::MemoryTable)?;
        let bytes = layout.pages().saturating_mul(BALLOON_PAGE_BYTES);
        if bytes > limit {
            return Err(Violation::TooMuchMemory { bytes, limit }.into());
        }
        let mut maps = regions.iter().map(Region::map).collect::<Result<Vec<_>, _>>()?;
        maps.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        let map = GuestMemoryMmap::from_regions(maps).map_err(|e| SessionError::Map(e.into()))?;
        let map = BackedMemory::new(map).map_err(|e| SessionError::Map(e.into()))?;
        Ok(Self { regions, layout, map })
    }

    /// Returns the map from pages to files, for releasing memory.
    pub(crate) fn host_map(&self) -> Result<MemoryMap, SessionError> {
        let regions = self.regions.iter().map(|region| {
            let (start, bytes) = (region.guest_address, region.bytes);
            let pages = PageRange::new(start / BALLOON_PAGE_BYTES, bytes / BALLOON_PAGE_BYTES)
                .map_err(|e| SessionError::Map(e.into()))?;
            host_memory::Region::shared(pages, Arc::clone(&region.file), region.file_offset)
                .map_err(|e| SessionError::Map(e.into()))
        });
        MemoryMap::new(regions.collect::<Result<_, _>>()?).map_err(|e| SessionError::Map(e.into()))
    }

    /// Returns true if no file can shrink. A seal cannot be removed.
    ///
    /// Even a sealed file may have no memory behind a page; [`BackedMemory`] detects that on
    /// access.
    pub(crate) fn is_sealed(&self) -> bool {
        let sealed = |region: &Region| {
            fcntl_get_seals(&region.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
        };
        self.regions.iter().all(sealed)
    }

    /// Translates an address of the front end to a guest physical address.
    pub(crate) fn guest_address(&self, user: u64) -> Result<GuestAddress, SessionError> {
        let inside = |region: &&Region| {
            user.checked_sub(region.user_address).is_some_and(|offset| offset < region.bytes)
        };
        let region =
            self.regions.iter().find(inside).ok_or(Violation::NoSuchAddress { address: user })?;
        // Cannot overflow: `MemoryLayout` has checked that the region's end fits.
        Ok(GuestAddress(region.guest_address + (user - region.user_address)))
    }
}

impl Region {
    fn read(fields: &mut crate::wire::Fields<'_>, fd: OwnedFd) -> Result<Self, SessionError> {
        Ok(Self {
            guest_address: fields.u64()?,
            bytes: fields.u64()?,
            user_address: fields.u64()?,
            file_offset: fields.u64()?,
            file: Arc::new(File::from(fd)),
        })
    }

    fn map(&self) -> Result<GuestRegionMmap, SessionError> {
        let size = usize::try_from(self.bytes).map_err(|_| Violation::MemoryTable)?;
        let end = self.file_offset.checked_add(self.bytes).ok_or(Violation::MemoryTable)?;
        let len = self.file.metadata().map_err(|e| SessionError::Map(e.into()))?.len();
        // Pages beyond the end of the file are inaccessible.
        if len < end {
            return Err(Violation::MemoryTable.into());
        }
        self.check_huge_pages()?;
        let file = FileOffset::from_arc(Arc::clone(&self.file), self.file_offset);
        GuestRegionMmap::from_range(GuestAddress(self.guest_address), size, Some(file))
            .map_err(|e| SessionError::Map(e.into()))
    }

    /// Refuses a partial huge page of hugetlbfs. The kernel would map all of it, and `munmap`
    /// with the same length fails, so the mapping would leak.
    fn check_huge_pages(&self) -> Result<(), SessionError> {
        let host_pages = HostPages::of_file(&self.file).map_err(|e| SessionError::Map(e.into()))?;
        let HostPages::Hugetlb { host_page_pages } = host_pages else { return Ok(()) };
        let page_bytes = host_page_pages.saturating_mul(BALLOON_PAGE_BYTES);
        let Self { bytes, file_offset, .. } = *self;
        if bytes.is_multiple_of(page_bytes) && file_offset.is_multiple_of(page_bytes) {
            return Ok(());
        }
        Err(Violation::PartialHugePages { bytes, file_offset, page_bytes }.into())
    }
}
