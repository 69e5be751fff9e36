//! `GET /tier`: what a router has to know about this server; `GET /usage`: what the caller's key used.

use std::time::Instant;

use axum::{Extension, Json, extract::State};
use ingle_engine::Health;
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    accounts::ledger::UsageTotals,
    auth::Tenant,
    register::RegistrationStatus,
    state::AppState,
    tier::{LOCAL, card::TierCard},
};

/// The tier.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TierBody {
    /// `tier`
    pub object: &'static str,
    /// `local`
    pub tier: &'static str,
    /// Id of this instance.
    pub instance_id: String,
    /// Seconds since 1970 at its start: of two with one id the later one counts.
    pub epoch: u64,
    /// Version of the server.
    pub version: &'static str,
    /// Whether requests are served.
    pub ready: bool,
    /// Whether the server is going down.
    pub draining: bool,
    /// What there is to do now.
    pub load: LoadBody,
    /// A card for each name, aliases included.
    pub models: Vec<TierCard>,
    /// Where this server is registered.
    pub registrations: Vec<RegistrationStatus>,
}

/// What there is to do now.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct LoadBody {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that may run at once.
    pub max_num_seqs: usize,
    /// Prompt tokens that wait for their first answer token.
    pub queued_tokens: u64,
    /// Share of the key/value cache in use, 0 to 1.
    pub kv_cache_usage: f64,
}

/// Who used what.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageList {
    /// `list`
    pub object: &'static str,
    /// Rows per model; of the caller's key, or of everybody where no key is asked for.
    pub data: Vec<UsageTotals>,
}

/// What is said now.
pub(crate) fn body(state: &AppState) -> TierBody {
    let now = Instant::now();
    let tier = state.tier();
    let load = state.load();
    let models =
        state.names().into_iter().filter_map(|(name, model)| tier.card(now, &model, &name)).collect();
    TierBody {
        object: "tier",
        tier: LOCAL,
        instance_id: tier.instance().id.clone(),
        epoch: tier.instance().epoch,
        version: env!("CARGO_PKG_VERSION"),
        ready: !state.is_draining() && matches!(state.health(), Health::Ready),
        draining: state.is_draining(),
        load: LoadBody {
            running: load.running,
            waiting: load.waiting,
            max_num_seqs: load.max_num_seqs,
            queued_tokens: load.queued_tokens,
            kv_cache_usage: state
                .generator()
                .map_or(0.0, |generator| generator.engine.stats().kv_cache_usage()),
        },
        models,
        registrations: state.registrations(),
    }
}

/// Describes this server to routers.
#[utoipa::path(get, path = "/tier", tag = "server",
    responses((status = 200, description = "The tier.", body = TierBody)))]
pub(crate) async fn tier(State(state): State<AppState>) -> Json<TierBody> {
    Json(body(&state))
}

/// Tells what the caller's key used since the start.
#[utoipa::path(get, path = "/usage", tag = "server",
    responses((status = 200, description = "Totals.", body = UsageList)))]
pub(crate) async fn usage(
    State(state): State<AppState>,
    Extension(tenant): Extension<Tenant>,
) -> Json<UsageList> {
    let label = state.key_label(tenant);
    let own = (!state.keys().is_empty()).then_some(label.as_str());
    Json(UsageList { object: "list", data: state.ledger().rows(own) })
}
