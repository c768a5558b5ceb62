//! File locks that keep two guests from using one disk by mistake.
//!
//! They are open file description locks (`F_OFD_SETLK`, fcntl(2)): the kernel releases them however
//! the process ends, and network file systems forward them. They are advisory: a process that does
//! not check them is not kept out.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A range of byte offsets to lock. The file need not be that long.
#[derive(Clone, Copy, Debug)]
pub(super) struct LockRange {
    start: i64,
    bytes: i64,
}

/// An offset beyond the end of any file.
const LOCK_BASE: i64 = 1 << 62;

/// Locked while the guest runs: exclusively if it writes. Other VMMs lock bytes in this range
/// (QEMU: 100 to 299), and so conflict with it too.
pub(super) const RUN_LOCK: LockRange = LockRange { start: 0, bytes: LOCK_BASE };

/// Locked, shared, by each process that has a writing guest, whether the guest runs or not. During
/// a switchover no process has [`RUN_LOCK`]; this lock then keeps new guests from taking the file.
pub(super) const GUEST_LOCK: LockRange = LockRange { start: LOCK_BASE, bytes: 1 };

/// Locked by a source that describes its disk: a byte that no other disk's guest locks. A host that
/// sees this lock has the same file.
pub(super) const fn token_range(token: u64) -> LockRange {
    // Behind the other ranges, and below the maximum offset.
    LockRange { start: LOCK_BASE + 1 + (token >> 8).cast_signed(), bytes: 1 }
}

/// How to lock a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    Shared,
    Exclusive,
    Unlock,
}

/// Locks or unlocks a range; false if another lock conflicts.
///
/// # Errors
/// The file system does not support locks.
pub(super) fn set(file: &File, range: LockRange, mode: LockMode) -> io::Result<bool> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&flock(range, mode))) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            // A signal interrupted a request to a network file system.
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns whether no other lock overlaps the range.
///
/// # Errors
/// The file system does not support locks.
pub(super) fn is_free(file: &File, range: LockRange) -> io::Result<bool> {
    loop {
        let mut flock = flock(range, LockMode::Exclusive);
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut flock)) {
            Ok(_) => return Ok(i32::from(flock.l_type) == libc::F_UNLCK),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns whether another process has a shared lock on exactly this range.
///
/// # Errors
/// The file system does not support locks.
pub(super) fn is_shared(file: &File, range: LockRange) -> io::Result<bool> {
    let mut flock = flock(range, LockMode::Exclusive);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut flock))?;
    let found = (i32::from(flock.l_type), flock.l_start, flock.l_len);
    Ok(found == (libc::F_RDLCK, range.start, range.bytes))
}

fn flock(range: LockRange, mode: LockMode) -> libc::flock {
    let kind = match mode {
        LockMode::Shared => libc::F_RDLCK,
        LockMode::Exclusive => libc::F_WRLCK,
        LockMode::Unlock => libc::F_UNLCK,
    };
    libc::flock {
        // Both are small numbers.
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: range.start,
        l_len: range.bytes,
        // Must be 0 for open file description locks.
        l_pid: 0,
    }
}
