//! The operations of a transformer on candle tensors.
//!
//! Activations are `[num_tokens, features]`, rows contiguous; a row may be a slice of a wider one (`narrow` along the
//! last dimension), so that the parts of a stacked projection need no copy.

mod embedding;
mod encoder;
mod row_blocks;
mod sampling;

use candle_core::{CpuStorage, D, DType, Device, Shape, Storage, Tensor};

use crate::cpu::{self, Rows, Unwritten};
use crate::error::{Result, argument};
use crate::kv_layer::KvStorage;
use crate::weight::Storage as WeightStorage;
use crate::{KvLayer, Weight, reference};

pub use embedding::{LateIds, embedding, embedding_late, upload_ids};
pub use encoder::{
    LayerNorm, PoolingMode, RelativeBias, SelfAttnParams, activate, activated_linear, embedding_layer_norm,
    layer_norm, linear_layer_norm, pool, self_attention,
};
pub use row_blocks::in_row_blocks;
pub use sampling::{ChosenTokens, SampleRow, choose, sample, sample_row};
#[doc(hidden)]
pub use sampling::{DeviceRows, Edit, MAX_VOCAB, edits_of, scan_parts};

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

    /// Checks that the parts agree with each other and with a cache of `num_slots`. On a GPU a batch may be `padded` with
    /// sequences of one query and no keys.
    fn check(&self, num_slots: usize, padded: bool) -> Result<()> {
        let wrong = |what: &str| Err(argument("PagedMeta", what.to_string()));
        let (seqs, tokens) = (self.num_seqs(), self.num_tokens());
        if self.block_size == 0 || self.cu_seqlens_q.len() != seqs + 1 || self.cu_blocks.len() != seqs + 1 {
            return wrong("block size, cu_seqlens_q and cu_blocks do not fit seq_lens");
        }
        if self.cu_seqlens_q[0] != 0 || self.cu_seqlens_q[seqs] as usize != tokens {
            return wrong("cu_seqlens_q does not span the tokens");
        }
        if self.cu_blocks[0] != 0 || self.cu_blocks[seqs] as usize != self.block_tables.len() {
            return wrong("cu_blocks does not span the block tables");
        }
        for seq in 0..seqs {
            let (q, blocks) = (&self.cu_seqlens_q[seq..=seq + 1], &self.cu_blocks[seq..=seq + 1]);
            let len = self.seq_lens[seq] as usize;
            let queries = q[1].saturating_sub(q[0]) as usize;
            let padding = padded && queries == 1 && len == 0;
            if q[0] > q[1] || blocks[0] > blocks[1] || (queries > len && !padding) {
                return wrong("a sequence has more queries than tokens");
            }
            if ((blocks[1] - blocks[0]) as usize) < len.div_ceil(self.block_size) {
                return wrong("a block table is shorter than its sequence");
            }
        }
        match self.block_tables.iter().find(|block| (**block as usize + 1) * self.block_size > num_slots) {
            Some(block) => Err(argument("PagedMeta", format!("block {block} is outside of the cache"))),
            None => Ok(()),
        }
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

/// Activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`
    Gelu,
    /// `max(x, 0)`
    Relu,
}

/// Cosines and sines of the rotary embedding, shared by all layers with the same rotation.
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `[rows, rotary_dim / 2]` f32
    pub cos: Tensor,
    /// `[rows, rotary_dim / 2]` f32
    pub sin: Tensor,
    /// Whether the rows are those of positions from 0 on rather than of the tokens of one step: tables that are made once
    /// and stay on a GPU. Only [`rotate_store`] and [`RopeTables::of_tokens`] read them.
    pub by_position: bool,
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
        let (cos, sin) = (Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?);
        Ok(Self { cos, sin, by_position: false })
    }

    /// Whether these are tables of so many tokens, for heads of `dim`.
    fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        let (rows, half) = self.cos.dims2()?;
        if rows != tokens || 2 * half > dim || self.sin.dims() != self.cos.dims() || self.by_position {
            return Err(argument(
                "rope",
                format!("tables [{rows}, {half}] for {tokens} tokens of width {dim}"),
            ));
        }
        Ok(())
    }

    /// Those of the tokens of a step out of tables of all positions.
    ///
    /// # Errors
    /// If a position has no row.
    pub fn of_tokens(&self, positions: &[u32]) -> Result<Self> {
        let rows = Tensor::new(positions, self.cos.device())?;
        let (cos, sin) = (self.cos.index_select(&rows, 0)?, self.sin.index_select(&rows, 0)?);
        Ok(Self { cos, sin, by_position: false })
    }
}

/// `x [num_tokens, in] * weight^T (+ bias [out]) -> [num_tokens, out]`, in the dtype of `x`.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    if width != weight.cols() || bias.is_some_and(|bias| bias.dims() != [weight.rows()]) {
        let (rows, cols) = (weight.rows(), weight.cols());
        return Err(argument("linear", format!("{:?} by a weight of [{rows}, {cols}]", x.dims())));
    }
    #[cfg(feature = "cuda")]
    if let Some((y, bias)) = product_on_cuda(x, weight, bias)? {
        if bias.is_none() {
            return Ok(y);
        }
        if let Some(y) = crate::cuda::encoder::bias_activate(&y, bias, None, true)? {
            return Ok(y);
        }
    }
    if let WeightStorage::Dense(_) = weight.storage() {
        return reference::linear(x, weight, bias);
    }
    let multiply = |x: Rows<'_>, bias: Option<&[f32]>, y: &mut Unwritten| match weight.storage() {
        WeightStorage::Packed(matrix) => cpu::matmul(x, matrix, bias, y),
        WeightStorage::Quantized(matrix) => cpu::quant_matmul(x, matrix, bias, y),
        WeightStorage::Dense(_) => unreachable!("computed above"),
        #[cfg(feature = "cuda")]
        WeightStorage::Tiles(_) => unreachable!("computed above"),
    };
    let x = View::new(x, width)?;
    let shape = (tokens, weight.rows());
    let Some(bias) = bias else {
        return fill(shape, |y| x.read(|x| multiply(x, None, y)));
    };
    let bias = View::new(bias, weight.rows())?;
    fill(shape, |y| x.read(|x| bias.read(|bias| multiply(x, Some(bias.row(0)), y)))?)
}

/// The product on a GPU, a new tensor, and the bias where it is still to be added. `None`: not on a GPU. Shapes were checked.
#[cfg(feature = "cuda")]
fn product_on_cuda<'b>(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&'b Tensor>,
) -> Result<Option<(Tensor, Option<&'b Tensor>)>> {
    let Some(operand) = weight.on_cuda() else { return Ok(None) };
    if let Some(y) = crate::cuda::linear::linear(x, operand, bias, None)? {
        return Ok(Some((y, None)));
    }
    Ok(Some((reference::linear(x, weight, None)?, bias)))
}

/// Kinds of large products that the library of a GPU has refused, in words. They are right all the same, but slower than is meant.
pub(crate) fn refused_by_library(_device: &Device) -> Vec<String> {
    #[cfg(feature = "cuda")]
    return crate::cuda::linear::refused_by_library(_device);
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}

/// [`linear`] by a gate above what it gates, then [`gated_activation`], in one kernel where there is one; a result is then
/// rounded once, at the end.
///
/// # Errors
/// As [`linear`] and [`gated_activation`].
pub fn gated_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(operand) = weight.on_cuda() {
        let fits = x.dims2()?.1 == weight.cols()
            && bias.is_none_or(|bias| bias.dims() == [weight.rows()])
            && weight.rows().is_multiple_of(2);
        // Shapes that do not fit are told by the operations that they do not fit.
        if fits {
            if let Some(y) = crate::cuda::linear::linear(x, operand, bias, Some(activation))? {
                return Ok(y);
            }
            let product = reference::linear(x, weight, None)?;
            if let Some(y) = crate::cuda::elementwise::gated_activation(&product, bias, activation)? {
                return Ok(y);
            }
        }
    }
    gated_activation(&linear(x, weight, bias)?, activation)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension; computed in f32, returned in the dtype of `x`.
///
/// # Errors
/// If the last dimension differs from the weight's.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] {
        return Err(argument("rms_norm", format!("{:?} by a weight of {:?}", x.dims(), weight.dims())));
    }
    #[cfg(feature = "cuda")]
    if let Some((_, normed)) = crate::cuda::elementwise::rms_norm(x, None, weight, eps)? {
        return Ok(normed);
    }
    if !on_cpu_f32(x) {
        return reference::rms_norm(x, weight, eps);
    }
    let (view, weight) = (View::new(x, width)?, View::new(weight, width)?);
    fill(x.dims(), |y| view.read(|x| weight.read(|weight| cpu::rms_norm(x, weight.row(0), eps, y)))?)
}

/// `a + scale * b` and its [`rms_norm`]: a residual connection and the norm that follows it, in one kernel where there is
/// one.
///
/// # Errors
/// As [`add`] and [`rms_norm`].
pub fn add_rms_norm(
    (a, b): (&Tensor, &Tensor),
    scale: f64,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if a.dims() == b.dims() && a.dtype() == b.dtype() && weight.dims() == [a.dim(D::Minus1)?] {
        let fused = crate::cuda::elementwise::rms_norm(a, Some((b, scale as f32)), weight, eps)?;
        if let Some((Some(sum), normed)) = fused {
            return Ok((sum, normed));
        }
    }
    let width = a.dim(D::Minus1)?;
    if a.dims() != b.dims() || weight.dims() != [width] {
        let shapes = format!("{:?} and {:?} by a weight of {:?}", a.dims(), b.dims(), weight.dims());
        return Err(argument("add_rms_norm", shapes));
    }
    if !on_cpu_f32(a) {
        let sum = if scale == 1.0 { add(a, b)? } else { add(a, &(b * scale)?)? };
        let normed = rms_norm(&sum, weight, eps)?;
        return Ok((sum, normed));
    }
    let (a_view, b_view, weight) = (View::new(a, width)?, View::new(b, width)?, View::new(weight, width)?);
    let mut normed = None;
    let sum = fill(a.dims(), |sums| {
        normed = Some(fill(a.dims(), |y| {
            a_view.read(|a| {
                b_view.read(|b| {
                    let norm = |weight: Rows<'_>| {
                        cpu::add_rms_norm((a, b), scale as f32, (weight.row(0), eps), sums, y)
                    };
                    weight.read(norm)
                })
            })??
        })?);
        Ok(())
    })?;
    let normed = normed.ok_or_else(|| argument("add_rms_norm", "nothing was computed"))?;
    Ok((sum, normed))
}

/// `a + b` for two activations of the same shape `[num_tokens, features]` (the residual connection).
///
/// # Errors
/// If the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (_, width) = a.dims2()?;
    if a.dims() != b.dims() {
        return Err(argument("add", format!("{:?} and {:?}", a.dims(), b.dims())));
    }
    if !on_cpu_f32(a) {
        return Ok((a + b)?);
    }
    // candle's own addition wakes a second thread pool, which then competes with ours.
    let (a, b) = (View::new(a, width)?, View::new(b, width)?);
    fill((a.num_rows, width), |y| a.read(|a| b.read(|b| cpu::add(a, b, y)))?)
}

/// Rotates the first `2 * tables.cos.dim(1)` of each head of `x [num_tokens, heads, head_dim]`, half against half
/// (GPT-NeoX layout, as transformers stores Llama weights); the rest passes.
///
/// # Errors
/// If the tables are of another number of tokens.
pub fn rope(x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    let (tokens, heads, dim) = x.dims3()?;
    tables.check(tokens, dim)?;
    let half = tables.cos.dim(1)?;
    #[cfg(feature = "cuda")]
    {
        let params = RotateParams { norms: None, eps: 0.0, tables: Some(tables) };
        if let Some(rotated) = crate::cuda::elementwise::rotate_store(x, None, None, &params, None)? {
            return Ok(rotated);
        }
    }
    if !on_cpu_f32(x) {
        return reference::rope(x, tables);
    }
    let (view, cos, sin) =
        (View::new(x, heads * dim)?, View::new(&tables.cos, half)?, View::new(&tables.sin, half)?);
    fill(x.dims(), |y| view.read(|x| cos.read(|cos| sin.read(|sin| cpu::rope(x, dim, cos, sin, y))))??)
}

/// Writes `k`, `v` `[num_tokens, num_kv_heads, head_dim]` into the slots of `meta.slot_mapping`.
///
/// # Errors
/// If the shapes do not fit or a slot is outside of the layer.
pub fn store_kv(layer: &mut KvLayer, k: &Tensor, v: &Tensor, meta: &PagedMeta) -> Result<()> {
    store_rotated(layer, k, v, meta, None)
}

/// As [`store_kv`]; keys are rotated on their way if there are tables, of these tokens.
fn store_rotated(
    layer: &mut KvLayer,
    k: &Tensor,
    v: &Tensor,
    meta: &PagedMeta,
    tables: Option<&RopeTables>,
) -> Result<()> {
    let (tokens, heads, dim) = k.dims3()?;
    let (slots, cache_heads, cache_dim) = layer.dims()?;
    if tokens != meta.slot_mapping.len() || (heads, dim) != (cache_heads, cache_dim) || v.dims() != k.dims() {
        return Err(argument(
            "store_kv",
            format!("keys {:?}, heads of the cache [{cache_heads}, {cache_dim}]", k.dims()),
        ));
    }
    // Padding of a batch on a GPU is stored nowhere.
    let stored = |slot: &u32| (*slot as usize) < slots || (*slot == u32::MAX && k.device().is_cuda());
    if let Some(slot) = meta.slot_mapping.iter().find(|slot| !stored(slot)) {
        return Err(argument("store_kv", format!("slot {slot} of {slots}")));
    }
    let store = match &mut layer.0 {
        // Keys of other types are rotated in their own.
        KvStorage::Cpu(store) if tables.is_none() || on_cpu_f32(k) => store,
        _ => {
            if let Some(tables) = tables {
                return store_kv(layer, &rope(k, tables)?, v, meta);
            }
            #[cfg(feature = "cuda")]
            crate::cuda::step::refuse_while_recording("store_kv")?;
            return reference::store_kv(layer, k, v, meta);
        }
    };
    let (k, v) = (View::new(k, heads * dim)?, View::new(v, heads * dim)?);
    let mut store = |rotation: Option<(Rows<'_>, Rows<'_>)>| {
        k.read(|k| v.read(|v| store.store(&cpu::NewRows { k, v, slots: &meta.slot_mapping, rotation })))?
    };
    let Some(tables) = tables else { return store(None) };
    tables.check(tokens, dim)?;
    let half = tables.cos.dim(1)?;
    let (cos, sin) = (View::new(&tables.cos, half)?, View::new(&tables.sin, half)?);
    cos.read(|cos| sin.read(|sin| store(Some((cos, sin)))))??
}

/// What happens to queries and keys before they meet.
#[derive(Debug, Clone, Copy)]
pub struct RotateParams<'a> {
    /// RMSNorm of each head of queries and of keys, `[head_dim]`.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    /// Of the norms.
    pub eps: f32,
    /// The rotation; `None`: positions are not encoded.
    pub tables: Option<&'a RopeTables>,
}

/// Norms and rotates the heads of `q` and `k` `[num_tokens, heads, head_dim]`, stores keys and values as [`store_kv`] does,
/// and returns the queries; one kernel where there is one.
///
/// # Errors
/// As [`rms_norm`], [`rope`] and [`store_kv`].
pub fn rotate_store(
    q: &Tensor,
    (k, v): (&Tensor, &Tensor),
    layer: &mut KvLayer,
    meta: &PagedMeta,
    params: &RotateParams<'_>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda()
        && let Some(q) = fused_rotate_store(q, (k, v), layer, meta, params)?
    {
        return Ok(q);
    }
    let (mut q, mut k) = (q.clone(), k.clone());
    if let Some((q_norm, k_norm)) = params.norms {
        q = rms_norm_heads(&q, q_norm, params.eps)?;
        k = rms_norm_heads(&k, k_norm, params.eps)?;
    }
    let Some(tables) = params.tables else {
        store_kv(layer, &k, v, meta)?;
        return Ok(q);
    };
    let of_tokens = tables.by_position.then(|| tables.of_tokens(&meta.positions)).transpose()?;
    let tables = of_tokens.as_ref().unwrap_or(tables);
    store_rotated(layer, &k, v, meta, Some(tables))?;
    rope(&q, tables)
}

fn rms_norm_heads(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (tokens, heads, dim) = x.dims3()?;
    Ok(rms_norm(&x.reshape((tokens * heads, dim))?, weight, eps)?.reshape((tokens, heads, dim))?)
}

/// [`rotate_store`] by one kernel; `None` where there is none for the types.
#[cfg(feature = "cuda")]
fn fused_rotate_store(
    q: &Tensor,
    (k, v): (&Tensor, &Tensor),
    layer: &KvLayer,
    meta: &PagedMeta,
    params: &RotateParams<'_>,
) -> Result<Option<Tensor>> {
    let (tokens, _, dim) = q.dims3()?;
    let (slots, kv_heads, cache_dim) = layer.dims()?;
    let wrong = |what: String| Err(argument("rotate_store", what));
    if k.dims() != [tokens, kv_heads, dim] || v.dims() != k.dims() || cache_dim != dim {
        return wrong(format!(
            "{:?}, {:?} and {:?} for {kv_heads} heads of {cache_dim}",
            q.dims(),
            k.dims(),
            v.dims()
        ));
    }
    if meta.slot_mapping.len() != tokens || meta.positions.len() != tokens {
        return wrong(format!("{} slots for {tokens} tokens", meta.slot_mapping.len()));
    }
    if let Some(slot) = meta.slot_mapping.iter().find(|slot| **slot as usize >= slots && **slot != u32::MAX) {
        return wrong(format!("slot {slot} of {slots}"));
    }
    if let Some((q_norm, k_norm)) = params.norms
        && [q_norm, k_norm].iter().any(|norm| norm.dims() != [dim] || norm.dtype() != DType::F32)
    {
        return wrong(format!("norms of {:?} and {:?} for heads of {dim}", q_norm.dims(), k_norm.dims()));
    }
    if let Some(RopeTables { cos, sin, by_position }) = params.tables {
        let (rows, half) = cos.dims2()?;
        let needed = match by_position {
            true => meta.positions.iter().max().map_or(0, |position| *position as usize + 1),
            false => tokens,
        };
        if rows < needed || 2 * half > dim || sin.dims() != cos.dims() || cos.dtype() != DType::F32 {
            return wrong(format!("tables {:?} for {needed} rows of heads of {dim}", cos.dims()));
        }
    }
    let KvStorage::Tensors { k: k_cache, v: v_cache } = &layer.0 else { return Ok(None) };
    let same = k.dtype() == q.dtype() && v.dtype() == q.dtype();
    if !same || v_cache.dtype() != k_cache.dtype() {
        return Ok(None);
    }
    crate::cuda::elementwise::rotate_store(q, Some((k, v)), Some((k_cache, v_cache)), params, Some(meta))
}

/// Causal attention of `q [num_tokens, num_heads, head_dim]` over the cached keys and values of each sequence, through
/// the block tables; the keys of this step must have been stored. Query heads share key heads in groups (GQA).
/// Returns `[num_tokens, num_heads, head_dim]`.
///
/// # Errors
/// If the shapes do not fit or `meta` contradicts itself.
pub fn paged_attention(q: &Tensor, layer: &KvLayer, meta: &PagedMeta, params: &AttnParams) -> Result<Tensor> {
    let (tokens, heads, dim) = q.dims3()?;
    let (slots, kv_heads, cache_dim) = layer.dims()?;
    if tokens != meta.num_tokens() || !heads.is_multiple_of(kv_heads) || dim != cache_dim {
        return Err(argument(
            "paged_attention",
            format!("queries {:?}, heads of the cache [{kv_heads}, {cache_dim}]", q.dims()),
        ));
    }
    meta.check(slots, q.device().is_cuda())?;
    #[cfg(feature = "cuda")]
    if let KvStorage::Tensors { k, v } = &layer.0
        && let Some(out) = crate::cuda::attention::paged_attention(q, (k, v), meta, params)?
    {
        return Ok(out);
    }
    let KvStorage::Cpu(store) = &layer.0 else {
        #[cfg(feature = "cuda")]
        crate::cuda::step::refuse_while_recording("paged_attention")?;
        return reference::paged_attention(q, layer, meta, params);
    };
    let view = View::new(q, heads * dim)?;
    fill(q.dims(), |y| view.read(|q| cpu::paged_attention(q, store, meta, params, y)))
}

/// `act(gate) * up` for `gate_up [num_tokens, 2 * intermediate]` with the gate in the first half.
///
/// # Errors
/// If the last dimension is odd.
pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (tokens, both) = gate_up.dims2()?;
    if !both.is_multiple_of(2) {
        return Err(argument("gated_activation", format!("width {both} is odd")));
    }
    let width = both / 2;
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::elementwise::gated_activation(gate_up, None, activation)? {
        return Ok(out);
    }
    if !on_cpu_f32(gate_up) {
        let (gate, up) = (gate_up.narrow(1, 0, width)?, gate_up.narrow(1, width, width)?);
        return reference::gated_activation(&gate, &up, activation);
    }
    let view = View::new(gate_up, both)?;
    fill((tokens, width), |y| view.read(|x| cpu::gated_activation(x, activation, y)))
}

fn on_cpu_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// A new f32 CPU tensor whose values `compute` writes, all of them.
#[allow(unsafe_code)]
fn fill(shape: impl Into<Shape>, compute: impl FnOnce(&mut Unwritten) -> Result<()>) -> Result<Tensor> {
    let shape = shape.into();
    // SAFETY: every kernel called by this file writes its whole output; each is compared with the reference.
    let values = unsafe { cpu::written(shape.elem_count(), compute)? };
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// An f32 CPU tensor as rows of `width` elements; copied only if its layout has no such rows.
struct View {
    tensor: Tensor,
    num_rows: usize,
    width: usize,
    stride: usize,
}

impl View {
    fn new(x: &Tensor, width: usize) -> Result<Self> {
        let num_rows = x.elem_count().checked_div(width).unwrap_or(0);
        let (dims, strides) = (x.dims(), x.stride());
        // The first dimension's stride is the rows', if all the others are one contiguous row.
        let inner = x.layout().is_contiguous() || {
            let mut expected = 1;
            let rest = dims.iter().zip(strides).skip(1).rev();
            rest.into_iter().all(|(dim, stride)| {
                let fits = *stride == expected || *dim == 1;
                expected *= dim;
                fits
            }) && expected == width
        };
        let stride =
            if x.layout().is_contiguous() { width } else { strides.first().copied().unwrap_or(width) };
        let (tensor, stride) = if inner { (x.clone(), stride) } else { (x.contiguous()?, width) };
        Ok(Self { tensor: tensor.to_dtype(DType::F32)?, num_rows, width, stride })
    }

    /// Calls `f` with the rows.
    fn read<R>(&self, f: impl FnOnce(Rows<'_>) -> R) -> Result<R> {
        let (storage, layout) = self.tensor.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(data)) = &*storage else {
            return Err(argument("ops", "activations on the CPU are f32"));
        };
        let data = &data[layout.start_offset()..];
        let rows = Rows::new(data, self.num_rows, self.width, self.stride);
        let rows =
            rows.ok_or_else(|| argument("ops", format!("{layout:?} has no rows of {}", self.width)))?;
        Ok(f(rows))
    }
}
