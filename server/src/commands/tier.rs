//! From flags to the settings of the tier. What cannot be used is found here, before the model is loaded.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{
    accounts::audit::Audit,
    cache::{CacheConfig, CachePlace},
    cli::{ServeArgs, TierArgs},
    register::{RegisterConfig, Target},
    state::AppConfig,
    tier::{TierConfig, cost::Cost, rate::KeyLimits},
};
use tracing_appender::non_blocking::WorkerGuard;

/// The longest window, in seconds: a day.
const MAX_WINDOW: u64 = 86_400;

/// What the flags say.
pub(super) struct TierSettings {
    tier: TierConfig,
    /// Names and what they stand for; nothing: the first served name.
    aliases: Vec<(String, Option<String>)>,
    cache: Option<CacheConfig>,
    audit: Option<Audit>,
    instance_id: String,
    /// Routers to register with; none without any.
    pub(super) register: Option<RegisterConfig>,
    /// Flushes the audit log when dropped.
    pub(super) audit_guard: Option<WorkerGuard>,
}

impl TierSettings {
    /// Reads the flags of a server that listens at `place`, an URL or a path.
    pub(super) fn read(args: &ServeArgs, place: &str) -> anyhow::Result<Self> {
        let tier = &args.tier;
        ensure!(
            (1..=MAX_WINDOW).contains(&tier.tier_window),
            "--tier-window must be 1 to {MAX_WINDOW} seconds"
        );
        let (audit, audit_guard) = match &tier.audit_log {
            None => (None, None),
            Some(path) => {
                let (audit, guard) = Audit::open(path, tier.audit_prompts)
                    .with_context(|| format!("--audit-log {} cannot be written", path.display()))?;
                (Some(audit), Some(guard))
            }
        };
        Ok(Self {
            tier: TierConfig {
                window: Duration::from_secs(tier.tier_window),
                cost: cost(tier)?,
                key_limits: KeyLimits {
                    requests_per_minute: tier.key_requests_per_minute,
                    tokens_per_minute: tier.key_tokens_per_minute,
                },
                max_queued_tokens: tier.max_num_queued_tokens,
            },
            aliases: aliases(tier)?,
            cache: cache(tier)?,
            audit,
            instance_id: tier
                .instance_id
                .clone()
                .unwrap_or_else(|| default_instance(advertised(args, place))),
            register: register(args, place)?,
            audit_guard,
        })
    }

    /// Puts them into the settings of the application. `names` are those that models are served under.
    pub(super) fn apply(&self, config: &mut AppConfig, names: &[String]) -> anyhow::Result<()> {
        for (alias, target) in &self.aliases {
            let target = match target {
                None => names.first().cloned().unwrap_or_default(),
                Some(target) if names.contains(target) => target.clone(),
                Some(target) => bail!(
                    "--alias {alias}={target}: no model is served as {target} (served: {})",
                    names.join(", ")
                ),
            };
            if names.contains(alias) {
                bail!("--alias {alias}: a model is served under that name");
            }
            config.aliases.push((alias.clone(), target));
        }
        config.tier = self.tier.clone();
        config.response_cache = self.cache.clone();
        config.audit = self.audit.clone();
        config.instance_id = Some(self.instance_id.clone());
        Ok(())
    }
}

fn cost(args: &TierArgs) -> anyhow::Result<Cost> {
    let money = |flag: &str, value: f64| {
        ensure!(value.is_finite() && value >= 0.0, "{flag} must be a number from 0 on");
        Ok(value)
    };
    Ok(match (args.cost_per_1k, args.hourly_cost, args.watts, args.price_per_kwh) {
        (Some(cost), ..) => Cost::PerThousand(money("--cost-per-1k", cost)?),
        (_, Some(cost), ..) => Cost::PerHour(money("--hourly-cost", cost)?),
        (_, _, Some(watts), Some(price)) => {
            Cost::of_power(money("--watts", watts)?, money("--price-per-kwh", price)?)
        }
        _ => Cost::default(),
    })
}

fn aliases(args: &TierArgs) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut aliases: Vec<(String, Option<String>)> = Vec::new();
    for text in &args.alias {
        let (alias, target) = match text.split_once('=') {
            Some((alias, target)) => (alias.trim(), Some(target.trim().to_owned())),
            None => (text.trim(), None),
        };
        ensure!(
            !alias.is_empty() && target.as_deref() != Some(""),
            "--alias {text:?}: write NAME or NAME=MODEL"
        );
        ensure!(aliases.iter().all(|(known, _)| known != alias), "--alias {alias} is given twice");
        aliases.push((alias.to_owned(), target));
    }
    Ok(aliases)
}

fn cache(args: &TierArgs) -> anyhow::Result<Option<CacheConfig>> {
    let Some(place) = &args.response_cache else { return Ok(None) };
    let place = match place.as_str() {
        "memory" => CachePlace::Memory { max_bytes: args.response_cache_mib.saturating_mul(1 << 20) },
        url if url.starts_with("redis://") || url.starts_with("redis+unix://") => {
            CachePlace::Redis { url: url.to_owned() }
        }
        _ => bail!("--response-cache must be memory, redis://HOST:PORT or redis+unix:///PATH"),
    };
    ensure!(args.response_cache_ttl > 0, "--response-cache-ttl must be at least 1");
    Ok(Some(CacheConfig { place, ttl: Duration::from_secs(args.response_cache_ttl) }))
}

fn advertised<'a>(args: &'a ServeArgs, place: &'a str) -> &'a str {
    args.tier.advertise_url.as_deref().unwrap_or(place)
}

/// The same after a restart at the same address, and another for another one.
pub(super) fn default_instance(url: &str) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let digest = Sha256::new().chain_update(host.trim()).chain_update("\n").chain_update(url).finalize();
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("ingle-{hex}")
}

fn register(args: &ServeArgs, place: &str) -> anyhow::Result<Option<RegisterConfig>> {
    if args.tier.register.is_empty() {
        return Ok(None);
    }
    let targets = args
        .tier
        .register
        .iter()
        .map(|url| url.parse().context("--register"))
        .collect::<Result<Vec<Target>, _>>()?;
    if args.tier.advertise_url.is_none() && (args.uds.is_some() || args.host.is_unspecified()) {
        bail!(
            "--register needs --advertise-url: nobody can tell under which address routers reach this server"
        );
    }
    let url = advertised(args, place);
    ensure!(
        url.starts_with("http://") || url.starts_with("https://"),
        "--advertise-url must begin with http:// or https://"
    );
    let heartbeat = Duration::try_from_secs_f64(args.tier.heartbeat_interval)
        .ok()
        .filter(|time| *time >= Duration::from_millis(100));
    Ok(Some(RegisterConfig {
        targets,
        advertise_url: url.trim_end_matches('/').to_owned(),
        api_key: args.api_key.first().cloned(),
        heartbeat: heartbeat.context("--heartbeat-interval must be at least 0.1")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn read(flags: &[&str]) -> Result<TierSettings, String> {
        let args = ["ingle", "serve", "m"].iter().chain(flags).map(std::ffi::OsString::from);
        match parse(args).map_err(|error| error.to_string())?.command {
            Command::Serve(args) => {
                TierSettings::read(&args, "http://127.0.0.1:8080").map_err(|error| format!("{error:#}"))
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn costs_are_of_one_kind() {
        assert_eq!(read(&[]).unwrap().tier.cost, Cost::PerThousand(0.0));
        let watts = read(&["--watts", "200", "--price-per-kwh", "0.5"]).unwrap();
        assert_eq!(watts.tier.cost, Cost::PerHour(0.1));
        assert!(read(&["--watts", "200"]).is_err());
        assert!(read(&["--cost-per-1k", "1", "--hourly-cost", "2"]).is_err());
        assert!(read(&["--cost-per-1k=-1"]).is_err());
        assert!(read(&["--hourly-cost", "NaN"]).is_err());
    }

    #[test]
    fn aliases_stand_for_served_names() {
        let settings = read(&["--alias", "gpt-4,big=own"]).unwrap();
        let names = ["own".to_owned()];
        let mut config = AppConfig::default();
        settings.apply(&mut config, &names).unwrap();
        assert_eq!(config.aliases, [("gpt-4".into(), "own".into()), ("big".into(), "own".into())]);
        for wrong in ["--alias=own", "--alias=x=other"] {
            let mut config = AppConfig::default();
            assert!(read(&[wrong]).unwrap().apply(&mut config, &names).is_err(), "{wrong}");
        }
        assert!(read(&["--alias=x", "--alias=x"]).is_err());
        assert!(read(&["--alias==x"]).is_err());
    }

    #[test]
    fn routers_need_to_know_where_we_are() {
        let router = "--register=smg+http://127.0.0.1:1";
        let register = read(&[router]).unwrap().register.unwrap();
        assert_eq!(register.advertise_url, "http://127.0.0.1:8080");
        assert!(read(&[router, "--host", "0.0.0.0"]).is_err());
        let given = read(&[router, "--host", "0.0.0.0", "--advertise-url", "http://me:1/"]).unwrap();
        assert_eq!(given.register.unwrap().advertise_url, "http://me:1");
        assert!(read(&["--register=http://127.0.0.1:1"]).is_err_and(|error| error.contains("smg+http")));
        assert!(read(&[router, "--heartbeat-interval", "0"]).is_err());
    }

    #[test]
    fn instances_are_told_apart() {
        assert_eq!(default_instance("http://a"), default_instance("http://a"));
        assert_ne!(default_instance("http://a"), default_instance("http://b"));
    }
}
