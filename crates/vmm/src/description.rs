//! What a destination must know of a machine before it can make one like it.

use balloon_abi::Features;
use migration::cpu::FeatureWord;
use migration::layout::GuestLayout;
use migration::seams::{Description, MachineError};
use page_set::PageRange;

use crate::block::{DiskShape, MAX_DISKS};
use crate::cpuid::CpuFeatures;
use crate::error::Error;
use crate::layout;
use crate::machine::Machine;
use crate::state::codec::{Malformed, Reader, Writer};

/// Version of the form of [`Made`], and of the machine that is so made: a guest has in its memory
/// what it was told of its devices, and finds them wherever it goes. Since 3 it has a generation ID.
const VERSION: u32 = 3;

const PAGE_BYTES: u64 = 4096;

/// How a machine was made, as far as its guest could tell the difference. What backs its memory
/// is for each host to choose, and where its disks are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) cpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) without: Features,
    pub(crate) disks: Vec<DiskShape>,
}

impl Made {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(VERSION).u8(self.cpus).u64(self.memory_bytes).u64(self.without.0);
        writer.u8(u8::try_from(self.disks.len()).unwrap_or(u8::MAX));
        for disk in &self.disks {
            writer.u64(disk.sectors).flag(disk.read_only);
        }
        writer.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let _version = reader.u32()?;
        let mut made = Self {
            cpus: reader.u8()?,
            memory_bytes: reader.u64()?,
            without: Features(reader.u64()?),
            disks: Vec::new(),
        };
        let count = reader.u8()?;
        if usize::from(count) > MAX_DISKS {
            let (count, max) = (count.into(), MAX_DISKS as u64);
            return Err(Malformed::TooMany { what: "disks", count, max });
        }
        for _ in 0..count {
            let sectors = reader.u64()?;
            made.disks.push(DiskShape { sectors, read_only: reader.flag("a disk's use")? });
        }
        reader.finish()?;
        Ok(made)
    }

    /// How a peer's machine was made, which is none with more than `max_cpus` processors.
    ///
    /// # Errors
    /// No machine is made so, or not one with the memory that was described; the sender's fault.
    pub(crate) fn of(description: &Description, max_cpus: u8) -> Result<Self, Error> {
        let wrong = |why: String| Error::State { section: "the machine".into(), why };
        let version = Reader::new(&description.config).u32();
        match version.map_err(|error| wrong(error.to_string()))? {
            VERSION => {}
            theirs => return Err(Error::Version { theirs, ours: VERSION }),
        }
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

    /// Whether a machine here has the disks that the guest had.
    ///
    /// # Errors
    /// It has others; the operator's fault, who names them.
    pub(crate) fn check_disks(&self, here: &[DiskShape]) -> Result<(), Error> {
        if self.disks == here {
            return Ok(());
        }
        let list = |disks: &[DiskShape]| {
            let word = |disk: &DiskShape| {
                let kind = if disk.read_only { " read-only" } else { "" };
                format!("{} sectors{kind}", disk.sectors)
            };
            format!("[{}]", disks.iter().map(word).collect::<Vec<_>>().join(", "))
        };
        let (had, has) = (list(&self.disks), list(here));
        Err(Error::Option { what: format!("the guest had the disks {had}, and has {has} here") })
    }
}

/// Describes a machine to a destination.
pub(crate) fn describe(machine: &Machine) -> Result<Description, MachineError> {
    let options = &machine.options;
    let made = Made {
        cpus: options.cpus,
        memory_bytes: options.memory_bytes,
        without: options.without,
        disks: machine.disk_shapes(),
    };
    let regions: Vec<PageRange> = machine.regions();
    Ok(Description {
        layout: GuestLayout::new(regions)?,
        cpu: cpu_features(machine.cpu_features()),
        machine: options.host.name.clone(),
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

    const MEMORY_BYTES: u64 = 4 << 30;

    fn made() -> Made {
        let disks = [false, true].map(|read_only| DiskShape { sectors: 9, read_only });
        let (memory_bytes, without) = (MEMORY_BYTES, Features::REPORTING);
        Made { cpus: 2, memory_bytes, without, disks: disks.into() }
    }

    fn description(config: Vec<u8>) -> Description {
        let ranges = layout::ranges(MEMORY_BYTES).unwrap();
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
        assert_eq!(Made::of(&description(made().encode()), 2).unwrap(), made());
        let refused = |config: Vec<u8>, max_cpus| {
            let error = Made::of(&description(config), max_cpus).unwrap_err().to_string();
            assert!(error.starts_with("sender: "), "{error}");
            error
        };
        assert!(refused(made().encode(), 1).contains("2 processors"));
        assert!(refused(Made { cpus: 0, ..made() }.encode(), 64).contains("0 processors"));
        refused(Made { memory_bytes: 2 << 30, ..made() }.encode(), 64);
        refused(Made { memory_bytes: u64::MAX, ..made() }.encode(), 64);
        refused(Made { memory_bytes: 0, ..made() }.encode(), 64);
        refused(made().encode()[1..].to_vec(), 64);
        refused([made().encode(), vec![0]].concat(), 64);
        let mut newer = made().encode();
        newer[0] = 9;
        assert!(refused(newer, 64).contains("version"));
        let mut more = made().encode();
        let count = more.len() - 2 * 9 - 1;
        more[count] = 8;
        assert!(refused(more, 64).contains("8 disks"));
        assert!(made().check_disks(&made().disks).is_ok());
        let error = made().check_disks(&made().disks[..1]).unwrap_err().to_string();
        assert!(
            error.starts_with("operator: ") && error.contains("9 sectors read-only"),
            "{error}"
        );
    }
}
