//! From the inputs of a request to framed token ids: prompts, tokenising on worker threads, truncation.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use ingle_engine::embed::EncoderInput;
use serde_json::Value;

use super::Truncation;
use crate::http::{
    tokens::text_error,
    validate::{Fields, kind_of, token_ids},
};
use crate::{
    error::{ApiError, ApiResult, quote},
    state::{AppState, EncoderModel},
    text::{Framed, Specials, Tokenizer},
};

/// Bytes of text that one worker takes at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Workers that one request uses at most.
const WORKERS: usize = 4;
/// Names of prompts in a message at most.
const MAX_NAMES: usize = 16;

/// What a request wants encoded.
#[derive(Debug)]
pub(crate) enum Inputs {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

impl Inputs {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Ids(ids) => ids.len(),
        }
    }
}

/// An input ready for the model.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) input: EncoderInput,
    /// Tokens that were cut off.
    pub(crate) dropped: usize,
}

impl From<Framed> for Encoded {
    fn from(framed: Framed) -> Self {
        let Framed { ids, types, dropped } = framed;
        Self { input: EncoderInput { ids, type_ids: types }, dropped }
    }
}

/// Tokens of all inputs.
pub(crate) fn num_tokens(inputs: &[Encoded]) -> u64 {
    inputs.iter().map(|encoded| encoded.input.ids.len() as u64).sum()
}

/// Reads a string, a list of strings, a list of token ids, or a list of such lists.
pub(crate) fn read(
    state: &AppState,
    encoder: &EncoderModel,
    fields: &mut Fields,
    name: &str,
) -> ApiResult<Inputs> {
    let wrong = || {
        let message = format!(
            "'{name}' must be a string, an array of strings, an array of token ids, or an array of such arrays."
        );
        ApiError::invalid(name, message)
    };
    let info = encoder.handle.info();
    let ids = |path: &str, items: &[Value]| {
        // Ids far over the limit need not be looked at one by one; what is cut later may be longer than the model takes.
        if items.is_empty() {
            return Err(ApiError::invalid(path, format!("'{path}' is an empty array.")));
        }
        token_ids(path, items, info.vocab_size).map_err(|_| {
            let message = format!(
                "'{path}' holds something that is no token id of this model (0 to {}). Clients that tokenise for \
                 other models should send text (LangChain: check_embedding_ctx_length=False).",
                info.vocab_size.saturating_sub(1)
            );
            ApiError::invalid(path, message)
        })
    };
    let items = match fields.take(name) {
        None => return Err(ApiError::invalid(name, format!("'{name}' is required."))),
        Some(Value::String(text)) => return Ok(Inputs::Texts(vec![text])),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(wrong()),
    };
    match items.first() {
        None => Err(ApiError::invalid(name, format!("'{name}' is an empty array."))),
        Some(Value::Number(_)) => Ok(Inputs::Ids(vec![ids(name, &items)?])),
        Some(Value::String(_)) => {
            check_count(state, name, items.len())?;
            texts(name, items).map(Inputs::Texts)
        }
        Some(Value::Array(_)) => {
            check_count(state, name, items.len())?;
            let lists = items.into_iter().enumerate().map(|(i, item)| match item {
                Value::Array(items) => ids(&format!("{name}[{i}]"), &items),
                other => {
                    let message =
                        format!("'{name}[{i}]' must be an array of token ids, not {}.", kind_of(&other));
                    Err(ApiError::invalid(name, message))
                }
            });
            lists.collect::<ApiResult<Vec<_>>>().map(Inputs::Ids)
        }
        Some(_) => Err(wrong()),
    }
}

/// Refuses more inputs than a request may have.
pub(crate) fn check_count(state: &AppState, name: &str, len: usize) -> ApiResult<()> {
    let max = state.config().max_inputs;
    if len > max {
        let message = format!(
            "'{name}' has {len} entries; {max} are allowed in one request (--max-client-batch-size)."
        );
        return Err(ApiError::invalid(name, message));
    }
    Ok(())
}

/// `items` as strings.
pub(crate) fn texts(name: &str, items: Vec<Value>) -> ApiResult<Vec<String>> {
    let text = |(i, item)| match item {
        Value::String(text) => Ok(text),
        other => {
            let message = format!("'{name}[{i}]' must be a string, not {}.", kind_of(&other));
            Err(ApiError::invalid(name, message))
        }
    };
    items.into_iter().enumerate().map(text).collect()
}

/// The text that goes before inputs: the prompt that `prompt_name` or `input_type` names, else the model's default one.
pub(crate) fn read_prompt(encoder: &EncoderModel, fields: &mut Fields) -> ApiResult<Option<String>> {
    let info = encoder.handle.info();
    let by_name = fields.string("prompt_name")?;
    let by_type = fields.string("input_type")?;
    if let Some(name) = by_name {
        return match info.prompts.get(&name) {
            Some(prompt) => Ok(Some(prompt.clone())),
            None => {
                let names: Vec<&str> = info.prompts.keys().map(String::as_str).take(MAX_NAMES).collect();
                let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                let message = format!("The model has no prompt '{}'; it has: {known}.", quote(&name));
                Err(ApiError::invalid("prompt_name", message))
            }
        };
    }
    let default = || info.default_prompt.as_ref().and_then(|name| info.prompts.get(name)).cloned();
    // What clients of other services send, and the names under which models keep the two prompts.
    let names: &[&str] = match by_type.as_deref() {
        None => return Ok(default()),
        Some("query" | "search_query") => &["query", "search_query"],
        Some("document" | "passage" | "search_document") => {
            &["document", "passage", "search_document", "corpus"]
        }
        Some(other) if info.prompts.contains_key(other) => return Ok(info.prompts.get(other).cloned()),
        Some(other) => {
            let message = format!(
                "'input_type' must be 'query' or 'document' (or 'search_query', 'search_document', 'passage'), not \
                 '{}'.",
                quote(other)
            );
            return Err(ApiError::invalid("input_type", message));
        }
    };
    // A model that treats both alike has no such prompt.
    Ok(names.iter().find_map(|name| info.prompts.get(*name)).cloned().or_else(default))
}

/// Frames `inputs`. `param` is what they came from.
pub(crate) async fn encode(
    state: &AppState,
    encoder: &EncoderModel,
    inputs: Inputs,
    prompt: Option<String>,
    truncation: Truncation,
    param: &str,
) -> ApiResult<Vec<Encoded>> {
    let many = inputs.len() > 1;
    let name = |i: usize| if many { format!("{param}[{i}]") } else { param.to_owned() };
    match inputs {
        Inputs::Ids(lists) => lists
            .into_iter()
            .enumerate()
            .map(|(i, mut ids)| {
                // Ids are taken as they are: whoever counts in ids has put the special ones among them.
                let total = ids.len();
                if total > truncation.max {
                    if !truncation.cut {
                        return Err(truncation.refuse(&name(i), total));
                    }
                    match truncation.side {
                        crate::text::Side::Right => ids.truncate(truncation.max),
                        crate::text::Side::Left => drop(ids.drain(..total - truncation.max)),
                    }
                }
                let dropped = total - ids.len();
                Ok(Encoded { input: EncoderInput { ids, type_ids: Vec::new() }, dropped })
            })
            .collect(),
        Inputs::Texts(texts) => {
            let tokenizer = Arc::clone(&encoder.tokenizer);
            let ids = token_lists(state, encoder, texts, prompt, param).await?;
            ids.into_iter()
                .enumerate()
                .map(|(i, ids)| {
                    let total = ids.len() + tokenizer.frame().num_special();
                    if total == 0 {
                        return Err(ApiError::invalid(param, format!("'{}' has no tokens.", name(i))));
                    }
                    if total > truncation.max && !truncation.cut {
                        return Err(truncation.refuse(&name(i), total));
                    }
                    Ok(tokenizer.frame().text(&ids, truncation.max, truncation.side).into())
                })
                .collect()
        }
    }
}

/// The token ids of `texts` without special tokens, in their order; long lists are shared by several workers.
pub(crate) async fn token_lists(
    state: &AppState,
    encoder: &EncoderModel,
    texts: Vec<String>,
    prompt: Option<String>,
    param: &str,
) -> ApiResult<Vec<Vec<u32>>> {
    let bytes: usize = texts.iter().map(String::len).sum();
    let max = state.pool().limits().max_bytes;
    if bytes > max {
        return Err(text_error(crate::text::TextError::TooLong { bytes, limit: max }, param));
    }
    let (lower_case, prompt) = (encoder.handle.info().lower_case, Arc::new(prompt));
    let runs = pieces(texts).into_iter().map(|piece| {
        let (tokenizer, prompt) = (Arc::clone(&encoder.tokenizer), Arc::clone(&prompt));
        let bytes = piece.iter().map(String::len).sum();
        let work = move || {
            piece.into_iter().map(|text| ids(&tokenizer, text, prompt.as_deref(), lower_case)).collect()
        };
        state.pool().run(bytes, work)
    });
    let lists: Vec<Vec<Vec<u32>>> =
        stream::iter(runs).buffered(WORKERS).try_collect().await.map_err(|error| text_error(error, param))?;
    Ok(lists.into_iter().flatten().collect())
}

/// The ids of one text, without special tokens around it. Special-token text inside it is read as such, as
/// sentence-transformers does.
pub(crate) fn ids(
    tokenizer: &Tokenizer,
    text: String,
    prompt: Option<&str>,
    lower_case: bool,
) -> Result<Vec<u32>, crate::text::TextError> {
    let text = match prompt {
        Some(prompt) => format!("{prompt}{text}"),
        None => text,
    };
    let text = if lower_case { text.to_lowercase() } else { text };
    tokenizer.encode(&text, Specials::Parse, false)
}

/// `texts` in runs of about [`PIECE_BYTES`].
fn pieces(texts: Vec<String>) -> Vec<Vec<String>> {
    let mut pieces = vec![Vec::new()];
    let mut bytes = 0_usize;
    for text in texts {
        if bytes > PIECE_BYTES {
            pieces.push(Vec::new());
            bytes = 0;
        }
        // A short text costs more than its bytes.
        bytes = bytes.saturating_add(text.len()).saturating_add(64);
        if let Some(piece) = pieces.last_mut() {
            piece.push(text);
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_every_text_in_order() {
        let texts: Vec<String> = (0..5000).map(|i| format!("{i} {}", "x".repeat(i % 300))).collect();
        let pieces = pieces(texts.clone());
        assert!(pieces.len() > 1);
        assert_eq!(pieces.concat(), texts);
        assert_eq!(super::pieces(Vec::new()).concat(), Vec::<String>::new());
    }
}
