//! What a seed stands for.

use ingle_engine::EngineConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of the scripted model.
pub(crate) const VOCAB: u32 = 40;
/// The model's end token.
pub(crate) const EOS: u32 = 0;

/// Everything that shapes one run.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) config: EngineConfig,
    /// Steps in flight at most.
    pub(crate) depth: usize,
    pub(crate) num_requests: usize,
    /// Chance of an arrival in a tick, and requests that come with it at most.
    pub(crate) arrival: f64,
    pub(crate) burst: usize,
    pub(crate) max_prompt: usize,
    pub(crate) max_tokens: u32,
    /// Chances per tick or per request.
    pub(crate) cancel: f64,
    pub(crate) slow_reader: f64,
    pub(crate) fail_step: f64,
    pub(crate) nan_row: f64,
    pub(crate) priorities: i32,
    pub(crate) choices: u16,
    pub(crate) salts: u8,
    pub(crate) score_prompt: f64,
    /// Beginnings that prompts share.
    pub(crate) prefixes: usize,
}

impl Options {
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x0071_0115);
        // Small pools are where things go wrong: most runs have few blocks.
        let num_blocks = 1 << rng.random_range(1..10);
        let num_blocks = rng.random_range(num_blocks.max(4) / 2..=num_blocks);
        let block_size = [1, 2, 3, 4, 5, 8, 16, 32][rng.random_range(0..8)];
        let max_num_seqs = rng.random_range(1..=16);
        let capacity = num_blocks * block_size;
        let chunked = rng.random_bool(0.85);
        let max_prompt = rng.random_range(1..=capacity.clamp(2, 120));
        let config = EngineConfig {
            block_size,
            num_blocks,
            max_num_seqs,
            max_num_batched_tokens: rng.random_range(max_num_seqs..=max_num_seqs + 100),
            max_model_len: rng.random_range(2..=(capacity + 40).min(400)),
            max_num_queued_reqs: usize::MAX,
            enable_prefix_caching: rng.random_bool(0.8),
            enable_chunked_prefill: chunked,
            seed,
        };
        let sometimes = |rng: &mut ChaCha8Rng, chance: f64, rate: f64| {
            if rng.random_bool(chance) { rng.random_range(0.0..rate) } else { 0.0 }
        };
        Self {
            config: config.normalized(),
            depth: [1, 1, 2, 3][rng.random_range(0..4)],
            num_requests: rng.random_range(2..=30),
            arrival: rng.random_range(0.05..1.0),
            burst: rng.random_range(1..=8),
            max_prompt,
            max_tokens: rng.random_range(1..=40),
            cancel: sometimes(&mut rng, 0.5, 0.05),
            slow_reader: sometimes(&mut rng, 0.4, 0.8),
            fail_step: sometimes(&mut rng, 0.3, 0.1),
            nan_row: sometimes(&mut rng, 0.3, 0.05),
            priorities: if rng.random_bool(0.4) { 3 } else { 1 },
            choices: if rng.random_bool(0.4) { 4 } else { 1 },
            salts: if rng.random_bool(0.3) { 2 } else { 1 },
            score_prompt: sometimes(&mut rng, 0.3, 0.3),
            prefixes: rng.random_range(1..=3),
        }
    }
}
