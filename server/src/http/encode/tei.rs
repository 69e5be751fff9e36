//! `POST /embed`, `POST /similarity` and `GET /info`, in the shapes of text-embeddings-inference.

use axum::{
    Json,
    extract::{Request, State},
    response::Response,
};
use ingle_engine::embed::{EncoderTask, PoolingMode};
use serde_json::{Value, json};

use super::{
    Truncation, cosine, embeddings, inputs, model, normalize, rerank::required, respond, rows, times,
};
use crate::http::{body, types::TeiInfo, validate::kind_of};
use crate::{
    error::{ApiError, ApiResult, ErrorKind},
    state::AppState,
};
use inputs::Inputs;

/// Vectors of `inputs` as plain arrays.
#[utoipa::path(
    post, path = "/embed", tag = "encode",
    request_body(content = Object, description = "`inputs`, `normalize`, `truncate`, `truncation_direction`, `prompt_name`, `dimensions`."),
    responses(
        (status = 200, description = "A vector for each input, in order.", body = Vec<Vec<f32>>),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn embed(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let mut fields = body::read_fields(&state, request).await?;
    let (encoder, _) = model(&state, &mut fields, &[EncoderTask::Embed])?;
    let info = encoder.handle.info();
    let scaled = fields.bool("normalize")?.unwrap_or(true);
    let dimensions = embeddings::dimensions(&encoder, &mut fields)?;
    let num_special = encoder.tokenizer.frame().num_special();
    let truncation = Truncation::read(&state, &encoder, &mut fields, num_special)?;
    let prompt = inputs::read_prompt(&encoder, &mut fields)?;
    let input = inputs::read(&state, &encoder, &mut fields, "inputs")?;
    let ignored = fields.ignored();

    let times = times(input.len());
    let encoded = inputs::encode(&state, &encoder, input, prompt, truncation, "inputs").await?;
    let dropped = encoded.iter().map(|encoded| encoded.dropped).sum();
    let output = rows(&state, &encoder, encoded, times).await?;
    let num_numbers = output.rows.len();
    let vectors: Vec<Vec<f32>> = output
        .rows
        .chunks_exact(output.width)
        .map(|row| {
            let mut vector = embeddings::cut(row, dimensions, info.normalize);
            if scaled && !info.normalize {
                normalize(&mut vector);
            }
            vector
        })
        .collect();
    respond(&state, vectors, num_numbers, dropped, ignored).await
}

/// Cosines of a sentence with others.
#[utoipa::path(
    post, path = "/similarity", tag = "encode",
    request_body(content = Object, description = "`inputs`: `source_sentence` and `sentences`; `parameters`: `truncate`, `truncation_direction`, `prompt_name`."),
    responses(
        (status = 200, description = "A cosine for each sentence, in order.", body = Vec<f32>),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn similarity(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let mut fields = body::read_fields(&state, request).await?;
    let (encoder, _) = model(&state, &mut fields, &[EncoderTask::Embed])?;
    let mut input =
        fields.object("inputs")?.ok_or_else(|| ApiError::invalid("inputs", "'inputs' is required."))?;
    let source = required(&mut input, "source_sentence")?;
    let sentences = match input.take("sentences") {
        Some(Value::Array(items)) if !items.is_empty() => {
            inputs::check_count(&state, "inputs.sentences", items.len())?;
            inputs::texts("inputs.sentences", items)?
        }
        None => return Err(ApiError::invalid("inputs.sentences", "'inputs.sentences' is required.")),
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid("inputs.sentences", "'inputs.sentences' is an empty array."));
        }
        Some(other) => {
            let message = format!("'inputs.sentences' must be an array of strings, not {}.", kind_of(&other));
            return Err(ApiError::invalid("inputs.sentences", message));
        }
    };
    let mut parameters = match fields.object("parameters")? {
        Some(parameters) => parameters,
        None => crate::http::validate::Fields::new(serde_json::Map::new()),
    };
    let num_special = encoder.tokenizer.frame().num_special();
    let truncation = Truncation::read(&state, &encoder, &mut parameters, num_special)?;
    let prompt = inputs::read_prompt(&encoder, &mut parameters)?;
    let ignored = fields.ignored();

    let times = times(sentences.len() + 1);
    let all = Inputs::Texts(std::iter::once(source).chain(sentences).collect());
    let encoded = inputs::encode(&state, &encoder, all, prompt, truncation, "inputs").await?;
    let dropped = encoded.iter().map(|encoded| encoded.dropped).sum();
    let output = rows(&state, &encoder, encoded, times).await?;
    let mut rows = output.rows.chunks_exact(output.width);
    let source = rows.next().unwrap_or_default();
    let cosines: Vec<f32> = rows.map(|row| cosine(source, row)).collect();
    respond(&state, cosines, 0, dropped, ignored).await
}

/// Facts of the first model that encodes.
#[utoipa::path(
    get, path = "/info", tag = "encode",
    responses(
        (status = 200, description = "The facts.", body = TeiInfo),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn info(State(state): State<AppState>) -> ApiResult<Json<TeiInfo>> {
    let Some(encoder) = state.encoders().first() else {
        return Err(ApiError::new(ErrorKind::NotFound, "No embedding model and no reranker is served."));
    };
    let (info, config) = (encoder.handle.info(), encoder.handle.config());
    let model_type = match info.task {
        EncoderTask::Embed => {
            let names: Vec<&str> = info.pooling.iter().map(|mode| pooling_name(*mode)).collect();
            json!({"embedding": {"pooling": names.join("+")}})
        }
        EncoderTask::Rerank => {
            let labels = info.labels.iter().enumerate();
            let id2label: serde_json::Map<String, Value> =
                labels.clone().map(|(id, label)| (id.to_string(), json!(label))).collect();
            let label2id: serde_json::Map<String, Value> =
                labels.map(|(id, label)| (label.clone(), json!(id))).collect();
            json!({"reranker": {"id2label": id2label, "label2id": label2id}})
        }
    };
    Ok(Json(TeiInfo {
        model_id: encoder.card.root.clone(),
        model_sha: None,
        model_dtype: info.dtype.clone(),
        model_type,
        max_concurrent_requests: config.max_queued_inputs,
        max_input_length: info.max_seq_len,
        max_batch_tokens: config.max_batch_tokens,
        max_batch_requests: None,
        max_client_batch_size: state.config().max_inputs,
        auto_truncate: state.config().auto_truncate,
        tokenization_workers: state.pool().limits().workers,
        version: env!("CARGO_PKG_VERSION"),
    }))
}

fn pooling_name(mode: PoolingMode) -> &'static str {
    match mode {
        PoolingMode::Cls => "cls",
        PoolingMode::Max => "max",
        PoolingMode::Mean => "mean",
        PoolingMode::MeanSqrtLen => "mean_sqrt_len",
        PoolingMode::WeightedMean => "weighted_mean",
        PoolingMode::Last => "last_token",
    }
}
