//! Endpoints that send requests to the guest's kernel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::api::{
    BALLOON_PAGE_BYTES, BLOCK_BYTES, CacheSize, Caches, CancelledRequest, DEFAULT_RESERVE_BYTES,
    DEFAULT_TIMEOUT_MS, DropCaches, DroppedCaches, FreeKind, FreePages, FreePagesRequest, Problem,
    ReleasedHold,
};
use crate::app::{App, query};
use crate::balloon::{BalloonControl, GuestAnswer, GuestRequest};
use crate::bitmap::{self, Bitmap};
use crate::error::{ControlError, GuestErrorKind};
use crate::free_map::FreePagesMap;
use crate::guest_routes;
use crate::limits::{ANSWER_MARGIN, WAIT_SLICE};
use crate::picture;

/// Timeout of a request.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TimeoutParam {
    /// Timeout for the guest's response; default 30000, at most 600000.
    timeout_ms: Option<u64>,
}

/// Drops the caches of the guest's kernel and returns what that freed.
#[utoipa::path(post, tag = "guest", path = "/v1/drop-caches", request_body = DropCaches, responses(
    (status = 200, description = "The caches are dropped", body = DroppedCaches),
    (status = 409, description = "The guest's driver does not support it, or the request was cancelled", body = Problem),
    (status = 502, description = "The guest refused, or violated the protocol", body = Problem),
    (status = 503, description = "Too many requests are queued", body = Problem),
    (status = 504, description = "The guest did not respond in time", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_drop_caches(
    State(app): State<App>,
    request: Request,
) -> Result<Json<DroppedCaches>, ControlError> {
    let ask: DropCaches = app.body(request).await?;
    let answer = app.ask(GuestRequest::DropCaches(ask.what), ask.timeout_ms).await?;
    let [page_before, page_after, slab_before, slab_after] =
        answer.values.map(|pages| pages.saturating_mul(BALLOON_PAGE_BYTES));
    // A cache that was not requested may change too, but not because of this request.
    let size = |asked: bool, before, after| {
        let size = CacheSize::new(before, after);
        if asked { size } else { CacheSize { freed_bytes: 0, ..size } }
    };
    let page_cache = size(ask.what != Caches::Slab, page_before, page_after);
    let slab = size(ask.what != Caches::PageCache, slab_before, slab_after);
    Ok(Json(DroppedCaches {
        id: answer.id,
        page_cache,
        slab,
        freed_bytes: page_cache.freed_bytes.saturating_add(slab.freed_bytes),
        elapsed_ms: answer.elapsed_ms,
        guest_ms: answer.guest_ms,
    }))
}

/// Requests the guest's free pages: a report, or a hold that lasts until the guest needs the
/// memory.
#[utoipa::path(post, tag = "guest", path = "/v1/free-pages", request_body = FreePagesRequest, responses(
    (status = 200, description = "The free pages", body = FreePages),
    (status = 409, description = "The guest's driver does not support it, or the request was cancelled", body = Problem),
    (status = 422, description = "A size or timeout is invalid", body = Problem),
    (status = 502, description = "The guest refused, or violated the protocol", body = Problem),
    (status = 503, description = "Too many requests are queued", body = Problem),
    (status = 504, description = "The guest did not respond in time", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_free_pages(
    State(app): State<App>,
    request: Request,
) -> Result<Json<FreePages>, ControlError> {
    let ask: FreePagesRequest = app.body(request).await?;
    let Some(asked) = guest_ask(&ask)? else { return hinted(app, ask.timeout_ms).await };
    let answer = app.ask(asked, ask.timeout_ms).await?;
    let map = answer.free.ok_or_else(|| ControlError::Failed {
        what: "host: the guest answered, but the balloon has no free pages".into(),
        hint: "see the log of the balloon's process".into(),
    })?;
    app.call(move |_| map.summarize()).await.map(Json)
}

/// Requests free pages by free page hints.
async fn hinted(app: App, timeout_ms: u64) -> Result<Json<FreePages>, ControlError> {
    let time = app.request_time(timeout_ms)?;
    let id = guest_routes::hints(app.clone(), time).await?.id;
    let map = app.call(newest).await??;
    if map.summary.id != id {
        return Err(ControlError::Refused {
            what: "another request replaced this one, or the guest's driver was reset".into(),
            hint: "try again".into(),
        });
    }
    app.call(move |_| map.summarize()).await.map(Json)
}

/// Returns the newest free pages that the guest reported.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages", responses(
    (status = 200, description = "The free pages", body = FreePages),
    (status = 404, description = "The guest has not been asked yet", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_free_pages(
    State(app): State<App>,
) -> Result<Json<FreePages>, ControlError> {
    app.call(|balloon| newest(balloon).map(FreePagesMap::summarize)).await?.map(Json)
}

/// Returns the newest free pages as a bitmap: one bit for each 4 KiB page of guest memory, in
/// ascending order, from bit 0 of byte 0. Holes between regions have no bits: each region follows
/// the previous one directly.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages/bitmap", responses(
    (status = 200, description = "The bits", content_type = "application/octet-stream", body = Vec<u8>, headers(
        ("aerostat-first-page" = u64, description = "Page number of the first bit"),
        ("aerostat-pages" = u64, description = "Number of bits"),
        ("aerostat-regions" = String, description = "Regions of guest memory as `first+pages`, separated by commas"),
        ("aerostat-request-id" = u32, description = "ID of the request"),
    )),
    (status = 404, description = "The guest has not been asked yet", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_bitmap(State(app): State<App>) -> Result<Response, ControlError> {
    app.bulk().await?;
    let map = app.call(newest).await??;
    let regions = bitmap::regions_text(&map.regions);
    let first = map.regions.first().map_or(0, |range| range.start());
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (bitmap::FIRST_PAGE_HEADER, first.to_string()),
        (bitmap::PAGES_HEADER, bitmap::pages(&map.regions).to_string()),
        (bitmap::REGIONS_HEADER, regions),
        (bitmap::ID_HEADER, map.summary.id.to_string()),
    ];
    Ok((headers, Body::new(Bitmap::new(&map.regions, map.free))).into_response())
}

/// Returns the newest free pages as a picture of guest memory.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages/picture", responses(
    (status = 200, description = "The picture", content_type = "image/svg+xml", body = String),
    (status = 404, description = "The guest has not been asked yet", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_picture(State(app): State<App>) -> Result<Response, ControlError> {
    app.bulk().await?;
    let draw = |balloon: &dyn BalloonControl| {
        let map = newest(balloon)?;
        Ok::<_, ControlError>(picture::draw(&balloon.name(), &map))
    };
    let svg = app.call(draw).await??;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("image/svg+xml"))], svg).into_response())
}

/// Releases the hold.
#[utoipa::path(delete, tag = "guest", path = "/v1/free-pages", params(TimeoutParam), responses(
    (status = 200, description = "The hold is released", body = ReleasedHold),
    (status = 409, description = "There is no hold, or the guest's driver does not support it", body = Problem),
    (status = 502, description = "The guest refused, or violated the protocol", body = Problem),
    (status = 504, description = "The guest did not respond in time", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn delete_free_pages(
    State(app): State<App>,
    timeout: Result<Query<TimeoutParam>, QueryRejection>,
) -> Result<Json<ReleasedHold>, ControlError> {
    let timeout_ms = query(timeout)?.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS);
    let answer = app.ask(GuestRequest::ReleaseHold, timeout_ms).await?;
    Ok(Json(ReleasedHold {
        id: answer.id,
        released_bytes: answer.values[0].saturating_mul(BALLOON_PAGE_BYTES),
        elapsed_ms: answer.elapsed_ms,
    }))
}

/// Cancels the request that the guest is processing. The client that made it gets an error.
#[utoipa::path(post, tag = "guest", path = "/v1/cancel", responses(
    (status = 200, description = "The guest was asked to stop", body = CancelledRequest),
    (status = 409, description = "There is no request", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_cancel(
    State(app): State<App>,
) -> Result<Json<CancelledRequest>, ControlError> {
    app.call(|balloon| balloon.cancel_request(None)).await?.map(Json)
}

fn balloon_stopped() -> ControlError {
    ControlError::Failed {
        what: "host: the balloon stopped before the guest answered".into(),
        hint: "see the log of the balloon's process".into(),
    }
}

fn newest(balloon: &dyn BalloonControl) -> Result<FreePagesMap, ControlError> {
    balloon.free_pages().ok_or_else(|| ControlError::Guest {
        why: GuestErrorKind::NotAsked,
        what: "the guest has not reported its free pages yet".into(),
        hint: "request them with POST /v1/free-pages or `aerostat free-pages NAME`".into(),
    })
}

/// Checks the sizes of a request for free pages; `None` for one by hints, which does not use the
/// request queue.
fn guest_ask(ask: &FreePagesRequest) -> Result<Option<GuestRequest>, ControlError> {
    let refused = |what: String, hint: &str| ControlError::BadSize { what, hint: hint.into() };
    match ask.kind {
        FreeKind::Snapshot => {
            if ask.reserve_bytes.is_some() {
                return Err(refused(
                    "a snapshot has no reserve".into(),
                    "omit reserve_bytes, or request a hold",
                ));
            }
            let bytes = ask.min_block_bytes.unwrap_or(*BLOCK_BYTES.start());
            if !bytes.is_power_of_two() || !BLOCK_BYTES.contains(&bytes) {
                return Err(refused(
                    format!("{bytes} bytes is not a valid block size"),
                    "use a power of two from 4096 to 1073741824",
                ));
            }
            Ok(Some(GuestRequest::Snapshot { min_block_bytes: bytes }))
        }
        FreeKind::Hint => {
            if ask.min_block_bytes.is_some() || ask.reserve_bytes.is_some() {
                return Err(refused(
                    "the driver chooses the block sizes of free page hints".into(),
                    "omit min_block_bytes and reserve_bytes",
                ));
            }
            Ok(None)
        }
        FreeKind::Hold => {
            if ask.min_block_bytes.is_some() {
                return Err(refused(
                    "a hold includes blocks of all sizes".into(),
                    "omit min_block_bytes, or request a snapshot",
                ));
            }
            let bytes = ask.reserve_bytes.unwrap_or(DEFAULT_RESERVE_BYTES);
            if !bytes.is_multiple_of(BALLOON_PAGE_BYTES) {
                return Err(refused(
                    format!("a reserve of {bytes} bytes is not a whole number of 4096-byte pages"),
                    "use a multiple of 4096",
                ));
            }
            Ok(Some(GuestRequest::Hold { reserve_bytes: bytes }))
        }
    }
}

/// Cancels a request whose client has disconnected: no client waits for its response, and a hold
/// that no client has seen would remain.
///
/// The client may disconnect while a thread is submitting the request. So both sides use one
/// state, and the second of them cancels the request.
struct CancelOnDrop {
    balloon: Arc<dyn BalloonControl>,
    state: Arc<Mutex<Submission>>,
}

enum Submission {
    /// Not submitted yet.
    New,
    /// Submitted with this ID.
    Submitted(u32),
    /// It has ended, or its client has disconnected.
    Over,
}

impl CancelOnDrop {
    fn new(balloon: Arc<dyn BalloonControl>) -> Self {
        Self { balloon, state: Arc::new(Mutex::new(Submission::New)) }
    }

    /// Records that the request has ended.
    fn ended(&self) {
        *lock(&self.state) = Submission::Over;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        let Submission::Submitted(id) =
            std::mem::replace(&mut *lock(&self.state), Submission::Over)
        else {
            return;
        };
        let balloon = Arc::clone(&self.balloon);
        // An error means that the request has ended by itself. Without a runtime the server has
        // stopped, and the process is about to exit.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || balloon.cancel_request(Some(id)));
        }
    }
}

/// Submits the request; `None` if the client has disconnected in the meantime.
fn submit(
    balloon: &dyn BalloonControl,
    state: &Mutex<Submission>,
    ask: GuestRequest,
    timeout: Duration,
) -> Result<Option<u32>, ControlError> {
    let id = balloon.submit(ask, timeout)?;
    let mut state = lock(state);
    if matches!(*state, Submission::Over) {
        drop(state);
        balloon.cancel_request(Some(id))?;
        return Ok(None);
    }
    *state = Submission::Submitted(id);
    Ok(Some(id))
}

fn lock(state: &Mutex<Submission>) -> MutexGuard<'_, Submission> {
    // The guarded data is a single value, so it is consistent after a panic.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl App {
    /// Converts and checks a client's timeout.
    fn request_time(&self, timeout_ms: u64) -> Result<Duration, ControlError> {
        let (time, limit) = (Duration::from_millis(timeout_ms), self.limits.max_request);
        if time > limit {
            return Err(ControlError::TooLong { timeout_ms, limit_ms: limit.as_millis() });
        }
        Ok(time)
    }

    /// Sends a request to the guest and waits for the response.
    async fn ask(&self, ask: GuestRequest, timeout_ms: u64) -> Result<GuestAnswer, ControlError> {
        let timeout = self.request_time(timeout_ms)?;
        // Taken before the request is submitted, so that a refusal has no effect.
        let _waiter = self.any_waiter()?;
        let end = Instant::now() + timeout + ANSWER_MARGIN;
        let cancel = CancelOnDrop::new(self.balloon()?);
        let state = Arc::clone(&cancel.state);
        let asked = self.call(move |balloon| submit(balloon, &state, ask, timeout)).await??;
        let Some(id) = asked else { return Err(balloon_stopped()) };
        loop {
            let ended = self.call(move |balloon| balloon.wait_request(id, WAIT_SLICE)).await?;
            if let Some(outcome) = ended {
                cancel.ended();
                return outcome;
            }
            if *self.stopped.borrow() || Instant::now() > end {
                return Err(balloon_stopped());
            }
        }
    }
}
