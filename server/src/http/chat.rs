//! `POST /v1/chat/completions`, and `/v1/chat/completions/render`, which shows the prompt it would make.

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::Response,
};
use ingle_engine as engine;

use super::{
    body, collect,
    generate::{Counts, Piece, Plan, TokenEntry, submit, turn_away},
    ignored_header, limits,
    messages::Conversation,
    new_id,
    params::Common,
    receipt_headers,
    sse::{self, Events},
    tally::Tally,
    tokens::{self, TokenText},
    types::{
        AssistantMessage, ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChatTokenLogprob, ChunkChoice,
        Delta, Rendered, TopLogprob, UsageBody,
    },
    validate::Fields,
};
use crate::{
    cache,
    error::{ApiError, ApiResult},
    record::Record,
    state::{AppState, unix_seconds},
};

/// Answers a chat request.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "generate", request_body = super::types::ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of type ChatChunk.", body = ChatCompletion),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(record): Extension<Record>,
    request: Request,
) -> ApiResult<Response> {
    turn_away(&state, &record)?;
    let mut fields = body::read_fields(&state, request).await?;
    let key = cache::key(&state, record.tenant(), "chat", &fields);
    if record.wants_prompt() {
        record.prompt(fields.map().get("messages").map(ToString::to_string).unwrap_or_default());
    }
    let common = Common::read(&state, &record, &mut fields)?;
    let logprobs = logprobs(&state, &mut fields)?;
    let max_tokens = limits::max_tokens(&mut fields, "max_completion_tokens", 1)?;
    fields.refuse_unless("echo", "the prompt is not part of a chat answer", |v| v == false)?;
    let conversation = Conversation::read(&state, &mut fields)?;
    let ignored = fields.ignored();
    if let Some(mut response) = cache::lookup(&state, key.as_ref()).await {
        record.replayed();
        ignored_header(&mut response, ignored);
        return Ok(response);
    }

    // A prompt that is to be cut may have any length.
    let max_len = state.limits().max_model_len;
    let max = if common.truncate_prompt.is_some() { usize::MAX } else { max_len };
    let ids = encode(&state, conversation, max).await?;
    let (prompt, max_tokens) = limits::fit(&state, &common, ids, max_tokens, "messages")?;
    let plan = plan(&common, logprobs, max_tokens);
    let tally = Tally::with_prompts([prompt.len()]);
    let pieces = submit(&state, &record, &plan, vec![prompt])?;

    let head = Head { id: new_id("chatcmpl"), created: unix_seconds(), model: common.model.clone() };
    let text = TokenText::new(&state);
    let mut response = if common.stream {
        let encoder = ChatEncoder {
            head,
            text,
            with_logprobs: logprobs.is_some(),
            include_usage: common.include_usage,
            continuous_usage: common.continuous_usage,
            started: vec![false; usize::from(common.n)],
            tally,
        };
        sse::response(&state, &record, pieces, encoder)
    } else {
        let work = Work { record: &record, tally, pieces };
        whole(&state, head, &text, &common, logprobs.is_some(), work).await?
    };
    ignored_header(&mut response, ignored);
    Ok(cache::keep(&state, key, response).await)
}

/// Shows what the model would read for a chat request.
#[utoipa::path(
    post, path = "/v1/chat/completions/render", tag = "text", request_body = super::types::ChatRequest,
    responses(
        (status = 200, description = "The prompt as ids and text.", body = Rendered),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn render(State(state): State<AppState>, request: Request) -> ApiResult<Json<Rendered>> {
    let mut fields = body::read_fields(&state, request).await?;
    super::params::model(&state, &mut fields)?;
    let conversation = Conversation::read(&state, &mut fields)?;
    let token_ids = encode(&state, conversation, usize::MAX).await?;
    let prompt = tokens::decode(&state, &state.text().tokenizer, token_ids.clone(), false).await?;
    Ok(Json(Rendered { token_ids, prompt }))
}

/// Renders and encodes on a worker thread. Special-token text inside messages stays text. What is plainly longer than
/// `max` tokens is not tokenized but refused.
pub(crate) async fn encode(state: &AppState, conversation: Conversation, max: usize) -> ApiResult<Vec<u32>> {
    let text = std::sync::Arc::clone(state.text());
    let Some(template) = text.template.clone() else {
        let message =
            "This model has no chat template, so it completes text (/v1/completions) but does not chat.";
        return Err(ApiError::invalid("messages", message));
    };
    let bytes = conversation.num_bytes();
    let work = move || template.encode_chat_within(&text.tokenizer, &conversation.input(), max);
    state.pool().run(bytes, work).await.map_err(|error| tokens::text_error(error, "messages"))
}

/// `Some(k)`: report each token and `k` alternatives.
fn logprobs(state: &AppState, fields: &mut Fields) -> ApiResult<Option<u8>> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let max = state.limits().max_logprobs.min(usize::from(u8::MAX));
    let top: Option<u8> = fields.int("top_logprobs", 0, max as i128)?;
    match top {
        Some(1..) if !wanted => {
            Err(ApiError::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true."))
        }
        top => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

fn plan(common: &Common, logprobs: Option<u8>, max_tokens: u32) -> Plan {
    Plan {
        request: engine::Request {
            prompt: Vec::new(),
            sampling: engine::SamplingParams { logprobs, ..common.sampling.clone() },
            max_tokens,
            n: common.n,
            priority: common.priority,
            cache_salt: common.cache_salt,
            prompt_logprobs: None,
        },
        stop: common.stop.clone(),
        skip_special: common.skip_special,
        continues_text: false,
    }
}

struct Head {
    id: String,
    created: u64,
    model: String,
}

/// What an answer is made from.
struct Work<'a> {
    record: &'a Record,
    tally: Tally,
    pieces: super::generate::Pieces,
}

async fn whole(
    state: &AppState,
    head: Head,
    text: &TokenText,
    common: &Common,
    with_logprobs: bool,
    work: Work<'_>,
) -> ApiResult<Response> {
    let Work { record, mut tally, pieces } = work;
    let mut answers: Vec<(String, Vec<TokenEntry>, &'static str)> = Vec::new();
    answers.resize_with(usize::from(common.n), Default::default);
    collect(state, record, pieces, |piece| {
        let (choice, piece_text, tokens, reason, counts) = match piece {
            Piece::Prompt { .. } => return,
            Piece::Delta { choice, text, tokens, counts } => (choice, text, tokens, "", counts),
            Piece::Finish { choice, text, tokens, reason, counts } => (choice, text, tokens, reason, counts),
        };
        tally.set(counts);
        if let Some(answer) = answers.get_mut(choice) {
            answer.0.push_str(&piece_text);
            answer.1.extend(tokens);
            answer.2 = reason;
        }
    })
    .await?;
    let choices = answers
        .into_iter()
        .enumerate()
        .map(|(index, (content, tokens, finish_reason))| ChatChoice {
            index,
            message: AssistantMessage { role: "assistant", content, refusal: None },
            logprobs: with_logprobs.then(|| chat_logprobs(text, &tokens)),
            finish_reason,
        })
        .collect();
    let answer = ChatCompletion {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        system_fingerprint: super::FINGERPRINT,
        choices,
        usage: tally.usage(),
    };
    let mut response = axum::response::IntoResponse::into_response(Json(&answer));
    receipt_headers(&mut response, &answer.usage);
    Ok(response)
}

fn chat_logprobs(text: &TokenText, tokens: &[TokenEntry]) -> ChatLogprobs {
    let content = tokens
        .iter()
        .map(|entry| {
            let bytes = text.bytes(entry.id);
            ChatTokenLogprob {
                token: String::from_utf8_lossy(&bytes).into_owned(),
                logprob: tokens::finite(entry.logprobs.logprob),
                bytes,
                top_logprobs: entry
                    .logprobs
                    .top
                    .iter()
                    .map(|(id, logprob)| {
                        let bytes = text.bytes(*id);
                        let token = String::from_utf8_lossy(&bytes).into_owned();
                        TopLogprob { token, logprob: tokens::finite(*logprob), bytes }
                    })
                    .collect(),
            }
        })
        .collect();
    ChatLogprobs { content, refusal: None }
}

/// Pieces to chat events: the role first, then text, then the reason, then the usage if asked for.
struct ChatEncoder {
    head: Head,
    text: TokenText,
    with_logprobs: bool,
    include_usage: bool,
    continuous_usage: bool,
    /// Which choices had their first event.
    started: Vec<bool>,
    tally: Tally,
}

impl ChatEncoder {
    fn push(&self, choices: Vec<ChunkChoice>, usage: Option<Option<UsageBody>>, out: &mut Events) {
        out.push(&ChatChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: super::FINGERPRINT,
            choices,
            usage,
        });
    }

    /// The `usage` of an event that is not the last.
    fn running_usage(&self) -> Option<Option<UsageBody>> {
        self.include_usage.then(|| self.continuous_usage.then(|| self.tally.usage()))
    }

    fn delta(&mut self, index: usize, text: String, tokens: &[TokenEntry], counts: Counts, out: &mut Events) {
        self.tally.set(counts);
        if self.started.get_mut(index).is_some_and(|started| !std::mem::replace(started, true)) {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None };
            self.push(vec![choice], self.running_usage(), out);
        }
        if text.is_empty() && tokens.is_empty() {
            return;
        }
        let logprobs = self.with_logprobs.then(|| chat_logprobs(&self.text, tokens));
        let delta = Delta { role: None, content: Some(text) };
        let choice = ChunkChoice { index, delta, logprobs, finish_reason: None };
        self.push(vec![choice], self.running_usage(), out);
    }
}

impl sse::Encoder for ChatEncoder {
    fn piece(&mut self, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Prompt { .. } => {}
            Piece::Delta { choice, text, tokens, counts } => self.delta(choice, text, &tokens, counts, out),
            Piece::Finish { choice, text, tokens, reason, counts } => {
                self.delta(choice, text, &tokens, counts, out);
                let choice = ChunkChoice {
                    index: choice,
                    delta: Delta::default(),
                    logprobs: None,
                    finish_reason: Some(reason),
                };
                self.push(vec![choice], self.running_usage(), out);
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.include_usage {
            self.push(Vec::new(), Some(Some(self.tally.usage())), out);
        }
    }
}
