//! The state's part of the tier: names and what they stand for, measures, accounts, registrations.

use std::{sync::Arc, time::Instant};

use ingle_engine::{Health, embed::EncoderTask};

use super::{AppConfig, AppState, EncoderModel, Generator, ModelCard, ModelName};
use crate::{
    accounts::{
        audit::{Audit, Entry},
        ledger::Ledger,
    },
    auth::Tenant,
    cache::ResponseCache,
    register::{RegisterConfig, RegistrationStatus, Registrations},
    tier::{Tier, admission::Load, card::ModelFacts, probe},
};

/// What is fixed about each model, by its own name.
pub(super) fn facts(
    config: &AppConfig,
    generator: Option<&Generator>,
    encoders: &[Arc<EncoderModel>],
) -> Vec<(String, ModelFacts)> {
    let of = |card: &ModelCard| ModelFacts {
        dtype: card.dtype.clone(),
        quantization: card.quantization.clone(),
        parameters: card.parameters,
        ..ModelFacts::default()
    };
    let generator = generator.map(|generator| {
        let context = generator.engine.limits().max_model_len;
        let facts = ModelFacts {
            task: if generator.text.template.is_some() { "chat" } else { "completion" },
            context,
            max_tokens: context.saturating_sub(1),
            capacity: generator.engine.config().max_num_seqs,
            ..of(&generator.card)
        };
        (config.served_names.first().cloned().unwrap_or_default(), facts)
    });
    let encoders = encoders.iter().map(|encoder| {
        let info = encoder.handle.info();
        let embeds = info.task == EncoderTask::Embed;
        let facts = ModelFacts {
            task: if embeds { "embeddings" } else { "rerank" },
            context: info.max_seq_len,
            dimensions: embeds.then_some(info.dimensions),
            capacity: 1,
            ..of(&encoder.card)
        };
        (encoder.name().to_owned(), facts)
    });
    generator.into_iter().chain(encoders).collect()
}

/// What an answer depends on besides the request.
pub(super) fn fingerprint(config: &AppConfig, generator: Option<&Generator>) -> String {
    let Some(Generator { engine, card, .. }) = generator else { return String::new() };
    format!(
        "{}\n{}\n{:?}\n{:?}\n{:?}\n{}\n{}",
        env!("CARGO_PKG_VERSION"),
        card.root,
        card.dtype,
        card.quantization,
        card.parameters,
        engine.limits().max_model_len,
        config.default_max_tokens,
    )
}

impl AppState {
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

    /// Registers with routers from now on.
    pub(crate) fn register(&self, config: &RegisterConfig, client: &reqwest::Client) {
        self.0.registrations.start(self, config, client);
    }

    /// The label of a tenant's key where keys are told apart in public.
    pub(crate) fn key_label(&self, tenant: Tenant) -> String {
        if tenant == Tenant::default() {
            return "none".to_owned();
        }
        let [a, b, c, d, ..] = tenant.0;
        format!("key-{a:02x}{b:02x}{c:02x}{d:02x}")
    }

    /// Books an ended request.
    pub(crate) fn book(&self, entry: &Entry<'_>) {
        let cost_per_1k = self.0.tier.cost_per_1k(Instant::now(), entry.model);
        self.0.ledger.book(entry, cost_per_1k);
        self.0.metrics.book(entry);
        if let Some(audit) = self.audit() {
            audit.write(entry);
        }
    }

    /// Notes how the models are.
    pub(crate) fn tick(&self) {
        let ready = matches!(self.health(), Health::Ready);
        let stats = self.generator().map(|generator| generator.engine.stats()).unwrap_or_default();
        self.0.tier.tick(Instant::now(), ready, stats);
    }

    /// What the generating model has to do.
    pub(crate) fn load(&self) -> Load {
        let queued_tokens = self.0.tier.backlog().tokens();
        let Some(generator) = self.generator() else { return Load { queued_tokens, ..Load::default() } };
        let stats = generator.engine.stats();
        Load {
            running: stats.running,
            waiting: stats.waiting,
            max_num_seqs: generator.engine.config().max_num_seqs,
            queued_tokens,
        }
    }

    /// What `name` stands for.
    pub(crate) fn resolve(&self, name: &str) -> Option<ModelName> {
        if let Some(served) = self.own_name(name) {
            return Some(ModelName { asked: name.to_owned(), served, answer: name.to_owned() });
        }
        let config = &self.0.config;
        let (alias, target) = config.aliases.iter().find(|(alias, _)| alias == name)?;
        let served = self.own_name(target)?;
        let answer = if config.echo_alias { alias } else { target };
        Some(ModelName { asked: name.to_owned(), served, answer: answer.clone() })
    }

    /// The own name of the model that is served as `name`.
    fn own_name(&self, name: &str) -> Option<String> {
        if self.0.config.served_names.iter().any(|served| served == name) {
            return Some(self.default_model().to_owned());
        }
        let encoder =
            self.encoders().iter().find(|encoder| encoder.names.iter().any(|known| known == name))?;
        Some(encoder.name().to_owned())
    }

    /// Every name that requests may use, with the model it stands for; aliases last.
    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let aliases = self.0.config.aliases.iter().map(|(alias, _)| alias.as_str());
        let names = self.served_names().into_iter().chain(aliases);
        names.filter_map(|name| Some((name.to_owned(), self.resolve(name)?.served))).collect()
    }

    /// All names, for the log.
    pub(crate) fn names_shown(&self) -> String {
        self.names().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
    }

    /// Measures the generating model with one short request. A probe that fails is only a card without numbers.
    pub(crate) async fn probe(&self) {
        let Some(generator) = self.generator() else { return };
        match probe::run(&generator.engine).await {
            Some(probed) => self.0.tier.probed(self.default_model(), probed),
            None => tracing::warn!("the probe was not answered; the tier card has no numbers yet"),
        }
    }
}
