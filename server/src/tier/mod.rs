//! What this server says about itself to routers, and how it decides what it takes.
//!
//! Everything on the card is measured: by a short probe at the start (`probe.rs`), then by real requests and by the
//! engine's progress over sliding windows (`window.rs`). Nothing is made up; what is not known is null.
//! `admission.rs` predicts and bounds, `rate.rs` limits keys, `cost.rs` knows money, `card.rs` is the wire form.

pub mod admission;
pub mod card;
pub mod cost;
pub(crate) mod probe;
pub mod rate;
pub mod window;

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ingle_engine::EngineStats;

use crate::auth::Tenant;
use admission::{Backlog, Pace};
use card::{Measured, ModelFacts, Speed, TierCard};
use cost::Cost;
use rate::{Exceeded, KeyLimits, RateLimiter};
use window::{Counts, Samples};

/// The tier's name on the card.
pub const LOCAL: &str = "local";
/// How often the engine's progress is noted.
pub(crate) const TICK: Duration = Duration::from_millis(250);
/// The engine's pace is of this time at most: admission must notice a change of load soon.
const PACE_WINDOW: Duration = Duration::from_secs(60);
/// A prompt of fewer tokens tells the overhead of a step and not the speed of prefill.
const MIN_PREFILL: u32 = 16;

/// Settings of the tier.
#[derive(Debug, Clone)]
pub struct TierConfig {
    /// Length of the windows.
    pub window: Duration,
    /// What tokens cost.
    pub cost: Cost,
    /// What one key may use.
    pub key_limits: KeyLimits,
    /// Prompt tokens that may wait; `None`: no bound but that of requests.
    pub max_queued_tokens: Option<u64>,
}

impl Default for TierConfig {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(300),
            cost: Cost::default(),
            key_limits: KeyLimits::default(),
            max_queued_tokens: None,
        }
    }
}

/// Who this process is to routers.
#[derive(Debug, Clone)]
pub struct Instance {
    /// The same for the life of the process, or as given with `--instance-id`.
    pub id: String,
    /// Seconds since 1970 at the start: of two instances of one id the later one counts.
    pub epoch: u64,
}

impl Instance {
    /// An instance that starts now.
    #[must_use]
    pub fn new(id: Option<String>) -> Self {
        let id = id.unwrap_or_else(|| format!("ingle-{}", uuid::Uuid::new_v4().simple()));
        Self { id, epoch: crate::state::unix_seconds() }
    }
}

/// How a request went, as the tier sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It was served.
    Served,
    /// It was not, and it is our doing: overload, drain, a failure.
    Failed,
    /// It says nothing about us: a wrong request, a client that went away, a key over its limit.
    NotOurs,
}

/// The measures of one ended request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Observation {
    pub(crate) verdict: Verdict,
    pub(crate) latency: Duration,
    pub(crate) first_token: Option<Duration>,
    /// Prompt tokens that were computed, and in what time.
    pub(crate) computed: u32,
    pub(crate) prefill: Duration,
    /// Answer tokens, and the time from the first to the last.
    pub(crate) completion: u32,
    pub(crate) decode: Duration,
    /// The answer came from the response cache: it says nothing of speeds.
    pub(crate) replayed: bool,
}

/// What was measured of one model.
#[derive(Debug)]
struct ModelWindow {
    facts: ModelFacts,
    latency: Samples,
    first_token: Samples,
    prefill: Samples,
    decode: Samples,
    embedding: Samples,
    verdicts: Counts<2>,
    probe: Option<probe::Probed>,
}

impl ModelWindow {
    fn new(facts: ModelFacts, length: Duration) -> Self {
        Self {
            facts,
            latency: Samples::new(length),
            first_token: Samples::new(length),
            prefill: Samples::new(length),
            decode: Samples::new(length),
            embedding: Samples::new(length),
            verdicts: Counts::new(length),
            probe: None,
        }
    }

    fn observe(&mut self, now: Instant, seen: &Observation) {
        match seen.verdict {
            Verdict::Served => self.verdicts.add(now, 0, 1.0),
            Verdict::Failed => return self.verdicts.add(now, 1, 1.0),
            Verdict::NotOurs => return,
        }
        self.latency.push(now, seen.latency.as_secs_f64() * 1e3);
        if seen.replayed {
            return;
        }
        if let Some(first_token) = seen.first_token {
            self.first_token.push(now, first_token.as_secs_f64() * 1e3);
        }
        let rate = |tokens: u32, time: Duration| f64::from(tokens) / time.as_secs_f64();
        if self.facts.max_tokens == 0 {
            if !seen.prefill.is_zero() && seen.computed > 0 {
                self.embedding.push(now, rate(seen.computed, seen.prefill));
            }
            return;
        }
        if seen.computed >= MIN_PREFILL && !seen.prefill.is_zero() {
            self.prefill.push(now, rate(seen.computed, seen.prefill));
        }
        if seen.completion > 1 && !seen.decode.is_zero() {
            self.decode.push(now, rate(seen.completion - 1, seen.decode));
        }
    }
}

/// The engine's progress.
#[derive(Debug)]
struct EngineWindow {
    last: Option<EngineStats>,
    /// Looks that found it ready, and all.
    looks: Counts<2>,
    /// Seconds computed, tokens, completed sequences.
    work: Counts<3>,
}

impl EngineWindow {
    fn tick(&mut self, now: Instant, ready: bool, stats: EngineStats) {
        self.looks.add(now, 0, f64::from(u8::from(ready)));
        self.looks.add(now, 1, 1.0);
        if let Some(last) = self.last.replace(stats) {
            let tokens = |stats: &EngineStats| stats.prompt_tokens.saturating_add(stats.generation_tokens);
            let done = |stats: &EngineStats| stats.finished_stop.saturating_add(stats.finished_length);
            self.work.add(now, 0, stats.busy_seconds - last.busy_seconds);
            self.work.add(now, 1, tokens(&stats).saturating_sub(tokens(&last)) as f64);
            self.work.add(now, 2, done(&stats).saturating_sub(done(&last)) as f64);
        }
    }

    /// Tokens and completions per second of computing.
    fn rates(&mut self, now: Instant) -> (Option<f64>, Option<f64>) {
        let [busy, tokens, done] = self.work.sums(now);
        let rate = |amount: f64| (busy > 0.0 && amount > 0.0).then(|| amount / busy);
        (rate(tokens), rate(done))
    }
}

/// The tier's measures and decisions. Locks are held for a few instructions, never while anything is waited for.
pub struct Tier {
    config: TierConfig,
    instance: Instance,
    backlog: Backlog,
    limiter: Mutex<RateLimiter>,
    engine: Mutex<EngineWindow>,
    models: HashMap<String, Mutex<ModelWindow>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is a set of plain numbers: a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tier {
    /// Nothing measured yet. `models` are the names that are not aliases.
    #[must_use]
    pub fn new(config: TierConfig, instance: Instance, models: Vec<(String, ModelFacts)>) -> Self {
        let length = config.window;
        Self {
            instance,
            backlog: Backlog::default(),
            limiter: Mutex::new(RateLimiter::new(config.key_limits)),
            engine: Mutex::new(EngineWindow {
                last: None,
                looks: Counts::new(length),
                work: Counts::new(length.min(PACE_WINDOW)),
            }),
            models: models
                .into_iter()
                .map(|(name, facts)| (name, Mutex::new(ModelWindow::new(facts, length))))
                .collect(),
            config,
        }
    }

    pub(crate) fn config(&self) -> &TierConfig {
        &self.config
    }

    /// Who we are.
    #[must_use]
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    pub(crate) fn backlog(&self) -> &Backlog {
        &self.backlog
    }

    /// Notes how the models are.
    pub(crate) fn tick(&self, now: Instant, ready: bool, stats: EngineStats) {
        lock(&self.engine).tick(now, ready, stats);
    }

    pub(crate) fn observe(&self, now: Instant, model: &str, seen: &Observation) {
        if let Some(window) = self.models.get(model) {
            lock(window).observe(now, seen);
        }
    }

    pub(crate) fn probed(&self, model: &str, probed: probe::Probed) {
        if let Some(window) = self.models.get(model) {
            lock(window).probe = Some(probed);
        }
    }

    pub(crate) fn admit_key(&self, now: Instant, tenant: Tenant, tokens: u64) -> Result<(), Exceeded> {
        lock(&self.limiter).admit(now, tenant, tokens)
    }

    pub(crate) fn refund(&self, now: Instant, tenant: Tenant, tokens: u64) {
        lock(&self.limiter).refund(now, tenant, tokens);
    }

    pub(crate) fn spend(&self, now: Instant, tenant: Tenant, tokens: u64) {
        lock(&self.limiter).spend(now, tenant, tokens);
    }

    /// How fast `model` gets on.
    pub(crate) fn pace(&self, now: Instant, model: &str) -> Pace {
        let (_, completions_per_second) = lock(&self.engine).rates(now);
        let prefill_tokens_per_second = self.models.get(model).and_then(|window| {
            let mut window = lock(window);
            let probe = window.probe.and_then(|probe| probe.prefill_tokens_per_second);
            window.prefill.quantile(now, 0.5).or(probe)
        });
        Pace { prefill_tokens_per_second, completions_per_second }
    }

    /// The share of looks at the engine that found it ready times the share of requests that were served.
    fn availability(&self, now: Instant, window: &mut ModelWindow) -> Option<f64> {
        let [ready, looks] = lock(&self.engine).looks.sums(now);
        let [served, failed] = window.verdicts.sums(now);
        let of_requests = if served + failed > 0.0 { served / (served + failed) } else { 1.0 };
        (looks > 0.0).then(|| ready / looks * of_requests)
    }

    /// The cost of a thousand tokens of `model` now, where it is known.
    pub(crate) fn cost_per_1k(&self, now: Instant, model: &str) -> Option<f64> {
        let (rate, _) = lock(&self.engine).rates(now);
        let probed = || lock(self.models.get(model)?).probe?.tokens_per_second;
        self.config.cost.per_thousand(rate.or_else(probed))
    }

    /// The card of `model` under `name`; `None` for a model that is not served.
    pub(crate) fn card(&self, now: Instant, model: &str, name: &str) -> Option<TierCard> {
        let (tokens_per_busy_second, _) = lock(&self.engine).rates(now);
        let mut window = lock(self.models.get(model)?);
        let availability = self.availability(now, &mut window);
        let requests = window.latency.len(now);
        let probe = window.probe.unwrap_or_default();
        let tokens_per_busy_second = tokens_per_busy_second.or(probe.tokens_per_second);
        let latency_p95 = window.latency.quantile(now, 0.95).or(probe.latency_ms);
        let speed = Speed {
            prefill_tokens_per_second: window.prefill.quantile(now, 0.5).or(probe.prefill_tokens_per_second),
            decode_tokens_per_second: window.decode.quantile(now, 0.5).or(probe.decode_tokens_per_second),
            embedding_tokens_per_second: window.embedding.quantile(now, 0.5),
            first_token_p95: window.first_token.quantile(now, 0.95).or(probe.first_token_ms),
            tokens_per_busy_second,
        };
        let source = match (requests, probe.latency_ms) {
            (1.., _) => Some("requests"),
            (0, Some(_)) => Some("probe"),
            (0, None) => None,
        };
        let facts = window.facts.clone();
        Some(TierCard {
            name: name.to_owned(),
            tier: LOCAL,
            cost_per_1k: self.config.cost.per_thousand(tokens_per_busy_second),
            max_tokens: facts.max_tokens,
            latency_p95,
            availability,
            context: facts.context,
            task: facts.task,
            dimensions: facts.dimensions,
            capacity: facts.capacity,
            dtype: facts.dtype,
            quantization: facts.quantization,
            parameters: facts.parameters,
            speed,
            measured: Measured { source, requests, window_seconds: self.config.window.as_secs() },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn tier(cost: Cost) -> Tier {
        let facts = ModelFacts { task: "chat", max_tokens: 64, context: 128, ..ModelFacts::default() };
        let config = TierConfig { window: 10 * SECOND, cost, ..TierConfig::default() };
        Tier::new(config, Instance::new(Some("i".into())), vec![("m".into(), facts)])
    }

    fn served(latency_ms: u64) -> Observation {
        Observation {
            verdict: Verdict::Served,
            latency: Duration::from_millis(latency_ms),
            first_token: Some(Duration::from_millis(latency_ms / 2)),
            computed: 100,
            prefill: SECOND / 10,
            completion: 11,
            decode: SECOND,
            replayed: false,
        }
    }

    #[test]
    fn nothing_is_known_at_first() {
        let (tier, now) = (tier(Cost::PerHour(1.0)), Instant::now());
        let card = tier.card(now, "m", "alias").expect("a card");
        assert_eq!((card.name.as_str(), card.latency_p95, card.availability), ("alias", None, None));
        assert_eq!((card.cost_per_1k, card.measured.source), (None, None));
        assert!(tier.card(now, "other", "other").is_none());
    }

    #[test]
    fn requests_replace_the_probe_and_are_forgotten() {
        let (tier, start) = (tier(Cost::PerThousand(0.5)), Instant::now());
        tier.probed("m", probe::Probed { latency_ms: Some(7.0), ..probe::Probed::default() });
        let card = tier.card(start, "m", "m").expect("a card");
        assert_eq!((card.latency_p95, card.measured.source), (Some(7.0), Some("probe")));
        for latency in 1..=20 {
            tier.observe(start, "m", &served(latency * 100));
        }
        tier.observe(start, "m", &Observation { verdict: Verdict::NotOurs, ..served(9_999_999) });
        let card = tier.card(start + SECOND, "m", "m").expect("a card");
        assert_eq!((card.latency_p95, card.measured.source), (Some(1900.0), Some("requests")));
        assert_eq!(card.speed.prefill_tokens_per_second, Some(1000.0));
        assert_eq!(card.speed.decode_tokens_per_second, Some(10.0));
        assert_eq!(card.cost_per_1k, Some(0.5));
        let card = tier.card(start + 20 * SECOND, "m", "m").expect("a card");
        assert_eq!((card.latency_p95, card.measured.source), (Some(7.0), Some("probe")));
    }

    #[test]
    fn until_the_engine_has_counted_the_probe_tells_the_cost() {
        let (tier, now) = (tier(Cost::PerHour(3.6)), Instant::now());
        assert_eq!(tier.cost_per_1k(now, "m"), None);
        tier.probed("m", probe::Probed { tokens_per_second: Some(100.0), ..probe::Probed::default() });
        assert_eq!(tier.cost_per_1k(now, "m"), Some(0.01));
        assert_eq!(tier.cost_per_1k(now, "m"), tier.card(now, "m", "m").expect("a card").cost_per_1k);
        assert_eq!(tier.cost_per_1k(now, "other"), None);
    }

    fn stats(busy_seconds: f64, tokens: u64, done: u64) -> EngineStats {
        EngineStats {
            busy_seconds,
            generation_tokens: tokens,
            finished_length: done,
            ..EngineStats::default()
        }
    }

    #[test]
    fn availability_is_of_the_engine_and_of_the_requests() {
        let (tier, start) = (tier(Cost::PerHour(3.6)), Instant::now());
        for (step, ready) in [true, true, true, false].into_iter().enumerate() {
            let step = step as u32;
            let stats = stats(f64::from(step) / 2.0, u64::from(step) * 50, u64::from(step));
            lock(&tier.engine).tick(start + step * SECOND, ready, stats);
        }
        let now = start + 4 * SECOND;
        assert_eq!(tier.card(now, "m", "m").expect("a card").availability, Some(0.75));
        tier.observe(now, "m", &served(1));
        tier.observe(now, "m", &Observation { verdict: Verdict::Failed, ..served(1) });
        let card = tier.card(now, "m", "m").expect("a card");
        assert_eq!(card.availability, Some(0.375));
        assert_eq!(card.measured.requests, 1, "what failed has no latency");
        // 150 tokens and 3 requests in 1.5 s of computing, though 3 s went by.
        assert_eq!(card.speed.tokens_per_busy_second, Some(100.0));
        assert_eq!(card.cost_per_1k, Some(0.01));
        assert_eq!(tier.pace(now, "m").completions_per_second, Some(2.0));
    }
}
