//! The endpoints about what the guest says of its memory.

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
use crate::error::ControlError;
use crate::routes::{App, WAIT_SLICE, query};
use crate::server::served;

/// How long to wait for the guest.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct HintWait {
    /// Give up after this time. Longer than 60000 is cut to that.
    #[serde(default = "default_hint_wait_ms")]
    wait_ms: u64,
    /// Whether to list the pages too.
    #[serde(default)]
    list: bool,
}

/// Linux names all of 4 GiB within 0.1 s; one that swaps or is paused does not.
const fn default_hint_wait_ms() -> u64 {
    5000
}

/// What the guest's kernel says about its memory.
#[utoipa::path(get, tag = "guest", path = "/v1/stats", responses(
    (status = 200, description = "The newest values", body = StatsStatus),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn get_stats(State(app): State<App>) -> Result<Json<StatsStatus>, ControlError> {
    app.call(|balloon| balloon.stats()).await.map(Json)
}

/// Sets how often the guest is asked about its memory.
#[utoipa::path(put, tag = "guest", path = "/v1/stats", request_body = SetStats, responses(
    (status = 200, description = "The newest values", body = StatsStatus),
    (status = 422, description = "An interval that is too short or too long", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
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

/// Asks the guest which pages it does not use, and gives them back to it.
///
/// The answer is a snapshot: any page may be in use by the time it is read.
#[utoipa::path(post, tag = "guest", path = "/v1/hints", params(HintWait), responses(
    (status = 200, description = "What the guest named", body = FreePageHints),
    (status = 409, description = "The driver cannot, is gone, or is being asked", body = Problem),
    (status = 504, description = "The guest did not answer in time", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
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

/// What the guest names within `wait`; it has its pages back then.
pub(crate) async fn hints(app: App, wait: Duration) -> Result<FreePageHints, ControlError> {
    // On its own, so that a client which hangs up leaves no guest without its pages.
    let asked = tokio::spawn(served::serving(served::current(), async move {
        let _waiter = app.waiter(!wait.is_zero())?;
        ask_for_hints(&app, wait).await
    }));
    let lost = |_| ControlError::Failed {
        what: "the balloon failed while it was asked".into(),
        hint: "look into the log of the process that serves it".into(),
    };
    let hints = asked.await.map_err(lost)??;
    match hints.outcome {
        HintOutcome::Complete => Ok(hints),
        HintOutcome::InProgress => Err(ControlError::GuestSilent { limit_ms: wait.as_millis() }),
        HintOutcome::Lost | HintOutcome::Replaced => Err(ControlError::Refused {
            what: "the guest's driver went away, or somebody else asked it".into(),
            hint: "ask again".into(),
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
