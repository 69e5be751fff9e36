//! The tier card: what a router has to know about a model here.

use serde::Serialize;
use utoipa::ToSchema;

/// What is fixed about a served model.
#[derive(Debug, Clone, Default)]
pub struct ModelFacts {
    /// `chat`, `completion`, `embeddings` or `rerank`.
    pub task: &'static str,
    /// Prompt plus answer at most, in tokens.
    pub context: usize,
    /// Answer tokens at most; 0 for models that generate nothing.
    pub max_tokens: usize,
    /// Length of an embedding.
    pub dimensions: Option<usize>,
    /// Sequences that run at once.
    pub capacity: usize,
    /// Type of the weights, such as `bf16`.
    pub dtype: Option<String>,
    /// How the weights were rounded, if they were.
    pub quantization: Option<String>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
}

/// What a router has to know about one name.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TierCard {
    /// The name requests use.
    pub name: String,
    /// `local`
    pub tier: &'static str,
    /// Cost of a thousand tokens; null while it depends on a speed that was not measured yet.
    pub cost_per_1k: Option<f64>,
    /// Answer tokens at most.
    pub max_tokens: usize,
    /// 95th percentile of whole requests' time in milliseconds, measured; null until there is one.
    pub latency_p95: Option<f64>,
    /// Share of the time, and of the requests, that were served, 0 to 1, measured; null until there is one.
    pub availability: Option<f64>,
    /// Prompt plus answer at most, in tokens.
    pub context: usize,
    /// `chat`, `completion`, `embeddings` or `rerank`.
    pub task: &'static str,
    /// Length of an embedding.
    pub dimensions: Option<usize>,
    /// Sequences that run at once.
    pub capacity: usize,
    /// Type of the weights.
    pub dtype: Option<String>,
    /// How the weights were rounded; null: as they are.
    pub quantization: Option<String>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
    /// Measured speeds.
    pub speed: Speed,
    /// What the numbers rest on.
    pub measured: Measured,
}

/// Speeds as measured; null where nothing was.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct Speed {
    /// Median over requests, of prompt tokens computed.
    pub prefill_tokens_per_second: Option<f64>,
    /// Median over requests, of answer tokens after the first.
    pub decode_tokens_per_second: Option<f64>,
    /// Median over requests, of tokens embedded or scored.
    pub embedding_tokens_per_second: Option<f64>,
    /// 95th percentile of the time to the first token, in milliseconds.
    pub first_token_p95: Option<f64>,
    /// Tokens of prompts and answers together, per second of computing.
    pub tokens_per_busy_second: Option<f64>,
}

/// What the numbers of a card rest on.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct Measured {
    /// `requests`, or `probe` while the window has none; null: nothing was measured.
    pub source: Option<&'static str>,
    /// Requests in the window.
    pub requests: usize,
    /// Length of the window.
    pub window_seconds: u64,
}
