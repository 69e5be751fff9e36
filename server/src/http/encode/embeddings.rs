//! `POST /v1/embeddings`: texts to vectors, in OpenAI's shape.

use axum::{
    extract::{Request, State},
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use ingle_engine::embed::EncoderTask;

use super::{Truncation, inputs, model, normalize, respond, rows, times};
use crate::http::{
    body,
    types::{EmbeddingList, EmbeddingObject, EmbeddingUsage, EmbeddingVector},
    validate::Fields,
};
use crate::{
    error::{ApiError, ApiResult},
    state::{AppState, EncoderModel},
};

/// Answers an embeddings request.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "encode", request_body = crate::http::types::EmbeddingRequest,
    responses(
        (status = 200, description = "A vector for each input, in order.", body = EmbeddingList),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn create(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let mut fields = body::read_fields(&state, request).await?;
    let (encoder, name) = model(&state, &mut fields, &[EncoderTask::Embed])?;
    let info = encoder.handle.info();
    let base64 = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::invalid(
                "encoding_format",
                "'encoding_format' must be 'float' or 'base64'.",
            ));
        }
    };
    let dimensions = dimensions(&encoder, &mut fields)?;
    fields.string("user")?;
    let num_special = encoder.tokenizer.frame().num_special();
    let truncation = Truncation::read(&state, &encoder, &mut fields, num_special)?;
    let prompt = inputs::read_prompt(&encoder, &mut fields)?;
    let input = inputs::read(&state, &encoder, &mut fields, "input")?;
    let ignored = fields.ignored();

    let times = times(input.len());
    let encoded = inputs::encode(&state, &encoder, input, prompt, truncation, "input").await?;
    let tokens = inputs::num_tokens(&encoded);
    let dropped: Vec<usize> = encoded.iter().map(|encoded| encoded.dropped).collect();
    let output = rows(&state, &encoder, encoded, times).await?;
    let num_numbers = output.rows.len();
    let objects = output.rows.chunks_exact(output.width).zip(&dropped).enumerate();
    let data = objects
        .map(|(index, (row, dropped))| EmbeddingObject {
            object: "embedding",
            index,
            embedding: vector(cut(row, dimensions, info.normalize), base64),
            dropped_tokens: truncation.cut.then_some(*dropped),
        })
        .collect();
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
    let list = EmbeddingList { object: "list", data, model: name, usage };
    respond(&state, list, num_numbers, dropped.iter().sum(), ignored).await
}

/// Reads `dimensions`: what the model may be cut to, or its own width.
pub(super) fn dimensions(encoder: &EncoderModel, fields: &mut Fields) -> ApiResult<usize> {
    const NAME: &str = "dimensions";
    let info = encoder.handle.info();
    let Some(wanted) = fields.int::<usize>(NAME, 1, info.dimensions.max(1) as i128)? else {
        return Ok(info.dimensions);
    };
    let widths = encoder.widths.as_slice();
    if wanted == info.dimensions || widths.contains(&wanted) {
        return Ok(wanted);
    }
    let own = info.dimensions;
    let message = if widths.is_empty() {
        format!(
            "The model has {own} dimensions and does not say that it was trained to be cut to fewer; if it was, start \
             the server with --embedding-dimensions."
        )
    } else {
        let list: Vec<String> = widths.iter().map(ToString::to_string).collect();
        format!("'{NAME}' must be {own} or one of {}, to which the model may be cut.", list.join(", "))
    };
    Err(ApiError::invalid(NAME, message))
}

/// The first `dimensions` numbers of `row`, scaled anew if the model's rows have length 1.
pub(super) fn cut(row: &[f32], dimensions: usize, scaled: bool) -> Vec<f32> {
    let mut cut = row.get(..dimensions).unwrap_or(row).to_vec();
    if scaled && cut.len() < row.len() {
        normalize(&mut cut);
    }
    cut
}

fn vector(row: Vec<f32>, base64: bool) -> EmbeddingVector {
    if !base64 {
        return EmbeddingVector::Float(row);
    }
    let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
    EmbeddingVector::Base64(STANDARD.encode(bytes))
}
