//! One request as its client sees it, and the answer it must get.

use ingle_engine::{
    EngineConfig, EngineError, FinishReason, Limits, Request, RequestId, SamplingParams, ScriptedBackend,
    TokenEvent, ValidatedRequest,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::options::{EOS, Options, VOCAB};

/// Unread events at which a reader's request is paused, and at which it goes on.
pub(crate) const HIGH_WATER: usize = 6;
pub(crate) const LOW_WATER: usize = 2;

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Finished,
    Cancelled,
    Failed(EngineError),
}

#[derive(Debug)]
pub(crate) struct Choice {
    expected: Vec<u32>,
    reason: FinishReason,
    pub(crate) received: Vec<u32>,
    pub(crate) ended: bool,
}

impl Choice {
    /// The answer it must get.
    pub(crate) fn expected(&self) -> &[u32] {
        &self.expected
    }
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: RequestId,
    pub(crate) request: ValidatedRequest,
    pub(crate) choices: Vec<Choice>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) slow: bool,
    pub(crate) paused: bool,
    pub(crate) unread: usize,
    pub(crate) started: bool,
    /// Later requests that started before this one.
    pub(crate) passed: u32,
    /// Steps completed since it came and before it started, and the most that may be.
    pub(crate) waited: u64,
    scored: bool,
}

/// Answer tokens at most.
pub(crate) fn max_output(config: &EngineConfig, request: &Request) -> usize {
    (request.max_tokens as usize).min(config.max_model_len - request.prompt.len())
}

/// The answer that a choice gets if everything is right, from the definition of the scripted model alone.
pub(crate) fn oracle(config: &EngineConfig, request: &Request, choice: u16) -> (Vec<u32>, FinishReason) {
    let step = |digest, token, position| ScriptedBackend::digest(digest, token, position);
    let mut digest = ScriptedBackend::START;
    for (position, &token) in request.prompt.iter().enumerate() {
        digest = step(digest, token, position);
    }
    let seed = request.sampling.seed.expect("every simulated request has one").cast_unsigned();
    let mut answer: Vec<u32> = Vec::new();
    while answer.len() < max_output(config, request) {
        let token = ScriptedBackend::hash_token(VOCAB, digest, seed, choice);
        let ends = (token == EOS && !request.sampling.ignore_eos)
            || request.sampling.stop_token_ids.contains(&token);
        if ends && answer.len() >= request.sampling.min_tokens as usize {
            return (answer, FinishReason::Stop(token));
        }
        digest = step(digest, token, request.prompt.len() + answer.len());
        answer.push(token);
    }
    (answer, FinishReason::Length)
}

/// A request as the options have it; `None` if it is not valid for this context.
pub(crate) fn make_request(options: &Options, rng: &mut ChaCha8Rng) -> Option<ValidatedRequest> {
    let shared = rng.random_range(0..=options.max_prompt);
    let own = rng.random_range(u32::from(shared == 0)..=(options.max_prompt as u32 / 2).max(1)) as usize;
    let prefix = rng.random_range(0..options.prefixes) as u32;
    let mut prompt: Vec<u32> = (0..shared as u32).map(|at| (at * at + prefix * 7 + at / 3) % VOCAB).collect();
    prompt.extend((0..own).map(|_| rng.random_range(0..VOCAB)));
    if rng.random_bool(options.huge) {
        prompt = (0..options.config.max_model_len as u32 - 8).map(|_| rng.random_range(0..VOCAB)).collect();
    }
    let max_tokens = rng.random_range(1..=options.max_tokens);
    let scored = rng.random_bool(options.score_prompt);
    let request = Request {
        prompt,
        max_tokens: if scored && rng.random_bool(0.3) { 0 } else { max_tokens },
        n: rng.random_range(1..=options.choices),
        priority: rng.random_range(0..options.priorities),
        cache_salt: [rng.random_range(0..options.salts); 32],
        prompt_logprobs: scored.then_some(1),
        sampling: SamplingParams {
            seed: Some(rng.random()),
            ignore_eos: rng.random_bool(options.ignore_eos),
            frequency_penalty: if rng.random_bool(options.penalties) { 0.5 } else { 0.0 },
            stop_token_ids: if rng.random_bool(0.2) { vec![rng.random_range(0..VOCAB)] } else { Vec::new() },
            ..SamplingParams::default()
        },
    };
    let limits = Limits {
        vocab_size: VOCAB as usize,
        max_model_len: options.config.max_model_len,
        max_n: 16,
        max_logprobs: 5,
        max_token_list: 8,
    };
    request.validate(&limits).ok()
}

impl Client {
    pub(crate) fn new(id: RequestId, request: ValidatedRequest, config: &EngineConfig, slow: bool) -> Self {
        let choices = (0..request.get().n)
            .map(|choice| {
                let (expected, reason) = oracle(config, request.get(), choice);
                Choice { expected, reason, received: Vec::new(), ended: false }
            })
            .collect();
        Self {
            id,
            request,
            choices,
            outcome: None,
            slow,
            paused: false,
            unread: 0,
            started: false,
            passed: 0,
            waited: 0,
            scored: false,
        }
    }

    /// Takes one event. I6: nothing after the end. I7, I8: exactly the expected tokens, reason and counts.
    pub(crate) fn take(&mut self, event: &TokenEvent) -> Result<(), String> {
        let id = self.id.0;
        if let Some(outcome) = &self.outcome {
            return Err(format!("I6: request {id} has ended ({outcome:?}) and gets {event:?}"));
        }
        self.unread += 1;
        match event {
            TokenEvent::PromptLogprobs(entries) => {
                let len = self.request.get().prompt.len();
                let begun = self.choices[0].ended || !self.choices[0].received.is_empty();
                if std::mem::replace(&mut self.scored, true) || begun || entries.len() != len {
                    return Err(format!(
                        "I7: request {id}: {} prompt scores for {len} tokens",
                        entries.len()
                    ));
                }
                if entries[0].is_some() || entries[1..].iter().any(Option::is_none) {
                    return Err(format!("I8: request {id}: prompt scores are missing"));
                }
            }
            TokenEvent::Token { choice: number, id: token, .. } => {
                let choice = &mut self.choices[usize::from(*number)];
                let at = choice.received.len();
                if choice.ended || choice.expected.get(at) != Some(token) {
                    let wanted = choice.expected.get(at);
                    return Err(format!("I8: request {id}.{number} token {at} is {token}, alone {wanted:?}"));
                }
                choice.received.push(*token);
            }
            TokenEvent::Finished { choice: number, reason, usage } => {
                let choice = &mut self.choices[usize::from(*number)];
                let complete = choice.received.len() == choice.expected.len() && *reason == choice.reason;
                if std::mem::replace(&mut choice.ended, true) || !complete {
                    return Err(format!(
                        "I8: request {id}.{number} ends {reason:?} after {} of {} tokens, alone {:?}",
                        choice.received.len(),
                        choice.expected.len(),
                        choice.reason
                    ));
                }
                if self.choices.iter().all(|choice| choice.ended) {
                    let stops = |c: &&Choice| matches!(c.reason, FinishReason::Stop(_));
                    let tokens: usize = self.choices.iter().map(|choice| choice.received.len()).sum();
                    let tokens = tokens + self.choices.iter().filter(stops).count();
                    let prompt = self.request.get().prompt.len();
                    if usage.completion_tokens as usize != tokens || usage.prompt_tokens as usize != prompt {
                        return Err(format!("I8: request {id}: {usage:?} for {prompt} + {tokens} tokens"));
                    }
                    if self.request.get().prompt_logprobs.is_some() != self.scored {
                        return Err(format!(
                            "I8: request {id} wanted prompt scores and got none, or the reverse"
                        ));
                    }
                    self.outcome = Some(Outcome::Finished);
                }
            }
            TokenEvent::Failed(error) => self.outcome = Some(Outcome::Failed(error.clone())),
        }
        // I16: what may be unread is bounded, whatever the reader does.
        let bound = HIGH_WATER + 8 * self.choices.len() + 2;
        if self.paused && self.unread > bound {
            return Err(format!("I16: request {id} has {} unread events though it is paused", self.unread));
        }
        Ok(())
    }
}
