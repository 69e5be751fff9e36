//! OpenTelemetry traces: a span a request, in the trace its caller began (W3C `traceparent`), sent by OTLP over HTTP.
//!
//! Off unless an endpoint is given; then spans are sent in batches from a thread of their own, and dropped where the
//! collector does not take them.

use std::time::Duration;

use axum::http::HeaderMap;
use opentelemetry::{
    propagation::{Extractor, TextMapPropagator},
    trace::TracerProvider,
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracerProvider, Tracer},
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::accounts::audit::Entry;

/// Time the last spans get to be sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Sends spans until it is dropped.
pub(crate) struct Traces(SdkTracerProvider);

impl Traces {
    /// Sends to `endpoint`. Call it outside of a runtime: the sender has one of its own.
    pub(crate) fn start(endpoint: &str) -> anyhow::Result<Self> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| anyhow::anyhow!("--otlp-traces-endpoint {endpoint:?}: {error}"))?;
        let resource = Resource::builder().with_service_name("ingle").build();
        Ok(Self(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build()))
    }

    pub(crate) fn tracer(&self) -> Tracer {
        self.0.tracer("ingle")
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // A collector that is away at the end is no reason to stay.
        let _ = self.0.shutdown_with_timeout(LAST_WORDS);
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

/// Names `span`, and puts it into the trace that `headers` name, if they name one.
pub(crate) fn begin(span: &Span, method: &'static str, route: &str, headers: &HeaderMap) {
    span.record("otel.kind", "server");
    span.record("otel.name", format!("{method} {route}"));
    if headers.contains_key("traceparent") {
        // Without traces the span has no place for it, which is no fault.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Headers(headers)));
    }
}

/// Notes how the request ended, under the names of the semantic conventions.
pub(crate) fn http_status(span: &Span, method: &'static str, route: &str, status: u16) {
    span.set_attribute("http.request.method", method);
    span.set_attribute("http.route", route.to_owned());
    span.set_attribute("http.response.status_code", i64::from(status));
    if status >= 500 {
        span.record("otel.status_code", "ERROR");
    }
}

/// Notes what the request was about, under the names of the conventions for generative AI.
pub(crate) fn generation(span: &Span, entry: &Entry<'_>) {
    span.set_attribute("gen_ai.system", "ingle");
    span.set_attribute("gen_ai.request.model", entry.asked_for.to_owned());
    span.set_attribute("gen_ai.response.model", entry.model.to_owned());
    span.set_attribute("gen_ai.usage.input_tokens", i64::from(entry.prompt_tokens));
    span.set_attribute("gen_ai.usage.output_tokens", i64::from(entry.completion_tokens));
    span.set_attribute("gen_ai.response.finish_reasons", entry.finish_reason.to_owned());
    span.set_attribute("ingle.cached_tokens", i64::from(entry.cached_tokens));
    span.set_attribute("ingle.queue_ms", entry.queue_ms.unwrap_or(0.0));
    span.set_attribute("gen_ai.server.time_to_first_token", entry.first_token_ms.unwrap_or(0.0) / 1e3);
}
