//! A process that serves several guests, each with its own thread and sockets.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use balloon_abi::Features;
use balloon_host::Ending;
use control::api::{PartialHuge, ReleaseMode};
use control::{Server, SocketAccess, SocketFile, listen_on};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::connector::Connector;
use crate::error::Error;
use crate::server::{BACKOFF, Backend, FrontEndSource};

/// Most file descriptors of one guest: 32 memory regions, as many again in a message that is
/// being received, 3 per queue, 64 connections of the control API, and a few more.
const FILES_PER_GUEST: u64 = 160;

/// File descriptors of the process itself.
const FILES_OF_PROCESS: u64 = 32;

/// Options of one guest.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// The front end listens on the socket, and the back end connects.
    pub connect: bool,
    /// Name of the guest.
    pub name: String,
    /// Path of the control API's socket.
    pub control: PathBuf,
    /// Path of the state file, if there is one.
    pub state: Option<PathBuf>,
    /// When memory is released.
    pub release: ReleaseMode,
    /// How partial huge pages are released.
    pub partial_huge: PartialHuge,
    /// Features that the device does not offer.
    pub without: Features,
    /// Guest memory must be sealed against shrinking. Otherwise a file that shrinks while it is
    /// mapped ends the session on the next access.
    pub sealed_only: bool,
    /// Limit of guest memory in bytes; `None` is four times the host's memory.
    pub max_memory_bytes: Option<u64>,
    /// Time of busy polling after each message.
    pub busy_poll: Duration,
}

/// Guests whose sockets exist, and which are not served yet.
pub struct Service {
    guests: Vec<Guest>,
    ending: Arc<Ending>,
}

/// One guest. Its control API is served from the start.
struct Guest {
    name: String,
    backend: Backend,
    front_ends: FrontEnds,
    _control: Server,
}

/// Source of a guest's front-end connections.
enum FrontEnds {
    /// The drop order matters: the socket's path is removed before the listener is closed, so
    /// that no front end finds a dead socket and no successor replaces it meanwhile.
    Accepted(SocketFile, UnixListener),
    Connected(Connector),
}

impl Service {
    /// Creates the sockets of all guests. After it returns, the service uses the file system only
    /// to remove the sockets.
    ///
    /// # Errors
    /// A socket or a state file cannot be created.
    pub fn start(options: &[ServiceOptions]) -> Result<Self, Error> {
        let ending = Ending::watch();
        let ending = ending.map_err(|source| Error::Host { what: "signal handling", source })?;
        allow_files(FILES_OF_PROCESS + FILES_PER_GUEST * options.len() as u64)?;
        let guests = options.iter().map(Guest::start).collect::<Result<_, _>>()?;
        // From now on the shutdown must remove sockets.
        ending.set_orderly();
        Ok(Self { guests, ending })
    }

    /// Serves until the shutdown. An error of one guest does not affect the others.
    ///
    /// # Errors
    /// The first guest's error, after all have ended. A front end's fault ends only its own
    /// session.
    pub fn serve(self) -> Result<(), Error> {
        let threads = self.guests.into_iter().map(|guest| {
            let ending = Arc::clone(&self.ending);
            let thread = thread::Builder::new().name(format!("guest {}", guest.name));
            let spawned = thread.spawn(move || guest.serve_despite_panics(&ending.shutdown_fd()));
            // Logged now: the result is returned after the others have ended.
            spawned.inspect_err(|error| tracing::error!(%error, "host: a guest has no thread"))
        });
        let threads = threads.collect::<Vec<_>>();
        let mut outcome = Ok(());
        for thread in threads {
            let ended = match thread.map(thread::JoinHandle::join) {
                Ok(Ok(ended)) => ended,
                // The panic hook has logged the details.
                Ok(Err(_)) => Err(panicked()),
                Err(source) => Err(Error::Host { what: "starting a thread", source }),
            };
            outcome = outcome.and(ended);
        }
        outcome
    }
}

impl Guest {
    fn start(options: &ServiceOptions) -> Result<Self, Error> {
        let backend = Backend::new(&options.name, options.release, options.partial_huge)?;
        backend.withhold(options.without);
        backend.require_sealed(options.sealed_only);
        if let Some(bytes) = options.max_memory_bytes {
            backend.set_max_memory(bytes);
        }
        backend.set_busy_poll(options.busy_poll);
        let front_ends = if options.connect {
            FrontEnds::Connected(Connector::new(&options.socket)?)
        } else {
            let (file, listener) = listen_on(&options.socket, SocketAccess::Umask)?;
            FrontEnds::Accepted(file, listener)
        };
        // The process that has the sockets owns the state file, too.
        if let Some(path) = &options.state {
            backend.open_state_file(path)?;
        }
        let control = Server::bind(&options.control, backend.balloon())?;
        Ok(Self { name: options.name.clone(), backend, front_ends, _control: control })
    }

    /// Serves the front ends until the shutdown. A panic ends only the current connection.
    fn serve_despite_panics(self, stop: &impl AsFd) -> Result<(), Error> {
        loop {
            match diagnostics::contain(|| self.serve(stop)) {
                Ok(ended) => return ended,
                Err(panicked) => {
                    tracing::error!(%panicked, name = self.name, "serving the guest panicked and is restarted");
                    thread::sleep(BACKOFF);
                }
            }
        }
    }

    fn serve(&self, stop: &impl AsFd) -> Result<(), Error> {
        let name = &self.name;
        let outcome = match &self.front_ends {
            FrontEnds::Accepted(file, listener) => {
                tracing::info!(socket = %file.path().display(), name, "waiting for a front end");
                self.backend.serve_all(FrontEndSource::Listener(listener), stop)
            }
            FrontEnds::Connected(connector) => {
                let socket = connector.path().display();
                tracing::info!(%socket, name, "connecting to the front end");
                self.backend.serve_all(FrontEndSource::Connector(connector), stop)
            }
        };
        if let Err(error) = &outcome {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::error!(%error, cause, name, "the guest is no longer served");
        }
        outcome
    }
}

fn panicked() -> Error {
    Error::Host { what: "a guest's thread", source: io::Error::other("it panicked") }
}

/// Raises the soft limit of open files to `wanted`, so that one guest's front end cannot exhaust
/// the file descriptors of another.
fn allow_files(wanted: u64) -> Result<(), Error> {
    let limit = getrlimit(Resource::Nofile);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted);
    if enough(limit.current) {
        return Ok(());
    }
    if !enough(limit.maximum) {
        return Err(Error::TooManyGuests { wanted, limit: limit.maximum.unwrap_or(u64::MAX) });
    }
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised)
        .map_err(|e| Error::Host { what: "raising the limit of open files", source: e.into() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Enough to hit a wrong order.
    const ROUNDS: usize = 300;

    #[test]
    fn the_path_is_removed_before_the_socket_closes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.sock");
        for _ in 0..ROUNDS {
            let (file, listener) = listen_on(&path, SocketAccess::Umask).unwrap();
            let front_ends = FrontEnds::Accepted(file, listener);
            // Waits to be accepted; closing the listener disconnects it.
            let mut front_end = UnixStream::connect(&path).unwrap();
            let path = path.clone();
            let watcher = thread::spawn(move || {
                let _ = front_end.read(&mut [0]);
                fs::symlink_metadata(path).is_ok()
            });
            drop(front_ends);
            assert!(!watcher.join().unwrap(), "the path leads to a closed socket");
        }
    }
}
