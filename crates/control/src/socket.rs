//! The server's end of a Unix socket, as a file: who may use it, what it may replace,
//! and whose it is when it is to be removed.
//!
//! A socket for its owner alone has mode 0600 from its first moment: Linux takes the
//! mode of a new socket file from the mode of the socket itself, less the umask, so
//! setting that mode before `bind` leaves no window, and no umask has to be changed for
//! all threads of the process (net/unix/af_unix.c, `unix_bind_bsd`).

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf, absolute};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::ControlError;

/// Longest path of a socket, in bytes: `sun_path` has 108, one is the final NUL.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Connections the kernel keeps before they are accepted.
const BACKLOG: i32 = 64;

/// Time to wait for another process that starts in the same directory. It needs
/// microseconds; whoever holds the lock longer is no starting server.
const DIRECTORY_LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Time between two looks at that lock; `flock` cannot wait with a time-out.
const DIRECTORY_LOCK_RETRY: Duration = Duration::from_millis(10);

/// Permission bits by which others than the owner can open a directory, and so lock it.
const OTHERS_OPEN: u32 = 0o044;

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketAccess {
    /// Its owner alone (mode 0600).
    Owner,
    /// Whoever the umask of this process leaves it to.
    Umask,
}

/// A socket file, removed on drop if it is still ours: who came later may have put another
/// in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |found: &fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).as_ref().is_ok_and(ours) {
            // Nobody is left to be told; the next server replaces a stale file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds and listens, replacing what a dead process left behind. The listener
/// does not block.
///
/// The file comes first, as it has to be dropped: a listener that is closed while the file is
/// there leaves a socket to which nobody can connect, and which a successor replaces.
///
/// # Errors
/// Another process listens there, something else is there, or the host refuses.
pub fn listen_on(
    path: &Path,
    access: SocketAccess,
) -> Result<(SocketFile, UnixListener), ControlError> {
    let path = &absolute(path).map_err(ControlError::io("resolve", path))?;
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        let limit_bytes = MAX_SOCKET_PATH_BYTES;
        return Err(ControlError::PathTooLong { path: path.clone(), limit_bytes });
    }
    let address = SocketAddrUnix::new(path).map_err(ControlError::io("bind", path))?;
    // Held until the socket listens, so that nobody takes it for a stale one
    // in between, nor replaces it.
    let _lock = lock_directory(path.parent().unwrap_or(Path::new("/")), DIRECTORY_LOCK_TIMEOUT)?;
    remove_stale(path, &address)?;

    let socket = new_socket().map_err(ControlError::io("create a socket for", path))?;
    if access == SocketAccess::Owner {
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(ControlError::io("protect", path))?;
    }
    net::bind(&socket, &address).map_err(ControlError::io("bind", path))?;
    let found = fs::symlink_metadata(path).map_err(ControlError::io("read", path))?;
    let file = SocketFile { path: path.clone(), device: found.dev(), inode: found.ino() };
    if access == SocketAccess::Owner && found.mode() & 0o777 & !0o600 != 0 {
        // Only a kernel that ignores the mode of the socket can bring us here.
        return Err(ControlError::io("protect", path)(io::Error::other(
            "its mode is wider than 0600",
        )));
    }
    net::listen(&socket, BACKLOG).map_err(ControlError::io("listen on", path))?;
    Ok((file, UnixListener::from(socket)))
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes the socket file of a dead process; refuses anything else.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ControlError> {
    match fs::symlink_metadata(path) {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ControlError::io("read", path)(source)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ControlError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let probe = new_socket().map_err(ControlError::io("create a socket for", path))?;
    match net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(ControlError::io("replace", path)),
        Err(Errno::NOENT) => Ok(()),
        // A full backlog, or a socket of another type: somebody lives there.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            Err(ControlError::SocketInUse { path: path.to_owned() })
        }
        Err(error) => Err(ControlError::io("connect to", path)(error)),
    }
}

/// Keeps other servers that start in `directory` waiting, as long as the file is open.
///
/// Whoever can open a directory can lock it, for as long as they like. So where others can,
/// a lock that is not to be had is no reason not to start: it only keeps two servers apart
/// that begin with the same socket in the same moment.
fn lock_directory(directory: &Path, timeout: Duration) -> Result<Option<File>, ControlError> {
    let file = File::open(directory).map_err(ControlError::io("open", directory))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            // The call does not wait, so a signal is all that can have come between.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(source)) => {
                return Err(ControlError::io("lock", directory)(source));
            }
            Err(TryLockError::WouldBlock) if start.elapsed() > timeout => break,
            Err(TryLockError::WouldBlock) => thread::sleep(DIRECTORY_LOCK_RETRY),
        }
    }
    let found = file.metadata().map_err(ControlError::io("read", directory))?;
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if ours && found.mode() & OTHERS_OPEN == 0 {
        return Err(ControlError::io("lock", directory)(io::Error::other(
            "another process of this user holds a lock (flock) on it",
        )));
    }
    tracing::warn!(
        directory = %directory.display(),
        waited_ms = timeout.as_millis(),
        "another process holds a lock on the directory of the socket, which other users can \
         open; going on without it: `lslocks` says who that is"
    );
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Short, so that a test need not wait; nobody releases the lock meanwhile.
    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_lock_that_others_can_take_keeps_nobody_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let other = File::open(dir.path()).unwrap();
        other.lock().unwrap();
        for (mode, starts) in [(0o700, false), (0o711, false), (0o755, true), (0o1777, true)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let locked = lock_directory(dir.path(), SHORT);
            assert_eq!(locked.is_ok(), starts, "mode {mode:o}: {locked:?}");
            assert!(!locked.is_ok_and(|lock| lock.is_some()));
        }
        drop(other);
        assert!(lock_directory(dir.path(), SHORT).unwrap().is_some());
    }
}
