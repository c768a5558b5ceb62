//! The one place that tells KVM where the guest's memory is, and so the one with `unsafe`.

#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use crate::error::Error;

/// A virtual machine and the memory it was given, which outlives it.
pub(crate) struct Vm {
    // In this order: the machine goes before its memory does.
    fd: VmFd,
    _mappings: Vec<Arc<MmapRegion>>,
}

impl Vm {
    /// Gives the guest `memory`.
    pub(crate) fn new(fd: VmFd, memory: &GuestMemoryMmap) -> Result<Self, Error> {
        let mut mappings = Vec::new();
        for (slot, region) in (0..).zip(memory.iter()) {
            let mapping = region.get_mmap();
            let described = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: mapping.as_ptr() as u64,
            };
            mappings.push(mapping);
            // SAFETY: The kernel reads and writes `memory_size` bytes at `userspace_addr` for the
            // guest, from now on and for as long as a file descriptor of the machine is open.
            // - These bytes are one mapping of vm-memory: `mapping` is of that size, and it stays
            //   mapped while the guest can run: `_mappings` holds it, and whoever runs a processor
            //   holds this `Vm` (`vcpu::Processor` has an `Arc` of it). After the last processor
            //   is gone nobody enters the guest, and the kernel touches the memory no more.
            // - Nothing in this process relies on their contents: vm-memory hands out no
            //   references into a mapping and accesses it by volatile reads and writes only,
            //   because the guest changes it at any time; host-memory empties it under the same
            //   terms.
            // - The slots do not overlap in the guest: `GuestMemoryMmap` holds no overlapping
            //   regions.
            unsafe { fd.set_user_memory_region(described) }
                .map_err(Error::kvm("giving the guest its memory"))?;
        }
        Ok(Self { fd, _mappings: mappings })
    }

    /// The machine, for calls that concern no memory.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }
}
