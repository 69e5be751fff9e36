//! What one step computes: plain data, complete in itself, so that a backend needs no look at the scheduler and a
//! step may be carried out while the next is planned.

use std::sync::Arc;

use crate::block_pool::BlockId;
use crate::request::ValidatedRequest;

/// Number of a request, in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Number of a sequence: one choice of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Number of a step, counted from 1. Steps complete in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub u64);

/// The work of one step.
#[derive(Debug, Clone)]
pub struct StepPlan {
    /// Its number.
    pub step: StepId,
    /// Token slots per block.
    pub block_size: usize,
    /// One entry a sequence.
    pub seqs: Vec<ScheduledSeq>,
}

impl StepPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    /// Tokens of all sequences.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.seqs.iter().map(|seq| seq.tokens.count()).sum()
    }
}

/// A token that a step in flight chooses: what it is will be known when that step has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The step.
    pub step: StepId,
    /// Which of that step's sequences.
    pub seq: usize,
}

/// The tokens that a sequence brings to a step.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StepTokens {
    /// Known ones; never empty.
    Known(Vec<u32>),
    /// One that is not known yet.
    Chosen(Place),
}

impl StepTokens {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Chosen(_) => 1,
        }
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone)]
pub struct ScheduledSeq {
    /// The sequence.
    pub seq: SeqId,
    /// The request it belongs to.
    pub request: RequestId,
    /// Tokens to compute now.
    pub tokens: StepTokens,
    /// Position of the first of them; all before it are in the cache.
    pub start: usize,
    /// Blocks of the sequence, enough for the tokens before `start` and those of this step.
    pub block_table: Vec<BlockId>,
    /// How to choose the token after the last one; `None` if this is not the end of what is known.
    pub sample: Option<SampleSpec>,
    /// Report the log probabilities of prompt tokens whose predecessor is computed here, and this many alternatives.
    pub prompt_logprobs: Option<u8>,
    /// The request as it came.
    pub req: Arc<ValidatedRequest>,
}

impl ScheduledSeq {
    /// Tokens of the sequence in the cache after this step.
    #[must_use]
    pub fn end(&self) -> usize {
        self.start + self.tokens.count()
    }

    /// Rows of this sequence (0 is the first token of this step) that predict a later prompt token.
    #[must_use]
    pub fn prompt_rows(&self) -> std::ops::Range<usize> {
        let prompt_len = self.req.get().prompt.len();
        let end =
            if self.prompt_logprobs.is_some() { self.end().min(prompt_len.saturating_sub(1)) } else { 0 };
        0..end.saturating_sub(self.start)
    }
}

/// How one token is chosen, besides the request's own parameters.
#[derive(Debug, Clone)]
pub struct SampleSpec {
    /// Which choice of the request.
    pub choice: u16,
    /// Answer tokens before this one.
    pub num_output: usize,
    /// The answer so far, if a penalty needs it; else empty.
    pub output: Vec<u32>,
    /// Random stream of the request.
    pub seed: u64,
    /// Ids that must not be chosen yet (`min_tokens`).
    pub banned: Vec<u32>,
}
