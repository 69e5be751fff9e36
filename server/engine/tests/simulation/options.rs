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
    /// Steps are computed as soon as they are planned, else when they are completed; a device does so in between.
    pub(crate) early: bool,
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
    /// Chance of a prompt that needs most of the cache.
    pub(crate) huge: f64,
    /// Chance that a request ignores the end token.
    pub(crate) ignore_eos: f64,
    /// Chance that a request wants penalties, which look at the values of tokens.
    pub(crate) penalties: f64,
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
        let options = Self {
            config,
            depth: [1, 2, 2, 3][rng.random_range(0..4)],
            early: rng.random_bool(0.3),
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
            huge: 0.0,
            ignore_eos: rng.random_range(0.0..1.0),
            penalties: sometimes(&mut rng, 0.3, 0.4),
        };
        let mut options = match seed % 16 {
            1 | 9 => options.pressed(&mut rng),
            5 => options.crowded(&mut rng),
            _ => options,
        };
        options.config = options.config.normalized();
        options
    }

    /// Answers that together need several times the cache: sequences take blocks from each other.
    fn pressed(mut self, rng: &mut ChaCha8Rng) -> Self {
        let blocks = rng.random_range(4..=24);
        let capacity = blocks * self.config.block_size;
        self.config.num_blocks = blocks;
        self.config.max_num_seqs = 8;
        self.config.max_num_batched_tokens = 8 + capacity;
        self.config.max_model_len = capacity;
        self.max_prompt = (capacity / 4).clamp(1, 60);
        self.max_tokens = (capacity as u32 / 2).clamp(1, 80);
        self.ignore_eos = 1.0;
        self.arrival = 1.0;
        self
    }

    /// A stream of small requests with a large one among them now and then, which must not starve.
    fn crowded(mut self, rng: &mut ChaCha8Rng) -> Self {
        self.config.block_size = 4;
        self.config.num_blocks = rng.random_range(12..=20);
        self.config.max_num_seqs = 8;
        self.config.max_num_batched_tokens = 64;
        self.config.max_model_len = self.config.num_blocks * 4;
        self.num_requests = 200;
        self.arrival = 1.0;
        self.burst = 3;
        self.max_prompt = 6;
        self.max_tokens = 8;
        self.huge = 0.03;
        self.choices = 1;
        self.slow_reader = 0.0;
        self
    }
}
