//! What an operator decides of a guest.

use std::path::PathBuf;

use balloon_abi::Features;
use control::api::{PartialHuge, ReleaseMode};

use crate::block::DiskOptions;
use crate::memory::MemoryKind;

/// What each host decides of a guest, wherever the guest comes from.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Name of the guest.
    pub name: String,
    /// Where the control API listens.
    pub control: PathBuf,
    /// What backs the memory.
    pub memory: MemoryKind,
    /// Disks, in the order in which the guest finds them; at most
    /// [`MAX_DISKS`](crate::MAX_DISKS). A guest that ran elsewhere has as many and of the same
    /// sizes as it had.
    pub disks: Vec<DiskOptions>,
    /// A guest that ran elsewhere may have other disks than it had, as long as their sizes are the
    /// same.
    pub accept_disks: bool,
    /// When memory of the balloon is released.
    pub release: ReleaseMode,
    /// What becomes of pieces of huge pages.
    pub partial_huge: PartialHuge,
}

/// Which guest to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// What is this host's to choose.
    pub host: HostOptions,
    /// Bytes of memory: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Processors, from 1 to [`MAX_CPUS`](crate::MAX_CPUS).
    pub cpus: u8,
    /// A bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// Features that the balloon does not offer.
    pub without: Features,
    /// The guest may run guests of its own. While its kernel is ready to, it can be neither moved
    /// nor written to a file.
    pub nested: bool,
}
