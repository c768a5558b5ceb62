//! The file behind a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

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

/// What of a disk its guest can see, which does not change with its host.
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
        Ok(Self { file, shape: DiskShape { sectors: bytes / SECTOR_BYTES, read_only }, path })
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

    /// All that was written is on the disk behind it.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.shape.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// Gives the file's blocks back, which read as zeros then; where it can have no holes nothing
    /// happens.
    pub(crate) fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, at, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Makes it zeros, of which the file need not keep any where it `may_unmap`.
    pub(crate) fn write_zeroes(&self, at: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, at, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            done => return Ok(done?),
        }
        let (mut at, end) = (at, at + bytes);
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write(ZEROS.get(..len).unwrap_or_default(), at)?;
            at += len as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
impl DiskFile {
    /// A disk that takes everything and can be sure of nothing: `fdatasync` fails there.
    pub(super) fn that_cannot_sync(sectors: u64) -> Self {
        let path = PathBuf::from("/dev/null");
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Self { file, path, shape: DiskShape { sectors, read_only: false } }
    }
}
