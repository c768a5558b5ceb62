//! A machine's state: everything of a guest that stands still but its memory, in parts as bytes.
//!
//! Each part has a name and a version. Whoever takes a state takes all parts or none: an unknown
//! part, or one of another version, is a machine that this monitor cannot be.

mod balloon;
pub(crate) mod codec;
mod irqchip;
mod processor;
mod serial;

pub(crate) use irqchip::Irqchip;
pub(crate) use processor::Processor;
pub(crate) use serial::PortsState;

use balloon_device::{BalloonState, MemoryLayout};

use crate::error::Error;
use crate::mmio::TransportState;

/// A part of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is the state of, as `cpu0` or `balloon`.
    pub name: String,
    /// Version of the form of its bytes.
    pub version: u32,
    /// In a form of this monitor's own.
    pub bytes: Vec<u8>,
}

/// Version of each part's form.
pub(crate) const VERSION: u32 = 1;

const CHIPS: &str = "irqchip";
const PORTS: &str = "ports";
const BALLOON: &str = "balloon";

/// All of it, checked as far as it can be without a machine.
pub(crate) struct MachineState {
    pub(crate) processors: Vec<Processor>,
    pub(crate) irqchip: Irqchip,
    pub(crate) ports: PortsState,
    /// The balloon's, and those of the disks.
    pub(crate) transports: Vec<TransportState>,
    pub(crate) balloon: BalloonState,
}

impl MachineState {
    /// In parts.
    pub(crate) fn encode(&self, layout: &MemoryLayout) -> Vec<Section> {
        let part = |name: String, bytes| Section { name, version: VERSION, bytes };
        let processors = self.processors.iter().enumerate();
        let mut parts: Vec<_> =
            processors.map(|(number, cpu)| part(cpu_name(number), cpu.encode())).collect();
        parts.push(part(CHIPS.into(), self.irqchip.encode()));
        parts.push(part(PORTS.into(), self.ports.encode()));
        let transports = self.transports.iter().enumerate();
        parts.extend(
            transports.map(|(number, transport)| part(transport_name(number), transport.encode())),
        );
        parts.push(part(BALLOON.into(), balloon::encode(&self.balloon, layout)));
        parts
    }

    /// The state of a machine with so many processors and devices and such memory.
    ///
    /// # Errors
    /// It is not, or not in a form that is known; the sender's fault.
    pub(crate) fn decode(
        sections: &[Section],
        cpus: usize,
        devices: usize,
        layout: &MemoryLayout,
    ) -> Result<Self, Error> {
        let count = cpus + devices + 3;
        if sections.len() != count {
            let why = format!("it has {} parts, and should have {count}", sections.len());
            return Err(Error::State { section: "the machine".into(), why });
        }
        let processors =
            (0..cpus).map(|number| take(sections, &cpu_name(number), Processor::decode));
        let state = Self {
            processors: processors.collect::<Result<_, _>>()?,
            irqchip: take(sections, CHIPS, Irqchip::decode)?,
            ports: take(sections, PORTS, PortsState::decode)?,
            transports: (0..devices)
                .map(|number| take(sections, &transport_name(number), TransportState::decode))
                .collect::<Result<_, _>>()?,
            balloon: take(sections, BALLOON, |bytes| balloon::decode(bytes, layout))?,
        };
        // The device knows its own features only, all of which are among the driver's.
        let agreed = state.transports.first().map_or(0, TransportState::agreed);
        let negotiated = state.balloon.negotiated.0;
        if agreed != negotiated {
            let why = format!("features {negotiated:#x}, and {agreed:#x} in its transport");
            return Err(Error::State { section: BALLOON.into(), why });
        }
        Ok(state)
    }
}

/// The balloon's is the first.
pub(crate) fn transport_name(number: usize) -> String {
    format!("virtio{number}")
}

fn cpu_name(number: usize) -> String {
    format!("cpu{number}")
}

/// Reads the part of this name.
fn take<T>(
    sections: &[Section],
    name: &str,
    decode: impl FnOnce(&[u8]) -> Result<T, codec::Malformed>,
) -> Result<T, Error> {
    let wrong = |why: String| Error::State { section: name.to_owned(), why };
    let mut named = sections.iter().filter(|section| section.name == name);
    let section = named.next().ok_or_else(|| wrong("it is missing".into()))?;
    if named.next().is_some() {
        return Err(wrong("it is there twice".into()));
    }
    if section.version != VERSION {
        return Err(wrong(format!("version {}; {VERSION} is known", section.version)));
    }
    decode(&section.bytes).map_err(|error| wrong(error.to_string()))
}
