//! The routes and what lies around them.
//!
//! From the outside in: the request's id and log line, panics, CORS, the host check, the key check, then the route.
//! All layers sit on the router's root, so a new route is behind all of them.

pub(crate) mod body;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod edge;
pub(crate) mod encode;
pub(crate) mod encode_types;
pub(crate) mod generate;
pub(crate) mod health;
pub(crate) mod limits;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod openapi;
pub(crate) mod params;
pub(crate) mod sse;
pub(crate) mod tally;
pub(crate) mod tier;
pub(crate) mod tokenize;
pub(crate) mod tokens;
pub mod types;
pub(crate) mod validate;

use std::time::Duration;

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method, header},
    middleware::{from_fn, from_fn_with_state},
    response::Response,
    routing::{MethodRouter, get, post},
};
use futures::StreamExt;
use tower_http::{catch_panic::CatchPanicLayer, cors::CorsLayer};

use crate::{
    auth,
    error::{ApiError, ApiResult, ErrorKind, draining},
    record::{self, Record},
    state::{AppState, View},
};
use generate::{Piece, Pieces};

/// What `system_fingerprint` says: the answers of one version are comparable.
pub(crate) const FINGERPRINT: &str = concat!("ingle-", env!("CARGO_PKG_VERSION"));

type Routes = Vec<(&'static str, MethodRouter<AppState>)>;

/// The routes of a model that generates: its path and its methods. `generates`: there is one.
fn generating_routes(generates: bool) -> Routes {
    let route = |path, methods| (path, if generates { methods } else { post(encode::refuse_generation) });
    vec![
        route("/v1/chat/completions", post(chat::create)),
        route("/v1/chat/completions/render", post(chat::render)),
        route("/v1/completions", post(completions::create)),
    ]
}

/// The routes of models that encode. `encodes`: there are some; only then the root is one, for clients of
/// text-embeddings-inference that know only an address.
fn encoding_routes(encodes: bool) -> Routes {
    let root = encodes.then(|| ("/", post(encode::tei::root)));
    let mut routes = vec![
        ("/v1/embeddings", post(encode::embeddings::create)),
        ("/v1/rerank", post(encode::rerank::create)),
        ("/v2/rerank", post(encode::rerank::create)),
        ("/rerank", post(encode::rerank::create)),
        ("/v1/score", post(encode::score::create)),
        ("/score", post(encode::score::create)),
        ("/embed", post(encode::tei::embed)),
        ("/similarity", post(encode::tei::similarity)),
    ];
    routes.extend(root);
    routes
}

/// All other routes.
fn other_routes() -> Routes {
    vec![
        ("/tokenize", post(tokenize::tokenize)),
        ("/detokenize", post(tokenize::detokenize)),
        ("/info", get(encode::tei::info)),
        ("/v1/models", get(models::list)),
        ("/v1/models/{*id}", get(models::one)),
        ("/tier", get(tier::tier)),
        ("/usage", get(tier::usage)),
        ("/health", get(health::live)),
        ("/ready", get(health::ready)),
        ("/version", get(health::version)),
        ("/metrics", get(health::metrics)),
        ("/openapi.json", get(openapi::document)),
        ("/docs", get(openapi::page)),
    ]
}

/// The paths of all routes, for tests that walk them.
#[must_use]
pub fn paths() -> Vec<&'static str> {
    let all = generating_routes(true).into_iter().chain(encoding_routes(true)).chain(other_routes());
    all.map(|(path, _)| path).collect()
}

/// What answers while the model is loaded: `/health` lives, all else is not ready.
pub(crate) fn waiting_app() -> Router {
    let loading =
        || async { ApiError::new(ErrorKind::Loading, "The model is being loaded; try again in a moment.") };
    Router::new().route("/health", get(health::live)).fallback(loading)
}

/// The whole application. See the module's words for the order of things.
pub fn app(state: AppState) -> Router {
    app_of(state, View::All)
}

/// The application as an address of `view` serves it.
pub(crate) fn app_of(state: AppState, view: View) -> Router {
    build(Vec::new(), state, view)
}

/// [`app`] with routes that panic, one before and one after the head of its answer.
#[cfg(feature = "testing")]
pub fn app_with_faults(state: AppState) -> Router {
    build(vec![("/fault/panic", get(health::fault))], state, View::All)
}

fn build(more: Routes, state: AppState, view: View) -> Router {
    let state = state.with_view(view);
    let encoding = encoding_routes(state.shown().next().is_some()).into_iter().map(|(path, methods)| {
        (path, methods.route_layer(from_fn_with_state(state.clone(), encode::count_failures)))
    });
    let routes = generating_routes(state.generates()).into_iter().chain(encoding).chain(other_routes());
    let mut router = Router::new();
    for (path, methods) in routes.chain(more) {
        router = router.route(path, methods);
    }
    let panics = state.clone();
    let mut router = router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(state.clone(), record::keep))
        .layer(from_fn_with_state(state.clone(), auth::require_key))
        .layer(from_fn_with_state(state.clone(), auth::check_host))
        .layer(from_fn(edge::refuse_odd_framing));
    if let Some(cors) = cors(&state.config().cors_origins) {
        router = router.layer(cors);
    }
    router
        .layer(CatchPanicLayer::custom(move |_panic| edge::panicked(&panics)))
        .layer(from_fn(edge::drain_body))
        .layer(from_fn_with_state(state.clone(), edge::observe))
        .with_state(state)
}

async fn not_found() -> ApiError {
    ApiError::new(ErrorKind::NotFound, "There is no such route.")
}

async fn method_not_allowed(method: Method) -> ApiError {
    let name = crate::metrics::method_label(&method);
    ApiError::new(ErrorKind::MethodNotAllowed, format!("This route does not know the method ({name})."))
}

/// The CORS layer for `origins`; `None` without any.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, edge::X_REQUEST_ID])
        .expose_headers([edge::X_REQUEST_ID, X_IGNORED_PARAMS]);
    if origins.iter().any(|origin| origin == "*") {
        return Some(layer.allow_origin(tower_http::cors::Any));
    }
    let list: Vec<HeaderValue> = origins.iter().filter_map(|origin| origin.parse().ok()).collect();
    Some(layer.allow_origin(list))
}

/// Tells a program that reads no bodies where the time went.
pub(crate) fn receipt_headers(response: &mut Response, usage: &types::UsageBody) {
    let receipt = &usage.receipt;
    let timing = format!(
        "queue;dur={:.3}, prefill;dur={:.3}, decode;dur={:.3}",
        receipt.queue_ms, receipt.prefill_ms, receipt.decode_ms
    );
    let mut set = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    };
    set("server-timing", timing);
    set("x-ingle-cached-tokens", usage.prompt_tokens_details.cached_tokens.to_string());
    if let Some(rate) = receipt.tokens_per_second {
        set("x-ingle-tokens-per-second", format!("{rate:.2}"));
    }
}

const X_IGNORED_PARAMS: HeaderName = HeaderName::from_static("x-ignored-params");

/// Tells the client which parameters had no effect.
pub(crate) fn ignored_header(response: &mut Response, ignored: Option<String>) {
    if let Some(value) = ignored.and_then(|names| HeaderValue::from_str(&names).ok()) {
        response.headers_mut().insert(X_IGNORED_PARAMS, value);
    }
}

/// A new id such as `chatcmpl-0123...`.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// What a request that ran out of time is told.
pub(crate) fn deadline(limit: Duration) -> ApiError {
    ApiError::new(ErrorKind::Deadline, format!("The request took longer than the {} it had.", shown(limit)))
}

/// `time` for a message: in milliseconds below a second.
pub(crate) fn shown(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.1} s") }
}

/// Takes all pieces. If the client goes away, this future is dropped, and with it the engine's request.
///
/// # Errors
/// The request's failure, the deadline, or the end of the server.
pub(crate) async fn collect(
    state: &AppState,
    record: &Record,
    mut pieces: Pieces,
    mut take: impl FnMut(Piece),
) -> ApiResult<()> {
    let all = async {
        while let Some(piece) = pieces.next().await {
            take(piece?);
        }
        Ok(())
    };
    let limit = record.limit();
    tokio::select! {
        result = tokio::time::timeout(limit, all) => {
            result.unwrap_or_else(|_| Err(deadline(limit)))
        }
        () = state.cut().cancelled() => Err(draining()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_times_are_shown_in_milliseconds() {
        let shown = [100, 1_500, 999_000, 1_000_000, 12_340_000].map(|us| shown(Duration::from_micros(us)));
        assert_eq!(shown, ["0.1 ms", "1.5 ms", "999.0 ms", "1.0 s", "12.3 s"]);
    }
}
