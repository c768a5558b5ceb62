//! What a processor says of itself.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::error::Error;

/// Bits of leaf 1: the guest runs on a hypervisor, and the local APIC's timer may follow the time
/// stamp counter, which KVM supports without saying so there.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1: several processors share a package.
const HYPER_THREADING: u32 = 1 << 28;

/// Where the number of a processor and of all of them are in leaf 1, register EBX.
const APIC_ID_SHIFT: u32 = 24;
const COUNT_SHIFT: u32 = 16;

/// Leaves with the topology: level 0 counts threads of a core (one), level 1 those of a package.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const THREAD_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 2 << 8;

/// What all processors of a guest have in common.
pub(crate) struct Template {
    leaves: CpuId,
    tsc_deadline: bool,
}

impl Template {
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, Error> {
        let leaves = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("asking for the processor's features"))?;
        Ok(Self { leaves, tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// The leaves of processor `cpu` of `count`. Each is a core of its own in one package.
    pub(crate) fn of_processor(&self, cpu: u8, count: u8) -> CpuId {
        let mut leaves = self.leaves.clone();
        for leaf in leaves.as_mut_slice() {
            match leaf.function {
                1 => {
                    leaf.ecx |= HYPERVISOR;
                    if self.tsc_deadline {
                        leaf.ecx |= TSC_DEADLINE;
                    }
                    leaf.ebx &= 0xffff;
                    leaf.ebx |= u32::from(cpu) << APIC_ID_SHIFT | u32::from(count) << COUNT_SHIFT;
                    leaf.edx &= !HYPER_THREADING;
                    if count > 1 {
                        leaf.edx |= HYPER_THREADING;
                    }
                }
                function if TOPOLOGY.contains(&function) => {
                    let bits = u32::from(count).next_power_of_two().trailing_zeros();
                    (leaf.eax, leaf.ebx, leaf.ecx) = match leaf.index {
                        0 => (0, 1, THREAD_LEVEL),
                        1 => (bits, count.into(), CORE_LEVEL | 1),
                        other => (0, 0, other),
                    };
                    leaf.edx = cpu.into();
                }
                // AMD's number of the processor, and how many there are in the package.
                0x8000_001e => {
                    leaf.eax = cpu.into();
                    leaf.ebx = cpu.into();
                    leaf.ecx = 0;
                }
                0x8000_0008 => {
                    leaf.ecx = u32::from(count) - 1;
                }
                _ => {}
            }
        }
        leaves
    }
}
