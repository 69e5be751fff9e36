//! `ingle bench embed`: texts and tokens a second of an embedding server, by length and batch.
//!
//! A length that a server does not take is a measurement that failed, with the reason; the others are measured all the
//! same.

mod server;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use futures::stream::{self, StreamExt};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::TextCodec;
use crate::cli::EmbedBenchArgs;
use crate::codec::Codec;
use crate::environment::Environment;
use crate::report::{Cell, Table};
use crate::serve::{Access, TokenPool, random_words};
use crate::stats::{Summary, confidence_interval, mean, median, percentile, sorted};
use server::{Answer, Server};

/// Which route is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmbedApi {
    /// `POST /v1/embeddings`
    #[value(name = "openai")]
    OpenAi,
    /// `POST /embed` of text-embeddings-inference.
    Tei,
}

/// The figures of one length and batch on one server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EmbedPoint {
    /// Name of the server.
    pub peer: String,
    /// Name of the model there, if it has names.
    pub model: Option<String>,
    /// Tokens of a text as asked for.
    pub tokens: usize,
    /// Texts of a request.
    pub batch: usize,
    /// Requests at once.
    pub concurrency: usize,
    /// Requests answered.
    pub completed: usize,
    /// Requests not answered, by kind.
    pub errors: Map<String, Value>,
    /// What was said of one failure of each kind.
    pub error_examples: Map<String, Value>,
    /// Texts a second.
    pub texts_per_s: f64,
    /// Tokens a second, as the server counts them; else as asked for.
    pub tokens_per_s: f64,
    /// Tokens of a text as the server counts them, if it does: fewer than asked for means that it cuts texts off.
    pub counted_tokens: Option<f64>,
    /// Numbers of a vector.
    pub dimensions: usize,
    /// Milliseconds a request.
    pub latency_ms: Option<Summary>,
    /// 95% confidence interval of the mean latency.
    pub ci95_latency_ms: Option<(f64, f64)>,
    /// Every request, in milliseconds.
    pub latencies_ms: Vec<f64>,
    /// [`RUN_FIGURES`], a value a repetition.
    pub runs: Map<String, Value>,
}

/// The figures that every repetition has one of: what two results are compared by.
pub(crate) const RUN_FIGURES: [&str; 3] = ["texts_per_s", "median_latency_ms", "p99_latency_ms"];

/// All that a command measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EmbedResult {
    /// `embed`
    pub kind: String,
    /// Where and with what.
    pub environment: Environment,
    /// What was asked.
    pub workload: Value,
    /// What the servers say of themselves, by name.
    pub servers: Map<String, Value>,
    /// Notes of the user.
    pub metadata: Map<String, Value>,
    /// A point a length, batch and server.
    pub points: Vec<EmbedPoint>,
}

/// Measures as `args` say. `codec` is the tokenizer of `--tokenizer`.
///
/// # Errors
/// If no text can be made or every measurement failed; single failures are no errors but figures.
pub fn run(args: &EmbedBenchArgs, codec: Option<Arc<dyn TextCodec>>) -> anyhow::Result<EmbedResult> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(args, codec))
}

async fn measure(args: &EmbedBenchArgs, codec: Option<Arc<dyn TextCodec>>) -> anyhow::Result<EmbedResult> {
    let environment = Environment::detect();
    if args.lengths.contains(&0)
        || args.batch_size.contains(&0)
        || args.concurrency == 0
        || args.num_requests == 0
    {
        bail!("lengths, batches, concurrency and requests must be above 0");
    }
    let mut servers = Vec::new();
    for access in args.target.accesses()? {
        servers.push(Server::reach(&access, args.api).await?);
    }
    let pool = match (codec, servers.first()) {
        (Some(codec), _) => TokenPool::new(Codec::Local(codec)).await.ok(),
        (None, Some(server)) => match server.codec() {
            codec if codec.encode("one two", false).await.is_ok() => TokenPool::new(codec).await.ok(),
            _ => None,
        },
        _ => None,
    };
    let text_lengths = pool.as_ref().map_or_else(
        || "a word a token: no tokenizer here and no /tokenize there".to_owned(),
        |pool| format!("exact, counted by {}", pool.counted_by()),
    );
    let cases: Vec<(usize, usize)> = args
        .lengths
        .iter()
        .flat_map(|&tokens| args.batch_size.iter().map(move |&batch| (tokens, batch)))
        .collect();
    let mut runs: Vec<Vec<Run>> = Vec::new();
    runs.resize_with(cases.len() * servers.len(), Vec::new);
    for repeat in 0..args.repeats.max(1) {
        for (case_idx, &(tokens, batch)) in cases.iter().enumerate() {
            // The same texts for every server, others in every repetition.
            let requests = texts(args, pool.as_ref(), tokens, batch, repeat).await?;
            for (server_idx, server) in servers.iter().enumerate() {
                runs[case_idx * servers.len() + server_idx].push(one(server, args, &requests).await);
            }
        }
    }
    let points: Vec<EmbedPoint> = runs
        .iter()
        .enumerate()
        .map(|(idx, runs)| point(args, &servers[idx % servers.len()], cases[idx / servers.len()], runs))
        .collect();
    if points.iter().all(|point| point.completed == 0) {
        let why = points.iter().flat_map(|point| &point.error_examples).next();
        let (kind, message) = why.context("nothing was asked")?;
        bail!("every request failed ({kind}): {}", message.as_str().unwrap_or_default());
    }
    Ok(EmbedResult {
        kind: "embed".to_owned(),
        environment,
        workload: json!({
            "backend": args.api.to_possible_value().map(|value| value.get_name().to_owned()),
            "text_lengths": text_lengths,
            "num_warmups": args.num_warmups,
            "repeats": args.repeats,
            "seed": args.seed,
        }),
        servers: servers.iter().map(|server| (server.name.clone(), server.about.clone())).collect(),
        metadata: crate::report::metadata(&args.out.metadata)?,
        points,
    })
}

/// Seconds to the embedding of `text`.
///
/// # Errors
/// If the request fails.
pub(crate) async fn first_vector(access: &Access, text: &str) -> anyhow::Result<f64> {
    let server = Server::reach(access, EmbedApi::OpenAi).await?;
    match server.ask(&[text.to_owned()]).await {
        Ok(answer) => Ok(answer.seconds),
        Err((kind, message)) => bail!("the request failed ({kind}): {message}"),
    }
}

/// The texts of all requests, warm-up first.
async fn texts(
    args: &EmbedBenchArgs,
    pool: Option<&TokenPool>,
    tokens: usize,
    batch: usize,
    repeat: usize,
) -> anyhow::Result<Vec<Vec<String>>> {
    let seed = args.seed ^ (repeat as u64) << 40 ^ (tokens as u64) << 20 ^ batch as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut requests = Vec::new();
    for _ in 0..args.num_requests + args.num_warmups {
        let mut request = Vec::with_capacity(batch);
        for _ in 0..batch {
            request.push(match pool {
                Some(pool) => pool.text(tokens, true, &mut rng).await.map_err(anyhow::Error::msg)?,
                None => random_words(tokens, &mut rng),
            });
        }
        requests.push(request);
    }
    Ok(requests)
}

/// One repetition on one server.
#[derive(Default)]
struct Run {
    good: Vec<Answer>,
    /// Kind of the failure, and what was said of it.
    failed: Vec<(String, String)>,
    seconds: f64,
}

/// Sends the warm-up, then the requests that count.
async fn one(server: &Server, args: &EmbedBenchArgs, requests: &[Vec<String>]) -> Run {
    let (warm, counted) = requests.split_at(args.num_warmups.min(requests.len()));
    for texts in warm {
        // If this fails, those that count will, too.
        let _ = server.ask(texts).await;
    }
    let begin = Instant::now();
    let mut answers = stream::iter(counted).map(|texts| server.ask(texts)).buffer_unordered(args.concurrency);
    let mut run = Run::default();
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(answer) => run.good.push(answer),
            Err(failure) => run.failed.push(failure),
        }
    }
    run.seconds = begin.elapsed().as_secs_f64();
    run
}

/// The figures of all repetitions: counts and latencies over all their requests, rates over their total time.
fn point(
    args: &EmbedBenchArgs,
    server: &Server,
    (tokens, batch): (usize, usize),
    runs: &[Run],
) -> EmbedPoint {
    let (mut errors, mut error_examples) = (Map::new(), Map::new());
    for (kind, message) in runs.iter().flat_map(|run| &run.failed) {
        let count = errors.get(kind).and_then(Value::as_u64).unwrap_or(0) + 1;
        errors.insert(kind.clone(), count.into());
        let short: String = message.chars().take(300).collect();
        error_examples.entry(kind.clone()).or_insert(short.into());
    }
    let good: Vec<&Answer> = runs.iter().flat_map(|run| &run.good).collect();
    let millis = |answers: &mut dyn Iterator<Item = &Answer>| -> Vec<f64> {
        answers.map(|answer| answer.seconds * 1e3).collect()
    };
    let latencies = millis(&mut good.iter().copied());
    let counts: Option<Vec<u64>> = good.iter().map(|answer| answer.tokens).collect();
    let counted: Option<f64> =
        counts.filter(|counts| !counts.is_empty()).map(|counts| counts.iter().sum::<u64>() as f64);
    let num_texts = (good.len() * batch) as f64;
    let duration: f64 = runs.iter().map(|run| run.seconds).sum();
    let per_second = |count: f64| if duration > 0.0 { count / duration } else { 0.0 };
    let answered: Vec<&Run> = runs.iter().filter(|run| !run.good.is_empty() && run.seconds > 0.0).collect();
    let each = |of: &dyn Fn(&Run) -> f64| -> Value { answered.iter().map(|run| of(run)).collect() };
    let figures = [
        each(&|run| (run.good.len() * batch) as f64 / run.seconds),
        each(&|run| median(&millis(&mut run.good.iter()))),
        each(&|run| percentile(&sorted(&millis(&mut run.good.iter())), 99.0)),
    ];
    EmbedPoint {
        peer: server.name.clone(),
        model: server.model.clone(),
        tokens,
        batch,
        concurrency: args.concurrency,
        completed: good.len(),
        errors,
        error_examples,
        texts_per_s: per_second(num_texts),
        tokens_per_s: per_second(counted.unwrap_or(num_texts * tokens as f64)),
        counted_tokens: counted.map(|counted| counted / num_texts),
        dimensions: good.first().map_or(0, |answer| answer.dimensions),
        latency_ms: Summary::of(&latencies),
        ci95_latency_ms: confidence_interval(&latencies, mean),
        latencies_ms: latencies,
        runs: RUN_FIGURES.iter().map(ToString::to_string).zip(figures).collect(),
    }
}

/// What a reader should know besides the table: what failed and why, and texts that were cut off.
#[must_use]
pub fn remarks(result: &EmbedResult) -> Vec<String> {
    let mut remarks = Vec::new();
    for point in &result.points {
        let name = format!("{}, {} x {}", point.peer, point.tokens, point.batch);
        for (kind, count) in &point.errors {
            let why = point.error_examples.get(kind).and_then(Value::as_str).unwrap_or_default();
            remarks.push(format!("{name}: failed: {count} x {kind} ({})", why.trim()));
        }
        if let Some(counted) = point.counted_tokens.filter(|counted| *counted < point.tokens as f64) {
            remarks.push(format!(
                "{name}: WARNING: the server counted {counted:.1} tokens a text: it cuts longer ones off, or counts in its \
                 own way"
            ));
        }
    }
    remarks
}

/// A row a length, batch and server.
#[must_use]
pub fn table(result: &EmbedResult) -> Table {
    let columns = [
        ("server", "server"),
        ("tokens x batch", "load"),
        ("ok", "completed"),
        ("failed", "failed"),
        ("texts/s", "texts_per_s"),
        ("tokens/s", "tokens_per_s"),
        ("p50 ms", "p50_latency_ms"),
        ("p95 ms", "p95_latency_ms"),
        ("p99 ms", "p99_latency_ms"),
    ];
    let mut table = Table::new(&columns, 2);
    for point in &result.points {
        let rate = |rate: f64, digits: usize| Cell::maybe((point.completed > 0).then_some(rate), digits);
        let latency = |of: fn(&Summary) -> f64| Cell::maybe(point.latency_ms.as_ref().map(of), 2);
        let failed: u64 = point.errors.values().filter_map(Value::as_u64).sum();
        table.push(vec![
            Cell::text(&point.peer),
            Cell::text(format!("{} x {}", point.tokens, point.batch)),
            Cell::count(point.completed),
            Cell::Number(failed as f64, 0),
            rate(point.texts_per_s, 1),
            rate(point.tokens_per_s, 0),
            latency(|summary| summary.median),
            latency(|summary| summary.p95),
            latency(|summary| summary.p99),
        ]);
    }
    table
}
