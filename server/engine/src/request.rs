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
    /// What sort of fault it is.
    pub kind: InvalidKind,
}

/// The sorts of faults that an API has different codes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidKind {
    /// A value outside of its range.
    Value,
    /// The prompt (and one answer token, if any is wanted) does not fit the context.
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Answer tokens asked for.
        max_tokens: u32,
        /// Prompt plus answer at most.
        max_model_len: usize,
    },
}

/// A request whose every field was checked. The engine accepts nothing else.
#[derive(Debug, Clone)]
pub struct ValidatedRequest(Request);

/// Below this temperature sampling is greedy.
pub(crate) const GREEDY_BELOW: f32 = 1e-5;

impl SamplingParams {
    /// Whether the likeliest token is always chosen.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// Whether the choice depends on the tokens before it beyond the model's own look at them.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    fn validate(&self, limits: &Limits) -> Result<(), InvalidRequest> {
        let in_range = |param, value: f32, min: f32, max: f32, min_excluded: bool| {
            // NaN is in no range.
            let above = if min_excluded { value > min } else { value >= min };
            if above && value <= max {
                return Ok(());
            }
            let left = if min_excluded { '(' } else { '[' };
            Err(invalid(param, format!("{value} is not in {left}{min}, {max}]")))
        };
        in_range("temperature", self.temperature, 0.0, 2.0, false)?;
        in_range("top_p", self.top_p, 0.0, 1.0, true)?;
        in_range("min_p", self.min_p, 0.0, 1.0, false)?;
        in_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, true)?;
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0, false)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0, false)?;
        check_len("logit_bias", self.logit_bias.len(), limits)?;
        for &(id, bias) in &self.logit_bias {
            check_id("logit_bias", id, limits)?;
            in_range("logit_bias", bias, -100.0, 100.0, false)?;
        }
        check_len("stop_token_ids", self.stop_token_ids.len(), limits)?;
        for &id in &self.stop_token_ids {
            check_id("stop_token_ids", id, limits)?;
        }
        check_logprobs("logprobs", self.logprobs, limits)
    }
}

fn invalid(param: &'static str, message: impl Into<String>) -> InvalidRequest {
    InvalidRequest { param, message: message.into(), kind: InvalidKind::Value }
}

fn check_id(param: &'static str, id: u32, limits: &Limits) -> Result<(), InvalidRequest> {
    if (id as usize) < limits.vocab_size {
        return Ok(());
    }
    Err(invalid(param, format!("{id} is not a token of the model, which has {}", limits.vocab_size)))
}

fn check_len(param: &'static str, len: usize, limits: &Limits) -> Result<(), InvalidRequest> {
    if len <= limits.max_token_list {
        return Ok(());
    }
    Err(invalid(param, format!("{len} entries are more than {}", limits.max_token_list)))
}

fn check_logprobs(param: &'static str, top: Option<u8>, limits: &Limits) -> Result<(), InvalidRequest> {
    match top {
        Some(top) if usize::from(top) > limits.max_logprobs => {
            Err(invalid(param, format!("{top} is more than {}", limits.max_logprobs)))
        }
        _ => Ok(()),
    }
}

impl Request {
    /// Checks every field against `limits`.
    ///
    /// # Errors
    /// The first field at fault.
    pub fn validate(self, limits: &Limits) -> Result<ValidatedRequest, InvalidRequest> {
        if self.prompt.is_empty() {
            return Err(invalid("prompt", "it has no token"));
        }
        for &id in &self.prompt {
            check_id("prompt", id, limits)?;
        }
        if self.n == 0 || usize::from(self.n) > limits.max_n {
            return Err(invalid("n", format!("{} is not in [1, {}]", self.n, limits.max_n)));
        }
        if self.max_tokens == 0 && self.prompt_logprobs.is_none() {
            return Err(invalid(
                "max_tokens",
                "0 is of use only if the prompt's log probabilities are wanted",
            ));
        }
        if self.sampling.min_tokens > self.max_tokens {
            let (min, max) = (self.sampling.min_tokens, self.max_tokens);
            return Err(invalid("min_tokens", format!("{min} is more than max_tokens, {max}")));
        }
        self.sampling.validate(limits)?;
        check_logprobs("prompt_logprobs", self.prompt_logprobs, limits)?;
        let wanted = self.prompt.len().saturating_add(usize::from(self.max_tokens > 0));
        if wanted > limits.max_model_len {
            let (prompt_tokens, max_model_len) = (self.prompt.len(), limits.max_model_len);
            return Err(InvalidRequest {
                param: "prompt",
                message: format!(
                    "This model's maximum context length is {max_model_len} tokens. However, you requested \
                     {prompt_tokens} tokens in the prompt and {} for the answer.",
                    self.max_tokens
                ),
                kind: InvalidKind::ContextLength {
                    prompt_tokens,
                    max_tokens: self.max_tokens,
                    max_model_len,
                },
            });
        }
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
