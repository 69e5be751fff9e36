//! The plain formulas of [`crate::ops::layer_norm`] and its neighbours.

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::ops::{Activation, RelativeBias, SelfAttnParams};

/// See [`crate::ops::layer_norm`].
pub fn layer_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let mut f = x.to_dtype(DType::F32)?;
    if let Some(residual) = residual {
        f = (f + residual.to_dtype(DType::F32)?)?;
    }
    let centred = f.broadcast_sub(&f.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?;
    let scaled = normed.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    let shifted = match bias {
        Some(bias) => scaled.broadcast_add(&bias.to_dtype(DType::F32)?)?,
        None => scaled,
    };
    Ok(shifted.to_dtype(x.dtype())?)
}

/// See [`crate::ops::activate`].
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => x.silu()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::Relu => x.relu()?,
    })
}

/// See [`crate::ops::self_attention`].
pub fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[u32],
    bias: Option<&RelativeBias>,
    params: &SelfAttnParams,
) -> Result<Tensor> {
    let (_, heads, width) = q.dims3()?;
    let kv_heads = k.dim(1)?;
    let group = heads / kv_heads;
    let mut outputs = Vec::with_capacity(cu_seqlens.len());
    for pair in cu_seqlens.windows(2) {
        let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        if len == 0 {
            continue;
        }
        let spread = |x: &Tensor| -> Result<Tensor> {
            let x = x.narrow(0, start, len)?.to_dtype(DType::F32)?.transpose(0, 1)?; // [KVH, L, D]
            let x = x.unsqueeze(1)?.broadcast_as((kv_heads, group, len, width))?;
            Ok(x.contiguous()?.reshape((heads, len, width))?)
        };
        let (k, v) = (spread(k)?, spread(v)?);
        let q = q.narrow(0, start, len)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?; // [H, L, D]
        let mut scores = (q.matmul(&k.t()?)? * f64::from(params.scale))?; // [H, L, L]
        if let Some(bias) = bias {
            let at = |head, i: usize, j: usize| bias.head(head)[i + bias.reach() - 1 - j];
            let values: Vec<f32> = (0..heads)
                .flat_map(|head| (0..len).flat_map(move |i| (0..len).map(move |j| at(head, i, j))))
                .collect();
            scores = (scores + Tensor::from_vec(values, (heads, len, len), q.device())?)?;
        }
        if let Some(cap) = params.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let sees = |i: usize, j: usize| {
            params.left.is_none_or(|left| j + left >= i) && params.right.is_none_or(|right| j <= i + right)
        };
        let mask: Vec<f32> = (0..len)
            .flat_map(|i| (0..len).map(move |j| if sees(i, j) { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, len, len), q.device())?)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        outputs.push(weights.matmul(&v)?.transpose(0, 1)?.contiguous()?); // [L, H, D]
    }
    Ok(Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())?)
}
