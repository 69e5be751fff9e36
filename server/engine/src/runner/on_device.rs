//! Tokens chosen where the logits are, so that only ids come back from a GPU; the next step can take them from there.
//!
//! A request that wants log probabilities needs its rows here; the rows of all others stay where they are. The random
//! number of a draw is the same in both places: it depends on the request's seed, choice and position alone.

use candle_core::Tensor;
use ingle_models::{ChosenTokens, SampleRow, choose, upload_ids};

use super::recovery::StepError;
use crate::backend::SampleResult;
use crate::plan::{ScheduledSeq, StepPlan};
use crate::sampler::uniform;

/// Tokens of some sequences of a step.
#[derive(Debug)]
pub(super) struct Chosen {
    /// The sequences, ascending.
    pub(super) seqs: Vec<usize>,
    /// The token of each.
    pub(super) tokens: ChosenTokens,
}

impl Chosen {
    /// Which of the tokens is that of sequence `seq`.
    pub(super) fn place_of(&self, seq: usize) -> Option<usize> {
        self.seqs.binary_search(&seq).ok()
    }

    /// The choice of each of the sequences, once they have been made.
    pub(super) fn wait(&self) -> Result<Vec<SampleResult>, StepError> {
        let tokens = self.tokens.wait()?;
        let result = |token: Option<u32>| match token {
            Some(id) => SampleResult::Token { id, logprobs: None },
            None => SampleResult::NonFinite,
        };
        Ok(tokens.into_iter().map(result).collect())
    }
}

/// Chooses for the sequences of `plan` that need nothing but a token; `None` if there are none. `counts`: rows of `logits`
/// of each sequence.
pub(super) fn begin(
    plan: &StepPlan,
    counts: &[usize],
    logits: &Tensor,
    vocab_size: usize,
) -> Result<Option<Chosen>, StepError> {
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
        return Ok(None);
    }
    let logits = pick(logits, &rows, row)?;
    let width = logits.dim(1)?;
    // Columns beyond the tokenizer's are padding.
    let logits = if width > vocab_size { logits.narrow(1, 0, vocab_size)?.contiguous()? } else { logits };
    let tokens = choose(&logits, &wanted)?;
    Ok(Some(Chosen { seqs, tokens }))
}

/// The rows of sequences that `chosen` has nothing for, in order.
pub(super) fn rest(
    logits: &Tensor,
    counts: &[usize],
    chosen: Option<&Chosen>,
) -> Result<Option<Tensor>, StepError> {
    let mut rows = Vec::new();
    let mut row = 0;
    for (seq, count) in counts.iter().enumerate() {
        if chosen.and_then(|chosen| chosen.place_of(seq)).is_none() {
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
    let ids: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    let ids = upload_ids(&ids, logits.device())?;
    Ok(logits.index_select(&ids, 0)?)
}
