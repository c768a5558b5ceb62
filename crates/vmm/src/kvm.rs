//! Registers the guest's memory with KVM. The only module with `unsafe`.

#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::error::Error;
use crate::memory::Ram;

/// A KVM virtual machine and its memory, which outlives it.
pub(crate) struct Vm {
    // In this order: the machine is dropped before its memory.
    fd: VmFd,
    slots: Vec<Slot>,
}

/// A KVM memory slot.
struct Slot {
    described: kvm_userspace_memory_region,
    mapping: Arc<MmapRegion<AtomicBitmap>>,
}

impl Vm {
    /// Registers `memory` with the machine.
    pub(crate) fn new(fd: VmFd, memory: &Ram) -> Result<Self, Error> {
        let mut slots = Vec::new();
        for (slot, region) in (0..).zip(memory.iter()) {
            let mapping = region.get_mmap();
            let described = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: mapping.as_ptr() as u64,
            };
            slots.push(Slot { described, mapping });
        }
        let vm = Self { fd, slots };
        vm.describe_memory(0)?;
        Ok(vm)
    }

    /// Registers all slots with `flags`.
    fn describe_memory(&self, flags: u32) -> Result<(), Error> {
        for slot in &self.slots {
            let described = kvm_userspace_memory_region { flags, ..slot.described };
            // SAFETY: The kernel reads and writes `memory_size` bytes at `userspace_addr` for the
            // guest, from now on and for as long as a file descriptor of the machine is open.
            // - These bytes are one mapping of vm-memory: `mapping` is of that size, and it stays
            //   mapped while the guest can run: `slots` holds it, and each vCPU holds this `Vm`
            //   (`vcpu::Vcpu` has an `Arc` of it). After the last vCPU is dropped no thread enters
            //   the guest, and the kernel no longer accesses the memory.
            // - Nothing in this process relies on their contents: vm-memory hands out no
            //   references into a mapping and accesses it by volatile reads and writes only,
            //   because the guest changes it at any time; host-memory empties it under the same
            //   terms.
            // - The slots do not overlap in the guest: `GuestMemoryMmap` holds no overlapping
            //   regions. A second call for a slot differs from the first in `flags` alone.
            unsafe { self.fd.set_user_memory_region(described) }
                .map_err(Error::kvm("registering the guest's memory"))?;
        }
        Ok(())
    }

    /// Switches KVM's dirty log on or off.
    pub(crate) fn log_dirty(&self, on: bool) -> Result<(), Error> {
        self.describe_memory(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Calls `each` with the number of each region and a bitmap of the pages written since the last
    /// call: first those by vCPUs, from KVM, then those by this process.
    pub(crate) fn take_dirty(&self, mut each: impl FnMut(usize, &[u64])) -> Result<(), Error> {
        for (number, slot) in self.slots.iter().enumerate() {
            let (size, index) = (slot.mapping.size(), slot.described.slot);
            let written = self.fd.get_dirty_log(index, size);
            each(number, &written.map_err(Error::kvm("reading the dirty log"))?);
            each(number, &slot.mapping.bitmap().get_and_reset());
        }
        Ok(())
    }

    /// Checks that a vCPU's extended state fits into `kvm_xsave`.
    pub(crate) fn check_xsave(&self) -> Result<(), Error> {
        let bytes = self.fd.check_extension_int(Cap::Xsave2);
        let size = size_of::<kvm_xsave>();
        if usize::try_from(bytes).is_ok_and(|bytes| bytes > size) {
            let what = format!("vCPUs with {bytes} bytes of extended state; {size} are supported");
            return Err(Error::Unsupported { what });
        }
        Ok(())
    }

    /// Sets the extended state of a vCPU.
    pub(crate) fn set_xsave(&self, vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
        self.check_xsave()?;
        // SAFETY: The kernel reads at most as many bytes as the guest's extended state has, given
        // the features that this process has requested permission for (arch_prctl,
        // ARCH_REQ_XCOMP_GUEST_PERM). It requests none, and `check_xsave` has just checked KVM's
        // size: `xsave` has no fewer bytes. A kernel without that capability (it returns 0) reads
        // exactly the size of `kvm_xsave`.
        unsafe { vcpu.set_xsave(xsave) }.map_err(Error::kvm("setting a vCPU's extended state"))
    }

    /// The machine, for calls that do not change memory slots.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }
}
