//! The state of one vCPU, as far as KVM exposes it.
//!
//! The order of reading and writing matters to KVM (`Documentation/virt/kvm/api.rst` and the x86
//! code): reading `MP_STATE` first completes pending events; the local APIC needs its base, so it
//! follows the special registers; its deadline needs the TSC; events are set last, because setting
//! registers clears some of them.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::codec::{Malformed, Reader, Writer};
use crate::error::Error;
use crate::kvm::Vm;

/// Maximum MSRs of a state, of which KVM supports some 150; and MSRs per ioctl.
const MAX_MSRS: usize = 1024;
const MSRS_AT_ONCE: usize = 256;

/// The deadline of the local APIC's timer (Intel SDM 3A, 11.5.4.1). It is set after the TSC, to
/// which it is compared.
const TSC_DEADLINE: u32 = 0x6e0;

/// Set while the guest has virtualization enabled: AMD's EFER.SVME, Intel's CR4.VMXE.
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;

const SAVING: &str = "reading a vCPU's state";
const LOADING: &str = "setting a vCPU's state";

/// The state of a paused vCPU.
#[derive(Debug)]
pub(crate) struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// TSC frequency; 0 if the host does not report it.
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state from KVM, with those of `msrs` that the vCPU has. `cpuid` is what was set:
    /// after a state was loaded, KVM may return other leaves.
    pub(crate) fn save(
        (number, vcpu): (usize, &VcpuFd),
        vm: &Vm,
        msrs: &[u32],
        cpuid: &[kvm_cpuid_entry2],
    ) -> Result<Self, Error> {
        vm.check_xsave()?;
        let failed = Error::kvm(SAVING);
        let mp_state = vcpu.get_mp_state().map_err(&failed)?;
        let regs = vcpu.get_regs().map_err(&failed)?;
        let sregs = vcpu.get_sregs().map_err(&failed)?;
        if let Some((register, value)) = virtualizes(&sregs) {
            return Err(Error::Nested { cpu: number, register, value });
        }
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave: Box::new(vcpu.get_xsave().map_err(&failed)?),
            xcrs: vcpu.get_xcrs().map_err(&failed)?,
            debug_regs: vcpu.get_debug_regs().map_err(&failed)?,
            lapic: Box::new(vcpu.get_lapic().map_err(&failed)?),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            msrs: read_msrs(vcpu, msrs)?,
            cpuid: cpuid.to_vec(),
            events: vcpu.get_vcpu_events().map_err(&failed)?,
        })
    }

    /// Loads the state into a vCPU that has not run yet.
    pub(crate) fn load(&self, vcpu: &VcpuFd, vm: &Vm) -> Result<(), Error> {
        let failed = Error::kvm(LOADING);
        vcpu.set_cpuid2(&self.cpuid()?).map_err(&failed)?;
        self.set_tsc_khz(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(&failed)?;
        vcpu.set_regs(&self.regs).map_err(&failed)?;
        vcpu.set_sregs(&self.sregs).map_err(&failed)?;
        vm.set_xsave(vcpu, &self.xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(&failed)?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(&failed)?;
        vcpu.set_lapic(&self.lapic).map_err(&failed)?;
        let (last, first): (Vec<_>, Vec<_>) =
            self.msrs.iter().copied().partition(|entry| entry.index == TSC_DEADLINE);
        write_msrs(vcpu, &first)?;
        write_msrs(vcpu, &last)?;
        vcpu.set_vcpu_events(&self.events).map_err(&failed)
    }

    /// Checks whether this host supports the vCPU, as far as possible before the guest's memory has
    /// arrived: sets the parts that a host may refuse. `vcpu` is [loaded](Self::load) later.
    pub(crate) fn check_supported(&self, vcpu: &VcpuFd, vm: &Vm) -> Result<(), Error> {
        let failed = Error::kvm(LOADING);
        vcpu.set_cpuid2(&self.cpuid()?).map_err(&failed)?;
        self.set_tsc_khz(vcpu)?;
        vm.set_xsave(vcpu, &self.xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(&failed)?;
        let msrs = self.msrs.iter().copied().filter(|entry| is_checked(entry.index));
        write_msrs(vcpu, &msrs.collect::<Vec<_>>())
    }

    fn set_tsc_khz(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let own_khz = vcpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz != 0 && self.tsc_khz != own_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(Error::kvm("scaling the time stamp counter"))?;
        }
        Ok(())
    }

    /// An empty state, for tests and fuzzing.
    #[cfg(any(test, feature = "raw"))]
    pub(crate) fn blank() -> Self {
        Self {
            cpuid: Vec::new(),
            tsc_khz: 0,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Box::default(),
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            lapic: Box::new(kvm_lapic_state { regs: [0; 1024] }),
            msrs: Vec::new(),
            events: kvm_vcpu_events::default(),
        }
    }

    /// The CPUID leaves.
    pub(crate) fn cpuid(&self) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.cpuid).map_err(no_memory)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.list(&self.cpuid).u32(self.tsc_khz).plain(&self.mp_state).plain(&self.regs);
        writer.plain(&self.sregs).plain(&*self.xsave).plain(&self.xcrs).plain(&self.debug_regs);
        writer.plain(&*self.lapic).list(&self.msrs).plain(&self.events);
        writer.finish()
    }

    /// Decodes the state. KVM itself refuses other invalid values.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let state = Self {
            cpuid: reader.list("CPUID leaves", KVM_MAX_CPUID_ENTRIES)?,
            tsc_khz: reader.u32()?,
            mp_state: reader.plain()?,
            regs: reader.plain()?,
            sregs: reader.plain()?,
            xsave: Box::new(reader.plain()?),
            xcrs: reader.plain()?,
            debug_regs: reader.plain()?,
            lapic: Box::new(reader.plain()?),
            msrs: reader.list("model-specific registers", MAX_MSRS)?,
            events: reader.plain()?,
        };
        reader.finish()?;
        match virtualizes(&state.sregs) {
            Some((what, value)) => Err(Malformed::Value { what, value }),
            None => Ok(state),
        }
    }
}

/// The register that enables virtualization, if any does, and its value.
const fn virtualizes(sregs: &kvm_sregs) -> Option<(&'static str, u64)> {
    if sregs.efer & EFER_SVME != 0 {
        Some(("EFER", sregs.efer))
    } else if sregs.cr4 & CR4_VMXE != 0 {
        Some(("CR4", sregs.cr4))
    } else {
        None
    }
}

/// Whether [`check_supported`](VcpuState::check_supported) writes this MSR. It skips the time MSRs,
/// because KVM may take a second write for a TSC synchronization of another vCPU, and KVM's own
/// MSRs, which point to memory that has not arrived yet. The CPU features cover both.
const fn is_checked(msr: u32) -> bool {
    const TIME_STAMP_COUNTER: u32 = 0x10;
    const TSC_ADJUST: u32 = 0x3b;
    const OLD_KVM_CLOCKS: [u32; 2] = [0x11, 0x12];
    const KVM_FIRST: u32 = 0x4b56_4d00;
    const KVM_LAST: u32 = 0x4b56_4dff;
    let [old_wall, old_system] = OLD_KVM_CLOCKS;
    !(msr == TIME_STAMP_COUNTER
        || msr == TSC_ADJUST
        || msr == TSC_DEADLINE
        || msr == old_wall
        || msr == old_system
        || (KVM_FIRST <= msr && msr <= KVM_LAST))
}

/// Reads the MSRs that the vCPU has. KVM stops at the first one that it does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries = chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries.collect::<Vec<_>>()).map_err(no_memory)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(Error::kvm(SAVING))?.min(chunk.len());
        found.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
        // Skip the one that stopped it.
        let done = if count < chunk.len() { count + 1 } else { count };
        rest = &rest[done..];
    }
    Ok(found)
}

/// Writes MSRs. An MSR that KVM refuses is accepted if it already has the value, or if the value is
/// 0 and the MSR does not exist.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let msrs = Msrs::from_entries(chunk).map_err(no_memory)?;
        let count = vcpu.set_msrs(&msrs).map_err(Error::kvm(LOADING))?.min(chunk.len());
        let mut done = count;
        if let Some(refused) = chunk.get(count) {
            let own = read_msrs(vcpu, &[refused.index])?;
            let has = own.first().map_or(0, |entry| entry.data);
            if has != refused.data {
                let kvm_msr_entry { index, data, .. } = *refused;
                let what = format!("MSR {index:#x} with {data:#x}: this host has {has:#x}");
                return Err(Error::Unsupported { what });
            }
            done += 1;
        }
        rest = &rest[done..];
    }
    Ok(())
}

fn no_memory(error: vmm_sys_util::fam::Error) -> Error {
    Error::Host { what: "memory", source: std::io::Error::other(format!("{error:?}")) }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn some() -> VcpuState {
        let entry =
            |index| kvm_msr_entry { index, data: u64::from(index) << 32, ..Default::default() };
        let mut vcpu = VcpuState {
            cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: 7, ..Default::default() }; 3],
            tsc_khz: 2_000_000,
            mp_state: kvm_mp_state { mp_state: 3 },
            regs: kvm_regs { rip: 0x1234, ..Default::default() },
            sregs: kvm_sregs { cr3: 0x5000, ..Default::default() },
            xsave: Box::default(),
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            lapic: Box::new(kvm_lapic_state { regs: [3; 1024] }),
            msrs: [TSC_DEADLINE, 0x10].map(entry).to_vec(),
            events: kvm_vcpu_events::default(),
        };
        vcpu.xsave.region[700] = 9;
        vcpu
    }

    #[test]
    fn a_vcpu_state_round_trips() {
        let bytes = some().encode();
        let decoded = VcpuState::decode(&bytes).unwrap();
        assert_eq!(decoded.encode(), bytes);
        assert_eq!((decoded.regs.rip, decoded.msrs.len(), decoded.cpuid.len()), (0x1234, 2, 3));
        assert_eq!(decoded.xsave.region[700], 9);
    }

    #[test]
    fn a_vcpu_with_virtualization_enabled_is_refused() {
        for (efer, cr4) in [(EFER_SVME, 0), (0, CR4_VMXE)] {
            let mut vcpu = some();
            (vcpu.sregs.efer, vcpu.sregs.cr4) = (efer, cr4);
            assert!(VcpuState::decode(&vcpu.encode()).is_err());
        }
    }

    proptest! {
        #[test]
        fn truncated_or_corrupted_bytes_do_not_panic(
            cut in 0usize..7000, changes in prop::collection::vec((0usize..7000, any::<u8>()), 0..4),
        ) {
            let mut bytes = some().encode();
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let _ = VcpuState::decode(&bytes);
            prop_assert!(VcpuState::decode(&bytes[..cut % bytes.len()]).is_err());
        }
    }
}
