//! A blocking client, for command lines and tests.

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
    AskFreePages, BalloonStatus, Caches, CancelledRequest, DropCaches, DroppedCaches,
    FreePageHints, FreePages, MigrationStatus, Problem, ReleaseMode, ReleaseStatus, ReleasedHold,
    ResolveAction, ResolveMigration, SetBalloon, SetRelease, SetStats, StartMigration,
    StartSnapshot, StatsStatus, Status,
};
use crate::bitmap::{FIRST_PAGE_HEADER, PAGES_HEADER, REGIONS_HEADER};
use crate::error::ControlError;

/// Time for an answer that has nothing to wait for. A status may measure a
/// guest's memory, which takes some milliseconds per GiB.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer that is read. The largest, the API's description, has some
/// 20 KiB; a status grows with its kinds of faults.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Further time for an answer that has to be made and carried: a picture, or the
/// bitmap of a large guest, 32 MiB for each TiB.
const BULK_TIME: Duration = Duration::from_secs(50);

/// Further time for looking up a destination's name.
const LOOK_UP_TIME: Duration = Duration::from_secs(20);

/// Further time for asking the other side: to reach it, to agree on keys, and its silence.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause before another try when the server's backlog is full; connecting to a
/// Unix socket cannot wait for that by itself without blocking.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// What the bits of a bitmap stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapPlace {
    /// Number of the page of the first bit.
    pub first_page: u64,
    /// Bits.
    pub pages: u64,
    /// The regions of guest memory, `first+pages` by commas.
    pub regions: String,
}

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
    /// returns the state then. [`BalloonStatus::at_target`] says whether it got
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

    /// Has the guest's kernel drop caches. The server ends the request within
    /// `guest_timeout`.
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

    /// Asks the guest for its free pages.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn ask_free_pages(&self, ask: &AskFreePages) -> Result<FreePages, ControlError> {
        let wait = Duration::from_millis(ask.timeout_ms);
        self.send_json(Method::POST, "/v1/free-pages", ask, wait)
    }

    /// The newest free pages that the guest named.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn free_pages(&self) -> Result<FreePages, ControlError> {
        self.get("/v1/free-pages")
    }

    /// Gives a hold back to the guest.
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

    /// Begins to move the guest.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn start_migration(&self, ask: &StartMigration) -> Result<MigrationStatus, ControlError> {
        self.send_json(Method::POST, "/v1/migration", ask, LOOK_UP_TIME)
    }

    /// Begins to write the guest to a file.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn start_snapshot(&self, ask: &StartSnapshot) -> Result<MigrationStatus, ControlError> {
        self.send_json(Method::POST, "/v1/snapshot", ask, LOOK_UP_TIME)
    }

    /// Where the newest migration stands.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn migration(&self) -> Result<MigrationStatus, ControlError> {
        self.get("/v1/migration")
    }

    /// Ends a migration.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn cancel_migration(&self) -> Result<MigrationStatus, ControlError> {
        self.json(Method::DELETE, "/v1/migration", Bytes::new(), Duration::ZERO)
    }

    /// Ends a doubt about where the guest runs.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn resolve_migration(&self, word: ResolveAction) -> Result<MigrationStatus, ControlError> {
        let body = ResolveMigration { word };
        self.send_json(Method::POST, "/v1/migration/resolve", &body, RESOLVE_TIMEOUT)
    }

    /// Stops the request that the guest works on.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn cancel(&self) -> Result<CancelledRequest, ControlError> {
        self.json(Method::POST, "/v1/cancel", Bytes::new(), Duration::ZERO)
    }

    /// The newest free pages as a picture in PNG form.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn free_pages_picture(&self) -> Result<Vec<u8>, ControlError> {
        self.send(Method::GET, "/v1/free-pages/picture", Bytes::new(), BULK_TIME).map(Vec::from)
    }

    /// Writes the newest free pages to `out`, one bit for each page of guest
    /// memory; says where that is.
    ///
    /// # Errors
    /// As [`Client::status`], and [`ControlError::Broken`] where `out` fails.
    pub fn free_pages_bitmap(&self, out: &mut dyn Write) -> Result<BitmapPlace, ControlError> {
        let request = self.request(Method::GET, "/v1/free-pages/bitmap", Bytes::new())?;
        let limit = self.answer_timeout.saturating_add(BULK_TIME);
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

    fn place(&self, headers: &HeaderMap) -> Result<BitmapPlace, ControlError> {
        let text = |name: &str| {
            let value = headers.get(name).and_then(|value| value.to_str().ok());
            value.ok_or_else(|| self.bad_answer(format!("there is no header {name}")))
        };
        let number = |name| text(name)?.parse().map_err(|error| self.bad_answer(error));
        Ok(BitmapPlace {
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

    /// One request, one answer. `wait` is what the server was asked to wait.
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

    /// What the server says of a request that failed.
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

    /// Sends a request; the answer's body comes as long as the task runs.
    async fn begin(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(AbortHandle, Response<Incoming>), ControlError> {
        let stream = TokioIo::new(self.open().await?);
        let (mut sender, connection) = handshake(stream).await.map_err(|e| self.broken(e))?;
        // Ends with the answer; its error is the sender's error as well.
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

/// Milliseconds as the API counts them.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
