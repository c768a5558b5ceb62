//! What can be wrong with a description of guest memory.

use std::io;

use page_set::{PageRange, PageSetError};

/// A memory map that cannot be used, or a host that cannot be asked.
///
/// The layout is the fault of whoever describes the guest's memory (a monitor
/// or front end), the rest the host's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostMemoryError {
    /// A region is not made of whole 4 KiB pages.
    #[error(
        "region at guest address {guest_bytes:#x}, {len_bytes:#x} bytes: not whole 4 KiB pages"
    )]
    NotWholePages {
        /// Guest physical address.
        guest_bytes: u64,
        /// Length in bytes.
        len_bytes: u64,
    },
    /// A region lies outside what page numbers can say.
    #[error("region lies outside the address space")]
    PastEnd(#[from] PageSetError),
    /// Two regions hold the same guest page.
    #[error("regions {first:?} and {second:?} overlap")]
    Overlap {
        /// The region that starts first.
        first: PageRange,
        /// The other.
        second: PageRange,
    },
    /// A file offset is not a multiple of 4 KiB or overflows a file.
    #[error("region {pages:?}: file offset {offset_bytes:#x} is not usable")]
    FileOffset {
        /// The region.
        pages: PageRange,
        /// Offset of its first byte in the file.
        offset_bytes: u64,
    },
    /// The file cannot have holes punched.
    #[error("region {pages:?}: its file is not a regular file")]
    NotAFile {
        /// The region.
        pages: PageRange,
    },
    /// The mapping is neither a shared file nor private anonymous memory, so
    /// releasing it would free nothing or lose what the file holds.
    #[error("region {pages:?}: neither a shared file nor private anonymous memory")]
    NotReleasable {
        /// The region.
        pages: PageRange,
    },
    /// Anonymous memory does not start at a page or ends beyond the address space.
    #[error("region {pages:?}: host address {host_bytes:#x} is not usable")]
    HostAddress {
        /// The region.
        pages: PageRange,
        /// Address in this process.
        host_bytes: usize,
    },
    /// The host's pool has too few huge pages.
    #[error(
        "{needed} huge pages of {page_mib} MiB are needed, and {free} of {total} are free; \
         `sysctl vm.nr_hugepages={wanted}` makes room, where these are the host's usual huge pages"
    )]
    HugePages {
        /// Pages that are needed.
        needed: u64,
        /// MiB of each.
        page_mib: u64,
        /// Pages that nobody has and that are promised to nobody.
        free: u64,
        /// Pages in the pool.
        total: u64,
        /// Pages that the pool should have.
        wanted: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host commits no more memory than it has.
    #[error(
        "the host has no {bytes} bytes left that it may promise (vm.overcommit_memory=2; see \
         CommitLimit and Committed_AS in /proc/meminfo)"
    )]
    Commit {
        /// What was asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host refused to say something.
    #[error("{what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}
