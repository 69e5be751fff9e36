//! `/health` (the process lives), `/ready` (the engine gets on with its work), `/version`, `/metrics`.

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use ingle_engine::Health;

use super::types::{HealthBody, VersionBody};
use crate::{
    error::{ApiError, ApiResult, ErrorKind, draining, engine_dead},
    metrics::is_ready,
    state::AppState,
};

/// Whether the process lives.
#[utoipa::path(get, path = "/health", tag = "server",
    responses((status = 200, description = "It does.", body = HealthBody)))]
pub(crate) async fn live() -> Json<HealthBody> {
    Json(HealthBody { status: "ok" })
}

/// Whether requests are served: taken from the engine's progress, not from this task being alive.
#[utoipa::path(get, path = "/ready", tag = "server",
    responses(
        (status = 200, description = "They are.", body = HealthBody),
        (status = 503, description = "They are not; `code` says why.", body = crate::error::ErrorBody)
    ))]
pub(crate) async fn ready(State(state): State<AppState>) -> ApiResult<Json<HealthBody>> {
    if state.is_draining() {
        return Err(draining());
    }
    match state.health() {
        Health::Ready => Ok(Json(HealthBody { status: "ready" })),
        Health::Draining => Err(draining()),
        Health::Dead => Err(engine_dead()),
        Health::Stalled { seconds } => {
            let message =
                format!("Requests wait and the engine has completed no step for {seconds:.0} seconds.");
            Err(ApiError::new(ErrorKind::Stalled, message))
        }
    }
}

/// Which version this is.
#[utoipa::path(get, path = "/version", tag = "server",
    responses((status = 200, description = "The version.", body = VersionBody)))]
pub(crate) async fn version() -> Json<VersionBody> {
    Json(VersionBody { version: env!("CARGO_PKG_VERSION") })
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "server",
    responses((status = 200, description = "The metrics.", content_type = "text/plain", body = String)))]
pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let ready = !state.is_draining() && is_ready(&state.health());
    let stats = state.generator().map(|generator| generator.engine.stats()).unwrap_or_default();
    state.metrics().tier(&state);
    let text = state.metrics().render(&stats, ready, state.encoders(), state.arbiter());
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Panics, for the test of the panic boundary.
#[cfg(feature = "testing")]
pub(crate) async fn fault() -> Json<HealthBody> {
    panic!("this route exists to panic: /secret/path 0xdeadbeef")
}
