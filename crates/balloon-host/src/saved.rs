//! The state file: the target and the driver's config writes, for a back end that was
//! killed and restarts. It has two slots, written alternately, each with a number and a
//! checksum: an incomplete write leaves the other slot intact.
//!
//! It is not synced. It must survive this process, but not a crash of the host, which the
//! guest does not survive either.

mod writer;

pub(crate) use writer::{SaveTicket, StateWriter};

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    /// The target that the operator set, in balloon pages.
    pub(crate) target: u32,
    /// The driver's last write to `actual`, in balloon pages.
    pub(crate) actual: u32,
    /// The driver's last write to `poison_val`, if there was one.
    pub(crate) poison_val: Option<u32>,
}

/// Bytes of a slot: magic, number, target, actual, presence of poison_val, poison_val,
/// checksum.
const SLOT_BYTES: usize = 48;

/// Slots in the file. The rest of the file is not read.
const SLOTS: u64 = 2;

/// Magic number with the version of the format.
const MAGIC: [u8; 8] = *b"aerost\0\x01";

/// Only the owner may read and write the file.
const MODE: u32 = 0o600;

/// Permission bits that let group or others write.
const OTHERS_WRITE: u32 = 0o022;

/// The open file.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    file: File,
    /// Number of the newest slot.
    number: u64,
    saved: Saved,
    /// The last write failed. Only the first of a series of failures is reported.
    failing: bool,
}

impl StateFile {
    /// Opens the file at `path`, or creates it, and reads it. Ignores invalid slots.
    ///
    /// # Errors
    /// It cannot be opened, or it must be replaced (see [`why_untrusted`]) and cannot be.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(MODE).custom_flags(flags.bits().cast_signed());
        let file = match options.create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = options.clone().create_new(false).open(path)?;
                match why_untrusted(&file)? {
                    None => file,
                    Some(why) => replace(path, &options, &why)?,
                }
            }
            created => created?,
        };
        let mut newest = (0, Saved::default());
        for slot in 0..SLOTS {
            let mut bytes = [0; SLOT_BYTES];
            let whole = file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64).is_ok();
            if let Some(found) = whole.then(|| decode(&bytes)).flatten() {
                newest = if found.0 > newest.0 { found } else { newest };
            }
        }
        let path = path.to_owned();
        Ok(Self { path, file, number: newest.0, saved: newest.1, failing: false })
    }

    /// The state in the file.
    pub(crate) const fn saved(&self) -> Saved {
        self.saved
    }

    /// Writes `saved` unless the file has this state already.
    ///
    /// # Errors
    /// The first of a series of failures.
    pub(crate) fn save(&mut self, saved: Saved) -> io::Result<()> {
        let removed = self.is_removed();
        if saved == self.saved && !self.failing && !removed {
            return Ok(());
        }
        let number = self.number.wrapping_add(1).max(1);
        let exists = if removed { self.create_again() } else { Ok(()) };
        let written = exists.and_then(|()| {
            self.file.write_all_at(&encode(number, saved), number % SLOTS * SLOT_BYTES as u64)
        });
        let reported = std::mem::replace(&mut self.failing, written.is_err());
        if written.is_ok() {
            self.number = number;
            self.saved = saved;
        }
        if reported { Ok(()) } else { written }
    }

    /// Returns true if the file was removed: data written to it is lost with this process.
    fn is_removed(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.nlink() == 0)
    }

    /// Creates the file again. Fails if another process has created one meanwhile.
    fn create_again(&mut self) -> io::Result<()> {
        let mut new = OpenOptions::new();
        new.read(true).write(true).create_new(true).mode(MODE);
        self.file = new.open(&self.path).map_err(|error| {
            let what = format!("it was removed, and cannot be created again: {error}");
            io::Error::new(error.kind(), what)
        })?;
        tracing::warn!(path = %self.path.display(), "host: the state file was removed, and is created again");
        Ok(())
    }
}

/// Returns why the file cannot be trusted: another user may have written it, or it is a hard link
/// to another file of this user. Otherwise removes all access for other users.
fn why_untrusted(file: &File) -> io::Result<Option<String>> {
    let (found, user) = (file.metadata()?, rustix::process::geteuid().as_raw());
    if !found.is_file() {
        let what = "it is no regular file: remove it, or use another path";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    if found.uid() != user {
        return Ok(Some(format!(
            "its owner is user {}, and this process runs as {user}",
            found.uid()
        )));
    }
    if found.mode() & OTHERS_WRITE != 0 {
        return Ok(Some(format!("its mode {:o} lets other users write it", found.mode())));
    }
    if found.nlink() != 1 {
        return Ok(Some(format!("it has {} hard links", found.nlink())));
    }
    file.set_permissions(Permissions::from_mode(MODE))?;
    Ok(None)
}

/// Replaces an untrusted file with a new one.
fn replace(path: &Path, options: &OpenOptions, why: &str) -> io::Result<File> {
    let created = fs::remove_file(path).and_then(|()| options.clone().create_new(true).open(path));
    let file = created.map_err(|error| {
        let what =
            format!("{why}, and it cannot be replaced ({error}): remove it, or use another path");
        io::Error::new(error.kind(), what)
    })?;
    tracing::warn!(path = %path.display(), why, "the state file is not trusted; a new one is created");
    Ok(file)
}

fn encode(number: u64, saved: Saved) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    let fields = [
        saved.target,
        saved.actual,
        u32::from(saved.poison_val.is_some()),
        saved.poison_val.unwrap_or(0),
    ];
    let text = MAGIC.into_iter().chain(number.to_le_bytes());
    let text = text.chain(fields.into_iter().flat_map(u32::to_le_bytes));
    for (place, byte) in bytes.iter_mut().zip(text) {
        *place = byte;
    }
    let (text, sum) = bytes.split_at_mut(SLOT_BYTES - 8);
    sum.copy_from_slice(&checksum(text).to_le_bytes());
    bytes
}

/// Returns number and content of a slot, if it is valid.
fn decode(bytes: &[u8; SLOT_BYTES]) -> Option<(u64, Saved)> {
    let (text, sum) = bytes.split_last_chunk::<8>()?;
    if u64::from_le_bytes(*sum) != checksum(text) {
        return None;
    }
    let (magic, rest) = text.split_first_chunk::<8>()?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let (words, _) = rest.as_chunks::<4>();
    let [target, actual, poisons, poison] = words.first_chunk::<4>()?.map(u32::from_le_bytes);
    let known = *magic == MAGIC && poisons <= 1;
    let poison_val = (poisons == 1).then_some(poison);
    known.then_some((u64::from_le_bytes(*number), Saved { target, actual, poison_val }))
}

/// FNV-1a: protects against accidents, not against an attacker with write access.
fn checksum(bytes: &[u8]) -> u64 {
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
    fn the_last_saved_state_is_loaded() {
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

    /// With any byte wrong, one of the last two states is loaded, or none.
    #[test]
    fn a_corrupt_slot_leaves_the_other_intact() {
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
    fn a_removed_file_is_created_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.state");
        let mut file = StateFile::open(&path).unwrap();
        file.save(some(5)).unwrap();
        std::fs::remove_file(&path).unwrap();
        // Even if the state has not changed.
        file.save(some(5)).unwrap();
        assert_eq!(StateFile::open(&path).unwrap().saved(), some(5));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        file.save(some(6)).unwrap();
        assert_eq!(StateFile::open(&path).unwrap().saved(), some(6));
    }

    #[test]
    fn the_file_of_another_process_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.state");
        let mut old = StateFile::open(&path).unwrap();
        old.save(some(5)).unwrap();
        std::fs::remove_file(&path).unwrap();
        StateFile::open(&path).unwrap().save(some(7)).unwrap();
        let error = old.save(some(6)).unwrap_err().to_string();
        assert!(error.contains("cannot be created again"), "{error}");
        assert!(old.save(some(8)).is_ok(), "the error is reported once");
        assert_eq!(StateFile::open(&path).unwrap().saved(), some(7));
    }

    #[test]
    fn a_path_that_is_no_regular_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for target in ["/etc/passwd", "nowhere"] {
            let link = dir.path().join("link");
            std::os::unix::fs::symlink(target, &link).unwrap();
            assert!(StateFile::open(&link).is_err());
            fs::remove_file(&link).unwrap();
        }
        assert!(StateFile::open(dir.path()).is_err());
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let error = StateFile::open(&fifo).unwrap_err().to_string();
        assert_eq!(error, "it is no regular file: remove it, or use another path");
    }

    #[test]
    fn a_file_that_others_may_have_written_is_replaced() {
        type Plant = fn(&Path);
        let mut plants: Vec<(&str, Plant)> = vec![
            ("others write", |path| fs::set_permissions(path, mode(0o602)).unwrap()),
            ("the group writes", |path| fs::set_permissions(path, mode(0o620)).unwrap()),
            ("a hard link", |path| fs::hard_link(path, path.with_extension("2nd")).unwrap()),
        ];
        // Only root can change a file's owner.
        if rustix::process::geteuid().is_root() {
            plants.push(("another user's", |path| {
                std::os::unix::fs::chown(path, Some(12_345), None).unwrap();
            }));
        }
        for (what, plant) in plants {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("vm1.state");
            fs::write(&path, [encode(1, some(5)), encode(2, some(6))].concat()).unwrap();
            fs::set_permissions(&path, mode(0o600)).unwrap();
            assert_eq!(StateFile::open(&path).unwrap().saved(), some(6), "{what}");
            plant(&path);
            let theirs = File::open(&path).unwrap();
            let mut file = StateFile::open(&path).unwrap();
            assert_eq!(file.saved(), Saved::default(), "{what}");
            file.save(some(9)).unwrap();
            let found = fs::metadata(&path).unwrap();
            assert_eq!((found.mode() & 0o7777, found.nlink()), (MODE, 1), "{what}");
            assert_ne!(theirs.metadata().unwrap().ino(), found.ino(), "{what}");
            assert_eq!(StateFile::open(&path).unwrap().saved(), some(9), "{what}");
        }
    }

    fn mode(bits: u32) -> Permissions {
        Permissions::from_mode(bits)
    }

    /// For example after a manual copy.
    #[test]
    fn a_file_that_others_can_only_read_is_trusted_and_made_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.state");
        fs::write(&path, [encode(1, some(5)), encode(2, some(6))].concat()).unwrap();
        fs::set_permissions(&path, mode(0o644)).unwrap();
        assert_eq!(StateFile::open(&path).unwrap().saved(), some(6));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, MODE);
    }
}
