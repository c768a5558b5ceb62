//! One contiguous run of guest pages, and the host memory that backs it.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use page_set::{PAGE_BYTES, PageRange};
use rustix::fs::{FileType, fstat};
use rustix::io::retry_on_intr;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryRegion, GuestRegionMmap};

use crate::{HostMemoryError, HostPages};

/// Guest pages that one file or one mapping backs.
#[derive(Clone, Debug)]
pub struct Region {
    pages: PageRange,
    backing: Backing,
    host_pages: HostPages,
}

/// What backs a region.
#[derive(Clone, Debug)]
pub enum Backing {
    /// A file that other processes map as well (memfd, tmpfs, hugetlbfs). Released by
    /// punching holes, which removes the memory from every mapping.
    Shared {
        /// The file, open for writing.
        file: Arc<File>,
        /// Offset of the region in the file.
        offset_bytes: u64,
    },
    /// Private anonymous memory of this process.
    Anonymous(AnonymousMemory),
}

/// Private anonymous memory of this process that may be released at any time.
///
/// Only constructors that guarantee this can create it; see [`Region`].
#[derive(Clone)]
pub struct AnonymousMemory {
    host_bytes: usize,
    /// Keeps the mapping in place.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl AnonymousMemory {
    /// Address of the first byte in this process.
    #[must_use]
    pub fn host_bytes(&self) -> usize {
        self.host_bytes
    }
}

impl fmt::Debug for AnonymousMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnonymousMemory({:#x})", self.host_bytes)
    }
}

impl Region {
    /// Guest pages `pages`, backed by `file` from `offset_bytes` on. Determines the host's
    /// page size; [`Self::with_host_pages`] overrides it.
    ///
    /// # Errors
    /// The offset is not a multiple of 4 KiB or too large, the file is not a regular file,
    /// or `fstat` fails.
    pub fn shared(
        pages: PageRange,
        file: Arc<File>,
        offset_bytes: u64,
    ) -> Result<Self, HostMemoryError> {
        let end =
            pages.pages().checked_mul(PAGE_BYTES).and_then(|len| len.checked_add(offset_bytes));
        if !offset_bytes.is_multiple_of(PAGE_BYTES)
            || end.is_none_or(|end| i64::try_from(end).is_err())
        {
            return Err(HostMemoryError::FileOffset { pages, offset_bytes });
        }
        let stat = retry_on_intr(|| fstat(&file)).map_err(|e| HostMemoryError::Host {
            what: "fstat of guest memory",
            source: e.into(),
        })?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(HostMemoryError::NotAFile { pages });
        }
        let host_pages = HostPages::of_file(&file)?;
        Ok(Self { pages, backing: Backing::Shared { file, offset_bytes }, host_pages })
    }

    /// Guest memory mapped by vm-memory: a shared file mapping or private anonymous memory,
    /// which this keeps mapped.
    ///
    /// vm-memory expects its mappings to change at any time, which makes it sound to release
    /// their pages.
    ///
    /// # Errors
    /// [`HostMemoryError::NotReleasable`] for any other kind of mapping; else as
    /// [`Self::shared`].
    pub fn of_mapping<B>(region: &GuestRegionMmap<B>) -> Result<Self, HostMemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let pages = whole_pages(region.start_addr().raw_value(), region.len())?;
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let anonymous = region.flags() & libc::MAP_ANONYMOUS != 0;
        match region.file_offset() {
            Some(from) if shared => Self::shared(pages, Arc::clone(from.arc()), from.start()),
            None if anonymous && !shared => {
                let host_bytes = region.as_ptr() as usize;
                Self::anonymous_memory(pages, host_bytes, Some(region.get_mmap()))
            }
            _ => Err(HostMemoryError::NotReleasable { pages }),
        }
    }

    /// Guest pages `pages`, backed by the anonymous memory at `host`.
    ///
    /// # Safety
    /// As long as this region or a clone of it exists, `pages` pages from `host` on must be
    /// one private anonymous mapping that belongs to the guest, and nothing may depend on
    /// their contents: any page may read as zeros at any time, so no Rust reference may point
    /// into them.
    ///
    /// # Errors
    /// The address is not page-aligned, or the memory would wrap.
    pub unsafe fn anonymous_at(
        pages: PageRange,
        host: NonNull<u8>,
    ) -> Result<Self, HostMemoryError> {
        Self::anonymous_memory(pages, host.as_ptr() as usize, None)
    }

    fn anonymous_memory(
        pages: PageRange,
        host_bytes: usize,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self, HostMemoryError> {
        let fits = pages
            .pages()
            .checked_mul(PAGE_BYTES)
            .and_then(|len| (host_bytes as u64).checked_add(len))
            .is_some_and(|end| usize::try_from(end).is_ok());
        if !fits || !(host_bytes as u64).is_multiple_of(PAGE_BYTES) {
            return Err(HostMemoryError::HostAddress { pages, host_bytes });
        }
        let backing = Backing::Anonymous(AnonymousMemory { host_bytes, _owner: owner });
        Ok(Self { pages, backing, host_pages: HostPages::Small })
    }

    /// The same region with other host pages. Anonymous memory counts as small pages unless
    /// set here.
    #[must_use]
    pub fn with_host_pages(self, host_pages: HostPages) -> Self {
        Self { host_pages, ..self }
    }

    /// The guest pages.
    #[must_use]
    pub fn pages(&self) -> PageRange {
        self.pages
    }

    /// What backs the region.
    #[must_use]
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The host pages that back the region.
    #[must_use]
    pub fn host_pages(&self) -> HostPages {
        self.host_pages
    }

    /// Start of the region in its file or in this process, from which the alignment of host
    /// pages is counted.
    pub(crate) fn base_bytes(&self) -> u64 {
        match &self.backing {
            Backing::Shared { offset_bytes, .. } => *offset_bytes,
            Backing::Anonymous(memory) => memory.host_bytes as u64,
        }
    }
}

/// Converts `len_bytes` of guest memory at `guest_bytes` to pages.
///
/// # Errors
/// They are not whole pages.
fn whole_pages(guest_bytes: u64, len_bytes: u64) -> Result<PageRange, HostMemoryError> {
    if !guest_bytes.is_multiple_of(PAGE_BYTES) || !len_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(HostMemoryError::NotWholePages { guest_bytes, len_bytes });
    }
    Ok(PageRange::new(guest_bytes / PAGE_BYTES, len_bytes / PAGE_BYTES)?)
}
