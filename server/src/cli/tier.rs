//! Flags of the tier: names, prices, limits, routers, accounts and traces.

use std::path::PathBuf;

use clap::Args;

/// How the server behaves as a tier behind routers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tier")]
pub struct TierArgs {
    /// Another name for a model, as NAME or NAME=MODEL, so that routers can send it unchanged; several: repeat or
    /// separate by commas. The answer says the model's own name.
    #[arg(long, env = "INGLE_ALIAS", value_delimiter = ',', value_name = "NAME[=MODEL]")]
    pub alias: Vec<String>,
    /// Let the answer to an alias repeat the alias.
    #[arg(long, env = "INGLE_ECHO_ALIAS", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub echo_alias: bool,
    /// Cost of 1000 tokens on the tier card [default: 0].
    #[arg(long, env = "INGLE_COST_PER_1K", conflicts_with_all = ["hourly_cost", "watts"])]
    pub cost_per_1k: Option<f64>,
    /// Cost of an hour of this machine; the card divides it by the measured tokens a second.
    #[arg(long, env = "INGLE_HOURLY_COST", conflicts_with = "watts")]
    pub hourly_cost: Option<f64>,
    /// Power this machine draws while it computes; with --price-per-kwh another way to say --hourly-cost.
    #[arg(long, env = "INGLE_WATTS", requires = "price_per_kwh")]
    pub watts: Option<f64>,
    /// Price of a kilowatt-hour.
    #[arg(long, env = "INGLE_PRICE_PER_KWH", requires = "watts")]
    pub price_per_kwh: Option<f64>,
    /// Seconds of the past on which latency, availability and speeds of the tier card rest.
    #[arg(long, env = "INGLE_TIER_WINDOW", default_value_t = 300)]
    pub tier_window: u64,
    /// Measure the model with one short request before it is served, so that the card has numbers from the start.
    #[arg(long, env = "INGLE_PROBE", num_args = 0..=1, default_value = "true", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub probe: bool,
    /// Prompt tokens that may wait at most; more are answered 429 [default: no bound but --max-num-queued-reqs].
    #[arg(long, env = "INGLE_MAX_NUM_QUEUED_TOKENS")]
    pub max_num_queued_tokens: Option<u64>,
    /// Requests that one API key may send in a minute [default: no limit].
    #[arg(long, env = "INGLE_KEY_REQUESTS_PER_MINUTE")]
    pub key_requests_per_minute: Option<u32>,
    /// Tokens, of prompts and answers, that one API key may use in a minute [default: no limit].
    #[arg(long, env = "INGLE_KEY_TOKENS_PER_MINUTE")]
    pub key_tokens_per_minute: Option<u32>,
    /// Register with this router when ready, and off before anything else at the end; several: repeat. One of
    /// smg+http://HOST:PORT, vllm-router+http://HOST:PORT, litellm+http://ADMIN_KEY@HOST:PORT, webhook+http://HOST/PATH.
    #[arg(long, env = "INGLE_REGISTER", value_delimiter = ',', hide_env_values = true, value_name = "URL")]
    pub register: Vec<String>,
    /// URL under which routers reach this server [default: the address it listens on].
    #[arg(long, env = "INGLE_ADVERTISE_URL", value_name = "URL")]
    pub advertise_url: Option<String>,
    /// Id of this server for routers; must be its own and outlive restarts [default: made from the address].
    #[arg(long, env = "INGLE_INSTANCE_ID")]
    pub instance_id: Option<String>,
    /// Seconds between heartbeats to a router, give or take a fifth.
    #[arg(long, env = "INGLE_HEARTBEAT_INTERVAL", default_value_t = 5.0)]
    pub heartbeat_interval: f64,
    /// Answer identical deterministic requests (temperature 0 or a seed) from a cache: memory, or redis://HOST:PORT.
    #[arg(long, env = "INGLE_RESPONSE_CACHE", hide_env_values = true, value_name = "memory|redis://...")]
    pub response_cache: Option<String>,
    /// Seconds an answer stays in the response cache.
    #[arg(long, env = "INGLE_RESPONSE_CACHE_TTL", default_value_t = 86_400)]
    pub response_cache_ttl: u64,
    /// Size of the response cache in memory, in MiB.
    #[arg(long, env = "INGLE_RESPONSE_CACHE_MIB", default_value_t = 64)]
    pub response_cache_mib: u64,
    /// Append a JSON line about every request to this file: who, when, which model, tokens, times, status.
    #[arg(long, env = "INGLE_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Put prompts into the audit log, too.
    #[arg(long, env = "INGLE_AUDIT_PROMPTS", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub audit_prompts: bool,
    /// Send traces (OTLP over HTTP) to this URL, such as http://127.0.0.1:4318/v1/traces.
    #[arg(long, env = "INGLE_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
}

/// `ingle register`
#[derive(Debug, Clone, Args)]
pub struct RegisterArgs {
    /// Routers, as for `ingle serve --register`.
    #[arg(required = true, value_name = "URL")]
    pub routers: Vec<String>,
    /// Ask each router whether it can be reached and knows the server; change nothing.
    #[arg(long, required = true)]
    pub check: bool,
    /// The server, as routers reach it.
    #[arg(long, env = "INGLE_ADVERTISE_URL", value_name = "URL")]
    pub advertise_url: Option<String>,
    /// The server's id, if it was given one.
    #[arg(long, env = "INGLE_INSTANCE_ID")]
    pub instance_id: Option<String>,
}
