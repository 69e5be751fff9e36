//! The shapes on the wire, nothing else. What is sent is serialised from these; what is received is read field by
//! field (`validate.rs`, `params.rs`), and the request types here only describe it for the OpenAPI document.

pub use super::encode_types::*;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

pub use super::tier::{LoadBody, TierBody, UsageList};
use crate::tier::card::TierCard;

/// Tokens that were counted.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct UsageBody {
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Generated tokens of all choices, end tokens included.
    pub completion_tokens: u64,
    /// The sum of both.
    pub total_tokens: u64,
    /// Of the prompt tokens.
    pub prompt_tokens_details: PromptTokensDetails,
    /// Where the time went.
    pub receipt: Receipt,
}

/// Where the time of a request went. With several prompts or choices, the longest of each.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Receipt {
    /// Milliseconds in the queue.
    pub queue_ms: f64,
    /// Milliseconds from there to the first token.
    pub prefill_ms: f64,
    /// Milliseconds from the first token to the last so far.
    pub decode_ms: f64,
    /// Answer tokens after the first of each prompt, per second of decode; null without any.
    pub tokens_per_second: Option<f64>,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
}

/// The answer to a chat request.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// Id of the answer.
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The name the request used.
    pub model: String,
    /// Version of the server.
    pub system_fingerprint: &'static str,
    /// As many as `n`.
    pub choices: Vec<ChatChoice>,
    /// Counts.
    pub usage: UsageBody,
}

/// One choice of a chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// From 0.
    pub index: usize,
    /// What the assistant says.
    pub message: AssistantMessage,
    /// If asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

/// A message of the assistant.
#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// Always null.
    pub refusal: Option<String>,
}

/// Log probabilities of an answer's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null.
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// One token of a chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Its text; with U+FFFD where it is a part of a character.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The likeliest tokens at its place, likeliest first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One alternative.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// One event of a chat stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk<'a> {
    /// The same in all events of a stream.
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Seconds since 1970; the same in all events.
    pub created: u64,
    /// The name the request used.
    pub model: &'a str,
    /// Version of the server.
    pub system_fingerprint: &'static str,
    /// One, or none in the event that carries the usage.
    pub choices: Vec<ChunkChoice>,
    /// Only if asked for: null, or the counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<UsageBody>)]
    pub usage: Option<Option<UsageBody>>,
}

/// One choice of a chat event.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// From 0.
    pub index: usize,
    /// What is new.
    pub delta: Delta,
    /// Of the new tokens, if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// In the last event of the choice.
    pub finish_reason: Option<&'static str>,
}

/// What an event adds to the message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// In the first event of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// The answer to a completion request, and one event of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct Completion<'a> {
    /// Id of the answer; the same in all events of a stream.
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The name the request used.
    pub model: &'a str,
    /// Version of the server.
    pub system_fingerprint: &'static str,
    /// Prompt by prompt, `n` each.
    pub choices: Vec<CompletionChoice>,
    /// Counts. In streams only if asked for: null, or the counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<UsageBody>)]
    pub usage: Option<Option<UsageBody>>,
}

/// One choice of a completion.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Number of the prompt times `n` plus number of the choice.
    pub index: usize,
    /// The text; with `echo`, after the prompt.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null in events before the last.
    pub finish_reason: Option<&'static str>,
}

/// Log probabilities of a completion's tokens: four lists of one length.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token begins in `text`, in characters.
    pub text_offset: Vec<usize>,
    /// Of each token; null for the first of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens as text; `bytes:\x..` where they are parts of characters.
    pub tokens: Vec<String>,
    /// The likeliest tokens at each place and the one that stands there; null for the first of a prompt.
    #[schema(value_type = Vec<Option<std::collections::HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
}

/// One model of the list.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelObject {
    /// A name requests may use.
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// Who is named as its owner.
    pub owned_by: String,
    /// What was loaded.
    pub root: String,
    /// The name this one is an alias of.
    pub parent: Option<String>,
    /// Tokens of prompt and answer at most; of an encoder: tokens of an input.
    pub max_model_len: usize,
    /// `generate`, `embed` or `rerank`.
    pub task: &'static str,
    /// Numbers of an embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<usize>,
    /// What routers have to know; see `/tier`.
    pub tier_card: Option<TierCard>,
}

/// The list of models.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`
    pub object: &'static str,
    /// Every served name, the model's own first.
    pub data: Vec<ModelObject>,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    /// Number of tokens.
    pub count: usize,
    /// Tokens of prompt and answer at most.
    pub max_model_len: usize,
    /// The token ids.
    pub tokens: Vec<u32>,
    /// The tokens as text, if asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Answer of `/detokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}

/// Answer of `/v1/chat/completions/render`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Rendered {
    /// The ids the model would read.
    pub token_ids: Vec<u32>,
    /// The same as text, special tokens included.
    pub prompt: String,
}

/// Answer of `/health`, `/ready`.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthBody {
    /// `ok` or `ready`.
    pub status: &'static str,
}

/// Answer of `/version`.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionBody {
    /// Version of the server.
    pub version: &'static str,
}

/// A message of a chat request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct ChatMessage {
    /// `system`, `developer` (the same), `user`, `assistant`, `tool`.
    role: String,
    /// Text, or an array of `{"type": "text", "text": ...}` parts, which are joined without a separator.
    #[schema(value_type = Object)]
    content: Option<Value>,
    /// Name of the speaker, for templates that use it.
    name: Option<String>,
    /// Earlier tool calls of the assistant.
    #[schema(value_type = Option<Vec<Object>>)]
    tool_calls: Option<Value>,
    /// Which call a `tool` message answers.
    tool_call_id: Option<String>,
}

/// Options of a stream.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct StreamOptions {
    /// One event with the usage before the end.
    include_usage: Option<bool>,
    /// The usage so far in every event, and one at the end.
    continuous_usage_stats: Option<bool>,
}

/// Parameters that chat and completions share.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct SharedParameters {
    /// One of the served names; absent: the first of them.
    model: Option<String>,
    /// Answer tokens at most. Prompt and `max_tokens` together must fit the context, else the request is refused.
    /// Absent: what the context leaves, up to the server's default limit.
    max_tokens: Option<u32>,
    /// 0 (below 1e-5) is greedy.
    #[schema(minimum = 0, maximum = 2, default = 1)]
    temperature: Option<f32>,
    /// Smallest set of tokens with at least this probability, above 0.
    #[schema(maximum = 1, default = 1)]
    top_p: Option<f32>,
    /// The k likeliest tokens; 0 or -1: all.
    top_k: Option<i64>,
    /// Tokens at least this share as likely as the likeliest.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Divides the logits of tokens seen; from 0.01 to 10.
    repetition_penalty: Option<f32>,
    /// Subtracted once from tokens of the answer.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// Subtracted for each time a token is in the answer.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Token ids as keys, numbers from -100 to 100.
    #[schema(value_type = Option<std::collections::HashMap<String, f32>>)]
    logit_bias: Option<Value>,
    /// Same seed, same prompt: same answer.
    seed: Option<i64>,
    /// Number of choices.
    #[schema(minimum = 1)]
    n: Option<u32>,
    /// A string or an array of strings that end the answer and are not part of it.
    #[schema(value_type = Option<Vec<String>>)]
    stop: Option<Value>,
    /// Token ids that end the answer.
    stop_token_ids: Option<Vec<u32>>,
    /// The model's end tokens do not end the answer.
    ignore_eos: Option<bool>,
    /// No end token before so many.
    min_tokens: Option<u32>,
    /// Whether the answer comes as server-sent events.
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptions>,
    /// Lower runs first.
    priority: Option<i32>,
    /// Seconds the caller gives the request; one whose first token is expected later is refused at once. The header
    /// `x-request-timeout` says the same.
    timeout: Option<f32>,
    /// Requests share cached prefixes only under the same salt (and the same API key).
    cache_salt: Option<String>,
    /// Whether special tokens are left out of the text.
    #[schema(default = true)]
    skip_special_tokens: Option<bool>,
    /// Keep only so many tokens of the prompt's end; -1: as many as fit.
    truncate_prompt_tokens: Option<i64>,
}

/// A chat request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct ChatRequest {
    /// The conversation. A last message of the assistant is a finished turn, unless `continue_final_message` is set.
    messages: Vec<ChatMessage>,
    /// The newer name of `max_tokens`; it counts if both are there.
    max_completion_tokens: Option<u32>,
    /// Report the log probability of each token.
    logprobs: Option<bool>,
    /// Alternatives per token; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    /// Whether the prompt ends with the beginning of the assistant's turn. Default: yes.
    add_generation_prompt: Option<bool>,
    /// The answer goes on where the last message of the assistant ends.
    continue_final_message: Option<bool>,
    /// Scalars for the chat template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Value>,
    #[serde(flatten)]
    shared: SharedParameters,
}

/// A completion request.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the request in the OpenAPI document")]
pub struct CompletionRequest {
    /// A string, an array of strings, an array of token ids, or an array of such arrays.
    #[schema(value_type = Object)]
    prompt: Value,
    /// Put the prompt before the text. With `max_tokens` 0 the prompt is scored and nothing is generated.
    echo: Option<bool>,
    /// Report log probabilities and so many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u32>,
    /// Whether the tokenizer adds its special tokens to text prompts. Default: yes.
    add_special_tokens: Option<bool>,
    #[serde(flatten)]
    shared: SharedParameters,
}
