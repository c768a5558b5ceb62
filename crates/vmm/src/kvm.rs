//! The one place that tells KVM where the guest's memory is, and so the one with `unsafe`.

#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::error::Error;
use crate::memory::Ram;

/// A virtual machine and the memory it was given, which outlives it.
pub(crate) struct Vm {
    // In this order: the machine goes before its memory does.
    fd: VmFd,
    slots: Vec<Slot>,
}

/// A region of the guest's memory as KVM knows it.
struct Slot {
    described: kvm_userspace_memory_region,
    mapping: Arc<MmapRegion<AtomicBitmap>>,
}

impl Vm {
    /// Gives the guest `memory`.
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

    /// Tells KVM where each region is, and `flags` of all of them.
    fn describe_memory(&self, flags: u32) -> Result<(), Error> {
        for slot in &self.slots {
            let described = kvm_userspace_memory_region { flags, ..slot.described };
            // SAFETY: The kernel reads and writes `memory_size` bytes at `userspace_addr` for the
            // guest, from now on and for as long as a file descriptor of the machine is open.
            // - These bytes are one mapping of vm-memory: `mapping` is of that size, and it stays
            //   mapped while the guest can run: `slots` holds it, and whoever runs a processor
            //   holds this `Vm` (`vcpu::Processor` has an `Arc` of it). After the last processor
            //   is gone nobody enters the guest, and the kernel touches the memory no more.
            // - Nothing in this process relies on their contents: vm-memory hands out no
            //   references into a mapping and accesses it by volatile reads and writes only,
            //   because the guest changes it at any time; host-memory empties it under the same
            //   terms.
            // - The slots do not overlap in the guest: `GuestMemoryMmap` holds no overlapping
            //   regions. A second call for a slot differs from the first in `flags` alone.
            unsafe { self.fd.set_user_memory_region(described) }
                .map_err(Error::kvm("giving the guest its memory"))?;
        }
        Ok(())
    }

    /// Has KVM note which pages the guest's processors write, or do so no more.
    pub(crate) fn log_dirty(&self, on: bool) -> Result<(), Error> {
        self.describe_memory(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Tells of each region, by its number, what was written since the last call: by the guest's
    /// processors as KVM noted it, and by this process. A bit for each page.
    pub(crate) fn take_dirty(&self, mut each: impl FnMut(usize, &[u64])) -> Result<(), Error> {
        for (number, slot) in self.slots.iter().enumerate() {
            let (size, index) = (slot.mapping.size(), slot.described.slot);
            let written = self.fd.get_dirty_log(index, size);
            each(number, &written.map_err(Error::kvm("reading the dirty log"))?);
            each(number, &slot.mapping.bitmap().get_and_reset());
        }
        Ok(())
    }

    /// Whether a processor's extended state fits into what is read and set.
    pub(crate) fn check_xsave(&self) -> Result<(), Error> {
        let bytes = self.fd.check_extension_int(Cap::Xsave2);
        let room = size_of::<kvm_xsave>();
        if usize::try_from(bytes).is_ok_and(|bytes| bytes > room) {
            let what = format!("processors with {bytes} bytes of extended state; {room} are known");
            return Err(Error::Unsupported { what });
        }
        Ok(())
    }

    /// Takes the extended state of a processor.
    pub(crate) fn set_xsave(&self, vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
        self.check_xsave()?;
        // SAFETY: The kernel reads as many bytes as the guest's extended state has at most, by the
        // features that this process asked leave for (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM). It
        // never asks, and KVM was just asked how many bytes that makes: `xsave` has no fewer. A
        // kernel that does not know the question (it answers 0) reads as many as `xsave` has.
        unsafe { vcpu.set_xsave(xsave) }.map_err(Error::kvm("setting a processor's registers"))
    }

    /// The machine, for calls that concern no memory.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }
}
