//! What the handlers share: configuration, engine, text model, keys, metrics, and whether we are going down.
//!
//! [`AppState`] is cheap to clone. Build one with [`AppState::new`], make the router with [`crate::app`], and serve it
//! with [`crate::listen::serve`].

mod tier;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ingle_engine::embed::{EncoderHandle, EncoderTask};
use ingle_engine::{ComputeArbiter, EngineHandle, EngineStats, Health, Limits};
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::{audit::Audit, ledger::Ledger},
    auth::ApiKeys,
    cache::{CacheConfig, ResponseCache},
    metrics::Metrics,
    register::Registrations,
    text::{ChatTemplate, TextLimits, TextPool, Tokenizer},
    tier::{Instance, Tier, TierConfig},
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
    /// Inputs or documents of a request to an encoder at most.
    pub max_inputs: usize,
    /// Inputs of encoders that are too long are cut unless the request says otherwise.
    pub auto_truncate: bool,
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
            max_inputs: 2048,
            auto_truncate: false,
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

/// The model that generates.
pub struct Generator {
    /// Its engine.
    pub engine: EngineHandle,
    /// Its text side.
    pub text: Arc<TextModel>,
    /// What `/v1/models` says about it.
    pub card: ModelCard,
}

/// An embedding model or a reranker.
pub struct EncoderModel {
    /// Names it answers to. At least one.
    pub names: Vec<String>,
    /// Its thread.
    pub handle: EncoderHandle,
    /// Text to token ids.
    pub tokenizer: Arc<Tokenizer>,
    /// Widths below its own, ascending, that its embeddings may be cut to.
    pub widths: Vec<usize>,
    /// What `/v1/models` says about it.
    pub card: ModelCard,
}

impl EncoderModel {
    /// What it is for.
    #[must_use]
    pub fn task(&self) -> EncoderTask {
        self.handle.info().task
    }

    /// Its first name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

/// All models of a server.
#[derive(Default)]
pub struct Models {
    /// The one that generates, if there is one.
    pub generator: Option<Generator>,
    /// Those that encode; the first of a task is that task's default.
    pub encoders: Vec<EncoderModel>,
    /// Shares the processors among them, if there are several.
    pub arbiter: Option<ComputeArbiter>,
}

/// Which of the models an address serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum View {
    /// All.
    #[default]
    All,
    /// Those that encode.
    Encoders,
    /// Those that embed.
    Embedders,
    /// Those that rank.
    Rerankers,
}

impl View {
    /// Each of them.
    pub(crate) const ALL: [Self; 4] = [Self::All, Self::Encoders, Self::Embedders, Self::Rerankers];

    /// Whether models that do `task` are among them.
    pub(crate) fn shows(self, task: EncoderTask) -> bool {
        match self {
            Self::All | Self::Encoders => true,
            Self::Embedders => task == EncoderTask::Embed,
            Self::Rerankers => task == EncoderTask::Rerank,
        }
    }
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
    /// Bytes of the weights, for the metrics.
    pub weight_bytes: Option<u64>,
    /// Bytes that cached keys and values may take, for the metrics.
    pub kv_cache_bytes: Option<u64>,
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
            weight_bytes: None,
            kv_cache_bytes: None,
        }
    }
}

/// Shared by all handlers; clones are handles of the same thing.
#[derive(Clone)]
pub struct AppState(Arc<Inner>, View);

struct Inner {
    config: AppConfig,
    generator: Option<Generator>,
    limits: Limits,
    encoders: Vec<Arc<EncoderModel>>,
    arbiter: Option<ComputeArbiter>,
    pool: TextPool,
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
    /// A server of one generating model.
    ///
    /// # Errors
    /// As [`AppState::with_models`].
    pub fn new(
        config: AppConfig,
        engine: EngineHandle,
        text: Arc<TextModel>,
        card: ModelCard,
    ) -> std::io::Result<Self> {
        Self::with_models(
            config,
            Models { generator: Some(Generator { engine, text, card }), ..Models::default() },
        )
    }

    /// Puts the parts together. Keys are hashed here; their text is not kept.
    ///
    /// # Errors
    /// If the threads for text work cannot be started, or the address of the response cache is none.
    pub fn with_models(mut config: AppConfig, models: Models) -> std::io::Result<Self> {
        let Models { generator, encoders, arbiter } = models;
        let mut limits =
            Limits { vocab_size: 0, max_model_len: 0, max_n: 0, max_logprobs: 0, max_token_list: 0 };
        let mut stats = EngineStats::default();
        match &generator {
            Some(generator) => {
                if config.served_names.is_empty() {
                    config.served_names.push(generator.card.root.clone());
                }
                limits = generator.engine.limits().clone();
                stats = generator.engine.stats();
            }
            None => config.served_names.clear(),
        }
        let keys = ApiKeys::new(std::mem::take(&mut config.api_keys));
        let encoders: Vec<Arc<EncoderModel>> = encoders.into_iter().map(Arc::new).collect();
        let first = config.served_names.first().map(String::as_str);
        let name = first.or_else(|| encoders.first().map(|encoder| encoder.name())).unwrap_or("");
        let metrics = Metrics::new(name, &limits, &stats).with_encoders(&encoders, arbiter.is_some());
        if let Some(generator) = &generator {
            metrics.memory(name, &generator.card);
        }
        let cache = config.response_cache.as_ref().map(ResponseCache::new).transpose();
        let cache = cache.map_err(|error| {
            let message = format!("--response-cache: {error}");
            std::io::Error::new(std::io::ErrorKind::InvalidInput, message)
        })?;
        let facts = tier::facts(&config, generator.as_ref(), &encoders);
        let tier = Tier::new(config.tier.clone(), Instance::new(config.instance_id.clone()), facts);
        let fingerprint = tier::fingerprint(&config, generator.as_ref());
        let pool = TextPool::new(TextLimits { max_bytes: config.max_body_bytes, ..TextLimits::default() })?;
        let inner = Inner {
            config,
            generator,
            limits,
            encoders,
            arbiter,
            pool,
            keys,
            metrics,
            tier,
            ledger: Ledger::default(),
            cache,
            fingerprint,
            registrations: Registrations::default(),
            draining: AtomicBool::new(false),
            cut: CancellationToken::new(),
        };
        Ok(Self(Arc::new(inner), View::default()))
    }

    /// The same, as an address of `view` sees it.
    pub(crate) fn with_view(&self, view: View) -> Self {
        Self(Arc::clone(&self.0), view)
    }

    /// Which models the address serves that was asked.
    pub(crate) fn view(&self) -> View {
        self.1
    }

    /// Whether the address serves a model that generates.
    pub(crate) fn generates(&self) -> bool {
        self.0.generator.is_some() && self.1 == View::All
    }

    /// The models that encode and that the address serves.
    pub(crate) fn shown(&self) -> impl Iterator<Item = &Arc<EncoderModel>> {
        let view = self.1;
        self.0.encoders.iter().filter(move |encoder| view.shows(encoder.task()))
    }

    pub(crate) fn config(&self) -> &AppConfig {
        &self.0.config
    }

    /// The model that generates, if there is one.
    #[must_use]
    pub fn generator(&self) -> Option<&Generator> {
        self.0.generator.as_ref()
    }

    /// The generating model behind a route that is only built where there is one (see `http::build`).
    fn generating(&self) -> &Generator {
        self.0.generator.as_ref().expect("routes that generate are only built for a model that does")
    }

    /// The engine behind the routes that generate.
    ///
    /// # Panics
    /// If no model generates; see [`AppState::generator`].
    #[must_use]
    pub fn engine(&self) -> &EngineHandle {
        &self.generating().engine
    }

    /// The models that encode.
    #[must_use]
    pub fn encoders(&self) -> &[Arc<EncoderModel>] {
        &self.0.encoders
    }

    pub(crate) fn arbiter(&self) -> Option<&ComputeArbiter> {
        self.0.arbiter.as_ref()
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub(crate) fn text(&self) -> &Arc<TextModel> {
        &self.generating().text
    }

    /// How the models are: as the one that is worst.
    #[must_use]
    pub fn health(&self) -> Health {
        let generator = self.0.generator.iter().map(|generator| generator.engine.health());
        let encoders = self.0.encoders.iter().map(|encoder| encoder.handle.health());
        let rank = |health: &Health| match health {
            Health::Ready => 0,
            Health::Draining => 1,
            Health::Stalled { .. } => 2,
            Health::Dead => 3,
        };
        generator.chain(encoders).max_by_key(rank).unwrap_or(Health::Ready)
    }

    pub(crate) fn pool(&self) -> &TextPool {
        &self.0.pool
    }

    pub(crate) fn keys(&self) -> &ApiKeys {
        &self.0.keys
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// All names that models answer to, those of the generating model first.
    #[must_use]
    pub fn served_names(&self) -> Vec<&str> {
        let encoders = self.0.encoders.iter().flat_map(|encoder| &encoder.names);
        self.0.config.served_names.iter().chain(encoders).map(String::as_str).collect()
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
        if let Some(generator) = &self.0.generator {
            generator.engine.drain();
        }
        self.0.encoders.iter().for_each(|encoder| encoder.handle.drain());
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
