//! OpenAPI description of the API.

use std::sync::LazyLock;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use crate::{guest_routes, routes};

/// Collects the descriptions of the handlers and types.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Aerostat balloon control",
        description = "Controls the memory balloon of one guest over a Unix socket.",
    ),
    paths(
        routes::get_status,
        routes::get_balloon,
        routes::put_balloon,
        routes::get_release,
        routes::put_release,
        guest_routes::get_stats,
        guest_routes::put_stats,
        guest_routes::post_hints,
        routes::request::post_drop_caches,
        routes::request::post_free_pages,
        routes::request::get_free_pages,
        routes::request::delete_free_pages,
        routes::request::get_bitmap,
        routes::request::get_picture,
        routes::request::post_cancel,
        routes::migration::get_migration,
        routes::migration::post_migration,
        routes::migration::delete_migration,
        routes::migration::post_resolve,
        routes::migration::post_snapshot,
        routes::get_metrics,
        get_openapi,
    )
)]
struct Description;

/// Returns the OpenAPI file as JSON, ending in a line feed. Generated once: it takes milliseconds,
/// during which the server's thread serves no request.
pub fn text() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        // Fails only for maps with non-string keys; there are none.
        Description::openapi().to_pretty_json().map(|text| text + "\n").unwrap_or_default()
    });
    &TEXT
}

/// Returns this description of the API.
#[utoipa::path(get, tag = "balloon", path = "/v1/openapi.json", responses(
    (status = 200, description = "OpenAPI 3.1", body = Object),
))]
pub(crate) async fn get_openapi() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], text()).into_response()
}
