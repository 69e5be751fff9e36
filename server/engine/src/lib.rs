//! The engine: token ids in, token ids out. No text, no JSON, no HTTP.
//!
//! One thread owns scheduler, cache and model and repeats: receive, schedule, execute, update, send.
//! A [`EngineHandle`] submits a [`ValidatedRequest`] and gets a [`TokenStream`]; dropping the stream aborts the request.

mod config;
mod request;

pub use config::{EngineConfig, Limits};
pub use request::{
    EngineError, FinishReason, InvalidRequest, Request, SamplingParams, TokenEvent, TokenLogprobs, Usage,
    ValidatedRequest,
};
