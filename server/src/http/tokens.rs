//! Small things about tokens that several routes need: their bytes, decoding on a worker, and errors of the text side.

use std::sync::Arc;

use crate::{
    error::{ApiError, ApiResult, ErrorKind, hopeless_length, quote},
    state::AppState,
    text::{Specials, TextError, Tokenizer},
};

/// What a log probability is at least in JSON, which has no infinity.
const LOWEST: f32 = -9999.0;

/// `logprob` as JSON can say it.
pub(crate) fn finite(logprob: f32) -> f32 {
    // NaN never gets here: the engine ends such a request. Were it to, it would be the bound.
    if logprob > LOWEST { logprob.min(0.0) } else { LOWEST }
}

/// Ids to the bytes they stand for.
#[derive(Clone)]
pub(crate) struct TokenText(Arc<Tokenizer>);

impl TokenText {
    /// Those of the generating model.
    pub(crate) fn new(state: &AppState) -> Self {
        Self::of(&state.text().tokenizer)
    }

    /// Those of `tokenizer`.
    pub(crate) fn of(tokenizer: &Arc<Tokenizer>) -> Self {
        Self(Arc::clone(tokenizer))
    }

    /// The bytes of `id`; none for an id without text.
    pub(crate) fn bytes(&self, id: u32) -> Vec<u8> {
        self.0.token_bytes(id).unwrap_or_default()
    }

    /// `id` as completions show it: its text, or `bytes:\x..` if it is a part of a character.
    pub(crate) fn label(&self, id: u32) -> String {
        match String::from_utf8(self.bytes(id)) {
            Ok(text) => text,
            Err(error) => {
                let hex: String = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
                format!("bytes:{hex}")
            }
        }
    }
}

/// Refuses a text of which its mere length says that it cannot fit into `max` tokens. `param` is where it came from.
pub(crate) fn check_length(tokenizer: &Tokenizer, text: &str, max: usize, param: &str) -> ApiResult<()> {
    tokenizer.check_length(text, None, max).map_err(|error| text_error(error, param))
}

/// Encodes `texts` on a worker thread.
pub(crate) async fn encode(
    state: &AppState,
    tokenizer: &Arc<Tokenizer>,
    texts: Vec<String>,
    specials: Specials,
    add_special_tokens: bool,
) -> ApiResult<Vec<Vec<u32>>> {
    let tokenizer = Arc::clone(tokenizer);
    let bytes = texts.iter().map(String::len).sum();
    let work =
        move || texts.iter().map(|text| tokenizer.encode(text, specials, add_special_tokens)).collect();
    state.pool().run(bytes, work).await.map_err(|error| text_error(error, "prompt"))
}

/// Decodes `ids` on a worker thread.
pub(crate) async fn decode(
    state: &AppState,
    tokenizer: &Arc<Tokenizer>,
    ids: Vec<u32>,
    skip_special: bool,
) -> ApiResult<String> {
    let tokenizer = Arc::clone(tokenizer);
    let work = move || Ok(tokenizer.decode(&ids, skip_special));
    state.pool().run(0, work).await.map_err(|error| text_error(error, "tokens"))
}

/// What a client is told when its text could not be handled. `param` is where the text came from.
pub(crate) fn text_error(error: TextError, param: &str) -> ApiError {
    let message = error.to_string();
    match error {
        TextError::TooLong { .. } => ApiError::new(ErrorKind::TooLarge, message).with_param(param),
        TextError::TooManyTokens { at_least, max } => hopeless_length(at_least, max).with_param(param),
        TextError::TooComplex | TextError::OutputTooLong { .. } | TextError::NoTemplate => {
            ApiError::invalid(param, message)
        }
        TextError::Template(reason) => {
            ApiError::invalid(param, format!("The chat template refused the messages: {}", quote(&reason)))
        }
        TextError::Invalid(_) => ApiError::invalid("chat_template_kwargs", message),
        TextError::Busy => ApiError::new(ErrorKind::Overloaded, message),
        TextError::Timeout { .. } | TextError::GivenUp => {
            ApiError::new(ErrorKind::Overloaded, message).with_retry_after(5)
        }
        TextError::Load(_) | TextError::Internal => ApiError::internal(&message),
    }
}
