//! Blocking client for command lines and tests.

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::api::{
    BalloonStatus, Caches, CancelledRequest, DropCaches, DroppedCaches, FreePageHints, FreePages,
    FreePagesRequest, MigrationStatus, Problem, ReleaseMode, ReleaseStatus, ReleasedHold,
    ResolveAction, ResolveMigration, SetBalloon, SetRelease, SetStats, StartMigration,
    StartSnapshot, StatsStatus, Status,
};
use crate::bitmap::{FIRST_PAGE_HEADER, PAGES_HEADER, REGIONS_HEADER};
use crate::error::ControlError;

/// Timeout for a response that does not wait for the guest. A status may measure guest memory,
/// which takes some milliseconds per GiB.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest JSON response accepted. The API description, the largest, has some 20 KiB; a status
/// grows with the number of fault kinds.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Additional timeout for generating and transferring a picture or a bitmap, which has 32 MiB per
/// TiB of guest memory.
const BULK_TIMEOUT: Duration = Duration::from_secs(50);

/// Additional timeout for resolving the destination's host name.
const NAME_LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);

/// Additional timeout for querying the peer: connecting, the TLS handshake, and its response.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause before the next connection attempt when the server's backlog is full: a non-blocking
/// connect to a Unix socket cannot wait for it.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Location of a bitmap's bits in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapLayout {
    /// Page number of the first bit.
    pub first_page: u64,
    /// Number of bits.
    pub pages: u64,
    /// The regions of guest memory as `first+pages`, separated by commas.
    pub regions: String,
}

/// Client of one balloon. It opens a connection per call, since the server serves one request per
/// connection.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
    answer_timeout: Duration,
}

impl Client {
    /// Connects to the server at `path` to check that it exists.
    ///
    /// # Errors
    /// [`ControlError::NotFound`] without a socket, [`ControlError::Dead`] if its process has
    /// exited, [`ControlError::NoAnswer`], [`ControlError::Io`], [`ControlError::EventLoop`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| ControlError::EventLoop { source })?;
        let client = Self { path: path.to_owned(), runtime, answer_timeout: ANSWER_TIMEOUT };
        client.within(ANSWER_TIMEOUT, client.open())?;
        Ok(client)
    }

    /// Sets the response timeout.
    #[must_use]
    pub fn with_answer_timeout(mut self, answer_timeout: Duration) -> Self {
        self.answer_timeout = answer_timeout;
        self
    }

    /// Returns the full status of the balloon and its guest.
    ///
    /// # Errors
    /// [`ControlError::Answered`] if the server returns an error; otherwise
    /// [`ControlError::NotFound`], [`ControlError::Dead`], [`ControlError::NoAnswer`],
    /// [`ControlError::Broken`], [`ControlError::BadAnswer`], [`ControlError::Io`].
    pub fn status(&self) -> Result<Status, ControlError> {
        self.get("/v1/status")
    }

    /// Returns the target and actual size of the balloon.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn balloon(&self) -> Result<BalloonStatus, ControlError> {
        self.get("/v1/balloon")
    }

    /// Sets the target, waits up to `wait` for the guest, and returns the state then.
    /// [`BalloonStatus::at_target`] tells whether the guest reached it; [`Client::wait`] continues
    /// the wait. If the returned `target_bytes` differs, another client replaced the target during
    /// the wait.
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

    /// Waits up to `wait` until change `generation` is over. The server limits long waits, so this
    /// may return earlier.
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

    /// Sets the polling interval of guest statistics; 0 stops polling.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_stats(&self, interval_ms: u64) -> Result<StatsStatus, ControlError> {
        self.put("/v1/stats", &SetStats { interval_ms }, Duration::ZERO)
    }

    /// Requests free page hints and waits up to `wait` for them.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn hints(&self, wait: Duration) -> Result<FreePageHints, ControlError> {
        let path = format!("/v1/hints?wait_ms={}", wait.as_millis());
        self.json(Method::POST, &path, Bytes::new(), wait)
    }

    /// Returns the metrics as Prometheus text.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn metrics(&self) -> Result<String, ControlError> {
        let text = self.send(Method::GET, "/v1/metrics", Bytes::new(), Duration::ZERO)?;
        String::from_utf8(text.into()).map_err(|error| self.bad_answer(error))
    }

    /// Drops the caches of the guest's kernel. The server ends the request within `guest_timeout`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn drop_caches(
        &self,
        what: Caches,
        guest_timeout: Duration,
    ) -> Result<DroppedCaches, ControlError> {
        let ask = DropCaches { what, timeout_ms: millis(guest_timeout) };
        self.send_json(Method::POST, "/v1/drop-caches", &ask, guest_timeout)
    }

    /// Requests the guest's free pages.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn request_free_pages(&self, ask: &FreePagesRequest) -> Result<FreePages, ControlError> {
        let wait = Duration::from_millis(ask.timeout_ms);
        self.send_json(Method::POST, "/v1/free-pages", ask, wait)
    }

    /// Returns the newest free pages that the guest reported.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn free_pages(&self) -> Result<FreePages, ControlError> {
        self.get("/v1/free-pages")
    }

    /// Releases the hold.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn release_free_pages(
        &self,
        guest_timeout: Duration,
    ) -> Result<ReleasedHold, ControlError> {
        let path = format!("/v1/free-pages?timeout_ms={}", millis(guest_timeout));
        self.json(Method::DELETE, &path, Bytes::new(), guest_timeout)
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        self.send_json(Method::POST, "/v1/migration", ask, NAME_LOOKUP_TIMEOUT)
    }

    /// Starts a VM snapshot.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        self.send_json(Method::POST, "/v1/snapshot", ask, NAME_LOOKUP_TIMEOUT)
    }

    /// Returns the status of the newest migration or VM snapshot.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn migration(&self) -> Result<MigrationStatus, ControlError> {
        self.get("/v1/migration")
    }

    /// Cancels the migration or VM snapshot.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        self.json(Method::DELETE, "/v1/migration", Bytes::new(), Duration::ZERO)
    }

    /// Resolves an in-doubt migration.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn resolve_migration(
        &self,
        action: ResolveAction,
    ) -> Result<MigrationStatus, ControlError> {
        let body = ResolveMigration { action };
        self.send_json(Method::POST, "/v1/migration/resolve", &body, RESOLVE_TIMEOUT)
    }

    /// Cancels the request that the guest is processing.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn cancel(&self) -> Result<CancelledRequest, ControlError> {
        self.json(Method::POST, "/v1/cancel", Bytes::new(), Duration::ZERO)
    }

    /// Returns the newest free pages as an SVG picture.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn free_pages_picture(&self) -> Result<Vec<u8>, ControlError> {
        self.send(Method::GET, "/v1/free-pages/picture", Bytes::new(), BULK_TIMEOUT).map(Vec::from)
    }

    /// Writes the newest free pages to `out`, one bit for each page of guest memory, and returns
    /// where they are.
    ///
    /// # Errors
    /// As [`Client::status`], and [`ControlError::Broken`] if writing to `out` fails.
    pub fn free_pages_bitmap(&self, out: &mut dyn Write) -> Result<BitmapLayout, ControlError> {
        let request = self.request(Method::GET, "/v1/free-pages/bitmap", Bytes::new())?;
        let limit = self.answer_timeout.saturating_add(BULK_TIMEOUT);
        self.within(limit, async {
            let (pump, answer) = self.begin(request).await?;
            let (head, mut body) = answer.into_parts();
            if !head.status.is_success() {
                let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
                let body = body.map_err(|e| self.broken(e))?.to_bytes();
                return Err(self.problem(head.status, &body));
            }
            while let Some(frame) = body.frame().await {
                if let Ok(bytes) = frame.map_err(|e| self.broken(e))?.into_data() {
                    out.write_all(&bytes).map_err(|e| self.broken(e))?;
                }
            }
            pump.abort();
            self.place(&head.headers)
        })
    }

    fn place(&self, headers: &HeaderMap) -> Result<BitmapLayout, ControlError> {
        let text = |name: &str| {
            let value = headers.get(name).and_then(|value| value.to_str().ok());
            value.ok_or_else(|| self.bad_answer(format!("header {name} is missing")))
        };
        let number = |name| text(name)?.parse().map_err(|error| self.bad_answer(error));
        Ok(BitmapLayout {
            first_page: number(FIRST_PAGE_HEADER)?,
            pages: number(PAGES_HEADER)?,
            regions: text(REGIONS_HEADER)?.to_owned(),
        })
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
        self.send_json(Method::PUT, path, body, wait)
    }

    fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        wait: Duration,
    ) -> Result<T, ControlError> {
        let body = serde_json::to_vec(body).map_err(|error| self.bad_answer(error))?;
        self.json(method, path, body.into(), wait)
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

    /// Sends one request. `wait` is how long the server may wait before it responds.
    fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> Result<Bytes, ControlError> {
        let request = self.request(method, path, body)?;
        let limit = self.answer_timeout.saturating_add(wait);
        let (status, answer) = self.within(limit, self.exchange(request))?;
        if status.is_success() {
            return Ok(answer);
        }
        Err(self.problem(status, &answer))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ControlError> {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.bad_answer(error))
    }

    /// Converts an error response.
    fn problem(&self, status: StatusCode, answer: &[u8]) -> ControlError {
        match serde_json::from_slice(answer) {
            Ok(Problem { error, hint }) => {
                ControlError::Answered { status: status.as_u16(), error, hint }
            }
            Err(error) => self.bad_answer(error),
        }
    }

    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ControlError> {
        let (pump, answer) = self.begin(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
        pump.abort();
        body.map(|body| (status, body.to_bytes())).map_err(|e| self.broken(e))
    }

    /// Sends a request. The response body arrives only while the returned task runs.
    async fn begin(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(AbortHandle, Response<Incoming>), ControlError> {
        let stream = TokioIo::new(self.open().await?);
        let (mut sender, connection) = handshake(stream).await.map_err(|e| self.broken(e))?;
        // Ends with the response; its error is also the sender's error.
        let pump = tokio::spawn(connection).abort_handle();
        match sender.send_request(request).await {
            Ok(answer) => Ok((pump, answer)),
            Err(error) => {
                pump.abort();
                Err(self.broken(error))
            }
        }
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
        // The timer must be created inside the runtime.
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

/// Converts to the API's milliseconds, saturating.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
