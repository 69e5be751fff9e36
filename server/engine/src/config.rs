//! Sizes the engine runs with.

use std::time::Duration;

/// Settings of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Token slots per cache block.
    pub block_size: usize,
    /// Blocks in the cache.
    pub num_blocks: usize,
    /// Sequences in one step at most.
    pub max_num_seqs: usize,
    /// Tokens in one step at most (the token budget of chunked prefill).
    pub max_num_batched_tokens: usize,
    /// Prompt plus answer of one sequence at most, in tokens; never more than the cache holds.
    pub max_model_len: usize,
    /// Requests that may wait; one more is refused as overload.
    pub max_num_queued_reqs: usize,
    /// Whether finished blocks are kept for later prompts with the same beginning.
    pub enable_prefix_caching: bool,
    /// Whether a prompt may be split over steps.
    pub enable_chunked_prefill: bool,
    /// Seed of requests that bring none.
    pub seed: u64,
}

/// What a request may ask for; from the model and the config.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Ids below this are tokens of the model.
    pub vocab_size: usize,
    /// See [`EngineConfig::max_model_len`].
    pub max_model_len: usize,
    /// Choices of one request at most.
    pub max_n: usize,
    /// Alternatives per token that may be asked for.
    pub max_logprobs: usize,
    /// Entries of `logit_bias` and of `stop_token_ids` at most.
    pub max_token_list: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            block_size: 16,
            num_blocks: 1024,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_model_len: 2048,
            max_num_queued_reqs: 256,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            seed: 0,
        }
    }
}

impl EngineConfig {
    /// The same with every size raised or cut to what can work: no zeros; a budget that holds one token of every
    /// running sequence, and a whole prompt if prompts may not be split; a context that the cache holds.
    #[must_use]
    pub fn normalized(mut self) -> Self {
        self.block_size = self.block_size.max(1);
        self.num_blocks = self.num_blocks.max(1);
        self.max_num_seqs = self.max_num_seqs.max(1);
        let cached = self.num_blocks.saturating_mul(self.block_size);
        // The last token of a sequence is never stored.
        self.max_model_len = self.max_model_len.clamp(1, cached.saturating_add(1));
        self.max_num_batched_tokens = self.max_num_batched_tokens.max(self.max_num_seqs);
        if !self.enable_chunked_prefill {
            self.max_num_batched_tokens = self.max_num_batched_tokens.max(self.max_model_len);
        }
        self
    }
}

/// Times after which the engine loses patience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Work waits and no step has completed for this long: the engine is not healthy.
    pub step: Duration,
    /// A reader with a full stream has taken no event for this long: its request is cancelled.
    pub reader: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { step: Duration::from_secs(10), reader: Duration::from_secs(30) }
    }
}
