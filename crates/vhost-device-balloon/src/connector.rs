//! Connects to front ends that listen (QEMU's `server=on`, Cloud Hypervisor's server
//! mode), and reconnects.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::error::Error;

/// Interval of connection attempts. A guest that starts may wait this long for its balloon.
pub(crate) const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// A front end's listening socket.
#[derive(Debug)]
pub(crate) struct Connector {
    address: SocketAddrUnix,
    path: PathBuf,
}

impl Connector {
    pub(crate) fn new(path: &Path) -> Result<Self, Error> {
        let address = SocketAddrUnix::new(path)
            .map_err(|e| Error::Connect { path: path.to_owned(), source: e.into() })?;
        Ok(Self { address, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Connects. Returns `None` if no process listens.
    pub(crate) fn connect(&self) -> Result<Option<UnixStream>, Error> {
        let failed = |source: io::Error| Error::Connect { path: self.path.clone(), source };
        // Non-blocking: `connect` would block if the front end's backlog is full.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed(e.into()))?;
        match connect(&socket, &self.address) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(failed(error.into())),
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Some(stream))
    }
}
