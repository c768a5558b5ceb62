//! Locks on a disk's file, so that no two guests are given it by mistake.
//!
//! They belong to the open file (`F_OFD_SETLK`, fcntl(2)): the kernel ends them with it, however a
//! process ends, and network file systems pass them on. They are advice: whoever does not ask is
//! kept from nothing.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A part of the file, which need not have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    start: i64,
    bytes: i64,
}

/// Where no file has bytes.
const FAR: i64 = 1 << 62;

/// Locked by whose guest runs, alone where it writes. Other monitors lock bytes in it (QEMU those
/// from 100 to 299), and are kept off as well.
pub(super) const RUNS: Part = Part { start: 0, bytes: FAR };

/// Locked, beside others, by who has a guest that writes, whether it runs or not. While one changes
/// sides nobody has the other part, and this says that nobody may begin with the file.
pub(super) const KEEPS: Part = Part { start: FAR, bytes: 1 };

/// Locked by who tells another host which disk its guest has: a byte that no other disk's guest has
/// locked. Who sees this lock has the same file.
pub(super) const fn token_part(token: u64) -> Part {
    // Behind the others, and below where an offset ends.
    Part { start: FAR + 1 + (token >> 8).cast_signed(), bytes: 1 }
}

/// How a part is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// Beside others who do the same.
    Shared,
    /// Beside nobody.
    Alone,
    /// Not any more.
    Not,
}

/// Locks, or unlocks; false where somebody else's lock is in the way.
///
/// # Errors
/// Such a file cannot be locked.
pub(super) fn hold(file: &File, part: Part, hold: Hold) -> io::Result<bool> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&words(part, hold))) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            // A signal came while a network file system was asked.
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether nobody else has any lock there.
///
/// # Errors
/// Such a file cannot be locked.
pub(super) fn is_free(file: &File, part: Part) -> io::Result<bool> {
    loop {
        let mut words = words(part, Hold::Alone);
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut words)) {
            Ok(_) => return Ok(i32::from(words.l_type) == libc::F_UNLCK),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether somebody else has locked just this part, beside others.
///
/// # Errors
/// Such a file cannot be locked.
pub(super) fn is_shared(file: &File, part: Part) -> io::Result<bool> {
    let mut words = words(part, Hold::Alone);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut words))?;
    let found = (i32::from(words.l_type), words.l_start, words.l_len);
    Ok(found == (libc::F_RDLCK, part.start, part.bytes))
}

fn words(part: Part, hold: Hold) -> libc::flock {
    let kind = match hold {
        Hold::Shared => libc::F_RDLCK,
        Hold::Alone => libc::F_WRLCK,
        Hold::Not => libc::F_UNLCK,
    };
    libc::flock {
        // Small numbers, both.
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: part.start,
        l_len: part.bytes,
        // Must be 0: these locks are no process's.
        l_pid: 0,
    }
}
