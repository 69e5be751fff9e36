//! Metrics of encoders, under our names and under those of text-embeddings-inference, and of shared processors.

use std::time::{Duration, Instant};

use ingle_engine::embed::{EncodeOutput, EncoderStats};
use ingle_engine::{ComputeArbiter, ComputeClass};
use metrics::{Counter, Gauge, Histogram, Label};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::{Many, Registrar};
use crate::http::models::task_name;
use crate::state::EncoderModel;

/// Upper bounds, in seconds, of the times of a request to an encoder.
pub(super) const SECONDS: &[f64] = &[
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 300.0,
];

/// The times of one request to an encoder, from its arrival on.
#[derive(Debug)]
pub(crate) struct EncodeTimes {
    started: Instant,
    num_inputs: usize,
    tokenization: Duration,
    queue: Duration,
    inference: Duration,
}

impl EncodeTimes {
    pub(crate) fn new(started: Instant, num_inputs: usize) -> Self {
        let zero = Duration::ZERO;
        Self { started, num_inputs, tokenization: zero, queue: zero, inference: zero }
    }

    /// The inputs are token ids now.
    pub(crate) fn tokenized(&mut self) {
        self.tokenization = self.started.elapsed();
    }

    /// The rows are there.
    pub(crate) fn computed(&mut self, output: &EncodeOutput) {
        self.queue = output.queue_time;
        self.inference = output.compute_time;
    }
}

pub(super) struct EncoderMetrics {
    pub(super) name: String,
    asked: Many<Counter>,
    requests: Many<Counter>,
    not_answered: Many<Counter>,
    refused: Many<Counter>,
    failed: Many<Counter>,
    cancelled: Many<Counter>,
    panics: Many<Counter>,
    inputs: Many<Counter>,
    tokens: Many<Counter>,
    batches: Many<Counter>,
    busy: Many<Gauge>,
    queued_inputs: Many<Gauge>,
    queued_tokens: Many<Gauge>,
    running: Many<Gauge>,
    batch_inputs: Many<Gauge>,
    batch_tokens: Many<Gauge>,
    batch_budget: Many<Gauge>,
    whole: Many<Histogram>,
    tokenization: Many<Histogram>,
    queue: Many<Histogram>,
    inference: Many<Histogram>,
    request_inputs: Many<Counter>,
}

impl EncoderMetrics {
    pub(super) fn new(recorder: &PrometheusRecorder, encoder: &EncoderModel) -> Self {
        let labels = vec![
            Label::new("model_name", encoder.name().to_owned()),
            Label::new("task", task_name(encoder.task())),
        ];
        let r = Registrar { recorder, labels };
        r.gauge(&["ingle_encoder_weight_bytes"], "Bytes of the model's weights.")
            .set(encoder.handle.info().weight_bytes as f64);
        Self {
            name: encoder.name().to_owned(),
            asked: r.counter(&["te_request_count"], "Requests that were answered, refused or failed."),
            requests: r.counter(
                &["ingle_encoder_requests_total", "te_request_success"],
                "Requests that were answered with rows.",
            ),
            not_answered: r.counter(
                &["te_request_failure"],
                "Requests that were refused, for what they asked or because the queue was full, or failed.",
            ),
            refused: r.counter(
                &["ingle_encoder_requests_refused_total"],
                "Requests refused because the queue was full.",
            ),
            failed: r.counter(
                &["ingle_encoder_requests_failed_total"],
                "Requests that the model could not compute.",
            ),
            cancelled: r
                .counter(&["ingle_encoder_requests_cancelled_total"], "Requests whose clients went away."),
            panics: r.counter(&["ingle_encoder_panics_total"], "Batches that panicked."),
            inputs: r.counter(&["ingle_encoder_inputs_total"], "Inputs computed."),
            tokens: r.counter(&["ingle_encoder_tokens_total"], "Tokens computed."),
            batches: r.counter(&["ingle_encoder_batches_total"], "Batches computed."),
            busy: r
                .gauge(&["ingle_encoder_busy_seconds"], "Seconds that the model computed, since the start."),
            queued_inputs: r.gauge(&["ingle_encoder_queued_inputs", "te_queue_size"], "Inputs that wait."),
            queued_tokens: r.gauge(&["ingle_encoder_queued_tokens"], "Tokens that wait."),
            running: r.gauge(&["ingle_encoder_running_inputs"], "Inputs in the batch under way."),
            batch_inputs: r
                .gauge(&["ingle_encoder_batch_inputs", "te_batch_next_size"], "Inputs of the last batch."),
            batch_tokens: r
                .gauge(&["ingle_encoder_batch_tokens", "te_batch_next_tokens"], "Tokens of the last batch."),
            batch_budget: r.gauge(
                &["ingle_encoder_batch_budget_tokens"],
                "Tokens that a batch is cut to, from the speed measured so far.",
            ),
            whole: r.histogram(&["te_request_duration"], "Seconds of a request, without writing its answer."),
            tokenization: r
                .histogram(&["te_request_tokenization_duration"], "Seconds of tokenising a request."),
            queue: r.histogram(&["te_request_queue_duration"], "Seconds that a request waited."),
            inference: r.histogram(
                &["te_request_inference_duration"],
                "Seconds from the first batch of a request to its last row.",
            ),
            request_inputs: r.counter(&["te_embed_count"], "Inputs of answered requests."),
        }
    }

    pub(super) fn put(&self, times: &EncodeTimes, put: impl Fn(&Many<Histogram>, f64)) {
        self.asked.add(1);
        self.requests.add(1);
        self.request_inputs.add(times.num_inputs as u64);
        put(&self.whole, times.started.elapsed().as_secs_f64());
        put(&self.tokenization, times.tokenization.as_secs_f64());
        put(&self.queue, times.queue.as_secs_f64());
        put(&self.inference, times.inference.as_secs_f64());
    }

    /// A request that got no rows.
    pub(super) fn fail(&self) {
        self.asked.add(1);
        self.not_answered.add(1);
    }

    /// Takes over what the encoder counts itself.
    pub(super) fn look(&self, stats: &EncoderStats) {
        self.refused.absolute(stats.refused_queue_full);
        self.failed.absolute(stats.failed);
        self.cancelled.absolute(stats.cancelled);
        self.panics.absolute(stats.panics);
        self.inputs.absolute(stats.inputs);
        self.tokens.absolute(stats.tokens);
        self.batches.absolute(stats.batches);
        self.busy.set(stats.busy_seconds);
        self.queued_inputs.set(stats.queued_inputs as f64);
        self.queued_tokens.set(stats.queued_tokens as f64);
        self.running.set(stats.running_inputs as f64);
        self.batch_inputs.set(stats.last_batch_inputs as f64);
        self.batch_tokens.set(stats.last_batch_tokens as f64);
        self.batch_budget.set(stats.batch_budget as f64);
    }
}

/// How generating and encoding share the processors.
pub(super) struct ComputeMetrics(Vec<(ComputeClass, ClassMetrics)>);

struct ClassMetrics {
    share: Many<Gauge>,
    busy: Many<Gauge>,
    waited: Many<Gauge>,
    longest: Many<Gauge>,
    handovers: Many<Counter>,
}

impl ComputeMetrics {
    pub(super) fn new(recorder: &PrometheusRecorder) -> Self {
        let metrics = |class: ComputeClass| {
            let name = match class {
                ComputeClass::Generate => "generate",
                ComputeClass::Encode => "encode",
            };
            let r = Registrar { recorder, labels: vec![Label::new("class", name)] };
            ClassMetrics {
                share: r.gauge(
                    &["ingle_compute_share_ratio"],
                    "Share of the time that the class may count on while both have work.",
                ),
                busy: r.gauge(
                    &["ingle_compute_busy_seconds"],
                    "Seconds that the class computed, since the start.",
                ),
                waited: r.gauge(
                    &["ingle_compute_waited_seconds"],
                    "Seconds that the class waited for the other, since the start.",
                ),
                longest: r.gauge(&["ingle_compute_longest_wait_seconds"], "The longest of these waits."),
                handovers: r.counter(
                    &["ingle_compute_handovers_total"],
                    "Times that the class let another go first while it had more to do.",
                ),
            }
        };
        Self(ComputeClass::ALL.into_iter().map(|class| (class, metrics(class))).collect())
    }

    pub(super) fn look(&self, arbiter: &ComputeArbiter) {
        for (class, metrics) in &self.0 {
            let stats = arbiter.stats(*class);
            metrics.share.set(stats.share);
            metrics.busy.set(stats.busy_seconds);
            metrics.waited.set(stats.waited_seconds);
            metrics.longest.set(stats.longest_wait_seconds);
            metrics.handovers.absolute(stats.handovers);
        }
    }
}
