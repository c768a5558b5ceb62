//! The endpoints that move a guest.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use tokio::task::spawn_blocking;

use crate::api::{MigrationStatus, Problem, ResolveMigration, StartMigration, StartSnapshot};
use crate::error::ControlError;
use crate::monitor::VmmControl;
use crate::routes::App;
use crate::server::served;

/// Where the newest migration stands, or the newest snapshot.
#[utoipa::path(get, tag = "migration", path = "/v1/migration", responses(
    (status = 200, description = "What is known", body = MigrationStatus),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn get_migration(
    State(app): State<App>,
) -> Result<Json<MigrationStatus>, ControlError> {
    app.tell(|monitor| Ok(monitor.migration())).await.map(Json)
}

/// Begins to move the guest to another host. It runs on meanwhile.
#[utoipa::path(post, tag = "migration", path = "/v1/migration", request_body = StartMigration, responses(
    (status = 202, description = "It has begun", body = MigrationStatus),
    (status = 409, description = "It cannot be moved now", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_migration(
    State(app): State<App>,
    request: Request,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let ask: StartMigration = app.body(request).await?;
    let place = app.controller()?;
    let start = move |monitor: &dyn VmmControl| {
        let _place = place;
        monitor.start_migration(&ask)
    };
    let status = app.tell(start).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Begins to write the guest to a file. It runs on meanwhile, and afterwards; `GET
/// /v1/migration` tells how far it is.
#[utoipa::path(post, tag = "migration", path = "/v1/snapshot", request_body = StartSnapshot, responses(
    (status = 202, description = "It has begun", body = MigrationStatus),
    (status = 409, description = "It cannot be written now", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_snapshot(
    State(app): State<App>,
    request: Request,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let ask: StartSnapshot = app.body(request).await?;
    let place = app.controller()?;
    let start = move |monitor: &dyn VmmControl| {
        let _place = place;
        monitor.start_snapshot(&ask)
    };
    let status = app.tell(start).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Ends the migration or the snapshot; the guest goes on where it is. It may be too late.
#[utoipa::path(delete, tag = "migration", path = "/v1/migration", responses(
    (status = 202, description = "It is about to end", body = MigrationStatus),
    (status = 409, description = "There is none", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn delete_migration(
    State(app): State<App>,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let status = app.tell(|monitor| monitor.cancel_migration()).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Ends a doubt about where the guest runs.
#[utoipa::path(post, tag = "migration", path = "/v1/migration/resolve", request_body = ResolveMigration, responses(
    (status = 200, description = "It is resolved", body = MigrationStatus),
    (status = 409, description = "There is no doubt, or it is still there", body = Problem),
    (status = "default", description = "What was wrong, and what to do", body = Problem),
))]
pub(crate) async fn post_resolve(
    State(app): State<App>,
    request: Request,
) -> Result<Json<MigrationStatus>, ControlError> {
    let ResolveMigration { word } = app.body(request).await?;
    let place = app.controller()?;
    let resolve = move |monitor: &dyn VmmControl| {
        let _place = place;
        monitor.resolve_migration(word)
    };
    app.tell(resolve).await.map(Json)
}

impl App {
    /// Tells the monitor something on a thread that may block.
    async fn tell<T: Send + 'static>(
        &self,
        tell: impl FnOnce(&dyn VmmControl) -> Result<T, ControlError> + Send + 'static,
    ) -> Result<T, ControlError> {
        let (monitor, connection) = (Arc::clone(&self.monitor), served::current());
        let tell = move || {
            let _connection = connection;
            tell(&*monitor)
        };
        spawn_blocking(tell).await.map_err(|_| ControlError::Failed {
            what: "the monitor failed while it was asked".into(),
            hint: "look into the log of the process that serves it".into(),
        })?
    }
}
