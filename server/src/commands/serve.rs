//! `ingle serve`: the server's life from the command line to the exit status.
//!
//! 1. Bind the address: a port in use is known before anything is loaded.
//! 2. Answer `/health`, and 503 to all else, while the model is loaded and warmed up.
//! 3. Serve until a signal, then drain; or until the engine dies.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use super::load::{DEFAULT_MODEL, EngineSizes, Loaded, load};
use super::tier::TierSettings;
use crate::app;
use crate::cli::ServeArgs;
use crate::listen::{ListenConfig, Listener, Server, Shutdown, raise_file_limit};
use crate::logging;
use crate::state::{AppConfig, AppState};

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
    let listener = match bind(args) {
        Ok(listener) => listener,
        Err(error) => return fail(2, &error),
    };
    let place = place(args, &listener);
    let mut settings = match TierSettings::read(args, &place) {
        Ok(settings) => settings,
        Err(error) => return fail(2, &error),
    };
    let connections = raise_file_limit();
    let config = ListenConfig {
        max_connections: connections.min(ListenConfig::default().max_connections),
        drain_timeout: Duration::from_secs(args.drain_timeout),
        ..ListenConfig::default()
    };
    let server = Server::start(vec![listener], config);

    let loading = tokio::task::spawn_blocking({
        let (model, load_args) =
            (args.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned()), args.load.clone());
        let sizes = EngineSizes { max_num_queued_reqs: args.max_num_queued_reqs, max_n: args.max_n };
        move || load(&model, &load_args, &sizes)
    });
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = shutdown.signalled(1) => {
            tracing::info!("stopped while loading");
            return ExitCode::SUCCESS;
        }
    };
    let loaded = match loaded {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return fail(1, &error),
        Err(panic) => return fail(1, &anyhow::anyhow!("loading failed: {panic}")),
    };
    for line in &loaded.report {
        tracing::info!("{line}");
    }
    let state = match state(args, &settings, loaded) {
        Ok(state) => state,
        Err(error) => return fail(2, &error),
    };
    if args.tier.probe {
        state.probe().await;
    }
    let names = state.names_shown();
    if args.api_key.is_empty() && !args.host.is_loopback() && args.uds.is_none() {
        tracing::warn!("no --api-key is set: everybody who reaches this address may use the model");
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

fn bind(args: &ServeArgs) -> anyhow::Result<Listener> {
    match &args.uds {
        Some(path) => {
            Listener::unix(path).with_context(|| format!("the socket {} cannot be used", path.display()))
        }
        None => {
            let address = SocketAddr::new(args.host, args.port);
            Listener::tcp(address)
                .with_context(|| format!("{address} cannot be used (see --host and --port)"))
        }
    }
}

fn place(args: &ServeArgs, listener: &Listener) -> String {
    match (listener.local_addr(), &args.uds) {
        (Some(address), _) => format!("http://{address}"),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => String::new(),
    }
}

fn state(args: &ServeArgs, settings: &TierSettings, loaded: Loaded) -> anyhow::Result<AppState> {
    let mut served_names = args.served_model_name.clone();
    if served_names.is_empty() {
        served_names.push(loaded.root.clone());
    }
    let mut config = AppConfig {
        served_names,
        echo_alias: args.tier.echo_alias,
        traces: args.tier.otlp_traces_endpoint.is_some(),
        api_keys: args.api_key.clone(),
        open_metrics: !args.protect_metrics,
        host_check: args.uds.is_none() && args.host.is_loopback(),
        allowed_hosts: args.allowed_hosts.clone(),
        cors_origins: args.allowed_origins.clone(),
        max_body_bytes: args.max_body_bytes,
        default_max_tokens: args.default_max_tokens,
        request_timeout: Duration::from_secs(args.request_timeout),
        ..AppConfig::default()
    };
    settings.apply(&mut config)?;
    Ok(AppState::new(config, loaded.engine, loaded.text, loaded.card)?)
}
