//! Serves one guest's front ends, one after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use balloon_device::Reclaim;
use balloon_host::{HostReclaim, Shared};
use control::api::{PartialHuge, ReleaseMode};
use diagnostics::{contain, panic_point};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::connector::{Connector, RETRY_INTERVAL};
use crate::error::{Error, SessionError};
use crate::limits::{Limits, SessionLimits};
use crate::session::Session;
use crate::wire::{MESSAGE_TIMEOUT, Message};

/// Data of events other than kicks; a kick's data is the queue's index.
const EVENT_SOCKET: u64 = 1 << 32;
const EVENT_WAKE: u64 = EVENT_SOCKET + 1;
const EVENT_STOP: u64 = EVENT_SOCKET + 2;

/// Time to finish pending releases on shutdown: enough for about 8 GiB of small pages, and
/// less than a service manager waits.
const STOP_RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the shutdown polls for the end of the release, which sends no notification.
const RELEASE_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Source of front-end connections.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FrontEndSource<'a> {
    Listener(&'a UnixListener),
    Connector(&'a Connector),
}

/// Delay after a failed `accept`, mostly because no file descriptor is left, and before a
/// guest is served again after a panic.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// The back end of one guest. It outlives the guest's front ends.
pub struct Backend {
    shared: Arc<Shared>,
    limits: Limits,
    /// Locked while a front end is served: one at a time.
    serving: Mutex<()>,
}

/// How a session ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front end closed the connection.
    HungUp,
    /// The process shuts down.
    Stopped,
}

impl Backend {
    /// Creates a back end without a guest.
    ///
    /// # Errors
    /// The host has no thread or no file descriptor left.
    pub fn new(name: &str, release: ReleaseMode, partial_huge: PartialHuge) -> Result<Self, Error> {
        let reclaim = HostReclaim::new(release, partial_huge)?;
        let shared = Arc::new(Shared::new(name.to_owned(), reclaim)?);
        Ok(Self { shared, limits: Limits::new(), serving: Mutex::new(()) })
    }

    /// Stops offering `features`, from the next front end on.
    pub fn withhold(&self, features: Features) {
        self.shared.device().withhold(features);
    }

    /// Sets whether guest memory must be sealed against shrinking.
    pub fn require_sealed(&self, sealed_only: bool) {
        self.limits.require_sealed(sealed_only);
    }

    /// Limits guest memory to `bytes`, from the next front end on. The default is four times the
    /// host's memory.
    pub fn set_max_memory(&self, bytes: u64) {
        self.limits.set_max_memory(bytes);
    }

    /// Busy-polls for `limit` after each message of a guest, from the next front end on. Has no
    /// effect with a single host CPU, which the guest needs.
    pub fn set_busy_poll(&self, limit: Duration) {
        let alone = thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        self.limits.set_busy_poll(if alone { Duration::ZERO } else { limit });
    }

    /// Loads the state file at `path`, and saves the state for a restart to it.
    ///
    /// # Errors
    /// The file can be neither read nor created.
    pub fn open_state_file(&self, path: &Path) -> Result<(), Error> {
        let opened = self.shared.open_state_file(path);
        opened.map_err(|source| Error::State { path: path.to_owned(), source })
    }

    /// Returns the balloon for the control API.
    pub fn balloon(&self) -> Arc<dyn control::BalloonControl> {
        Arc::clone(&self.shared) as _
    }

    /// Serves front ends one after the other until `stop` becomes readable.
    ///
    /// # Errors
    /// The host failed. A front end's fault is counted and logged, and ends only its session.
    pub fn listen(&self, listener: &UnixListener, stop: &impl AsFd) -> Result<(), Error> {
        self.serve_all(FrontEndSource::Listener(listener), stop)
    }

    pub(crate) fn serve_all(
        &self,
        front_ends: FrontEndSource<'_>,
        stop: &impl AsFd,
    ) -> Result<(), Error> {
        while let Some(stream) = self.next(front_ends, stop)? {
            panic_point("accept");
            match self.serve(&stream, stop) {
                Ok(End::Stopped) => break,
                // A client may connect many times a second.
                _ if !self.shared.may_log() => {}
                Ok(End::HungUp) => tracing::info!("the front end disconnected"),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "the front end's connection was closed");
                }
            }
        }
        Ok(())
    }

    /// Serves one front end until its session ends. A second call waits for the first.
    ///
    /// # Errors
    /// The front end violated the protocol, the connection failed, or the host failed.
    pub fn serve(&self, stream: &UnixStream, stop: &impl AsFd) -> Result<End, SessionError> {
        let _serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.set_connected(true);
        // A panic ends the session, like a protocol violation. The next connection starts a new
        // session.
        let outcome = contain(|| serve(&self.shared, self.limits.for_session(), stream, stop))
            .unwrap_or_else(|panicked| Err(SessionError::Panicked(panicked)));
        self.shared.set_connected(false);
        // No guest is served now, and the process may exit next.
        self.shared.finish_saving();
        let outcome = match outcome {
            Err(error) if error.is_hang_up() => Ok(End::HungUp),
            other => other,
        };
        outcome.inspect_err(|error| self.shared.count_front_end_fault(error.name()))
    }

    /// Waits for the next front end; `None` on shutdown.
    fn next(
        &self,
        front_ends: FrontEndSource<'_>,
        stop: &impl AsFd,
    ) -> Result<Option<UnixStream>, Error> {
        let host = |what| move |source: io::Error| Error::Host { what, source };
        let poll = watch(&[(stop.as_fd(), EVENT_STOP)]).map_err(host("epoll"))?;
        if let FrontEndSource::Listener(listener) = front_ends {
            let event = EventData::new_u64(EVENT_SOCKET);
            epoll::add(&poll, listener, event, EventFlags::IN)
                .map_err(|e| host("epoll")(e.into()))?;
        }
        let mut events = Vec::with_capacity(2);
        loop {
            let pause = match front_ends {
                FrontEndSource::Listener(_) => None,
                FrontEndSource::Connector(_) => Timespec::try_from(RETRY_INTERVAL).ok(),
            };
            wait(&poll, &mut events, pause.as_ref()).map_err(host("epoll_wait"))?;
            if events.iter().any(|event| event.data.u64() == EVENT_STOP) {
                return Ok(None);
            }
            let next = match front_ends {
                // A signal interrupted the wait; `accept` would block now.
                FrontEndSource::Listener(_) if events.is_empty() => None,
                FrontEndSource::Listener(listener) => self.accept(listener),
                FrontEndSource::Connector(connector) => connector.connect()?,
            };
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// Accepts a connection. Errors are logged, not returned: a host without a file descriptor
    /// may have one later.
    fn accept(&self, listener: &UnixListener) -> Option<UnixStream> {
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            // The client closed the connection before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if self.shared.may_log() {
                    tracing::error!(%error, "host: cannot accept a front end's connection");
                }
                thread::sleep(BACKOFF);
            }
        }
        None
    }
}

/// Serves one connection until it ends.
fn serve(
    shared: &Shared,
    limits: SessionLimits,
    stream: &UnixStream,
    stop: &impl AsFd,
) -> Result<End, SessionError> {
    let host = |what| move |source: io::Error| SessionError::Host { what, source };
    stream.set_write_timeout(Some(MESSAGE_TIMEOUT)).map_err(host("SO_SNDTIMEO"))?;
    let poll = watch(&[
        (stream.as_fd(), EVENT_SOCKET),
        (shared.wake().as_fd(), EVENT_WAKE),
        (stop.as_fd(), EVENT_STOP),
    ])
    .map_err(host("epoll"))?;
    let poll = Rc::new(poll);
    let mut session = Session::new(shared, limits, Rc::clone(&poll))?;
    let mut message = Message::default();
    let mut events = Vec::with_capacity(16);
    loop {
        let timeout = if session.has_more() {
            Some(Duration::ZERO)
        } else if session.polls_busily() {
            thread::yield_now();
            Some(Duration::ZERO)
        } else {
            let deadlines =
                [shared.until_deadline(), session.until_stats(), session.until_config_fallback()];
            deadlines.into_iter().flatten().min()
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        wait(&poll, &mut events, timeout.as_ref()).map_err(host("epoll_wait"))?;
        session.serve_remaining();
        session.request_stats();
        session.apply_config_fallback();
        if shared.expire_requests() {
            session.serve_requests();
        }
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
                    if shared.take_config_changed() {
                        session.config_changed();
                    }
                    session.serve_requests();
                }
                EVENT_STOP => {
                    finish_release(shared);
                    return Ok(End::Stopped);
                }
                queue => {
                    panic_point("kick");
                    session.kicked(usize::try_from(queue).unwrap_or(usize::MAX));
                }
            }
            // Check now, or the next event would be blamed.
            session.check()?;
        }
        session.check()?;
    }
}

/// Finishes pending releases before the process exits: they are not saved.
fn finish_release(shared: &Shared) {
    let end = Instant::now() + STOP_RELEASE_TIMEOUT;
    shared.device().reclaim_mut().flush();
    while shared.device().reclaim().reached_at().is_none() {
        if Instant::now() >= end {
            tracing::warn!("host: the shutdown cancelled pending releases");
            return;
        }
        thread::sleep(RELEASE_POLL_INTERVAL);
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_disconnect_before_the_reply_is_no_fault() {
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
