//! What the engine needs of a generating model.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::{Batch, KvCache, Result};

/// A decoder that predicts the next token.
pub trait CausalLm: Send {
    /// Runs one step: stores the keys and values of all tokens of `batch` into `cache` and returns the logits of
    /// `batch.logit_rows`, `[num_logit_rows, vocab_size]` f32 on the CPU device or the model's own.
    ///
    /// # Errors
    /// If a kernel fails; the cache slots of this batch are then undefined.
    fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor>;

    /// Sizes and facts.
    fn info(&self) -> &ModelInfo;

    /// A cache of `num_blocks` blocks of `block_size` slots that fits this model.
    ///
    /// # Errors
    /// If the device is out of memory.
    fn new_cache(&self, num_blocks: usize, block_size: usize) -> Result<KvCache>;
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type that weights are stored in; `None`: the checkpoint's own.
    pub dtype: Option<DType>,
    /// Type of cached keys and values; `None`: the device's default.
    pub kv_cache_dtype: Option<DType>,
    /// Where the model lives.
    pub device: Device,
}

/// Sizes and facts of a loaded model.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// As the config names it, e.g. `LlamaForCausalLM`.
    pub architecture: String,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Parameters, tied ones counted once.
    pub num_parameters: usize,
    /// Ids that end a generation, from generation_config.json and config.json.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts a sequence, if the config names one.
    pub bos_token_id: Option<u32>,
    /// Type the weights are stored in.
    pub dtype: DType,
    /// Bytes of weights in device memory.
    pub weight_bytes: usize,
    /// Bytes of one token's keys and values over all layers.
    pub kv_bytes_per_token: usize,
}

/// Loads the model in folder (or GGUF file) `path`.
///
/// Every file is checked against its header, and every tensor against the config, before the first large allocation.
///
/// # Errors
/// Names the file and what is wrong with it; [`crate::Error::UnknownArchitecture`] lists the known ones.
pub fn load_causal_lm(path: &Path, options: &LoadOptions) -> Result<Box<dyn CausalLm>> {
    let _ = options;
    Err(crate::Error::UnknownArchitecture { name: path.display().to_string(), known: String::new() })
}
