//! A disk's identity: the source describes it, the destination compares it.
//!
//! A file of the same size is not the same disk. These identify a disk, in this order: a lock of
//! the source that the destination sees; device and inode, on one host; a block device's WWID or
//! UUID; its contents. docs/migration.md, "Which disk it is", says when each decides.

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
use crate::codec::{Malformed, Reader, Writer};

/// Bytes of a sample.
const SAMPLE_BYTES: usize = 4096;

/// Number of samples of a disk: its first 128 KiB and last 64 KiB, which have the superblocks and
/// partition tables, and `MIDDLE_SAMPLES` in between.
const FIRST_SAMPLES: u32 = 32;
const LAST_SAMPLES: u32 = 16;
const MIDDLE_SAMPLES: u32 = 144;
const MAX_SAMPLES: u32 = FIRST_SAMPLES + LAST_SAMPLES + MIDDLE_SAMPLES;

/// If the guest writes to the disk meanwhile, one in this many samples may differ.
const DIFFERING_PART: usize = 4;

/// Maximum bytes of a path and of a device name in the description.
const MAX_PATH_BYTES: usize = 256;
const MAX_NAME_BYTES: usize = 128;

/// Maximum bytes of a device name in a message.
const MAX_SHOWN_BYTES: usize = 48;

/// Identifies the host and its boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A file's device and inode numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct FileId {
    /// A block device; its inode is not compared.
    is_device: bool,
    device: u64,
    inode: u64,
}

/// The identity of a guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskIdentity {
    /// The path at the source, for messages only.
    path: String,
    /// The host's boot ID; empty if unknown.
    boot: String,
    file_id: FileId,
    /// A block device's WWID or UUID; empty if it has none.
    name: String,
    /// The source's lock token; `None` if the file system does not support locks.
    pub(super) token: Option<u64>,
    /// A hash of each sample; 0 for zeros.
    samples: Vec<u64>,
}

/// A local disk to compare with a guest's disk.
pub(super) struct Candidate<'a> {
    file: &'a File,
    read_only: bool,
    sectors: u64,
    step: &'a dyn Fn() -> io::Result<()>,
    /// Read on first use.
    samples: OnceCell<io::Result<Vec<u64>>>,
}

impl<'a> Candidate<'a> {
    /// `step` is called after each read; its error ends the reading.
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
        samples.map_err(|error| format!("cannot be read to compare it: {error}"))
    }
}

/// What other processes' locks on a disk show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locks {
    /// The guest's source has locked it as this disk.
    ThisDisk,
    /// The guest's source has locked it as another of the guest's disks, numbered from 1.
    OtherDisk(usize),
    /// A process other than the guest's source has locked it.
    OtherGuest,
    /// No locks, or they are not visible here.
    Unseen,
}

impl DiskIdentity {
    /// Describes a file on which the lock `token` is held.
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
            boot: short_name(&boot()),
            file_id: FileId::of(&metadata),
            name: short_name(&name(&metadata)),
            token,
            samples: samples(file, sectors, step)?,
        })
    }

    /// Checks that the local disk is this one.
    ///
    /// # Errors
    /// It is not, or that is unknown; the error says what was compared.
    pub(super) fn check(&self, here: &Candidate<'_>, locks: Locks) -> Result<(), String> {
        // A read-only disk only needs the same contents.
        if here.read_only {
            return self.check_contents(here, 0);
        }
        match locks {
            Locks::ThisDisk => return Ok(()),
            Locks::OtherDisk(number) => {
                return Err(format!("is locked as disk {number} of the guest"));
            }
            // If the source could not lock it, the lock's owner is unknown.
            Locks::OtherGuest if self.token.is_some() => {
                return Err("is locked by another process, not by the guest's source".into());
            }
            Locks::OtherGuest | Locks::Unseen => {}
        }
        let metadata =
            here.file.metadata().map_err(|error| format!("has unreadable metadata: {error}"))?;
        let is_same_host = !self.boot.is_empty() && self.boot == short_name(&boot());
        let file_id = FileId::of(&metadata);
        // Hosts that are copies of each other have the same boot ID and numbers. So these count
        // only if the source could not lock the disk; a lock would be visible on the same host.
        if is_same_host && self.file_id == file_id && self.token.is_none() {
            return Ok(());
        }
        let name = short_name(&name(&metadata));
        if !self.name.is_empty() && !name.is_empty() {
            if self.name == name {
                return Ok(());
            }
            let [has, had] = [&name, &self.name].map(|name| shortened(name, MAX_SHOWN_BYTES));
            return Err(format!("is the device {has}, but the guest had {had}"));
        }
        if is_same_host && self.token.is_some() {
            let (had, has) = (self.file_id.describe(), file_id.describe());
            return Err(format!(
                "is {has} and not locked by the guest's source, which has locked {had} on this host"
            ));
        }
        self.check_contents(here, DIFFERING_PART)
    }

    /// Compares samples. One in `part` of those that are not zeros may differ; none if `part` is 0.
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
            "has other contents: {differ} of {with_contents} samples differ (hash {has:016x} here, \
             {had:016x} at the source)"
        ))
    }

    /// A device with this name, of another host.
    #[cfg(test)]
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// The same disk, described by another host.
    #[cfg(test)]
    pub(super) fn elsewhere(self) -> Self {
        Self { boot: "another".into(), ..self }
    }

    /// Its path at the source.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.list(self.path.as_bytes()).list(self.boot.as_bytes());
        writer.flag(self.file_id.is_device).u64(self.file_id.device).u64(self.file_id.inode);
        writer.list(self.name.as_bytes());
        writer.flag(self.token.is_some()).u64(self.token.unwrap_or(0)).list(&self.samples);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let path = text(reader, "bytes of a path", MAX_PATH_BYTES)?;
        let boot = text(reader, "bytes of a boot", MAX_NAME_BYTES)?;
        let is_device = reader.flag("a device")?;
        let file_id = FileId { is_device, device: reader.u64()?, inode: reader.u64()? };
        let name = text(reader, "bytes of a device's name", MAX_NAME_BYTES)?;
        let has_token = reader.flag("a lock")?;
        let token = Some(reader.u64()?).filter(|_| has_token);
        let samples = reader.list("samples of a disk", MAX_SAMPLES as usize)?;
        Ok(Self { path, boot, file_id, name, token, samples })
    }
}

/// Reads a text, with unprintable characters escaped: it is used in messages.
fn text(reader: &mut Reader<'_>, what: &'static str, max: usize) -> Result<String, Malformed> {
    let bytes = reader.list::<u8>(what, max)?;
    Ok(visible(&String::from_utf8_lossy(&bytes)))
}

/// A device name as described and compared. If it is too long (some NVMe names have 200 bytes), a
/// hash replaces its end.
fn short_name(name: &str) -> String {
    let mut short = visible(name);
    if short.len() > MAX_NAME_BYTES {
        let sum = format!("~{:016x}", hash_of(short.as_bytes()));
        while short.len() > MAX_NAME_BYTES - sum.len() {
            short.pop();
        }
        short += &sum;
    }
    short
}

/// The end of a path, with its file name.
fn end_of(path: &str) -> String {
    const ELLIPSIS: &str = "...";
    if path.len() <= MAX_PATH_BYTES {
        return path.to_owned();
    }
    let mut end = path.chars();
    while ELLIPSIS.len() + end.as_str().len() > MAX_PATH_BYTES {
        end.next();
    }
    format!("{ELLIPSIS}{}", end.as_str())
}

impl FileId {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            return Self { is_device: true, device: metadata.rdev(), inode: 0 };
        }
        Self { is_device: false, device: metadata.dev(), inode: metadata.ino() }
    }

    fn describe(self) -> String {
        let Self { is_device, device, inode } = self;
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        if is_device {
            format!("the device {device}")
        } else {
            format!("inode {inode} of {device}")
        }
    }
}

/// A random token.
pub(super) fn new_token() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

fn boot() -> String {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// A block device's name, the same on every host: the WWID of its storage or the device mapper's
/// UUID, with a partition's number and start.
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

/// Offsets of the samples; the same for all disks of a size.
fn sample_places(bytes: u64) -> Vec<u64> {
    let sample_bytes = SAMPLE_BYTES as u64;
    let blocks = bytes.div_ceil(sample_bytes);
    if blocks <= MAX_SAMPLES.into() {
        return (0..blocks).map(|block| block * sample_bytes).collect();
    }
    let (first, last) = (u64::from(FIRST_SAMPLES), blocks - u64::from(LAST_SAMPLES));
    // One at a pseudo-random place in each of MIDDLE_SAMPLES stretches.
    let middle = (0..MIDDLE_SAMPLES.into()).map(|number| {
        let (start, end) = (stretch(last - first, number), stretch(last - first, number + 1));
        let anywhere = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8;
        first + start + anywhere % (end - start).max(1)
    });
    (0..first).chain(middle).chain(last..blocks).map(|block| block * sample_bytes).collect()
}

/// The first block of stretch `number`.
const fn stretch(blocks: u64, number: u64) -> u64 {
    let stretches = MIDDLE_SAMPLES as u64;
    blocks / stretches * number + blocks % stretches * number / stretches
}

/// Hashes the samples, and drops them from the page cache: another host may write to the disk
/// before a guest reads it here.
fn samples(file: &File, sectors: u64, step: &dyn Fn() -> io::Result<()>) -> io::Result<Vec<u64>> {
    let bytes = sectors * super::file::SECTOR_BYTES;
    let mut sums = Vec::new();
    let mut buffer = [0; SAMPLE_BYTES];
    // Only advice: errors do not matter.
    let _ = fadvise(file, 0, None, Advice::Random);
    let mut outcome = Ok(());
    for at in sample_places(bytes) {
        let len = usize::try_from(bytes - at).map_or(SAMPLE_BYTES, |left| left.min(SAMPLE_BYTES));
        let sample = buffer.get_mut(..len).unwrap_or_default();
        outcome = file.read_exact_at(sample, at).and_then(|()| step());
        if outcome.is_err() {
            break;
        }
        sums.push(if sample.iter().all(|byte| *byte == 0) { 0 } else { hash_of(sample).max(1) });
        let _ = fadvise(file, at, NonZeroU64::new(len as u64), Advice::DontNeed);
    }
    let _ = fadvise(file, 0, None, Advice::Normal);
    outcome.map(|()| sums)
}

/// One hash of all samples.
fn sum(samples: &[u64]) -> u64 {
    let bytes: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
    hash_of(&bytes)
}

/// FNV-1a by 64-bit words. It only has to be the same on both sides.
fn hash_of(bytes: &[u8]) -> u64 {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let rest = rest.iter().map(|byte| u64::from(*byte));
    // Rotated, so that the upper half of a word affects the lower half of the hash.
    words.chain(rest).fold(START, |sum, word| (sum ^ word).wrapping_mul(PRIME).rotate_left(29))
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
