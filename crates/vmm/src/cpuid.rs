//! The guest's CPUID leaves and CPU features.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::error::{Error, OPENING_KVM};

/// Bits of leaf 1: hypervisor present, and TSC deadline timer, which KVM supports without setting
/// the bit.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1: several logical processors share a package.
const HYPER_THREADING: u32 = 1 << 28;

/// Nested virtualization: Intel's bit of leaf 1, AMD's bits of leaf 0x8000_0001 (SVM, and SKINIT
/// for a secure launch), and AMD's SVM leaf.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const SKINIT: u32 = 1 << 12;
const SVM_DETAILS: u32 = 0x8000_000a;

/// Shifts of the APIC ID and the number of logical processors in leaf 1, EBX.
const APIC_ID_SHIFT: u32 = 24;
const COUNT_SHIFT: u32 = 16;

/// Topology leaves: level 0 has the threads of a core (one), level 1 those of the package.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const THREAD_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 2 << 8;

/// Registers with feature bits, of which a host may have more than the guest: leaf, sub-leaf,
/// register (EAX to EDX by number), and bits to ignore: state that the guest has enabled (OSXSAVE,
/// OSPKE) and bits that [`Template`] sets.
const FEATURE_WORDS: [(u32, u32, u8, u32); 18] = [
    (1, 0, 2, 1 << 27 | HYPERVISOR),
    (1, 0, 3, HYPER_THREADING),
    (7, 0, 1, 0),
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    (7, 1, 3, 0),
    (7, 2, 3, 0),
    (0xd, 0, 0, 0),
    (0xd, 0, 3, 0),
    (0xd, 1, 0, 0),
    (0x4000_0001, 0, 0, 0),
    (0x8000_0001, 0, 2, 0),
    (0x8000_0001, 0, 3, 0),
    (0x8000_0007, 0, 3, 0),
    (0x8000_0008, 0, 1, 0),
    (0x8000_000a, 0, 3, 0),
    (0x8000_0021, 0, 0, 0),
];

/// CPU features that a guest may depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// The vendor string.
    pub vendor: String,
    /// Feature words: an identifier that is the same on every host, and the bits. Words of 0 are
    /// left out.
    pub words: Vec<(u64, u64)>,
}

impl CpuFeatures {
    /// The features that this host's CPUs and KVM support for a guest.
    ///
    /// # Errors
    /// KVM is not available.
    pub fn of_host() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::kvm(OPENING_KVM))?;
        let vm = kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?;
        let template = Template::of_host(&kvm, &vm)?;
        Ok(Self::of(template.for_vcpu(0, 1).as_slice()))
    }

    /// Extracts the features from CPUID leaves.
    pub(crate) fn of(leaves: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |function, index| {
            leaves.iter().find(|leaf| leaf.function == function && leaf.index == index)
        };
        let word = |&(function, index, register, other): &(u32, u32, u8, u32)| {
            let leaf = leaf(function, index)?;
            let bits = match register {
                0 => leaf.eax,
                1 => leaf.ebx,
                2 => leaf.ecx,
                _ => leaf.edx,
            } & !other;
            let id = u64::from(function) << 32 | u64::from(index) << 8 | u64::from(register);
            (bits != 0).then_some((id, bits.into()))
        };
        let vendor = leaf(0, 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
        let vendor = vendor.map(|bytes| String::from_utf8_lossy(&bytes.concat()).into_owned());
        Self {
            vendor: vendor.unwrap_or_default(),
            words: FEATURE_WORDS.iter().filter_map(word).collect(),
        }
    }
}

/// The CPUID leaves that all vCPUs of a guest share.
pub(crate) struct Template {
    leaves: CpuId,
    tsc_deadline: bool,
}

impl Template {
    /// Creates the template; with `nested`, the guest may use virtualization.
    ///
    /// # Errors
    /// `nested` is set, and this host does not support it.
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd, nested: bool) -> Result<Self, Error> {
        let mut template = Self::of_host(kvm, vm)?;
        if nested && !template.has_virtualization() {
            let what = "--nested needs a host with nested virtualization: load kvm_amd or \
                        kvm_intel with nested=1";
            return Err(Error::Option { what: what.into() });
        }
        if !nested {
            template.hide_virtualization();
        }
        Ok(template)
    }

    /// All features of this host.
    fn of_host(kvm: &Kvm, vm: &VmFd) -> Result<Self, Error> {
        let leaves = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let leaves = leaves.map_err(Error::kvm("reading the supported CPUID leaves"))?;
        Ok(Self { leaves, tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer) })
    }

    fn has_virtualization(&self) -> bool {
        self.leaves.as_slice().iter().any(|leaf| match leaf.function {
            1 => leaf.ecx & VMX != 0,
            0x8000_0001 => leaf.ecx & SVM != 0,
            _ => false,
        })
    }

    /// Hides virtualization: a guest kernel enables it as soon as its KVM module is loaded, even if
    /// it runs no VMs, and the nested state cannot be saved.
    fn hide_virtualization(&mut self) {
        for leaf in self.leaves.as_mut_slice() {
            match leaf.function {
                1 => leaf.ecx &= !VMX,
                0x8000_0001 => leaf.ecx &= !(SVM | SKINIT),
                SVM_DETAILS => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
                _ => {}
            }
        }
    }

    /// The leaves of vCPU `cpu` of `count`. Each vCPU is a core; all share one package.
    pub(crate) fn for_vcpu(&self, cpu: u8, count: u8) -> CpuId {
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
                // AMD's APIC ID and core ID.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_same_for_all_vcpus() {
        let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let leaves = [
            leaf(0, [1, u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"cAMD"), 0x6974_6e65]),
            leaf(1, [7, 7, 1 << 26 | 1 << 27, 1 << 9]),
            leaf(7, [9, 1 << 5, 1 << 4, 0]),
        ];
        let template =
            Template { leaves: CpuId::from_entries(&leaves).unwrap(), tsc_deadline: true };
        let [one, other] = [0, 3].map(|cpu| CpuFeatures::of(template.for_vcpu(cpu, 4).as_slice()));
        assert_eq!(one, other);
        assert_eq!(one.vendor, "AuthenticAMD");
        let words = [
            (1 << 32 | 2, u64::from(1 << 26 | TSC_DEADLINE)),
            (1 << 32 | 3, 1 << 9),
            (7 << 32 | 1, 1 << 5),
        ];
        assert_eq!(one.words, words);
    }

    #[test]
    fn hide_virtualization_clears_only_virtualization_bits() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let leaves = [1, 0x8000_0001, SVM_DETAILS].map(all);
        let mut template =
            Template { leaves: CpuId::from_entries(&leaves).unwrap(), tsc_deadline: true };
        let host = CpuFeatures::of(template.for_vcpu(0, 1).as_slice());
        assert!(template.has_virtualization());
        template.hide_virtualization();
        assert!(!template.has_virtualization());
        let guest = CpuFeatures::of(template.for_vcpu(0, 1).as_slice());
        let bits = |features: &CpuFeatures, id| {
            features.words.iter().find(|word| word.0 == id).map_or(0, |word| word.1)
        };
        for (id, hidden) in
            [(1 << 32 | 2, VMX), (0x8000_0001 << 32 | 2, SVM | SKINIT), (0x8000_000a << 32 | 3, !0)]
        {
            assert_eq!(bits(&host, id) & !bits(&guest, id), u64::from(hidden), "{id:#x}");
        }
        // Nothing else is hidden, and the guest has no feature that the host lacks.
        assert_eq!(guest.words.len(), host.words.len() - 1);
        assert!(guest.words.iter().all(|(id, word)| word & !bits(&host, *id) == 0));
    }
}
