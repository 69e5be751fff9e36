//! Operations that only encoders need: layer norms, plain activations and attention without a cache.

use candle_core::{D, DType, Tensor};

use super::{Activation, View, fill, on_cpu_f32};
use crate::error::{Result, argument};
use crate::{cpu, reference};

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
}

impl SelfAttnParams {
    /// Every token sees every token of its sequence.
    #[must_use]
    pub fn bidirectional(scale: f32) -> Self {
        Self { scale, left: None, right: None, softcap: None }
    }
}

/// A number for each head and distance that is added to the score of a query at position `i` and a key at `j`.
#[derive(Debug, Clone)]
pub struct RelativeBias {
    num_heads: usize,
    reach: usize,
    /// `[num_heads][2 * reach - 1 + SPARE]`; entry `i - j + reach - 1` of a head.
    values: Vec<f32>,
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
        Ok(Self { num_heads, reach, values })
    }

    /// Positions must be below this.
    #[must_use]
    pub fn reach(&self) -> usize {
        self.reach
    }

    /// The values of `head`; a query at `i` and a key at `j` have number `i - j + reach - 1`. [`Self::SPARE`] more
    /// follow, as many as a vectorised reader may overrun.
    pub(crate) fn head(&self, head: usize) -> &[f32] {
        let len = 2 * self.reach - 1 + Self::SPARE;
        &self.values[head * len..][..len]
    }
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
    let fits = weight.dims() == [width]
        && bias.is_none_or(|bias| bias.dims() == [width])
        && residual.is_none_or(|residual| residual.dims() == x.dims());
    if !fits || width == 0 {
        return Err(argument("layer_norm", format!("{:?} by a weight of {:?}", x.dims(), weight.dims())));
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
    if !on_cpu_f32(x) || width == 0 {
        return reference::activate(x, activation);
    }
    let view = View::new(x, width)?;
    fill(x.dims(), |y| view.read(|x| cpu::activate(x, activation, y)))
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
    if bias.is_none()
        && let Some(out) = crate::cuda::attention::self_attention(q, k, v, cu_seqlens, params)?
    {
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
