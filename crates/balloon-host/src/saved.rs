//! What a back end must know after it was killed: the target, and what the
//! driver said. A file of two slots, written in turn, each with a number and a
//! check sum: a write that was cut off leaves the other slot.
//!
//! It is not synced. It is to outlive this process, not the host, whose guests
//! do not either.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// What is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    /// The target that the operator set, in balloon pages.
    pub(crate) target: u32,
    /// What the driver said last that it holds, in balloon pages.
    pub(crate) actual: u32,
    /// What the driver said last that it fills free pages with, if it did.
    pub(crate) poison_val: Option<u32>,
}

/// Bytes of a slot: mark, number, target, actual, poison's presence, poison,
/// check sum.
const SLOT_BYTES: usize = 48;

/// Slots in the file. Whatever else is in it is not read.
const SLOTS: u64 = 2;

/// Says what the file is, and in which version.
const MARK: [u8; 8] = *b"aerost\0\x01";

/// The open file.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: File,
    /// Number of the newest slot.
    number: u64,
    saved: Saved,
    /// A write failed; said once.
    failing: bool,
}

impl StateFile {
    /// Opens the file at `path`, makes it where there is none, and reads it.
    /// Slots that are not whole say nothing.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        let mut newest = (0, Saved::default());
        for slot in 0..SLOTS {
            let mut bytes = [0; SLOT_BYTES];
            let whole = file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64).is_ok();
            if let Some(found) = whole.then(|| decode(&bytes)).flatten() {
                newest = if found.0 > newest.0 { found } else { newest };
            }
        }
        Ok(Self { file, number: newest.0, saved: newest.1, failing: false })
    }

    /// What the file says.
    pub(crate) const fn saved(&self) -> Saved {
        self.saved
    }

    /// Writes `saved` unless the file says so already.
    ///
    /// # Errors
    /// The first of a row of failures.
    pub(crate) fn save(&mut self, saved: Saved) -> io::Result<()> {
        if saved == self.saved && !self.failing {
            return Ok(());
        }
        let number = self.number.wrapping_add(1).max(1);
        let written =
            self.file.write_all_at(&encode(number, saved), number % SLOTS * SLOT_BYTES as u64);
        let told = std::mem::replace(&mut self.failing, written.is_err());
        if written.is_ok() {
            self.number = number;
            self.saved = saved;
        }
        if told { Ok(()) } else { written }
    }
}

fn encode(number: u64, saved: Saved) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    let fields = [
        saved.target,
        saved.actual,
        u32::from(saved.poison_val.is_some()),
        saved.poison_val.unwrap_or(0),
    ];
    let text = MARK.into_iter().chain(number.to_le_bytes());
    let text = text.chain(fields.into_iter().flat_map(u32::to_le_bytes));
    for (place, byte) in bytes.iter_mut().zip(text) {
        *place = byte;
    }
    let (text, sum) = bytes.split_at_mut(SLOT_BYTES - 8);
    sum.copy_from_slice(&check_sum(text).to_le_bytes());
    bytes
}

/// Number and content of a slot, if it is whole.
fn decode(bytes: &[u8; SLOT_BYTES]) -> Option<(u64, Saved)> {
    let (text, sum) = bytes.split_last_chunk::<8>()?;
    if u64::from_le_bytes(*sum) != check_sum(text) {
        return None;
    }
    let (mark, rest) = text.split_first_chunk::<8>()?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let (words, _) = rest.as_chunks::<4>();
    let [target, actual, poisons, poison] = words.first_chunk::<4>()?.map(u32::from_le_bytes);
    let known = *mark == MARK && poisons <= 1;
    let poison_val = (poisons == 1).then_some(poison);
    known.then_some((u64::from_le_bytes(*number), Saved { target, actual, poison_val }))
}

/// FNV-1a: against accidents, not against whoever may write the file.
fn check_sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(actual: u32) -> Saved {
        Saved { target: 786_432, actual, poison_val: Some(0xaaaa_aaaa) }
    }

    #[test]
    fn what_was_saved_last_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.state");
        for actual in 0..7 {
            let mut file = StateFile::open(&path).unwrap();
            assert_eq!(file.saved(), if actual == 0 { Saved::default() } else { some(actual - 1) });
            file.save(some(90)).unwrap();
            file.save(some(actual)).unwrap();
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), SLOTS * SLOT_BYTES as u64);
    }

    /// Whatever byte is wrong, one of the two last states is read, or none.
    #[test]
    fn a_broken_slot_leaves_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.state");
        let mut file = StateFile::open(&path).unwrap();
        file.save(some(1)).unwrap();
        file.save(some(2)).unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            let saved = StateFile::open(&path).unwrap().saved();
            assert!(saved == some(1) || saved == some(2), "{saved:?} with a wrong byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            let saved = StateFile::open(&path).unwrap().saved();
            assert!([Saved::default(), some(1), some(2)].contains(&saved), "cut off at {at}");
        }
        for hostile in [vec![0xff; 4096], vec![0; 96], b"{\"target\": 5}".to_vec()] {
            std::fs::write(&path, hostile).unwrap();
            assert_eq!(StateFile::open(&path).unwrap().saved(), Saved::default());
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(StateFile::open(&link).is_err());
        assert!(StateFile::open(dir.path()).is_err());
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        assert!(StateFile::open(&fifo).is_err());
    }
}
