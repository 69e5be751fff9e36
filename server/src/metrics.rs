//! What `/metrics` says: our own `ingle_*` names, and the `vllm:*` names that dashboards and routers read.
//!
//! Each [`AppState`](crate::state::AppState) has its own recorder; nothing is global. Gauges of the engine are read
//! when somebody scrapes, counts and times are added where they happen. Label values come from closed sets: names of
//! our routes, methods, status codes, and reasons, never from client text.

mod encoders;

use std::{
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use ingle_engine::{ComputeArbiter, EngineStats, Health, Limits, Usage};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

use crate::state::{EncoderModel, ModelCard};
use crate::{
    accounts::audit::Entry,
    cache::Outcome,
    http::{self, generate::Counts},
    register::RegistrationState,
    state::AppState,
};
pub(crate) use encoders::EncodeTimes;
use encoders::{ComputeMetrics, EncoderMetrics};

const META: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// Upper bounds, in seconds, of times to the first token.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Of times between tokens.
const BETWEEN_TOKENS: &[f64] = &[
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Of whole requests and their phases.
const REQUEST: &[f64] = &[
    0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
    20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];

/// A metric under each of its names.
struct Many<T>(Vec<T>);

impl Many<Gauge> {
    fn set(&self, value: f64) {
        self.0.iter().for_each(|gauge| gauge.set(value));
    }
}

impl Many<Counter> {
    fn add(&self, value: u64) {
        self.0.iter().for_each(|counter| counter.increment(value));
    }

    fn absolute(&self, value: u64) {
        self.0.iter().for_each(|counter| counter.absolute(value));
    }
}

impl Many<Histogram> {
    fn record(&self, value: f64) {
        self.0.iter().for_each(|histogram| histogram.record(value));
    }
}

/// Why a request was answered 429.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    QueueFull,
    QueueTokens,
    Deadline,
    KeyLimit,
}

impl Refusal {
    const ALL: [(Self, &'static str); 4] = [
        (Self::QueueFull, "queue_full"),
        (Self::QueueTokens, "queue_tokens"),
        (Self::Deadline, "deadline"),
        (Self::KeyLimit, "key_limit"),
    ];
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let labels = labels.iter().map(|(name, value)| Label::new(*name, (*value).to_owned()));
    Key::from_parts(name, labels.collect::<Vec<_>>())
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
    Abort,
    Error,
}

impl Finish {
    const ALL: [(Self, &'static str); 4] =
        [(Self::Stop, "stop"), (Self::Length, "length"), (Self::Abort, "abort"), (Self::Error, "error")];
}

/// The recorder and a handle of every metric that is touched often.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    /// Values put into histograms; they are folded into buckets now and then, so that they do not pile up unscraped.
    recorded: AtomicU64,
    running: Many<Gauge>,
    waiting: Many<Gauge>,
    kv_usage: Many<Gauge>,
    ready: Many<Gauge>,
    preemptions: Many<Counter>,
    cache_queries: Many<Counter>,
    cache_hits: Many<Counter>,
    prompt_tokens: Many<Counter>,
    generation_tokens: Many<Counter>,
    finished: Vec<Many<Counter>>,
    refused: Many<Counter>,
    refusals: Vec<Many<Counter>>,
    cache: Vec<Many<Counter>>,
    panics: Many<Counter>,
    first_token: Many<Histogram>,
    between_tokens: Many<Histogram>,
    whole: Many<Histogram>,
    queue: Many<Histogram>,
    prefill: Many<Histogram>,
    decode: Many<Histogram>,
    request_prompt_tokens: Many<Histogram>,
    request_generation_tokens: Many<Histogram>,
    /// One of each encoder, in the order of the state's.
    encoders: Vec<EncoderMetrics>,
    compute: Option<ComputeMetrics>,
}

/// Bounds 1, 2, 5, 10, ... up to `max`.
fn counts_up_to(max: usize) -> Vec<f64> {
    let decades = (0..9_u32).map(|power| 10_usize.pow(power));
    let bounds = decades.flat_map(|ten| [ten, 2 * ten, 5 * ten]).take_while(|bound| *bound <= max);
    bounds.map(|bound| bound as f64).collect()
}

fn recorder(limits: &Limits) -> PrometheusRecorder {
    let counts = counts_up_to(limits.max_model_len.max(1));
    let buckets: [(&str, &[f64]); 5] = [
        ("_duration", encoders::SECONDS),
        ("time_to_first_token_seconds", FIRST_TOKEN),
        ("token_latency_seconds", BETWEEN_TOKENS),
        ("time_per_output_token_seconds", BETWEEN_TOKENS),
        ("_tokens", &counts),
    ];
    let mut builder = PrometheusBuilder::new().set_buckets(REQUEST).expect("the list is not empty");
    for (suffix, bounds) in buckets {
        builder = builder
            .set_buckets_for_metric(Matcher::Suffix(suffix.to_owned()), bounds)
            .expect("no list is empty: 1 is always in it");
    }
    builder.build_recorder()
}

/// Makes handles under several names with the same labels.
struct Registrar<'a> {
    recorder: &'a PrometheusRecorder,
    labels: Vec<Label>,
}

impl Registrar<'_> {
    fn each<T>(
        &self,
        names: &[&'static str],
        extra: &[Label],
        make: impl Fn(&'static str, Key) -> T,
    ) -> Many<T> {
        let labels: Vec<Label> = self.labels.iter().chain(extra).cloned().collect();
        Many(names.iter().map(|name| make(name, Key::from_parts(*name, labels.clone()))).collect())
    }

    fn gauge(&self, names: &[&'static str], help: &'static str) -> Many<Gauge> {
        self.gauge_with(names, help, &[])
    }

    fn gauge_with(&self, names: &[&'static str], help: &'static str, extra: &[Label]) -> Many<Gauge> {
        self.each(names, extra, |name, key| {
            self.recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
            self.recorder.register_gauge(&key, &META)
        })
    }

    fn counter(&self, names: &[&'static str], help: &'static str) -> Many<Counter> {
        self.counter_with(names, help, &[])
    }

    fn counter_with(&self, names: &[&'static str], help: &'static str, extra: &[Label]) -> Many<Counter> {
        self.each(names, extra, |name, key| {
            self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
            let counter = self.recorder.register_counter(&key, &META);
            counter.increment(0);
            counter
        })
    }

    fn histogram(&self, names: &[&'static str], help: &'static str) -> Many<Histogram> {
        self.each(names, &[], |name, key| {
            self.recorder.describe_histogram(KeyName::from_const_str(name), None, help.into());
            self.recorder.register_histogram(&key, &META)
        })
    }
}

impl Metrics {
    /// All metrics at zero, labelled with `model`.
    pub(crate) fn new(model: &str, limits: &Limits, stats: &EngineStats) -> Self {
        let recorder = recorder(limits);
        let labels = vec![Label::new("model_name", model.to_owned()), Label::new("engine", "0")];
        let r = Registrar { recorder: &recorder, labels };
        let config = [
            Label::new("block_size", stats.block_size.to_string()),
            Label::new("num_gpu_blocks", stats.kv_blocks_total.to_string()),
        ];
        r.gauge_with(
            &["ingle_cache_config_info", "vllm:cache_config_info"],
            "Size of the key/value cache, in its labels.",
            &config,
        )
        .set(1.0);
        let version = [Label::new("version", env!("CARGO_PKG_VERSION"))];
        r.gauge_with(&["ingle_build_info"], "Version of the server, in its label.", &version).set(1.0);
        let refusals = Refusal::ALL.map(|(_, reason)| {
            r.counter_with(
                &["ingle_admission_refusals_total"],
                "Requests answered 429, by what was in the way.",
                &[Label::new("reason", reason)],
            )
        });
        let cache = Outcome::ALL.map(|(_, outcome)| {
            r.counter_with(
                &["ingle_response_cache_total"],
                "What became of requests to the response cache.",
                &[Label::new("outcome", outcome)],
            )
        });
        let finished = Finish::ALL.map(|(_, reason)| {
            r.counter_with(
                &["ingle_requests_finished_total", "vllm:request_success_total"],
                "Requests by the reason of their end.",
                &[Label::new("finished_reason", reason)],
            )
        });
        Self {
            running: r
                .gauge(&["ingle_requests_running", "vllm:num_requests_running"], "Sequences being run."),
            waiting: r.gauge(
                &["ingle_requests_waiting", "vllm:num_requests_waiting"],
                "Sequences that wait to run.",
            ),
            kv_usage: r.gauge(
                &["ingle_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"],
                "Share of the key/value cache in use, 0 to 1.",
            ),
            ready: r.gauge(&["ingle_ready"], "Whether /ready says yes."),
            preemptions: r.counter(
                &["ingle_preemptions_total", "vllm:num_preemptions_total"],
                "Sequences that gave up their blocks to others and were computed again.",
            ),
            cache_queries: r.counter(
                &["ingle_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"],
                "Prompt tokens looked up in the prefix cache.",
            ),
            cache_hits: r.counter(
                &["ingle_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"],
                "Prompt tokens found in the prefix cache.",
            ),
            prompt_tokens: r.counter(
                &["ingle_prompt_tokens_total", "vllm:prompt_tokens_total"],
                "Prompt tokens processed.",
            ),
            generation_tokens: r.counter(
                &["ingle_generation_tokens_total", "vllm:generation_tokens_total"],
                "Answer tokens generated.",
            ),
            finished: finished.into(),
            refusals: refusals.into(),
            cache: cache.into(),
            refused: r
                .counter(&["ingle_requests_refused_total"], "Requests refused because the queue was full."),
            panics: r.counter(&["ingle_panics_total"], "Panics in handlers; each was one request's 500."),
            first_token: r.histogram(
                &["ingle_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"],
                "Time from a request to its first token.",
            ),
            between_tokens: r.histogram(
                &[
                    "ingle_inter_token_latency_seconds",
                    "vllm:inter_token_latency_seconds",
                    "vllm:time_per_output_token_seconds",
                ],
                "Time between two tokens of a choice.",
            ),
            whole: r.histogram(
                &["ingle_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"],
                "Time from a request to its last token.",
            ),
            queue: r.histogram(
                &["ingle_request_queue_time_seconds", "vllm:request_queue_time_seconds"],
                "Time a request waited.",
            ),
            prefill: r.histogram(
                &["ingle_request_prefill_time_seconds", "vllm:request_prefill_time_seconds"],
                "Time from a request's first step to its first token.",
            ),
            decode: r.histogram(
                &["ingle_request_decode_time_seconds", "vllm:request_decode_time_seconds"],
                "Time from a request's first token to its last.",
            ),
            request_prompt_tokens: r.histogram(
                &["ingle_request_prompt_tokens", "vllm:request_prompt_tokens"],
                "Prompt tokens of a request.",
            ),
            request_generation_tokens: r.histogram(
                &["ingle_request_generation_tokens", "vllm:request_generation_tokens"],
                "Answer tokens of a request.",
            ),
            encoders: Vec::new(),
            compute: None,
            recorded: AtomicU64::new(0),
            recorder,
        }
    }

    /// The same with the metrics of `encoders`, and, if `shared`, of how the models share the processors.
    pub(crate) fn with_encoders(mut self, encoders: &[Arc<EncoderModel>], shared: bool) -> Self {
        self.encoders = encoders.iter().map(|encoder| EncoderMetrics::new(&self.recorder, encoder)).collect();
        self.compute = shared.then(|| ComputeMetrics::new(&self.recorder));
        self
    }

    /// What the generating model `name` takes of the memory; it does not change.
    pub(crate) fn memory(&self, name: &str, card: &ModelCard) {
        let gauges: [(&'static str, &'static str, Option<u64>); 2] = [
            ("ingle_model_weight_bytes", "Bytes of the generating model's weights.", card.weight_bytes),
            ("ingle_kv_cache_bytes", "Bytes that cached keys and values may take.", card.kv_cache_bytes),
        ];
        for (gauge, help, bytes) in gauges {
            if let Some(bytes) = bytes {
                self.set(gauge, help, &[("model_name", name)], bytes as f64);
            }
        }
    }

    /// A request to the encoder `name` that was refused or failed.
    pub(crate) fn not_encoded(&self, name: &str) {
        if let Some(metrics) = self.encoders.iter().find(|metrics| metrics.name == name) {
            metrics.fail();
        }
    }

    /// A request that the encoder `name` has answered.
    pub(crate) fn encoded(&self, name: &str, times: &EncodeTimes) {
        if let Some(metrics) = self.encoders.iter().find(|metrics| metrics.name == name) {
            metrics.put(times, |histogram, value| self.put(histogram, value));
        }
    }

    /// The Prometheus text, after a look at the engine and the encoders.
    pub(crate) fn render(
        &self,
        stats: &EngineStats,
        ready: bool,
        encoders: &[Arc<EncoderModel>],
        arbiter: Option<&ComputeArbiter>,
    ) -> String {
        for (metrics, encoder) in self.encoders.iter().zip(encoders) {
            metrics.look(&encoder.handle.stats());
        }
        if let (Some(metrics), Some(arbiter)) = (&self.compute, arbiter) {
            metrics.look(arbiter);
        }
        self.running.set(stats.running as f64);
        self.waiting.set(stats.waiting as f64);
        self.kv_usage.set(stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64);
        self.ready.set(f64::from(u8::from(ready)));
        self.preemptions.absolute(stats.preemptions);
        self.cache_queries.absolute(stats.prefix_cache_queries);
        self.cache_hits.absolute(stats.prefix_cache_hits);
        self.recorder.handle().render()
    }

    /// One answered HTTP request.
    pub(crate) fn http_request(&self, method: &'static str, route: &str, status: u16) {
        const NAME: &str = "ingle_http_requests_total";
        let labels = vec![
            Label::new("method", method),
            Label::new("route", route.to_owned()),
            Label::new("status", status.to_string()),
        ];
        self.recorder.register_counter(&Key::from_parts(NAME, labels), &META).increment(1);
    }

    /// One request refused.
    pub(crate) fn refused(&self, why: Refusal) {
        if why == Refusal::QueueFull {
            self.refused.add(1);
        }
        let idx = Refusal::ALL.iter().position(|(refusal, _)| *refusal == why);
        if let Some(counter) = idx.and_then(|idx| self.refusals.get(idx)) {
            counter.add(1);
        }
    }

    /// One answer of the response cache.
    pub(crate) fn cache(&self, outcome: Outcome) {
        let idx = Outcome::ALL.iter().position(|(known, _)| *known == outcome);
        if let Some(counter) = idx.and_then(|idx| self.cache.get(idx)) {
            counter.add(1);
        }
    }

    /// An ended request, by key and model.
    pub(crate) fn book(&self, entry: &Entry<'_>) {
        let labels = [("key", entry.key.as_str()), ("model_name", entry.model)];
        let status = entry.status.to_string();
        let with_status = [labels[0], labels[1], ("status", status.as_str())];
        self.count("ingle_key_requests_total", "Requests by key, model and status.", &with_status, 1);
        let help = "Tokens by key and model.";
        for (kind, tokens) in [
            ("prompt", entry.prompt_tokens),
            ("cached", entry.cached_tokens),
            ("completion", entry.completion_tokens),
        ] {
            let with_kind = [labels[0], labels[1], ("kind", kind)];
            self.count("ingle_key_tokens_total", help, &with_kind, tokens.into());
        }
    }

    /// What the tier says of itself, just before it is scraped.
    pub(crate) fn tier(&self, state: &AppState) {
        let tier = http::tier::body(state);
        self.set(
            "ingle_queued_prompt_tokens",
            "Prompt tokens that wait.",
            &[],
            tier.load.queued_tokens as f64,
        );
        if let Some(audit) = state.audit() {
            self.set("ingle_audit_lines_dropped", "Audit lines that were lost.", &[], audit.dropped() as f64);
        }
        for row in state.ledger().rows(None) {
            let labels = [("key", row.key.as_str()), ("model_name", row.model.as_str())];
            self.set("ingle_key_cost_total", "Cost of tokens by key and model.", &labels, row.cost);
        }
        for card in &tier.models {
            let labels = [("model_name", card.name.as_str())];
            let seconds = |milliseconds: Option<f64>| milliseconds.map(|ms| ms / 1e3);
            let gauges: [(&'static str, &'static str, Option<f64>); 7] = [
                (
                    "ingle_tier_latency_p95_seconds",
                    "95th percentile of whole requests.",
                    seconds(card.latency_p95),
                ),
                (
                    "ingle_tier_first_token_p95_seconds",
                    "95th percentile of times to the first token.",
                    seconds(card.speed.first_token_p95),
                ),
                (
                    "ingle_tier_availability_ratio",
                    "Share of time and requests that was served.",
                    card.availability,
                ),
                ("ingle_tier_cost_per_1k", "Cost of a thousand tokens.", card.cost_per_1k),
                (
                    "ingle_tier_prefill_tokens_per_second",
                    "Median speed of prompts.",
                    card.speed.prefill_tokens_per_second,
                ),
                (
                    "ingle_tier_decode_tokens_per_second",
                    "Median speed of answers.",
                    card.speed.decode_tokens_per_second,
                ),
                (
                    "ingle_tier_embedding_tokens_per_second",
                    "Median speed of embeddings.",
                    card.speed.embedding_tokens_per_second,
                ),
            ];
            for (name, help, value) in gauges {
                if let Some(value) = value {
                    self.set(name, help, &labels, value);
                }
            }
        }
        for status in &tier.registrations {
            for (known, name) in RegistrationState::ALL {
                let labels = [("router", status.router.as_str()), ("state", name)];
                let value = f64::from(u8::from(known == status.state));
                self.set("ingle_registration_state", "1 for the state a registration is in.", &labels, value);
            }
            let labels = [("router", status.router.as_str())];
            self.set(
                "ingle_registrations",
                "Times we registered with a router.",
                &labels,
                status.registrations as f64,
            );
            self.set(
                "ingle_registration_failures",
                "Times a router could not be told.",
                &labels,
                status.failures as f64,
            );
        }
    }

    /// Adds to a counter whose labels are known only when it is used. Their values must be of a closed set.
    pub(crate) fn count(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &str)],
        by: u64,
    ) {
        self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_counter(&key(name, labels), &META).increment(by);
    }

    /// Sets a gauge in the same way.
    pub(crate) fn set(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &str)],
        value: f64,
    ) {
        self.recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_gauge(&key(name, labels), &META).set(value);
    }

    /// One panic in a handler.
    pub(crate) fn panicked(&self) {
        self.panics.add(1);
    }

    fn put(&self, histogram: &Many<Histogram>, value: f64) {
        const FOLD_EVERY: u64 = 4096;
        histogram.record(value);
        // Wraps after centuries.
        if self.recorded.fetch_add(1, Ordering::Relaxed) % FOLD_EVERY == FOLD_EVERY - 1 {
            self.recorder.handle().run_upkeep();
        }
    }
}

/// The times of one prompt's request, from its arrival on.
pub(crate) struct RequestTimes {
    started: Instant,
    /// When each choice got its last token.
    last: Vec<Option<Instant>>,
    first_token_seen: bool,
    prompt_counted: bool,
    outcome: Option<Finish>,
}

impl RequestTimes {
    pub(crate) fn new(started: Instant, num_choices: usize) -> Self {
        Self {
            started,
            last: vec![None; num_choices],
            first_token_seen: false,
            prompt_counted: false,
            outcome: None,
        }
    }

    /// The prompt was processed; counted once.
    pub(crate) fn prompt(&mut self, metrics: &Metrics, tokens: u32) {
        if !std::mem::replace(&mut self.prompt_counted, true) {
            metrics.prompt_tokens.add(tokens.into());
        }
    }

    /// A token of `choice` came.
    pub(crate) fn token(&mut self, metrics: &Metrics, choice: usize) {
        let now = Instant::now();
        metrics.generation_tokens.add(1);
        if !std::mem::replace(&mut self.first_token_seen, true) {
            metrics.put(&metrics.first_token, now.duration_since(self.started).as_secs_f64());
        }
        let Some(last) = self.last.get_mut(choice) else { return };
        if let Some(last) = last.replace(now) {
            metrics.put(&metrics.between_tokens, now.duration_since(last).as_secs_f64());
        }
    }

    /// An end token came, which is counted and is no text.
    pub(crate) fn end_token(&mut self, metrics: &Metrics) {
        metrics.generation_tokens.add(1);
    }

    /// All choices are done.
    pub(crate) fn finish(&mut self, metrics: &Metrics, reason: &str, counts: Counts, usage: Option<Usage>) {
        self.outcome = Finish::ALL.iter().find(|(_, name)| *name == reason).map(|(finish, _)| *finish);
        metrics.put(&metrics.whole, self.started.elapsed().as_secs_f64());
        metrics.put(&metrics.request_prompt_tokens, counts.prompt_tokens.into());
        metrics.put(&metrics.request_generation_tokens, counts.completion_tokens.into());
        if let Some(usage) = usage {
            metrics.put(&metrics.queue, usage.queue_seconds);
            metrics.put(&metrics.prefill, usage.prefill_seconds);
            metrics.put(&metrics.decode, usage.decode_seconds);
        }
    }

    /// The request failed.
    pub(crate) fn failed(&mut self) {
        self.outcome = Some(Finish::Error);
    }

    /// Counts the request; without an end it was given up by its client.
    pub(crate) fn report(&self, metrics: &Metrics) {
        let outcome = self.outcome.unwrap_or(Finish::Abort);
        let idx = Finish::ALL.iter().position(|(finish, _)| *finish == outcome);
        if let Some(counter) = idx.and_then(|idx| metrics.finished.get(idx)) {
            counter.add(1);
        }
    }
}

/// The method as a label.
pub(crate) fn method_label(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        _ => "other",
    }
}

/// Whether `health` means that requests are served.
pub(crate) fn is_ready(health: &Health) -> bool {
    matches!(health, Health::Ready)
}
