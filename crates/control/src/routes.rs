//! Routing and the endpoints of balloon, release, metrics and OpenAPI.

pub(crate) mod migration;
pub(crate) mod request;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{HttpBody, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use utoipa::IntoParams;

use crate::api::{
    BALLOON_PAGE_BYTES, BalloonStatus, Problem, ReleaseStatus, SetBalloon, SetRelease, Status,
};
use crate::balloon::BalloonControl;
use crate::error::ControlError;
use crate::guest_routes;
use crate::server::{Connections, Limits, NoWaiterSlot, Phase, WaiterSlot, WaiterSlots, served};
use crate::vmm::VmmControl;
use crate::{metrics, openapi};

/// Longest request body. The three TLS paths of a migration fit, each of `PATH_MAX` bytes.
pub const MAX_BODY_BYTES: usize = 16 * 1024;

/// Longest single call into the balloon while a client waits. Between calls the server checks
/// whether it must stop and whether the client is still connected.
pub(crate) const WAIT_SLICE: Duration = Duration::from_millis(250);

/// State shared by all handlers.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) vmm: Arc<dyn VmmControl>,
    pub(crate) limits: Limits,
    waiters: Arc<WaiterSlots>,
    migrations: Arc<Semaphore>,
    connections: Arc<Connections>,
    pub(crate) stopped: watch::Receiver<bool>,
}

/// Builds the router for `vmm`.
pub(crate) fn router(
    vmm: Arc<dyn VmmControl>,
    limits: Limits,
    connections: Arc<Connections>,
    stopped: watch::Receiver<bool>,
) -> Router {
    let waiters = WaiterSlots::new(limits.waiters, limits.waiters_each);
    let migrations = Arc::new(Semaphore::new(limits.migrations));
    Router::new()
        .route("/v1/status", get(get_status))
        .route("/v1/balloon", get(get_balloon).put(put_balloon))
        .route("/v1/release", get(get_release).put(put_release))
        .route("/v1/stats", get(guest_routes::get_stats).put(guest_routes::put_stats))
        .route("/v1/hints", post(guest_routes::post_hints))
        .route("/v1/drop-caches", post(request::post_drop_caches))
        .route(
            "/v1/free-pages",
            get(request::get_free_pages)
                .post(request::post_free_pages)
                .delete(request::delete_free_pages),
        )
        .route("/v1/free-pages/bitmap", get(request::get_bitmap))
        .route("/v1/free-pages/picture", get(request::get_picture))
        .route("/v1/cancel", post(request::post_cancel))
        .route(
            "/v1/migration",
            get(migration::get_migration)
                .post(migration::post_migration)
                .delete(migration::delete_migration),
        )
        .route("/v1/migration/resolve", post(migration::post_resolve))
        .route("/v1/snapshot", post(migration::post_snapshot))
        .route("/v1/metrics", get(get_metrics))
        .route("/metrics", get(get_metrics))
        .route("/v1/openapi.json", get(get_openapi))
        .fallback(async |method: Method, uri: Uri| no_endpoint(&method, &uri, false))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            no_endpoint(&method, &uri, true)
        })
        .with_state(App { vmm, limits, waiters, migrations, connections, stopped })
}

fn no_endpoint(method: &Method, uri: &Uri, method_only: bool) -> ControlError {
    let what = format!("there is no {method} {}", uri.path());
    ControlError::NoSuchEndpoint { what, method_only }
}

/// How long to wait for the change that the request makes.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wait {
    /// Respond when the change is over or after this time, whichever is first. Values above 60000
    /// are reduced to 60000. Default: respond immediately.
    #[serde(default)]
    wait_ms: u64,
}

/// Which change to wait for, and how long.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WaitFor {
    /// Respond when the change is over or after this time, whichever is first. Values above 60000
    /// are reduced to 60000. Default: respond immediately.
    #[serde(default)]
    wait_ms: u64,
    /// The change to wait for; default the latest.
    generation: Option<u64>,
}

/// Returns the full status of the balloon and its guest.
#[utoipa::path(get, tag = "balloon", path = "/v1/status", responses(
    (status = 200, description = "The status", body = Status),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_status(State(app): State<App>) -> Result<Json<Status>, ControlError> {
    app.call(|balloon| balloon.status()).await.map(Json)
}

/// Returns the target and actual size of the balloon; with `wait_ms`, after the change.
#[utoipa::path(get, tag = "balloon", path = "/v1/balloon", params(WaitFor), responses(
    (status = 200, description = "The state now, or after the wait", body = BalloonStatus),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_balloon(
    State(app): State<App>,
    wait: Result<Query<WaitFor>, QueryRejection>,
) -> Result<Json<BalloonStatus>, ControlError> {
    let wait = query(wait)?;
    let waiter = app.waiter(wait.wait_ms != 0)?;
    let generation = match wait.generation {
        Some(generation) => generation,
        None => app.balloon_now().await?.generation,
    };
    app.wait(waiter, generation, wait.wait_ms).await.map(Json)
}

/// Sets the target size of the balloon. The guest then inflates or deflates towards it.
///
/// If the response has a different `target_bytes`, another client replaced the target during the
/// wait.
#[utoipa::path(put, tag = "balloon", path = "/v1/balloon", params(Wait), request_body = SetBalloon, responses(
    (status = 200, description = "The change is complete", body = BalloonStatus),
    (status = 202, description = "The change is in progress", body = BalloonStatus),
    (status = 422, description = "Larger than the guest's memory, or not a multiple of 4096", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn put_balloon(
    State(app): State<App>,
    wait: Result<Query<Wait>, QueryRejection>,
    request: Request,
) -> Result<(StatusCode, Json<BalloonStatus>), ControlError> {
    let wait = query(wait)?;
    let set: SetBalloon = app.body(request).await?;
    // Taken before the target is set, so that a refusal has no effect.
    let waiter = app.waiter(wait.wait_ms != 0)?;
    let pages = pages_of(set.target_bytes, app.balloon_now().await?.max_bytes)?;
    let generation = app.call(move |balloon| balloon.set_target(pages)).await??;
    let balloon = app.wait(waiter, generation, wait.wait_ms).await?;
    let over = balloon.is_over(generation);
    Ok((if over { StatusCode::OK } else { StatusCode::ACCEPTED }, Json(balloon)))
}

/// Returns how memory is released to the host, and how much is not released yet.
#[utoipa::path(get, tag = "balloon", path = "/v1/release", responses(
    (status = 200, description = "The state now", body = ReleaseStatus),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_release(
    State(app): State<App>,
) -> Result<Json<ReleaseStatus>, ControlError> {
    app.call(|balloon| balloon.release()).await.map(Json)
}

/// Sets when pages are released, starting with the guest's next message.
#[utoipa::path(put, tag = "balloon", path = "/v1/release", request_body = SetRelease, responses(
    (status = 200, description = "The state now", body = ReleaseStatus),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn put_release(
    State(app): State<App>,
    request: Request,
) -> Result<Json<ReleaseStatus>, ControlError> {
    let set: SetRelease = app.body(request).await?;
    app.call(move |balloon| balloon.set_release_mode(set.mode)).await??;
    get_release(State(app)).await
}

/// Returns the metrics as Prometheus text. Also available as `/metrics`.
#[utoipa::path(get, tag = "balloon", path = "/v1/metrics", responses(
    (status = 200, description = "Prometheus text", body = String, content_type = "text/plain; version=0.0.4"),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_metrics(State(app): State<App>) -> Result<Response, ControlError> {
    let text = app.call(|balloon| metrics::render(&balloon.status())).await?;
    let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Returns this description of the API.
#[utoipa::path(get, tag = "balloon", path = "/v1/openapi.json", responses(
    (status = 200, description = "OpenAPI 3.1", body = Object),
))]
pub(crate) async fn get_openapi() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], openapi::text()).into_response()
}

impl App {
    /// Returns the guest's balloon.
    pub(crate) fn balloon(&self) -> Result<Arc<dyn BalloonControl>, ControlError> {
        self.vmm.balloon().ok_or_else(|| ControlError::Refused {
            what: "no guest has arrived here yet".into(),
            hint: "migrate one here with `aerostat migrate`, or wait until it arrives".into(),
        })
    }

    /// Calls the balloon on a thread that may block.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn BalloonControl) -> T + Send + 'static,
    ) -> Result<T, ControlError> {
        let balloon = self.balloon()?;
        // The connection counts against the limit until the thread returns, even if its client
        // disconnects.
        let connection = served::current();
        let ask = move || {
            let _connection = connection;
            ask(&*balloon)
        };
        spawn_blocking(ask).await.map_err(|_| ControlError::Failed {
            what: "host: the call to the balloon failed".into(),
            hint: "see the log of the balloon's process".into(),
        })
    }

    async fn balloon_now(&self) -> Result<BalloonStatus, ControlError> {
        self.call(|balloon| balloon.wait_change(0, Duration::ZERO)).await
    }

    /// Returns a waiter slot if `waits`.
    pub(crate) fn waiter(&self, waits: bool) -> Result<Option<WaiterSlot>, ControlError> {
        if waits { self.any_waiter().map(Some) } else { Ok(None) }
    }

    fn any_waiter(&self) -> Result<WaiterSlot, ControlError> {
        self.waiters.take(served::process()).map_err(|no_slot| match no_slot {
            NoWaiterSlot::All { limit } => ControlError::TooManyWaiters { limit },
            NoWaiterSlot::Share { limit, process } => ControlError::Busy {
                what: format!("process {process} already has {limit} requests that wait"),
                hint: "end some of them, omit wait_ms, or try again later".into(),
            },
        })
    }

    /// Returns a permit for a migration request, which may wait for another host.
    pub(crate) fn migration_permit(&self) -> Result<OwnedSemaphorePermit, ControlError> {
        Arc::clone(&self.migrations).try_acquire_owned().map_err(|_| ControlError::Busy {
            what: format!(
                "{} requests to migrate, save or resolve this guest are already in progress",
                self.limits.migrations
            ),
            hint: "see GET /v1/migration for the status, or try again later".into(),
        })
    }

    /// Reserves a large response for as long as the client reads it.
    pub(crate) async fn bulk(&self) -> Result<(), ControlError> {
        if self.connections.take_bulk().await {
            return Ok(());
        }
        Err(ControlError::Busy {
            what: format!("{} large responses are already being read", self.limits.bulk),
            hint: "try again later".into(),
        })
    }

    /// Waits until the change is over, the time has passed or the server stops.
    async fn wait(
        &self,
        _waiter: Option<WaiterSlot>,
        generation: u64,
        wait_ms: u64,
    ) -> Result<BalloonStatus, ControlError> {
        let end = Instant::now() + Duration::from_millis(wait_ms).min(self.limits.max_wait);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let slice = left.min(WAIT_SLICE);
            let status = self.call(move |balloon| balloon.wait_change(generation, slice)).await?;
            if left <= slice || status.is_over(generation) || *self.stopped.borrow() {
                return Ok(status);
            }
        }
    }

    /// Parses the request body as JSON regardless of its content type: `curl -d` sends a form type.
    pub(crate) async fn body<T: DeserializeOwned>(
        &self,
        request: Request,
    ) -> Result<T, ControlError> {
        let body = request.into_body();
        let too_large = ControlError::BodyTooLarge { limit_bytes: MAX_BODY_BYTES };
        let limit = u64::try_from(MAX_BODY_BYTES).unwrap_or(u64::MAX);
        if body.size_hint().lower() > limit {
            return Err(too_large);
        }
        served::enter(Phase::Reading);
        let bytes = timeout(self.limits.request_timeout, to_bytes(body, MAX_BODY_BYTES)).await;
        served::enter(Phase::Working);
        let limit_ms = self.limits.request_timeout.as_millis();
        let bytes = bytes.map_err(|_| ControlError::RequestTooSlow { limit_ms })?;
        // If the body ended early, no client reads this response.
        let bytes = bytes.map_err(|_| too_large)?;
        serde_json::from_slice(&bytes).map_err(|error| ControlError::BadRequest {
            what: format!("the request body is invalid: {error}"),
            hint: "see /v1/openapi.json for the fields".into(),
        })
    }
}

pub(crate) fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ControlError> {
    query.map(|Query(query)| query).map_err(|error| ControlError::BadRequest {
        what: format!("the query is invalid: {}", error.body_text()),
        hint: "see /v1/openapi.json for the parameters".into(),
    })
}

/// Converts a target to pages and checks it against the guest's memory.
fn pages_of(target_bytes: u64, max_bytes: Option<u64>) -> Result<u32, ControlError> {
    // The device's `num_pages` field has 32 bits.
    let wire_max = u64::from(u32::MAX) * BALLOON_PAGE_BYTES;
    let max_bytes = max_bytes.map_or(wire_max, |max| max.min(wire_max));
    if target_bytes > max_bytes {
        return Err(ControlError::TargetTooLarge { target_bytes, max_bytes });
    }
    if !target_bytes.is_multiple_of(BALLOON_PAGE_BYTES) {
        return Err(ControlError::TargetUnaligned { target_bytes });
    }
    u32::try_from(target_bytes / BALLOON_PAGE_BYTES)
        .map_err(|_| ControlError::TargetTooLarge { target_bytes, max_bytes })
}

impl IntoResponse for ControlError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.http_status());
        let problem = Problem { error: self.to_string(), hint: self.hint() };
        (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(problem)).into_response()
    }
}
