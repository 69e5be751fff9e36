//! What is kept about one request to a model, from its arrival until nothing is made for it any more.
//!
//! A middleware opens the record, the handler and the drivers of its prompts add to it, and when the last of them lets
//! go of it, it is booked: usage per key, the audit log, the tier's windows. A client that goes away is booked, too.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, Method},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    accounts::audit::Entry,
    auth::Tenant,
    error::ApiError,
    state::AppState,
    telemetry,
    tier::{Observation, Verdict},
};

/// Routes whose requests are recorded.
const RECORDED: [&str; 11] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/",
    "/embed",
    "/similarity",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
];
/// The header with the seconds that a caller gives its request.
const TIMEOUT_HEADER: &str = "x-request-timeout";
/// The longest time a caller may give, in seconds: a day.
const MAX_TIMEOUT: f64 = 86_400.0;
/// Bytes of a prompt in the audit log at most.
const MAX_AUDIT_PROMPT: usize = 32 << 10;
/// The status of a request whose client went away before there was one, as proxies log it.
const CLIENT_GONE: u16 = 499;

/// The id under which a request is logged.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

tokio::task_local! {
    static CURRENT: Record;
}

/// The record of the request that this task answers. For code far below a handler; streams that outlive the handler
/// carry their record with them.
pub(crate) fn current() -> Option<Record> {
    CURRENT.try_with(Clone::clone).ok()
}

/// A request's record; clones are the same record.
#[derive(Clone)]
pub(crate) struct Record(Arc<Inner>);

struct Inner {
    state: AppState,
    tenant: Tenant,
    route: String,
    request_id: String,
    arrived: Instant,
    /// The request's span; it ends with the record.
    span: tracing::Span,
    facts: Mutex<Facts>,
}

/// What is known so far.
#[derive(Debug, Clone, Default)]
struct Facts {
    asked: Option<String>,
    served: Option<String>,
    stream: bool,
    timeout: Option<Duration>,
    status: Option<u16>,
    /// A refusal that says nothing about this server.
    not_ours: bool,
    finish: Option<&'static str>,
    failed: bool,
    replayed: bool,
    ended: Option<Instant>,
    prompts: Vec<Progress>,
    prompt: Option<String>,
}

/// How far one prompt of a request is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Progress {
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) queue: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
    /// From the arrival.
    pub(crate) first_token: Option<Duration>,
}

impl Record {
    fn open(state: &AppState, request: &Request, route: &str) -> Result<Self, ApiError> {
        let extensions = request.extensions();
        let facts = Facts { timeout: header_timeout(request.headers())?, ..Facts::default() };
        Ok(Self(Arc::new(Inner {
            state: state.clone(),
            tenant: extensions.get::<Tenant>().copied().unwrap_or_default(),
            route: route.to_owned(),
            request_id: extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default(),
            arrived: Instant::now(),
            span: tracing::Span::current(),
            facts: Mutex::new(facts),
        })))
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Plain values, each set whole.
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tenant(&self) -> Tenant {
        self.0.tenant
    }

    /// The name the request used, and the model that serves it.
    pub(crate) fn model(&self, asked: &str, served: &str) {
        let mut facts = self.facts();
        facts.asked = Some(asked.to_owned());
        facts.served = Some(served.to_owned());
    }

    /// The model that serves it, once it is known.
    pub(crate) fn served(&self) -> String {
        self.facts().served.clone().unwrap_or_default()
    }

    pub(crate) fn is_stream(&self, stream: bool) {
        self.facts().stream = stream;
    }

    /// The caller's time in the body; it counts before that of the header.
    pub(crate) fn give_time(&self, seconds: Option<f32>) {
        if let Some(timeout) = seconds.and_then(|seconds| Duration::try_from_secs_f32(seconds).ok()) {
            self.facts().timeout = Some(timeout);
        }
    }

    /// The time the caller gave the whole request.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.facts().timeout
    }

    /// What is left of the caller's time.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        self.timeout().map(|timeout| timeout.saturating_sub(self.0.arrived.elapsed()))
    }

    /// The time the request may still take.
    pub(crate) fn limit(&self) -> Duration {
        let most = self.0.state.config().request_timeout;
        self.time_left().map_or(most, |left| left.min(most))
    }

    pub(crate) fn since_arrival(&self) -> Duration {
        self.0.arrived.elapsed()
    }

    /// The refusal is of the key's doing, not of the server's state.
    pub(crate) fn not_our_doing(&self) {
        self.facts().not_ours = true;
    }

    /// Whether the prompt belongs into the audit log.
    pub(crate) fn wants_prompt(&self) -> bool {
        self.0.state.audit().is_some_and(|audit| audit.with_prompts())
    }

    /// The prompt as it came, cut to what the log takes.
    pub(crate) fn prompt(&self, mut text: String) {
        let mut end = MAX_AUDIT_PROMPT.min(text.len());
        while !text.is_char_boundary(end) {
            end = end.saturating_sub(1);
        }
        text.truncate(end);
        self.facts().prompt = Some(text);
    }

    /// How far prompt number `prompt` is.
    pub(crate) fn progress(&self, prompt: usize, progress: Progress) {
        let mut facts = self.facts();
        if facts.prompts.len() <= prompt {
            facts.prompts.resize(prompt.saturating_add(1), Progress::default());
        }
        if let Some(slot) = facts.prompts.get_mut(prompt) {
            *slot = progress;
        }
    }

    /// Times in the queue and of computing so far, the longest of all prompts.
    pub(crate) fn times(&self) -> Option<(Duration, Duration)> {
        let facts = self.facts();
        let longest = |time: fn(&Progress) -> Duration| facts.prompts.iter().map(time).max();
        Some((longest(|p| p.queue)?, longest(|p| p.prefill)?))
    }

    /// A prompt is done.
    pub(crate) fn finished(&self, reason: &'static str) {
        let mut facts = self.facts();
        facts.finish = Some(reason);
        facts.ended = Some(Instant::now());
    }

    /// It failed after its head was sent.
    pub(crate) fn failed(&self) {
        let mut facts = self.facts();
        facts.failed = true;
        facts.ended = Some(Instant::now());
    }

    /// The answer came from the response cache.
    pub(crate) fn replayed(&self) {
        let mut facts = self.facts();
        facts.replayed = true;
        facts.finish = Some("cached");
    }
}

/// The seconds of the caller's header.
fn header_timeout(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(None) };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    match seconds.filter(|seconds| *seconds > 0.0 && *seconds <= MAX_TIMEOUT) {
        Some(seconds) => Ok(Some(Duration::from_secs_f64(seconds))),
        None => Err(ApiError::invalid(
            TIMEOUT_HEADER,
            "The header 'x-request-timeout' must be a number of seconds above 0, up to 86400.",
        )),
    }
}

/// Opens the record of a request to a model, and notes the status of its answer.
pub(crate) async fn keep(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let Some(route) = route.filter(|route| RECORDED.contains(&route.as_str())) else {
        return next.run(request).await;
    };
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let record = match Record::open(&state, &request, &route) {
        Ok(record) => record,
        Err(error) => return error.into_response(),
    };
    request.extensions_mut().insert(record.clone());
    let response = CURRENT.scope(record.clone(), next.run(request)).await;
    record.facts().status = Some(response.status().as_u16());
    response
}

impl Drop for Inner {
    fn drop(&mut self) {
        let facts = self.facts.get_mut().unwrap_or_else(PoisonError::into_inner);
        let facts = std::mem::take(facts);
        let now = Instant::now();
        let latency = facts.ended.unwrap_or(now).saturating_duration_since(self.arrived);
        let status = facts.status.unwrap_or(CLIENT_GONE);
        let aborted = status < 400 && facts.stream && facts.finish.is_none() && !facts.failed;
        let verdict = match status {
            _ if facts.not_ours || aborted => Verdict::NotOurs,
            _ if facts.failed => Verdict::Failed,
            429 | 500.. => Verdict::Failed,
            400..=499 => Verdict::NotOurs,
            _ => Verdict::Served,
        };
        let sum =
            |count: fn(&Progress) -> u32| facts.prompts.iter().map(count).fold(0_u32, u32::saturating_add);
        let longest = |time: fn(&Progress) -> Duration| facts.prompts.iter().map(time).max();
        let (prompt_tokens, cached_tokens) = (sum(|p| p.prompt_tokens), sum(|p| p.cached_tokens));
        let completion_tokens = sum(|p| p.completion_tokens);
        let first_token = facts.prompts.iter().filter_map(|p| p.first_token).min();
        let observation = Observation {
            verdict,
            latency,
            first_token,
            computed: prompt_tokens.saturating_sub(cached_tokens),
            prefill: longest(|p| p.prefill).unwrap_or_default(),
            completion: completion_tokens,
            decode: longest(|p| p.decode).unwrap_or_default(),
            replayed: facts.replayed,
        };
        let served = facts.served.as_deref().unwrap_or("");
        self.state.tier().observe(now, served, &observation);
        self.state.tier().spend(now, self.tenant, completion_tokens.into());
        let entry = Entry {
            request_id: &self.request_id,
            key: self.state.key_label(self.tenant),
            route: &self.route,
            model: served,
            asked_for: facts.asked.as_deref().unwrap_or(""),
            stream: facts.stream,
            status,
            finish_reason: if facts.failed { "error" } else { facts.finish.unwrap_or("") },
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            latency_ms: milliseconds(latency),
            first_token_ms: first_token.map(milliseconds),
            queue_ms: longest(|p| p.queue).map(milliseconds),
            from_cache: facts.replayed,
            prompt: facts.prompt.as_deref(),
        };
        if self.state.config().traces {
            telemetry::generation(&self.span, &entry);
        }
        self.state.book(&entry);
    }
}

/// Milliseconds to a thousandth.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}
