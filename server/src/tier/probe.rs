//! A short request of our own at the start, so that the card has numbers before the first client comes.

use std::time::{Duration, Instant};

use ingle_engine::{EngineHandle, Request, SamplingParams, TokenEvent};

/// Tokens of the probe's prompt.
const PROMPT: usize = 64;
/// Tokens of the answer that its latency is given for, and how many of them are waited for: with a slow model every one
/// delays the start.
const ANSWER: f64 = 17.0;
const ASKED: u32 = 5;
/// A probe that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the probe found.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Probed {
    pub(crate) latency_ms: Option<f64>,
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) prefill_tokens_per_second: Option<f64>,
    pub(crate) decode_tokens_per_second: Option<f64>,
    pub(crate) tokens_per_second: Option<f64>,
}

/// Asks the engine once. `None` if it did not answer; that is no reason not to serve.
pub(crate) async fn run(engine: &EngineHandle) -> Option<Probed> {
    tokio::time::timeout(PATIENCE, ask(engine)).await.ok().flatten()
}

async fn ask(engine: &EngineHandle) -> Option<Probed> {
    let limits = engine.limits();
    let asked = ASKED.min(u32::try_from(limits.max_model_len / 2).ok()?.max(1));
    let prompt_len = PROMPT.min(limits.max_model_len.saturating_sub(asked as usize)).max(1);
    // Different ids, so that neither the tokenizer's nor the cache's special cases are measured.
    let prompt = (0..prompt_len)
        .map(|i| u32::try_from((i * 7 + 5) % limits.vocab_size.max(1)))
        .collect::<Result<_, _>>()
        .ok()?;
    let request = Request {
        prompt,
        sampling: SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() },
        max_tokens: asked,
        n: 1,
        priority: 0,
        // Its own salt: no client finds the probe's blocks.
        cache_salt: *b"ingle: probe of the tier's speed",
        prompt_logprobs: None,
    };
    let begin = Instant::now();
    let mut stream = engine.submit(request.validate(limits).ok()?).ok()?;
    let mut first = None;
    let mut tokens = 0_u32;
    loop {
        match stream.next().await? {
            TokenEvent::Token { .. } => {
                tokens = tokens.saturating_add(1);
                first.get_or_insert_with(|| begin.elapsed());
            }
            TokenEvent::Finished { .. } => {
                let whole = begin.elapsed().as_secs_f64();
                let first = first.unwrap_or(begin.elapsed()).as_secs_f64();
                let rate =
                    |amount: f64, seconds: f64| (seconds > 0.0 && amount > 0.0).then(|| amount / seconds);
                let decode = rate(f64::from(tokens.saturating_sub(1)), whole - first);
                let latency = first + decode.map_or(0.0, |rate| (ANSWER - 1.0) / rate);
                return Some(Probed {
                    latency_ms: Some(latency * 1e3),
                    first_token_ms: Some(first * 1e3),
                    prefill_tokens_per_second: rate(prompt_len as f64, first),
                    decode_tokens_per_second: decode,
                    tokens_per_second: rate(prompt_len as f64 + ANSWER, latency),
                });
            }
            TokenEvent::Failed(_) => return None,
            TokenEvent::PromptLogprobs(_) => {}
        }
    }
}
