//! Endpoints for migration and VM snapshots.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use tokio::task::spawn_blocking;

use crate::api::{MigrationStatus, Problem, ResolveMigration, StartMigration, StartSnapshot};
use crate::app::App;
use crate::connection as served;
use crate::error::ControlError;
use crate::vmm::VmmControl;

/// Returns the status of the newest migration or VM snapshot.
#[utoipa::path(get, tag = "migration", path = "/v1/migration", responses(
    (status = 200, description = "The status", body = MigrationStatus),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn get_migration(
    State(app): State<App>,
) -> Result<Json<MigrationStatus>, ControlError> {
    app.call_vmm(|vmm| Ok(vmm.migration())).await.map(Json)
}

/// Starts to migrate the guest to another host. The guest keeps running.
#[utoipa::path(post, tag = "migration", path = "/v1/migration", request_body = StartMigration, responses(
    (status = 202, description = "It has started", body = MigrationStatus),
    (status = 409, description = "The guest cannot be migrated now", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_migration(
    State(app): State<App>,
    request: Request,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let ask: StartMigration = app.body(request).await?;
    let permit = app.migration_permit()?;
    let start = move |vmm: &dyn VmmControl| {
        let _permit = permit;
        vmm.start_migration(&ask)
    };
    let status = app.call_vmm(start).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Starts to write a VM snapshot to a file. The guest keeps running during and after it; `GET
/// /v1/migration` returns the progress.
#[utoipa::path(post, tag = "migration", path = "/v1/snapshot", request_body = StartSnapshot, responses(
    (status = 202, description = "It has started", body = MigrationStatus),
    (status = 409, description = "The guest cannot be saved now", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_snapshot(
    State(app): State<App>,
    request: Request,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let ask: StartSnapshot = app.body(request).await?;
    let permit = app.migration_permit()?;
    let start = move |vmm: &dyn VmmControl| {
        let _permit = permit;
        vmm.start_snapshot(&ask)
    };
    let status = app.call_vmm(start).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Cancels the migration or VM snapshot; the guest stays here. After the commit it has no effect.
#[utoipa::path(delete, tag = "migration", path = "/v1/migration", responses(
    (status = 202, description = "It is being cancelled", body = MigrationStatus),
    (status = 409, description = "There is none to cancel", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn delete_migration(
    State(app): State<App>,
) -> Result<(StatusCode, Json<MigrationStatus>), ControlError> {
    let status = app.call_vmm(|vmm| vmm.cancel_migration()).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// Resolves an in-doubt migration.
#[utoipa::path(post, tag = "migration", path = "/v1/migration/resolve", request_body = ResolveMigration, responses(
    (status = 200, description = "It is resolved", body = MigrationStatus),
    (status = 409, description = "No migration is in doubt, or it is still in doubt", body = Problem),
    (status = "default", description = "What happened, and how to fix it", body = Problem),
))]
pub(crate) async fn post_resolve(
    State(app): State<App>,
    request: Request,
) -> Result<Json<MigrationStatus>, ControlError> {
    let ResolveMigration { action } = app.body(request).await?;
    let permit = app.migration_permit()?;
    let resolve = move |vmm: &dyn VmmControl| {
        let _permit = permit;
        vmm.resolve_migration(action)
    };
    app.call_vmm(resolve).await.map(Json)
}

impl App {
    /// Calls the VMM on a thread that may block.
    async fn call_vmm<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn VmmControl) -> Result<T, ControlError> + Send + 'static,
    ) -> Result<T, ControlError> {
        let (vmm, connection) = (Arc::clone(&self.vmm), served::current());
        let call = move || {
            let _connection = connection;
            ask(&*vmm)
        };
        spawn_blocking(call).await.map_err(|_| ControlError::Failed {
            what: "host: the call to the VMM failed".into(),
            hint: "see the VMM's log".into(),
        })?
    }
}
