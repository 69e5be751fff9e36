//! What the handlers share: configuration, engine, text model, keys, metrics, and whether we are going down.
//!
//! [`AppState`] is cheap to clone. Build one with [`AppState::new`], make the router with [`crate::app`], and serve it
//! with [`crate::listen::serve`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ingle_engine::{EngineHandle, Limits};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::ApiKeys,
    metrics::Metrics,
    text::{ChatTemplate, TextLimits, TextPool, Tokenizer},
};

/// Settings of the HTTP side.
#[derive(Debug, Clone)]
pub struct AppConfig {
    /// Names the model answers to. The first is its own, the rest are aliases. At least one.
    pub served_names: Vec<String>,
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
}

impl ModelCard {
    /// A card of `root`, created now.
    pub fn new(root: impl Into<String>) -> Self {
        Self { root: root.into(), owned_by: "ingle".to_owned(), created: unix_seconds() }
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
    draining: AtomicBool,
    cut: CancellationToken,
}

impl AppState {
    /// Puts the parts together. Keys are hashed here; their text is not kept.
    ///
    /// # Errors
    /// If the threads for text work cannot be started.
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

    /// All names the model answers to.
    #[must_use]
    pub fn served_names(&self) -> &[String] {
        &self.0.config.served_names
    }

    /// The first served name.
    pub(crate) fn default_model(&self) -> &str {
        self.0.config.served_names.first().map_or("", String::as_str)
    }

    /// Takes no new work from now on: `/ready` says so at once, and the engine refuses.
    pub fn start_drain(&self) {
        self.0.draining.store(true, Ordering::Release);
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
