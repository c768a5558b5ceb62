//! A disk's identity: described at the source, compared at the destination.
//!
//! A file of the same size is not the same disk. These tell disks apart, in this order: a lock of
//! the source that the destination sees; device and inode, on one host; a block device's WWID or UUID;
//! its contents. docs/migration.md, "Which disk it is", says when each decides.

use std::cell::OnceCell;
use std::fs::{self, File, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use diagnostics::{shortened, visible};
use rustix::fs::{Advice, fadvise};

use super::limits::device_directory;
use crate::state::codec::{Malformed, Reader, Writer};

/// Bytes of what is compared at once.
const SAMPLE_BYTES: usize = 4096;

/// Samples of a disk: its first 128 KiB and last 64 KiB, where file systems and partition tables say
/// what they are, and as many from between.
const FIRST_SAMPLES: u32 = 32;
const LAST_SAMPLES: u32 = 16;
const MIDDLE_SAMPLES: u32 = 144;
const MAX_SAMPLES: u32 = FIRST_SAMPLES + LAST_SAMPLES + MIDDLE_SAMPLES;

/// Of a disk that the guest writes meanwhile, one in so many samples may differ.
const DIFFERING_PART: usize = 4;

/// Bytes of a path and of a device's name that are told.
const MAX_PATH_BYTES: usize = 256;
const MAX_NAME_BYTES: usize = 128;

/// Bytes of a device's name in a message.
const MAX_SHOWN_BYTES: usize = 48;

/// Where a host says which boot of which machine it is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where a file is on a host, by its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    /// A block device, which has no inode that counts.
    is_device: bool,
    device: u64,
    inode: u64,
}

/// Which disk a guest had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskIdentity {
    /// Where it was found, for people.
    path: String,
    /// The boot of the host; empty where it is not known.
    boot: String,
    place: Place,
    /// A block device's own name; empty where it has none.
    name: String,
    /// Where a lock is held on it; `None` where it cannot be locked.
    pub(super) token: Option<u64>,
    /// A sum of each sample, 0 where it is zeros.
    samples: Vec<u64>,
}

/// A disk here, which may be one that a guest had.
pub(super) struct Candidate<'a> {
    file: &'a File,
    read_only: bool,
    sectors: u64,
    step: &'a dyn Fn() -> io::Result<()>,
    /// Read once, where they are asked for.
    samples: OnceCell<io::Result<Vec<u64>>>,
}

impl<'a> Candidate<'a> {
    /// `step` is called after each read, and may end it.
    pub(super) const fn new(
        file: &'a File,
        read_only: bool,
        sectors: u64,
        step: &'a dyn Fn() -> io::Result<()>,
    ) -> Self {
        Self { file, read_only, sectors, step, samples: OnceCell::new() }
    }

    fn samples(&self) -> Result<&[u64], String> {
        let samples = self.samples.get_or_init(|| samples(self.file, self.sectors, self.step));
        let samples = samples.as_ref().map(Vec::as_slice);
        samples.map_err(|error| format!("cannot be read to be compared: {error}"))
    }
}

/// What others' locks on a disk say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locks {
    /// The guest's source has it as this disk.
    ThisDisk,
    /// The guest's source has it as another of the guest's disks, numbered from 1.
    OtherDisk(usize),
    /// Somebody has it, and not the guest's source.
    OtherGuest,
    /// There are none, or they are not seen here.
    Unseen,
}

impl DiskIdentity {
    /// Of a file with so many bytes, on which the lock `token` is held.
    pub(super) fn of(
        path: &Path,
        file: &File,
        sectors: u64,
        token: Option<u64>,
        step: &dyn Fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            path: end_of(&visible(&path.to_string_lossy())),
            boot: told_name(&boot()),
            place: Place::of(&metadata),
            name: told_name(&name(&metadata)),
            token,
            samples: samples(file, sectors, step)?,
        })
    }

    /// Whether the disk here is this one.
    ///
    /// # Errors
    /// It is not, or it cannot be known: what was compared.
    pub(super) fn check(&self, here: &Candidate<'_>, locks: Locks) -> Result<(), String> {
        // What nobody writes has to have the same in it, and then it is as good.
        if here.read_only {
            return self.check_contents(here, 0);
        }
        match locks {
            Locks::ThisDisk => return Ok(()),
            Locks::OtherDisk(number) => {
                return Err(format!("is locked as disk {number} of the guest"));
            }
            // Whose guest's cannot be told where the source could not lock it.
            Locks::OtherGuest if self.token.is_some() => {
                return Err("is locked, and not by the guest's source: another has it".into());
            }
            Locks::OtherGuest | Locks::Unseen => {}
        }
        let metadata = here.file.metadata().map_err(|error| format!("cannot be asked: {error}"))?;
        let is_same_host = !self.boot.is_empty() && self.boot == told_name(&boot());
        let place = Place::of(&metadata);
        // Hosts that are copies of one another say that they are the same, and have the same numbers:
        // so these count only where no lock could be had, which is seen on one host.
        if is_same_host && self.place == place && self.token.is_none() {
            return Ok(());
        }
        let name = told_name(&name(&metadata));
        if !self.name.is_empty() && !name.is_empty() {
            if self.name == name {
                return Ok(());
            }
            let [has, had] = [&name, &self.name].map(|name| shortened(name, MAX_SHOWN_BYTES));
            return Err(format!("is the device {has}, and the guest had {had}"));
        }
        if is_same_host && self.token.is_some() {
            let (had, has) = (self.place.words(), place.words());
            return Err(format!(
                "is {has} and not locked by the guest's source, which has {had} locked on this host"
            ));
        }
        self.check_contents(here, DIFFERING_PART)
    }

    /// One in `part` of the samples in which anything is may differ; none where it is 0.
    fn check_contents(&self, here: &Candidate<'_>, part: usize) -> Result<(), String> {
        let found = here.samples()?;
        let pairs = self.samples.iter().zip(found);
        let with_contents = pairs.clone().filter(|(a, b)| (**a, **b) != (0, 0)).count();
        let differ = pairs.filter(|(a, b)| a != b).count();
        let may_differ = with_contents.checked_div(part).unwrap_or(0);
        if found.len() == self.samples.len() && differ <= may_differ {
            return Ok(());
        }
        let (had, has) = (sum(&self.samples), sum(found));
        Err(format!(
            "has other contents: {differ} of {with_contents} samples differ (sum {has:016x}, and \
             {had:016x} where the guest was)"
        ))
    }

    /// A device of that name, on another host.
    #[cfg(test)]
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// As one of another host.
    #[cfg(test)]
    pub(super) fn elsewhere(self) -> Self {
        Self { boot: "another".into(), ..self }
    }

    /// Where it was found.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.list(self.path.as_bytes()).list(self.boot.as_bytes());
        writer.flag(self.place.is_device).u64(self.place.device).u64(self.place.inode);
        writer.list(self.name.as_bytes());
        writer.flag(self.token.is_some()).u64(self.token.unwrap_or(0)).list(&self.samples);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let path = text(reader, "bytes of a path", MAX_PATH_BYTES)?;
        let boot = text(reader, "bytes of a boot", MAX_NAME_BYTES)?;
        let is_device = reader.flag("a device")?;
        let place = Place { is_device, device: reader.u64()?, inode: reader.u64()? };
        let name = text(reader, "bytes of a device's name", MAX_NAME_BYTES)?;
        let has_token = reader.flag("a lock")?;
        let token = Some(reader.u64()?).filter(|_| has_token);
        let samples = reader.list("samples of a disk", MAX_SAMPLES as usize)?;
        Ok(Self { path, boot, place, name, token, samples })
    }
}

/// Only what a person can read: it goes into messages.
fn text(reader: &mut Reader<'_>, what: &'static str, max: usize) -> Result<String, Malformed> {
    let bytes = reader.list::<u8>(what, max)?;
    Ok(visible(&String::from_utf8_lossy(&bytes)))
}

/// A name as it is told and compared, the same on every host: a longer one than can be told (NVMe has
/// some of 200 bytes) with a sum in place of its end.
fn told_name(name: &str) -> String {
    let mut told = visible(name);
    if told.len() > MAX_NAME_BYTES {
        let sum = format!("~{:016x}", sum_of(told.as_bytes()));
        while told.len() > MAX_NAME_BYTES - sum.len() {
            told.pop();
        }
        told += &sum;
    }
    told
}

/// The end of a path, where its file's name is.
fn end_of(path: &str) -> String {
    const LEFT_OUT: &str = "...";
    if path.len() <= MAX_PATH_BYTES {
        return path.to_owned();
    }
    let mut end = path.chars();
    while LEFT_OUT.len() + end.as_str().len() > MAX_PATH_BYTES {
        end.next();
    }
    format!("{LEFT_OUT}{}", end.as_str())
}

impl Place {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            return Self { is_device: true, device: metadata.rdev(), inode: 0 };
        }
        Self { is_device: false, device: metadata.dev(), inode: metadata.ino() }
    }

    fn words(self) -> String {
        let Self { is_device, device, inode } = self;
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        if is_device {
            format!("the device {device}")
        } else {
            format!("inode {inode} of {device}")
        }
    }
}

/// A number that no other disk has.
pub(super) fn new_token() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

fn boot() -> String {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// The name that a block device has on every host: of the storage behind it (`wwid`), or as the
/// device mapper has it, with the part of it that a partition is.
fn name(metadata: &Metadata) -> String {
    if !metadata.file_type().is_block_device() {
        return String::new();
    }
    let directory = device_directory(metadata.rdev());
    let read = |what: &str| {
        let text = fs::read_to_string(directory.join(what)).unwrap_or_default();
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let names = |up: &str| {
        ["wwid", "device/wwid", "dm/uuid"].iter().find_map(|what| read(&format!("{up}{what}")))
    };
    let Some(part) = read("partition") else { return names("").unwrap_or_default() };
    let start = read("start").unwrap_or_default();
    names("../").map_or(String::new(), |disk| format!("{disk}, partition {part} from {start}"))
}

/// Where samples of a disk are taken; the same for all disks of a size.
fn sample_places(bytes: u64) -> Vec<u64> {
    let sample_bytes = SAMPLE_BYTES as u64;
    let blocks = bytes.div_ceil(sample_bytes);
    if blocks <= MAX_SAMPLES.into() {
        return (0..blocks).map(|block| block * sample_bytes).collect();
    }
    let (first, last) = (u64::from(FIRST_SAMPLES), blocks - u64::from(LAST_SAMPLES));
    // Somewhere in each of as many stretches, not in step with anything.
    let middle = (0..MIDDLE_SAMPLES.into()).map(|number| {
        let (start, end) = (stretch(last - first, number), stretch(last - first, number + 1));
        let anywhere = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8;
        first + start + anywhere % (end - start).max(1)
    });
    (0..first).chain(middle).chain(last..blocks).map(|block| block * sample_bytes).collect()
}

/// Where stretch `number` of `blocks` begins.
const fn stretch(blocks: u64, number: u64) -> u64 {
    let stretches = MIDDLE_SAMPLES as u64;
    blocks / stretches * number + blocks % stretches * number / stretches
}

/// Reads samples, and leaves nothing of them in this host's memory: another host may write to the
/// disk before a guest reads it here.
fn samples(file: &File, sectors: u64, step: &dyn Fn() -> io::Result<()>) -> io::Result<Vec<u64>> {
    let bytes = sectors * super::file::SECTOR_BYTES;
    let mut sums = Vec::new();
    let mut buffer = [0; SAMPLE_BYTES];
    // Advice: what is not taken costs nothing.
    let _ = fadvise(file, 0, None, Advice::Random);
    let mut outcome = Ok(());
    for at in sample_places(bytes) {
        let len = usize::try_from(bytes - at).map_or(SAMPLE_BYTES, |left| left.min(SAMPLE_BYTES));
        let sample = buffer.get_mut(..len).unwrap_or_default();
        outcome = file.read_exact_at(sample, at).and_then(|()| step());
        if outcome.is_err() {
            break;
        }
        sums.push(if sample.iter().all(|byte| *byte == 0) { 0 } else { sum_of(sample).max(1) });
        let _ = fadvise(file, at, NonZeroU64::new(len as u64), Advice::DontNeed);
    }
    let _ = fadvise(file, 0, None, Advice::Normal);
    outcome.map(|()| sums)
}

/// One sum of all.
fn sum(samples: &[u64]) -> u64 {
    let bytes: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
    sum_of(&bytes)
}

/// FNV-1a, by words: both sides need the same sum, and no more.
fn sum_of(bytes: &[u8]) -> u64 {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let rest = rest.iter().map(|byte| u64::from(*byte));
    // Turned, so that the upper half of a word counts for the lower half of the sum.
    words.chain(rest).fold(START, |sum, word| (sum ^ word).wrapping_mul(PRIME).rotate_left(29))
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
