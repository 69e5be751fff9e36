//! `POST /tokenize` and `POST /detokenize`, in the shapes vLLM's clients know.

use axum::{
    Json,
    extract::{Request, State},
};
use serde_json::Value;

use super::{
    body, chat,
    messages::Conversation,
    params,
    tokens::{self, TokenText},
    types::{Detokenized, Tokenized},
    validate,
};
use crate::{
    error::{ApiError, ApiResult},
    state::AppState,
    text::Specials,
};

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
    params::model(&state, &mut fields)?;
    let with_strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let add_special_tokens = fields.bool("add_special_tokens")?;
    let tokens = match fields.string("prompt")? {
        Some(prompt) => {
            let add_special_tokens = add_special_tokens.unwrap_or(true);
            let lists = tokens::encode(&state, vec![prompt], Specials::Parse, add_special_tokens).await?;
            lists.into_iter().next().unwrap_or_default()
        }
        None => {
            let conversation = Conversation::read(&state, &mut fields)?;
            chat::encode(&state, conversation).await?
        }
    };
    let text = TokenText::new(&state);
    let token_strs = with_strings.then(|| tokens.iter().map(|id| text.label(*id)).collect());
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: state.limits().max_model_len,
        tokens,
        token_strs,
    }))
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
    params::model(&state, &mut fields)?;
    let skip_special = fields.bool("skip_special_tokens")?.unwrap_or(false);
    let Some(Value::Array(items)) = fields.take(NAME) else {
        return Err(ApiError::invalid(NAME, "'tokens' must be an array of token ids."));
    };
    let ids = validate::token_ids(NAME, &items, state.limits().vocab_size)?;
    let prompt = tokens::decode(&state, ids, skip_special).await?;
    Ok(Json(Detokenized { prompt }))
}
