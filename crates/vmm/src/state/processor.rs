//! The state of one processor: all that KVM tells of it.
//!
//! The orders of reading and of writing matter, and are KVM's (`Documentation/virt/kvm/api.rst`
//! and what its x86 half does with each): reading `MP_STATE` first settles what is under way, a
//! local APIC needs its base and so the special registers, its deadline needs the time stamp
//! counter, and events come last, since registers take some back.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::codec::{Malformed, Reader, Writer};
use crate::error::Error;
use crate::kvm::Vm;

/// Model-specific registers that a state may have: KVM knows some 150, and takes so many in one
/// call.
const MAX_MSRS: usize = 1024;
const MSRS_AT_ONCE: usize = 256;

/// The deadline of the local APIC's timer (Intel SDM 3A, 11.5.4.1), which is set once the counter
/// that it is compared with is.
const TSC_DEADLINE: u32 = 0x6e0;

/// Set while the processor is ready to run guests: AMD's EFER.SVME, Intel's CR4.VMXE.
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;

const SAVING: &str = "reading a processor's state";
const LOADING: &str = "setting a processor's state";

/// A processor as it was when it stood still.
#[derive(Debug)]
pub(crate) struct Processor {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Of its time stamp counter; 0 where the host does not know.
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

impl Processor {
    /// Reads it from KVM, with those of `msrs` that it has. What it answers to CPUID is what it was
    /// given: what KVM says of that may be something else after a state was loaded.
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

    /// Gives it to a processor that has not run yet.
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

    /// Whether this host can have such a processor, as far as it can be found out before the guest's
    /// memory is there: gives `vcpu`, which is to be [loaded](Self::load) later, what a host may
    /// refuse.
    pub(crate) fn try_out(&self, vcpu: &VcpuFd, vm: &Vm) -> Result<(), Error> {
        let failed = Error::kvm(LOADING);
        vcpu.set_cpuid2(&self.cpuid()?).map_err(&failed)?;
        self.set_tsc_khz(vcpu)?;
        vm.set_xsave(vcpu, &self.xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(&failed)?;
        let msrs = self.msrs.iter().copied().filter(|entry| is_tried(entry.index));
        write_msrs(vcpu, &msrs.collect::<Vec<_>>())
    }

    fn set_tsc_khz(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let own_khz = vcpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz != 0 && self.tsc_khz != own_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(Error::kvm("scaling the time stamp counter"))?;
        }
        Ok(())
    }

    /// One of which nothing is known.
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

    /// What it answers to CPUID.
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

    /// What KVM would refuse by itself is left to it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let state = Self {
            cpuid: reader.list("leaves of CPUID", KVM_MAX_CPUID_ENTRIES)?,
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

/// Where virtualization is switched on, if it is.
const fn virtualizes(sregs: &kvm_sregs) -> Option<(&'static str, u64)> {
    if sregs.efer & EFER_SVME != 0 {
        Some(("EFER", sregs.efer))
    } else if sregs.cr4 & CR4_VMXE != 0 {
        Some(("CR4", sregs.cr4))
    } else {
        None
    }
}

/// Registers that a [trial](Processor::try_out) leaves alone: those of time, whose second write KVM
/// may take for one on another processor, and KVM's own, which point to memory that is not there
/// yet. Whether a host has them is said by the features.
const fn is_tried(msr: u32) -> bool {
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

/// KVM stops at the first register that this processor does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries = asked.iter().map(|&index| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries.collect::<Vec<_>>()).map_err(no_memory)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(Error::kvm(SAVING))?.min(asked.len());
        found.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
        // The one that stopped it is left out.
        let done = if count < asked.len() { count + 1 } else { count };
        rest = &rest[done..];
    }
    Ok(found)
}

/// A register that cannot be written is no loss where it reads as it should already, or where its
/// value is 0, which one that does not exist is as good as.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let msrs = Msrs::from_entries(asked).map_err(no_memory)?;
        let count = vcpu.set_msrs(&msrs).map_err(Error::kvm(LOADING))?.min(asked.len());
        let mut done = count;
        if let Some(refused) = asked.get(count) {
            let own = read_msrs(vcpu, &[refused.index])?;
            let has = own.first().map_or(0, |entry| entry.data);
            if has != refused.data {
                let kvm_msr_entry { index, data, .. } = *refused;
                let what = format!("register {index:#x} with {data:#x}: here it has {has:#x}");
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

    pub(crate) fn some() -> Processor {
        let entry =
            |index| kvm_msr_entry { index, data: u64::from(index) << 32, ..Default::default() };
        let mut processor = Processor {
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
        processor.xsave.region[700] = 9;
        processor
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let bytes = some().encode();
        let decoded = Processor::decode(&bytes).unwrap();
        assert_eq!(decoded.encode(), bytes);
        assert_eq!((decoded.regs.rip, decoded.msrs.len(), decoded.cpuid.len()), (0x1234, 2, 3));
        assert_eq!(decoded.xsave.region[700], 9);
    }

    #[test]
    fn a_processor_that_runs_guests_is_refused() {
        for (efer, cr4) in [(EFER_SVME, 0), (0, CR4_VMXE)] {
            let mut processor = some();
            (processor.sregs.efer, processor.sregs.cr4) = (efer, cr4);
            assert!(Processor::decode(&processor.encode()).is_err());
        }
    }

    proptest! {
        #[test]
        fn bytes_that_are_cut_or_changed_do_no_harm(
            cut in 0usize..7000, changes in prop::collection::vec((0usize..7000, any::<u8>()), 0..4),
        ) {
            let mut bytes = some().encode();
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let _ = Processor::decode(&bytes);
            prop_assert!(Processor::decode(&bytes[..cut % bytes.len()]).is_err());
        }
    }
}
