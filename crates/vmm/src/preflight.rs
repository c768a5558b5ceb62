//! Checks before a migration or a VM snapshot: can the guest's state be saved now, and can the
//! destination load it?
//!
//! The guest can still change while its memory is sent. Then saving its state fails, and it runs on
//! at the source.

use kvm_ioctls::VcpuFd;
use migration::limits::{MAX_CONFIG_BYTES, MAX_STATE_BYTES, MAX_STATE_SECTIONS};

use crate::error::Error;
use crate::machine::{Machine, PAUSE_TIME};
use crate::state::codec::{Malformed, Reader, Writer};
use crate::state::{Irqchip, MachineState, Processor, Section, transport_name};
use crate::vcpu::Processors;

/// What of a guest's state another host may refuse, as it was when the guest was described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Features that driver and device have agreed on, for each device.
    agreed: Vec<u64>,
    /// The state of the first processor. The others have the same features and registers.
    processor: Vec<u8>,
}

impl Sample {
    /// Of a guest without drivers, of whose processors nothing is known.
    pub(crate) fn blank(devices: usize) -> Self {
        Self { agreed: vec![0; devices], processor: Processor::blank().encode() }
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.list(&self.agreed.iter().map(|word| word.to_le_bytes()).collect::<Vec<_>>());
        writer.list(&self.processor);
    }

    /// For a guest with so many devices.
    pub(crate) fn decode(reader: &mut Reader<'_>, devices: usize) -> Result<Self, Malformed> {
        let agreed = reader.list::<[u8; 8]>("devices with features", devices)?;
        if agreed.len() != devices {
            let value = agreed.len() as u64;
            return Err(Malformed::Value { what: "the number of devices with features", value });
        }
        let processor = reader.list::<u8>("bytes of a processor", MAX_CONFIG_BYTES)?;
        Processor::decode(&processor)?;
        Ok(Self { agreed: agreed.into_iter().map(u64::from_le_bytes).collect(), processor })
    }
}

impl Machine {
    /// Saves all but memory and disks of a guest that runs, as if it were to leave, and checks it as
    /// whoever takes it would. The guest stands still for a moment.
    ///
    /// # Errors
    /// It could not leave as it is now.
    pub(crate) fn sample(&self) -> Result<Sample, Error> {
        let stands = Stands::still(&self.processors)?;
        let processors = self.save_processors();
        let irqchip = Irqchip::save(self.vm.fd());
        let balloon = self.balloon.device().state();
        let transports: Vec<_> =
            self.bus.slots.iter().map(|slot| slot.transport().state()).collect();
        drop(stands);
        let agreed = transports.iter().map(|transport| transport.agreed()).collect();
        let (processors, irqchip, ports) = (processors?, irqchip?, self.bus.ports.state());
        let processor = processors.first().map(Processor::encode).unwrap_or_default();
        let layout = self.balloon.device().layout().clone();
        let (cpus, devices) = (processors.len(), transports.len());
        let state = MachineState { processors, irqchip, ports, transports, balloon };
        let sections = state.encode(&layout);
        fits(&sections)?;
        MachineState::decode(&sections, cpus, devices, &layout)?;
        Ok(Sample { agreed, processor })
    }

    /// Whether this machine, which is new and has no memory yet, could be that of the guest.
    ///
    /// # Errors
    /// This host cannot have a part of it.
    pub(crate) fn try_out(&self, sample: &Sample) -> Result<(), Error> {
        for (number, (slot, agreed)) in self.bus.slots.iter().zip(&sample.agreed).enumerate() {
            let offered = slot.transport().offered();
            if agreed & !offered != 0 {
                let what = format!(
                    "{} with the features {agreed:#x}: here it has {offered:#x}",
                    transport_name(number)
                );
                return Err(Error::Unsupported { what });
            }
        }
        let wrong = |why: Malformed| Error::State { section: "cpu0".into(), why: why.to_string() };
        let processor = Processor::decode(&sample.processor).map_err(wrong)?;
        self.processors.pause(PAUSE_TIME)?;
        let try_first = |number, fd: &VcpuFd| match number {
            0 => processor.try_out(fd, &self.vm),
            _ => Ok(()),
        };
        self.processors.each(try_first).map(drop)
    }
}

/// Processors that stand still for as long as it is there, also where the thread panics.
struct Stands<'a>(&'a Processors);

impl<'a> Stands<'a> {
    fn still(processors: &'a Processors) -> Result<Self, Error> {
        processors.pause(PAUSE_TIME)?;
        Ok(Self(processors))
    }
}

impl Drop for Stands<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

/// Whether so much state is taken.
fn fits(sections: &[Section]) -> Result<(), Error> {
    let bytes: u64 = sections.iter().map(|section| section.bytes.len() as u64).sum();
    let parts = sections.len();
    if parts <= MAX_STATE_SECTIONS && bytes <= MAX_STATE_BYTES {
        return Ok(());
    }
    let what = format!(
        "a guest with {bytes} bytes of state in {parts} parts: {MAX_STATE_BYTES} in \
         {MAX_STATE_SECTIONS} are taken; most of it is its balloon, so set that to 0 first"
    );
    Err(Error::Unsupported { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8], devices: usize) -> Result<Sample, Malformed> {
        let mut reader = Reader::new(bytes);
        let sample = Sample::decode(&mut reader, devices)?;
        reader.finish()?;
        Ok(sample)
    }

    fn encoded(sample: &Sample) -> Vec<u8> {
        let mut writer = Writer::default();
        sample.encode(&mut writer);
        writer.finish()
    }

    #[test]
    fn a_sample_goes_there_and_back_and_not_one_of_another_machine() {
        let sample = Sample { agreed: vec![1 << 32, 7], ..Sample::blank(2) };
        let bytes = encoded(&sample);
        assert_eq!(decoded(&bytes, 2), Ok(sample));
        assert!(decoded(&bytes, 1).is_err() && decoded(&bytes, 3).is_err());
        assert!(decoded(&bytes[..bytes.len() - 1], 2).is_err());
        let none = Sample { processor: Vec::new(), ..Sample::blank(2) };
        assert!(decoded(&encoded(&none), 2).is_err());
    }

    #[test]
    fn more_state_than_is_taken_is_found_before_it_is_sent() {
        let section = |bytes: u64| Section {
            name: "balloon".into(),
            version: 1,
            bytes: vec![0; usize::try_from(bytes).unwrap()],
        };
        assert!(fits(&[section(MAX_STATE_BYTES)]).is_ok());
        let error = fits(&[section(MAX_STATE_BYTES), section(1)]).unwrap_err().to_string();
        let said = [MAX_STATE_BYTES + 1, MAX_STATE_BYTES].map(|bytes| bytes.to_string());
        assert!(said.iter().all(|number| error.contains(number)), "{error}");
        assert!(fits(&vec![section(0); MAX_STATE_SECTIONS + 1]).is_err());
    }
}
