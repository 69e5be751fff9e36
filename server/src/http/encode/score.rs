//! `POST /v1/score` and `/score`: how alike two texts are, in vLLM's shape. A reranker scores the pair; of an embedding
//! model it is the cosine.

use axum::{
    extract::{Request, State},
    response::Response,
};
use ingle_engine::embed::EncoderTask;
use serde_json::Value;

use super::{Truncation, activate, cosine, inputs, model, rerank::Pairs, respond, rows, times};
use crate::http::{
    body, new_id,
    types::{EmbeddingUsage, ScoreList, ScoreObject},
    validate::{Fields, kind_of},
};
use crate::{
    error::{ApiError, ApiResult},
    state::{AppState, unix_seconds},
};
use inputs::Inputs;

/// Scores pairs of texts.
#[utoipa::path(
    post, path = "/v1/score", tag = "encode", request_body = crate::http::types::ScoreRequest,
    responses(
        (status = 200, description = "A score for each pair, in order.", body = ScoreList),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn create(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let mut fields = body::read_fields(&state, request).await?;
    let (encoder, name) = model(&state, &mut fields, &[EncoderTask::Rerank, EncoderTask::Embed])?;
    let frame = encoder.tokenizer.frame();
    let is_pair = encoder.task() == EncoderTask::Rerank;
    let num_special = if is_pair { frame.num_special_pair() } else { frame.num_special() };
    let truncation = Truncation::read(&state, &encoder, &mut fields, num_special)?;
    let first = side(&state, &mut fields, ["text_1", "queries"])?;
    let second = side(&state, &mut fields, ["text_2", "documents"])?;
    if first.len() != 1 && first.len() != second.len() {
        let message = format!(
            "There are {} first texts and {} second ones; one first text goes with all second ones, else their \
             numbers must be equal.",
            first.len(),
            second.len()
        );
        return Err(ApiError::invalid("text_1", message));
    }
    let ignored = fields.ignored();

    let (num_first, num_second) = (first.len(), second.len());
    let encoded = if is_pair {
        let pairs = Pairs { queries: first, texts: second, max_per_text: None };
        pairs.encode(&state, &encoder, truncation, "text_2").await?
    } else {
        let all = Inputs::Texts(first.into_iter().chain(second).collect());
        inputs::encode(&state, &encoder, all, None, truncation, "text_1 + text_2").await?
    };
    let tokens = inputs::num_tokens(&encoded);
    let dropped: Vec<usize> = encoded.iter().map(|encoded| encoded.dropped).collect();
    let times = times(encoded.len());
    let output = rows(&state, &encoder, encoded, times).await?;
    let row = |i: usize| output.rows.chunks_exact(output.width).nth(i).unwrap_or_default();
    let score = |i: usize| {
        if is_pair {
            activate(row(i).first().copied().unwrap_or(0.0), encoder.handle.info().activation)
        } else {
            cosine(row(if num_first == 1 { 0 } else { i }), row(num_first + i))
        }
    };
    let lost = |i: usize| {
        let of = |place: usize| dropped.get(place).copied().unwrap_or(0);
        if is_pair { of(i) } else { of(if num_first == 1 { 0 } else { i }) + of(num_first + i) }
    };
    let data = (0..num_second)
        .map(|index| ScoreObject {
            index,
            object: "score",
            score: score(index),
            dropped_tokens: truncation.cut.then(|| lost(index)),
        })
        .collect();
    let list = ScoreList {
        id: new_id("score"),
        object: "list",
        created: unix_seconds(),
        model: name,
        data,
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    };
    respond(&state, list, 0, dropped.iter().sum(), ignored).await
}

/// A string or a list of strings under one of two names.
fn side(state: &AppState, fields: &mut Fields, names: [&'static str; 2]) -> ApiResult<Vec<String>> {
    let [name, other] = names;
    let (name, value) = match fields.take(name) {
        Some(value) => (name, Some(value)),
        None => (other, fields.take(other)),
    };
    match value {
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(items)) if items.is_empty() => {
            Err(ApiError::invalid(name, format!("'{name}' is an empty array.")))
        }
        Some(Value::Array(items)) => {
            inputs::check_count(state, name, items.len())?;
            inputs::texts(name, items)
        }
        None => Err(ApiError::invalid(names[0], format!("'{}' is required.", names[0]))),
        Some(value) => {
            let message =
                format!("'{name}' must be a string or an array of strings, not {}.", kind_of(&value));
            Err(ApiError::invalid(name, message))
        }
    }
}
