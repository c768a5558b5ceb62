//! The server: accepts connections on its own thread, one request each.
//!
//! Whoever can connect is the owner of the socket, so these limits are there
//! for clients that hang or err, and so that no client can wear out the process
//! that serves a guest.

mod connection;
mod places;

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::api::MAX_TIMEOUT_MS;
use crate::balloon::BalloonControl;
use crate::error::ControlError;
use crate::monitor::{OnlyBalloon, VmmControl};
use crate::routes;
use crate::routes::request::ANSWER_MARGIN;
use crate::socket::{SocketAccess, SocketFile, listen_on};

pub(crate) use connection::{Connections, Phase};
pub(crate) use places::{NoPlace, Place, Places};

use connection::{Connection, Watched};

/// What is known of the connection that is served.
pub(crate) mod served {
    pub(crate) use super::connection::{current, enter, process, serving};
}

/// Bounds on what clients can hold. [`Limits::default`] is meant for use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections served at a time. Where more come, those go whose clients
    /// have been slowest to send a request or to take its answer. One costs a
    /// buffer of 16 KiB, and a thread while it asks the balloon.
    pub connections: usize,
    /// Clients among them that may wait for a change at a time; fewer than
    /// `connections`, so that the others still get their answers.
    pub waiters: usize,
    /// Waiters of one process, so that one which hangs leaves places to others.
    pub waiters_each: usize,
    /// Requests among them to move the guest or to resolve where it is. Each may
    /// wait for a name server or for another host.
    pub moves: usize,
    /// Large answers at a time: bitmaps and pictures. One keeps what the guest
    /// named for as long as it is read.
    pub bulk: usize,
    /// Time for the head of a request, and as much again for its body. Both
    /// come from the same machine.
    pub request_timeout: Duration,
    /// Time for which a client may take no byte of its answer.
    pub stall_timeout: Duration,
    /// Time in which a client must have taken all of its answer.
    pub answer_timeout: Duration,
    /// Longest wait for a change; a longer `wait_ms` is cut to this.
    pub max_wait: Duration,
    /// Longest time for a request to the guest; a longer `timeout_ms` is refused.
    pub max_request: Duration,
    /// Time for requests in progress when the server stops.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            waiters: 32,
            waiters_each: 16,
            moves: 4,
            bulk: 4,
            request_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(60),
            max_wait: Duration::from_secs(60),
            max_request: Duration::from_millis(MAX_TIMEOUT_MS),
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
    pub fn bind(path: &Path, balloon: Arc<dyn BalloonControl>) -> Result<Self, ControlError> {
        Self::bind_with(path, balloon, Limits::default())
    }

    /// [`Server::bind`] with other limits.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_with(
        path: &Path,
        balloon: Arc<dyn BalloonControl>,
        limits: Limits,
    ) -> Result<Self, ControlError> {
        Self::start(path, Arc::new(OnlyBalloon(balloon)), limits)
    }

    /// [`Server::bind`] for a whole monitor.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_monitor(path: &Path, monitor: Arc<dyn VmmControl>) -> Result<Self, ControlError> {
        Self::start(path, monitor, Limits::default())
    }

    fn start(
        path: &Path,
        monitor: Arc<dyn VmmControl>,
        limits: Limits,
    ) -> Result<Self, ControlError> {
        let event_loop = |source| ControlError::EventLoop { source };
        let runtime = Builder::new_current_thread()
            .enable_all()
            // One call for each connection, and those that stop what was asked of the guest.
            .max_blocking_threads(limits.connections + limits.waiters)
            .thread_name("control-call")
            .build()
            .map_err(event_loop)?;
        let (file, listener) = listen_on(path, SocketAccess::Owner)?;
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
    monitor: Arc<dyn VmmControl>,
    limits: Limits,
    stopped: watch::Receiver<bool>,
) {
    let connections = Connections::new(&limits);
    let app = routes::router(monitor, limits, Arc::clone(&connections), stopped.clone());
    // A panic of who accepts costs the connection that it was about, and no operator the guest.
    while diagnostics::contain(|| {
        let stopped = stopped.clone();
        runtime.block_on(accept_until_stopped(&listener, &app, limits, &connections, stopped));
    })
    .is_err()
    {
        thread::sleep(ACCEPT_BACKOFF);
    }
    drop(listener);
    // The requests in progress have their time.
    runtime.block_on(async {
        let _ = timeout(limits.stop_timeout, connections.idle(&limits)).await;
    });
    // A balloon that hangs in a call must not hang the process on its way out.
    runtime.shutdown_timeout(limits.stop_timeout);
}

/// Accepts until told to stop.
async fn accept_until_stopped(
    listener: &UnixListener,
    app: &Router,
    limits: Limits,
    connections: &Connections,
    mut stopped: watch::Receiver<bool>,
) {
    let accept_all = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    diagnostics::panic_point("control");
                    let Some(connection) = connections.admit(process_of(&stream)).await else {
                        return;
                    };
                    tokio::spawn(serve_one(stream, app.clone(), limits, connection));
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

/// The process that connected; 0 where it is none that this one could know of.
fn process_of(stream: &UnixStream) -> i32 {
    stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0)
}

/// Serves the one request of a connection. One only, so that a connection has
/// an end: the sum of the times for its parts.
async fn serve_one(stream: UnixStream, app: Router, limits: Limits, connection: Arc<Connection>) {
    let app = TowerToHyperService::new(app);
    let answer = service_fn(|request| {
        let (connection, answer) = (Arc::clone(&connection), app.call(request));
        async move {
            connection.enter(Phase::Working);
            let answer = served::serving(Some(Arc::clone(&connection)), answer).await;
            connection.enter(Phase::Answering);
            answer
        }
    });
    let stream = Watched::new(stream, Arc::clone(&connection));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.request_timeout)
        .keep_alive(false)
        .max_buf_size(HEAD_BUFFER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), answer);
    // Head, body, and what a client may take for its answer.
    let longest = limits.max_wait.max(limits.max_request + ANSWER_MARGIN)
        + limits.request_timeout * 2
        + limits.answer_timeout;
    tokio::select! {
        served = timeout(longest, served) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "a control connection failed"),
            Err(_) => debug!("a control connection took too long"),
        },
        why = connection.overstays(&limits) => debug!(why, "a control connection is closed"),
    }
}
