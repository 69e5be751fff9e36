//! The plain formulas of [`crate::ops::layer_norm`] and its neighbours.

use candle_core::{D, DType, Device, Tensor};

use crate::error::Result;
use crate::ops::{Activation, PoolingMode, RelativeBias, SelfAttnParams};

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

/// See [`crate::ops::pool`]. Sums run over the tokens in order.
pub fn pool(x: &Tensor, cu_seqlens: &[u32], modes: &[PoolingMode]) -> Result<Vec<f32>> {
    let width = x.dim(1)?;
    let hidden: Vec<f32> = x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let mut pooled = Vec::with_capacity(cu_seqlens.len().saturating_sub(1) * modes.len() * width);
    for pair in cu_seqlens.windows(2) {
        let rows = &hidden[pair[0] as usize * width..pair[1] as usize * width];
        for mode in modes {
            pool_rows(rows, width, *mode, &mut pooled);
        }
    }
    Ok(pooled)
}

fn pool_rows(rows: &[f32], width: usize, mode: PoolingMode, pooled: &mut Vec<f32>) {
    let len = rows.len() / width.max(1);
    let start = pooled.len();
    let weighted = |pooled: &mut Vec<f32>, weight: fn(usize) -> f32, divisor: f32| {
        pooled.resize(start + width, 0.0);
        let sums = &mut pooled[start..];
        for (at, row) in rows.chunks_exact(width.max(1)).enumerate() {
            let weight = weight(at);
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        }
        sums.iter_mut().for_each(|sum| *sum /= divisor);
    };
    match mode {
        PoolingMode::Cls => pooled.extend_from_slice(&rows[..width]),
        PoolingMode::Last => pooled.extend_from_slice(&rows[rows.len() - width..]),
        PoolingMode::Max => {
            pooled.extend_from_slice(&rows[..width]);
            for row in rows.chunks_exact(width.max(1)).skip(1) {
                pooled[start..].iter_mut().zip(row).for_each(|(max, x)| *max = max.max(*x));
            }
        }
        PoolingMode::Mean => weighted(pooled, |_| 1.0, len as f32),
        PoolingMode::MeanSqrtLen => weighted(pooled, |_| 1.0, (len as f32).sqrt()),
        PoolingMode::WeightedMean => {
            // 1 + 2 + .. + len, in f32 as the weights are.
            let sum = (len as f64 * (len as f64 + 1.0) / 2.0) as f32;
            weighted(pooled, |at| (at + 1) as f32, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_of_pooling_does_what_it_says() {
        let hidden = [[1.0_f32, -2.0], [3.0, 5.0], [2.0, 0.0], [7.0, 7.0]];
        let hidden = Tensor::new(&hidden, &Device::Cpu).expect("a tensor");
        let pooled = |cu_seqlens: &[u32], modes: &[PoolingMode]| {
            crate::ops::pool(&hidden, cu_seqlens, modes).expect("pooled")
        };
        let two = |mode| pooled(&[0, 3, 4], &[mode]);
        assert_eq!(two(PoolingMode::Cls), [1.0, -2.0, 7.0, 7.0]);
        assert_eq!(two(PoolingMode::Last), [2.0, 0.0, 7.0, 7.0]);
        assert_eq!(two(PoolingMode::Max), [3.0, 5.0, 7.0, 7.0]);
        assert_eq!(two(PoolingMode::Mean), [2.0, 1.0, 7.0, 7.0]);
        let root = 3.0_f32.sqrt();
        assert_eq!(two(PoolingMode::MeanSqrtLen), [6.0 / root, 3.0 / root, 7.0, 7.0]);
        assert_eq!(two(PoolingMode::WeightedMean), [13.0 / 6.0, 8.0 / 6.0, 7.0, 7.0]);
        let both = pooled(&[0, 4], &[PoolingMode::Cls, PoolingMode::Last]);
        assert_eq!(both, [1.0, -2.0, 7.0, 7.0]);
        for wrong in [&[0, 3][..], &[0, 4, 4], &[1, 4], &[]] {
            assert!(crate::ops::pool(&hidden, wrong, &[PoolingMode::Mean]).is_err(), "{wrong:?}");
        }
    }
}
