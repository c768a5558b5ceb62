//! The server's connections: what each waits for, and which is closed when another needs its place.
//!
//! Clients are on the same host, so an honest one sends its request and reads its answer within
//! milliseconds. A slow client has deadlines; when all connections are taken, the slowest is closed
//! before its deadline. A connection whose request is being served is never closed for another.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use super::Limits;

/// Time that everybody has who has just come or was just answered, however many others wait.
const MIN_SERVICE_TIME: Duration = Duration::from_millis(100);

/// The same for a client that reads a large answer: a bitmap of 1 TiB of memory takes some 30 ms.
const BULK_GRACE: Duration = Duration::from_secs(1);

/// How long one waits for another to have its turn with a large answer.
const BULK_PATIENCE: Duration = Duration::from_secs(2);

/// Between two looks whether somebody has been here for long enough to make room.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its client sends a request.
    Reading,
    /// The server works on the answer.
    Working,
    /// Its turn to have a large answer.
    Queued,
    /// Its client reads the answer.
    Answering,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// When the client took bytes of its answer last.
    taken: Instant,
    /// The right to a large answer.
    bulk: Option<OwnedSemaphorePermit>,
    /// Another one needs its room.
    closing: bool,
}

/// One connection, for as long as anything works for it.
#[derive(Debug)]
pub(crate) struct Connection {
    process: i32,
    state: Mutex<State>,
    changed: Notify,
    _slot: OwnedSemaphorePermit,
}

tokio::task_local! {
    static CURRENT: Arc<Connection>;
}

/// The connection whose request is being served, if any.
pub(crate) fn current() -> Option<Arc<Connection>> {
    CURRENT.try_with(Arc::clone).ok()
}

/// Runs a part of the work for a connection.
pub(crate) async fn serving<T>(
    connection: Option<Arc<Connection>>,
    work: impl Future<Output = T>,
) -> T {
    match connection {
        Some(connection) => CURRENT.scope(connection, work).await,
        None => work.await,
    }
}

/// Notes what the connection that is served waits for.
pub(crate) fn enter(phase: Phase) {
    if let Some(connection) = current() {
        connection.enter(phase);
    }
}

/// The process at the other end of the connection that is served.
pub(crate) fn process() -> i32 {
    current().map_or(0, |connection| connection.process)
}

impl Connection {
    pub(crate) fn enter(&self, phase: Phase) {
        let now = Instant::now();
        let mut state = self.state();
        (state.phase, state.since, state.taken) = (phase, now, now);
        drop(state);
        self.changed.notify_one();
    }

    /// Returns once the connection has to be closed, with the reason.
    pub(crate) async fn overstays(&self, limits: &Limits) -> &'static str {
        loop {
            let (end, why) = {
                let state = self.state();
                if state.closing {
                    return "another client needs its room";
                }
                let stalled = (state.taken + limits.stall_timeout, "its client reads no more");
                let slow = (state.since + limits.answer_timeout, "its client reads too slowly");
                let end = if stalled.0 <= slow.0 { stalled } else { slow };
                if state.phase == Phase::Answering { (Some(end.0), end.1) } else { (None, "") }
            };
            match end {
                Some(end) if Instant::now() >= end => return why,
                Some(end) => {
                    // Either way it is looked at once more.
                    tokio::select! {
                        () = sleep_until(end) => {}
                        () = self.changed.notified() => {}
                    }
                }
                None => self.changed.notified().await,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Times and a phase; no half-made structure.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All connections of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    slots: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    all: Mutex<Vec<Weak<Connection>>>,
}

impl Connections {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            slots: Arc::new(Semaphore::new(limits.connections)),
            bulk: Arc::new(Semaphore::new(limits.bulk)),
            all: Mutex::default(),
        })
    }

    /// Takes one more, for which another one goes where there is no room. Waits where the server
    /// works for all of them.
    pub(crate) async fn admit(&self, process: i32) -> Option<Arc<Connection>> {
        let take = || Arc::clone(&self.slots).acquire_owned();
        let slot = loop {
            if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
                break slot;
            }
            self.make_room(MIN_SERVICE_TIME, |state| state.phase != Phase::Working);
            match timeout(POLL_INTERVAL, take()).await {
                Ok(Ok(slot)) => break slot,
                Ok(Err(_)) => return None,
                Err(_) => {}
            }
        };
        let now = Instant::now();
        let (phase, bulk, closing) = (Phase::Reading, None, false);
        let state = State { phase, since: now, taken: now, bulk, closing };
        let connection = Arc::new(Connection {
            process,
            state: Mutex::new(state),
            changed: Notify::new(),
            _slot: slot,
        });
        let mut all = self.all();
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&connection));
        drop(all);
        Some(connection)
    }

    /// Gives the connection that is served the right to a large answer, for which another one goes
    /// that has had its time. False where there is no room for it.
    pub(crate) async fn take_bulk(&self) -> bool {
        let Some(connection) = current() else { return true };
        let end = Instant::now() + BULK_PATIENCE;
        connection.enter(Phase::Queued);
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.bulk).try_acquire_owned() {
                break Some(permit);
            }
            let reads = |state: &State| state.bulk.is_some() && state.phase == Phase::Answering;
            self.make_room(BULK_GRACE, reads);
            match timeout(POLL_INTERVAL, Arc::clone(&self.bulk).acquire_owned()).await {
                Ok(permit) => break permit.ok(),
                Err(_) if Instant::now() >= end => break None,
                Err(_) => {}
            }
        };
        connection.enter(Phase::Working);
        let is_there = permit.is_some();
        connection.state().bulk = permit;
        is_there
    }

    /// Returns when nothing works for any connection.
    pub(crate) async fn idle(&self, limits: &Limits) {
        let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
        let _ = self.slots.acquire_many(all).await;
    }

    /// Closes one of those that `may_go` and that have stood there for `grace`: of the process that
    /// has most of them, the one that has stood there longest.
    fn make_room(&self, grace: Duration, may_go: impl Fn(&State) -> bool) {
        let now = Instant::now();
        let all: Vec<_> = self.all().iter().filter_map(Weak::upgrade).collect();
        let mut old = Vec::new();
        for connection in &all {
            let state = connection.state();
            // One that is closed already makes the room that is needed.
            if may_go(&state) && state.closing {
                return;
            }
            if may_go(&state) && now.duration_since(state.since) >= grace {
                old.push((connection, state.since));
            }
        }
        let of_process = |process| old.iter().filter(|(other, _)| other.process == process).count();
        let age = |since: Instant| now.duration_since(since);
        let goes = old.iter().max_by_key(|(one, since)| (of_process(one.process), age(*since)));
        if let Some((connection, _)) = goes {
            connection.state().closing = true;
            connection.changed.notify_one();
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Weak<Connection>>> {
        // Every change of it is one call.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket of a connection, which notes when its client takes bytes.
pub(crate) struct Watched {
    stream: UnixStream,
    connection: Arc<Connection>,
}

impl Watched {
    pub(crate) const fn new(stream: UnixStream, connection: Arc<Connection>) -> Self {
        Self { stream, connection }
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.connection.state().taken = Instant::now();
        }
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
