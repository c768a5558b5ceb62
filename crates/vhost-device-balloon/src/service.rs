//! One process that serves guests, each on a thread and on sockets of its own,
//! until it is asked to end.

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
use crate::server::{BACKOFF, Backend, MonitorSource};

/// File descriptors that one guest may cost: 32 memory regions and as many more
/// in a message under way, 3 for each queue, 64 connections of the control API, and
/// a few of its own.
const FILES_PER_GUEST: u64 = 160;

/// File descriptors of the process itself.
const FILES_OF_PROCESS: u64 = 32;

/// How to serve one guest.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Where the monitor connects, or listens.
    pub socket: PathBuf,
    /// The monitor listens there.
    pub connect: bool,
    /// Name of the guest.
    pub name: String,
    /// Where the control API listens.
    pub control: PathBuf,
    /// Where what has to be known after a restart is kept, if it is.
    pub state: Option<PathBuf>,
    /// When memory is released.
    pub release: ReleaseMode,
    /// What becomes of pieces of huge pages.
    pub partial_huge: PartialHuge,
    /// Features that the device does not offer.
    pub without: Features,
    /// Guest memory must be sealed against shrinking. A file that shrinks while it
    /// is mapped ends its session when it is read.
    pub sealed_only: bool,
    /// Bytes of memory that the guest may have; four times the host's memory unless given.
    pub max_memory_bytes: Option<u64>,
    /// How long a guest's next message is looked for without sleeping.
    pub busy_poll: Duration,
}

/// Guests whose sockets are there, and who are not served yet.
pub struct Service {
    guests: Vec<Guest>,
    ending: Arc<Ending>,
}

/// One guest. Its control API is served from the start.
struct Guest {
    name: String,
    backend: Backend,
    monitors: Monitors,
    _control: Server,
}

/// Where a guest's monitors come from.
enum Monitors {
    /// In this order: the socket's name goes before nobody listens any more, so that no monitor
    /// finds a dead socket, and no successor replaces it meanwhile.
    Accepted(SocketFile, UnixListener),
    Connected(Connector),
}

impl Service {
    /// Makes the sockets of all guests. Whatever serving needs of the file system is
    /// open when it returns, but for the removal of the sockets.
    ///
    /// # Errors
    /// When a socket or a state file cannot be made.
    pub fn start(options: &[ServiceOptions]) -> Result<Self, Error> {
        let ending = Ending::watch();
        let ending = ending.map_err(|source| Error::Host { what: "signal handling", source })?;
        allow_files(FILES_OF_PROCESS + FILES_PER_GUEST * options.len() as u64)?;
        let guests = options.iter().map(Guest::start).collect::<Result<_, _>>()?;
        // From now on there are sockets to be removed.
        ending.in_order();
        Ok(Self { guests, ending })
    }

    /// Serves until the process is asked to end. A guest that cannot be served any
    /// more leaves the others alone.
    ///
    /// # Errors
    /// The first of the guests' errors, when all have ended. What a front end does
    /// ends its own session and nothing else.
    pub fn serve(self) -> Result<(), Error> {
        let threads = self.guests.into_iter().map(|guest| {
            let ending = Arc::clone(&self.ending);
            let thread = thread::Builder::new().name(format!("guest {}", guest.name));
            let spawned = thread.spawn(move || guest.serve_whatever_panics(&ending.told()));
            // Told now: what is returned is looked at when the others have ended.
            spawned.inspect_err(|error| tracing::error!(%error, "host: a guest has no thread"))
        });
        let threads = threads.collect::<Vec<_>>();
        let mut outcome = Ok(());
        for thread in threads {
            let ended = match thread.map(thread::JoinHandle::join) {
                Ok(Ok(ended)) => ended,
                // The panic hook has said more.
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
        backend.want_sealed(options.sealed_only);
        if let Some(bytes) = options.max_memory_bytes {
            backend.take_memory(bytes);
        }
        backend.poll_busily(options.busy_poll);
        let monitors = if options.connect {
            Monitors::Connected(Connector::new(&options.socket)?)
        } else {
            let (file, listener) = listen_on(&options.socket, SocketAccess::Umask)?;
            Monitors::Accepted(file, listener)
        };
        // Whoever has the sockets has the state file too.
        if let Some(path) = &options.state {
            backend.keep_state(path)?;
        }
        let control = Server::bind(&options.control, backend.balloon())?;
        Ok(Self { name: options.name.clone(), backend, monitors, _control: control })
    }

    /// Serves its monitors until the process is to end; a panic costs one of them its connection.
    fn serve_whatever_panics(self, stop: &impl AsFd) -> Result<(), Error> {
        loop {
            match diagnostics::contain(|| self.serve(stop)) {
                Ok(ended) => return ended,
                Err(panicked) => {
                    tracing::error!(%panicked, name = self.name, "the guest is served anew");
                    thread::sleep(BACKOFF);
                }
            }
        }
    }

    fn serve(&self, stop: &impl AsFd) -> Result<(), Error> {
        let name = &self.name;
        let outcome = match &self.monitors {
            Monitors::Accepted(file, listener) => {
                tracing::info!(socket = %file.path().display(), name, "waiting for a monitor");
                self.backend.serve_all(MonitorSource::Listener(listener), stop)
            }
            Monitors::Connected(connector) => {
                let socket = connector.path().display();
                tracing::info!(%socket, name, "connecting to the monitor");
                self.backend.serve_all(MonitorSource::Connector(connector), stop)
            }
        };
        if let Err(error) = &outcome {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::error!(%error, cause, name, "the guest is not served any more");
        }
        outcome
    }
}

fn panicked() -> Error {
    Error::Host { what: "a guest's thread", source: io::Error::other("it panicked") }
}

/// Raises the limit of open files as far as the hard limit lets it, so that one
/// guest's front end cannot take the files of another.
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

    /// Often enough that a wrong order is seen once.
    const TURNS: usize = 300;

    #[test]
    fn a_socket_has_no_name_any_more_when_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.sock");
        for _ in 0..TURNS {
            let (file, listener) = listen_on(&path, SocketAccess::Umask).unwrap();
            let monitors = Monitors::Accepted(file, listener);
            // Waits to be accepted, and is hung up on when the listener is closed.
            let mut monitor = UnixStream::connect(&path).unwrap();
            let path = path.clone();
            let watcher = thread::spawn(move || {
                let _ = monitor.read(&mut [0]);
                fs::symlink_metadata(path).is_ok()
            });
            drop(monitors);
            assert!(!watcher.join().unwrap(), "its name leads to a socket that is closed");
        }
    }
}
