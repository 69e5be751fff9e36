//! Arithmetic of Ingle.
//!
//! [`ops`] holds the operations a transformer needs, on candle tensors; each picks an implementation by device:
//!
//! 1. [`mod@reference`]: the plain formula in candle ops. It runs on every candle device and is the oracle of the tests.
//! 2. `cpu`: our own kernels, chosen at run time by what the processor can do.
//! 3. `cuda`, with the feature of that name: our own kernels for NVIDIA GPUs.
//!
//! Arguments are checked here, once for all implementations.
//!
//! [`Weight`] is a matrix in the layout its kernel wants; [`KvLayer`] is one layer of the paged key/value cache.
//! Nothing here knows a model, a sequence or a request.

pub mod check;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod deterministic;
mod error;
mod fp8;
pub mod gpu;
mod kv_layer;
mod matrix_rows;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod ops;
pub mod reference;
#[doc(hidden)]
pub mod tiles;
mod weight;

pub use cpu::{
    Isa, in_parallel, isa, keep_freed_memory, num_threads, pin_threads, probe, set_checkpoint,
    set_num_threads,
};
#[cfg(feature = "cuda")]
pub use cuda::graph::{StepGraph, StepLimits};
pub use deterministic::{is_deterministic, set_deterministic};
pub use error::{Error, Result};
pub use fp8::Fp8Matrix;
pub use kv_layer::{KvDtype, KvLayer};
pub use matrix_rows::MatrixRows;
pub use ops::{
    Activation, AttnParams, ChosenTokens, LateIds, LayerNorm, PagedMeta, PoolingMode, RelativeBias,
    RopeTables, RotateParams, SampleRow, SelfAttnParams,
};
pub use weight::{BlockType, Quantization, QuantizedBlocks, Weight};
