//! `POST /tokenize` and `POST /detokenize`, in the shapes vLLM's clients know, for every model that is served.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use serde_json::Value;

use super::{
    body, chat,
    messages::Conversation,
    models::task_name,
    params::{unknown_model, wrong_task},
    tokens::{self, TokenText},
    types::{Detokenized, Tokenized},
    validate::{self, Fields},
};
use crate::{
    error::{ApiError, ApiResult},
    state::{AppState, EncoderModel},
    text::{Specials, Tokenizer},
};

/// The model whose tokenizer is asked.
enum Subject<'a> {
    Generator(&'a AppState),
    Encoder(&'a EncoderModel),
}

impl<'a> Subject<'a> {
    /// The model that a request names, of those that its address serves; without a name the first of them.
    fn find(state: &'a AppState, fields: &mut Fields) -> ApiResult<Self> {
        let generates = state.generates();
        let encoder = |name: &str| state.encoders().iter().find(|encoder| encoder.name() == name);
        match fields.string("model")?.filter(|name| !name.is_empty()) {
            None if generates => Ok(Self::Generator(state)),
            None => match state.shown().next() {
                Some(encoder) => Ok(Self::Encoder(encoder)),
                None => Err(ApiError::invalid("model", "No model is served here.")),
            },
            Some(asked) => match state.resolve(&asked).map(|name| encoder(&name.served)) {
                Some(Some(encoder)) if state.view().shows(encoder.task()) => Ok(Self::Encoder(encoder)),
                Some(None) if generates => Ok(Self::Generator(state)),
                _ => Err(unknown_model(&asked)),
            },
        }
    }

    fn tokenizer(&self) -> &'a Arc<Tokenizer> {
        match self {
            Self::Generator(state) => &state.text().tokenizer,
            Self::Encoder(encoder) => &encoder.tokenizer,
        }
    }

    fn max_len(&self) -> usize {
        match self {
            Self::Generator(state) => state.limits().max_model_len,
            Self::Encoder(encoder) => encoder.handle.info().max_seq_len,
        }
    }

    fn vocab_size(&self) -> usize {
        match self {
            Self::Generator(state) => state.limits().vocab_size,
            Self::Encoder(encoder) => encoder.handle.info().vocab_size,
        }
    }
}

/// Token ids of `prompt`, or of `messages` as the chat route would read them.
#[utoipa::path(
    post, path = "/tokenize", tag = "text", request_body(content = Object, description = "`prompt` or `messages`."),
    responses(
        (status = 200, description = "The ids.", body = Tokenized),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn tokenize(State(state): State<AppState>, request: Request) -> ApiResult<Json<Tokenized>> {
    let mut fields = body::read_fields(&state, request).await?;
    let subject = Subject::find(&state, &mut fields)?;
    let with_strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let add_special_tokens = fields.bool("add_special_tokens")?;
    let tokens = match fields.string("prompt")? {
        Some(prompt) => {
            let add_special_tokens = add_special_tokens.unwrap_or(true);
            let work = tokens::encode(
                &state,
                subject.tokenizer(),
                vec![prompt],
                Specials::Parse,
                add_special_tokens,
            );
            work.await?.into_iter().next().unwrap_or_default()
        }
        None => {
            if let Subject::Encoder(encoder) = subject {
                let chats = fields.map().contains_key("messages");
                return Err(if chats {
                    wrong_task(encoder.name(), task_name(encoder.task()), "chats")
                } else {
                    ApiError::invalid("prompt", "'prompt' is required.")
                });
            }
            let conversation = Conversation::read(&state, &mut fields)?;
            chat::encode(&state, conversation, usize::MAX).await?
        }
    };
    let text = TokenText::of(subject.tokenizer());
    let token_strs = with_strings.then(|| tokens.iter().map(|id| text.label(*id)).collect());
    Ok(Json(Tokenized { count: tokens.len(), max_model_len: subject.max_len(), tokens, token_strs }))
}

/// The text of `tokens`.
#[utoipa::path(
    post, path = "/detokenize", tag = "text", request_body(content = Object, description = "`tokens`: an array of ids."),
    responses(
        (status = 200, description = "The text.", body = Detokenized),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    request: Request,
) -> ApiResult<Json<Detokenized>> {
    const NAME: &str = "tokens";
    let mut fields = body::read_fields(&state, request).await?;
    let subject = Subject::find(&state, &mut fields)?;
    let skip_special = fields.bool("skip_special_tokens")?.unwrap_or(false);
    let Some(Value::Array(items)) = fields.take(NAME) else {
        return Err(ApiError::invalid(NAME, "'tokens' must be an array of token ids."));
    };
    let ids = validate::token_ids(NAME, &items, subject.vocab_size())?;
    let prompt = tokens::decode(&state, subject.tokenizer(), ids, skip_special).await?;
    Ok(Json(Detokenized { prompt }))
}
