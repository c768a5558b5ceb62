//! Options of a guest.

use std::path::PathBuf;

use balloon_abi::Features;
use control::api::{PartialHuge, ReleaseMode};

use crate::block::DiskOptions;
use crate::memory::MemoryKind;

/// The options that each host chooses, whether the guest boots, arrives or is restored.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Name of the guest.
    pub name: String,
    /// Path of the control socket.
    pub control: PathBuf,
    /// What backs the memory.
    pub memory: MemoryKind,
    /// Disks in the guest's order, at most [`MAX_DISKS`](crate::MAX_DISKS). A migrated or restored
    /// guest needs the same number of disks, of the same sizes.
    pub disks: Vec<DiskOptions>,
    /// A migrated or restored guest may get other disks of the same sizes.
    pub accept_disks: bool,
    /// When ballooned memory is released to the host.
    pub release: ReleaseMode,
    /// How parts of huge pages are released.
    pub partial_huge: PartialHuge,
}

/// Which guest to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The options that this host chooses.
    pub host: HostOptions,
    /// Bytes of memory: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Number of vCPUs, from 1 to [`MAX_CPUS`](crate::MAX_CPUS).
    pub cpus: u8,
    /// A bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The initrd.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// Balloon features that are not offered.
    pub without: Features,
    /// Enables nested virtualization. While the guest kernel has it enabled, the guest cannot be
    /// migrated or saved.
    pub nested: bool,
}
