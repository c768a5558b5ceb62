//! Errors of guest memory and its reservation.

use std::io;

use page_set::{PageRange, PageSetError};

/// An invalid memory map, or a failed host operation.
///
/// The layout is the fault of the side that describes the guest's memory (the VMM or
/// front end), the rest the host's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostMemoryError {
    /// A region does not consist of whole 4 KiB pages.
    #[error(
        "region at guest address {guest_bytes:#x}, {len_bytes:#x} bytes: not whole 4 KiB pages"
    )]
    NotWholePages {
        /// Guest physical address.
        guest_bytes: u64,
        /// Length in bytes.
        len_bytes: u64,
    },
    /// A region lies beyond the largest page number.
    #[error("region lies outside the address space")]
    PastEnd(#[from] PageSetError),
    /// Two regions contain the same guest page.
    #[error("regions {first:?} and {second:?} overlap")]
    Overlap {
        /// The region that starts first.
        first: PageRange,
        /// The other region.
        second: PageRange,
    },
    /// A file offset is not a multiple of 4 KiB or overflows a file.
    #[error(
        "region {pages:?}: file offset {offset_bytes:#x} is not a multiple of 4 KiB, or too large"
    )]
    FileOffset {
        /// The region.
        pages: PageRange,
        /// Offset of its first byte in the file.
        offset_bytes: u64,
    },
    /// Holes cannot be punched into the file.
    #[error("region {pages:?}: its file is not a regular file")]
    NotAFile {
        /// The region.
        pages: PageRange,
    },
    /// The mapping is neither a shared file nor private anonymous memory, so releasing
    /// it would free nothing or expose the file's contents.
    #[error("region {pages:?}: neither a shared file nor private anonymous memory")]
    NotReleasable {
        /// The region.
        pages: PageRange,
    },
    /// Anonymous memory does not start at a page or ends beyond the address space.
    #[error("region {pages:?}: host address {host_bytes:#x} is not page-aligned, or too large")]
    HostAddress {
        /// The region.
        pages: PageRange,
        /// Address in this process.
        host_bytes: usize,
    },
    /// The host's pool has too few huge pages.
    #[error(
        "{needed} huge pages of {page_mib} MiB are needed, and {free} of {total} are free; \
         `sysctl vm.nr_hugepages={wanted}` adds them, if this is the host's default huge page size"
    )]
    HugePages {
        /// Pages needed.
        needed: u64,
        /// Size of a page in MiB.
        page_mib: u64,
        /// Pages that are neither used nor reserved.
        free: u64,
        /// Pages in the pool.
        total: u64,
        /// Pool size that would suffice.
        wanted: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The host's commit limit is reached.
    #[error(
        "the host cannot commit {bytes} more bytes (vm.overcommit_memory=2; see CommitLimit and \
         Committed_AS in /proc/meminfo)"
    )]
    Commit {
        /// Bytes requested.
        bytes: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// An operation of the host failed.
    #[error("{what}")]
    Host {
        /// The operation.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}
