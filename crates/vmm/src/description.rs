//! The description from which a destination creates the same machine.

use balloon_abi::Features;
use migration::cpu::FeatureWord;
use migration::layout::GuestLayout;
use migration::traits::{Description, MachineError};
use page_set::{PAGE_BYTES, PageRange};

use crate::block::{DiskIdentity, DiskLimits, DiskShape, GuestDisk, MAX_DISKS};
use crate::codec::{Malformed, Reader, Writer};
use crate::cpuid::CpuFeatures;
use crate::error::Error;
use crate::layout::{self, MAX_CPUS};
use crate::machine::Machine;
use crate::preflight::Sample;
use crate::state;

/// Version of the encoding of [`MachineShape`], and of the machine itself: a guest keeps in its
/// memory what it has read of its devices, so they must not change. Version 3 added the generation
/// ID, version 4 the disks' identities.
const VERSION: u32 = 4;

/// The parts of a machine that its guest can see. Each host chooses the memory's backing and the
/// disks' paths; the disks' identities are included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MachineShape {
    pub(crate) cpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) without: Features,
    pub(crate) disks: Vec<GuestDisk>,
    /// The parts of the state that this host may refuse.
    pub(crate) sample: Sample,
}

impl MachineShape {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer
            .u32(VERSION)
            .u32(state::VERSION)
            .u8(self.cpus)
            .u64(self.memory_bytes)
            .u64(self.without.0);
        writer.u8(u8::try_from(self.disks.len()).unwrap_or(u8::MAX));
        for disk in &self.disks {
            encode_disk(disk, &mut writer);
        }
        self.sample.encode(&mut writer);
        writer.finish()
    }

    /// Encodes the shape and checks that a destination accepts it, before the source connects.
    ///
    /// # Errors
    /// No destination would accept it; a bug of this program.
    fn encode_for_others(&self) -> Result<Vec<u8>, Error> {
        let bytes = self.encode();
        let why = match Self::decode(&bytes) {
            Ok(read) if read == *self => return Ok(bytes),
            Ok(_) => "it decodes to another machine".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(Error::Unsupported { what: format!("a machine with this description: {why}") })
    }

    fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let wrong = |why: Malformed| wrong(why.to_string());
        let mut reader = Reader::new(bytes);
        for (what, ours) in [("machine", VERSION), ("state", state::VERSION)] {
            let theirs = reader.u32().map_err(wrong)?;
            if theirs != ours {
                return Err(Error::Version { what, theirs, ours });
            }
        }
        Self::decode_parts(reader).map_err(wrong)
    }

    fn decode_parts(mut reader: Reader<'_>) -> Result<Self, Malformed> {
        let (cpus, memory_bytes) = (reader.u8()?, reader.u64()?);
        let without = Features(reader.u64()?);
        let count = reader.u8()?;
        if usize::from(count) > MAX_DISKS {
            let (count, max) = (count.into(), MAX_DISKS as u64);
            return Err(Malformed::TooMany { what: "disks", count, max });
        }
        let mut disks = Vec::new();
        for _ in 0..count {
            disks.push(decode_disk(&mut reader)?);
        }
        // One more device: the balloon.
        let sample = Sample::decode(&mut reader, 1 + disks.len())?;
        reader.finish()?;
        Ok(Self { cpus, memory_bytes, without, disks, sample })
    }

    /// Decodes and validates a peer's description.
    ///
    /// # Errors
    /// It is invalid or does not match the described memory, the sender's fault; or it has more
    /// than `max_cpus` vCPUs.
    pub(crate) fn of(description: &Description, max_cpus: u8) -> Result<Self, Error> {
        let shape = Self::decode(&description.config)?;
        if !(1..=MAX_CPUS).contains(&shape.cpus) {
            return Err(wrong(format!("{} vCPUs; 1 to {MAX_CPUS} are possible", shape.cpus)));
        }
        if shape.cpus > max_cpus {
            let what = format!(
                "the guest has {} vCPUs, but at most {max_cpus} are allowed here: allow more with \
                 `receive --max-cpus`",
                shape.cpus
            );
            return Err(Error::Option { what });
        }
        let ranges =
            layout::ranges(shape.memory_bytes).map_err(|error| wrong(error.to_string()))?;
        let pages = ranges.iter().map(|(start, bytes)| (start / PAGE_BYTES, bytes / PAGE_BYTES));
        let described = description.layout.regions().iter().map(|r| (r.start(), r.pages()));
        if !pages.eq(described) {
            return Err(wrong("its memory has another layout than this VMM's".into()));
        }
        Ok(shape)
    }

    /// Checks that the machine here has as many disks as the guest had, of the same shapes.
    ///
    /// # Errors
    /// It has others; the operator's fault.
    pub(crate) fn check_disks(&self, here: &[DiskShape]) -> Result<(), Error> {
        let had: Vec<_> = self.disks.iter().map(|disk| disk.shape).collect();
        if had == here {
            return Ok(());
        }
        let list = |disks: &[DiskShape]| {
            let word = |disk: &DiskShape| {
                let kind = if disk.read_only { " read-only" } else { "" };
                format!("{} sectors{kind}", disk.sectors)
            };
            format!("[{}]", disks.iter().map(word).collect::<Vec<_>>().join(", "))
        };
        let (had, has) = (list(&had), list(here));
        Err(Error::Option { what: format!("the guest had the disks {had}, but has {has} here") })
    }
}

fn encode_disk(disk: &GuestDisk, writer: &mut Writer) {
    let GuestDisk { shape, limits, identity } = disk;
    writer.u64(shape.sectors).flag(shape.read_only);
    writer.u32(limits.block_bytes).u8(limits.physical_exp).u8(limits.alignment_offset);
    writer.u16(limits.min_io_blocks).u32(limits.opt_io_blocks).u32(limits.discard_sectors);
    identity.encode(writer);
}

fn decode_disk(reader: &mut Reader<'_>) -> Result<GuestDisk, Malformed> {
    let shape = DiskShape { sectors: reader.u64()?, read_only: reader.flag("a disk's use")? };
    let limits = DiskLimits {
        block_bytes: reader.u32()?,
        physical_exp: reader.u8()?,
        alignment_offset: reader.u8()?,
        min_io_blocks: reader.u16()?,
        opt_io_blocks: reader.u32()?,
        discard_sectors: reader.u32()?,
    };
    if !limits.are_valid() {
        let value = limits.block_bytes.into();
        return Err(Malformed::Value { what: "the limits of a disk with blocks", value });
    }
    Ok(GuestDisk { shape, limits, identity: DiskIdentity::decode(reader)? })
}

fn wrong(why: String) -> Error {
    Error::State { section: "the machine".into(), why }
}

/// Describes a machine to a destination, unless `keep_going` becomes false.
pub(crate) fn describe(
    machine: &Machine,
    keep_going: impl Fn() -> bool,
) -> Result<Description, MachineError> {
    let options = &machine.options;
    let sample = machine.sample()?;
    let shape = MachineShape {
        cpus: options.cpus,
        memory_bytes: options.memory_bytes,
        without: options.without,
        disks: machine.describe_disks(keep_going)?,
        sample,
    };
    let regions: Vec<PageRange> = machine.regions();
    Ok(Description {
        layout: GuestLayout::new(regions)?,
        cpu: cpu_features(machine.cpu_features()),
        machine: options.host.name.clone(),
        config: shape.encode_for_others()?,
    })
}

/// Converts to the migration crate's type.
pub(crate) fn cpu_features(features: CpuFeatures) -> migration::cpu::CpuFeatures {
    let words = features.words.into_iter().map(|(id, bits)| FeatureWord { id, bits });
    migration::cpu::CpuFeatures { vendor: features.vendor, words: words.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY_BYTES: u64 = 4 << 30;

    /// Offset of the number of disks.
    const COUNT_AT: usize = 4 + 4 + 1 + 8 + 8;

    fn shape() -> MachineShape {
        let disks = [false, true].map(|read_only| GuestDisk {
            shape: DiskShape { sectors: 9, read_only },
            limits: DiskLimits::of_file_system(4096),
            identity: DiskIdentity::default(),
        });
        let (memory_bytes, without) = (MEMORY_BYTES, Features::REPORTING);
        MachineShape {
            cpus: 2,
            memory_bytes,
            without,
            disks: disks.into(),
            sample: Sample::blank(3),
        }
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

    /// For example a name that is longer than a destination accepts.
    #[test]
    fn a_source_refuses_a_description_that_no_destination_accepts() {
        assert_eq!(shape().encode_for_others().unwrap(), shape().encode());
        for name in ["x".repeat(129), "\u{202e}".into()] {
            let mut odd = shape();
            odd.disks[0].identity = DiskIdentity::named(&name);
            let read = odd.encode_for_others().map(|bytes| bytes.len());
            let error = read.unwrap_err().to_string();
            assert!(error.contains("a machine with this description"), "{error}");
        }
    }

    #[test]
    fn a_description_round_trips_and_an_invalid_one_is_refused() {
        assert_eq!(MachineShape::of(&description(shape().encode()), 2).unwrap(), shape());
        let refused = |config: Vec<u8>, max_cpus| {
            let error = MachineShape::of(&description(config), max_cpus).unwrap_err().to_string();
            assert!(error.starts_with("sender: "), "{error}");
            error
        };
        let error = MachineShape::of(&description(shape().encode()), 1).unwrap_err().to_string();
        assert!(error.starts_with("operator: the guest has 2 vCPUs, but at most 1"), "{error}");
        assert!(refused(MachineShape { cpus: 0, ..shape() }.encode(), 64).contains("0 vCPUs"));
        refused(MachineShape { memory_bytes: 2 << 30, ..shape() }.encode(), 64);
        refused(MachineShape { memory_bytes: u64::MAX, ..shape() }.encode(), 64);
        refused(MachineShape { memory_bytes: 0, ..shape() }.encode(), 64);
        refused(shape().encode()[1..].to_vec(), 64);
        refused([shape().encode(), vec![0]].concat(), 64);
        let mut newer = shape().encode();
        newer[0] = 9;
        assert!(refused(newer, 64).contains("machine has version 9"));
        let mut newer = shape().encode();
        newer[4] = 9;
        assert!(refused(newer, 64).contains("state has version 9"));
        let mut more = shape().encode();
        more[COUNT_AT] = 8;
        assert!(refused(more, 64).contains("8 disks"));
        let mut odd = shape();
        odd.disks[1].limits.block_bytes = 1000;
        assert!(refused(odd.encode(), 64).contains("limits of a disk"));
        let shapes: Vec<_> = shape().disks.iter().map(|disk| disk.shape).collect();
        assert!(shape().check_disks(&shapes).is_ok());
        let error = shape().check_disks(&shapes[..1]).unwrap_err().to_string();
        assert!(
            error.starts_with("operator: ") && error.contains("9 sectors read-only"),
            "{error}"
        );
    }
}
