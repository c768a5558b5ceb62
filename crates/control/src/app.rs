//! What all handlers share: the VMM, the limits, and how a request is read and waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::{HttpBody, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::api::{BalloonStatus, Problem};
use crate::balloon::BalloonControl;
use crate::connection::{self as served, Connections, Phase};
use crate::error::ControlError;
use crate::limits::{Limits, MAX_BODY_BYTES, WAIT_SLICE};
use crate::vmm::VmmControl;
use crate::waiter_slots::{NoWaiterSlot, WaiterSlot, WaiterSlots};

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

impl App {
    /// The state of a server for `vmm`.
    pub(crate) fn new(
        vmm: Arc<dyn VmmControl>,
        limits: Limits,
        connections: Arc<Connections>,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        let waiters = WaiterSlots::new(limits.waiters, limits.waiters_each);
        let migrations = Arc::new(Semaphore::new(limits.migrations));
        Self { vmm, limits, waiters, migrations, connections, stopped }
    }

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

    pub(crate) async fn balloon_now(&self) -> Result<BalloonStatus, ControlError> {
        self.call(|balloon| balloon.wait_change(0, Duration::ZERO)).await
    }

    /// Returns a waiter slot if `waits`.
    pub(crate) fn waiter(&self, waits: bool) -> Result<Option<WaiterSlot>, ControlError> {
        if waits { self.any_waiter().map(Some) } else { Ok(None) }
    }

    pub(crate) fn any_waiter(&self) -> Result<WaiterSlot, ControlError> {
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
    pub(crate) async fn wait(
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

impl IntoResponse for ControlError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.http_status());
        let problem = Problem { error: self.to_string(), hint: self.hint() };
        (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(problem)).into_response()
    }
}
