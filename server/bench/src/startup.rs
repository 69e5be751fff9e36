//! `ingle bench startup`: how long a server takes from exec to ready to its first token or embedding, and the memory it
//! holds then.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli::StartupBenchArgs;
use crate::environment::Environment;
use crate::report::{Cell, Table};
use crate::serve::{Access, Api, first_token};
use crate::stats::Summary;

/// One start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// Milliseconds from exec until the server says that it is ready.
    pub ready_ms: f64,
    /// Milliseconds from exec until the first token of the first answer; with `--embed` until the first embedding.
    pub first_token_ms: f64,
    /// Milliseconds of that first request alone.
    pub first_ttft_ms: f64,
    /// Milliseconds to the first token of the same request sent again.
    pub second_ttft_ms: f64,
    /// Resident memory of all its processes when ready, MiB.
    pub rss_mib: f64,
    /// Largest resident memory so far, MiB.
    pub peak_rss_mib: f64,
}

/// All starts of one server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartupResult {
    /// `startup`
    pub kind: String,
    /// Where and with what.
    pub environment: Environment,
    /// Model that was served, if this program was started.
    pub model: Option<String>,
    /// What was asked: `generate` or `embed`.
    pub task: String,
    /// What was started.
    pub server_command: Vec<String>,
    /// Notes of the user.
    pub metadata: Map<String, Value>,
    /// Every start.
    pub points: Vec<Start>,
}

/// Starts `command`, whose server will be at `url`, as often as `args` say.
///
/// # Errors
/// If it does not become ready or does not answer; the last lines that it printed are part of the error.
pub fn run(args: &StartupBenchArgs, command: &[String], url: &str) -> anyhow::Result<StartupResult> {
    let environment = Environment::detect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut points = Vec::new();
    for _ in 0..args.repeats.max(1) {
        points.push(runtime.block_on(until_signal(start(args, command, url)))?);
    }
    Ok(StartupResult {
        kind: "startup".to_owned(),
        environment,
        model: args.model.clone(),
        task: if args.embed { "embed" } else { "generate" }.to_owned(),
        server_command: command.to_vec(),
        metadata: crate::report::metadata(&args.out.metadata)?,
        points,
    })
}

/// `work`, given up when this process is asked to end: the started server has a group of its own and would live on.
async fn until_signal<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        result = work => result,
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}

/// A server that ends with its group when this is dropped.
struct Server {
    child: Child,
    group: Option<Pid>,
}

impl Server {
    fn spawn(command: &[String], log: File) -> anyhow::Result<Self> {
        let (program, rest) = command.split_first().context("no command was given")?;
        let copy = log.try_clone()?;
        let child = Command::new(program)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(copy)
            // A group of its own, so that helpers it starts are found and ended with it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{program} could not be started"))?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Ok(Self { child, group })
    }

    fn ended(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("status {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "an unknown status".to_owned(),
            };
            bail!("the server ended with {how} before it was ready");
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // It may be gone already.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(20);
        self.signal(Signal::TERM);
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

/// One start; what the server prints goes to the file of `--log`, else to one that is only kept for its last lines.
async fn start(args: &StartupBenchArgs, command: &[String], url: &str) -> anyhow::Result<Start> {
    let kept = tempfile::NamedTempFile::new().context("a file for what the server prints")?;
    let path = args.log.as_deref().unwrap_or(kept.path());
    let log = File::create(path).with_context(|| path.display().to_string())?;
    watched(args, command, url, log).await.map_err(|error| {
        let lines = last_lines(path);
        if lines.is_empty() {
            error
        } else {
            anyhow::anyhow!("{error:#}; the last that it printed:\n{lines}")
        }
    })
}

/// The last lines of a file, without those that are empty.
fn last_lines(path: &Path) -> String {
    const LINES: usize = 10;
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Seconds to the answer that `args` ask for.
async fn first_answer(args: &StartupBenchArgs, access: &Access) -> anyhow::Result<f64> {
    if args.embed {
        return crate::embed::first_vector(access, &args.prompt).await;
    }
    first_token(access, Api::Completions, &args.prompt).await
}

async fn watched(args: &StartupBenchArgs, command: &[String], url: &str, log: File) -> anyhow::Result<Start> {
    let base = crate::serve::base_url(url);
    let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    if http.get(format!("{base}{}", args.ready_path)).send().await.is_ok() {
        bail!("something answers at {base} already");
    }
    let begin = Instant::now();
    let mut server = Server::spawn(command, log)?;
    let limit = Duration::from_secs(args.timeout);
    while !http
        .get(format!("{base}{}", args.ready_path))
        .send()
        .await
        .is_ok_and(|answer| answer.status().is_success())
    {
        server.ended()?;
        if begin.elapsed() > limit {
            bail!("the server was not ready after {} s", args.timeout);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let ready = begin.elapsed();
    let access = Access {
        name: "server".to_owned(),
        url: url.to_owned(),
        model: args.model_name.clone(),
        api_key: None,
        headers: Vec::new(),
        timeout: limit,
    };
    let asked = Instant::now();
    let ttft = first_answer(args, &access).await?;
    let first_token_ms = (asked.duration_since(begin).as_secs_f64() + ttft) * 1e3;
    let (rss, peak) = memory(server.child.id());
    let second = first_answer(args, &access).await?;
    Ok(Start {
        ready_ms: ready.as_secs_f64() * 1e3,
        first_token_ms,
        first_ttft_ms: ttft * 1e3,
        second_ttft_ms: second * 1e3,
        rss_mib: rss,
        peak_rss_mib: peak,
    })
}

/// Resident memory now and at most, in MiB, of all processes of `group`.
fn memory(group: u32) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(stat) = std::fs::read_to_string(path.join("stat")) else { continue };
        // pid (name) state parent group ...; the name may hold anything but its closing bracket is the last.
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect::<Vec<_>>());
        if fields.and_then(|fields| fields.get(2)?.parse::<u32>().ok()) != Some(group) {
            continue;
        }
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or(0.0)
        };
        sums.0 += kib("VmRSS:") / 1024.0;
        sums.1 += kib("VmHWM:") / 1024.0;
    }
    sums
}

/// What is told of starts.
pub(crate) struct Figure {
    /// Its name in results.
    pub(crate) name: &'static str,
    label: &'static str,
    /// The label where embeddings are asked for.
    embed_label: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) of: fn(&Start) -> f64,
}

/// All of it, in the order of the table.
pub(crate) const FIGURES: [Figure; 6] = {
    const fn figure(
        name: &'static str,
        (label, embed_label): (&'static str, &'static str),
        unit: &'static str,
        of: fn(&Start) -> f64,
    ) -> Figure {
        Figure { name, label, embed_label, unit, of }
    }
    const fn both(label: &'static str) -> (&'static str, &'static str) {
        (label, label)
    }
    const FIRST: (&str, &str) = ("exec to first token", "exec to first embedding");
    const ONE: (&str, &str) = ("TTFT of the first request", "latency of the first request");
    const TWO: (&str, &str) = ("TTFT of the second request", "latency of the second request");
    [
        figure("ready_ms", both("exec to ready"), "ms", |start| start.ready_ms),
        figure("first_token_ms", FIRST, "ms", |start| start.first_token_ms),
        figure("first_ttft_ms", ONE, "ms", |start| start.first_ttft_ms),
        figure("second_ttft_ms", TWO, "ms", |start| start.second_ttft_ms),
        figure("rss_mib", both("resident memory when ready"), "MiB", |start| start.rss_mib),
        figure("peak_rss_mib", both("largest resident memory"), "MiB", |start| start.peak_rss_mib),
    ]
};

impl Figure {
    /// What people call it in `result`.
    pub(crate) fn label(&self, result: &StartupResult) -> &'static str {
        if result.task == "embed" { self.embed_label } else { self.label }
    }
}

/// A row a figure.
#[must_use]
pub fn table(result: &StartupResult) -> Table {
    let columns = ["what", "median", "mean", "std", "min", "max"];
    let columns = columns.map(|name| (if name == "std" { "+-" } else { name }, name));
    let mut table = Table::new(&columns, 1);
    for figure in &FIGURES {
        let samples: Vec<f64> = result.points.iter().map(figure.of).collect();
        let Some(summary) = Summary::of(&samples) else { continue };
        let cells = [summary.median, summary.mean, summary.std, summary.min, summary.max];
        let name = Cell::text(format!("{}, {}", figure.label(result), figure.unit));
        table.push(std::iter::once(name).chain(cells.map(|cell| Cell::Number(cell, 1))).collect());
    }
    table
}

/// A port of the loopback address that is free now.
///
/// # Errors
/// If there is none.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
