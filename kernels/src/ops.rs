//! The operations of a transformer on candle tensors.
//!
//! Activations are `[num_tokens, features]`, rows contiguous; a row may be a slice of a wider one (`narrow` along the
//! last dimension), so that the parts of a stacked projection need no copy.

use candle_core::{D, Device, Tensor};

use crate::error::Result;
use crate::{KvLayer, Weight, reference};

/// The ragged batch as the attention kernels see it. One entry a sequence unless said otherwise; host memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PagedMeta {
    /// Position of each token in its sequence. `[num_tokens]`
    pub positions: Vec<u32>,
    /// Cache slot that each token's key and value are written to. `[num_tokens]`
    pub slot_mapping: Vec<u32>,
    /// Prefix sums of the number of query tokens of each sequence. `[num_seqs + 1]`, starts with 0.
    pub cu_seqlens_q: Vec<u32>,
    /// Number of tokens of each sequence in the cache after this step's are stored. `[num_seqs]`
    pub seq_lens: Vec<u32>,
    /// Block ids of all sequences, one sequence after another. `[sum of num_blocks]`
    pub block_tables: Vec<u32>,
    /// Prefix sums that cut `block_tables` into sequences. `[num_seqs + 1]`, starts with 0.
    pub cu_blocks: Vec<u32>,
    /// Token slots per block.
    pub block_size: usize,
}

impl PagedMeta {
    /// Number of sequences.
    #[must_use]
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// Number of query tokens.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.positions.len()
    }

    /// Cache slot of position `pos` of sequence `seq`.
    #[must_use]
    pub fn slot(&self, seq: usize, pos: usize) -> usize {
        let block = self.block_tables[self.cu_blocks[seq] as usize + pos / self.block_size] as usize;
        block * self.block_size + pos % self.block_size
    }
}

/// How scores are made from queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttnParams {
    /// Factor on `q . k`.
    pub scale: f32,
    /// A token sees itself and this many tokens minus one before it (Mistral, Gemma); `None`: all before it.
    pub sliding_window: Option<usize>,
    /// `softcap * tanh(score / softcap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// Activation of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`
    Gelu,
}

/// Cosines and sines of the rotary embedding for the tokens of one step, shared by all layers with the same rotation.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `[num_tokens, rotary_dim / 2]` f32
    pub cos: Tensor,
    /// `[num_tokens, rotary_dim / 2]` f32
    pub sin: Tensor,
}

impl RopeTables {
    /// Angles `positions[t] * inv_freq[i]`, cosine and sine times `factor` (yarn and longrope scale them).
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(positions: &[u32], inv_freq: &[f32], factor: f32, device: &Device) -> Result<Self> {
        let mut cos = Vec::with_capacity(positions.len() * inv_freq.len());
        let mut sin = Vec::with_capacity(positions.len() * inv_freq.len());
        for &position in positions {
            for &freq in inv_freq {
                // f32 product, as transformers computes it: the rounding of the angle is part of the model.
                let (s, c) = (position as f32 * freq).sin_cos();
                cos.push(c * factor);
                sin.push(s * factor);
            }
        }
        let shape = (positions.len(), inv_freq.len());
        Ok(Self { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }
}

/// `x [num_tokens, in] * weight^T (+ bias [out]) -> [num_tokens, out]`, in the dtype of `x`.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    reference::linear(x, weight, bias)
}

/// Rows `ids` of `weight` as `[ids.len(), in]` in `dtype`.
///
/// # Errors
/// If an id is not a row.
pub fn embedding(ids: &[u32], weight: &Weight, dtype: candle_core::DType) -> Result<Tensor> {
    reference::embedding(ids, weight, dtype)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension; computed in f32, returned in the dtype of `x`.
///
/// # Errors
/// If the last dimension differs from the weight's.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    reference::rms_norm(x, weight, eps)
}

/// Rotates the first `2 * tables.cos.dim(1)` of each head of `x [num_tokens, heads, head_dim]`, half against half
/// (GPT-NeoX layout, as transformers stores Llama weights); the rest passes.
///
/// # Errors
/// If the tables are of another number of tokens.
pub fn rope(x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    reference::rope(x, tables)
}

/// Writes `k`, `v` `[num_tokens, num_kv_heads, head_dim]` into the slots of `meta.slot_mapping`.
///
/// # Errors
/// If the shapes do not fit or a slot is outside of the layer.
pub fn store_kv(layer: &mut KvLayer, k: &Tensor, v: &Tensor, meta: &PagedMeta) -> Result<()> {
    reference::store_kv(layer, k, v, meta)
}

/// Causal attention of `q [num_tokens, num_heads, head_dim]` over the cached keys and values of each sequence, through
/// the block tables; the keys of this step must have been stored. Query heads share key heads in groups (GQA).
/// Returns `[num_tokens, num_heads, head_dim]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn paged_attention(q: &Tensor, layer: &KvLayer, meta: &PagedMeta, params: &AttnParams) -> Result<Tensor> {
    reference::paged_attention(q, layer, meta, params)
}

/// `act(gate) * up` for `gate_up [num_tokens, 2 * intermediate]` with the gate in the first half.
///
/// # Errors
/// If the last dimension is odd.
pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let width = gate_up.dim(D::Minus1)? / 2;
    reference::gated_activation(&gate_up.narrow(1, 0, width)?, &gate_up.narrow(1, width, width)?, activation)
}
