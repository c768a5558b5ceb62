//! The file behind a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::identity::{Candidate, DiskIdentity, Locks, new_token};
use super::limits::DiskLimits;
use super::lock::{self, Hold, KEEPS, RUNS};
use crate::error::Error;

/// Bytes of the unit that requests count in.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Zeros that are written at once where a file system cannot make holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A disk, as its operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// A file of whole sectors of 512 bytes, or a block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// What of a disk its guest can see, which must be the same on every host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskShape {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
}

/// The open file.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    path: PathBuf,
    shape: DiskShape,
    /// As the host has it.
    limits: DiskLimits,
    /// As the guest was told on another host.
    told: OnceLock<DiskLimits>,
    /// What is given back or cleared by the host only whole, in bytes.
    unit_bytes: u64,
    /// Where a lock says that it is this disk.
    token: u64,
    /// An error of writing what the guest wrote, of which the guest has not heard (its number).
    unheard: Mutex<Option<i32>>,
}

/// A disk as a guest had it on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    pub(crate) shape: DiskShape,
    pub(crate) limits: DiskLimits,
    pub(crate) identity: DiskIdentity,
}

/// A disk that is not the one it was to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NotThis {
    /// What was compared, or why it cannot be known.
    pub(crate) why: String,
    /// The index of the guest's disk that it is.
    pub(crate) index: Option<usize>,
}

impl DiskFile {
    /// # Errors
    /// It cannot be opened, or is of no size that a disk can have.
    pub(crate) fn open(options: &DiskOptions) -> Result<Self, Error> {
        let DiskOptions { path, read_only } = options.clone();
        let wrong = |source| Error::File { path: path.clone(), source };
        let file = OpenOptions::new().read(true).write(!read_only).open(&path).map_err(wrong)?;
        // Also the size of a block device, which metadata do not have.
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|error| wrong(error.into()))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            let what = format!(
                "{} has {bytes} bytes: a disk has sectors of {SECTOR_BYTES}",
                path.display()
            );
            return Err(Error::Option { what });
        }
        let (limits, unit_bytes) = DiskLimits::of(&file.metadata().map_err(wrong)?);
        let shape = DiskShape { sectors: bytes / SECTOR_BYTES, read_only };
        let (told, token, unheard) = (OnceLock::new(), new_token(), Mutex::default());
        Ok(Self { file, path, shape, limits, told, unit_bytes, token, unheard })
    }

    /// A file that gives back and clears only whole units, as a block device does.
    pub(crate) const fn in_units(mut self, unit_bytes: u64) -> Self {
        self.unit_bytes = unit_bytes;
        self
    }

    /// What the guest is told of how to use it.
    pub(crate) fn limits(&self) -> DiskLimits {
        *self.told.get().unwrap_or(&self.limits)
    }

    /// The guest was told so on another host. Whatever it asks for is carried out here as well.
    pub(crate) fn keep_limits(&self, told: DiskLimits) {
        let here = self.limits;
        if told.block_bytes < here.block_bytes {
            let disk = self.path.display();
            let (told, here) = (told.block_bytes, here.block_bytes);
            tracing::warn!(%disk, told, here, "host: larger blocks than the guest knows of");
        }
        // Once: a guest arrives once.
        let _ = self.told.set(told);
    }

    /// The disk as another host may have to know it again. Calls `step` after each read, which may
    /// end it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn describe(&self, step: &dyn Fn() -> io::Result<()>) -> io::Result<GuestDisk> {
        let locked = lock::hold(&self.file, lock::token_part(self.token), Hold::Shared);
        let token = Some(self.token).filter(|_| matches!(locked, Ok(true)));
        let identity = DiskIdentity::of(&self.path, &self.file, self.shape.sectors, token, step)?;
        Ok(GuestDisk { shape: self.shape, limits: self.limits(), identity })
    }

    /// Whether it is the disk of this index of those that a guest had. Calls `step` after each read,
    /// which may end it.
    ///
    /// # Errors
    /// It is not, or it cannot be known.
    pub(crate) fn check(
        &self,
        had: &[GuestDisk],
        index: usize,
        step: &dyn Fn() -> io::Result<()>,
    ) -> Result<(), NotThis> {
        let DiskShape { sectors, read_only } = self.shape;
        let here = Candidate::new(&self.file, read_only, sectors, step);
        let is = |index: usize, disk: &GuestDisk| {
            let locks = self.locks(had, index);
            let _ = step();
            disk.identity.check(&here, locks)
        };
        let this = had.get(index).ok_or_else(|| "is one more than it had".to_owned());
        let Err(why) = this.and_then(|disk| is(index, disk)) else { return Ok(()) };
        let mut others = had.iter().enumerate();
        let other = others.find(|(at, disk)| disk.shape == self.shape && is(*at, disk).is_ok());
        Err(NotThis { why, index: other.map(|(at, _)| at) })
    }

    /// What locks of others say. Where they cannot be asked for there are none.
    fn locks(&self, had: &[GuestDisk], index: usize) -> Locks {
        let is_locked_as = |disk: &GuestDisk| {
            let part = disk.identity.token.map(lock::token_part);
            part.is_some_and(|part| lock::is_shared(&self.file, part).unwrap_or(false))
        };
        if had.get(index).is_some_and(is_locked_as) {
            return Locks::ThisDisk;
        }
        if let Some((number, _)) = (1..).zip(had).find(|(_, disk)| is_locked_as(disk)) {
            return Locks::OtherDisk(number);
        }
        let is_free = |part| lock::is_free(&self.file, part).unwrap_or(true);
        if is_free(RUNS) && is_free(KEEPS) { Locks::Unseen } else { Locks::OtherGuest }
    }

    /// The file is for a guest that begins here.
    ///
    /// # Errors
    /// Another guest has it, be it on its way.
    pub(crate) fn take_new(&self) -> Result<(), Error> {
        self.take()?;
        let begun = self.allowed(lock::is_free(&self.file, KEEPS)).and_then(|()| self.keep());
        begun.inspect_err(|_| self.release())
    }

    /// The file is for a guest that is to come: what can be had of it while its source still has
    /// it, which is all where both only read.
    ///
    /// # Errors
    /// A guest has it that is not the one to come.
    pub(crate) fn expect(&self) -> Result<(), Error> {
        if self.shape.read_only { self.take_new() } else { self.keep() }
    }

    /// The guest is about to run.
    ///
    /// # Errors
    /// It runs on the other side, or another guest has the file.
    pub(crate) fn take(&self) -> Result<(), Error> {
        let hold = if self.shape.read_only { Hold::Shared } else { Hold::Alone };
        self.allowed(lock::hold(&self.file, RUNS, hold))
    }

    /// The other side may run the guest from now on. It is still here as well, so nobody else may
    /// have the file.
    pub(crate) fn prepare_switchover(&self) {
        if !self.shape.read_only {
            self.unlock(RUNS);
        }
    }

    /// The guest is not here any more.
    pub(crate) fn release(&self) {
        self.unlock(RUNS);
        self.unlock(KEEPS);
        self.unlock(lock::token_part(self.token));
    }

    fn keep(&self) -> Result<(), Error> {
        if self.shape.read_only {
            return Ok(());
        }
        self.allowed(lock::hold(&self.file, KEEPS, Hold::Shared))
    }

    /// Where a file system knows no locks, a guest goes without: it would be worse to have none.
    fn allowed(&self, locked: io::Result<bool>) -> Result<(), Error> {
        match locked {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Error::InUse { path: self.path.clone() }),
            Err(error) => {
                let disk = self.path.display();
                tracing::warn!(%disk, %error, "host: no lock; take care that no two guests use it");
            }
        }
        Ok(())
    }

    fn unlock(&self, part: lock::Part) {
        // Where it cannot be, nothing was locked.
        let _ = lock::hold(&self.file, part, Hold::Not);
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

    /// All that was written is on the disk behind it, as its guest wants to know.
    ///
    /// # Errors
    /// Some of it is not, be it that [`sync`](Self::sync) heard so.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.shape.read_only {
            return Ok(());
        }
        let mut unheard = self.unheard();
        let synced = self.file.sync_data();
        let earlier =
            unheard.take().map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)));
        synced.and(earlier)
    }

    /// The same for this process, which keeps an error for the guest's next [flush](Self::flush):
    /// the kernel tells each to the first who asks, and to nobody else who has the file by this
    /// descriptor.
    ///
    /// # Errors
    /// Some of it is not, also where that was found out before and the guest has not heard of it.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.shape.read_only {
            return Ok(());
        }
        let mut unheard = self.unheard();
        if let Err(error) = self.file.sync_data() {
            *unheard = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        unheard.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }

    /// The guest was not told of this error of its [flush](Self::flush), and is told by the next.
    pub(crate) fn keep_error(&self, error: i32) {
        self.unheard().get_or_insert(error);
    }

    /// Held while the kernel is asked, so that no flush succeeds because a sync beside it was told
    /// of the error. Only these two take it, and each would wait for the same data as the other.
    fn unheard(&self) -> MutexGuard<'_, Option<i32>> {
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives blocks back, which read as zeros then. What the host does not give back stays as it is,
    /// which a guest that discards has to expect (virtio 1.3, 5.2.6.2): parts of its blocks, and all
    /// where it can have no holes.
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

    /// Makes it zeros, of which the file need not keep any where it `may_unmap`.
    pub(crate) fn write_zeroes(&self, at: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let (start, end) = self.whole_units(at, bytes);
        // Whatever is the reason that it cannot be told so: writing shows whether it can be done.
        if start == end || self.allocate(how, start, end - start).is_err() {
            return self.write_zeros(at, at + bytes);
        }
        self.write_zeros(at, start)?;
        self.write_zeros(end, at + bytes)
    }

    /// The part that has whole units of the host; an empty one at its beginning where there is none.
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

/// Makes a call once more that a signal cut short: a pause of the guest or another thread's
/// profiler is no error of its disk. The calls here do the same when they are made twice.
fn uninterrupted(call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(call)
}

#[cfg(test)]
impl DiskFile {
    /// A disk that takes everything and can be sure of nothing: `fdatasync` fails there.
    pub(super) fn that_cannot_sync(sectors: u64) -> Self {
        let path = PathBuf::from("/dev/null");
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let shape = DiskShape { sectors, read_only: false };
        let limits = DiskLimits::of_file_system(SECTOR_BYTES);
        let (told, unheard) = (OnceLock::new(), Mutex::default());
        Self { file, path, shape, limits, told, unit_bytes: 1, token: 0, unheard }
    }
}

/// Held where locks of files are tried, and where a process is started: until it runs its program
/// it has a copy of every open file, and with it the locks.
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
    fn a_disk_is_one_writers_or_many_readers() {
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

    /// Nobody else begins with it from the first moment to the last.
    #[test]
    fn a_disk_goes_with_its_guest() {
        let _alone = no_process_starts();
        let file = image();
        let nobody_else = || {
            for read_only in [false, true] {
                assert!(open(&file, read_only).take_new().is_err());
            }
        };
        let (source, destination) = (open(&file, false), open(&file, false));
        source.take_new().unwrap();
        destination.expect().unwrap();
        assert!(destination.take().is_err(), "it runs at the source");
        nobody_else();
        source.prepare_switchover();
        nobody_else();
        destination.take().unwrap();
        assert!(source.take().is_err(), "it runs at the destination");
        nobody_else();
        source.release();
        nobody_else();
        destination.release();
        open(&file, false).take_new().unwrap();
    }

    #[test]
    fn a_disk_comes_back_with_its_guest() {
        let _alone = no_process_starts();
        let file = image();
        let (source, destination) = (open(&file, false), open(&file, false));
        source.take_new().unwrap();
        destination.expect().unwrap();
        source.prepare_switchover();
        // It was refused.
        destination.release();
        assert!(open(&file, false).take_new().is_err());
        source.take().unwrap();
        assert!(destination.take().is_err());
        drop(source);
        destination.take().unwrap();
    }

    #[test]
    fn what_is_only_read_is_had_by_both_sides_at_once() {
        let _alone = no_process_starts();
        let file = image();
        let (source, destination) = (open(&file, true), open(&file, true));
        source.take_new().unwrap();
        destination.expect().unwrap();
        source.prepare_switchover();
        destination.take().unwrap();
        source.take().unwrap();
        // And not of a guest that writes.
        source.release();
        destination.release();
        let writer = open(&file, false);
        writer.take_new().unwrap();
        writer.prepare_switchover();
        assert!(destination.expect().is_err());
    }

    /// By a lock, which says so for a file of another host too.
    #[test]
    fn a_disk_is_known_by_the_lock_of_its_guest() {
        let _alone = no_process_starts();
        let (file, other) = (image(), image());
        let source = open(&file, false);
        let had = source.describe(&|| Ok(())).unwrap();
        assert_eq!((had.shape, had.limits), (source.shape(), source.limits()));
        let token = had.identity.token;
        let sees = |file: &NamedTempFile| {
            let part = lock::token_part(token.unwrap());
            lock::is_shared(&open(file, false).file, part).unwrap()
        };
        assert!(sees(&file) && !sees(&other));
        let had = [had];
        open(&file, false).check(&had, 0, &|| Ok(())).unwrap();
        open(&other, false).check(&had, 0, &|| Ok(())).unwrap_err();
        // Also to who has the file already, and not when its guest is gone.
        let destination = open(&file, false);
        destination.describe(&|| Ok(())).unwrap();
        assert!(sees(&file));
        source.release();
        assert!(!sees(&file));
    }

    /// Between two hosts, whose locks both see: disks that have the same in them, as those of a
    /// mirror and copies of one image do.
    #[test]
    fn disks_with_the_same_contents_are_told_apart_by_their_locks() {
        let _alone = no_process_starts();
        let files = [image(), image(), image(), image()];
        let sources = [open(&files[0], false), open(&files[1], false)];
        let had = sources.each_ref().map(|source| {
            source.take_new().unwrap();
            let disk = source.describe(&|| Ok(())).unwrap();
            GuestDisk { identity: disk.identity.elsewhere(), ..disk }
        });
        let check = |file: usize, index| open(&files[file], false).check(&had, index, &|| Ok(()));
        assert_eq!((check(0, 0), check(1, 1)), (Ok(()), Ok(())));
        for (file, index) in [(1, 0), (0, 1)] {
            let NotThis { why, index } = check(file, index).unwrap_err();
            assert_eq!(why, format!("is locked as disk {} of the guest", file + 1));
            assert_eq!(index, Some(file));
        }
        // Another guest's, be it on its way or by another VMM.
        let other = open(&files[2], false);
        other.take_new().unwrap();
        assert!(check(2, 0).unwrap_err().why.contains("not by the guest's source"));
        other.prepare_switchover();
        assert!(check(2, 0).unwrap_err().why.contains("not by the guest's source"));
        // Nobody's, which may be the same storage by a way that has no locks.
        check(3, 0).unwrap();
    }

    #[test]
    fn a_signal_is_no_error_of_the_disk() {
        let mut answers = [Err(Errno::INTR), Err(Errno::INTR), Err(Errno::NOSPC)].into_iter();
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Err(Errno::NOSPC));
        assert_eq!(answers.next(), None);
    }

    #[test]
    fn where_there_are_no_locks_a_guest_goes_without() {
        let disk = open(&image(), false);
        for error in [Errno::NOLCK, Errno::OPNOTSUPP, Errno::INVAL] {
            disk.allowed(Err(error.into())).unwrap();
        }
    }
}
