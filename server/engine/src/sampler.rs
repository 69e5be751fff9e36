//! From one row of logits to one token.
//!
//! The order is: log probabilities (of the model's own logits), end tokens banned by `min_tokens`, logit bias,
//! penalties, temperature, `min_p`, `top_k`, `top_p`, draw. Every row is alone: nothing here sees the batch. The
//! draw comes from a counter: seed, choice and position give the random number, so the same request gets the same
//! numbers whatever runs beside it, preempted or not.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::backend::SampleResult;
use crate::plan::SampleSpec;
use crate::request::{Request, SamplingParams, TokenLogprobs};

/// The row holds NaN or infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NonFinite;

/// Chooses the next token of `request` from its `row` of logits.
pub(crate) fn sample(row: &[f32], request: &Request, spec: &SampleSpec) -> SampleResult {
    let params = &request.sampling;
    let Ok(id) = argmax(row) else { return SampleResult::NonFinite };
    let is_plain = params.logit_bias.is_empty() && !params.has_penalties() && spec.banned.is_empty();
    let chosen = if is_plain && params.is_greedy() { id } else { choose(row, request, spec) };
    let logprobs = params.logprobs.map(|k| {
        let softmax = LogSoftmax::new(row, row[id as usize]);
        let logit = row.get(chosen as usize).copied().unwrap_or(f32::MIN);
        TokenLogprobs { logprob: softmax.of(logit), top: softmax.top(row, usize::from(k)) }
    });
    SampleResult::Token { id: chosen, logprobs }
}

/// Log probability of `token` in `row`, and the `k` likeliest.
pub(crate) fn token_logprobs(row: &[f32], token: u32, k: usize) -> Result<TokenLogprobs, NonFinite> {
    let best = argmax(row)?;
    let softmax = LogSoftmax::new(row, row[best as usize]);
    let logit = row.get(token as usize).copied().ok_or(NonFinite)?;
    Ok(TokenLogprobs { logprob: softmax.of(logit), top: softmax.top(row, k) })
}

fn choose(row: &[f32], request: &Request, spec: &SampleSpec) -> u32 {
    let params = &request.sampling;
    let row = &mut row.to_vec()[..];
    ban(row, &spec.banned);
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = row.get_mut(id as usize) {
            *logit += bias;
        }
    }
    penalize(row, params, &request.prompt, &spec.output);
    if params.is_greedy() { greedy(row) } else { draw(row, params, uniform(spec)) }
}

/// The largest logit, the lowest id of equal ones.
fn argmax(row: &[f32]) -> Result<u32, NonFinite> {
    /// All bits of the exponent: set in NaN and infinities alone.
    const EXPONENT: u32 = 0x7f80_0000;
    // Independent lanes, so that the compiler can use vector registers: this runs over every row.
    const LANES: usize = 16;
    let mut best = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let mut take = |chunk: &[f32]| {
        for ((best, bad), &logit) in best.iter_mut().zip(&mut bad).zip(chunk) {
            *bad |= logit.to_bits() & EXPONENT == EXPONENT;
            *best = if logit > *best { logit } else { *best };
        }
    };
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder();
    chunks.for_each(&mut take);
    take(tail);
    if row.is_empty() || bad.contains(&true) {
        return Err(NonFinite);
    }
    let best = best.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let at = row.iter().position(|logit| *logit == best).unwrap_or(0);
    Ok(at as u32)
}

/// [`argmax`] of a row in which banned tokens are minus infinity.
fn greedy(row: &[f32]) -> u32 {
    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|logit| *logit == best).unwrap_or(0) as u32
}

/// Bans `ids`, unless they are all there is.
fn ban(row: &mut [f32], ids: &[u32]) {
    if ids.is_empty() {
        return;
    }
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted.retain(|id| (*id as usize) < row.len());
    if sorted.len() < row.len() {
        for id in sorted {
            row[id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// The repetition penalty looks at prompt and answer, the other two at the answer alone, as vLLM does.
fn penalize(row: &mut [f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) {
    if !params.has_penalties() {
        return;
    }
    // Every value stays finite; banned tokens keep minus infinity.
    let keep =
        |logit: f32, value: f32| if logit.is_finite() { value.clamp(f32::MIN, f32::MAX) } else { logit };
    if params.repetition_penalty != 1.0 {
        for id in sorted_ids(prompt.iter().chain(output)) {
            if let Some(logit) = row.get_mut(id as usize) {
                let penalty = params.repetition_penalty;
                *logit = keep(*logit, if *logit > 0.0 { *logit / penalty } else { *logit * penalty });
            }
        }
    }
    if params.presence_penalty == 0.0 && params.frequency_penalty == 0.0 {
        return;
    }
    let mut ids = output.to_vec();
    ids.sort_unstable();
    for same in ids.chunk_by(|a, b| a == b) {
        if let Some(logit) = row.get_mut(same[0] as usize) {
            let off = params.presence_penalty + params.frequency_penalty * same.len() as f32;
            *logit = keep(*logit, *logit - off);
        }
    }
}

fn sorted_ids<'a>(ids: impl Iterator<Item = &'a u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = ids.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// A number in `[0, 1)` for this seed, choice and position.
pub(crate) fn uniform(spec: &SampleSpec) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&spec.seed.to_le_bytes());
    key[8..16].copy_from_slice(&u64::from(spec.choice).to_le_bytes());
    key[16..24].copy_from_slice(&(spec.num_output as u64).to_le_bytes());
    let bits = ChaCha8Rng::from_seed(key).next_u64();
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Draws a token. `row` holds logits, minus infinity for banned ones, at least one of them finite.
fn draw(row: &mut [f32], params: &SamplingParams, uniform: f64) -> u32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // The maximum is taken off first, so that a small temperature cannot overflow.
    for logit in row.iter_mut() {
        *logit = (*logit - max) / params.temperature;
    }
    let top_k = if params.top_k == 0 { row.len() } else { params.top_k as usize };
    let min_logit = if params.min_p > 0.0 { params.min_p.ln() } else { f32::NEG_INFINITY };
    if top_k >= row.len() && params.top_p >= 1.0 {
        return draw_in_order(row, min_logit, uniform);
    }
    let mut best = likeliest(row, min_logit, top_k, params.top_p);
    let total: f64 = best.iter().map(|&(_, weight)| weight).sum();
    let mut left = uniform * total;
    let last = best.pop().map_or(0, |(id, _)| id);
    for (id, weight) in best {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    last
}

/// Draws from all tokens not below `min_logit`, in order of id: nothing needs to be sorted.
fn draw_in_order(row: &mut [f32], min_logit: f32, uniform: f64) -> u32 {
    let mut total = 0.0_f64;
    for logit in row.iter_mut() {
        *logit = if *logit >= min_logit { logit.exp() } else { 0.0 };
        total += f64::from(*logit);
    }
    let mut left = uniform * total;
    let mut last = 0;
    for (id, &weight) in row.iter().enumerate() {
        if weight > 0.0 {
            left -= f64::from(weight);
            last = id as u32;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

/// The tokens left by `min_p`, `top_k` and `top_p` with their weights, likeliest first, lower ids first among equals.
fn likeliest(row: &[f32], min_logit: f32, top_k: usize, top_p: f32) -> Vec<(u32, f64)> {
    let mut candidates: Vec<(u32, f32)> = row
        .iter()
        .enumerate()
        .filter(|(_, l)| **l >= min_logit && l.is_finite())
        .map(|(i, l)| (i as u32, *l))
        .collect();
    if top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, likelier);
        candidates.truncate(top_k);
    }
    let all: f64 =
        if top_p < 1.0 { candidates.iter().map(|(_, l)| f64::from(*l).exp()).sum() } else { f64::INFINITY };
    let enough = f64::from(top_p) * all;
    // Sort only as far as top_p reaches: it is mostly a few tokens of many.
    let mut kept = Vec::new();
    let mut sum = 0.0;
    let mut rest = &mut candidates[..];
    let mut portion = if top_p < 1.0 { 64 } else { rest.len() };
    while !rest.is_empty() {
        let count = portion.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, likelier);
        }
        let (now, later) = rest.split_at_mut(count);
        now.sort_unstable_by(likelier);
        for &mut (id, logit) in now {
            let weight = f64::from(logit).exp();
            kept.push((id, weight));
            sum += weight;
            if sum >= enough {
                return kept;
            }
        }
        rest = later;
        portion *= 8;
    }
    kept
}

/// Order of likelihood; a total order, as ids differ.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// `log(exp(logit) / sum(exp(all)))`.
struct LogSoftmax {
    max: f32,
    log_sum: f64,
}

impl LogSoftmax {
    fn new(row: &[f32], max: f32) -> Self {
        let sum: f64 = row.iter().map(|logit| f64::from((logit - max).exp())).sum();
        Self { max, log_sum: sum.ln() }
    }

    fn of(&self, logit: f32) -> f32 {
        // Never above 0, and never minus infinity, which JSON cannot write.
        ((f64::from(logit) - f64::from(self.max) - self.log_sum) as f32).clamp(f32::MIN, 0.0)
    }

    /// The `k` likeliest tokens of `row`, likeliest first.
    fn top(&self, row: &[f32], k: usize) -> Vec<(u32, f32)> {
        let k = k.min(row.len());
        if k == 0 {
            return Vec::new();
        }
        // Keep the k best seen so far in order; a row needs few insertions.
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
        for (id, &logit) in row.iter().enumerate() {
            if best.len() == k && logit <= best[k - 1].1 {
                continue;
            }
            let at = best.partition_point(|(_, other)| *other >= logit);
            best.insert(at, (id as u32, logit));
            best.truncate(k);
        }
        best.into_iter().map(|(id, logit)| (id, self.of(logit))).collect()
    }
}

#[cfg(test)]
mod tests;
