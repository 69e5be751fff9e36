//! Tokens chosen where the logits are, so that only ids come back from a GPU.
//!
//! A request that wants log probabilities needs its rows here; the rows of all others stay where they are. The random
//! number of a draw is the same in both places: it depends on the request's seed, choice and position alone.

use candle_core::{Device, Tensor};
use ingle_models::{SampleRow, sample};

use super::recovery::StepError;
use crate::backend::SampleResult;
use crate::plan::{ScheduledSeq, StepPlan};
use crate::sampler::uniform;

/// The choices of the sequences of `plan` that need nothing but a token; `None` for the others. `counts`: rows of
/// `logits` of each sequence.
pub(super) fn choose(
    plan: &StepPlan,
    counts: &[usize],
    logits: &Tensor,
    vocab_size: usize,
) -> Result<Vec<Option<SampleResult>>, StepError> {
    let mut chosen = vec![None; plan.seqs.len()];
    let (mut rows, mut wanted, mut seqs) = (Vec::new(), Vec::new(), Vec::new());
    let mut row = 0;
    for (seq, (part, count)) in plan.seqs.iter().zip(counts).enumerate() {
        if *count == 1
            && let Some(how) = plain(part)
        {
            rows.push(row);
            wanted.push(how);
            seqs.push(seq);
        }
        row += *count;
    }
    if rows.is_empty() {
        return Ok(chosen);
    }
    let logits = pick(logits, &rows, row)?;
    let width = logits.dim(1)?;
    // Columns beyond the tokenizer's are padding.
    let logits = if width > vocab_size { logits.narrow(1, 0, vocab_size)?.contiguous()? } else { logits };
    let tokens = sample(&logits, &wanted).map_err(ingle_models::Error::from)?;
    for (seq, token) in seqs.into_iter().zip(tokens) {
        chosen[seq] = Some(match token {
            Some(id) => SampleResult::Token { id, logprobs: None },
            None => SampleResult::NonFinite,
        });
    }
    Ok(chosen)
}

/// The rows of sequences that `chosen` has nothing for, in order.
pub(super) fn rest(
    logits: &Tensor,
    counts: &[usize],
    chosen: &[Option<SampleResult>],
) -> Result<Option<Tensor>, StepError> {
    let mut rows = Vec::new();
    let mut row = 0;
    for (count, chosen) in counts.iter().zip(chosen) {
        if chosen.is_none() {
            rows.extend(row..row + count);
        }
        row += count;
    }
    if rows.is_empty() { Ok(None) } else { Ok(Some(pick(logits, &rows, row)?)) }
}

/// How the token is chosen, if that is all there is to do.
fn plain(part: &ScheduledSeq) -> Option<SampleRow<'_>> {
    let (request, spec) = (part.req.get(), part.sample.as_ref()?);
    let params = &request.sampling;
    if params.logprobs.is_some() || !part.prompt_rows().is_empty() {
        return None;
    }
    Some(SampleRow {
        temperature: (!params.is_greedy()).then_some(params.temperature),
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        prompt: &request.prompt,
        output: &spec.output,
        banned: &spec.banned,
        logit_bias: &params.logit_bias,
        uniform: if params.is_greedy() { 0.0 } else { uniform(spec) },
    })
}

/// Rows `rows`, ascending, of `logits`, which has `all`.
fn pick(logits: &Tensor, rows: &[usize], all: usize) -> Result<Tensor, StepError> {
    if rows.len() == all {
        return Ok(logits.clone());
    }
    let ids: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
    let ids = Tensor::new(ids.as_slice(), &Device::Cpu)?.to_device(logits.device())?;
    Ok(logits.index_select(&ids, 0)?)
}
