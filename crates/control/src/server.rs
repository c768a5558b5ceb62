//! The server: accepts connections on its own thread, one request each.
//!
//! Whoever can connect is the owner of the socket, so these limits are there
//! for clients that hang or err, and so that no client can wear out the process
//! that serves a guest.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::balloon::Balloon;
use crate::error::ControlError;
use crate::monitor::{Monitor, OnlyBalloon};
use crate::routes;
use crate::routes::request::GRACE;
use crate::socket::{SocketAccess, SocketFile, listen_on};

/// Bounds on what clients can hold. [`Limits::default`] is meant for use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections served at a time; more wait in the kernel's backlog. One
    /// costs a buffer of 16 KiB, and a thread while it asks the balloon.
    pub connections: usize,
    /// Clients among them that may wait for a change at a time; fewer than
    /// `connections`, so that the others still get their answers.
    pub waiters: usize,
    /// Time for the head of a request, and as much again for its body. Both
    /// come from the same machine.
    pub request_timeout: Duration,
    /// Longest wait for a change; a longer `wait_ms` is cut to this.
    pub max_wait: Duration,
    /// Longest time for a request to the guest; a longer `timeout_ms` is cut to
    /// this. A guest may have a hundred GiB of caches to drop.
    pub max_request: Duration,
    /// Time for requests in progress when the server stops.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            waiters: 16,
            request_timeout: Duration::from_secs(5),
            max_wait: Duration::from_secs(60),
            max_request: Duration::from_secs(600),
            stop_timeout: Duration::from_secs(1),
        }
    }
}

/// Bytes buffered of a request's head. A head of this API has some 200.
const HEAD_BUFFER_BYTES: usize = 16 * 1024;

/// Header fields in a request's head. curl sends 4.
const MAX_HEADERS: usize = 32;

/// Pause after a failed `accept`, which mostly means no free file descriptor.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A running server. Dropping it stops it and removes its socket.
#[derive(Debug)]
pub struct Server {
    // In this order: the socket's name goes first, so that no client finds a
    // socket whose server is about to go.
    file: Option<SocketFile>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `balloon` on a Unix socket at `path`, from a thread of its own.
    /// The socket has mode 0600 from the start. One that a dead process left
    /// behind is replaced.
    ///
    /// # Errors
    /// [`ControlError::SocketInUse`] when a live process serves it,
    /// [`ControlError::NotASocket`], [`ControlError::PathTooLong`],
    /// [`ControlError::Io`], [`ControlError::EventLoop`].
    pub fn bind(path: &Path, balloon: Arc<dyn Balloon>) -> Result<Self, ControlError> {
        Self::bind_with(path, balloon, Limits::default())
    }

    /// [`Server::bind`] with other limits.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_with(
        path: &Path,
        balloon: Arc<dyn Balloon>,
        limits: Limits,
    ) -> Result<Self, ControlError> {
        Self::start(path, Arc::new(OnlyBalloon(balloon)), limits)
    }

    /// [`Server::bind`] for a whole monitor.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_monitor(path: &Path, monitor: Arc<dyn Monitor>) -> Result<Self, ControlError> {
        Self::start(path, monitor, Limits::default())
    }

    fn start(path: &Path, monitor: Arc<dyn Monitor>, limits: Limits) -> Result<Self, ControlError> {
        let event_loop = |source| ControlError::EventLoop { source };
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(limits.connections)
            .thread_name("control-call")
            .build()
            .map_err(event_loop)?;
        let (listener, file) = listen_on(path, SocketAccess::Owner)?;
        let listener = {
            let _guard = runtime.enter();
            UnixListener::from_std(listener).map_err(event_loop)?
        };
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || run(runtime, listener, monitor, limits, stopped))
            .map_err(event_loop)?;
        Ok(Self { file: Some(file), stop, thread: Some(thread) })
    }

    /// Where the socket is, as an absolute path.
    pub fn path(&self) -> &Path {
        self.file.as_ref().map_or(Path::new(""), SocketFile::path)
    }

    /// Removes the socket, answers the requests in progress and ends the
    /// thread. The same as dropping the server.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.file = None;
        self.stop.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the control server ended in a panic");
        }
    }
}

fn run(
    runtime: Runtime,
    listener: UnixListener,
    monitor: Arc<dyn Monitor>,
    limits: Limits,
    stopped: watch::Receiver<bool>,
) {
    let app = routes::router(monitor, limits, stopped.clone());
    let slots = Arc::new(Semaphore::new(limits.connections));
    // A panic of who accepts costs the connection that it was about, and no operator the guest.
    while diagnostics::contain(|| {
        runtime.block_on(accept_until_stopped(&listener, &app, limits, &slots, stopped.clone()));
    })
    .is_err()
    {
        thread::sleep(ACCEPT_BACKOFF);
    }
    drop(listener);
    runtime.block_on(finish(&slots, limits));
    // A balloon that hangs in a call must not hang the process on its way out.
    runtime.shutdown_timeout(limits.stop_timeout);
}

/// Accepts until told to stop.
async fn accept_until_stopped(
    listener: &UnixListener,
    app: &Router,
    limits: Limits,
    slots: &Arc<Semaphore>,
    mut stopped: watch::Receiver<bool>,
) {
    let accept_all = async {
        loop {
            let Ok(slot) = Arc::clone(slots).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    diagnostics::panic_point("control");
                    tokio::spawn(serve_one(stream, app.clone(), limits, slot));
                }
                Err(error) => {
                    warn!(%error, "cannot accept a control connection");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept_all => {}
        _ = stopped.wait_for(|stop| *stop) => {}
    }
}

/// Gives the requests in progress their time.
async fn finish(slots: &Semaphore, limits: Limits) {
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = timeout(limits.stop_timeout, slots.acquire_many(all)).await;
}

/// Serves the one request of a connection. One only, so that a connection has
/// an end: the sum of the times for its parts.
async fn serve_one(stream: UnixStream, app: Router, limits: Limits, _slot: OwnedSemaphorePermit) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.request_timeout)
        .keep_alive(false)
        .max_buf_size(HEAD_BUFFER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    // Head, body, and as much for a client that is slow to read the answer.
    let longest = limits.max_wait.max(limits.max_request + GRACE) + limits.request_timeout * 3;
    match timeout(longest, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a control connection failed"),
        Err(_) => debug!("a control connection took too long"),
    }
}
