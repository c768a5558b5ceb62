//! The server's connections: the phase of each, and which one to close when the limit is reached.
//!
//! Clients are on the same host, so a working one sends its request and reads its response within
//! milliseconds. A slow client has deadlines; when all connections are in use, the slowest is
//! closed before its deadline. A connection whose request is being processed is never closed in
//! favour of another.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use crate::limits::Limits;

/// Minimum time for a client to send its request or read its response, even if others wait.
const MIN_SERVICE_TIME: Duration = Duration::from_millis(100);

/// The same for reading a large response: a bitmap of 1 TiB of memory takes some 30 ms.
const MIN_BULK_TIME: Duration = Duration::from_secs(1);

/// Longest wait for a turn to send a large response.
const BULK_WAIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How often to check whether a connection can be closed in favour of another.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The client sends a request.
    Reading,
    /// The server processes it.
    Working,
    /// The connection waits for its turn to send a large response.
    Queued,
    /// The client reads the response.
    Answering,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// When the client last read bytes of its response.
    last_read: Instant,
    /// Permit for a large response.
    bulk: Option<OwnedSemaphorePermit>,
    /// Being closed in favour of another connection.
    closing: bool,
}

/// A connection. It lives as long as any task or thread works for it.
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

/// Returns the connection of the current task, if any.
pub(crate) fn current() -> Option<Arc<Connection>> {
    CURRENT.try_with(Arc::clone).ok()
}

/// Runs `work` as a task of `connection`.
pub(crate) async fn serving<T>(
    connection: Option<Arc<Connection>>,
    work: impl Future<Output = T>,
) -> T {
    match connection {
        Some(connection) => CURRENT.scope(connection, work).await,
        None => work.await,
    }
}

/// Sets the phase of the current connection.
pub(crate) fn enter(phase: Phase) {
    if let Some(connection) = current() {
        connection.enter(phase);
    }
}

/// Returns the client's PID for the current connection; 0 if unknown.
pub(crate) fn process() -> i32 {
    current().map_or(0, |connection| connection.process)
}

impl Connection {
    pub(crate) fn enter(&self, phase: Phase) {
        let now = Instant::now();
        let mut state = self.state();
        (state.phase, state.since, state.last_read) = (phase, now, now);
        drop(state);
        self.changed.notify_one();
    }

    /// Returns, with the reason, when the connection must be closed.
    pub(crate) async fn until_expired(&self, limits: &Limits) -> &'static str {
        loop {
            let (end, why) = {
                let state = self.state();
                if state.closing {
                    return "the connection limit is reached";
                }
                let stalled =
                    (state.last_read + limits.stall_timeout, "the client has stopped reading");
                let slow = (state.since + limits.answer_timeout, "the client reads too slowly");
                let end = if stalled.0 <= slow.0 { stalled } else { slow };
                if state.phase == Phase::Answering { (Some(end.0), end.1) } else { (None, "") }
            };
            match end {
                Some(end) if Instant::now() >= end => return why,
                Some(end) => {
                    // Recomputed in both cases.
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
        // Independent fields, so the state is consistent after a panic.
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

    /// Admits a connection. At the limit it closes the slowest one, or waits if all are being
    /// processed.
    pub(crate) async fn admit(&self, process: i32) -> Option<Arc<Connection>> {
        let take = || Arc::clone(&self.slots).acquire_owned();
        let slot = loop {
            if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
                break slot;
            }
            self.close_slowest(MIN_SERVICE_TIME, |state| state.phase != Phase::Working);
            match timeout(POLL_INTERVAL, take()).await {
                Ok(Ok(slot)) => break slot,
                Ok(Err(_)) => return None,
                Err(_) => {}
            }
        };
        let now = Instant::now();
        let (phase, bulk, closing) = (Phase::Reading, None, false);
        let state = State { phase, since: now, last_read: now, bulk, closing };
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

    /// Takes a permit for a large response for the current connection. At the limit it closes a
    /// connection that has had its minimum time. Returns false if none becomes free.
    pub(crate) async fn take_bulk(&self) -> bool {
        let Some(connection) = current() else { return true };
        let end = Instant::now() + BULK_WAIT_TIMEOUT;
        connection.enter(Phase::Queued);
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.bulk).try_acquire_owned() {
                break Some(permit);
            }
            let reads = |state: &State| state.bulk.is_some() && state.phase == Phase::Answering;
            self.close_slowest(MIN_BULK_TIME, reads);
            match timeout(POLL_INTERVAL, Arc::clone(&self.bulk).acquire_owned()).await {
                Ok(permit) => break permit.ok(),
                Err(_) if Instant::now() >= end => break None,
                Err(_) => {}
            }
        };
        connection.enter(Phase::Working);
        let granted = permit.is_some();
        connection.state().bulk = permit;
        granted
    }

    /// Returns when no task or thread works for any connection.
    pub(crate) async fn idle(&self, limits: &Limits) {
        let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
        let _ = self.slots.acquire_many(all).await;
    }

    /// Closes one connection that is `closable` and has been in its phase for `min_time`. Chooses
    /// the process with the most such connections, and of those the one longest in its phase.
    fn close_slowest(&self, min_time: Duration, closable: impl Fn(&State) -> bool) {
        let now = Instant::now();
        let all: Vec<_> = self.all().iter().filter_map(Weak::upgrade).collect();
        let mut old = Vec::new();
        for connection in &all {
            let state = connection.state();
            // A connection that is already closing frees the slot.
            if closable(&state) && state.closing {
                return;
            }
            if closable(&state) && now.duration_since(state.since) >= min_time {
                old.push((connection, state.since));
            }
        }
        let of_process = |process| old.iter().filter(|(other, _)| other.process == process).count();
        let age = |since: Instant| now.duration_since(since);
        let slowest = old.iter().max_by_key(|(one, since)| (of_process(one.process), age(*since)));
        if let Some((connection, _)) = slowest {
            connection.state().closing = true;
            connection.changed.notify_one();
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Weak<Connection>>> {
        // Each change is a single call, so the list is consistent after a panic.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket of a connection. Records when the client reads bytes.
pub(crate) struct Watched {
    stream: UnixStream,
    connection: Arc<Connection>,
}

impl Watched {
    pub(crate) const fn new(stream: UnixStream, connection: Arc<Connection>) -> Self {
        Self { stream, connection }
    }

    fn record(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.connection.state().last_read = Instant::now();
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
        self.record(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.record(written)
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
