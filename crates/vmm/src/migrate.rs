//! The machine's memory, dirty log and state, for a migration.

use std::sync::{Arc, MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use page_set::{PAGE_BYTES, PageRange, PageSet};
use vm_memory::{Bytes, GuestAddress};

use crate::cpuid::CpuFeatures;
use crate::disks::PAUSED_SYNC_TIMEOUT;
use crate::error::Error;
use crate::machine::{Machine, PAUSE_TIMEOUT};
use crate::memory::Ram;
use crate::state::{Irqchip, MachineState, Section, VcpuState, transport_name};

/// A guest's memory, detached from its machine. Several threads may read and write it.
#[derive(Clone)]
pub struct GuestRam(Ram);

impl GuestRam {
    /// Copies `pages` to `out`, 4096 bytes each. A running guest may write meanwhile: the copy is
    /// torn then, and the dirty log has the page.
    ///
    /// # Errors
    /// The guest does not have these pages, or `out` has another size.
    pub fn read(&self, pages: PageRange, out: &mut [u8]) -> Result<(), Error> {
        check_size(pages, out.len())?;
        let at = GuestAddress(pages.start() * PAGE_BYTES);
        self.0.read_slice(out, at).map_err(Error::memory("reading"))
    }

    /// Copies `bytes` to `pages`, 4096 bytes each.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, pages: PageRange, bytes: &[u8]) -> Result<(), Error> {
        check_size(pages, bytes.len())?;
        let at = GuestAddress(pages.start() * PAGE_BYTES);
        self.0.write_slice(bytes, at).map_err(Error::memory("writing"))
    }
}

fn check_size(pages: PageRange, bytes: usize) -> Result<(), Error> {
    if pages.pages().checked_mul(PAGE_BYTES) == Some(bytes as u64) {
        return Ok(());
    }
    let what = format!("{} pages in {bytes} bytes", pages.pages());
    Err(Error::Unsupported { what })
}

impl Machine {
    /// The guest's memory.
    pub fn ram(&self) -> GuestRam {
        GuestRam(self.memory.guest.clone())
    }

    /// Regions of the guest's memory in pages, by address. The dirty log uses the same numbering.
    pub fn regions(&self) -> Vec<PageRange> {
        self.balloon.device().layout().ranges().to_vec()
    }

    /// The CPU features exposed to the guest.
    pub fn cpu_features(&self) -> CpuFeatures {
        let cpuid = self.cpuid();
        cpuid.first().map(|leaves| CpuFeatures::of(leaves.as_slice())).unwrap_or_default()
    }

    /// The balloon, for a control API.
    pub fn balloon(&self) -> Arc<dyn control::BalloonControl> {
        Arc::clone(&self.balloon) as _
    }

    /// Types on the guest's serial port; waits while its buffer is full.
    ///
    /// # Errors
    /// The port takes no more input.
    pub fn type_in(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.bus.ports.type_in(bytes, None)
    }

    /// Starts the dirty log: from now on it records all writes to the guest's memory by vCPUs and
    /// by devices in this process, and all discards. Earlier writes are not reported.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), Error> {
        self.memory.discards.switch(true);
        self.vm.log_dirty(true)?;
        self.vm.take_dirty(|_, _| {})
    }

    /// Reports the pages written since the last call: calls `each` twice for each region, with the
    /// region's number and one bit per page. Both bitmaps count.
    ///
    /// # Errors
    /// KVM refuses; the written pages are unknown then.
    pub fn take_dirty(&self, each: impl FnMut(usize, &[u64])) -> Result<(), Error> {
        self.vm.take_dirty(each)
    }

    /// Stops the dirty log.
    ///
    /// # Errors
    /// KVM refuses; the guest continues, slower.
    pub fn stop_dirty_log(&self) -> Result<(), Error> {
        self.memory.discards.switch(false);
        self.vm.log_dirty(false)
    }

    /// Throttles the vCPUs by `percent` of their time, 0 to 99. Needs the device loop
    /// ([`serve`](Self::serve)) to run.
    pub fn set_throttle(&self, percent: u8) {
        self.vcpus.set_throttle(percent);
        // The loop's current wait may be longer than the vCPUs' run time.
        self.wake_loop();
    }

    /// Balloon pages, whose contents need not be sent. Empty unless the driver negotiated
    /// `MUST_TELL_HOST`, so that it deflates a page before it uses it.
    pub fn ballooned_pages(&self) -> PageSet {
        let device = self.balloon.device();
        let must_tell = device.negotiated().contains(balloon_abi::Features::MUST_TELL_HOST);
        if must_tell && !device.inherits() { device.held().clone() } else { PageSet::new() }
    }

    /// Saves the state of a [paused](Self::pause) guest: everything except its memory. Writes none
    /// of its memory.
    ///
    /// # Errors
    /// The guest is not paused, has ended, or has nested virtualization enabled; or KVM refuses.
    pub fn save(&self) -> Result<Vec<Section>, Error> {
        let vcpus = self.save_vcpus()?;
        let irqchip = Irqchip::save(self.vm.fd())?;
        let balloon = self.balloon.leave();
        let layout = self.balloon.device().layout().clone();
        // Another host may read the disks next.
        self.sync_disks(|taken| taken < PAUSED_SYNC_TIMEOUT)?;
        let transports = self.bus.slots.iter().map(|slot| slot.transport().state()).collect();
        let ports = self.bus.ports.state();
        Ok(MachineState { vcpus, irqchip, ports, transports, balloon }.encode(&layout))
    }

    /// The vCPU states of a paused guest.
    pub(crate) fn save_vcpus(&self) -> Result<Vec<VcpuState>, Error> {
        let cpuid = self.cpuid().clone();
        self.vcpus.each(|number, fd| {
            let leaves = cpuid.get(number).map(|leaves| leaves.as_slice()).unwrap_or_default();
            VcpuState::save((number, fd), &self.vm, &self.msrs, leaves)
        })
    }

    /// The vCPUs' CPUID leaves. Ignores poisoning: the list is only replaced as a whole.
    fn cpuid(&self) -> MutexGuard<'_, Vec<CpuId>> {
        self.cpuid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads a saved state into a new machine that already has its memory. The machine stays paused
    /// until it is [resumed](Self::resume).
    ///
    /// # Errors
    /// The state does not fit the machine (the sender's fault), or this host cannot run it. The
    /// machine is unusable then.
    pub fn load(&self, sections: &[Section]) -> Result<(), Error> {
        self.vcpus.pause(PAUSE_TIMEOUT)?;
        let layout = self.balloon.device().layout().clone();
        let (cpus, devices) = (self.vcpus.len(), self.bus.slots.len());
        let state = MachineState::decode(sections, cpus, devices, &layout)?;
        let wrong = |section: &str, why: String| Error::State { section: section.into(), why };
        self.vcpus.each(|number, fd| match state.vcpus.get(number) {
            Some(vcpu) => vcpu.load(fd, &self.vm),
            None => Ok(()),
        })?;
        let cpuid = state.vcpus.iter().map(VcpuState::cpuid).collect::<Result<_, _>>()?;
        *self.cpuid() = cpuid;
        state.irqchip.load(self.vm.fd())?;
        self.bus.ports.restore(&state.ports).map_err(|error| wrong("ports", error.to_string()))?;
        let restored = self.balloon.restore(state.balloon);
        restored.map_err(|error| wrong("balloon", error.to_string()))?;
        for (number, (slot, transport)) in self.bus.slots.iter().zip(&state.transports).enumerate()
        {
            let restored = slot.transport().restore(transport);
            restored.map_err(|error| wrong(&transport_name(number), error.to_string()))?;
        }
        if let Some(balloon) = self.bus.slots.first() {
            // The driver reads whether it may use the pages that it hinted, and which request is
            // pending.
            balloon.transport().config_changed();
        }
        Ok(())
    }
}
