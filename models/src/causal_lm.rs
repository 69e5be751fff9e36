//! What the engine needs of a generating model.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{KvDtype, LateIds, Quantization};

use crate::{Batch, KvCache, Result};

/// A decoder that predicts the next token.
pub trait CausalLm: Send {
    /// Runs one step: stores the keys and values of all tokens of `batch` into `cache` and returns the logits of
    /// `batch.logit_rows`, `[num_logit_rows, vocab_size]` f32 on the CPU device or the model's own. On a GPU the next call may
    /// write to the same memory: whoever wants them longer copies them.
    ///
    /// # Errors
    /// If the batch contradicts itself or a kernel fails; the cache slots of this batch are then undefined.
    fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor>;

    /// As [`CausalLm::forward`], with the ids of some tokens still on the device: what `batch` has in their rows is not read.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn forward_late(&self, batch: &Batch, late: &LateIds, cache: &mut KvCache) -> Result<Tensor> {
        let input_ids = late.resolve(&batch.input_ids, self.info().vocab_size)?;
        self.forward(&Batch { input_ids, ..batch.clone() }, cache)
    }

    /// Whether a pass is only begun by a call, so that the next can be prepared meanwhile: the model is on a device of its
    /// own, looks at nothing there before the end, and takes late ids without a look at them.
    fn computes_behind(&self) -> bool {
        false
    }

    /// Where the model computes.
    fn device(&self) -> &Device {
        &Device::Cpu
    }

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
    /// Type that weights are stored in: F32, BF16 or F16; `None`: the checkpoint's own, GGUF blocks of type Q8_0, Q4_0
    /// and Q4_1 included (other blocks become int8).
    pub dtype: Option<DType>,
    /// How matrices are rounded while they are loaded; `None`: not at all.
    pub quantization: Option<Quantization>,
    /// Type of cached keys and values; `None`: that of the weights.
    pub kv_cache_dtype: Option<KvDtype>,
    /// Where the model lives.
    pub device: Device,
    /// Longest sequence the model will be run with; `None`: what its config says. Longrope models (Phi-3) rotate
    /// positions for short or for long contexts by it.
    pub max_model_len: Option<usize>,
    /// Devices, or threads on the CPU, that the model is divided over; 1: it is not. `device` is the first of them.
    pub tensor_parallel_size: usize,
    /// Whether decode steps on a GPU are recorded once as CUDA graphs and replayed.
    pub step_graphs: bool,
    /// Told of each tensor as it is loaded.
    pub progress: Option<Progress>,
}

impl Default for LoadOptions {
    /// On the CPU, in the checkpoint's own types.
    fn default() -> Self {
        Self {
            dtype: None,
            quantization: None,
            kv_cache_dtype: None,
            device: Device::Cpu,
            max_model_len: None,
            tensor_parallel_size: 1,
            step_graphs: true,
            progress: None,
        }
    }
}

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors read so far.
    pub tensors_loaded: usize,
    /// Tensors of the model.
    pub num_tensors: usize,
    /// Parameters read so far.
    pub parameters_loaded: usize,
    /// Parameters of the model.
    pub num_parameters: usize,
}

pub(crate) type ProgressFn = dyn Fn(LoadProgress) + Send + Sync;

/// A function that is told how far loading has come, on the loading thread.
#[derive(Clone)]
pub struct Progress(pub Arc<dyn Fn(LoadProgress) + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
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
    /// Type the weights are stored in, unless they are quantised.
    pub dtype: DType,
    /// How matrices were rounded.
    pub quantization: Option<Quantization>,
    /// What matrices are made of in memory, for people: `bf16`, `int8`, `Q4_1, int8 (from Q6_K)`.
    pub weight_format: String,
    /// How keys and values are cached.
    pub kv_dtype: KvDtype,
    /// Bytes of weights in device memory, all devices together.
    pub weight_bytes: usize,
    /// Bytes of one token's keys and values over all layers, on one device.
    pub kv_bytes_per_token: usize,
}
