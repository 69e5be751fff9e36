//! Encoders: texts in, embeddings or relevance scores out.
//!
//! [`load_encoder`] reads three kinds of folders:
//!
//! 1. sentence-transformers folders as they are: `modules.json` names the transformer, the pooling, dense layers and
//!    the normalisation;
//! 2. plain folders of a transformer: mean pooling (last token for a causal one), with a warning that nobody said so;
//! 3. sequence classification models (`...ForSequenceClassification`), which score pairs: rerankers.
//!
//! One forward pass ([`mod@model`]) serves all bidirectional families under an [`config::EncoderConfig`]; generating
//! families serve as embedders through the decoder's own layers, without a cache. A batch is flat and ragged, as the
//! decoder's: no padding, and a sequence's row has the same bits alone and among others.
//!
//! # How to add a family
//!
//! 1. Write `families/NAME.rs` with `configure(json) -> Result<EncoderConfig>` and its [`layout::Names`]. If the forward
//!    pass lacks a difference, give the config a field and the pass one branch; no family has a pass of its own.
//! 2. Add its line to the table in `registry.rs`.
//! 3. Describe a tiny model of it in `scripts/make_encoder_fixtures.py`, run that script with its name, and add the name
//!    to `models/tests/encoder_parity.rs`, which compares with what sentence-transformers computed.

mod config;
mod decoder_embedder;
mod families;
mod folder;
mod head;
mod layout;
mod load;
mod model;
mod pooling;
mod registry;

use std::collections::BTreeMap;

use candle_core::{DType, Device};
pub use ingle_kernels::PoolingMode;
use ingle_kernels::Quantization;

use crate::Progress;
use crate::error::{Error, Result};
pub use load::load_encoder;
pub use pooling::normalize as scale_rows;

/// How to load an encoder.
#[derive(Debug, Clone)]
pub struct EncoderOptions {
    /// Type that weights are stored in: F32, BF16 or F16; `None`: the checkpoint's own, but BF16 for F32 on a CUDA device.
    pub dtype: Option<DType>,
    /// How matrices are rounded while they are loaded; `None`: not at all.
    pub quantization: Option<Quantization>,
    /// Where the model lives.
    pub device: Device,
    /// Told of each tensor as it is loaded.
    pub progress: Option<Progress>,
}

impl Default for EncoderOptions {
    /// On the CPU, in the checkpoint's own types.
    fn default() -> Self {
        Self { dtype: None, quantization: None, device: Device::Cpu, progress: None }
    }
}

/// What an encoder is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderTask {
    /// A vector for each text.
    Embed,
    /// Logits for each pair of texts (a cross-encoder: sequence classification).
    Rerank,
}

/// One or several [`PoolingMode`]s; the vectors of several lie one after another. For [`EncoderTask::Rerank`]: what the
/// classification head reads.
pub type Pooling = Vec<PoolingMode>;

/// What makes a score of a reranker's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreActivation {
    /// The logit as it is.
    Identity,
    /// `1 / (1 + e^-x)`
    Sigmoid,
}

/// Facts of a loaded encoder.
#[derive(Debug, Clone)]
pub struct EncoderInfo {
    /// As the config names it, e.g. `MPNetForMaskedLM`.
    pub architecture: String,
    /// What it is for.
    pub task: EncoderTask,
    /// Width of an embedding; number of labels for [`EncoderTask::Rerank`].
    pub dimensions: usize,
    /// Smaller widths that the model was trained to be cut to, ascending, where its config says so.
    pub matryoshka: Option<Vec<usize>>,
    /// Longest sequence, special tokens included.
    pub max_seq_len: usize,
    /// Token ids must be below this.
    pub vocab_size: usize,
    /// Token type ids must be below this; 0: the model has none and ignores them.
    pub type_vocab_size: usize,
    /// How tokens become one vector.
    pub pooling: Pooling,
    /// Embeddings have length 1.
    pub normalize: bool,
    /// Texts that are put before inputs, by name (`query`, `document`, ...).
    pub prompts: BTreeMap<String, String>,
    /// Name of the prompt used when none is named.
    pub default_prompt: Option<String>,
    /// Texts are lower-cased before they are tokenised, whatever the tokenizer does.
    pub lower_case: bool,
    /// Names of the logits of a reranker, in order.
    pub labels: Vec<String>,
    /// What makes scores of a reranker's logits.
    pub activation: ScoreActivation,
    /// Type the weights are stored in, unless they are quantised.
    pub dtype: String,
    /// How matrices were rounded.
    pub quantization: Option<Quantization>,
    /// Parameters that are used.
    pub num_parameters: usize,
    /// Bytes of weights in device memory.
    pub weight_bytes: usize,
}

/// Sequences, one after another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncoderBatch {
    /// Token ids, special tokens included. `[num_tokens]`
    pub input_ids: Vec<u32>,
    /// Which text of a pair a token belongs to; zeros where the model has no types. `[num_tokens]`
    pub token_type_ids: Vec<u32>,
    /// Prefix sums of the sequences' lengths. `[num_seqs + 1]`, starts with 0.
    pub cu_seqlens: Vec<u32>,
}

impl EncoderBatch {
    /// Number of sequences.
    #[must_use]
    pub fn num_seqs(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    /// Refuses a batch that contradicts itself or the model, so that nothing below need look.
    fn check(&self, info: &EncoderInfo) -> Result<()> {
        let refuse = |message: String| Err(Error::Batch(message));
        let (tokens, types) = (self.input_ids.len(), self.token_type_ids.len());
        if types != tokens {
            return refuse(format!("{tokens} tokens, {types} token types"));
        }
        let spans = self.cu_seqlens.first() == Some(&0)
            && self.cu_seqlens.last().is_some_and(|last| *last as usize == tokens)
            && self.cu_seqlens.is_sorted();
        if !spans {
            return refuse(format!("cu_seqlens does not cut {tokens} tokens into sequences"));
        }
        for (seq, pair) in self.cu_seqlens.windows(2).enumerate() {
            let len = (pair[1] - pair[0]) as usize;
            if len == 0 {
                return refuse(format!("sequence {seq} is empty"));
            }
            if len > info.max_seq_len {
                return refuse(format!("sequence {seq} has {len} tokens; at most {} fit", info.max_seq_len));
            }
        }
        if let Some(id) = self.input_ids.iter().find(|id| **id as usize >= info.vocab_size) {
            return refuse(format!("token id {id} of a vocabulary of {}", info.vocab_size));
        }
        let types = info.type_vocab_size;
        match self.token_type_ids.iter().find(|id| types > 0 && **id as usize >= types) {
            Some(id) => refuse(format!("token type {id} of {types}")),
            None => Ok(()),
        }
    }
}

/// A loaded encoder.
pub trait Encoder: Send {
    /// Sizes and facts.
    fn info(&self) -> &EncoderInfo;

    /// Embeddings `[num_seqs, dimensions]`, pooled, through dense layers and normalised as the folder says; or raw logits
    /// `[num_seqs, labels]`. A row's bits do not depend on the rest of the batch (on the CPU).
    ///
    /// # Errors
    /// If the batch contradicts itself or the model, or a kernel fails.
    fn forward(&mut self, batch: &EncoderBatch) -> Result<Vec<f32>>;

    /// As [`Encoder::forward`], but where that ends with scaling rows to length 1 ([`EncoderInfo::normalize`]) they are left
    /// as they were before; [`scale_rows`] then makes the same bits of them.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    fn forward_unscaled(&mut self, batch: &EncoderBatch) -> Result<Vec<f32>> {
        self.forward(batch)
    }
}
