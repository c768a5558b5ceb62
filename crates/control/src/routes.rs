//! The endpoints of balloon, release and metrics.

pub(crate) mod migration;
pub(crate) mod request;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::api::{
    BALLOON_PAGE_BYTES, BalloonStatus, Problem, ReleaseStatus, SetBalloon, SetRelease, Status,
};
use crate::app::{App, query};
use crate::error::ControlError;
use crate::metrics;

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
