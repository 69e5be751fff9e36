//! `POST /v1/completions`: text after text, scoring of prompts, and several prompts in one request.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use ingle_engine::{self as engine, TokenLogprobs};
use serde_json::{Map, Value};

use super::{
    body, collect,
    generate::{Piece, Plan, TokenEntry, submit, turn_away},
    ignored_header, limits, new_id,
    params::Common,
    receipt_headers,
    sse::{self, Events},
    tally::Tally,
    tokens::{self, TokenText},
    types::{Completion, CompletionChoice, CompletionLogprobs},
    validate::{self, Fields, kind_of},
};
use crate::{
    cache,
    error::{ApiError, ApiResult},
    record::Record,
    state::{AppState, unix_seconds},
    text::{Detokenizer, Specials},
};

/// Answers a completion request.
#[utoipa::path(
    post, path = "/v1/completions", tag = "generate", request_body = super::types::CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of the same shape.", body = Completion<'static>),
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
    let key = cache::key(&state, record.tenant(), "completions", &fields);
    if record.wants_prompt() {
        record.prompt(fields.map().get("prompt").map(ToString::to_string).unwrap_or_default());
    }
    let common = Common::read(&state, &record, &mut fields)?;
    let echo = fields.bool("echo")?.unwrap_or(false);
    let logprobs = logprobs(&state, &mut fields)?;
    let max_tokens = limits::max_tokens(&mut fields, "max_completion_tokens", u32::from(!echo))?;
    let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
    let prompts = read_prompts(&state, &mut fields)?;
    let ignored = fields.ignored();
    if let Some(mut response) = cache::lookup(&state, key.as_ref()).await {
        record.replayed();
        ignored_header(&mut response, ignored);
        return Ok(response);
    }

    if let (Prompts::Texts(texts), None) = (&prompts, common.truncate_prompt) {
        let (tokenizer, max) = (&state.text().tokenizer, state.limits().max_model_len);
        texts.iter().try_for_each(|text| tokens::check_length(tokenizer, text, max, "prompt"))?;
    }
    let (all_ids, texts) = encode(&state, prompts, add_special_tokens).await?;
    let mut ids = Vec::with_capacity(all_ids.len());
    let mut smallest = u32::MAX;
    for prompt in all_ids {
        let (prompt, max_tokens) = limits::fit(&state, &common, prompt, max_tokens, "prompt")?;
        smallest = smallest.min(max_tokens);
        ids.push(prompt);
    }
    let echoes = if echo {
        // A prompt that was cut is echoed as it was read.
        let texts = if common.truncate_prompt.is_some() { None } else { texts };
        echoes(&state, ids.clone(), texts, common.skip_special).await?
    } else {
        Vec::new()
    };
    let plan = Plan {
        request: engine::Request {
            prompt: Vec::new(),
            sampling: engine::SamplingParams { logprobs, ..common.sampling.clone() },
            max_tokens: smallest,
            n: common.n,
            priority: common.priority,
            cache_salt: common.cache_salt,
            prompt_logprobs: (echo && (logprobs.is_some() || smallest == 0)).then_some(logprobs.unwrap_or(0)),
        },
        stop: common.stop.clone(),
        skip_special: common.skip_special,
        continues_text: true,
    };
    let tally = Tally::with_prompts(ids.iter().map(Vec::len));
    let num_choices = ids.len().saturating_mul(usize::from(common.n));
    let pieces = submit(&state, &record, &plan, ids)?;

    let head = Head { id: new_id("cmpl"), created: unix_seconds(), model: common.model.clone() };
    let writer = Writer {
        text: TokenText::new(&state),
        with_logprobs: logprobs.is_some(),
        n: usize::from(common.n),
        echoes,
        started: vec![false; num_choices],
        tally,
    };
    let mut response = if common.stream {
        let encoder = CompletionEncoder {
            head,
            writer,
            include_usage: common.include_usage,
            continuous_usage: common.continuous_usage,
        };
        sse::response(&state, &record, pieces, encoder)
    } else {
        whole(&state, &record, &head, writer, pieces).await?
    };
    ignored_header(&mut response, ignored);
    Ok(cache::keep(&state, key, response).await)
}

fn logprobs(state: &AppState, fields: &mut Fields) -> ApiResult<Option<u8>> {
    fields.refuse_unless("top_logprobs", "use 'logprobs' with a number", |value| value == 0)?;
    fields.int("logprobs", 0, state.limits().max_logprobs.min(usize::from(u8::MAX)) as i128)
}

/// Prompts as they came.
enum Prompts {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

fn read_prompts(state: &AppState, fields: &mut Fields) -> ApiResult<Prompts> {
    const NAME: &str = "prompt";
    let wrong = || {
        let message = "'prompt' must be a string, an array of strings, an array of token ids, or an array of such arrays.";
        ApiError::invalid(NAME, message)
    };
    let vocab = state.limits().vocab_size;
    let items = match fields.take(NAME) {
        None => return Err(ApiError::invalid(NAME, "'prompt' is required.")),
        Some(Value::String(text)) => return Ok(Prompts::Texts(vec![text])),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(wrong()),
    };
    let max = state.config().max_prompts;
    match items.first() {
        None => Err(ApiError::invalid(NAME, "'prompt' is an empty array.")),
        Some(Value::Number(_)) => {
            let max_len = state.limits().max_model_len;
            // Ids far over the context need not be looked at one by one.
            if items.len() > max_len {
                return Err(crate::error::context_length(items.len(), 1, max_len).with_param(NAME));
            }
            Ok(Prompts::Ids(vec![validate::token_ids(NAME, &items, vocab)?]))
        }
        Some(_) if items.len() > max => {
            Err(ApiError::invalid(NAME, format!("'prompt' has {} prompts; {max} are allowed.", items.len())))
        }
        Some(Value::String(_)) => {
            let texts: Option<Vec<String>> = items
                .into_iter()
                .map(|item| if let Value::String(text) = item { Some(text) } else { None })
                .collect();
            texts.map(Prompts::Texts).ok_or_else(wrong)
        }
        Some(Value::Array(_)) => {
            let lists = items.into_iter().enumerate().map(|(i, item)| match item {
                Value::Array(ids) => validate::token_ids(&format!("{NAME}[{i}]"), &ids, vocab),
                other => Err(ApiError::invalid(
                    NAME,
                    format!("'{NAME}[{i}]' must be an array of token ids, not {}.", kind_of(&other)),
                )),
            });
            lists.collect::<ApiResult<Vec<_>>>().map(Prompts::Ids)
        }
        Some(_) => Err(wrong()),
    }
}

/// The ids of the prompts, and their texts if they came as text.
async fn encode(
    state: &AppState,
    prompts: Prompts,
    add_special_tokens: bool,
) -> ApiResult<(Vec<Vec<u32>>, Option<Vec<String>>)> {
    match prompts {
        Prompts::Ids(ids) => Ok((ids, None)),
        Prompts::Texts(texts) => {
            // A text completion has no turns to forge: special tokens in it are meant.
            let tokenizer = &state.text().tokenizer;
            let ids =
                tokens::encode(state, tokenizer, texts.clone(), Specials::Parse, add_special_tokens).await?;
            Ok((ids, Some(texts)))
        }
    }
}

/// A prompt as it is put before its answers.
struct Echo {
    text: String,
    num_chars: usize,
    ids: Vec<u32>,
    /// Where each token begins, in characters.
    offsets: Vec<usize>,
    logprobs: Option<CompletionLogprobs>,
}

/// Finds the text of each prompt and of each of its tokens, on a worker thread.
async fn echoes(
    state: &AppState,
    prompts: Vec<Vec<u32>>,
    texts: Option<Vec<String>>,
    skip_special: bool,
) -> ApiResult<Vec<Echo>> {
    let tokenizer = Arc::clone(&state.text().tokenizer);
    let work = move || {
        let mut texts = texts.map(Vec::into_iter);
        let echo = |ids: Vec<u32>| {
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), skip_special);
            let (mut decoded, mut num_chars) = (String::new(), 0_usize);
            let mut offsets = Vec::with_capacity(ids.len());
            for id in &ids {
                offsets.push(num_chars);
                let piece = detokenizer.push(*id);
                num_chars = num_chars.saturating_add(piece.chars().count());
                decoded.push_str(&piece);
            }
            decoded.push_str(&detokenizer.finish());
            let text = texts.as_mut().and_then(Iterator::next).unwrap_or(decoded);
            let num_chars = text.chars().count();
            Echo { text, num_chars, ids, offsets, logprobs: None }
        };
        Ok(prompts.into_iter().map(echo).collect())
    };
    state.pool().run(0, work).await.map_err(|error| tokens::text_error(error, "prompt"))
}

struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn body<'a>(&'a self, choices: Vec<CompletionChoice>) -> Completion<'a> {
        Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            system_fingerprint: super::FINGERPRINT,
            choices,
            usage: None,
        }
    }
}

/// Pieces to choices: puts the echo before the first of each choice and writes log probabilities.
struct Writer {
    text: TokenText,
    with_logprobs: bool,
    n: usize,
    /// One per prompt with `echo`, else none.
    echoes: Vec<Echo>,
    started: Vec<bool>,
    tally: Tally,
}

impl Writer {
    fn take(&mut self, piece: Piece) -> Option<CompletionChoice> {
        let (index, mut text, tokens, finish_reason, counts) = match piece {
            Piece::Prompt { prompt, logprobs } => {
                self.prompt_logprobs(prompt, &logprobs);
                return None;
            }
            Piece::Delta { choice, text, tokens, counts } => (choice, text, tokens, None, counts),
            Piece::Finish { choice, text, tokens, reason, counts } => {
                (choice, text, tokens, Some(reason), counts)
            }
        };
        self.tally.set(counts);
        let echo = self.echoes.get(index.checked_div(self.n)?);
        let first = self.started.get_mut(index).is_some_and(|started| !std::mem::replace(started, true));
        let mut logprobs = self.with_logprobs.then(CompletionLogprobs::default);
        let mut base = 0;
        if let Some(echo) = echo {
            base = echo.num_chars;
            if first {
                text.insert_str(0, &echo.text);
                if let (Some(out), Some(of_prompt)) = (&mut logprobs, &echo.logprobs) {
                    out.append(of_prompt.clone());
                }
            }
        }
        if let Some(out) = &mut logprobs {
            for TokenEntry { id, logprobs, start_chars, .. } in tokens {
                self.push(out, id, Some(&logprobs), base.saturating_add(start_chars));
            }
        }
        Some(CompletionChoice { index, text, logprobs, finish_reason })
    }

    fn push(&self, out: &mut CompletionLogprobs, id: u32, logprobs: Option<&TokenLogprobs>, offset: usize) {
        let label = self.text.label(id);
        out.text_offset.push(offset);
        out.token_logprobs.push(logprobs.map(|l| tokens::finite(l.logprob)));
        out.top_logprobs.push(logprobs.map(|l| {
            let mut top = Map::new();
            for (id, logprob) in &l.top {
                // The likelier of two tokens of one text comes first and stays.
                top.entry(self.text.label(*id)).or_insert_with(|| tokens::finite(*logprob).into());
            }
            top.entry(label.clone()).or_insert_with(|| tokens::finite(l.logprob).into());
            top
        }));
        out.tokens.push(label);
    }

    fn prompt_logprobs(&mut self, prompt: usize, entries: &[Option<TokenLogprobs>]) {
        if !self.with_logprobs {
            return;
        }
        let Some(echo) = self.echoes.get(prompt) else { return };
        let mut out = CompletionLogprobs::default();
        for ((id, offset), entry) in echo.ids.iter().zip(&echo.offsets).zip(entries) {
            self.push(&mut out, *id, entry.as_ref(), *offset);
        }
        if let Some(echo) = self.echoes.get_mut(prompt) {
            echo.logprobs = Some(out);
        }
    }
}

impl CompletionLogprobs {
    fn append(&mut self, mut other: Self) {
        self.text_offset.append(&mut other.text_offset);
        self.token_logprobs.append(&mut other.token_logprobs);
        self.tokens.append(&mut other.tokens);
        self.top_logprobs.append(&mut other.top_logprobs);
    }
}

async fn whole(
    state: &AppState,
    record: &Record,
    head: &Head,
    mut writer: Writer,
    pieces: super::generate::Pieces,
) -> ApiResult<Response> {
    let empty = |index| CompletionChoice {
        index,
        text: String::new(),
        logprobs: writer.with_logprobs.then(CompletionLogprobs::default),
        finish_reason: None,
    };
    let mut choices: Vec<CompletionChoice> = (0..writer.started.len()).map(empty).collect();
    collect(state, record, pieces, |piece| {
        let Some(part) = writer.take(piece) else { return };
        let Some(choice) = choices.get_mut(part.index) else { return };
        choice.text.push_str(&part.text);
        if let (Some(all), Some(new)) = (&mut choice.logprobs, part.logprobs) {
            all.append(new);
        }
        choice.finish_reason = part.finish_reason;
    })
    .await?;
    let mut body = head.body(choices);
    let usage = writer.tally.usage();
    body.usage = Some(Some(usage.clone()));
    let mut response = Json(body).into_response();
    receipt_headers(&mut response, &usage);
    Ok(response)
}

struct CompletionEncoder {
    head: Head,
    writer: Writer,
    include_usage: bool,
    continuous_usage: bool,
}

impl sse::Encoder for CompletionEncoder {
    fn piece(&mut self, piece: Piece, out: &mut Events) {
        let Some(choice) = self.writer.take(piece) else { return };
        let mut body = self.head.body(vec![choice]);
        body.usage = self.include_usage.then(|| self.continuous_usage.then(|| self.writer.tally.usage()));
        out.push(&body);
    }

    fn end(&mut self, out: &mut Events) {
        if self.include_usage {
            let mut body = self.head.body(Vec::new());
            body.usage = Some(Some(self.writer.tally.usage()));
            out.push(&body);
        }
    }
}
