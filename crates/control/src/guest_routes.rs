//! Endpoints for guest statistics and free page hints.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::api::{
    FreePageHints, HintOutcome, MAX_STATS_INTERVAL_MS, MIN_STATS_INTERVAL_MS, Problem, SetStats,
    StatsStatus,
};
use crate::app::{App, query};
use crate::connection as served;
use crate::error::ControlError;
use crate::limits::WAIT_SLICE;

/// How long to wait for the guest.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct HintWait {
    /// Timeout; values above 60000 are reduced to 60000.
    #[serde(default = "default_hint_wait_ms")]
    wait_ms: u64,
    /// Whether to list the pages.
    #[serde(default)]
    list: bool,
}

/// Linux reports all of 4 GiB within 0.1 s, unless it swaps or is paused.
const fn default_hint_wait_ms() -> u64 {
    5000
}

/// Returns the memory statistics reported by the guest's kernel.
#[utoipa::path(get, tag = "guest", path = "/v1/stats", responses(
    (status = 200, description = "The newest values", body = StatsStatus),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_stats(State(app): State<App>) -> Result<Json<StatsStatus>, ControlError> {
    app.call(|balloon| balloon.stats()).await.map(Json)
}

/// Sets the polling interval of guest statistics.
#[utoipa::path(put, tag = "guest", path = "/v1/stats", request_body = SetStats, responses(
    (status = 200, description = "The newest values", body = StatsStatus),
    (status = 422, description = "The interval is out of range", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn put_stats(
    State(app): State<App>,
    request: Request,
) -> Result<Json<StatsStatus>, ControlError> {
    let SetStats { interval_ms } = app.body(request).await?;
    let sane = (MIN_STATS_INTERVAL_MS..=MAX_STATS_INTERVAL_MS).contains(&interval_ms);
    if interval_ms != 0 && !sane {
        return Err(ControlError::StatsInterval { interval_ms });
    }
    let interval = (interval_ms != 0).then(|| Duration::from_millis(interval_ms));
    app.call(move |balloon| balloon.set_stats_interval(interval)).await??;
    get_stats(State(app)).await
}

/// Requests free page hints, then lets the guest use the pages again.
///
/// The pages may be in use again when the client reads the response.
#[utoipa::path(post, tag = "guest", path = "/v1/hints", params(HintWait), responses(
    (status = 200, description = "The pages that the guest hinted", body = FreePageHints),
    (status = 409, description = "The driver does not support hints, was reset, or is busy", body = Problem),
    (status = 504, description = "The guest did not respond in time", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_hints(
    State(app): State<App>,
    wait: Result<Query<HintWait>, QueryRejection>,
) -> Result<Json<FreePageHints>, ControlError> {
    let HintWait { wait_ms, list } = query(wait)?;
    let wait = Duration::from_millis(wait_ms).min(app.limits.max_wait);
    let mut hints = hints(app, wait).await?;
    if !list {
        hints.list.clear();
    }
    Ok(Json(hints))
}

/// Collects the guest's hints for up to `wait`, then lets the guest use the pages again.
pub(crate) async fn hints(app: App, wait: Duration) -> Result<FreePageHints, ControlError> {
    // In its own task, so that the guest gets its pages back even if the client disconnects.
    let asked = tokio::spawn(served::serving(served::current(), async move {
        let _waiter = app.waiter(!wait.is_zero())?;
        ask_for_hints(&app, wait).await
    }));
    let lost = |_| ControlError::Failed {
        what: "host: the call to the balloon failed".into(),
        hint: "see the log of the balloon's process".into(),
    };
    let hints = asked.await.map_err(lost)??;
    match hints.outcome {
        HintOutcome::Complete => Ok(hints),
        HintOutcome::InProgress => Err(ControlError::GuestSilent { limit_ms: wait.as_millis() }),
        HintOutcome::Lost | HintOutcome::Replaced => Err(ControlError::Refused {
            what: "the guest's driver was reset, or another request replaced this one".into(),
            hint: "try again".into(),
        }),
    }
}

async fn ask_for_hints(app: &App, wait: Duration) -> Result<FreePageHints, ControlError> {
    let end = Instant::now() + wait;
    let id = app.call(|balloon| balloon.start_hints()).await??;
    let hints = loop {
        let left = end.saturating_duration_since(Instant::now());
        let slice = left.min(WAIT_SLICE);
        let hints = app.call(move |balloon| balloon.wait_hints(id, slice)).await;
        let over = hints.as_ref().is_ok_and(|hints| hints.outcome == HintOutcome::InProgress);
        if !over || left <= slice || *app.stopped.borrow() {
            break hints;
        }
    };
    app.call(move |balloon| balloon.end_hints(id)).await??;
    hints
}
