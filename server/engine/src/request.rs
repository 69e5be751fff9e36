//! What goes in and what comes out.

use crate::config::Limits;

/// How tokens are chosen. [`Default`] is greedy-free plain sampling: temperature 1, nothing cut off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 (below 1e-5) is greedy. `0..=2`
    pub temperature: f32,
    /// Smallest set of tokens with at least this probability. `(0, 1]`
    pub top_p: f32,
    /// The k likeliest tokens; 0: all.
    pub top_k: u32,
    /// Tokens at least this share as likely as the likeliest. `[0, 1]`
    pub min_p: f32,
    /// Divides (or multiplies) the logits of tokens seen in prompt or answer. `(0, 10]`
    pub repetition_penalty: f32,
    /// Subtracted once from tokens of the answer. `[-2, 2]`
    pub presence_penalty: f32,
    /// Subtracted for each time a token is in the answer. `[-2, 2]`
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens. `[-100, 100]`
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same prompt: same answer. `None`: drawn from the engine's seed and the request's number.
    pub seed: Option<i64>,
    /// Report each answer token's log probability and this many alternatives.
    pub logprobs: Option<u8>,
    /// No end token before this many answer tokens.
    pub min_tokens: u32,
    /// These end the answer too.
    pub stop_token_ids: Vec<u32>,
    /// The model's end tokens do not end the answer.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// A request as a client means it; only [`Request::validate`] turns it into something the engine accepts.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids; never empty.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Answer tokens per choice at most; 0 only scores the prompt.
    pub max_tokens: u32,
    /// Number of choices.
    pub n: u16,
    /// Lower runs first; equal ones in order of arrival.
    pub priority: i32,
    /// Sequences share cached prefixes only under the same salt (tenant and the request's own cache_salt).
    pub cache_salt: [u8; 32],
    /// Report each prompt token's log probability and this many alternatives.
    pub prompt_logprobs: Option<u8>,
}

/// Why a request is refused: the parameter by its API name and a sentence for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct InvalidRequest {
    /// API name of the parameter at fault.
    pub param: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// A request whose every field was checked. The engine accepts nothing else.
#[derive(Debug, Clone)]
pub struct ValidatedRequest(Request);

impl Request {
    /// Checks every field against `limits`.
    ///
    /// # Errors
    /// The first field at fault.
    pub fn validate(self, limits: &Limits) -> Result<ValidatedRequest, InvalidRequest> {
        let _ = limits;
        Ok(ValidatedRequest(self))
    }
}

impl ValidatedRequest {
    /// The checked fields.
    #[must_use]
    pub fn get(&self) -> &Request {
        &self.0
    }
}

/// Log probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that stands there (natural logarithm, before temperature and cut-offs).
    pub logprob: f32,
    /// The likeliest tokens, likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or one of `stop_token_ids`, which is the id given (not sent as a token).
    Stop(u32),
    /// `max_tokens` or the context is used up.
    Length,
}

/// Counts and times of a request so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens whose keys and values were found in the cache.
    pub cached_tokens: u32,
    /// Tokens generated over all choices, end tokens included.
    pub completion_tokens: u32,
    /// Seconds from submission to the first step that ran a part of it.
    pub queue_seconds: f64,
    /// Seconds from there to the first answer token.
    pub prefill_seconds: f64,
    /// Seconds from there to the last.
    pub decode_seconds: f64,
}

/// What a request's stream carries, in order. Ends with one `Finished` per choice, or with one `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// Once, before the first token, if asked for: one entry a prompt token, the first `None`.
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// One answer token.
    Token {
        /// Which choice, from 0.
        choice: u16,
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// A choice ended.
    Finished {
        /// Which choice.
        choice: u16,
        /// Why.
        reason: FinishReason,
        /// The request's counts so far; final with the last choice.
        usage: Usage,
    },
    /// The request failed; nothing follows.
    Failed(EngineError),
}

/// Why an accepted request could not be finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The model produced NaN or infinity at this request's row.
    #[error("the model produced non-finite logits")]
    NonFiniteLogits,
    /// The step that ran this request failed.
    #[error("the step failed: {0}")]
    Step(String),
    /// The engine has ended.
    #[error("the engine has ended")]
    Dead,
}
