//! Endpoints that ask the guest's kernel for something.

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

use super::{App, WAIT_SLICE, query};
use crate::api::{
    AskFreePages, BALLOON_PAGE_BYTES, BLOCK_BYTES, CacheSize, Caches, CancelledRequest,
    DEFAULT_RESERVE_BYTES, DEFAULT_TIMEOUT_MS, DropCaches, DroppedCaches, FreeKind, FreePages,
    Problem, ReleasedHold,
};
use crate::balloon::{BalloonControl, GuestAnswer, GuestAsk};
use crate::bitmap::{self, Bitmap};
use crate::error::{ControlError, WhyNot};
use crate::free_map::FreePagesMap;
use crate::guest_routes;
use crate::picture;

/// Time beyond a request's own after which the balloon has failed to end it.
pub(crate) const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// How long the guest may take.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TimeoutParam {
    /// Time for the guest to answer, 30000 if it is not said, 600000 at most.
    timeout_ms: Option<u64>,
}

/// Has the guest's kernel drop caches, and says what that freed.
#[utoipa::path(post, tag = "guest", path = "/v1/drop-caches", request_body = DropCaches, responses(
    (status = 200, description = "They are dropped", body = DroppedCaches),
    (status = 409, description = "The guest's driver cannot, or the request was stopped", body = Problem),
    (status = 502, description = "The guest refused or broke the protocol", body = Problem),
    (status = 503, description = "Too many requests wait", body = Problem),
    (status = 504, description = "The guest did not answer in time", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_drop_caches(
    State(app): State<App>,
    request: Request,
) -> Result<Json<DroppedCaches>, ControlError> {
    let ask: DropCaches = app.body(request).await?;
    let answer = app.ask(GuestAsk::DropCaches(ask.what), ask.timeout_ms).await?;
    let [page_before, page_after, slab_before, slab_after] =
        answer.values.map(|pages| pages.saturating_mul(BALLOON_PAGE_BYTES));
    // A cache that was not asked for changes as well meanwhile; not by us.
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

/// Asks the guest which of its memory is free, once or for as long as it can
/// keep it so.
#[utoipa::path(post, tag = "guest", path = "/v1/free-pages", request_body = AskFreePages, responses(
    (status = 200, description = "What the guest named", body = FreePages),
    (status = 409, description = "The guest's driver cannot, or the request was stopped", body = Problem),
    (status = 422, description = "A size that cannot be", body = Problem),
    (status = 502, description = "The guest refused or broke the protocol", body = Problem),
    (status = 503, description = "Too many requests wait", body = Problem),
    (status = 504, description = "The guest did not answer in time", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_free_pages(
    State(app): State<App>,
    request: Request,
) -> Result<Json<FreePages>, ControlError> {
    let ask: AskFreePages = app.body(request).await?;
    let Some(asked) = guest_ask(&ask)? else { return hinted(app, ask.timeout_ms).await };
    let answer = app.ask(asked, ask.timeout_ms).await?;
    let map = answer.free.ok_or_else(|| ControlError::Failed {
        what: "the balloon has no free pages where it should".into(),
        hint: "look into the log of the process that serves it".into(),
    })?;
    app.call(move |_| map.summarize()).await.map(Json)
}

/// The same, by the specification's hints.
async fn hinted(app: App, timeout_ms: u64) -> Result<Json<FreePages>, ControlError> {
    let time = app.request_time(timeout_ms)?;
    let id = guest_routes::hints(app.clone(), time).await?.id;
    let map = app.call(newest).await??;
    if map.summary.id != id {
        return Err(ControlError::Refused {
            what: "the guest was asked by somebody else meanwhile, or its driver went".into(),
            hint: "ask again".into(),
        });
    }
    app.call(move |_| map.summarize()).await.map(Json)
}

/// The newest free pages that the guest named.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages", responses(
    (status = 200, description = "What the guest named", body = FreePages),
    (status = 404, description = "The guest was not asked yet", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn get_free_pages(
    State(app): State<App>,
) -> Result<Json<FreePages>, ControlError> {
    app.call(|balloon| newest(balloon).map(FreePagesMap::summarize)).await?.map(Json)
}

/// The newest free pages as a bitmap: one bit for each 4 KiB page of guest
/// memory, low to high, bit 0 of byte 0 first. Memory that does not exist has no
/// bit: where one region ends, the next one goes on.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages/bitmap", responses(
    (status = 200, description = "The bits", content_type = "application/octet-stream", body = Vec<u8>, headers(
        ("aerostat-first-page" = u64, description = "Number of the page of the first bit"),
        ("aerostat-pages" = u64, description = "Bits"),
        ("aerostat-regions" = String, description = "Regions of guest memory as `first+pages`, by commas"),
        ("aerostat-request-id" = u32, description = "Id of the request"),
    )),
    (status = 404, description = "The guest was not asked yet", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
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

/// The newest free pages as a picture of guest memory.
#[utoipa::path(get, tag = "guest", path = "/v1/free-pages/picture", responses(
    (status = 200, description = "The picture", content_type = "image/png", body = Vec<u8>),
    (status = 404, description = "The guest was not asked yet", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn get_picture(State(app): State<App>) -> Result<Response, ControlError> {
    app.bulk().await?;
    let draw = |balloon: &dyn BalloonControl| {
        let map = newest(balloon)?;
        picture::draw(&balloon.name(), &map).map_err(|error| ControlError::Failed {
            what: format!("the picture cannot be made: {error}"),
            hint: "please report this as a fault of aerostat".into(),
        })
    };
    let png = app.call(draw).await??;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("image/png"))], png).into_response())
}

/// Gives a hold back to the guest.
#[utoipa::path(delete, tag = "guest", path = "/v1/free-pages", params(TimeoutParam), responses(
    (status = 200, description = "The guest has it back", body = ReleasedHold),
    (status = 409, description = "There is no hold, or the guest's driver cannot", body = Problem),
    (status = 502, description = "The guest refused or broke the protocol", body = Problem),
    (status = 504, description = "The guest did not answer in time", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn delete_free_pages(
    State(app): State<App>,
    timeout: Result<Query<TimeoutParam>, QueryRejection>,
) -> Result<Json<ReleasedHold>, ControlError> {
    let timeout_ms = query(timeout)?.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS);
    let answer = app.ask(GuestAsk::ReleaseHold, timeout_ms).await?;
    Ok(Json(ReleasedHold {
        id: answer.id,
        released_bytes: answer.values[0].saturating_mul(BALLOON_PAGE_BYTES),
        elapsed_ms: answer.elapsed_ms,
    }))
}

/// Stops the request that the guest works on. Whoever made it is told so.
#[utoipa::path(post, tag = "guest", path = "/v1/cancel", responses(
    (status = 200, description = "It was told to stop", body = CancelledRequest),
    (status = 409, description = "There is no request", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_cancel(
    State(app): State<App>,
) -> Result<Json<CancelledRequest>, ControlError> {
    app.call(|balloon| balloon.cancel_request(None)).await?.map(Json)
}

fn no_end() -> ControlError {
    ControlError::Failed {
        what: "the balloon stopped before the guest had answered".into(),
        hint: "look into the log of the process that serves it".into(),
    }
}

fn newest(balloon: &dyn BalloonControl) -> Result<FreePagesMap, ControlError> {
    balloon.free_pages().ok_or_else(|| ControlError::Guest {
        why: WhyNot::NotAsked,
        what: "nothing is known of the guest's free pages".into(),
        hint: "ask the guest first: POST /v1/free-pages, or `aerostat free-pages NAME`".into(),
    })
}

/// Checks the sizes of a request for free pages; `None` for one by hints, which
/// goes another way.
fn guest_ask(ask: &AskFreePages) -> Result<Option<GuestAsk>, ControlError> {
    let refused = |what: String, hint: &str| ControlError::BadSize { what, hint: hint.into() };
    match ask.kind {
        FreeKind::Snapshot => {
            if ask.reserve_bytes.is_some() {
                return Err(refused(
                    "a snapshot reserves nothing".into(),
                    "leave reserve_bytes out, or ask for a hold",
                ));
            }
            let bytes = ask.min_block_bytes.unwrap_or(*BLOCK_BYTES.start());
            if !bytes.is_power_of_two() || !BLOCK_BYTES.contains(&bytes) {
                return Err(refused(
                    format!("there are no blocks of {bytes} bytes"),
                    "ask for a power of two from 4096 to 1073741824",
                ));
            }
            Ok(Some(GuestAsk::Snapshot { min_block_bytes: bytes }))
        }
        FreeKind::Hint => {
            if ask.min_block_bytes.is_some() || ask.reserve_bytes.is_some() {
                return Err(refused(
                    "a driver's hints have the sizes that it chooses".into(),
                    "leave min_block_bytes and reserve_bytes out",
                ));
            }
            Ok(None)
        }
        FreeKind::Hold => {
            if ask.min_block_bytes.is_some() {
                return Err(refused(
                    "a hold has blocks of all sizes".into(),
                    "leave min_block_bytes out, or ask for a snapshot",
                ));
            }
            let bytes = ask.reserve_bytes.unwrap_or(DEFAULT_RESERVE_BYTES);
            if !bytes.is_multiple_of(BALLOON_PAGE_BYTES) {
                return Err(refused(
                    format!("a reserve of {bytes} bytes is not a whole number of 4096-byte pages"),
                    "ask for a multiple of 4096",
                ));
            }
            Ok(Some(GuestAsk::Hold { reserve_bytes: bytes }))
        }
    }
}

/// Stops a request whose client is gone: nobody waits for its answer, and a
/// hold that nobody knows of would stay.
///
/// The client may go at any moment, also while a thread is just asking the guest.
/// So both sides look at one state: whoever comes second stops the request.
struct StopIfDropped {
    balloon: Arc<dyn BalloonControl>,
    state: Arc<Mutex<Asking>>,
}

enum Asking {
    /// Not asked yet.
    Begun,
    /// The guest works on it.
    Asked(u32),
    /// It has ended, or nobody is left who waits for it.
    Over,
}

impl StopIfDropped {
    fn new(balloon: Arc<dyn BalloonControl>) -> Self {
        Self { balloon, state: Arc::new(Mutex::new(Asking::Begun)) }
    }

    /// The request has ended.
    fn ended(&self) {
        *lock(&self.state) = Asking::Over;
    }
}

impl Drop for StopIfDropped {
    fn drop(&mut self) {
        let Asking::Asked(id) = std::mem::replace(&mut *lock(&self.state), Asking::Over) else {
            return;
        };
        let balloon = Arc::clone(&self.balloon);
        // It has ended meanwhile, or it is told to stop: both are well. Without a
        // runtime the server has stopped, and the process is about to.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || balloon.cancel_request(Some(id)));
        }
    }
}

/// Asks the guest; `None` where the client has gone meanwhile.
fn submit(
    balloon: &dyn BalloonControl,
    state: &Mutex<Asking>,
    ask: GuestAsk,
    timeout: Duration,
) -> Result<Option<u32>, ControlError> {
    let id = balloon.submit(ask, timeout)?;
    let mut state = lock(state);
    if matches!(*state, Asking::Over) {
        drop(state);
        balloon.cancel_request(Some(id))?;
        return Ok(None);
    }
    *state = Asking::Asked(id);
    Ok(Some(id))
}

fn lock(state: &Mutex<Asking>) -> MutexGuard<'_, Asking> {
    // One word is changed under it.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl App {
    /// The time that a client gives the guest.
    fn request_time(&self, timeout_ms: u64) -> Result<Duration, ControlError> {
        let (time, limit) = (Duration::from_millis(timeout_ms), self.limits.max_request);
        if time > limit {
            return Err(ControlError::TooLong { timeout_ms, limit_ms: limit.as_millis() });
        }
        Ok(time)
    }

    /// Asks the guest and waits for the answer.
    async fn ask(&self, ask: GuestAsk, timeout_ms: u64) -> Result<GuestAnswer, ControlError> {
        let timeout = self.request_time(timeout_ms)?;
        // Taken before the guest is asked, so that a refusal changes nothing.
        let _waiter = self.any_waiter()?;
        let end = Instant::now() + timeout + ANSWER_MARGIN;
        let stop = StopIfDropped::new(self.balloon()?);
        let state = Arc::clone(&stop.state);
        let asked = self.call(move |balloon| submit(balloon, &state, ask, timeout)).await??;
        let Some(id) = asked else { return Err(no_end()) };
        loop {
            let ended = self.call(move |balloon| balloon.wait_request(id, WAIT_SLICE)).await?;
            if let Some(outcome) = ended {
                stop.ended();
                return outcome;
            }
            if *self.stopped.borrow() || Instant::now() > end {
                return Err(no_end());
            }
        }
    }
}
