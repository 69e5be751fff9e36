//! `POST /rerank`, `/v1/rerank`, `/v2/rerank`: which documents answer a query, in the shape of Jina and Cohere; with
//! `texts` instead of `documents` in that of text-embeddings-inference.

use axum::{
    extract::{Request, State},
    response::Response,
};
use ingle_engine::embed::{EncoderTask, ScoreActivation};
use serde_json::Value;

use super::{Truncation, activate, inputs, model, respond, rows, times};
use crate::http::{
    body, new_id,
    types::{
        ApiVersion, BilledUnits, RerankDocument, RerankList, RerankMeta, RerankResult, RerankUsage, TeiRank,
    },
    validate::{Fields, kind_of},
};
use crate::{
    error::{ApiError, ApiResult},
    state::{AppState, EncoderModel},
};
use inputs::Encoded;

/// Sorts documents by how well they answer a query.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "encode", request_body = crate::http::types::RerankRequest,
    responses(
        (status = 200, description = "The best documents first.", body = RerankList),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    )
)]
pub(crate) async fn create(State(state): State<AppState>, request: Request) -> ApiResult<Response> {
    let fields = body::read_fields(&state, request).await?;
    create_fields(state, fields).await
}

/// [`create`] of a body that was read.
pub(super) async fn create_fields(state: AppState, mut fields: Fields) -> ApiResult<Response> {
    let (encoder, name) = model(&state, &mut fields, &[EncoderTask::Rerank])?;
    let query = required(&mut fields, "query")?;
    let num_special = encoder.tokenizer.frame().num_special_pair();
    let truncation = Truncation::read(&state, &encoder, &mut fields, num_special)?;
    let texts = fields.take("texts");
    let is_tei = texts.is_some();
    let param = if is_tei { "texts" } else { "documents" };
    let documents = documents(&state, param, if is_tei { texts } else { fields.take(param) })?;
    let returns = fields.bool(if is_tei { "return_text" } else { "return_documents" })?.unwrap_or(false);
    let raw_scores = is_tei && fields.bool("raw_scores")?.unwrap_or(false);
    let top_n = if is_tei {
        None
    } else {
        fields.int::<usize>("top_n", 1, i128::from(u32::MAX))?.or(fields.int(
            "top_k",
            1,
            i128::from(u32::MAX),
        )?)
    };
    let max_per_document = fields.int::<usize>("max_tokens_per_doc", 1, i128::from(u32::MAX))?;
    fields.refuse_unless("rank_fields", "send the text of a document", |_| false)?;
    fields.refuse_unless("max_chunks_per_doc", "documents are not cut into chunks", |value| value == 1)?;
    let ignored = fields.ignored();

    let times = times(documents.len());
    let kept = if returns { documents.clone() } else { Vec::new() };
    let pairs = Pairs { queries: vec![query], texts: documents, max_per_text: max_per_document };
    let encoded = pairs.encode(&state, &encoder, truncation, param).await?;
    let tokens = inputs::num_tokens(&encoded);
    let dropped: Vec<usize> = encoded.iter().map(|encoded| encoded.dropped).collect();
    let output = rows(&state, &encoder, encoded, times).await?;
    let activation = match (is_tei, raw_scores) {
        (false, _) => encoder.handle.info().activation,
        (true, true) => ScoreActivation::Identity,
        (true, false) => ScoreActivation::Sigmoid,
    };
    let scores = output.rows.chunks_exact(output.width).map(|row| activate(row[0], activation));
    let mut ranked: Vec<(usize, f32)> = scores.enumerate().collect();
    // Equal scores stay in the order of the documents.
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked.truncate(top_n.unwrap_or(usize::MAX));
    let total = dropped.iter().sum();
    if is_tei {
        let text = |index: usize| kept.get(index).cloned();
        let ranks: Vec<TeiRank> =
            ranked.into_iter().map(|(index, score)| TeiRank { index, score, text: text(index) }).collect();
        return respond(&state, ranks, 0, total, ignored).await;
    }
    let cuts = truncation.cut || max_per_document.is_some();
    let results = ranked
        .into_iter()
        .map(|(index, relevance_score)| RerankResult {
            index,
            relevance_score,
            document: kept.get(index).cloned().map(|text| RerankDocument { text }),
            dropped_tokens: if cuts { dropped.get(index).copied() } else { None },
        })
        .collect();
    let list = RerankList {
        id: new_id("rerank"),
        model: name,
        results,
        usage: RerankUsage { prompt_tokens: tokens, total_tokens: tokens },
        meta: RerankMeta {
            api_version: ApiVersion { version: "2" },
            billed_units: BilledUnits { search_units: 0 },
        },
    };
    respond(&state, list, 0, total, ignored).await
}

/// A string that must be there.
pub(super) fn required(fields: &mut Fields, name: &str) -> ApiResult<String> {
    fields.string(name)?.ok_or_else(|| ApiError::invalid(name, format!("'{name}' is required.")))
}

/// Strings, or objects with a `text`.
fn documents(state: &AppState, name: &str, value: Option<Value>) -> ApiResult<Vec<String>> {
    let Some(value) = value else {
        return Err(ApiError::invalid(name, format!("'{name}' is required.")));
    };
    let Value::Array(items) = value else {
        return Err(ApiError::invalid(name, format!("'{name}' must be an array, not {}.", kind_of(&value))));
    };
    if items.is_empty() {
        return Err(ApiError::invalid(name, format!("'{name}' is an empty array.")));
    }
    inputs::check_count(state, name, items.len())?;
    let text = |(i, item): (usize, Value)| match item {
        Value::String(text) => Ok(text),
        Value::Object(mut object) => match object.swap_remove("text") {
            Some(Value::String(text)) => Ok(text),
            _ => Err(ApiError::invalid(name, format!("'{name}[{i}]' must have a 'text' that is a string."))),
        },
        other => {
            let message = format!(
                "'{name}[{i}]' must be a string or an object with a 'text', not {}.",
                kind_of(&other)
            );
            Err(ApiError::invalid(name, message))
        }
    };
    items.into_iter().enumerate().map(text).collect()
}

/// Texts, each with its query: one for all, or one for each.
pub(super) struct Pairs {
    pub(super) queries: Vec<String>,
    pub(super) texts: Vec<String>,
    /// Tokens of a text at most.
    pub(super) max_per_text: Option<usize>,
}

impl Pairs {
    /// Frames the pairs, in the order of the texts.
    pub(super) async fn encode(
        self,
        state: &AppState,
        encoder: &EncoderModel,
        truncation: Truncation,
        param: &str,
    ) -> ApiResult<Vec<Encoded>> {
        let num_queries = self.queries.len();
        let all = self.queries.into_iter().chain(self.texts).collect();
        let mut queries = inputs::token_lists(state, encoder, all, None, param).await?;
        let texts = queries.split_off(num_queries);
        let frame = encoder.tokenizer.frame();
        let only_query = if num_queries == 1 { queries.first().cloned() } else { None };
        let mut encoded = Vec::with_capacity(texts.len());
        for (i, mut text) in texts.into_iter().enumerate() {
            let query = only_query.as_ref().or(queries.get(i)).map(Vec::as_slice).unwrap_or_default();
            let own = text.len();
            text.truncate(self.max_per_text.unwrap_or(usize::MAX));
            let total = query.len() + text.len() + frame.num_special_pair();
            if total > truncation.max && !truncation.cut {
                return Err(truncation.refuse(&format!("{param}[{i}]"), total));
            }
            let framed = frame.pair(query, &text, truncation.max, truncation.side);
            let mut one: Encoded =
                framed.map_err(|error| crate::http::tokens::text_error(error, param))?.into();
            one.dropped += own - text.len();
            encoded.push(one);
        }
        Ok(encoded)
    }
}
