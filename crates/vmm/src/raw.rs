//! Decodes a peer's description and state without KVM, for tests and fuzz targets that act as a
//! hostile peer.

mod disk;

use std::sync::Arc;

use balloon_abi::Features;
use balloon_host::{HostReclaim, Shared};
use control::api::{PartialHuge, ReleaseMode};
use migration::layout::GuestLayout;
use migration::traits::Description;
use page_set::{PAGE_BYTES, PageRange};

use crate::balloon::VirtioBalloon;
use crate::block::{DiskIdentity, DiskLimits, DiskShape, GuestDisk};
use crate::description::MachineShape;
use crate::error::Error;
use crate::layout;
use crate::memory::{MachineMemory, MemoryKind};
use crate::mmio::{Interrupts, Transport};
use crate::ports::Ports;
use crate::preflight::Sample;
use crate::state::{Irqchip, MachineState, Section, VcpuState};

pub use disk::Disk;

/// A valid description of a machine with one disk.
///
/// # Errors
/// The memory size is invalid.
pub fn description(cpus: u8, memory_bytes: u64) -> Result<Description, Error> {
    let shape = DiskShape { sectors: 8, read_only: true };
    let (limits, identity) = (DiskLimits::of_file_system(PAGE_BYTES), DiskIdentity::default());
    let disks = vec![GuestDisk { shape, limits, identity }];
    let sample = Sample::blank(1 + disks.len());
    let shape = MachineShape { cpus, memory_bytes, without: Features::NONE, disks, sample };
    let ranges = layout::ranges(memory_bytes)?;
    let pages =
        |(start, bytes): &(u64, u64)| PageRange::new(start / PAGE_BYTES, bytes / PAGE_BYTES);
    let regions = ranges.iter().map(pages).collect::<Result<_, _>>();
    let layout = GuestLayout::new(regions.map_err(Error::memory("describing"))?);
    Ok(Description {
        layout: layout.map_err(Error::memory("describing"))?,
        cpu: migration::cpu::CpuFeatures::default(),
        machine: "vm1".into(),
        config: shape.encode(),
    })
}

/// Decodes a peer's description; returns the number of vCPUs and the bytes of memory.
///
/// # Errors
/// The description is invalid or not supported; the sender's fault.
pub fn take_description(description: &Description, max_cpus: u8) -> Result<(u8, u64), Error> {
    let shape = MachineShape::of(description, max_cpus)?;
    Ok((shape.cpus, shape.memory_bytes))
}

/// The parts of a machine that need no KVM.
pub struct Devices {
    cpus: usize,
    balloon: Arc<Shared>,
    ports: Ports,
    transport: Transport<NoSignals>,
}

/// Ignores interrupts and notifications.
struct NoSignals;

impl Interrupts for NoSignals {
    fn raise(&self) {}
    fn notify_device(&self, _: usize) {}
}

impl Devices {
    /// Creates the devices of a new machine.
    ///
    /// # Errors
    /// The memory size is invalid, or the host does not have the memory.
    pub fn new(cpus: u8, memory_bytes: u64) -> Result<Self, Error> {
        let memory = MachineMemory::new(memory_bytes, MemoryKind { shared: false, huge: false })?;
        let mut reclaim = HostReclaim::new(ReleaseMode::Immediate, PartialHuge::Split)?;
        reclaim.set_memory(memory.map.clone());
        let balloon = Arc::new(Shared::new("vm1".into(), reclaim)?);
        let layout = balloon_device::MemoryLayout::new(memory.ranges.iter().copied());
        balloon.device().set_layout(layout.map_err(Error::memory("describing"))?);
        let device = Box::new(VirtioBalloon::new(Arc::clone(&balloon)));
        let transport = Transport::new(device, NoSignals, memory.guest);
        let transport = transport.map_err(Error::memory("making queues"))?;
        let signal = vmm_sys_util::eventfd::EventFd::new(0).map_err(Error::host("eventfd"))?;
        let ports = Ports::new(signal, Box::new(std::io::sink())).map_err(Error::host("dup"))?;
        Ok(Self { cpus: cpus.into(), balloon, ports, transport })
    }

    /// The state of a machine with these devices, and with empty vCPUs and irqchip.
    pub fn state(&self) -> Vec<Section> {
        let vcpus = (0..self.cpus).map(|_| VcpuState::blank()).collect();
        self.encode(vcpus, Irqchip::blank())
    }

    /// Loads a state as a machine does and encodes it again. Then resumes the devices, serves all
    /// queues once, and pauses the devices.
    ///
    /// # Errors
    /// The state is invalid for such a machine; the sender's fault.
    pub fn take(&mut self, sections: &[Section]) -> Result<Vec<Section>, Error> {
        let wrong = |section: &str, why: String| Error::State { section: section.into(), why };
        let layout = self.balloon.device().layout().clone();
        let state = MachineState::decode(sections, self.cpus, 1, &layout)?;
        let MachineState { vcpus, irqchip, ports, transports, balloon } = state;
        self.ports.restore(&ports).map_err(|error| wrong("ports", error.to_string()))?;
        let restored = self.balloon.restore(balloon);
        restored.map_err(|error| wrong("balloon", error.to_string()))?;
        for transport in &transports {
            let restored = self.transport.restore(transport);
            restored.map_err(|error| wrong("virtio0", error.to_string()))?;
        }
        let taken = self.encode(vcpus, irqchip);
        self.transport.config_changed();
        self.transport.resume();
        self.transport.poll_timers(true);
        for index in 0..balloon_abi::QueueLayout::MAX_QUEUES {
            self.transport.notified(index, 1);
        }
        self.transport.pause();
        Ok(taken)
    }

    /// Whether all balloon pages lie in the guest's memory.
    pub fn holds_only_memory(&self) -> bool {
        let device = self.balloon.device();
        device.held().ranges().all(|range| device.layout().covers(range))
    }

    fn encode(&self, vcpus: Vec<VcpuState>, irqchip: Irqchip) -> Vec<Section> {
        let (balloon, layout) = {
            let device = self.balloon.device();
            (device.state(), device.layout().clone())
        };
        let (ports, transports) = (self.ports.state(), vec![self.transport.state()]);
        MachineState { vcpus, irqchip, ports, transports, balloon }.encode(&layout)
    }
}
