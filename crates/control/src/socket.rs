//! A listening Unix socket as a file: its permissions, what it may replace, and when it is removed.
//!
//! A socket restricted to its owner has mode 0600 from its creation: Linux derives the mode of a
//! new socket file from the mode of the socket itself, less the umask. So setting that mode before
//! `bind` leaves no window and needs no change of the process-wide umask (net/unix/af_unix.c,
//! `unix_bind_bsd`).

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

/// Longest socket path in bytes: `sun_path` has 108, including the final NUL.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Connections queued by the kernel until they are accepted.
const BACKLOG: i32 = 64;

/// Longest wait for another process that starts in the same directory. A starting server holds the
/// lock for microseconds; a process that holds it longer is not one.
const DIRECTORY_LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Polling interval for that lock; `flock` has no timeout.
const DIRECTORY_LOCK_RETRY: Duration = Duration::from_millis(10);

/// Permission bits with which users other than the owner can open, and so lock, a directory.
const OTHERS_OPEN: u32 = 0o044;

/// Which users may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketAccess {
    /// The owner only (mode 0600).
    Owner,
    /// As the umask of this process allows.
    Umask,
}

/// A socket file, removed on drop unless another process has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Returns the absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |found: &fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).as_ref().is_ok_and(ours) {
            // On an error the file stays; the next server replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds and listens, replacing the socket of an exited process. The listener is non-blocking.
///
/// The returned file must be dropped before the listener: a listener closed while the file exists
/// leaves a socket that refuses connections and that a successor replaces.
///
/// # Errors
/// Another process listens there, the path is not a socket, or a system call fails.
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
    // Held until the socket listens, so that no other process takes it for a stale one and replaces
    // it in between.
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
        // Reached only on a kernel that ignores the mode of the socket.
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

/// Removes the socket file of an exited process; returns an error for anything else.
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
        // A full backlog, or a socket of another type: it is in use.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            Err(ControlError::SocketInUse { path: path.to_owned() })
        }
        Err(error) => Err(ControlError::io("connect to", path)(error)),
    }
}

/// Locks `directory` against other servers that start there, until the file is closed.
///
/// A user who can open a directory can lock it indefinitely. So if other users can, failing to get
/// the lock is not an error: it only separates two servers that start with the same socket at the
/// same moment.
fn lock_directory(directory: &Path, timeout: Duration) -> Result<Option<File>, ControlError> {
    let file = File::open(directory).map_err(ControlError::io("open", directory))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            // The call does not block, so only a signal can interrupt it.
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
        "operator: another process holds a lock on the socket's directory, which other users can \
        open; continuing without the lock: `lslocks` shows that process"
    );
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Short: no other thread releases the lock.
    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_lock_that_other_users_can_take_does_not_block_startup() {
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
