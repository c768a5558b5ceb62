//! A machine's state: everything of a paused guest except its memory, encoded in sections.
//!
//! Each section has a name and a version. A state is loaded completely or not at all: an unknown
//! section or version means a machine that this VMM does not support.

mod balloon;
mod irqchip;
mod serial;
mod vcpu;

pub(crate) use irqchip::Irqchip;
pub(crate) use serial::PortsState;
pub(crate) use vcpu::VcpuState;

use balloon_device::{BalloonState, MemoryLayout};

use crate::codec;
use crate::error::Error;
use crate::mmio::TransportState;

/// A section of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// For example `cpu0` or `balloon`.
    pub name: String,
    /// Version of the encoding.
    pub version: u32,
    /// The encoded state, in Aerostat's own format.
    pub bytes: Vec<u8>,
}

/// Version of each section's encoding.
pub(crate) const VERSION: u32 = 1;

const CHIPS: &str = "irqchip";
const PORTS: &str = "ports";
const BALLOON: &str = "balloon";

/// The decoded state, validated as far as possible without a machine.
pub(crate) struct MachineState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) irqchip: Irqchip,
    pub(crate) ports: PortsState,
    /// First the balloon's, then the disks'.
    pub(crate) transports: Vec<TransportState>,
    pub(crate) balloon: BalloonState,
}

impl MachineState {
    /// Encodes the state in sections.
    pub(crate) fn encode(&self, layout: &MemoryLayout) -> Vec<Section> {
        let section = |name: String, bytes| Section { name, version: VERSION, bytes };
        let vcpus = self.vcpus.iter().enumerate();
        let mut sections: Vec<_> =
            vcpus.map(|(number, cpu)| section(cpu_name(number), cpu.encode())).collect();
        sections.push(section(CHIPS.into(), self.irqchip.encode()));
        sections.push(section(PORTS.into(), self.ports.encode()));
        let transports = self.transports.iter().enumerate();
        sections.extend(
            transports
                .map(|(number, transport)| section(transport_name(number), transport.encode())),
        );
        sections.push(section(BALLOON.into(), balloon::encode(&self.balloon, layout)));
        sections
    }

    /// Decodes the state of a machine with `cpus` vCPUs, `devices` devices and memory of this
    /// layout.
    ///
    /// # Errors
    /// It is the state of another machine, or invalid; the sender's fault.
    pub(crate) fn decode(
        sections: &[Section],
        cpus: usize,
        devices: usize,
        layout: &MemoryLayout,
    ) -> Result<Self, Error> {
        let count = cpus + devices + 3;
        if sections.len() != count {
            let why = format!("it has {} sections instead of {count}", sections.len());
            return Err(Error::State { section: "the machine".into(), why });
        }
        let vcpus = (0..cpus).map(|number| take(sections, &cpu_name(number), VcpuState::decode));
        let state = Self {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            irqchip: take(sections, CHIPS, Irqchip::decode)?,
            ports: take(sections, PORTS, PortsState::decode)?,
            transports: (0..devices)
                .map(|number| take(sections, &transport_name(number), TransportState::decode))
                .collect::<Result<_, _>>()?,
            balloon: take(sections, BALLOON, |bytes| balloon::decode(bytes, layout))?,
        };
        // The balloon device and its transport must have negotiated the same features.
        let in_transport = state.transports.first().map_or(0, TransportState::negotiated);
        let negotiated = state.balloon.negotiated.0;
        if in_transport != negotiated {
            let why = format!("features {negotiated:#x}, but {in_transport:#x} in its transport");
            return Err(Error::State { section: BALLOON.into(), why });
        }
        Ok(state)
    }
}

/// The section name of a device's transport; number 0 is the balloon.
pub(crate) fn transport_name(number: usize) -> String {
    format!("virtio{number}")
}

fn cpu_name(number: usize) -> String {
    format!("cpu{number}")
}

/// Decodes the section with this name.
fn take<T>(
    sections: &[Section],
    name: &str,
    decode: impl FnOnce(&[u8]) -> Result<T, codec::Malformed>,
) -> Result<T, Error> {
    let wrong = |why: String| Error::State { section: name.to_owned(), why };
    let mut named = sections.iter().filter(|section| section.name == name);
    let section = named.next().ok_or_else(|| wrong("it is missing".into()))?;
    if named.next().is_some() {
        return Err(wrong("it occurs twice".into()));
    }
    if section.version != VERSION {
        return Err(wrong(format!("version {} instead of {VERSION}", section.version)));
    }
    decode(&section.bytes).map_err(|error| wrong(error.to_string()))
}
