//! What the handlers share: configuration, engine, text model, keys, metrics, and whether we are going down.
//!
//! [`AppState`] is cheap to clone. Build one with [`AppState::new`], make the router with [`crate::app`], and serve it
//! with [`crate::listen::serve`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ingle_engine::{EngineHandle, Limits};
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::{
        audit::{Audit, Entry},
        ledger::Ledger,
    },
    auth::{ApiKeys, Tenant},
    cache::{CacheConfig, ResponseCache},
    metrics::Metrics,
    register::{RegisterConfig, RegistrationStatus, Registrations},
    text::{ChatTemplate, TextLimits, TextPool, Tokenizer},
    tier::{Instance, Tier, TierConfig, card::ModelFacts, probe},
};

/// Settings of the HTTP side.
#[derive(Debug, Clone)]
pub struct AppConfig {
    /// Names the model answers to. The first is its own, the rest are aliases. At least one.
    pub served_names: Vec<String>,
    /// Other names: each with the served name it stands for.
    pub aliases: Vec<(String, String)>,
    /// Whether the answer to an alias names the alias; else it names the model that served it.
    pub echo_alias: bool,
    /// Prices, limits and windows of the tier.
    pub tier: TierConfig,
    /// Id of this instance for routers; `None`: a new one.
    pub instance_id: Option<String>,
    /// Where answers are kept to be given again; `None`: nowhere.
    pub response_cache: Option<CacheConfig>,
    /// Whether spans are described for OpenTelemetry.
    pub traces: bool,
    /// The audit log.
    pub audit: Option<Audit>,
    /// Keys of which a request must bring one; none: everybody may ask.
    pub api_keys: Vec<String>,
    /// Whether `/metrics` needs no key.
    pub open_metrics: bool,
    /// Whether `Host` and `Origin` must be local. Set it when bound to a loopback address; has no effect with keys.
    pub host_check: bool,
    /// Host names accepted besides the local ones, without port.
    pub allowed_hosts: Vec<String>,
    /// Origins of web pages that may ask (CORS); `*` is all. None: no CORS headers.
    pub cors_origins: Vec<String>,
    /// Bytes of a request body at most.
    pub max_body_bytes: usize,
    /// Answer tokens of a request that names no number; the context may leave fewer.
    pub default_max_tokens: u32,
    /// Stop strings of a request at most.
    pub max_stop: usize,
    /// Prompts of a completion request at most.
    pub max_prompts: usize,
    /// Messages of a chat request at most.
    pub max_messages: usize,
    /// Wall-clock time a request may take after it was accepted.
    pub request_timeout: Duration,
    /// Time a body may pause while it arrives.
    pub body_idle_timeout: Duration,
    /// Silence after which a stream carries a comment, so that no proxy closes it.
    pub sse_keep_alive: Duration,
}

impl Default for AppConfig {
    fn default() -> Self {
        Self {
            served_names: vec!["ingle".to_owned()],
            aliases: Vec::new(),
            echo_alias: false,
            tier: TierConfig::default(),
            instance_id: None,
            response_cache: None,
            traces: false,
            audit: None,
            api_keys: Vec::new(),
            open_metrics: true,
            host_check: false,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            max_body_bytes: 16 << 20,
            default_max_tokens: 4096,
            max_stop: 4,
            max_prompts: 256,
            max_messages: 8192,
            request_timeout: Duration::from_secs(3600),
            body_idle_timeout: Duration::from_secs(30),
            sse_keep_alive: Duration::from_secs(15),
        }
    }
}

/// Text side of the model.
pub struct TextModel {
    /// Text to token ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to prompt text; a model without one completes text but does not chat.
    pub template: Option<Arc<ChatTemplate>>,
}

/// What `/v1/models` says about the model.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// What was loaded: a hub id or the name of a folder, never a full path.
    pub root: String,
    /// Who is named as its owner.
    pub owned_by: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Type of the weights.
    pub dtype: Option<String>,
    /// How the weights were rounded, if they were.
    pub quantization: Option<String>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
}

/// What the name in a request stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelName {
    /// As the request says.
    pub(crate) asked: String,
    /// The model that serves it, by its own name.
    pub(crate) served: String,
    /// What the answer says.
    pub(crate) answer: String,
}

impl ModelCard {
    /// A card of `root`, created now.
    pub fn new(root: impl Into<String>) -> Self {
        Self {
            root: root.into(),
            owned_by: "ingle".to_owned(),
            created: unix_seconds(),
            dtype: None,
            quantization: None,
            parameters: None,
        }
    }
}

/// Shared by all handlers; clones are handles of the same thing.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

struct Inner {
    config: AppConfig,
    engine: EngineHandle,
    limits: Limits,
    text: Arc<TextModel>,
    pool: TextPool,
    card: ModelCard,
    keys: ApiKeys,
    metrics: Metrics,
    tier: Tier,
    ledger: Ledger,
    cache: Option<ResponseCache>,
    fingerprint: String,
    registrations: Registrations,
    draining: AtomicBool,
    cut: CancellationToken,
}

impl AppState {
    /// Puts the parts together. Keys are hashed here; their text is not kept.
    ///
    /// # Errors
    /// If the threads for text work cannot be started, or the address of the response cache is none.
    pub fn new(
        mut config: AppConfig,
        engine: EngineHandle,
        text: Arc<TextModel>,
        card: ModelCard,
    ) -> std::io::Result<Self> {
        if config.served_names.is_empty() {
            config.served_names.push(card.root.clone());
        }
        let keys = ApiKeys::new(std::mem::take(&mut config.api_keys));
        let limits = engine.limits().clone();
        let metrics =
            Metrics::new(config.served_names.first().map_or("", String::as_str), &limits, &engine.stats());
        let cache = config.response_cache.as_ref().map(ResponseCache::new).transpose();
        let cache = cache.map_err(|error| {
            let message = format!("--response-cache: {error}");
            std::io::Error::new(std::io::ErrorKind::InvalidInput, message)
        })?;
        let facts = ModelFacts {
            task: if text.template.is_some() { "chat" } else { "completion" },
            context: limits.max_model_len,
            max_tokens: limits.max_model_len.saturating_sub(1),
            dimensions: None,
            capacity: engine.config().max_num_seqs,
            dtype: card.dtype.clone(),
            quantization: card.quantization.clone(),
            parameters: card.parameters,
        };
        let main = config.served_names.first().cloned().unwrap_or_default();
        let tier =
            Tier::new(config.tier.clone(), Instance::new(config.instance_id.clone()), vec![(main, facts)]);
        let fingerprint = format!(
            "{}\n{}\n{:?}\n{:?}\n{:?}\n{}\n{}",
            env!("CARGO_PKG_VERSION"),
            card.root,
            card.dtype,
            card.quantization,
            card.parameters,
            limits.max_model_len,
            config.default_max_tokens,
        );
        let pool = TextPool::new(TextLimits { max_bytes: config.max_body_bytes, ..TextLimits::default() })?;
        Ok(Self(Arc::new(Inner {
            config,
            engine,
            limits,
            text,
            pool,
            card,
            keys,
            metrics,
            tier,
            ledger: Ledger::default(),
            cache,
            fingerprint,
            registrations: Registrations::default(),
            draining: AtomicBool::new(false),
            cut: CancellationToken::new(),
        })))
    }

    pub(crate) fn config(&self) -> &AppConfig {
        &self.0.config
    }

    /// The engine behind the routes.
    #[must_use]
    pub fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub(crate) fn text(&self) -> &Arc<TextModel> {
        &self.0.text
    }

    pub(crate) fn pool(&self) -> &TextPool {
        &self.0.pool
    }

    pub(crate) fn card(&self) -> &ModelCard {
        &self.0.card
    }

    pub(crate) fn keys(&self) -> &ApiKeys {
        &self.0.keys
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// What the tier measures and decides.
    #[must_use]
    pub fn tier(&self) -> &Tier {
        &self.0.tier
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    pub(crate) fn audit(&self) -> Option<&Audit> {
        self.0.config.audit.as_ref()
    }

    pub(crate) fn cache(&self) -> Option<&ResponseCache> {
        self.0.cache.as_ref()
    }

    /// What an answer depends on besides the request.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }

    /// The registrations, shared with the tasks that keep them.
    pub(crate) fn registry(&self) -> &Registrations {
        &self.0.registrations
    }

    /// How the registrations are.
    pub(crate) fn registrations(&self) -> Vec<RegistrationStatus> {
        self.0.registrations.statuses()
    }

    /// The label of a tenant's key where keys are told apart in public.
    pub(crate) fn key_label(&self, tenant: Tenant) -> String {
        match tenant.0 {
            [0, 0, 0, 0, ..] if tenant == Tenant::default() => "none".to_owned(),
            [a, b, c, d, ..] => format!("key-{a:02x}{b:02x}{c:02x}{d:02x}"),
        }
    }

    /// Books an ended request.
    pub(crate) fn book(&self, entry: &Entry<'_>) {
        let rate = self.0.tier.cost_per_1k(Instant::now()).unwrap_or(0.0);
        let tokens = u64::from(entry.prompt_tokens).saturating_add(entry.completion_tokens.into());
        let cost = tokens as f64 / 1000.0 * rate;
        self.0.ledger.book(entry, cost);
        self.0.metrics.book(entry);
        if let Some(audit) = self.audit() {
            audit.write(entry);
        }
    }

    /// What `name` stands for.
    pub(crate) fn resolve(&self, name: &str) -> Option<ModelName> {
        let config = &self.0.config;
        let main = self.default_model();
        if config.served_names.iter().any(|served| served == name) {
            let name = name.to_owned();
            return Some(ModelName { asked: name.clone(), served: main.to_owned(), answer: name });
        }
        let (alias, target) = config.aliases.iter().find(|(alias, _)| alias == name)?;
        let served = config.served_names.iter().find(|served| *served == target)?;
        let answer = if config.echo_alias { alias } else { served };
        Some(ModelName { asked: name.to_owned(), served: main.to_owned(), answer: answer.clone() })
    }

    /// Every name that requests may use, with the model it stands for.
    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let main = self.default_model();
        let config = &self.0.config;
        let aliases = config.aliases.iter().map(|(alias, _)| alias);
        config.served_names.iter().chain(aliases).map(|name| (name.clone(), main.to_owned())).collect()
    }

    /// Measures the model with one short request. A probe that fails is only a card without numbers.
    pub(crate) async fn probe(&self) {
        match probe::run(self.engine()).await {
            Some(probed) => self.0.tier.probed(self.default_model(), probed),
            None => tracing::warn!("the probe was not answered; the tier card has no numbers yet"),
        }
    }

    /// Registers with routers from now on.
    pub(crate) fn register(&self, config: &RegisterConfig, client: &reqwest::Client) {
        self.0.registrations.start(self, config, client);
    }

    /// All names, for the log.
    pub(crate) fn names_shown(&self) -> String {
        self.names().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
    }

    /// All names the model answers to.
    #[must_use]
    pub fn served_names(&self) -> &[String] {
        &self.0.config.served_names
    }

    /// The first served name.
    pub(crate) fn default_model(&self) -> &str {
        self.0.config.served_names.first().map_or("", String::as_str)
    }

    /// `/ready` says no from now on. Requests are still served: routers have yet to be told.
    pub(crate) fn announce_drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    /// Takes no new work from now on: `/ready` says so at once, and the engine refuses.
    pub fn start_drain(&self) {
        self.announce_drain();
        self.0.engine.drain();
    }

    /// Whether [`AppState::start_drain`] was called.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// Ends what still runs: streams with an error event, other requests with a 503.
    pub fn cut_requests(&self) {
        self.0.cut.cancel();
    }

    /// Done once [`AppState::cut_requests`] was called.
    pub(crate) fn cut(&self) -> &CancellationToken {
        &self.0.cut
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
