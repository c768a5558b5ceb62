//! Listens for front ends, one after the other, and serves each until it goes.

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

use crate::connector::{Connector, RETRY};
use crate::error::{Error, SessionError};
use crate::limits::{Limits, Terms};
use crate::session::Session;
use crate::wire::{MESSAGE_TIMEOUT, Message};

/// Events other than kicks, whose data is the queue's number.
const EVENT_SOCKET: u64 = 1 << 32;
const EVENT_WAKE: u64 = EVENT_SOCKET + 1;
const EVENT_STOP: u64 = EVENT_SOCKET + 2;

/// Time to finish the release when the process is to end: some 8 GiB of small
/// pages, and less than a service manager waits.
const STOP_RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often that is looked at; nobody announces its end.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// Where front ends come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MonitorSource<'a> {
    Listener(&'a UnixListener),
    Connector(&'a Connector),
}

/// Pause after an `accept` that the host refused, which mostly means that it has no
/// file descriptor left; and between two connections to a monitor that hangs up.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// The back end of one guest, which may come and go.
pub struct Backend {
    shared: Arc<Shared>,
    limits: Limits,
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
        Ok(Self { shared, limits: Limits::new(), serving: Mutex::new(()) })
    }

    /// Offers no feature of `features`, from the next front end on.
    pub fn withhold(&self, features: Features) {
        self.shared.device().withhold(features);
    }

    /// Takes guest memory only where it is sealed against shrinking.
    pub fn want_sealed(&self, sealed_only: bool) {
        self.limits.want_sealed(sealed_only);
    }

    /// Takes guests of at most so many bytes of memory, from the next front end on; four
    /// times the host's unless this is said.
    pub fn take_memory(&self, bytes: u64) {
        self.limits.take_memory(bytes);
    }

    /// Looks for a guest's next message without sleeping, for so long after each, from
    /// the next front end on. Not where there is one processor: the guest needs it.
    pub fn poll_busily(&self, limit: Duration) {
        let alone = thread::available_parallelism().is_ok_and(|processors| processors.get() == 1);
        self.limits.poll_busily(if alone { Duration::ZERO } else { limit });
    }

    /// Keeps in the file at `path` what has to be known after a restart.
    ///
    /// # Errors
    /// The file can be neither read nor made.
    pub fn keep_state(&self, path: &Path) -> Result<(), Error> {
        let kept = self.shared.open_state_file(path);
        kept.map_err(|source| Error::State { path: path.to_owned(), source })
    }

    /// The balloon, for a control API.
    pub fn balloon(&self) -> Arc<dyn control::BalloonControl> {
        Arc::clone(&self.shared) as _
    }

    /// Serves front ends one after the other until `stop` becomes readable.
    ///
    /// # Errors
    /// When the host fails; a front end's fault is counted, logged, and over.
    pub fn listen(&self, listener: &UnixListener, stop: &impl AsFd) -> Result<(), Error> {
        self.serve_all(MonitorSource::Listener(listener), stop)
    }

    pub(crate) fn serve_all(
        &self,
        monitors: MonitorSource<'_>,
        stop: &impl AsFd,
    ) -> Result<(), Error> {
        while let Some(stream) = self.next(monitors, stop)? {
            panic_point("accept");
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
        // A session that panics is over, as one whose front end broke the protocol: the next
        // connection begins with a new one.
        let outcome = contain(|| serve(&self.shared, self.limits.terms(), stream, stop))
            .unwrap_or_else(|panicked| Err(SessionError::Panicked(panicked)));
        self.shared.set_connected(false);
        // Nobody is served meanwhile. What comes next may be the end of the process.
        self.shared.finish_saving();
        let outcome = match outcome {
            Err(error) if error.is_hang_up() => Ok(End::HungUp),
            other => other,
        };
        outcome.inspect_err(|error| self.shared.count_front_end_fault(error.name()))
    }

    /// The next front end, or `None` when the process shall end.
    fn next(
        &self,
        monitors: MonitorSource<'_>,
        stop: &impl AsFd,
    ) -> Result<Option<UnixStream>, Error> {
        let host = |what| move |source: io::Error| Error::Host { what, source };
        let poll = watch(&[(stop.as_fd(), EVENT_STOP)]).map_err(host("epoll"))?;
        if let MonitorSource::Listener(listener) = monitors {
            let event = EventData::new_u64(EVENT_SOCKET);
            epoll::add(&poll, listener, event, EventFlags::IN)
                .map_err(|e| host("epoll")(e.into()))?;
        }
        let mut events = Vec::with_capacity(2);
        loop {
            let pause = match monitors {
                MonitorSource::Listener(_) => None,
                MonitorSource::Connector(_) => Timespec::try_from(RETRY).ok(),
            };
            wait(&poll, &mut events, pause.as_ref()).map_err(host("epoll_wait"))?;
            if events.iter().any(|event| event.data.u64() == EVENT_STOP) {
                return Ok(None);
            }
            let next = match monitors {
                // A signal interrupted the wait; `accept` would block now.
                MonitorSource::Listener(_) if events.is_empty() => None,
                MonitorSource::Listener(listener) => self.accept(listener),
                MonitorSource::Connector(connector) => connector.connect()?,
            };
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// A host that has no file descriptor left now may have one later.
    fn accept(&self, listener: &UnixListener) -> Option<UnixStream> {
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            // It hung up before it was looked at.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if self.shared.may_log() {
                    tracing::error!(%error, "host: cannot accept a monitor's connection");
                }
                thread::sleep(BACKOFF);
            }
        }
        None
    }
}

/// Serves one connection to its end.
fn serve(
    shared: &Shared,
    terms: Terms,
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
    let mut session = Session::new(shared, terms, Rc::clone(&poll))?;
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
                [shared.until_deadline(), session.until_stats(), session.until_silence()];
            deadlines.into_iter().flatten().min()
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        wait(&poll, &mut events, timeout.as_ref()).map_err(host("epoll_wait"))?;
        session.go_on();
        session.ask_for_stats();
        session.end_silence();
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
            // What comes next would be blamed for it.
            session.check()?;
        }
        session.check()?;
    }
}

/// Releases what the guest gave before the process ends: afterwards nobody would
/// know that it did.
fn finish_release(shared: &Shared) {
    let end = Instant::now() + STOP_RELEASE_TIMEOUT;
    shared.device().reclaim_mut().flush();
    while shared.device().reclaim().reached_at().is_none() {
        if Instant::now() >= end {
            tracing::warn!("host: the release was cancelled, the process is to end");
            return;
        }
        thread::sleep(SETTLE_LOOK);
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
