//! Sizes the engine runs with.

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
