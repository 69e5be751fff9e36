//! Model weights and forward passes.
//!
//! A model is loaded from a folder ([`load_causal_lm`]) and computes one step for many sequences at once: a flat,
//! ragged [`Batch`] of tokens in, logits of the wanted rows out. Keys and values live in a paged [`KvCache`] that the
//! caller owns. [`encoder::load_encoder`] loads the other kind: texts in, embeddings or scores out. Nothing here knows a request, a sequence or a scheduler.

mod batch;
mod causal_lm;
pub mod check;
mod config;
mod convert;
#[cfg(feature = "cuda")]
mod cuda_graph;
mod decoder;
pub mod encoder;
mod error;
mod families;
mod gguf;
mod json;
mod kv_cache;
mod layout;
mod linear;
mod load;
mod loader;
mod mlp;
mod moe;
mod parallel;
mod prequant;
mod random;
mod registry;
mod rope;
mod safetensors;
mod source;
mod weights;

pub use batch::Batch;
pub use causal_lm::{CausalLm, LoadOptions, LoadProgress, ModelInfo, Progress};
pub use convert::{ConvertDtype, ConvertOptions, ConvertProgress, ConvertReport, convert};
pub use error::{Error, Result};
pub use gguf::{GgufText, text_files as gguf_text_files};
pub use ingle_kernels::check::{Checked, check_ops};
pub use ingle_kernels::gpu;
pub use ingle_kernels::{
    BlockType, ChosenTokens, Isa, KvDtype, LateIds, PagedMeta, Quantization, QuantizedBlocks, SampleRow,
    in_parallel, is_deterministic, isa, keep_freed_memory, num_threads, ops::choose, ops::sample_row,
    ops::upload_ids, pin_threads, probe, set_checkpoint, set_deterministic, set_num_threads,
};
pub use kv_cache::KvCache;
pub use load::load_causal_lm;
pub use random::{Fill, MadeUp, made_up_causal_lm};
pub use source::{BlockFormat, TensorSource};
