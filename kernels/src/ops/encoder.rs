//! Operations that only encoders need: layer norms, plain activations, attention without a cache, pooling.

use candle_core::{D, DType, Tensor};

use super::{Activation, View, add, embedding, fill, linear, on_cpu_f32};
use crate::error::{Result, argument};
use crate::{Weight, cpu, reference};

/// Which keys a query sees, and how scores are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelfAttnParams {
    /// Factor on `q . k`.
    pub scale: f32,
    /// How many tokens before itself a token sees; `None`: all.
    pub left: Option<usize>,
    /// How many tokens after itself a token sees; `None`: all; `Some(0)`: causal attention.
    pub right: Option<usize>,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// Queries, keys, values and their weights may be rounded to bf16, as where a model's own weights are no finer: on processors
    /// that have fast dot products of bf16 they then are, on others all is f32.
    pub bf16: bool,
}

impl SelfAttnParams {
    /// Every token sees every token of its sequence; nothing is rounded.
    #[must_use]
    pub fn bidirectional(scale: f32) -> Self {
        Self { scale, left: None, right: None, softcap: None, bf16: false }
    }
}

/// A number for each head and distance that is added to the score of a query at position `i` and a key at `j`.
#[derive(Debug, Clone)]
pub struct RelativeBias {
    num_heads: usize,
    reach: usize,
    /// `[num_heads][2 * reach - 1 + SPARE]`; entry `i - j + reach - 1` of a head.
    values: Vec<f32>,
    /// The same in the memory of the GPU that first asked.
    #[cfg(feature = "cuda")]
    uploaded: std::sync::OnceLock<Tensor>,
}

impl RelativeBias {
    /// Entries behind a head's last one that the kernel may read (and never uses).
    const SPARE: usize = 64;

    /// `value(head, i - j)` for all distances between positions below `reach`.
    ///
    /// # Errors
    /// If `reach` is zero.
    pub fn new(num_heads: usize, reach: usize, value: impl Fn(usize, isize) -> f32) -> Result<Self> {
        if reach == 0 || num_heads == 0 {
            return Err(argument("RelativeBias::new", format!("{num_heads} heads, positions below {reach}")));
        }
        let mut values = Vec::with_capacity(num_heads * (2 * reach - 1 + Self::SPARE));
        for head in 0..num_heads {
            values.extend((0..2 * reach - 1).map(|at| value(head, at as isize - (reach as isize - 1))));
            values.extend([0.0; Self::SPARE]);
        }
        Ok(Self {
            num_heads,
            reach,
            values,
            #[cfg(feature = "cuda")]
            uploaded: std::sync::OnceLock::new(),
        })
    }

    /// Positions must be below this.
    #[must_use]
    pub fn reach(&self) -> usize {
        self.reach
    }

    /// The values of `head`; a query at `i` and a key at `j` have number `i - j + reach - 1`. [`Self::SPARE`] more
    /// follow, as many as a vectorised reader may overrun.
    pub(crate) fn head(&self, head: usize) -> &[f32] {
        &self.values[head * self.stride()..][..self.stride()]
    }

    /// Numbers from head to head.
    pub(crate) fn stride(&self) -> usize {
        2 * self.reach - 1 + Self::SPARE
    }

    /// The values in the memory of `device`, `[num_heads, stride]`, uploaded once.
    #[cfg(feature = "cuda")]
    pub(crate) fn uploaded(&self, device: &candle_core::Device) -> Result<Tensor> {
        if let Some(values) = self.uploaded.get().filter(|values| values.device().same_device(device)) {
            return Ok(values.clone());
        }
        let values = Tensor::from_slice(&self.values, (self.num_heads, self.stride()), device)?;
        // No model lies on two GPUs; if one did, the second would upload each time.
        let _ = self.uploaded.set(values.clone());
        Ok(values)
    }
}

/// The parameters of a layer norm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[features]`
    pub weight: &'a Tensor,
    /// `[features]`
    pub bias: Option<&'a Tensor>,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm<'_> {
    fn fits(&self, width: usize) -> bool {
        width > 0 && self.weight.dims() == [width] && self.bias.is_none_or(|bias| bias.dims() == [width])
    }
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingMode {
    /// The first token's.
    Cls,
    /// The greatest of each feature.
    Max,
    /// The mean.
    Mean,
    /// The sum divided by the square root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by position, the first token 1, the second 2, ...
    WeightedMean,
    /// The last token's.
    Last,
}

/// `(x - mean) / sqrt(variance + eps) * weight (+ bias)` over the last dimension, of `x + residual` if there is one;
/// computed in f32, returned in the dtype of `x`. `x`: `[num_tokens, features]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn layer_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let norm = LayerNorm { weight, bias, eps };
    if !norm.fits(width) || residual.is_some_and(|residual| residual.dims() != x.dims()) {
        return Err(argument("layer_norm", format!("{:?} by a weight of {:?}", x.dims(), weight.dims())));
    }
    #[cfg(feature = "cuda")]
    {
        let parts = [(x, None)].into_iter().chain(residual.map(|residual| (residual, None)));
        let parts: Vec<crate::cuda::encoder::Part<'_>> = parts.collect();
        if let Some((_, normed)) = crate::cuda::encoder::layer_norm(&parts, None, &norm, false)? {
            return Ok(normed);
        }
    }
    if !on_cpu_f32(x) || residual.is_some_and(|residual| !on_cpu_f32(residual)) {
        return reference::layer_norm(x, residual, weight, bias, eps);
    }
    let view = View::new(x, width)?;
    let residual = residual.map(|residual| View::new(residual, width)).transpose()?;
    let weight = View::new(weight, width)?;
    let bias = bias.map(|bias| View::new(bias, width)).transpose()?;
    fill(x.dims(), |y| {
        with(residual.as_ref(), |residual| {
            with(bias.as_ref(), |bias| {
                view.read(|x| {
                    weight.read(|weight| {
                        let bias = bias.map(|bias| bias.row(0));
                        cpu::layer_norm(x, residual, weight.row(0), bias, eps, y);
                    })
                })?
            })?
        })?
    })
}

/// `residual + x weight^T (+ bias)`, returned if `keep_sum`, and its layer norm: the end of an encoder's attention and of its
/// MLP. `x`: `[num_tokens, in]`, `residual`: `[num_tokens, out]`. On a GPU the product is followed by one kernel, and the
/// norm is that of the sum before it is rounded.
///
/// # Errors
/// As [`linear`] and [`layer_norm`].
pub fn linear_layer_norm(
    x: &Tensor,
    (weight, bias): (&Weight, Option<&Tensor>),
    residual: &Tensor,
    norm: &LayerNorm<'_>,
    keep_sum: bool,
) -> Result<(Option<Tensor>, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.dims2()?.1 == weight.cols()
        && residual.dims() == [x.dim(0)?, weight.rows()]
        && bias.is_none_or(|bias| bias.dims() == [weight.rows()])
        && norm.fits(weight.rows())
        && let Some((product, bias)) = super::product_on_cuda(x, weight, bias)?
        && let Some(both) =
            crate::cuda::encoder::layer_norm(&[(&product, None), (residual, None)], bias, norm, keep_sum)?
    {
        return Ok(both);
    }
    let y = linear(x, weight, bias)?;
    if !keep_sum {
        return Ok((None, layer_norm(&y, Some(residual), norm.weight, norm.bias, norm.eps)?));
    }
    let sum = add(residual, &y)?;
    let normed = layer_norm(&sum, None, norm.weight, norm.bias, norm.eps)?;
    Ok((Some(sum), normed))
}

/// The layer norm of a sum of rows of tables: `ids` and the table that they are rows of, in the order of the sum.
/// `[num_tokens, features]` in `dtype`.
///
/// # Errors
/// If there is no table, ids are of different numbers or no rows, or the shapes do not fit.
pub fn embedding_layer_norm(
    parts: &[(&[u32], &Weight)],
    norm: &LayerNorm<'_>,
    dtype: DType,
) -> Result<Tensor> {
    let Some(((ids, table), rest)) = parts.split_first() else {
        return Err(argument("embedding_layer_norm", "nothing to add up"));
    };
    let alike = |(more, other): &(&[u32], &Weight)| more.len() == ids.len() && other.cols() == table.cols();
    if !rest.iter().all(alike) || !norm.fits(table.cols()) {
        let widths: Vec<_> = parts.iter().map(|(ids, table)| (ids.len(), table.cols())).collect();
        return Err(argument("embedding_layer_norm", format!("rows by width {widths:?}")));
    }
    #[cfg(feature = "cuda")]
    {
        let rows = |(ids, table): &(&[u32], &Weight)| ids.iter().all(|id| (*id as usize) < table.rows());
        let tables: Vec<_> =
            parts.iter().filter_map(|(ids, table)| Some((*ids, table.dense_on_cuda(dtype)?))).collect();
        if parts.iter().all(rows) && tables.len() == parts.len() {
            let tables: Vec<_> = tables.into_iter().map(|(ids, table)| (table, Some(ids))).collect();
            if let Some((_, normed)) = crate::cuda::encoder::layer_norm(&tables, None, norm, false)? {
                return Ok(normed);
            }
        }
    }
    let mut sum = embedding(ids, table, dtype)?;
    for (ids, table) in rest {
        sum = add(&sum, &embedding(ids, table, dtype)?)?;
    }
    layer_norm(&sum, None, norm.weight, norm.bias, norm.eps)
}

/// Calls `f` with the rows of `view`, if there is one.
fn with<R>(view: Option<&View>, f: impl FnOnce(Option<cpu::Rows<'_>>) -> R) -> Result<R> {
    match view {
        Some(view) => view.read(|rows| f(Some(rows))),
        None => Ok(f(None)),
    }
}

/// `activation(x)`, element by element. `x`: `[num_tokens, features]`.
///
/// # Errors
/// If `x` is no matrix.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let (_, width) = x.dims2()?;
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::cuda::encoder::bias_activate(x, None, Some(activation), false)? {
        return Ok(y);
    }
    if !on_cpu_f32(x) || width == 0 {
        return reference::activate(x, activation);
    }
    let view = View::new(x, width)?;
    fill(x.dims(), |y| view.read(|x| cpu::activate(x, activation, y)))
}

/// [`activate`] of [`linear`]; on a GPU the bias and the activation are one kernel after the product.
///
/// # Errors
/// As [`linear`].
pub fn activated_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.dims2()?.1 == weight.cols()
        && bias.is_none_or(|bias| bias.dims() == [weight.rows()])
        && let Some((product, bias)) = super::product_on_cuda(x, weight, bias)?
        && let Some(y) = crate::cuda::encoder::bias_activate(&product, bias, Some(activation), true)?
    {
        return Ok(y);
    }
    activate(&linear(x, weight, bias)?, activation)
}

/// A vector for each sequence and each of `modes`, `[num_seqs, modes * features]`, in host memory. `x`: `[num_tokens,
/// features]`; `cu_seqlens` as for [`self_attention`].
///
/// # Errors
/// If `cu_seqlens` does not cut the tokens, or a sequence is empty.
pub fn pool(x: &Tensor, cu_seqlens: &[u32], modes: &[PoolingMode]) -> Result<Vec<f32>> {
    let (tokens, _) = x.dims2()?;
    let ends =
        cu_seqlens.first() == Some(&0) && cu_seqlens.last().is_some_and(|last| *last as usize == tokens);
    if !ends || cu_seqlens.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(argument("pool", format!("{cu_seqlens:?} does not cut {tokens} tokens")));
    }
    #[cfg(feature = "cuda")]
    if let Some(pooled) = crate::cuda::encoder::pool(x, cu_seqlens, modes)? {
        return Ok(pooled);
    }
    reference::pool(x, cu_seqlens, modes)
}

/// Attention within each sequence of a ragged batch, without a cache. `q`: `[num_tokens, num_heads, head_dim]`; `k`, `v`:
/// `[num_tokens, num_kv_heads, head_dim]`, query heads share key heads in groups. `cu_seqlens` are the prefix sums of the
/// sequences' lengths, from 0 to `num_tokens`. Returns `[num_tokens, num_heads, head_dim]`.
///
/// # Errors
/// If the shapes do not fit, `cu_seqlens` does not cut the tokens, or a sequence is longer than the bias reaches.
pub fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[u32],
    bias: Option<&RelativeBias>,
    params: &SelfAttnParams,
) -> Result<Tensor> {
    let (tokens, heads, dim) = q.dims3()?;
    let (_, kv_heads, _) = k.dims3()?;
    let shapes = || format!("q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    if k.dims() != [tokens, kv_heads, dim]
        || v.dims() != k.dims()
        || kv_heads == 0
        || dim == 0
        || !heads.is_multiple_of(kv_heads)
        || bias.is_some_and(|bias| bias.num_heads != heads)
    {
        return Err(argument("self_attention", shapes()));
    }
    let covers = cu_seqlens.first() == Some(&0)
        && cu_seqlens.last().is_some_and(|last| *last as usize == tokens)
        && cu_seqlens.is_sorted();
    if !covers {
        return Err(argument("self_attention", format!("cu_seqlens does not cut {tokens} tokens")));
    }
    let longest = cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0);
    if let Some(bias) = bias.filter(|bias| bias.reach < longest) {
        let reach = bias.reach;
        return Err(argument("self_attention", format!("{longest} tokens by a bias that reaches {reach}")));
    }
    if tokens == 0 {
        return Ok(q.clone());
    }
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::cuda::attention::self_attention((q, k, v), cu_seqlens, bias, params)? {
        return Ok(out);
    }
    let ours = q.device().is_cpu() && [q, k, v].iter().all(|x| x.dtype() == DType::F32);
    if !ours {
        return reference::self_attention(q, k, v, cu_seqlens, bias, params);
    }
    let (q_view, k, v) =
        (View::new(q, heads * dim)?, View::new(k, kv_heads * dim)?, View::new(v, kv_heads * dim)?);
    fill(q.dims(), |y| {
        q_view.read(|q| {
            k.read(|k| {
                v.read(|v| {
                    let job = cpu::SelfAttention { q, k, v, head_dim: dim, cu_seqlens, bias, params };
                    cpu::self_attention(&job, y);
                })
            })?
        })?
    })
}
