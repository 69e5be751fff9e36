//! The shapes on the wire of the routes that embed and rank; see `types.rs`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// Tokens that were counted.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    /// Tokens of all inputs, special ones included.
    pub prompt_tokens: u64,
    /// The same.
    pub total_tokens: u64,
}

/// A vector.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum EmbeddingVector {
    /// Numbers.
    Float(Vec<f32>),
    /// Their bytes (f32, little-endian) in base64.
    Base64(String),
}

/// The vector of one input.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingObject {
    /// `embedding`
    pub object: &'static str,
    /// The input's place in the request.
    pub index: usize,
    /// The vector.
    pub embedding: EmbeddingVector,
    /// Tokens that were cut off; only where cutting was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped_tokens: Option<usize>,
}

/// The answer to an embeddings request.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingList {
    /// `list`
    pub object: &'static str,
    /// One entry an input, in order.
    pub data: Vec<EmbeddingObject>,
    /// The name the request used.
    pub model: String,
    /// What was computed.
    pub usage: EmbeddingUsage,
}

/// A document of a rerank answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankDocument {
    /// Its text.
    pub text: String,
}

/// A document's place in the ranking.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankResult {
    /// Its place in the request.
    pub index: usize,
    /// How well it answers the query.
    pub relevance_score: f32,
    /// With `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<RerankDocument>,
    /// Tokens of the pair that were cut off; only where cutting was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped_tokens: Option<usize>,
}

/// What was computed.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankUsage {
    /// Tokens of all pairs, special ones included.
    pub prompt_tokens: u64,
    /// The same.
    pub total_tokens: u64,
}

/// Which API this is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ApiVersion {
    /// `2`
    pub version: &'static str,
}

/// What it costs: nothing.
#[derive(Debug, Serialize, ToSchema)]
pub struct BilledUnits {
    /// 0
    pub search_units: u32,
}

/// What Cohere's clients look for.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankMeta {
    /// Which API this is.
    pub api_version: ApiVersion,
    /// What it costs.
    pub billed_units: BilledUnits,
}

/// The answer to a rerank request.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankList {
    /// Id of the answer.
    pub id: String,
    /// The name the request used.
    pub model: String,
    /// The best first.
    pub results: Vec<RerankResult>,
    /// What was computed.
    pub usage: RerankUsage,
    /// What Cohere's clients look for.
    pub meta: RerankMeta,
}

/// A text's place in the ranking, in the shape of text-embeddings-inference.
#[derive(Debug, Serialize, ToSchema)]
pub struct TeiRank {
    /// Its place in the request.
    pub index: usize,
    /// How well it answers the query.
    pub score: f32,
    /// With `return_text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// The score of one pair.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScoreObject {
    /// The pair's place.
    pub index: usize,
    /// `score`
    pub object: &'static str,
    /// The reranker's score, or the cosine.
    pub score: f32,
    /// Tokens of the pair that were cut off; only where cutting was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped_tokens: Option<usize>,
}

/// The answer to a score request.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScoreList {
    /// Id of the answer.
    pub id: String,
    /// `list`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The name the request used.
    pub model: String,
    /// One entry a pair, in order.
    pub data: Vec<ScoreObject>,
    /// What was computed.
    pub usage: EmbeddingUsage,
}

/// Facts of a model, in the shape of text-embeddings-inference.
#[derive(Debug, Serialize, ToSchema)]
pub struct TeiInfo {
    /// What was loaded.
    pub model_id: String,
    /// Not known.
    pub model_sha: Option<String>,
    /// Type of the weights.
    pub model_dtype: String,
    /// `{"embedding": {"pooling": ..}}` or `{"reranker": {..}}`
    #[schema(value_type = Object)]
    pub model_type: Value,
    /// Inputs that may wait.
    pub max_concurrent_requests: usize,
    /// Tokens of an input at most.
    pub max_input_length: usize,
    /// Tokens of a batch at most.
    pub max_batch_tokens: usize,
    /// Not limited.
    pub max_batch_requests: Option<usize>,
    /// Inputs of a request at most.
    pub max_client_batch_size: usize,
    /// Whether inputs that are too long are cut.
    pub auto_truncate: bool,
    /// Threads that turn text into tokens.
    pub tokenization_workers: usize,
    /// Version of the server.
    pub version: &'static str,
}

/// An embeddings request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct EmbeddingRequest {
    /// A name of an embedding model. Default: the first.
    model: Option<String>,
    /// A string, an array of strings, an array of token ids, or an array of such arrays. Ids are taken as they are, with
    /// no special tokens added.
    #[schema(value_type = Object)]
    input: Value,
    /// `float` or `base64`.
    #[schema(default = "float")]
    encoding_format: Option<String>,
    /// Fewer numbers, where the model was trained for it.
    dimensions: Option<u32>,
    /// For the client's own use.
    user: Option<String>,
    /// Cut inputs to so many tokens; -1: to what the model takes. Each item of the answer then has `dropped_tokens`.
    truncate_prompt_tokens: Option<i64>,
    /// Cut inputs to what the model takes. Default: as the server was started.
    truncate: Option<bool>,
    /// `Right`: the beginning is kept. `Left`: the end.
    truncation_direction: Option<String>,
    /// `query` or `document`: the model's own text for that goes before each input, where it has one.
    input_type: Option<String>,
    /// Name of one of the model's prompts, which goes before each input.
    prompt_name: Option<String>,
}

/// A rerank request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct RerankRequest {
    /// A name of a reranker. Default: the first.
    model: Option<String>,
    /// What is asked.
    query: String,
    /// Strings, or objects with a `text`.
    #[schema(value_type = Vec<Object>)]
    documents: Option<Vec<Value>>,
    /// Instead of `documents`: the answer then has the shape of text-embeddings-inference.
    texts: Option<Vec<String>>,
    /// Only the best. Default: all.
    top_n: Option<u32>,
    /// Whether the answer repeats the documents. Default: no.
    return_documents: Option<bool>,
    /// With `texts`: whether the answer repeats them. Default: no.
    return_text: Option<bool>,
    /// With `texts`: logits instead of numbers from 0 to 1.
    raw_scores: Option<bool>,
    /// Cut each document to so many tokens.
    max_tokens_per_doc: Option<u32>,
    /// Cut pairs to so many tokens, the longer text first; -1: to what the model takes.
    truncate_prompt_tokens: Option<i64>,
    /// Cut pairs to what the model takes. Default: as the server was started.
    truncate: Option<bool>,
}

/// A score request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct ScoreRequest {
    /// A name of a reranker or an embedding model. Default: the first reranker, else the first embedding model.
    model: Option<String>,
    /// A string or an array of strings; also called `queries`.
    #[schema(value_type = Object)]
    text_1: Value,
    /// A string or an array of strings; also called `documents`.
    #[schema(value_type = Object)]
    text_2: Value,
    /// Cut to so many tokens; -1: to what the model takes.
    truncate_prompt_tokens: Option<i64>,
}
