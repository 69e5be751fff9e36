//! `POST /embed`, `POST /similarity`, `POST /` and `GET /info`, in the shapes of text-embeddings-inference.

use axum::{
    Json,
    extract::{Query, Request, State, rejection::QueryRejection},
    response::Response,
};
use ingle_engine::embed::{EncoderTask, PoolingMode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Scale, Truncation, cosine, embeddings, inputs, model, named, normalize,
    rerank::{self, required},
    respond, rows, rows_as, times,
};
use crate::http::{
    body,
    types::TeiInfo,
    validate::{Fields, kind_of},
};
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
    let fields = body::read_fields(&state, request).await?;
    embed_fields(state, fields).await
}

/// [`embed`] of a body that was read.
async fn embed_fields(state: AppState, mut fields: Fields) -> ApiResult<Response> {
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
    let scale = if scaled { Scale::Model } else { Scale::Raw };
    let output = rows_as(&state, &encoder, encoded, times, scale).await?;
    let num_numbers = output.rows.len();
    let vectors: Vec<Vec<f32>> = output
        .rows
        .chunks_exact(output.width)
        .map(|row| {
            let mut vector = embeddings::cut(row, dimensions, scaled && info.normalize);
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
    let fields = body::read_fields(&state, request).await?;
    similarity_fields(state, fields).await
}

/// What clients ask that know only an address: by what the body has, ranks, compares or embeds.
#[utoipa::path(
    post, path = "/", tag = "encode",
    request_body(content = Object, description = "That of `/rerank` (`query` and `texts`), of `/similarity` (`inputs`: an object) or of `/embed`."),
    responses(
        (status = 200, description = "The answer of that route."),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn root(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let fields = body::read_fields(&state, request).await?;
    if fields.map().contains_key("query") || fields.map().contains_key("texts") {
        return rerank::create_fields(state, fields).await;
    }
    match fields.map().get("inputs") {
        Some(Value::Object(_)) => similarity_fields(state, fields).await,
        _ => embed_fields(state, fields).await,
    }
}

/// [`similarity`] of a body that was read.
async fn similarity_fields(state: AppState, mut fields: Fields) -> ApiResult<Response> {
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
        None => Fields::new(serde_json::Map::new()),
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

/// What `/info` is asked.
#[derive(Debug, Deserialize)]
pub(crate) struct InfoQuery {
    model: Option<String>,
}

/// Facts of a model that encodes; without `model` of the first.
#[utoipa::path(
    get, path = "/info", tag = "encode", params(("model" = Option<String>, Query, description = "A served name.")),
    responses(
        (status = 200, description = "The facts.", body = TeiInfo),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn info(
    State(state): State<AppState>,
    query: Result<Query<InfoQuery>, QueryRejection>,
) -> ApiResult<Json<TeiInfo>> {
    let Ok(Query(InfoQuery { model })) = query else {
        return Err(ApiError::invalid("model", "The query may have one 'model'."));
    };
    let encoder = match model.filter(|name| !name.is_empty()) {
        Some(name) => named(&state, &name, &[EncoderTask::Embed, EncoderTask::Rerank])?.0,
        None => state.shown().next().cloned().ok_or_else(|| {
            ApiError::new(ErrorKind::NotFound, "No embedding model and no reranker is served.")
        })?,
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
