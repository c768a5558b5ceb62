//! A disk's backing file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::identity::{Candidate, DiskIdentity, Locks, new_token};
use super::limits::DiskLimits;
use super::lock::{self, GUEST_LOCK, LockMode, RUN_LOCK};
use crate::error::Error;

/// The virtio sector size in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Zeros to write where the file system cannot deallocate.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A disk on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// A block device, or a file whose size is a multiple of 512 bytes.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// The properties of a disk that must be the same on every host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskShape {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    path: PathBuf,
    shape: DiskShape,
    /// The limits on this host.
    limits: DiskLimits,
    /// The limits that the guest got on the source host, which take precedence.
    source_limits: OnceLock<DiskLimits>,
    /// The host's unit of discard and write-zeroes, in bytes.
    unit_bytes: u64,
    /// Identifies this disk by the byte range of a lock.
    token: u64,
    /// The errno of a failed write-back that was not reported to the guest yet.
    unreported: Mutex<Option<i32>>,
}

/// A disk as the source describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    pub(crate) shape: DiskShape,
    pub(crate) limits: DiskLimits,
    pub(crate) identity: DiskIdentity,
}

/// A disk that is not, or may not be, the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskMismatch {
    /// What differs, or why it is unknown.
    pub(crate) why: String,
    /// The index of the guest's disk that it is instead, if any.
    pub(crate) index: Option<usize>,
}

impl DiskFile {
    /// # Errors
    /// It cannot be opened, or has an invalid size.
    pub(crate) fn open(options: &DiskOptions) -> Result<Self, Error> {
        let DiskOptions { path, read_only } = options.clone();
        let wrong = |source| Error::File { path: path.clone(), source };
        let file = OpenOptions::new().read(true).write(!read_only).open(&path).map_err(wrong)?;
        // Works for a block device too, whose metadata has no size.
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|error| wrong(error.into()))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            let what = format!(
                "{} has {bytes} bytes: not a positive multiple of {SECTOR_BYTES}",
                path.display()
            );
            return Err(Error::Option { what });
        }
        let (limits, unit_bytes) = DiskLimits::of(&file.metadata().map_err(wrong)?);
        let shape = DiskShape { sectors: bytes / SECTOR_BYTES, read_only };
        let (source_limits, token, unreported) = (OnceLock::new(), new_token(), Mutex::default());
        Ok(Self { file, path, shape, limits, source_limits, unit_bytes, token, unreported })
    }

    /// Sets the unit of discard and write-zeroes, as for a block device.
    #[cfg(any(test, feature = "raw"))]
    pub(crate) const fn in_units(mut self, unit_bytes: u64) -> Self {
        self.unit_bytes = unit_bytes;
        self
    }

    /// The limits reported to the guest.
    pub(crate) fn limits(&self) -> DiskLimits {
        *self.source_limits.get().unwrap_or(&self.limits)
    }

    /// Keeps the limits that the guest got on the source host. All requests that they allow work
    /// here.
    pub(crate) fn keep_limits(&self, source_limits: DiskLimits) {
        let here = self.limits;
        if source_limits.block_bytes < here.block_bytes {
            let disk = self.path.display();
            let (reported, here) = (source_limits.block_bytes, here.block_bytes);
            tracing::warn!(%disk, reported, here, "host: the guest expects smaller disk blocks");
        }
        // Set once: a guest arrives once.
        let _ = self.source_limits.set(source_limits);
    }

    /// Describes the disk, for another host to recognize it. Calls `step` after each read; an error
    /// of `step` ends it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn describe(&self, step: &dyn Fn() -> io::Result<()>) -> io::Result<GuestDisk> {
        let locked = lock::set(&self.file, lock::token_range(self.token), LockMode::Shared);
        let token = Some(self.token).filter(|_| matches!(locked, Ok(true)));
        let identity = DiskIdentity::of(&self.path, &self.file, self.shape.sectors, token, step)?;
        Ok(GuestDisk { shape: self.shape, limits: self.limits(), identity })
    }

    /// Checks that it is the guest's disk number `index`. Calls `step` after each read; an error of
    /// `step` ends it.
    ///
    /// # Errors
    /// It is another disk, or that is unknown.
    pub(crate) fn check(
        &self,
        guest_disks: &[GuestDisk],
        index: usize,
        step: &dyn Fn() -> io::Result<()>,
    ) -> Result<(), DiskMismatch> {
        let DiskShape { sectors, read_only } = self.shape;
        let here = Candidate::new(&self.file, read_only, sectors, step);
        let is = |index: usize, disk: &GuestDisk| {
            let locks = self.locks(guest_disks, index);
            let _ = step();
            disk.identity.check(&here, locks)
        };
        let this =
            guest_disks.get(index).ok_or_else(|| "is one more disk than the guest had".to_owned());
        let Err(why) = this.and_then(|disk| is(index, disk)) else { return Ok(()) };
        let mut others = guest_disks.iter().enumerate();
        let other = others.find(|(at, disk)| disk.shape == self.shape && is(*at, disk).is_ok());
        Err(DiskMismatch { why, index: other.map(|(at, _)| at) })
    }

    /// What other processes' locks show. Without lock support there are none.
    fn locks(&self, guest_disks: &[GuestDisk], index: usize) -> Locks {
        let is_locked_as = |disk: &GuestDisk| {
            let range = disk.identity.token.map(lock::token_range);
            range.is_some_and(|range| lock::is_shared(&self.file, range).unwrap_or(false))
        };
        if guest_disks.get(index).is_some_and(is_locked_as) {
            return Locks::ThisDisk;
        }
        if let Some((number, _)) = (1..).zip(guest_disks).find(|(_, disk)| is_locked_as(disk)) {
            return Locks::OtherDisk(number);
        }
        let is_free = |range| lock::is_free(&self.file, range).unwrap_or(true);
        if is_free(RUN_LOCK) && is_free(GUEST_LOCK) { Locks::Unseen } else { Locks::OtherGuest }
    }

    /// Takes the file for a guest that boots here.
    ///
    /// # Errors
    /// Another guest uses it, possibly one that is migrating.
    pub(crate) fn take_new(&self) -> Result<(), Error> {
        self.take()?;
        let taken =
            self.allowed(lock::is_free(&self.file, GUEST_LOCK)).and_then(|()| self.lock_guest());
        taken.inspect_err(|_| self.release())
    }

    /// Reserves the file for an incoming guest, as far as its source's locks allow: completely if
    /// the disk is read-only.
    ///
    /// # Errors
    /// A guest other than the incoming one uses it.
    pub(crate) fn expect(&self) -> Result<(), Error> {
        if self.shape.read_only { self.take_new() } else { self.lock_guest() }
    }

    /// Takes the file for a guest that is about to run.
    ///
    /// # Errors
    /// The guest runs on the peer, or another guest uses the file.
    pub(crate) fn take(&self) -> Result<(), Error> {
        let mode = if self.shape.read_only { LockMode::Shared } else { LockMode::Exclusive };
        self.allowed(lock::set(&self.file, RUN_LOCK, mode))
    }

    /// Lets the peer take the file. Still excludes other guests, because the guest is still here
    /// too.
    pub(crate) fn prepare_switchover(&self) {
        if !self.shape.read_only {
            self.unlock(RUN_LOCK);
        }
    }

    /// Releases the file.
    pub(crate) fn release(&self) {
        self.unlock(RUN_LOCK);
        self.unlock(GUEST_LOCK);
        self.unlock(lock::token_range(self.token));
    }

    fn lock_guest(&self) -> Result<(), Error> {
        if self.shape.read_only {
            return Ok(());
        }
        self.allowed(lock::set(&self.file, GUEST_LOCK, LockMode::Shared))
    }

    /// Accepts a file system without lock support with a warning: refusing the guest would be
    /// worse.
    fn allowed(&self, locked: io::Result<bool>) -> Result<(), Error> {
        match locked {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Error::InUse { path: self.path.clone() }),
            Err(error) => {
                let disk = self.path.display();
                tracing::warn!(%disk, %error, "host: cannot lock the disk; use it for one guest");
            }
        }
        Ok(())
    }

    fn unlock(&self, range: lock::LockRange) {
        // If it fails, nothing was locked.
        let _ = lock::set(&self.file, range, LockMode::Unlock);
    }

    pub(crate) const fn shape(&self) -> DiskShape {
        self.shape
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn read(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(out, at)
    }

    pub(crate) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    /// Flushes the file for the guest.
    ///
    /// # Errors
    /// A write was lost, possibly found by an earlier [`sync`](Self::sync).
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.shape.read_only {
            return Ok(());
        }
        let mut unreported = self.unreported();
        let synced = self.file.sync_data();
        let earlier =
            unreported.take().map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)));
        synced.and(earlier)
    }

    /// Flushes the file for this process, and keeps an error for the guest's next
    /// [flush](Self::flush): the kernel reports each error once per open file description.
    ///
    /// # Errors
    /// A write was lost, now or earlier, and the guest was not notified of it yet.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.shape.read_only {
            return Ok(());
        }
        let mut unreported = self.unreported();
        if let Err(error) = self.file.sync_data() {
            *unreported = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        unreported.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }

    /// Keeps the error of a [flush](Self::flush) that did not reach the guest, for its next one.
    pub(crate) fn keep_error(&self, error: i32) {
        self.unreported().get_or_insert(error);
    }

    /// Locked during `fdatasync`, so that no flush succeeds because a concurrent sync consumed the
    /// error. Only these two lock it for long, and both wait for the same data anyway.
    fn unreported(&self) -> MutexGuard<'_, Option<i32>> {
        self.unreported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deallocates blocks, which then read as zeros. Partial blocks, and all blocks on a file
    /// system without holes, keep their contents, which virtio 1.3, 5.2.6.2 allows.
    pub(crate) fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        let (start, end) = self.whole_units(at, bytes);
        if start == end {
            return Ok(());
        }
        match self.allocate(FallocateFlags::PUNCH_HOLE, start, end - start) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Zeroes a range; with `may_unmap` the file may deallocate it.
    pub(crate) fn write_zeroes(&self, at: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let (start, end) = self.whole_units(at, bytes);
        // Whatever the reason of a failure, writing zeros is the fallback.
        if start == end || self.allocate(how, start, end - start).is_err() {
            return self.write_zeros(at, at + bytes);
        }
        self.write_zeros(at, start)?;
        self.write_zeros(end, at + bytes)
    }

    /// The part of the range in whole units, as start and end; empty at `at` if there is none.
    const fn whole_units(&self, at: u64, bytes: u64) -> (u64, u64) {
        let unit = self.unit_bytes;
        let (start, end) = (at.next_multiple_of(unit), (at + bytes) / unit * unit);
        if start < end { (start, end) } else { (at, at) }
    }

    fn allocate(&self, how: FallocateFlags, at: u64, bytes: u64) -> Result<(), Errno> {
        let flags = how | FallocateFlags::KEEP_SIZE;
        uninterrupted(|| fallocate(&self.file, flags, at, bytes))
    }

    fn write_zeros(&self, mut at: u64, end: u64) -> io::Result<()> {
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write(ZEROS.get(..len).unwrap_or_default(), at)?;
            at += len as u64;
        }
        Ok(())
    }
}

/// Repeats a system call that a signal interrupted: a pause or a profiler must not cause a disk
/// error. Only for calls that may be repeated.
fn uninterrupted(call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(call)
}

#[cfg(test)]
impl DiskFile {
    /// A disk that accepts all writes, but on which `fdatasync` fails.
    pub(super) fn that_cannot_sync(sectors: u64) -> Self {
        let path = PathBuf::from("/dev/null");
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let shape = DiskShape { sectors, read_only: false };
        let limits = DiskLimits::of_file_system(SECTOR_BYTES);
        let (source_limits, unreported) = (OnceLock::new(), Mutex::default());
        Self { file, path, shape, limits, source_limits, unit_bytes: 1, token: 0, unreported }
    }
}

/// Serializes tests of file locks with the start of child processes: until a child executes its
/// program it shares all open files, and so their locks.
#[cfg(test)]
pub(crate) fn no_process_starts() -> std::sync::MutexGuard<'static, ()> {
    static STARTS: std::sync::Mutex<()> = std::sync::Mutex::new(());
    STARTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::NamedTempFile;

    use super::*;

    fn open(file: &NamedTempFile, read_only: bool) -> DiskFile {
        DiskFile::open(&DiskOptions { path: file.path().into(), read_only }).unwrap()
    }

    fn image() -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), [0; 512]).unwrap();
        file
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let _alone = no_process_starts();
        let file = image();
        let writer = open(&file, false);
        writer.take_new().unwrap();
        for read_only in [false, true] {
            let refused = open(&file, read_only).take_new().unwrap_err().to_string();
            assert!(refused.contains(file.path().to_str().unwrap()), "{refused}");
            assert!(refused.contains("another guest"), "{refused}");
        }
        drop(writer);
        let readers = [open(&file, true), open(&file, true)];
        readers.iter().for_each(|reader| reader.take_new().unwrap());
        assert!(open(&file, false).take_new().is_err());
        drop(readers);
        open(&file, false).take_new().unwrap();
    }

    /// During the whole migration no other guest can take it.
    #[test]
    fn disk_locks_move_with_the_guest() {
        let _alone = no_process_starts();
        let file = image();
        let assert_no_other_guest = || {
            for read_only in [false, true] {
                assert!(open(&file, read_only).take_new().is_err());
            }
        };
        let (source, destination) = (open(&file, false), open(&file, false));
        source.take_new().unwrap();
        destination.expect().unwrap();
        assert!(destination.take().is_err(), "it runs at the source");
        assert_no_other_guest();
        source.prepare_switchover();
        assert_no_other_guest();
        destination.take().unwrap();
        assert!(source.take().is_err(), "it runs at the destination");
        assert_no_other_guest();
        source.release();
        assert_no_other_guest();
        destination.release();
        open(&file, false).take_new().unwrap();
    }

    #[test]
    fn disk_locks_return_after_an_aborted_switchover() {
        let _alone = no_process_starts();
        let file = image();
        let (source, destination) = (open(&file, false), open(&file, false));
        source.take_new().unwrap();
        destination.expect().unwrap();
        source.prepare_switchover();
        // The destination refused the guest.
        destination.release();
        assert!(open(&file, false).take_new().is_err());
        source.take().unwrap();
        assert!(destination.take().is_err());
        drop(source);
        destination.take().unwrap();
    }

    #[test]
    fn both_sides_can_have_a_read_only_disk_at_once() {
        let _alone = no_process_starts();
        let file = image();
        let (source, destination) = (open(&file, true), open(&file, true));
        source.take_new().unwrap();
        destination.expect().unwrap();
        source.prepare_switchover();
        destination.take().unwrap();
        source.take().unwrap();
        // But not while another guest writes to it.
        source.release();
        destination.release();
        let writer = open(&file, false);
        writer.take_new().unwrap();
        writer.prepare_switchover();
        assert!(destination.expect().is_err());
    }

    /// The lock identifies the disk on other hosts too.
    #[test]
    fn a_disk_is_recognized_by_the_lock_of_its_guest() {
        let _alone = no_process_starts();
        let (file, other) = (image(), image());
        let source = open(&file, false);
        let guest_disks = source.describe(&|| Ok(())).unwrap();
        assert_eq!((guest_disks.shape, guest_disks.limits), (source.shape(), source.limits()));
        let token = guest_disks.identity.token;
        let sees = |file: &NamedTempFile| {
            let range = lock::token_range(token.unwrap());
            lock::is_shared(&open(file, false).file, range).unwrap()
        };
        assert!(sees(&file) && !sees(&other));
        let guest_disks = [guest_disks];
        open(&file, false).check(&guest_disks, 0, &|| Ok(())).unwrap();
        open(&other, false).check(&guest_disks, 0, &|| Ok(())).unwrap_err();
        // Also with the file open and locked here, but not after the source has released it.
        let destination = open(&file, false);
        destination.describe(&|| Ok(())).unwrap();
        assert!(sees(&file));
        source.release();
        assert!(!sees(&file));
    }

    /// Between two hosts that see each other's locks: disks with the same contents, such as mirrors
    /// and copies of one image.
    #[test]
    fn disks_with_the_same_contents_are_told_apart_by_their_locks() {
        let _alone = no_process_starts();
        let files = [image(), image(), image(), image()];
        let sources = [open(&files[0], false), open(&files[1], false)];
        let guest_disks = sources.each_ref().map(|source| {
            source.take_new().unwrap();
            let disk = source.describe(&|| Ok(())).unwrap();
            GuestDisk { identity: disk.identity.elsewhere(), ..disk }
        });
        let check =
            |file: usize, index| open(&files[file], false).check(&guest_disks, index, &|| Ok(()));
        assert_eq!((check(0, 0), check(1, 1)), (Ok(()), Ok(())));
        for (file, index) in [(1, 0), (0, 1)] {
            let DiskMismatch { why, index } = check(file, index).unwrap_err();
            assert_eq!(why, format!("is locked as disk {} of the guest", file + 1));
            assert_eq!(index, Some(file));
        }
        // Another guest's disk, running, migrating or of another VMM.
        let other = open(&files[2], false);
        other.take_new().unwrap();
        assert!(check(2, 0).unwrap_err().why.contains("not by the guest's source"));
        other.prepare_switchover();
        assert!(check(2, 0).unwrap_err().why.contains("not by the guest's source"));
        // An unlocked disk may be the same storage through a path without locks.
        check(3, 0).unwrap();
    }

    #[test]
    fn a_system_call_that_a_signal_interrupts_is_repeated() {
        let mut answers = [Err(Errno::INTR), Err(Errno::INTR), Err(Errno::NOSPC)].into_iter();
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Err(Errno::NOSPC));
        assert_eq!(answers.next(), None);
    }

    #[test]
    fn a_file_system_without_locks_is_accepted() {
        let disk = open(&image(), false);
        for error in [Errno::NOLCK, Errno::OPNOTSUPP, Errno::INVAL] {
            disk.allowed(Err(error.into())).unwrap();
        }
    }
}
