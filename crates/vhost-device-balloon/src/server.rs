//! Listens for front ends, one after the other, and serves each until it goes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use balloon_host::{HostReclaim, Shared};
use control::Server;
use control::api::{PartialHuge, ReleaseMode};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::error::{Error, SessionError};
use crate::session::Session;
use crate::wire::{MESSAGE_TIMEOUT, Message};

/// Events other than kicks, whose data is the queue's number.
const EVENT_SOCKET: u64 = 1 << 32;
const EVENT_WAKE: u64 = EVENT_SOCKET + 1;
const EVENT_STOP: u64 = EVENT_SOCKET + 2;

/// How to serve one guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the monitor connects.
    pub socket: PathBuf,
    /// Name of the guest.
    pub name: String,
    /// Where the control API listens.
    pub control: PathBuf,
    /// When memory is released.
    pub release: ReleaseMode,
    /// What becomes of pieces of huge pages.
    pub partial_huge: PartialHuge,
}

/// Serves the guest until the process is asked to end (SIGTERM or SIGINT).
///
/// # Errors
/// When the sockets cannot be made. What a front end does ends its own session
/// and nothing else.
pub fn run(options: &Options) -> Result<(), Error> {
    let stop = stop_signal().map_err(|source| Error::Host { what: "signal handling", source })?;
    let backend = Backend::new(&options.name, options.release, options.partial_huge)?;
    let socket = Socket::bind(&options.socket)?;
    let _control = Server::bind(&options.control, backend.balloon())?;
    tracing::info!(
        socket = %options.socket.display(), name = options.name, "waiting for a monitor"
    );
    backend.listen(&socket.listener, &stop)
}

/// The back end of one guest, which may come and go.
pub struct Backend {
    shared: Arc<Shared>,
    /// Held while a front end is served: there is one guest.
    serving: Mutex<()>,
}

/// How a front end's connection ended without anybody's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front end closed it.
    HungUp,
    /// The process is asked to end.
    Stopped,
}

impl Backend {
    /// A back end without a guest.
    ///
    /// # Errors
    /// The host has no thread or no file descriptor left.
    pub fn new(name: &str, release: ReleaseMode, partial_huge: PartialHuge) -> Result<Self, Error> {
        let reclaim = HostReclaim::new(release, partial_huge)?;
        let shared = Arc::new(Shared::new(name.to_owned(), reclaim)?);
        Ok(Self { shared, serving: Mutex::new(()) })
    }

    /// The balloon, for a control API.
    pub fn balloon(&self) -> Arc<dyn control::Balloon> {
        Arc::clone(&self.shared) as _
    }

    /// Serves front ends one after the other until `stop` becomes readable.
    ///
    /// # Errors
    /// When the host fails; a front end's fault is counted, logged, and over.
    pub fn listen(&self, listener: &UnixListener, stop: &impl AsFd) -> Result<(), Error> {
        while let Some(stream) = accept(listener, stop)? {
            match self.serve(&stream, stop) {
                Ok(End::Stopped) => break,
                // Whoever may connect may do so many times a second.
                _ if !self.shared.may_log() => {}
                Ok(End::HungUp) => tracing::info!("the monitor hung up"),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "the monitor's connection was ended");
                }
            }
        }
        Ok(())
    }

    /// Serves one connected front end to its end. A second call waits for the
    /// end of the first.
    ///
    /// # Errors
    /// When the front end breaks the protocol, or the connection breaks.
    pub fn serve(&self, stream: &UnixStream, stop: &impl AsFd) -> Result<End, SessionError> {
        let _serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.set_connected(true);
        let outcome = serve(&self.shared, stream, stop);
        self.shared.set_connected(false);
        let outcome = match outcome {
            Err(error) if error.is_hang_up() => Ok(End::HungUp),
            other => other,
        };
        outcome.inspect_err(|error| self.shared.count_front_end_fault(error.name()))
    }
}

/// Serves one connection to its end.
fn serve(shared: &Shared, stream: &UnixStream, stop: &impl AsFd) -> Result<End, SessionError> {
    let host = |what| move |source: io::Error| SessionError::Host { what, source };
    stream.set_write_timeout(Some(MESSAGE_TIMEOUT)).map_err(host("SO_SNDTIMEO"))?;
    let poll = watch(&[
        (stream.as_fd(), EVENT_SOCKET),
        (shared.wake().as_fd(), EVENT_WAKE),
        (stop.as_fd(), EVENT_STOP),
    ])
    .map_err(host("epoll"))?;
    let poll = Rc::new(poll);
    let mut session = Session::new(shared, Rc::clone(&poll))?;
    let mut message = Message::default();
    let mut events = Vec::with_capacity(16);
    loop {
        let timeout = session.has_more().then(Timespec::default);
        wait(&poll, &mut events, timeout.as_ref()).map_err(host("epoll_wait"))?;
        session.go_on();
        for event in events.drain(..) {
            match event.data.u64() {
                EVENT_SOCKET => {
                    if !message.receive(stream)? {
                        return Ok(End::HungUp);
                    }
                    session.handle(&mut message, stream)?;
                }
                EVENT_WAKE => {
                    let _ = rustix::io::read(shared.wake(), &mut [0; 8]);
                    session.config_changed();
                }
                EVENT_STOP => return Ok(End::Stopped),
                queue => session.kicked(usize::try_from(queue).unwrap_or(usize::MAX)),
            }
        }
    }
}

/// The next front end, or `None` when the process shall end.
fn accept(listener: &UnixListener, stop: &impl AsFd) -> Result<Option<UnixStream>, Error> {
    let host = |what| move |source: io::Error| Error::Host { what, source };
    let poll = watch(&[(listener.as_fd(), EVENT_SOCKET), (stop.as_fd(), EVENT_STOP)])
        .map_err(host("epoll"))?;
    let mut events = Vec::with_capacity(2);
    loop {
        wait(&poll, &mut events, None).map_err(host("epoll_wait"))?;
        if events.iter().any(|event| event.data.u64() == EVENT_STOP) {
            return Ok(None);
        }
        if events.is_empty() {
            // A signal interrupted the wait; `accept` would block now.
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(source) => return Err(Error::Host { what: "accept", source }),
        }
    }
}

fn watch(fds: &[(std::os::fd::BorrowedFd<'_>, u64)]) -> io::Result<OwnedFd> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (fd, data) in fds {
        epoll::add(&poll, fd, EventData::new_u64(*data), EventFlags::IN)?;
    }
    Ok(poll)
}

fn wait(
    poll: &OwnedFd,
    events: &mut Vec<epoll::Event>,
    timeout: Option<&Timespec>,
) -> io::Result<()> {
    events.clear();
    match epoll::wait(poll, rustix::buffer::spare_capacity(events), timeout) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A stream that becomes readable on SIGTERM or SIGINT.
fn stop_signal() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, write.try_clone()?)?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, write)?;
    Ok(read)
}

/// The vhost-user socket, which is gone when the back end is.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// A path left over from a back end that was killed is taken over; one that
    /// is in use is not.
    fn bind(path: &Path) -> Result<Self, Error> {
        let listen = |source| Error::Listen { path: path.to_owned(), source };
        let stale = UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if stale {
            std::fs::remove_file(path).map_err(listen)?;
        }
        let listener = UnixListener::bind(path).map_err(listen)?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_front_end_that_goes_without_its_answers_is_no_fault() {
        let backend = Backend::new("guest", ReleaseMode::default(), PartialHuge::default());
        let backend = backend.unwrap();
        let (mut front_end, stream) = UnixStream::pair().unwrap();
        let (stop, _keep) = UnixStream::pair().unwrap();
        // GET_FEATURES, version 1, no payload.
        front_end.write_all(&[1u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
        drop(front_end);
        assert_eq!(backend.serve(&stream, &stop).unwrap(), End::HungUp);
        assert_eq!(backend.balloon().status().faults.total(), 0);
    }
}
