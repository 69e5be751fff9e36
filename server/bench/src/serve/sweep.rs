//! All measurements of one command.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::arrival::{Rate, arrivals};
use super::client::{Ask, request};
use super::dataset::{DatasetName, DatasetSpec, PromptForm, Seeds, Writer};
use super::load::{self, Live, Run};
use super::metrics::{Slo, metrics};
use super::pool::{TokenPool, WordCount, takes_ids};
use super::target::{Access, Api, Target};
use super::workload::Prompt;
use crate::TextCodec;
use crate::cli::ServeBenchArgs;
use crate::codec::Codec;
use crate::environment::Environment;

/// The figures of one load on one server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Point {
    /// Name of the server.
    pub peer: String,
    /// Name of the model there.
    pub model: String,
    /// Requests a second, or `inf`.
    pub request_rate: String,
    /// Requests at once; none: no limit.
    pub max_concurrency: Option<usize>,
    /// How the lengths of prompts were made sure of.
    pub prompt_lengths: String,
    /// All figures, by the names of vLLM's benchmark where it has them.
    #[serde(flatten)]
    pub metrics: Map<String, Value>,
}

impl Point {
    /// A figure that is a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<f64> {
        self.metrics.get(name).and_then(Value::as_f64)
    }

    /// A figure that is a list of numbers; empty if there is none.
    #[must_use]
    pub fn numbers(&self, name: &str) -> Vec<f64> {
        self.metrics
            .get(name)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect()
    }

    /// The load in a few characters.
    #[must_use]
    pub fn load(&self) -> String {
        match (self.request_rate.as_str(), self.max_concurrency) {
            ("inf", None) => "all at once".to_owned(),
            ("inf", Some(clients)) => format!("{clients} clients"),
            (rate, None) => format!("{rate} req/s"),
            (rate, Some(clients)) => format!("{rate} req/s, {clients} clients"),
        }
    }
}

/// All that a command measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServeResult {
    /// `serve`
    pub kind: String,
    /// Where and with what.
    pub environment: Environment,
    /// What was asked.
    pub workload: Value,
    /// What the servers say of themselves, by name.
    pub servers: Map<String, Value>,
    /// Notes of the user.
    pub metadata: Map<String, Value>,
    /// A point a load and server.
    pub points: Vec<Point>,
}

/// Measures as `args` say. `codec` is the tokenizer of `--tokenizer`.
///
/// # Errors
/// If a server cannot be reached or no prompt can be made; failed requests are no errors but figures.
pub fn run(args: &ServeBenchArgs, codec: Option<Arc<dyn TextCodec>>) -> anyhow::Result<ServeResult> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(args, codec))
}

/// A load: requests a second and clients.
type LoadSpec = (Rate, Option<usize>);

async fn measure(args: &ServeBenchArgs, codec: Option<Arc<dyn TextCodec>>) -> anyhow::Result<ServeResult> {
    let environment = Environment::detect();
    let slo = Slo::parse(&args.goodput).map_err(anyhow::Error::msg)?;
    if !(args.burstiness > 0.0 && args.burstiness.is_finite()) {
        bail!("--burstiness must be a number above 0");
    }
    if args.max_concurrency.contains(&0) || args.num_prompts == Some(0) {
        bail!("--max-concurrency and --num-prompts must be above 0");
    }
    let spec = dataset_spec(args);
    let mut peers = Vec::new();
    for access in args.target.accesses()? {
        let mut target = Target::reach(&access, args.backend, args.endpoint.as_deref()).await?;
        target.extra_body = extra_body(args)?;
        let writer = writer(args, &target, codec.clone()).await?;
        peers.push((target, writer));
    }
    let loads = loads(args);
    let seeds = seeds(args);
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); loads.len() * peers.len()];
    let repeats = args.repeats.max(1);
    for repeat in 0..repeats {
        for (load_idx, load) in loads.iter().enumerate() {
            for (peer_idx, (target, writer)) in peers.iter().enumerate() {
                let title = format!("{} | {} | run {} of {repeats}", target.name, title(load), repeat + 1);
                // Prompts of different loads and repeats differ, or a prefix cache would answer the later ones; those
                // of different servers are the same.
                let seeds = seeds.step((repeat * loads.len() + load_idx) as u64);
                let run = one(args, &spec, target, writer, *load, seeds, &title).await?;
                runs[load_idx * peers.len() + peer_idx].push(run);
            }
        }
    }
    let mut points = Vec::new();
    for (idx, runs) in runs.iter().enumerate() {
        let (rate, max_concurrency) = loads[idx / peers.len()];
        let (target, writer) = &peers[idx % peers.len()];
        points.push(Point {
            peer: target.name.clone(),
            model: target.model.clone(),
            request_rate: rate.to_string(),
            max_concurrency,
            prompt_lengths: writer.description(),
            metrics: metrics(runs, slo.as_ref()),
        });
    }
    Ok(ServeResult {
        kind: "serve".to_owned(),
        environment,
        workload: workload_facts(args, &spec, seeds),
        servers: peers.iter().map(|(target, _)| (target.name.clone(), target.about.clone())).collect(),
        metadata: crate::report::metadata(&args.out.metadata)?,
        points,
    })
}

/// Seconds to the first token of one greedy answer of four tokens to `prompt`.
///
/// # Errors
/// If the request fails.
pub(crate) async fn first_token(access: &Access, api: Api, prompt: &str) -> anyhow::Result<f64> {
    let target = Target::reach(access, api, None).await?;
    let prompt = Prompt::Text(prompt.to_owned());
    let ask = Ask { history: &[], prompt: &prompt, max_tokens: 4, ignore_eos: true, keep_answer: false };
    let record = request(&target, &ask, Instant::now(), || ()).await;
    match record.failure {
        None => Ok(record.ttft),
        Some(failure) => {
            bail!("the request failed ({}): {}", failure.kind(), record.message.unwrap_or_default())
        }
    }
}

fn dataset_spec(args: &ServeBenchArgs) -> DatasetSpec {
    let default_prefix = if args.dataset_name == DatasetName::SharedPrefix { 256 } else { 0 };
    DatasetSpec {
        name: args.dataset_name,
        path: args.dataset_path.clone(),
        input_len: args.input_len.max(1),
        output_len: args.output_len,
        range_ratio: args.range_ratio,
        prefix_len: args.prefix_len.unwrap_or(default_prefix),
        num_prefixes: args.num_prefixes,
        num_turns: args.num_turns,
        ignore_eos: args.ignore_eos,
    }
}

fn extra_body(args: &ServeBenchArgs) -> anyhow::Result<Map<String, Value>> {
    match &args.extra_body {
        None => Ok(Map::new()),
        Some(text) => serde_json::from_str(text).context("--extra-body must be a JSON object"),
    }
}

async fn writer(
    args: &ServeBenchArgs,
    target: &Target,
    codec: Option<Arc<dyn TextCodec>>,
) -> anyhow::Result<Writer> {
    let codec = match codec {
        Some(codec) => Some(Codec::Local(codec)),
        None => target.codec().await,
    };
    let pool = match codec {
        Some(codec) => TokenPool::new(codec).await,
        None => Err("neither --tokenizer nor a /tokenize route is there".to_owned()),
    };
    let pool = match pool {
        Ok(pool) => pool,
        Err(reason) if args.prompt_form == PromptForm::Tokens => bail!("--prompt-form tokens: {reason}"),
        Err(_) => return Ok(Writer::Words(WordCount::calibrate(target).await)),
    };
    // The turns of a conversation are put together as text.
    let can = args.backend == Api::Completions && args.dataset_name != DatasetName::MultiTurn;
    let ids = match args.prompt_form {
        PromptForm::Text => false,
        PromptForm::Tokens if !can => bail!("token ids need --backend openai and single questions"),
        PromptForm::Tokens => true,
        PromptForm::Auto => can && takes_ids(target, &pool, &mut ChaCha8Rng::seed_from_u64(0)).await,
    };
    Ok(Writer::Pool { pool: Box::new(pool), ids })
}

/// Without `--seed` the words of made-up prompts are new: a server's prefix cache may still hold those of the last run.
/// Lengths, arrivals and what a file holds are the same every time, so that results can be compared.
fn seeds(args: &ServeBenchArgs) -> Seeds {
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        // A clock before 1970 gives 0, which is a seed as well.
        since.map_or(0, |time| u64::from(time.subsec_nanos()) ^ (time.as_secs() << 30))
    };
    let fresh = args.seed.is_none() && args.dataset_name.is_made_up();
    let given = args.seed.unwrap_or(0);
    Seeds { shape: given, words: if fresh { now() } else { given } }
}

/// Every rate with every number of clients.
fn loads(args: &ServeBenchArgs) -> Vec<LoadSpec> {
    let mut clients: Vec<Option<usize>> = args.max_concurrency.iter().copied().map(Some).collect();
    if clients.is_empty() {
        // A rate that is asked for, be it infinite, is not held back by clients.
        clients.push(if args.request_rate.is_empty() { Some(8) } else { None });
    }
    let rates = if args.request_rate.is_empty() { &[Rate::INFINITE][..] } else { &args.request_rate };
    rates.iter().flat_map(|rate| clients.iter().map(|clients| (*rate, *clients))).collect()
}

fn title((rate, clients): &LoadSpec) -> String {
    match clients {
        Some(clients) if *rate == Rate::INFINITE => format!("{clients} clients"),
        Some(clients) => format!("{rate} req/s, {clients} clients"),
        None if *rate == Rate::INFINITE => "all at once".to_owned(),
        None => format!("{rate} req/s"),
    }
}

/// One run of one load on one server.
async fn one(
    args: &ServeBenchArgs,
    spec: &DatasetSpec,
    target: &Target,
    writer: &Writer,
    (rate, clients): LoadSpec,
    seeds: Seeds,
    title: &str,
) -> anyhow::Result<Run> {
    let count = args.num_prompts.unwrap_or_else(|| clients.unwrap_or(8).saturating_mul(4).max(32));
    let num_warmups = args.num_warmups.unwrap_or_else(|| clients.unwrap_or(8).min(8));
    let at_once = clients.unwrap_or(usize::MAX);
    if num_warmups > 0 {
        let warm = spec.workload(writer, args.backend, num_warmups, seeds.warm_up()).await?;
        let bar = progress(args, &format!("{title} | warm-up"), warm.num_requests());
        let live = Arc::new(Live::default());
        let run = load::run(target, &warm, &vec![0.0; num_warmups], at_once, None, &live).await;
        bar.finish_and_clear();
        if let Some(failed) = run.records.iter().find(|record| record.failure.is_some())
            && run.records.iter().all(|record| record.failure.is_some())
        {
            let kind = failed.failure.as_ref().map(super::record::Failure::kind).unwrap_or_default();
            let message = failed.message.clone().unwrap_or_default();
            bail!("{}: every warm-up request failed ({kind}): {message}", target.name);
        }
    }
    let workload = spec.workload(writer, args.backend, count, seeds).await?;
    let times = arrivals(rate, args.burstiness, workload.conversations.len(), seeds.shape);
    let bar = progress(args, title, workload.num_requests());
    let live = Arc::new(Live::default());
    let shown = tokio::spawn(show(bar.clone(), Arc::clone(&live)));
    let run = load::run(target, &workload, &times, at_once, args.max_seconds, &live).await;
    shown.abort();
    bar.finish_and_clear();
    Ok(run)
}

fn progress(args: &ServeBenchArgs, title: &str, len: usize) -> ProgressBar {
    if args.out.quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(len as u64).with_prefix(title.to_owned());
    match ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {elapsed} {msg}") {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// Keeps the progress line up to date.
async fn show(bar: ProgressBar, live: Arc<Live>) {
    const PERIOD: Duration = Duration::from_millis(250);
    let (mut before, mut then) = (0, Instant::now());
    loop {
        tokio::time::sleep(PERIOD).await;
        let arrivals = live.arrivals.load(Relaxed);
        let rate = (arrivals - before) as f64 / then.elapsed().as_secs_f64();
        (before, then) = (arrivals, Instant::now());
        let failed = live.failed.load(Relaxed);
        let failures = if failed > 0 { format!(", {failed} failed") } else { String::new() };
        bar.set_position((live.done.load(Relaxed) + failed) as u64);
        bar.set_message(format!("{} running, {rate:.0} tokens/s{failures}", live.running.load(Relaxed)));
    }
}

fn workload_facts(args: &ServeBenchArgs, spec: &DatasetSpec, seeds: Seeds) -> Value {
    let name = |value: &dyn Fn() -> Option<String>| value().unwrap_or_default();
    json!({
        "backend": args.backend.name(),
        "endpoint": args.endpoint,
        "extra_body": args.extra_body,
        "dataset_name": name(&|| Some(clap::ValueEnum::to_possible_value(&spec.name)?.get_name().to_owned())),
        "dataset_path": spec.path.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy()),
        "input_len": spec.input_len,
        "output_len": if spec.name.is_made_up() { Some(spec.output_len()) } else { spec.output_len },
        "range_ratio": spec.range_ratio,
        "prefix_len": spec.prefix_len,
        "num_prefixes": spec.num_prefixes,
        "num_turns": spec.num_turns,
        "ignore_eos": spec.ignore_eos,
        "burstiness": args.burstiness,
        "num_prompts": args.num_prompts,
        "max_seconds": args.max_seconds,
        "num_warmups": args.num_warmups,
        "repeats": args.repeats,
        "seed": seeds.shape,
        "words_seed": seeds.words,
        "goodput": args.goodput,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeBenchArgs,
    }

    fn args(flags: &[&str]) -> ServeBenchArgs {
        Command::parse_from([&["serve"], flags].concat()).args
    }

    #[test]
    fn a_rate_that_is_asked_for_is_not_held_back() {
        let of = |flags: &[&str]| loads(&args(flags));
        assert_eq!(of(&[]), [(Rate::INFINITE, Some(8))]);
        assert_eq!(of(&["--request-rate", "inf"]), [(Rate::INFINITE, None)]);
        assert_eq!(of(&["-r", "inf", "-c", "3,4"]), [(Rate::INFINITE, Some(3)), (Rate::INFINITE, Some(4))]);
        assert_eq!(of(&["-c", "3"]), [(Rate::INFINITE, Some(3))]);
        assert_eq!(title(&of(&["-r", "inf"])[0]), "all at once");
    }

    #[test]
    fn words_are_new_unless_a_seed_is_given() {
        let (one, two) = (seeds(&args(&[])), seeds(&args(&[])));
        assert_eq!(one.shape, two.shape);
        assert_ne!(one.words, two.words);
        let given = seeds(&args(&["--seed", "3"]));
        assert_eq!(given, Seeds { shape: 3, words: 3 });
        assert_ne!(given.step(1), given.step(2));
        // What stands in a file is not made up, and its order is part of the load.
        let file = args(&["--dataset-name", "sharegpt"]);
        assert_eq!(seeds(&file), seeds(&file));
    }
}
