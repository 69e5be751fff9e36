//! What the routes of embedding models and rerankers share: finding the model, truncation, tokens, rows.
//!
//! A request goes: fields are read ([`Options`]), texts become framed token ids on worker threads ([`inputs`]), the
//! encoder's thread computes rows ([`rows`]), the route writes them.

pub(crate) mod embeddings;
pub(crate) mod inputs;
pub(crate) mod rerank;
pub(crate) mod score;
pub(crate) mod tei;

use std::sync::Arc;
use std::time::Instant;

use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use ingle_engine::embed::{EncodeError, EncodeOutput, EncodeSubmitError, EncoderTask, ScoreActivation};
use serde::Serialize;

use super::{
    body, deadline, ignored_header,
    models::{GENERATE, task_name},
    params::{unknown_model, wrong_task},
    validate::Fields,
};
use crate::{
    error::{ApiError, ApiResult, ErrorKind, draining, engine_dead},
    metrics::EncodeTimes,
    record::{self, Progress, Record},
    state::{AppState, EncoderModel},
    text::Side,
};
use inputs::Encoded;

/// Numbers of an answer above which it is written on a worker thread.
const LARGE_ANSWER: usize = 1 << 16;

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
const X_DROPPED_TOKENS: HeaderName = HeaderName::from_static("x-dropped-tokens");

/// What a model that encodes is to do, in words for a 400.
fn wanted(tasks: &[EncoderTask]) -> &'static str {
    match tasks {
        [EncoderTask::Embed] => "embeds texts (embed)",
        [EncoderTask::Rerank] => "scores pairs of texts (rerank)",
        _ => "embeds texts or scores pairs (embed, rerank)",
    }
}

/// Finds the encoder that a request names, with the name it used. No name means the first model of the first of
/// `tasks` that is served.
pub(crate) fn model(
    state: &AppState,
    fields: &mut Fields,
    tasks: &[EncoderTask],
) -> ApiResult<(Arc<EncoderModel>, String)> {
    let name = fields.string("model")?.filter(|name| !name.is_empty());
    let Some(name) = name else {
        let first = tasks.iter().find_map(|task| state.shown().find(|encoder| encoder.task() == *task));
        return match first {
            Some(encoder) => {
                if let Some(record) = record::current() {
                    record.model(encoder.name(), encoder.name());
                }
                Ok((Arc::clone(encoder), encoder.name().to_owned()))
            }
            None => {
                let message = format!("No model is served that {}.", wanted(tasks));
                Err(ApiError::invalid("model", message))
            }
        };
    };
    named(state, &name, tasks)
}

/// The encoder called `name`, with the name for the answer.
pub(crate) fn named(
    state: &AppState,
    name: &str,
    tasks: &[EncoderTask],
) -> ApiResult<(Arc<EncoderModel>, String)> {
    let resolved = state.resolve(name).ok_or_else(|| unknown_model(name))?;
    let Some(encoder) = state.encoders().iter().find(|encoder| encoder.name() == resolved.served) else {
        return Err(wrong_task(name, GENERATE, wanted(tasks)));
    };
    if !tasks.contains(&encoder.task()) {
        return Err(wrong_task(name, task_name(encoder.task()), wanted(tasks)));
    }
    if !state.view().shows(encoder.task()) {
        return Err(unknown_model(name));
    }
    if let Some(record) = record::current() {
        record.model(name, &resolved.served);
    }
    Ok((Arc::clone(encoder), resolved.answer))
}

/// Counts what a route of encoders refuses or fails at, under the model that was asked; where none was found, under the
/// first that does what the route is for.
pub(crate) async fn count_failures(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let tasks: &[EncoderTask] = match (path.ends_with("rerank"), path.ends_with("score")) {
        (true, _) => &[EncoderTask::Rerank],
        (_, true) => &[EncoderTask::Rerank, EncoderTask::Embed],
        _ => &[EncoderTask::Embed, EncoderTask::Rerank],
    };
    let response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let asked = record::current().map(|record| record.served()).filter(|name| !name.is_empty());
        let first = || tasks.iter().find_map(|task| state.shown().find(|encoder| encoder.task() == *task));
        if let Some(name) = asked.or_else(|| first().map(|encoder| encoder.name().to_owned())) {
            state.metrics().not_encoded(&name);
        }
    }
    response
}

/// Answers a request to generate where no model does.
pub(crate) async fn refuse_generation(State(state): State<AppState>, request: Request) -> ApiError {
    match body::read_fields(&state, request).await {
        Err(error) => error,
        Ok(mut fields) => match fields.string("model") {
            Err(error) => error,
            Ok(Some(name)) if !name.is_empty() => {
                let encoder = state.shown().find(|encoder| encoder.names.contains(&name));
                match encoder {
                    Some(encoder) => wrong_task(&name, task_name(encoder.task()), "generates text"),
                    None => unknown_model(&name),
                }
            }
            Ok(_) => ApiError::invalid("model", "No model is served here that generates text."),
        },
    }
}

/// How inputs that are too long are treated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Truncation {
    /// They are cut; else they are refused.
    pub(crate) cut: bool,
    /// Tokens of an input at most, special ones included.
    pub(crate) max: usize,
    pub(crate) side: Side,
}

impl Truncation {
    /// Reads `truncate`, `truncation_direction` and `truncate_prompt_tokens`. `num_special`: what every input has.
    pub(crate) fn read(
        state: &AppState,
        encoder: &EncoderModel,
        fields: &mut Fields,
        num_special: usize,
    ) -> ApiResult<Self> {
        const TOKENS: &str = "truncate_prompt_tokens";
        let max = encoder.handle.info().max_seq_len;
        let cut = fields.bool("truncate")?;
        let side =
            match fields.string("truncation_direction")?.map(|side| side.to_ascii_lowercase()).as_deref() {
                None | Some("right") => Side::Right,
                Some("left") => Side::Left,
                Some(_) => {
                    let message = "'truncation_direction' must be 'Left' or 'Right'.";
                    return Err(ApiError::invalid("truncation_direction", message));
                }
            };
        let asked: Option<i64> = fields.int(TOKENS, -1, max as i128)?;
        let least = num_special.max(1);
        let to = match asked {
            None => None,
            Some(-1) => Some(max),
            Some(k) => {
                Some(usize::try_from(k).unwrap_or(0)).filter(|k| *k >= least).map(Some).ok_or_else(|| {
                    ApiError::invalid(TOKENS, format!("'{TOKENS}' must be -1 or from {least} to {max}."))
                })?
            }
        };
        let cut = to.is_some() || cut.unwrap_or(state.config().auto_truncate);
        Ok(Self { cut, max: to.unwrap_or(max), side })
    }

    /// The 400 of an input that is too long.
    pub(crate) fn refuse(&self, param: &str, tokens: usize) -> ApiError {
        let max = self.max;
        let message = format!(
            "This model's maximum context length is {max} tokens. However, '{param}' has {tokens} tokens. Please \
             shorten it, or have it cut: truncate_prompt_tokens: -1 in the request, or --auto-truncate."
        );
        ApiError::new(ErrorKind::ContextLength, message).with_param(param)
    }
}

/// Computes the rows of `inputs`, in their order.
///
/// # Errors
/// As [`rows_as`].
pub(crate) async fn rows(
    state: &AppState,
    encoder: &EncoderModel,
    inputs: Vec<Encoded>,
    times: EncodeTimes,
) -> ApiResult<EncodeOutput> {
    rows_as(state, encoder, inputs, times, Scale::Model).await
}

/// How long a row is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// As the model makes it.
    Model,
    /// As it is before the model scales it to 1, if it does.
    Raw,
}

/// [`rows`], scaled or not.
///
/// # Errors
/// 429 when the queue is full, 503 when the encoder takes nothing, 500 if it fails, 504 at the deadline.
pub(crate) async fn rows_as(
    state: &AppState,
    encoder: &EncoderModel,
    inputs: Vec<Encoded>,
    mut times: EncodeTimes,
    scale: Scale,
) -> ApiResult<EncodeOutput> {
    times.tokenized();
    let inputs: Vec<_> = inputs.into_iter().map(|encoded| encoded.input).collect();
    let tokens = inputs.iter().map(|input| input.ids.len() as u64).sum();
    let record = record::current();
    if let Some(record) = &record {
        super::generate::admit_key(state, record, tokens)?;
    }
    let submitted = match scale {
        Scale::Model => encoder.handle.submit(inputs),
        Scale::Raw => encoder.handle.submit_unscaled(inputs),
    };
    let request = submitted.map_err(|refusal| refused(&refusal))?;
    let limit = record.as_ref().map_or(state.config().request_timeout, Record::limit);
    let output = tokio::select! {
        output = tokio::time::timeout(limit, request.finish()) => {
            output.map_err(|_| deadline(limit))?.map_err(failed)?
        }
        () = state.cut().cancelled() => return Err(draining()),
    };
    times.computed(&output);
    if let Some(record) = record {
        record.progress(
            0,
            Progress {
                prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
                queue: output.queue_time,
                prefill: output.compute_time,
                ..Progress::default()
            },
        );
    }
    state.metrics().encoded(encoder.name(), &times);
    Ok(output)
}

fn refused(refusal: &EncodeSubmitError) -> ApiError {
    match refusal {
        EncodeSubmitError::QueueFull { inputs, seconds, .. } => {
            let message = format!("The server is overloaded: {inputs} inputs are waiting to be encoded.");
            ApiError::new(ErrorKind::Overloaded, message).with_retry_after(*seconds)
        }
        EncodeSubmitError::Draining => draining(),
        EncodeSubmitError::Dead => engine_dead(),
        // Inputs are checked where they are read.
        EncodeSubmitError::Unfit { .. } => ApiError::internal(refusal),
    }
}

fn failed(error: EncodeError) -> ApiError {
    match error {
        EncodeError::NonFinite => {
            ApiError::new(ErrorKind::NonFiniteLogits, "The model produced numbers that are not finite.")
        }
        EncodeError::Dead => engine_dead(),
        EncodeError::Batch(_) => ApiError::internal(&error),
    }
}

/// Scales `row` to length 1; a row of zeros stays.
pub(crate) fn normalize(row: &mut [f32]) {
    let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

/// The cosine of two rows; 0 if one of them is zero.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { (dot(a, b) / norms).clamp(-1.0, 1.0) } else { 0.0 }
}

/// The score a logit becomes.
pub(crate) fn activate(logit: f32, activation: ScoreActivation) -> f32 {
    match activation {
        ScoreActivation::Identity => logit,
        ScoreActivation::Sigmoid => 1.0 / (1.0 + (-logit).exp()),
    }
}

/// Writes `body`, a large one on a worker thread, and says where the time went, how many tokens were dropped and what was
/// ignored.
pub(crate) async fn respond<T: Serialize + Send + 'static>(
    state: &AppState,
    body: T,
    num_numbers: usize,
    dropped: usize,
    ignored: Option<String>,
) -> ApiResult<Response> {
    let write = move || serde_json::to_vec(&body).map_err(|_| crate::text::TextError::Internal);
    let written = if num_numbers > LARGE_ANSWER { state.pool().run(0, write).await } else { write() };
    let bytes = written.map_err(|error| super::tokens::text_error(error, "input"))?;
    let mut response =
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], bytes).into_response();
    if dropped > 0 {
        response.headers_mut().insert(X_DROPPED_TOKENS, HeaderValue::from(dropped));
    }
    if let Some((queue, compute)) = record::current().and_then(|record| record.times()) {
        let [queue, compute] = [queue, compute].map(|time| time.as_secs_f64() * 1e3);
        let timing = format!("queue;dur={queue:.3}, compute;dur={compute:.3}");
        if let Ok(value) = HeaderValue::from_str(&timing) {
            response.headers_mut().insert(SERVER_TIMING, value);
        }
    }
    ignored_header(&mut response, ignored);
    Ok(response)
}

/// Begins to measure a request of `num_inputs` inputs.
pub(crate) fn times(num_inputs: usize) -> EncodeTimes {
    EncodeTimes::new(Instant::now(), num_inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_scaled_and_compared() {
        let mut row = [3.0, 4.0];
        normalize(&mut row);
        assert_eq!(row, [0.6, 0.8]);
        let mut zero = [0.0, 0.0];
        normalize(&mut zero);
        assert_eq!(zero, [0.0, 0.0]);
        assert!((cosine(&[1.0, 0.0], &[2.0, 0.0]) - 1.0).abs() < 1e-6);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 0.0]), 0.0);
        assert_eq!(activate(0.0, ScoreActivation::Sigmoid), 0.5);
        assert_eq!(activate(-7.5, ScoreActivation::Identity), -7.5);
    }
}
