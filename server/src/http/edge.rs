//! What every request passes: its id and log line, its count, the framing check, and the rest of its body.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, BodyDataStream, Bytes},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use tracing::Instrument;

use crate::{
    error::{ApiError, ErrorKind},
    metrics::method_label,
    record::RequestId,
    state::AppState,
    telemetry,
};

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Characters of a client's request id at most.
const MAX_REQUEST_ID: usize = 128;
/// Bytes of an unread body that are read and thrown away, so that the client sees the refusal and not a reset.
const MAX_DRAIN: usize = 64 << 20;
/// Time for that.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Routes that machines ask every few seconds: no trace of them, and no line in the log unless it tells everything.
const PROBES: [&str; 4] = ["/health", "/ready", "/metrics", "/tier"];

/// The client's request id if it is a fit one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fit = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(X_REQUEST_ID).filter(fit).cloned().unwrap_or_else(|| {
        let id = super::new_id("req");
        HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("req"))
    })
}

/// Gives the request an id, logs its end and counts it. Neither prompts nor keys are logged.
pub(crate) async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.to_str().unwrap_or("").to_owned()));
    let method = method_label(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let probe = PROBES.contains(&route);
    let traced = state.config().traces && !probe;
    let span = if probe {
        tracing::debug_span!("probe", request_id = id.to_str().unwrap_or(""), method, route)
    } else {
        tracing::info_span!(
            "request",
            request_id = id.to_str().unwrap_or(""),
            method,
            route,
            otel.kind = tracing::field::Empty,
            otel.name = tracing::field::Empty,
            otel.status_code = tracing::field::Empty,
        )
    };
    if traced {
        telemetry::begin(&span, method, route, request.headers());
    }
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(X_REQUEST_ID, id);
    let status = response.status().as_u16();
    state.metrics().http_request(method, route, status);
    if traced {
        telemetry::http_status(&span, method, route, status);
    }
    span.in_scope(|| {
        let seconds = started.elapsed().as_secs_f64();
        if probe {
            tracing::debug!(status, seconds, "answered");
        } else if status >= 500 {
            tracing::warn!(status, seconds, "answered");
        } else {
            tracing::info!(status, seconds, "answered");
        }
    });
    response
}

/// The 500 of a request that panicked. The message of the panic is in the log by its hook, under no client's eyes.
pub(crate) fn panicked(state: &AppState) -> Response {
    state.metrics().panicked();
    ApiError::internal(&"panic in a handler").into_response()
}

/// Refuses framings that two programs may read differently.
pub(crate) async fn refuse_odd_framing(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let odd_coding = match (codings.next(), codings.next()) {
        (None, _) => false,
        (Some(one), None) => !one.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => true,
    };
    let ambiguous = odd_coding || request.extensions().get::<OddFraming>().is_some();
    if ambiguous {
        let message = "The request's length is announced in more than one way.";
        let mut response = ApiError::new(ErrorKind::InvalidValue, message).into_response();
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        return response;
    }
    next.run(request).await
}

/// Put into a request whose head announces its length twice; see `listen`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OddFraming;

type Shared = Arc<Mutex<Option<BodyDataStream>>>;

/// Reads what a refused request has not read of its body, within bounds. Without that, a client that is still sending
/// would see its connection reset instead of the answer.
pub(crate) async fn drain_body(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let announced =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let has_body =
        announced.is_some_and(|length| length > 0) || parts.headers.contains_key(header::TRANSFER_ENCODING);
    // Reading would tell a client that waits for it to send, and there is no end to too much.
    let leave = parts.headers.contains_key(header::EXPECT)
        || announced.is_some_and(|length| length > MAX_DRAIN as u64);
    if !has_body || leave {
        return next.run(Request::from_parts(parts, body)).await;
    }
    // A lock, because both the handler and we own the body; they never hold it at the same time.
    let shared: Shared = Arc::new(Mutex::new(Some(body.into_data_stream())));
    let reader = stream::unfold(Lease::new(&shared), |mut lease| async move {
        let chunk = lease.body.as_mut()?.next().await?;
        Some((chunk, lease))
    });
    let response = next.run(Request::from_parts(parts, Body::from_stream(reader))).await;
    let rest = shared.lock().unwrap_or_else(PoisonError::into_inner).take();
    let status = response.status();
    // A body that was too slow has had its time.
    if let Some(rest) = rest
        && status.as_u16() >= 400
        && status != StatusCode::REQUEST_TIMEOUT
    {
        // Too slow is not our loss: the answer goes out and the connection ends.
        let _ = tokio::time::timeout(DRAIN_TIME, throw_away(rest)).await;
    }
    response
}

async fn throw_away(mut rest: BodyDataStream) {
    let mut bytes = 0_usize;
    while let Some(Ok(chunk)) = rest.next().await {
        let chunk: Bytes = chunk;
        bytes = bytes.saturating_add(chunk.len());
        if bytes > MAX_DRAIN {
            return;
        }
    }
}

/// The body while a handler reads it; put back when the handler is done with it.
struct Lease {
    body: Option<BodyDataStream>,
    home: Shared,
}

impl Lease {
    fn new(home: &Shared) -> Self {
        let body = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        Self { body, home: Arc::clone(home) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
    }
}
