//! What a migration needs of a machine: its memory, what was written to it, and its state.

use std::sync::{Arc, MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use page_set::{PageRange, PageSet};
use vm_memory::{Bytes, GuestAddress};

use crate::cpuid::CpuFeatures;
use crate::disks::SYNC_TIME;
use crate::error::Error;
use crate::machine::{Machine, PAUSE_TIME};
use crate::memory::Ram;
use crate::state::{Irqchip, MachineState, Processor, Section, transport_name};

const PAGE_BYTES: u64 = 4096;

/// A guest's memory, to be read and written by many threads, and apart from its machine.
#[derive(Clone)]
pub struct GuestRam(Ram);

impl GuestRam {
    /// Copies `pages` to `out`, which has 4096 bytes for each. A guest that runs may write
    /// meanwhile, so that the copy is torn; it is noted as written then.
    ///
    /// # Errors
    /// The guest does not have these pages, or `out` has another size.
    pub fn read(&self, pages: PageRange, out: &mut [u8]) -> Result<(), Error> {
        check_size(pages, out.len())?;
        let at = GuestAddress(pages.start() * PAGE_BYTES);
        self.0.read_slice(out, at).map_err(Error::memory("reading"))
    }

    /// Copies `bytes` to `pages`, 4096 for each.
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

    /// Regions of the guest's memory in pages, by address. The dirty log numbers them so.
    pub fn regions(&self) -> Vec<PageRange> {
        self.balloon.device().layout().ranges().to_vec()
    }

    /// What the guest was told that its processors can do.
    pub fn cpu_features(&self) -> CpuFeatures {
        let cpuid = self.cpuid();
        cpuid.first().map(|leaves| CpuFeatures::of(leaves.as_slice())).unwrap_or_default()
    }

    /// The balloon, for a control API.
    pub fn balloon(&self) -> Arc<dyn control::BalloonControl> {
        Arc::clone(&self.balloon) as _
    }

    /// Types on the guest's serial line; waits while it has no room.
    ///
    /// # Errors
    /// The line takes no more.
    pub fn type_in(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.bus.ports.type_in(bytes, None)
    }

    /// Has every write to the guest's memory noted from now on, of its processors and of its
    /// devices in this process, and what is released of it. What they wrote before is not told.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), Error> {
        self.memory.discards.switch(true);
        self.vm.log_dirty(true)?;
        self.vm.take_dirty(|_, _| {})
    }

    /// Tells which pages were written since the last call: calls `each` with the number of a
    /// region and a bit for each of its pages, twice for each region. Bits of both count.
    ///
    /// # Errors
    /// KVM refuses; what was written is not known then.
    pub fn take_dirty(&self, each: impl FnMut(usize, &[u64])) -> Result<(), Error> {
        self.vm.take_dirty(each)
    }

    /// Ends the log.
    ///
    /// # Errors
    /// KVM refuses; the guest goes on, slower.
    pub fn stop_dirty_log(&self) -> Result<(), Error> {
        self.memory.discards.switch(false);
        self.vm.log_dirty(false)
    }

    /// Leaves the guest's processors only `100 - percent` per cent of their time; 0 to 99, 0 for
    /// all of it. Their devices have to be [served](Self::serve) meanwhile.
    pub fn set_throttle(&self, percent: u8) {
        self.processors.set_throttle(percent);
        // The loop may wait for longer than the processors may run.
        self.wake_loop();
    }

    /// Pages whose contents do not matter: those in the balloon, of a driver that tells before it
    /// uses one. Of any other driver none.
    pub fn ballooned_pages(&self) -> PageSet {
        let device = self.balloon.device();
        let tells = device.negotiated().contains(balloon_abi::Features::MUST_TELL_HOST);
        if tells && !device.inherits() { device.held().clone() } else { PageSet::new() }
    }

    /// The state of a guest that is [paused](Self::pause): everything but its memory, none of
    /// which is written.
    ///
    /// # Errors
    /// The guest is not paused, has ended, or runs guests of its own; or KVM refuses.
    pub fn save(&self) -> Result<Vec<Section>, Error> {
        let processors = self.save_processors()?;
        let irqchip = Irqchip::save(self.vm.fd())?;
        let balloon = self.balloon.leave();
        let layout = self.balloon.device().layout().clone();
        // Whoever reads it next may do so on another host.
        self.sync_disks(|taken| taken < SYNC_TIME)?;
        let transports = self.bus.slots.iter().map(|slot| slot.transport().state()).collect();
        let ports = self.bus.ports.state();
        Ok(MachineState { processors, irqchip, ports, transports, balloon }.encode(&layout))
    }

    /// Those of a guest that is paused.
    pub(crate) fn save_processors(&self) -> Result<Vec<Processor>, Error> {
        let cpuid = self.cpuid().clone();
        self.processors.each(|number, fd| {
            let leaves = cpuid.get(number).map(|leaves| leaves.as_slice()).unwrap_or_default();
            Processor::save((number, fd), &self.vm, &self.msrs, leaves)
        })
    }

    /// What the processors answer to CPUID; a whole list is put in its place.
    fn cpuid(&self) -> MutexGuard<'_, Vec<CpuId>> {
        self.cpuid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new machine, whose memory is there already, the state of another. It stands still
    /// until it is [resumed](Self::resume).
    ///
    /// # Errors
    /// The state is none of such a machine (the sender's fault), or this host cannot have it. The
    /// machine is of no use then.
    pub fn load(&self, sections: &[Section]) -> Result<(), Error> {
        self.processors.pause(PAUSE_TIME)?;
        let layout = self.balloon.device().layout().clone();
        let (cpus, devices) = (self.processors.len(), self.bus.slots.len());
        let state = MachineState::decode(sections, cpus, devices, &layout)?;
        let wrong = |section: &str, why: String| Error::State { section: section.into(), why };
        self.processors.each(|number, fd| match state.processors.get(number) {
            Some(processor) => processor.load(fd, &self.vm),
            None => Ok(()),
        })?;
        let cpuid = state.processors.iter().map(Processor::cpuid).collect::<Result<_, _>>()?;
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
            // The driver looks whether it may use what it hinted, and what is asked of it.
            balloon.transport().config_changed();
        }
        Ok(())
    }
}
