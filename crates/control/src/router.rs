//! Which handler serves which path.

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use tokio::sync::watch;

use crate::app::App;
use crate::connection::Connections;
use crate::error::ControlError;
use crate::limits::Limits;
use crate::routes::{migration, request};
use crate::vmm::VmmControl;
use crate::{guest_routes, openapi, routes};

/// Builds the router for `vmm`.
pub(crate) fn router(
    vmm: Arc<dyn VmmControl>,
    limits: Limits,
    connections: Arc<Connections>,
    stopped: watch::Receiver<bool>,
) -> Router {
    Router::new()
        .route("/v1/status", get(routes::get_status))
        .route("/v1/balloon", get(routes::get_balloon).put(routes::put_balloon))
        .route("/v1/release", get(routes::get_release).put(routes::put_release))
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
        .route("/v1/metrics", get(routes::get_metrics))
        .route("/metrics", get(routes::get_metrics))
        .route("/v1/openapi.json", get(openapi::get_openapi))
        .fallback(async |method: Method, uri: Uri| no_endpoint(&method, &uri, false))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            no_endpoint(&method, &uri, true)
        })
        .with_state(App::new(vmm, limits, connections, stopped))
}

fn no_endpoint(method: &Method, uri: &Uri, method_only: bool) -> ControlError {
    let what = format!("there is no {method} {}", uri.path());
    ControlError::NoSuchEndpoint { what, method_only }
}
