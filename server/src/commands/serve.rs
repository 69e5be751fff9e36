//! `ingle serve`: the server's life from the command line to the exit status.
//!
//! 1. Bind the address: a port in use is known before anything is loaded.
//! 2. Answer `/health`, and 503 to all else, while the model is loaded and warmed up.
//! 3. Serve until a signal, then drain; or until the engine dies.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use ingle_engine::embed::EncoderTask;
use ingle_engine::{ComputeArbiter, ComputeClass};

use super::load::{DEFAULT_MODEL, EngineSizes, Find, load};
use super::load_encoder::{self, How};
use super::tier::TierSettings;
use crate::app;
use crate::cli::{EncoderArgs, FloatType, QuantizationName, ServeArgs};
use crate::listen::{ListenConfig, Listener, Server, Shutdown, raise_file_limit};
use crate::logging;
use crate::state::{AppConfig, AppState, Generator, Models, View};

/// Serves until told to stop. The status is 0 after an orderly end, 1 if loading or the engine failed, 2 if a setting or
/// the address cannot be used.
pub fn serve(args: &ServeArgs) -> ExitCode {
    let log = match logging::start(args.log_format, &args.log, args.tier.otlp_traces_endpoint.as_deref()) {
        Ok(guard) => guard,
        Err(error) => return fail(2, &error),
    };
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ingle-http").build() {
            Ok(runtime) => runtime,
            Err(error) => return fail(1, &anyhow::anyhow!("no threads for the server: {error}")),
        };
    let status = runtime.block_on(serve_here(args));
    // Threads that still compute for cut requests are not waited for.
    runtime.shutdown_background();
    drop(log);
    status
}

async fn serve_here(args: &ServeArgs) -> ExitCode {
    let mut shutdown = match Shutdown::from_signals() {
        Ok(shutdown) => shutdown,
        Err(error) => return fail(1, &anyhow::anyhow!("signals cannot be heard: {error}")),
    };
    let listeners = match bind(args) {
        Ok(listeners) => listeners,
        Err(error) => return fail(2, &error),
    };
    let places = places(args, &listeners);
    let place = places.first().cloned().unwrap_or_default();
    let mut settings = match TierSettings::read(args, &place) {
        Ok(settings) => settings,
        Err(error) => return fail(2, &error),
    };
    let connections = raise_file_limit();
    let config = ListenConfig {
        max_connections: connections.min(ListenConfig::default().max_connections),
        drain_timeout: Duration::from_secs(args.drain_timeout),
        drain_delay: Duration::from_secs(args.drain_delay),
        ..ListenConfig::default()
    };
    let server = Server::start(listeners, config);

    let loading = tokio::task::spawn_blocking({
        let args = args.clone();
        move || load_all(&args)
    });
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = shutdown.signalled(1) => {
            tracing::info!("stopped while loading");
            return ExitCode::SUCCESS;
        }
    };
    let (models, report) = match loaded {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return fail(1, &error),
        Err(panic) => return fail(1, &anyhow::anyhow!("loading failed: {panic}")),
    };
    for line in &report {
        tracing::info!("{line}");
    }
    let state = match state(args, &settings, models) {
        Ok(state) => state,
        Err(error) => return fail(2, &error),
    };
    if args.tier.probe {
        state.probe().await;
    }
    let names = state.names_shown();
    if args.api_key.is_empty() && !only_loopback(args) {
        tracing::warn!("no --api-key is set: everybody who reaches this address may use the model");
    }
    for place in places.iter().skip(1) {
        tracing::info!("also on    {place}");
    }
    tracing::info!("ready      serving {names} on {place}");
    let app = app(state.clone());
    if let Some(config) = settings.register.take() {
        match reqwest::Client::builder().build() {
            Ok(client) => state.register(&config, &client),
            Err(error) => return fail(1, &anyhow::anyhow!("no client for routers: {error}")),
        }
    }
    let status = match server.run(app, state, shutdown).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error.into()),
    };
    // Only now: the last requests are in it.
    drop(settings.audit_guard.take());
    status
}

fn fail(status: u8, error: &anyhow::Error) -> ExitCode {
    super::complain(error);
    ExitCode::from(status)
}

/// All addresses: the main one, more of its kind, and those that serve encoders only.
fn bind(args: &ServeArgs) -> anyhow::Result<Vec<Listener>> {
    let main = match &args.uds {
        Some(path) => {
            Listener::unix(path).with_context(|| format!("the socket {} cannot be used", path.display()))?
        }
        None => {
            let address = SocketAddr::new(args.host, args.port);
            Listener::tcp(address)
                .with_context(|| format!("{address} cannot be used (see --host and --port)"))?
        }
    };
    let mut listeners = vec![main];
    for address in &args.listen {
        listeners.push(
            Listener::tcp(*address).with_context(|| format!("{address} cannot be used (see --listen)"))?,
        );
    }
    for (address, view) in encoder_addresses(args) {
        let flag = if view == View::Rerankers { "--reranker-listen" } else { "--embedding-listen" };
        let listener =
            Listener::tcp(address).with_context(|| format!("{address} cannot be used (see {flag})"))?;
        listeners.push(listener.with_view(view));
    }
    Ok(listeners)
}

/// The addresses that serve encoders only, and which of them.
fn encoder_addresses(args: &ServeArgs) -> impl Iterator<Item = (SocketAddr, View)> {
    let EncoderArgs { embedding_listen, reranker_listen, .. } = &args.encoders;
    // Where rerankers have an address of their own, they are not shown twice.
    let view = if reranker_listen.is_empty() { View::Encoders } else { View::Embedders };
    let embedders = embedding_listen.iter().map(move |address| (*address, view));
    embedders.chain(reranker_listen.iter().map(|address| (*address, View::Rerankers)))
}

/// Where each of `listeners` is reached, the main one first.
fn places(args: &ServeArgs, listeners: &[Listener]) -> Vec<String> {
    let place = |listener: &Listener| {
        let place = match (listener.local_addr(), &args.uds) {
            (Some(address), _) => format!("http://{address}"),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => String::new(),
        };
        match listener.view() {
            View::All => place,
            View::Encoders => format!("{place} (embeddings and reranking)"),
            View::Embedders => format!("{place} (embeddings)"),
            View::Rerankers => format!("{place} (reranking)"),
        }
    };
    listeners.iter().map(place).collect()
}

/// Whether all addresses can be reached from this machine only.
fn only_loopback(args: &ServeArgs) -> bool {
    let encoders = encoder_addresses(args).map(|(address, _)| address);
    let mut more = args.listen.iter().copied().chain(encoders);
    (args.uds.is_some() || args.host.is_loopback()) && more.all(|address| address.ip().is_loopback())
}

/// Finds, reads and starts all models, and tells what happened, a line each.
fn load_all(args: &ServeArgs) -> anyhow::Result<(Models, Vec<String>)> {
    let wanted = &args.encoders;
    let embedders = wanted.embedding_model.iter().map(|name| (name, EncoderTask::Embed));
    let encoders: Vec<_> =
        embedders.chain(wanted.reranker.iter().map(|name| (name, EncoderTask::Rerank))).collect();
    // Asked for embeddings only, a model that generates is not loaded beside.
    let generator = match &args.model {
        None if !encoders.is_empty() => None,
        name => Some(name.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned())),
    };
    let meant_for_it = args.load.dtype != FloatType::Auto || args.load.quantization != QuantizationName::None;
    if generator.is_none() && meant_for_it {
        bail!(
            "--dtype and --quantization are the generating model's, and none is served; for embedding models \
             and rerankers there are --embedding-dtype and --embedding-quantization"
        );
    }
    let shares = encoders.len() + usize::from(generator.is_some()) > 1;
    let arbiter = shares.then(|| ComputeArbiter::new(wanted.embedding_share));
    let turn = |class| arbiter.as_ref().map(|arbiter| arbiter.join(class));
    let mut models = Models { arbiter: arbiter.clone(), ..Models::default() };
    let mut report = Vec::new();
    ingle_engine::set_num_threads(args.load.threads);
    ingle_engine::pin_threads(args.load.pin_threads);
    // Encoders first: what they leave of a GPU's memory is for the other's cache.
    let how = How {
        find: Find::of(&args.load),
        device: args.load.device,
        dtype: wanted.embedding_dtype,
        quantization: wanted.embedding_quantization,
    };
    for (name, task) in encoders {
        let loaded = load_encoder::load(name, task, &how)?;
        report.extend(loaded.report.clone());
        let is_first = !models.encoders.iter().any(|encoder| encoder.task() == task);
        let names = match task {
            EncoderTask::Embed if is_first => wanted.embedding_served_name.clone(),
            EncoderTask::Rerank => wanted.reranker_served_name.clone(),
            EncoderTask::Embed => Vec::new(),
        };
        models.encoders.push(load_encoder::start(loaded, names, wanted, turn(ComputeClass::Encode))?);
    }
    if let Some(name) = generator {
        let sizes = EngineSizes { max_num_queued_reqs: args.max_num_queued_reqs, max_n: args.max_n };
        let loaded = load(&name, &args.load, &sizes, turn(ComputeClass::Generate))?;
        report.splice(..0, loaded.report);
        models.generator = Some(Generator { engine: loaded.engine, text: loaded.text, card: loaded.card });
    }
    add_short_names(args, &mut models);
    check_names(args, &models)?;
    Ok((models, report))
}

/// An encoder that is called by its hub id also answers to the id's last part, unless that means something else already.
fn add_short_names(args: &ServeArgs, models: &mut Models) {
    let short = |name: &str| name.rsplit_once('/').map(|(_, last)| last.to_owned());
    // What its root was is what it is called only where no name was given.
    let wanted: Vec<Option<String>> = models
        .encoders
        .iter()
        .map(|encoder| match encoder.names.as_slice() {
            [only] if *only == encoder.card.root => short(only),
            _ => None,
        })
        .collect();
    let mut taken: Vec<String> = args.served_model_name.clone();
    taken.extend(models.generator.iter().map(|generator| generator.card.root.clone()));
    taken.extend(models.encoders.iter().flat_map(|encoder| encoder.names.clone()));
    taken.extend(args.tier.alias.iter().map(|alias| alias.split('=').next().unwrap_or("").trim().to_owned()));
    for (encoder, name) in models.encoders.iter_mut().zip(&wanted) {
        let Some(name) = name else { continue };
        let is_only = wanted.iter().flatten().filter(|other| *other == name).count() == 1;
        if is_only && !taken.contains(name) {
            encoder.names.push(name.clone());
        }
    }
}

/// No name may mean two models.
fn check_names(args: &ServeArgs, models: &Models) -> anyhow::Result<()> {
    let mut names: Vec<&str> = args.served_model_name.iter().map(String::as_str).collect();
    if let Some(generator) = models.generator.as_ref().filter(|_| names.is_empty()) {
        names.push(&generator.card.root);
    }
    for encoder in &models.encoders {
        for name in &encoder.names {
            if names.contains(&name.as_str()) {
                anyhow::bail!(
                    "two models are called {name:?}; see --served-model-name, --embedding-served-name and \
                     --reranker-served-name"
                );
            }
            names.push(name);
        }
    }
    Ok(())
}

fn state(args: &ServeArgs, settings: &TierSettings, models: Models) -> anyhow::Result<AppState> {
    let mut served_names = args.served_model_name.clone();
    match &models.generator {
        Some(generator) if served_names.is_empty() => served_names.push(generator.card.root.clone()),
        Some(_) => {}
        None => served_names.clear(),
    }
    let encoders = models.encoders.iter().flat_map(|encoder| &encoder.names).cloned();
    let names: Vec<String> = served_names.iter().cloned().chain(encoders).collect();
    let mut config = AppConfig {
        served_names,
        echo_alias: args.tier.echo_alias,
        traces: args.tier.otlp_traces_endpoint.is_some(),
        api_keys: args.api_key.clone(),
        open_metrics: !args.protect_metrics,
        host_check: args.uds.is_none() && only_loopback(args),
        allowed_hosts: args.allowed_hosts.clone(),
        cors_origins: args.allowed_origins.clone(),
        max_body_bytes: args.max_body_bytes,
        default_max_tokens: args.default_max_tokens,
        request_timeout: Duration::from_secs(args.request_timeout),
        max_inputs: args.encoders.max_client_batch_size,
        auto_truncate: args.encoders.auto_truncate,
        ..AppConfig::default()
    };
    settings.apply(&mut config, &names)?;
    Ok(AppState::with_models(config, models)?)
}
