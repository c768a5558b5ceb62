//! Checks before a migration or a VM snapshot: can the guest's state be saved now, and can the
//! destination load it?
//!
//! The guest can still change while its memory is sent. Then saving its state fails, and it runs on
//! at the source.

use kvm_ioctls::VcpuFd;
use migration::limits::{MAX_CONFIG_BYTES, MAX_STATE_BYTES, MAX_STATE_SECTIONS};

use crate::codec::{Malformed, Reader, Writer};
use crate::error::Error;
use crate::machine::{Machine, PAUSE_TIMEOUT};
use crate::state::{Irqchip, MachineState, Section, VcpuState, transport_name};
use crate::vcpu::Vcpus;

/// The parts of a guest's state that another host may refuse, sampled before a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Negotiated features of each device.
    negotiated: Vec<u64>,
    /// The state of the first vCPU. The others have the same features and registers.
    vcpu: Vec<u8>,
}

impl Sample {
    /// A sample without drivers and with an empty vCPU state.
    #[cfg(any(test, feature = "raw"))]
    pub(crate) fn blank(devices: usize) -> Self {
        Self { negotiated: vec![0; devices], vcpu: VcpuState::blank().encode() }
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.list(&self.negotiated.iter().map(|word| word.to_le_bytes()).collect::<Vec<_>>());
        writer.list(&self.vcpu);
    }

    /// Decodes the sample of a guest with `devices` devices.
    pub(crate) fn decode(reader: &mut Reader<'_>, devices: usize) -> Result<Self, Malformed> {
        let negotiated = reader.list::<[u8; 8]>("devices with features", devices)?;
        if negotiated.len() != devices {
            let value = negotiated.len() as u64;
            return Err(Malformed::Value { what: "the number of devices with features", value });
        }
        let vcpu = reader.list::<u8>("bytes of a vCPU", MAX_CONFIG_BYTES)?;
        VcpuState::decode(&vcpu)?;
        Ok(Self { negotiated: negotiated.into_iter().map(u64::from_le_bytes).collect(), vcpu })
    }
}

impl Machine {
    /// Saves the state of a running guest, without memory and disks, and checks it as a destination
    /// would. Pauses the vCPUs briefly.
    ///
    /// # Errors
    /// The guest cannot be migrated or saved now.
    pub(crate) fn sample(&self) -> Result<Sample, Error> {
        let paused = PausedVcpus::pause(&self.vcpus)?;
        let vcpus = self.save_vcpus();
        let irqchip = Irqchip::save(self.vm.fd());
        let balloon = self.balloon.device().state();
        let transports: Vec<_> =
            self.bus.slots.iter().map(|slot| slot.transport().state()).collect();
        drop(paused);
        let negotiated = transports.iter().map(|transport| transport.negotiated()).collect();
        let (vcpus, irqchip, ports) = (vcpus?, irqchip?, self.bus.ports.state());
        let vcpu = vcpus.first().map(VcpuState::encode).unwrap_or_default();
        let layout = self.balloon.device().layout().clone();
        let (cpus, devices) = (vcpus.len(), transports.len());
        let state = MachineState { vcpus, irqchip, ports, transports, balloon };
        let sections = state.encode(&layout);
        fits(&sections)?;
        MachineState::decode(&sections, cpus, devices, &layout)?;
        Ok(Sample { negotiated, vcpu })
    }

    /// Checks that this new machine, without memory yet, can run the guest.
    ///
    /// # Errors
    /// This host does not support a part of the state.
    pub(crate) fn check_supported(&self, sample: &Sample) -> Result<(), Error> {
        for (number, (slot, negotiated)) in
            self.bus.slots.iter().zip(&sample.negotiated).enumerate()
        {
            let offered = slot.transport().offered();
            if negotiated & !offered != 0 {
                let what = format!(
                    "{} with the features {negotiated:#x}: here it has {offered:#x}",
                    transport_name(number)
                );
                return Err(Error::Unsupported { what });
            }
        }
        let wrong = |why: Malformed| Error::State { section: "cpu0".into(), why: why.to_string() };
        let vcpu = VcpuState::decode(&sample.vcpu).map_err(wrong)?;
        self.vcpus.pause(PAUSE_TIMEOUT)?;
        let check_first = |number, fd: &VcpuFd| match number {
            0 => vcpu.check_supported(fd, &self.vm),
            _ => Ok(()),
        };
        self.vcpus.each(check_first).map(drop)
    }
}

/// Paused vCPUs; dropping it, also by a panic, resumes them.
struct PausedVcpus<'a>(&'a Vcpus);

impl<'a> PausedVcpus<'a> {
    fn pause(vcpus: &'a Vcpus) -> Result<Self, Error> {
        vcpus.pause(PAUSE_TIMEOUT)?;
        Ok(Self(vcpus))
    }
}

impl Drop for PausedVcpus<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

/// Checks that the state is within a destination's limits.
fn fits(sections: &[Section]) -> Result<(), Error> {
    let bytes: u64 = sections.iter().map(|section| section.bytes.len() as u64).sum();
    let parts = sections.len();
    if parts <= MAX_STATE_SECTIONS && bytes <= MAX_STATE_BYTES {
        return Ok(());
    }
    let what = format!(
        "a guest with {bytes} bytes of state in {parts} sections: at most {MAX_STATE_BYTES} in \
         {MAX_STATE_SECTIONS} are possible; most of it is the balloon, so set that to 0 first"
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
    fn a_sample_round_trips_and_one_of_another_machine_is_refused() {
        let sample = Sample { negotiated: vec![1 << 32, 7], ..Sample::blank(2) };
        let bytes = encoded(&sample);
        assert_eq!(decoded(&bytes, 2), Ok(sample));
        assert!(decoded(&bytes, 1).is_err() && decoded(&bytes, 3).is_err());
        assert!(decoded(&bytes[..bytes.len() - 1], 2).is_err());
        let none = Sample { vcpu: Vec::new(), ..Sample::blank(2) };
        assert!(decoded(&encoded(&none), 2).is_err());
    }

    #[test]
    fn too_much_state_is_refused_before_it_is_sent() {
        let section = |bytes: u64| Section {
            name: "balloon".into(),
            version: 1,
            bytes: vec![0; usize::try_from(bytes).unwrap()],
        };
        assert!(fits(&[section(MAX_STATE_BYTES)]).is_ok());
        let error = fits(&[section(MAX_STATE_BYTES), section(1)]).unwrap_err().to_string();
        let numbers = [MAX_STATE_BYTES + 1, MAX_STATE_BYTES].map(|bytes| bytes.to_string());
        assert!(numbers.iter().all(|number| error.contains(number)), "{error}");
        assert!(fits(&vec![section(0); MAX_STATE_SECTIONS + 1]).is_err());
    }
}
