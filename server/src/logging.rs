//! The log: lines for people or JSON, on standard error, never in the way of serving.

use std::io::IsTerminal;

use tracing::Level;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{cli::LogFormat, telemetry::Traces};

/// Writes the log, and sends traces where they are wanted, until it is dropped.
pub struct Guard {
    // Traces first: what is said while they end is still logged.
    _traces: Option<Traces>,
    _writer: WorkerGuard,
}

/// Starts the log, and traces if `traces` names an endpoint.
///
/// Lines that cannot be written (a full pipe, a full disk) are dropped: the log must not stop a request.
///
/// # Errors
/// If `filter` is no tracing filter, or the endpoint none.
pub fn start(format: LogFormat, filter: &str, traces: Option<&str>) -> anyhow::Result<Guard> {
    let filter = EnvFilter::try_new(filter).map_err(|error| anyhow::anyhow!("--log {filter:?}: {error}"))?;
    let traces = traces.map(Traces::start).transpose()?;
    let spans = traces.as_ref().map(|traces| {
        let ours = filter_fn(|meta| {
            // Probes have spans of a finer level, for the log alone.
            meta.is_span() && *meta.level() <= Level::INFO && meta.target().starts_with("ingle")
        });
        tracing_opentelemetry::layer().with_tracer(traces.tracer()).with_filter(ours)
    });
    let (writer, guard) = NonBlockingBuilder::default().lossy(true).finish(std::io::stderr());
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Human => {
            lines.with_ansi(std::io::stderr().is_terminal()).with_target(false).with_filter(filter).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).with_filter(filter).boxed(),
    };
    tracing_subscriber::registry().with(lines).with(spans).init();
    Ok(Guard { _traces: traces, _writer: guard })
}
