//! One choice of one request while it is in the engine.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::block_hash::{BlockHash, BlockHasher};
use crate::block_pool::BlockId;
use crate::plan::{Place, RequestId, SeqId, StepId};
use crate::request::{TokenLogprobs, ValidatedRequest};

/// Who goes first: lower priority value, then earlier request, then earlier choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    pub(crate) request: RequestId,
    pub(crate) choice: u16,
}

/// Where a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeqStatus {
    /// In the queue; holds blocks only if it was paused and resumed.
    Waiting,
    /// Takes part in steps.
    Running,
    /// Left out of steps until its reader catches up. Keeps its blocks as long as nobody needs them.
    Paused,
}

/// A sequence: its tokens and its blocks.
///
/// ```text
/// tokens:     | prompt ................ | output ...... | unknown |
/// computed:   |== confirmed ==|= in flight =|                     |   confirmed <= num_computed <= num_tokens
/// ```
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) rank: Rank,
    pub(crate) req: Arc<ValidatedRequest>,
    pub(crate) seed: u64,
    pub(crate) status: SeqStatus,
    /// Answer tokens so far.
    pub(crate) output: Vec<u32>,
    /// Answer tokens after those, which steps in flight choose.
    pub(crate) unknown: VecDeque<Place>,
    /// Answer tokens at most: `max_tokens`, or what is left of the context.
    pub(crate) max_output: usize,
    pub(crate) block_table: Vec<BlockId>,
    /// Tokens given to steps.
    pub(crate) num_computed: usize,
    /// Tokens of completed steps.
    pub(crate) num_confirmed: usize,
    /// Tokens that were confirmed before blocks were lost.
    pub(crate) num_lost: usize,
    /// Latest step with a part of this sequence, while it is in flight.
    pub(crate) last_step: Option<StepId>,
    /// Blocks that are set aside for this sequence and not yet in its table.
    pub(crate) reserved: usize,
    pub(crate) preemptions: u32,
    /// Times that a later sequence was taken while this one was the head of the queue.
    pub(crate) passed: u32,
    /// Has been in a step before.
    pub(crate) started: bool,
    /// Hashes of full blocks, as far as they were needed.
    hashes: Vec<BlockHash>,
    root: BlockHash,
    /// Gathered over the prompt's chunks; `None` if not asked for or already sent.
    pub(crate) prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

impl Sequence {
    pub(crate) fn new(
        id: SeqId,
        rank: Rank,
        req: Arc<ValidatedRequest>,
        seed: u64,
        max_output: usize,
        root: BlockHash,
    ) -> Self {
        let prompt_logprobs = (rank.choice == 0 && req.get().prompt_logprobs.is_some()).then(Vec::new);
        Self {
            id,
            rank,
            req,
            seed,
            status: SeqStatus::Waiting,
            output: Vec::new(),
            unknown: VecDeque::new(),
            max_output,
            block_table: Vec::new(),
            num_computed: 0,
            num_confirmed: 0,
            num_lost: 0,
            last_step: None,
            reserved: 0,
            preemptions: 0,
            passed: 0,
            started: false,
            hashes: Vec::new(),
            root,
            prompt_logprobs,
        }
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.req.get().prompt.len()
    }

    /// Answer tokens chosen or being chosen.
    pub(crate) fn num_output(&self) -> usize {
        self.output.len() + self.unknown.len()
    }

    /// Tokens of prompt and answer that steps compute, unknown ones included: not the last the answer may have, after
    /// which nothing is chosen.
    pub(crate) fn num_tokens(&self) -> usize {
        (self.prompt_len() + self.num_output()).min(self.max_cached_tokens())
    }

    /// Tokens that no step was given yet: known ones, or the last unknown one alone.
    pub(crate) fn num_pending(&self) -> usize {
        self.num_tokens() - self.num_computed
    }

    /// Whether nothing of it can be planned until all its tokens are known.
    pub(crate) fn needs_values(&self) -> bool {
        !self.unknown.is_empty() && self.num_pending() > 0 && self.req.get().sampling.has_penalties()
    }

    /// Tokens that the cache must hold at the longest: the last answer token is never computed.
    pub(crate) fn max_cached_tokens(&self) -> usize {
        self.prompt_len() + self.max_output.saturating_sub(1)
    }

    /// Tokens `start..end` of prompt and answer, all of them known.
    pub(crate) fn tokens(&self, start: usize, end: usize) -> Vec<u32> {
        let prompt = &self.req.get().prompt;
        let cut = prompt.len();
        let mut tokens = Vec::with_capacity(end - start);
        tokens.extend_from_slice(&prompt[start.min(cut)..end.min(cut)]);
        tokens.extend_from_slice(&self.output[start.max(cut) - cut..end.max(cut) - cut]);
        tokens
    }

    /// Hash of block `idx` and of the one before it. The block's tokens must all be known.
    pub(crate) fn block_hash(
        &mut self,
        hasher: &BlockHasher,
        block_size: usize,
        idx: usize,
    ) -> (BlockHash, BlockHash) {
        while self.hashes.len() <= idx {
            let at = self.hashes.len();
            let tokens = self.tokens(at * block_size, (at + 1) * block_size);
            let parent = self.hashes.last().unwrap_or(&self.root);
            self.hashes.push(hasher.block(parent, &tokens));
        }
        let parent = idx.checked_sub(1).map_or(self.root, |before| self.hashes[before]);
        (self.hashes[idx], parent)
    }

    /// Forgets what the lost blocks held. No step in flight computes it, so all its tokens are known.
    pub(crate) fn reset_computed(&mut self) {
        debug_assert!(self.unknown.is_empty(), "a step in flight chooses its next token");
        self.num_lost = self.num_lost.max(self.num_confirmed);
        self.num_computed = 0;
        self.num_confirmed = 0;
        if let Some(entries) = &mut self.prompt_logprobs {
            entries.clear();
        }
    }
}
