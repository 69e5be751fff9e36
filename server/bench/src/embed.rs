//! `ingle bench embed`: texts and tokens a second of an embedding server, by length and batch.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use futures::stream::{self, StreamExt};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::TextCodec;
use crate::cli::EmbedBenchArgs;
use crate::codec::Codec;
use crate::environment::Environment;
use crate::report::Table;
use crate::serve::{Access, TokenPool, base_url, http_client, random_words, root_cause};
use crate::stats::{Summary, confidence_interval, mean};

/// Which route is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
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
    /// Texts a second.
    pub texts_per_s: f64,
    /// Tokens a second, as the server counts them; else as asked for.
    pub tokens_per_s: f64,
    /// Numbers of a vector.
    pub dimensions: usize,
    /// Milliseconds a request.
    pub latency_ms: Option<Summary>,
    /// 95% confidence interval of the mean latency.
    pub ci95_latency_ms: Option<(f64, f64)>,
    /// Every request, in milliseconds.
    pub latencies_ms: Vec<f64>,
}

/// All that a command measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EmbedResult {
    /// `embed`
    pub kind: String,
    /// Where and with what.
    pub environment: Environment,
    /// How the lengths of texts were made sure of.
    pub text_lengths: String,
    /// Notes of the user.
    pub metadata: Map<String, Value>,
    /// A point a length, batch and server.
    pub points: Vec<EmbedPoint>,
}

struct Server {
    name: String,
    url: String,
    api: EmbedApi,
    model: Option<String>,
    api_key: Option<String>,
    http: reqwest::Client,
    timeout: std::time::Duration,
}

/// Measures as `args` say. `codec` is the tokenizer of `--tokenizer`.
///
/// # Errors
/// If no server can be reached or no text can be made.
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
    let mut points = Vec::new();
    for &tokens in &args.lengths {
        for &batch in &args.batch_size {
            // The same texts for every server.
            let requests = texts(args, pool.as_ref(), tokens, batch).await?;
            for server in &servers {
                points.push(server.measure(args, tokens, batch, &requests).await?);
            }
        }
    }
    Ok(EmbedResult {
        kind: "embed".to_owned(),
        environment,
        text_lengths,
        metadata: crate::report::metadata(&args.out.metadata)?,
        points,
    })
}

/// The texts of all requests, warm-up first.
async fn texts(
    args: &EmbedBenchArgs,
    pool: Option<&TokenPool>,
    tokens: usize,
    batch: usize,
) -> anyhow::Result<Vec<Vec<String>>> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed ^ (tokens as u64) << 20 ^ batch as u64);
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

/// A request that was answered.
struct Answer {
    seconds: f64,
    tokens: Option<u64>,
    dimensions: usize,
}

impl Server {
    async fn reach(access: &Access, api: EmbedApi) -> anyhow::Result<Self> {
        let url = base_url(&access.url);
        let http = http_client(access)?;
        let mut model = access.model.clone();
        if model.is_none() && api == EmbedApi::OpenAi {
            let mut request = http.get(format!("{url}/v1/models"));
            if let Some(key) = &access.api_key {
                request = request.bearer_auth(key);
            }
            // A server without the route may well know its only model without a name.
            if let Ok(answer) = request.send().await {
                let list: Value = answer.json().await.unwrap_or_default();
                model = list["data"][0]["id"].as_str().map(str::to_owned);
            }
        }
        Ok(Self {
            name: access.name.clone(),
            url,
            api,
            model,
            api_key: access.api_key.clone(),
            http,
            timeout: access.timeout,
        })
    }

    fn codec(&self) -> Codec {
        Codec::Server {
            http: self.http.clone(),
            url: format!("{}/tokenize", self.url),
            model: self.model.clone().unwrap_or_default(),
            api_key: self.api_key.clone(),
        }
    }

    async fn ask(&self, texts: &[String]) -> Result<Answer, (String, String)> {
        let (path, body) = match self.api {
            EmbedApi::OpenAi => ("/v1/embeddings", json!({"model": self.model, "input": texts})),
            EmbedApi::Tei => ("/embed", json!({"inputs": texts})),
        };
        let mut request = self
            .http
            .post(format!("{}{path}", self.url))
            .timeout(self.timeout)
            .header("content-type", "application/json")
            .body(body.to_string());
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let failed = |error: reqwest::Error| {
            let kind = if error.is_timeout() {
                "timeout"
            } else if error.is_connect() {
                "connect"
            } else {
                "truncated"
            };
            (kind.to_owned(), root_cause(&error))
        };
        let begin = Instant::now();
        let answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(failed)?;
        // Reading the numbers is the client's own work, not the server's.
        let seconds = begin.elapsed().as_secs_f64();
        if !status.is_success() {
            return Err((format!("http_{}", status.as_u16()), String::from_utf8_lossy(&bytes).into_owned()));
        }
        let bad = |what: &str| ("bad_response".to_owned(), what.to_owned());
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| bad(&error.to_string()))?;
        let vectors: Vec<&Value> = match self.api {
            EmbedApi::OpenAi => {
                value["data"].as_array().into_iter().flatten().map(|item| &item["embedding"]).collect()
            }
            EmbedApi::Tei => value.as_array().into_iter().flatten().collect(),
        };
        if vectors.len() != texts.len() {
            return Err(bad(&format!("{} vectors for {} texts", vectors.len(), texts.len())));
        }
        let dimensions = vectors.first().and_then(|vector| vector.as_array()).map_or(0, Vec::len);
        if dimensions == 0 {
            return Err(bad("the vectors are no lists of numbers"));
        }
        Ok(Answer { seconds, tokens: value["usage"]["prompt_tokens"].as_u64(), dimensions })
    }

    async fn measure(
        &self,
        args: &EmbedBenchArgs,
        tokens: usize,
        batch: usize,
        requests: &[Vec<String>],
    ) -> anyhow::Result<EmbedPoint> {
        let (warm, counted) = requests.split_at(args.num_warmups.min(requests.len()));
        let mut last_error = None;
        for texts in warm {
            if let Err(error) = self.ask(texts).await {
                last_error = Some(error);
            }
        }
        let begin = Instant::now();
        let answers: Vec<_> = stream::iter(counted)
            .map(|texts| self.ask(texts))
            .buffer_unordered(args.concurrency)
            .collect()
            .await;
        let duration = begin.elapsed().as_secs_f64();
        let mut errors = Map::new();
        let mut good = Vec::new();
        for answer in answers {
            match answer {
                Ok(answer) => good.push(answer),
                Err((kind, message)) => {
                    let count = errors.get(&kind).and_then(Value::as_u64).unwrap_or(0) + 1;
                    errors.insert(kind.clone(), count.into());
                    last_error = Some((kind, message));
                }
            }
        }
        if good.is_empty() {
            let (kind, message) = last_error.context("nothing was asked")?;
            bail!("{}: every request failed ({kind}): {message}", self.name);
        }
        let latencies: Vec<f64> = good.iter().map(|answer| answer.seconds * 1e3).collect();
        let counted: u64 = good.iter().map(|answer| answer.tokens.unwrap_or((tokens * batch) as u64)).sum();
        Ok(EmbedPoint {
            peer: self.name.clone(),
            tokens,
            batch,
            concurrency: args.concurrency,
            completed: good.len(),
            errors,
            texts_per_s: (good.len() * batch) as f64 / duration,
            tokens_per_s: counted as f64 / duration,
            dimensions: good[0].dimensions,
            latency_ms: Summary::of(&latencies),
            ci95_latency_ms: confidence_interval(&latencies, mean),
            latencies_ms: latencies,
        })
    }
}

/// A row a length, batch and server.
#[must_use]
pub fn table(result: &EmbedResult) -> Table {
    let columns =
        ["server", "tokens x batch", "ok", "failed", "texts/s", "tokens/s", "p50 ms", "p95 ms", "p99 ms"];
    let mut table = Table::new(&columns, 2);
    for point in &result.points {
        let latency = |of: fn(&Summary) -> f64| {
            point.latency_ms.as_ref().map_or_else(|| "-".to_owned(), |summary| format!("{:.2}", of(summary)))
        };
        let failed: u64 = point.errors.values().filter_map(Value::as_u64).sum();
        table.push(vec![
            point.peer.clone(),
            format!("{} x {}", point.tokens, point.batch),
            point.completed.to_string(),
            failed.to_string(),
            format!("{:.1}", point.texts_per_s),
            format!("{:.0}", point.tokens_per_s),
            latency(|summary| summary.median),
            latency(|summary| summary.p95),
            latency(|summary| summary.p99),
        ]);
    }
    table
}
