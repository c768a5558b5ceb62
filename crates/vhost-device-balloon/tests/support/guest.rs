//! Guest memory in a memfd, with a distinct pattern in each page.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub(crate) const PAGE: u64 = 4096;
/// Pages of a guest.
pub(crate) const PAGES: u64 = 1024;
pub(crate) const BYTES: u64 = PAGES * PAGE;
/// Guest physical address of its memory: beyond 4 GiB, as in User Mode Linux.
pub(crate) const BASE: u64 = 0x1_2340_0000;
pub(crate) const FIRST_PAGE: u64 = BASE / PAGE;
/// Offset of the region in its file.
pub(crate) const FILE_OFFSET: u64 = 0x3000;
/// Pages of the vrings and messages; the others have patterns.
pub(crate) const OWN_PAGES: u64 = 64;
/// The front end's address of the memory, if it differs from the guest physical address.
pub(crate) const USER_BASE: u64 = 0x7f55_0000_0000;

/// Guest memory, mapped here and passed to the back end as a file.
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) memory: GuestMemoryMmap,
    /// Offset of the region in its file.
    pub(crate) file_offset: u64,
}

pub(crate) fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

impl Guest {
    /// Creates a guest whose pages are all written.
    pub(crate) fn new() -> Self {
        let guest = Self::sparse();
        guest.zero(BASE, OWN_PAGES * PAGE);
        guest.write_patterns(data_pages());
        guest
    }

    /// Like [`new`](Self::new), in a file sealed against shrinking.
    pub(crate) fn sealed() -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("guest", flags).unwrap());
        file.set_len(FILE_OFFSET + BYTES).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let guest = Self::in_file(file);
        guest.zero(BASE, OWN_PAGES * PAGE);
        guest.write_patterns(data_pages());
        guest
    }

    /// Creates a guest that has not used its memory.
    pub(crate) fn sparse() -> Self {
        Self::in_file(memfd(FILE_OFFSET + BYTES))
    }

    fn in_file(file: File) -> Self {
        Self::at(file, FILE_OFFSET)
    }

    /// Creates a guest in an unused file.
    pub(crate) fn at(file: File, file_offset: u64) -> Self {
        let place = FileOffset::new(file.try_clone().unwrap(), file_offset);
        let region =
            GuestRegionMmap::from_range(GuestAddress(BASE), BYTES as usize, Some(place)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        Self { file, memory, file_offset }
    }

    /// Zeroes some pages; faster than `reset` of a vring.
    pub(crate) fn zero(&self, at: u64, bytes: u64) {
        self.memory.write_slice(&vec![0; bytes as usize], GuestAddress(at)).unwrap();
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn write_patterns(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.write(page * PAGE, &pattern(page));
        }
    }

    pub(crate) fn page(&self, page: u64) -> [u8; PAGE as usize] {
        let mut bytes = [0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(page * PAGE)).unwrap();
        bytes
    }

    pub(crate) fn is_zero(&self, page: u64) -> bool {
        self.page(page) == [0; PAGE as usize]
    }

    pub(crate) fn has_pattern(&self, page: u64) -> bool {
        self.page(page)[..] == pattern(page)
    }

    /// Expects that of the pages with patterns exactly those in `gone` read as zeros, and all
    /// others are unchanged.
    pub(crate) fn assert_gone(&self, gone: &BTreeSet<u64>) {
        for page in data_pages() {
            if gone.contains(&page) {
                assert!(self.is_zero(page), "page {page:#x} was inflated and is not released");
            } else {
                assert!(self.has_pattern(page), "page {page:#x} has lost its contents");
            }
        }
    }

    /// Allocated size of the file, in units of 512 bytes.
    pub(crate) fn blocks(&self) -> u64 {
        self.file.metadata().unwrap().blocks()
    }
}

/// All pages with patterns.
pub(crate) fn data_pages() -> std::ops::Range<u64> {
    FIRST_PAGE + OWN_PAGES..FIRST_PAGE + PAGES
}

/// A pattern without zeros, different for each page.
fn pattern(page: u64) -> Vec<u8> {
    let word = (page | 1 << 63).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 0x0101_0101_0101_0101;
    word.to_le_bytes().repeat(PAGE as usize / 8)
}
