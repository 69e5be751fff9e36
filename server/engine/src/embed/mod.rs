//! Encoders: token ids in, vectors or scores out, in one pass.
//!
//! One thread owns an [`Encoder`] and repeats: receive, cut a batch, compute, answer. Batches are flat and ragged, so
//! nothing is padded; they are cut by tokens to what the model computes in [`EncoderConfig::batch_time`], measured as it
//! runs. Inputs of different requests take turns, so a single query does not wait for a job of thousands. A request
//! whose reader has gone is dropped before it is computed.

mod batching;
mod handle;
mod worker;

pub use handle::{
    EncodeError, EncodeOutput, EncodeRequest, EncodeSubmitError, EncoderConfig, EncoderHandle, EncoderStats,
};
pub use ingle_models::encoder::{
    Encoder, EncoderBatch, EncoderInfo, EncoderOptions, EncoderTask, Pooling, PoolingMode, ScoreActivation,
    load_encoder, scale_rows,
};

/// One text, or one pair of texts, as token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncoderInput {
    /// Token ids with all special tokens.
    pub ids: Vec<u32>,
    /// Segment of each token; empty: all 0.
    pub type_ids: Vec<u8>,
}
