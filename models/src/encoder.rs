//! Temporary twin of the encoder interface.
#![allow(missing_docs)]
use crate::error::Result;
use std::collections::BTreeMap;
use std::path::Path;
#[derive(Debug, Clone)]
pub struct EncoderOptions {
    pub dtype: Option<candle_core::DType>,
    pub quantization: Option<ingle_kernels::Quantization>,
    pub device: candle_core::Device,
    pub progress: Option<crate::Progress>,
}
pub fn load_encoder(_folder: &Path, _options: EncoderOptions) -> Result<Box<dyn Encoder>> {
    Err(crate::error::Error::Batch("not yet".into()))
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderTask {
    Embed,
    Rerank,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingMode {
    Cls,
    Max,
    Mean,
    MeanSqrtLen,
    WeightedMean,
    Last,
}
pub type Pooling = Vec<PoolingMode>;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreActivation {
    Sigmoid,
    Identity,
}
#[derive(Debug, Clone)]
pub struct EncoderInfo {
    pub architecture: String,
    pub task: EncoderTask,
    pub dimensions: usize,
    pub matryoshka: Option<Vec<usize>>,
    pub max_seq_len: usize,
    pub vocab_size: usize,
    pub type_vocab_size: usize,
    pub pooling: Pooling,
    pub normalize: bool,
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
    pub lower_case: bool,
    pub labels: Vec<String>,
    pub activation: ScoreActivation,
    pub dtype: String,
    pub quantization: Option<ingle_kernels::Quantization>,
    pub num_parameters: usize,
    pub weight_bytes: usize,
}
#[derive(Debug, Clone, Default)]
pub struct EncoderBatch {
    pub input_ids: Vec<u32>,
    pub token_type_ids: Vec<u32>,
    pub cu_seqlens: Vec<u32>,
}
pub trait Encoder: Send {
    fn info(&self) -> &EncoderInfo;
    fn forward(&mut self, batch: &EncoderBatch) -> Result<Vec<f32>>;
}
