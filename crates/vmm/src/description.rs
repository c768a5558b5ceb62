//! What a destination must know of a machine before it can make one like it.

use balloon_abi::Features;
use migration::cpu::FeatureWord;
use migration::layout::GuestLayout;
use migration::seams::{Description, MachineError};
use page_set::PageRange;

use crate::cpuid::CpuFeatures;
use crate::error::Error;
use crate::layout;
use crate::machine::Machine;
use crate::state::codec::{Malformed, Reader, Writer};

/// Version of the form of [`Made`].
const VERSION: u32 = 1;

const PAGE_BYTES: u64 = 4096;

/// How a machine was made, as far as its guest could tell the difference. What backs its memory
/// is for each host to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) cpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) without: Features,
}

impl Made {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(VERSION).u8(self.cpus).u64(self.memory_bytes).u64(self.without.0);
        writer.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let version = reader.u32()?;
        if version != VERSION {
            return Err(Malformed::Value { what: "the version", value: version.into() });
        }
        let made = Self {
            cpus: reader.u8()?,
            memory_bytes: reader.u64()?,
            without: Features(reader.u64()?),
        };
        reader.finish()?;
        Ok(made)
    }

    /// How a peer's machine was made, which is none with more than `max_cpus` processors.
    ///
    /// # Errors
    /// No machine is made so, or not one with the memory that was described; the sender's fault.
    pub(crate) fn of(description: &Description, max_cpus: u8) -> Result<Self, Error> {
        let wrong = |why: String| Error::State { section: "the machine".into(), why };
        let made = Self::decode(&description.config).map_err(|error| wrong(error.to_string()))?;
        if !(1..=max_cpus).contains(&made.cpus) {
            return Err(wrong(format!("{} processors; 1 to {max_cpus} may be", made.cpus)));
        }
        let ranges = layout::ranges(made.memory_bytes).map_err(|error| wrong(error.to_string()))?;
        let pages = ranges.iter().map(|(start, bytes)| (start / PAGE_BYTES, bytes / PAGE_BYTES));
        let described = description.layout.regions().iter().map(|r| (r.start(), r.pages()));
        if !pages.eq(described) {
            return Err(wrong("its memory is not where this monitor has it".into()));
        }
        Ok(made)
    }
}

/// Describes a machine to a destination.
pub(crate) fn describe(machine: &Machine) -> Result<Description, MachineError> {
    let options = &machine.options;
    let made =
        Made { cpus: options.cpus, memory_bytes: options.memory_bytes, without: options.without };
    let regions: Vec<PageRange> = machine.regions();
    Ok(Description {
        layout: GuestLayout::new(regions)?,
        cpu: cpu_features(machine.cpu_features()),
        machine: options.name.clone(),
        config: made.encode(),
    })
}

/// In the migration's words.
pub(crate) fn cpu_features(features: CpuFeatures) -> migration::cpu::CpuFeatures {
    let words = features.words.into_iter().map(|(id, bits)| FeatureWord { id, bits });
    migration::cpu::CpuFeatures { vendor: features.vendor, words: words.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MADE: Made = Made { cpus: 2, memory_bytes: 4 << 30, without: Features::REPORTING };

    fn description(config: Vec<u8>) -> Description {
        let ranges = layout::ranges(MADE.memory_bytes).unwrap();
        let pages =
            ranges.iter().map(|(start, bytes)| PageRange::new(start / 4096, bytes / 4096).unwrap());
        Description {
            layout: GuestLayout::new(pages.collect()).unwrap(),
            cpu: migration::cpu::CpuFeatures::default(),
            machine: "vm1".into(),
            config,
        }
    }

    #[test]
    fn a_machine_is_made_as_it_was_described_or_not_at_all() {
        assert_eq!(Made::of(&description(MADE.encode()), 2).unwrap(), MADE);
        let refused = |config: Vec<u8>, max_cpus| {
            let error = Made::of(&description(config), max_cpus).unwrap_err().to_string();
            assert!(error.starts_with("sender: "), "{error}");
            error
        };
        assert!(refused(MADE.encode(), 1).contains("2 processors"));
        assert!(refused(Made { cpus: 0, ..MADE }.encode(), 64).contains("0 processors"));
        refused(Made { memory_bytes: 2 << 30, ..MADE }.encode(), 64);
        refused(Made { memory_bytes: u64::MAX, ..MADE }.encode(), 64);
        refused(Made { memory_bytes: 0, ..MADE }.encode(), 64);
        refused(MADE.encode()[1..].to_vec(), 64);
        refused([MADE.encode(), vec![0]].concat(), 64);
        let mut newer = MADE.encode();
        newer[0] = 9;
        assert!(refused(newer, 64).contains("version"));
    }
}
