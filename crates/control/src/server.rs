//! The server: accepts connections on its own thread and serves one request on each.
//!
//! Only the socket's owner can connect, so the limits protect against faulty and hanging clients:
//! no client can exhaust the process that serves a guest.

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

use crate::balloon::BalloonControl;
use crate::connection::{Connection, Connections, Phase, Watched, serving};
use crate::error::ControlError;
use crate::limits::{ANSWER_MARGIN, Limits};
use crate::router::router;
use crate::socket::{SocketAccess, SocketFile, listen_on};
use crate::vmm::{BalloonOnly, VmmControl};

/// Buffer for a request head. A typical one has some 200 bytes.
const HEAD_BUFFER_BYTES: usize = 16 * 1024;

/// Limit of header fields in a request. curl sends 4.
const MAX_HEADERS: usize = 32;

/// Pause after a failed `accept`, usually for lack of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A running server. Dropping it stops it and removes its socket.
#[derive(Debug)]
pub struct Server {
    // Dropped first, so that no client finds a socket whose server is about to stop.
    file: Option<SocketFile>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `balloon` on a Unix socket at `path` from a new thread. The socket has mode 0600 from
    /// its creation. The socket of an exited process is replaced.
    ///
    /// # Errors
    /// [`ControlError::SocketInUse`] if a live process serves it,
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
        Self::start(path, Arc::new(BalloonOnly(balloon)), limits)
    }

    /// [`Server::bind`] for a VMM.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_vmm(path: &Path, vmm: Arc<dyn VmmControl>) -> Result<Self, ControlError> {
        Self::start(path, vmm, Limits::default())
    }

    fn start(path: &Path, vmm: Arc<dyn VmmControl>, limits: Limits) -> Result<Self, ControlError> {
        let event_loop = |source| ControlError::EventLoop { source };
        let runtime = Builder::new_current_thread()
            .enable_all()
            // One call for each connection, and one cancellation for each waiter.
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
            .spawn(move || run(runtime, listener, vmm, limits, stopped))
            .map_err(event_loop)?;
        Ok(Self { file: Some(file), stop, thread: Some(thread) })
    }

    /// Returns the absolute path of the socket.
    pub fn path(&self) -> &Path {
        self.file.as_ref().map_or(Path::new(""), SocketFile::path)
    }

    /// Removes the socket, completes the requests in progress and ends the thread, as dropping the
    /// server does.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.file = None;
        self.stop.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("host: the control server's thread panicked");
        }
    }
}

fn run(
    runtime: Runtime,
    listener: UnixListener,
    vmm: Arc<dyn VmmControl>,
    limits: Limits,
    stopped: watch::Receiver<bool>,
) {
    let connections = Connections::new(&limits);
    let app = router(vmm, limits, Arc::clone(&connections), stopped.clone());
    // A panic in the accept loop costs the connection being accepted, not the control of the guest.
    while diagnostics::contain(|| {
        let stopped = stopped.clone();
        runtime.block_on(accept_until_stopped(&listener, &app, limits, &connections, stopped));
    })
    .is_err()
    {
        thread::sleep(ACCEPT_BACKOFF);
    }
    drop(listener);
    // Gives the requests in progress time to finish.
    runtime.block_on(async {
        let _ = timeout(limits.stop_timeout, connections.idle(&limits)).await;
    });
    // A balloon call that hangs must not block the exit of the process.
    runtime.shutdown_timeout(limits.stop_timeout);
}

/// Accepts connections until `stopped`.
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
                    warn!(%error, "host: cannot accept a control connection");
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

/// Returns the PID of the client; 0 if it is not visible in this process's PID namespace.
fn process_of(stream: &UnixStream) -> i32 {
    stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0)
}

/// Serves the one request of a connection. With one request only, the lifetime of a connection is
/// bounded by the sum of the timeouts of its parts.
async fn serve_one(stream: UnixStream, app: Router, limits: Limits, connection: Arc<Connection>) {
    let app = TowerToHyperService::new(app);
    let answer = service_fn(|request| {
        let (connection, answer) = (Arc::clone(&connection), app.call(request));
        async move {
            connection.enter(Phase::Working);
            let answer = serving(Some(Arc::clone(&connection)), answer).await;
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
    // Head, body, call and response.
    let longest = limits.max_wait.max(limits.max_request + ANSWER_MARGIN)
        + limits.request_timeout * 2
        + limits.answer_timeout;
    tokio::select! {
        served = timeout(longest, served) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "a control connection failed"),
            Err(_) => debug!("a control connection timed out"),
        },
        why = connection.until_expired(&limits) => debug!(why, "closing a control connection"),
    }
}
