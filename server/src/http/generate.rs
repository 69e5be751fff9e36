//! From an accepted request to pieces of answer: the part that chat and completions, streamed and not, have in common.
//!
//! [`submit`] hands prompts to the engine; refusals come back before anything is sent. Each prompt then has one
//! [`Driver`], which turns its token events into [`Piece`]s: text through the detokenizer and the stop matcher, log
//! probabilities with the text they belong to. Because streamed and whole answers are made of the same pieces, they
//! are the same text. Dropping the stream of pieces drops the engine's stream, which aborts the request.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{Stream, stream};
use ingle_engine::{
    FinishReason, Request, SubmitError, TokenEvent, TokenLogprobs, TokenStream, Usage, ValidatedRequest,
};

use crate::{
    error::{self, ApiError, ApiResult, ErrorKind},
    metrics::{Refusal, RequestTimes},
    record::{Progress, Record},
    state::AppState,
    text::{Detokenizer, StopMatcher},
    tier::admission::{self, Place},
};

/// One token with its log probabilities.
#[derive(Debug, Clone)]
pub(crate) struct TokenEntry {
    pub(crate) id: u32,
    pub(crate) logprobs: TokenLogprobs,
    /// Bytes of the choice's text before this token.
    pub(crate) start: usize,
    /// Characters of it.
    pub(crate) start_chars: usize,
}

/// A part of the answer. Choices are numbered over all prompts.
#[derive(Debug)]
pub(crate) enum Piece {
    /// The prompt's log probabilities, before anything else of its choices.
    Prompt { prompt: usize, logprobs: Vec<Option<TokenLogprobs>> },
    /// More text.
    Delta { choice: usize, text: String, tokens: Vec<TokenEntry>, counts: Counts },
    /// The last text of a choice, and why it ends.
    Finish { choice: usize, text: String, tokens: Vec<TokenEntry>, reason: &'static str, counts: Counts },
}

/// Counts of one prompt's choices so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) prompt: usize,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) queue: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

/// A stream of pieces; ends after the last `Finish`, or with the first error.
pub(crate) type Pieces = Pin<Box<dyn Stream<Item = ApiResult<Piece>> + Send>>;

/// What is the same for all prompts of a request.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Everything but the prompt.
    pub(crate) request: Request,
    pub(crate) stop: Vec<String>,
    pub(crate) skip_special: bool,
    /// The answer goes on a text, so a space at its beginning is part of it.
    pub(crate) continues_text: bool,
}

/// Refuses a request of which nothing has been read yet, if the engine would not take any: what is not looked at costs
/// a full server next to nothing. Behind a response cache a request has to be read first, because it may be answered
/// from there.
///
/// # Errors
/// 429 when the queue is full, 503 when the engine takes nothing.
pub(crate) fn turn_away(state: &AppState, record: &Record) -> ApiResult<()> {
    if state.cache().is_some() {
        return Ok(());
    }
    state.engine().check_room().map_err(|refusal| {
        // The name that was asked for stands in the body.
        record.model("", state.default_model());
        refused(state, record, &refusal)
    })
}

/// Hands `prompts` to the engine. All are accepted, or none is.
///
/// # Errors
/// 400 for what cannot run, 429 when there is too much to do, for the server, the key or the caller's time, 503 when
/// the engine takes nothing.
pub(crate) fn submit(
    state: &AppState,
    record: &Record,
    plan: &Plan,
    prompts: Vec<Vec<u32>>,
) -> ApiResult<Pieces> {
    let started = Instant::now();
    let mut valid = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let request = Request { prompt, ..plan.request.clone() };
        valid.push(request.validate(state.limits())?);
    }
    let places = admit(state, record, &valid)?;
    let tokens = valid.iter().map(|request| request.get().prompt.len() as u64).sum();
    let mut drivers = Vec::with_capacity(valid.len());
    for ((prompt, request), place) in valid.into_iter().enumerate().zip(places) {
        let prompt_tokens = u32::try_from(request.get().prompt.len()).unwrap_or(u32::MAX);
        // An early return drops the streams of the prompts before, which aborts them.
        let stream = state.engine().submit(request).map_err(|refusal| {
            state.tier().refund(started, record.tenant(), tokens);
            refused(state, record, &refusal)
        })?;
        let source = Source { stream, prompt, prompt_tokens, place, record: record.clone(), started };
        drivers.push(Driver::new(state.clone(), plan, source).into_stream());
    }
    Ok(match drivers.pop() {
        Some(only) if drivers.is_empty() => only,
        last => Box::pin(stream::select_all(drivers.into_iter().chain(last))),
    })
}

/// Decides whether the request is worth taking now, and takes its places in the line of tokens.
fn admit(state: &AppState, record: &Record, requests: &[ValidatedRequest]) -> ApiResult<Vec<Place>> {
    let (now, tier) = (Instant::now(), state.tier());
    let lengths = requests.iter().map(|request| request.get().prompt.len() as u64);
    let tokens = lengths.clone().sum();
    let load = state.load();
    if let Some(left) = record.time_left() {
        let predicted = admission::predict_first_token(load, tier.pace(now, &record.served()), tokens);
        if let Some(predicted) = predicted.filter(|predicted| *predicted > left) {
            state.metrics().refused(Refusal::Deadline);
            let message = format!(
                "The first token is expected after {}, and the request has {} left.",
                super::shown(predicted),
                super::shown(left)
            );
            return Err(ApiError::new(ErrorKind::DeadlineUnreachable, message)
                .with_retry_after(admission::round_up((predicted - left).as_secs_f64())));
        }
    }
    let mut places = Vec::with_capacity(requests.len());
    for length in lengths {
        match tier.backlog().enter(length, tier.config().max_queued_tokens) {
            Some(place) => places.push(place),
            None => {
                state.metrics().refused(Refusal::QueueTokens);
                let waiting = tier.backlog().tokens();
                let message = format!("The server is overloaded: {waiting} prompt tokens are waiting.");
                return Err(overloaded(state, record, message));
            }
        }
    }
    admit_key(state, record, tokens)?;
    Ok(places)
}

/// Takes what the request needs from its key's limits.
///
/// # Errors
/// 429 if there is not enough.
pub(crate) fn admit_key(state: &AppState, record: &Record, tokens: u64) -> ApiResult<()> {
    state.tier().admit_key(Instant::now(), record.tenant(), tokens).map_err(|exceeded| {
        record.not_our_doing();
        state.metrics().refused(Refusal::KeyLimit);
        let message = format!("This API key may use {} {} a minute.", exceeded.limit, exceeded.what);
        ApiError::new(ErrorKind::RateLimited, message)
            .with_retry_after(admission::round_up(exceeded.wait.as_secs_f64()))
    })
}

/// The 429 of a full queue, with the time those who wait will take.
fn overloaded(state: &AppState, record: &Record, message: String) -> ApiError {
    let tier = state.tier();
    let pace = tier.pace(Instant::now(), &record.served());
    let seconds = admission::retry_after(state.load(), pace);
    ApiError::new(ErrorKind::Overloaded, message).with_retry_after(seconds)
}

fn refused(state: &AppState, record: &Record, refusal: &SubmitError) -> ApiError {
    match refusal {
        SubmitError::QueueFull { waiting } => {
            state.metrics().refused(Refusal::QueueFull);
            overloaded(state, record, format!("The server is overloaded: {waiting} requests are waiting."))
        }
        SubmitError::Draining => error::draining(),
        SubmitError::Dead => error::engine_dead(),
        never_fits => {
            let max = state.limits().max_model_len;
            ApiError::new(
                ErrorKind::ContextLength,
                format!(
                    "This model's maximum context length is {max} tokens, and the request can never run: {never_fits}."
                ),
            )
        }
    }
}

/// The choices of one prompt.
struct Driver {
    state: AppState,
    /// `None` once all choices are done.
    stream: Option<TokenStream>,
    choices: Vec<Choice>,
    prompt: usize,
    counts: Counts,
    times: RequestTimes,
    ready: VecDeque<Piece>,
    last_usage: Option<Usage>,
    record: Record,
    place: Place,
    started: Instant,
    first_token: Option<Instant>,
}

/// What a driver begins with.
struct Source {
    stream: TokenStream,
    prompt: usize,
    prompt_tokens: u32,
    place: Place,
    record: Record,
    started: Instant,
}

/// One choice on its way from ids to text.
struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Bytes of text that came from the detokenizer, and how many of them were sent on.
    raw_len: usize,
    raw_chars: usize,
    sent_len: usize,
    /// Tokens whose text is still held back.
    held: VecDeque<TokenEntry>,
    done: bool,
}

impl Driver {
    fn new(state: AppState, plan: &Plan, source: Source) -> Self {
        let Source { stream, prompt, prompt_tokens, place, record, started } = source;
        let tokenizer = Arc::clone(&state.text().tokenizer);
        let choice = || Choice {
            detokenizer: if plan.continues_text {
                Detokenizer::continuing(Arc::clone(&tokenizer), plan.skip_special)
            } else {
                Detokenizer::new(Arc::clone(&tokenizer), plan.skip_special)
            },
            stop: StopMatcher::new(&plan.stop),
            raw_len: 0,
            raw_chars: 0,
            sent_len: 0,
            held: VecDeque::new(),
            done: false,
        };
        let choices: Vec<Choice> = (0..plan.request.n).map(|_| choice()).collect();
        let times = RequestTimes::new(started, choices.len());
        Self {
            state,
            stream: Some(stream),
            choices,
            prompt,
            counts: Counts { prompt, prompt_tokens, ..Counts::default() },
            times,
            ready: VecDeque::new(),
            last_usage: None,
            record,
            place,
            started,
            first_token: None,
        }
    }

    fn into_stream(self) -> Pieces {
        Box::pin(stream::unfold(Some(self), |driver| async move {
            let mut driver = driver?;
            match driver.next().await {
                Some(Ok(piece)) => Some((Ok(piece), Some(driver))),
                Some(Err(error)) => Some((Err(error), None)),
                None => None,
            }
        }))
    }

    async fn next(&mut self) -> Option<ApiResult<Piece>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            let event = self.stream.as_mut()?.next().await;
            match event {
                None => {
                    self.failed();
                    return Some(Err(ApiError::internal(&"the engine's stream ended too early")));
                }
                Some(TokenEvent::Failed(failure)) => {
                    self.failed();
                    return Some(Err(failure.into()));
                }
                Some(TokenEvent::PromptLogprobs(logprobs)) => {
                    self.begun();
                    return Some(Ok(Piece::Prompt { prompt: self.prompt, logprobs }));
                }
                Some(TokenEvent::Token { choice, id, logprobs }) => self.token(choice, id, logprobs),
                Some(TokenEvent::Finished { choice, reason, usage }) => self.finished(choice, reason, usage),
            }
        }
    }

    /// The prompt was computed.
    fn begun(&mut self) {
        self.times.prompt(self.state.metrics(), self.counts.prompt_tokens);
        self.place.leave();
        let now = Instant::now();
        let first = *self.first_token.get_or_insert(now);
        if let Some(stream) = &self.stream {
            self.counts.cached_tokens = stream.cached_tokens();
            self.counts.queue = stream.queue_time();
        }
        self.counts.prefill = first.saturating_duration_since(self.started).saturating_sub(self.counts.queue);
        self.counts.decode = now.saturating_duration_since(first);
    }

    fn failed(&mut self) {
        self.stream = None;
        self.times.failed();
        self.record.failed();
    }

    fn token(&mut self, choice: u16, id: u32, logprobs: Option<TokenLogprobs>) {
        let idx = usize::from(choice);
        if self.choices.get(idx).is_none_or(|slot| slot.done) {
            return;
        }
        self.begun();
        let Some(slot) = self.choices.get_mut(idx) else { return };
        self.times.token(self.state.metrics(), idx);
        self.counts.completion_tokens = self.counts.completion_tokens.saturating_add(1);
        let text = slot.detokenizer.push(id);
        let (start, start_chars) = (slot.raw_len, slot.raw_chars);
        slot.raw_chars = slot.raw_chars.saturating_add(text.chars().count());
        slot.raw_len = slot.raw_len.saturating_add(text.len());
        slot.held.extend(logprobs.map(|logprobs| TokenEntry { id, logprobs, start, start_chars }));
        let outcome = slot.stop.push(&text);
        self.emit(idx, outcome.emit, outcome.stopped.then_some("stop"));
    }

    fn finished(&mut self, choice: u16, reason: FinishReason, usage: Usage) {
        self.begun();
        self.counts.cached_tokens = usage.cached_tokens;
        // The engine's own times: what is read here may have waited in the stream, all of it at once if it is short.
        let time = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        self.counts.queue = time(usage.queue_seconds);
        self.counts.prefill = time(usage.prefill_seconds);
        self.counts.decode = time(usage.decode_seconds);
        self.last_usage = Some(usage);
        let idx = usize::from(choice);
        let Some(slot) = self.choices.get_mut(idx).filter(|slot| !slot.done) else { return };
        let mut reason = match reason {
            FinishReason::Stop(_) => {
                // The end token was generated, too, although it is not part of the text.
                self.counts.completion_tokens = self.counts.completion_tokens.saturating_add(1);
                self.times.end_token(self.state.metrics());
                "stop"
            }
            FinishReason::Length => "length",
        };
        let tail = slot.detokenizer.finish();
        slot.raw_len = slot.raw_len.saturating_add(tail.len());
        let outcome = slot.stop.push(&tail);
        let mut text = outcome.emit;
        if outcome.stopped {
            reason = "stop";
        } else {
            text.push_str(&slot.stop.finish());
        }
        self.emit(idx, text, Some(reason));
    }

    /// Makes a piece of `text` and of the tokens it covers; the last one of the choice if there is a reason.
    fn emit(&mut self, idx: usize, text: String, reason: Option<&'static str>) {
        let Some(slot) = self.choices.get_mut(idx) else { return };
        slot.sent_len = slot.sent_len.saturating_add(text.len());
        // A token belongs to the text that was sent if it starts in it. At a regular end all do, those of no text too.
        let cut = reason.is_some() && slot.sent_len < slot.raw_len;
        let all = reason.is_some() && !cut;
        let num = slot.held.iter().take_while(|entry| all || entry.start < slot.sent_len).count();
        let tokens: Vec<TokenEntry> = slot.held.drain(..num).collect();
        let choice = self.prompt.saturating_mul(self.choices.len()).saturating_add(idx);
        let Some(reason) = reason else {
            if !text.is_empty() || !tokens.is_empty() {
                self.ready.push_back(Piece::Delta { choice, text, tokens, counts: self.counts });
            }
            return;
        };
        if let Some(slot) = self.choices.get_mut(idx) {
            slot.done = true;
        }
        let all_done = self.choices.iter().all(|choice| choice.done);
        if all_done {
            self.stream = None;
            self.times.finish(self.state.metrics(), reason, self.counts, self.last_usage);
            self.report();
            self.record.finished(reason);
        }
        self.ready.push_back(Piece::Finish { choice, text, tokens, reason, counts: self.counts });
    }
}

impl Driver {
    /// Tells the record how far this prompt is.
    fn report(&self) {
        let counts = self.counts;
        let first_token = self.first_token.map(|first| {
            // From the request's arrival, with the time before it was handed over.
            let since = first.elapsed();
            self.record.since_arrival().saturating_sub(since)
        });
        let progress = Progress {
            prompt_tokens: counts.prompt_tokens,
            cached_tokens: counts.cached_tokens,
            completion_tokens: counts.completion_tokens,
            queue: counts.queue,
            prefill: counts.prefill,
            decode: counts.decode,
            first_token,
        };
        self.record.progress(counts.prompt, progress);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.report();
        self.times.report(self.state.metrics());
    }
}
