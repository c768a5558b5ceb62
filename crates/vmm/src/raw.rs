//! What a peer says of a machine, as bytes, for whoever plays a hostile one: tests and fuzz targets.
//! It is taken as a machine takes it, but for what only KVM can say.

mod disk;

use std::sync::Arc;

use balloon_abi::Features;
use balloon_host::{HostReclaim, Shared};
use control::api::{PartialHuge, ReleaseMode};
use migration::layout::GuestLayout;
use migration::traits::Description;
use page_set::PageRange;

use crate::balloon::VirtioBalloon;
use crate::block::{DiskIdentity, DiskLimits, DiskShape, GuestDisk};
use crate::description::MachineShape;
use crate::error::Error;
use crate::layout;
use crate::memory::{MachineMemory, MemoryKind};
use crate::mmio::{Interrupts, Transport};
use crate::ports::Ports;
use crate::preflight::Sample;
use crate::state::{Irqchip, MachineState, Processor, Section};

pub use disk::Disk;

const PAGE_BYTES: u64 = 4096;

/// The description of a machine with a disk that there could be.
///
/// # Errors
/// There can be none with such memory.
pub fn description(cpus: u8, memory_bytes: u64) -> Result<Description, Error> {
    let shape = DiskShape { sectors: 8, read_only: true };
    let (limits, identity) = (DiskLimits::of_file_system(PAGE_BYTES), DiskIdentity::default());
    let disks = vec![GuestDisk { shape, limits, identity }];
    let sample = Sample::blank(1 + disks.len());
    let made = MachineShape { cpus, memory_bytes, without: Features::NONE, disks, sample };
    let ranges = layout::ranges(memory_bytes)?;
    let pages =
        |(start, bytes): &(u64, u64)| PageRange::new(start / PAGE_BYTES, bytes / PAGE_BYTES);
    let regions = ranges.iter().map(pages).collect::<Result<_, _>>();
    let layout = GuestLayout::new(regions.map_err(Error::memory("describing"))?);
    Ok(Description {
        layout: layout.map_err(Error::memory("describing"))?,
        cpu: migration::cpu::CpuFeatures::default(),
        machine: "vm1".into(),
        config: made.encode(),
    })
}

/// Processors and memory of the machine that a peer describes.
///
/// # Errors
/// It is none that this monitor makes; the sender's fault.
pub fn take_description(description: &Description, max_cpus: u8) -> Result<(u8, u64), Error> {
    let made = MachineShape::of(description, max_cpus)?;
    Ok((made.cpus, made.memory_bytes))
}

/// What of a machine needs no KVM.
pub struct Devices {
    cpus: usize,
    balloon: Arc<Shared>,
    ports: Ports,
    transport: Transport<Nobody>,
}

/// Nobody is interrupted.
struct Nobody;

impl Interrupts for Nobody {
    fn raise(&self) {}
    fn kick(&self, _: usize) {}
}

impl Devices {
    /// Those of a new machine.
    ///
    /// # Errors
    /// There can be none with such memory, or the host has none.
    pub fn new(cpus: u8, memory_bytes: u64) -> Result<Self, Error> {
        let memory = MachineMemory::new(memory_bytes, MemoryKind { shared: false, huge: false })?;
        let mut reclaim = HostReclaim::new(ReleaseMode::Immediate, PartialHuge::Split)?;
        reclaim.set_memory(memory.map.clone());
        let balloon = Arc::new(Shared::new("vm1".into(), reclaim)?);
        let layout = balloon_device::MemoryLayout::new(memory.ranges.iter().copied());
        balloon.device().set_layout(layout.map_err(Error::memory("describing"))?);
        let device = Box::new(VirtioBalloon::new(Arc::clone(&balloon)));
        let transport = Transport::new(device, Nobody, memory.guest);
        let transport = transport.map_err(Error::memory("making queues"))?;
        let signal = vmm_sys_util::eventfd::EventFd::new(0).map_err(Error::host("eventfd"))?;
        let ports = Ports::new(signal, Box::new(std::io::sink())).map_err(Error::host("dup"))?;
        Ok(Self { cpus: cpus.into(), balloon, ports, transport })
    }

    /// The state of a machine with these, and with processors and irqchip that are as good as none.
    pub fn state(&self) -> Vec<Section> {
        let processors = (0..self.cpus).map(|_| Processor::blank()).collect();
        self.encode(processors, Irqchip::blank())
    }

    /// Takes a state as a machine does, lets the guest go on for a moment, and stops it again;
    /// what the state was then understood to be, before that.
    ///
    /// # Errors
    /// It is none of such a machine; the sender's fault.
    pub fn take(&mut self, sections: &[Section]) -> Result<Vec<Section>, Error> {
        let wrong = |section: &str, why: String| Error::State { section: section.into(), why };
        let layout = self.balloon.device().layout().clone();
        let state = MachineState::decode(sections, self.cpus, 1, &layout)?;
        let MachineState { processors, irqchip, ports, transports, balloon } = state;
        self.ports.restore(&ports).map_err(|error| wrong("ports", error.to_string()))?;
        let restored = self.balloon.restore(balloon);
        restored.map_err(|error| wrong("balloon", error.to_string()))?;
        for transport in &transports {
            let restored = self.transport.restore(transport);
            restored.map_err(|error| wrong("virtio0", error.to_string()))?;
        }
        let taken = self.encode(processors, irqchip);
        self.transport.config_changed();
        self.transport.resume();
        self.transport.poll_timers(true);
        for index in 0..balloon_abi::QueueLayout::MAX_QUEUES {
            self.transport.notified(index, 1);
        }
        self.transport.pause();
        Ok(taken)
    }

    /// What the guest holds lies in its memory, whatever was said.
    pub fn holds_only_memory(&self) -> bool {
        let device = self.balloon.device();
        device.held().ranges().all(|range| device.layout().covers(range))
    }

    fn encode(&self, processors: Vec<Processor>, irqchip: Irqchip) -> Vec<Section> {
        let (balloon, layout) = {
            let device = self.balloon.device();
            (device.state(), device.layout().clone())
        };
        let (ports, transports) = (self.ports.state(), vec![self.transport.state()]);
        MachineState { processors, irqchip, ports, transports, balloon }.encode(&layout)
    }
}
