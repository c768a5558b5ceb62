//! A blocking client, for command lines and tests.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};

use crate::api::{
    BalloonStatus, FreePageHints, Problem, ReleaseMode, ReleaseStatus, SetBalloon, SetRelease,
    SetStats, StatsStatus, Status,
};
use crate::error::ControlError;

/// Time for an answer that has nothing to wait for. A status may measure a
/// guest's memory, which takes some milliseconds per GiB.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer that is read. The largest, the API's description, has some
/// 20 KiB; a status grows with its kinds of faults.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Pause before another try when the server's backlog is full; connecting to a
/// Unix socket cannot wait for that by itself without blocking.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// A client of one balloon. It opens a connection per call, as the server
/// serves one request on each.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
    answer_timeout: Duration,
}

impl Client {
    /// A client of the server at `path`; finds out whether one is there.
    ///
    /// # Errors
    /// [`ControlError::NotFound`] without a socket, [`ControlError::Dead`] when
    /// its process is gone, [`ControlError::NoAnswer`], [`ControlError::Io`],
    /// [`ControlError::EventLoop`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| ControlError::EventLoop { source })?;
        let client = Self { path: path.to_owned(), runtime, answer_timeout: ANSWER_TIMEOUT };
        client.within(ANSWER_TIMEOUT, client.open())?;
        Ok(client)
    }

    /// The same client with another time to wait for an answer.
    #[must_use]
    pub fn with_answer_timeout(mut self, answer_timeout: Duration) -> Self {
        self.answer_timeout = answer_timeout;
        self
    }

    /// Everything known about the balloon and its guest.
    ///
    /// # Errors
    /// [`ControlError::Answered`] when the server refuses, else what stood in
    /// the way: [`ControlError::NotFound`], [`ControlError::Dead`],
    /// [`ControlError::NoAnswer`], [`ControlError::Broken`],
    /// [`ControlError::BadAnswer`], [`ControlError::Io`].
    pub fn status(&self) -> Result<Status, ControlError> {
        self.get("/v1/status")
    }

    /// What the balloon shall hold and holds.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn balloon(&self) -> Result<BalloonStatus, ControlError> {
        self.get("/v1/balloon")
    }

    /// Sets what the balloon shall hold, waits up to `wait` for the guest, and
    /// returns the state then. [`BalloonStatus::settled`] says whether it got
    /// there, [`Client::wait`] goes on. Another target in it than `target_bytes`
    /// says that another client replaced this one during the wait.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_balloon(
        &self,
        target_bytes: u64,
        wait: Duration,
    ) -> Result<BalloonStatus, ControlError> {
        let path = format!("/v1/balloon?wait_ms={}", wait.as_millis());
        self.put(&path, &SetBalloon { target_bytes }, wait)
    }

    /// Waits up to `wait` until change `generation` is over. The server cuts
    /// long waits, so this may return earlier.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn wait(&self, generation: u64, wait: Duration) -> Result<BalloonStatus, ControlError> {
        let path = format!("/v1/balloon?generation={generation}&wait_ms={}", wait.as_millis());
        self.json(Method::GET, &path, Bytes::new(), wait)
    }

    /// Sets when pages are released.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_release(&self, mode: ReleaseMode) -> Result<ReleaseStatus, ControlError> {
        self.put("/v1/release", &SetRelease { mode }, Duration::ZERO)
    }

    /// Sets how often the guest is asked for statistics; 0 is never.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_stats(&self, interval_ms: u64) -> Result<StatsStatus, ControlError> {
        self.put("/v1/stats", &SetStats { interval_ms }, Duration::ZERO)
    }

    /// Asks the guest which pages it does not use, for up to `wait`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn hints(&self, wait: Duration) -> Result<FreePageHints, ControlError> {
        let path = format!("/v1/hints?wait_ms={}", wait.as_millis());
        self.json(Method::POST, &path, Bytes::new(), wait)
    }

    /// The figures as Prometheus text.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn metrics(&self) -> Result<String, ControlError> {
        let text = self.send(Method::GET, "/v1/metrics", Bytes::new(), Duration::ZERO)?;
        String::from_utf8(text.into()).map_err(|error| self.bad_answer(error))
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ControlError> {
        self.json(Method::GET, path, Bytes::new(), Duration::ZERO)
    }

    fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        wait: Duration,
    ) -> Result<T, ControlError> {
        let body = serde_json::to_vec(body).map_err(|error| self.bad_answer(error))?;
        self.json(Method::PUT, path, body.into(), wait)
    }

    fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> Result<T, ControlError> {
        let answer = self.send(method, path, body, wait)?;
        serde_json::from_slice(&answer).map_err(|error| self.bad_answer(error))
    }

    /// One request, one answer. `wait` is what the server was asked to wait.
    fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> Result<Bytes, ControlError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.bad_answer(error))?;
        let limit = self.answer_timeout.saturating_add(wait);
        let (status, answer) = self.within(limit, self.exchange(request))?;
        if status.is_success() {
            return Ok(answer);
        }
        let Problem { error, hint } =
            serde_json::from_slice(&answer).map_err(|error| self.bad_answer(error))?;
        Err(ControlError::Answered { status: status.as_u16(), error, hint })
    }

    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ControlError> {
        let stream = TokioIo::new(self.open().await?);
        let (mut sender, connection) = handshake(stream).await.map_err(|e| self.broken(e))?;
        // Ends with the answer; its error is the sender's error as well.
        let pump = tokio::spawn(connection);
        let answer = sender.send_request(request).await.map_err(|e| self.broken(e));
        let answer = match answer {
            Ok(answer) => {
                let status = answer.status();
                let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
                body.map(|body| (status, body.to_bytes())).map_err(|e| self.broken(e))
            }
            Err(error) => Err(error),
        };
        pump.abort();
        answer
    }

    async fn open(&self) -> Result<UnixStream, ControlError> {
        loop {
            let path = self.path.clone();
            match UnixStream::connect(&self.path).await {
                Ok(stream) => return Ok(stream),
                Err(source) => match source.kind() {
                    io::ErrorKind::NotFound => return Err(ControlError::NotFound { path }),
                    io::ErrorKind::ConnectionRefused => return Err(ControlError::Dead { path }),
                    io::ErrorKind::WouldBlock => sleep(CONNECT_RETRY).await,
                    _ => return Err(ControlError::io("connect to", &path)(source)),
                },
            }
        }
    }

    fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, ControlError>>,
    ) -> Result<T, ControlError> {
        // The timer belongs to the runtime, so it is made inside of it.
        let done = self.runtime.block_on(async { timeout(limit, work).await });
        let limit_ms = limit.as_millis();
        done.unwrap_or_else(|_| Err(ControlError::NoAnswer { path: self.path.clone(), limit_ms }))
    }

    fn broken(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> ControlError {
        ControlError::Broken { path: self.path.clone(), source: source.into() }
    }

    fn bad_answer(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> ControlError {
        ControlError::BadAnswer { path: self.path.clone(), source: source.into() }
    }
}
