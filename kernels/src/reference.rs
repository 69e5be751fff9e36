//! The plain formula of every operation, in candle ops: documentation, fallback and oracle.

mod encoder;

use candle_core::{D, DType, Tensor};

use crate::error::{Result, argument};
use crate::kv_layer::KvStorage;
use crate::ops::{Activation, AttnParams, PagedMeta, RopeTables};
use crate::weight::Storage;
use crate::{KvLayer, Weight, fp8};

pub use encoder::{activate, layer_norm, pool, self_attention};

fn dense<'a>(op: &'static str, weight: &'a Weight) -> Result<&'a Tensor> {
    match weight.storage() {
        Storage::Dense(w) => Ok(w),
        _ => Err(argument(op, "the reference reads portable weights only")),
    }
}

fn tensors<'a>(op: &'static str, layer: &'a KvLayer) -> Result<(&'a Tensor, &'a Tensor)> {
    match &layer.0 {
        KvStorage::Tensors { k, v } => Ok((k, v)),
        KvStorage::Cpu(_) => Err(argument(op, "the reference reads portable caches only")),
    }
}

/// See [`crate::ops::linear`].
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let w = dense("linear", weight)?;
    let y = x.contiguous()?.matmul(&w.to_dtype(x.dtype())?.t()?)?;
    Ok(match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
        None => y,
    })
}

/// See [`crate::ops::embedding`].
pub fn embedding(ids: &[u32], weight: &Weight, dtype: DType) -> Result<Tensor> {
    let w = dense("embedding", weight)?;
    let ids = Tensor::new(ids, w.device())?;
    Ok(w.index_select(&ids, 0)?.to_dtype(dtype)?)
}

/// See [`crate::ops::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let f = x.to_dtype(DType::F32)?;
    let mean = f.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = f.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?;
    Ok(normed.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
}

/// See [`crate::ops::rope`].
pub fn rope(x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    let (tokens, _, width) = x.dims3()?;
    let (rows, half) = tables.cos.dims2()?;
    if rows != tokens || 2 * half > width {
        return Err(argument(
            "rope",
            format!("tables [{rows}, {half}] for {tokens} tokens of width {width}"),
        ));
    }
    let f = x.to_dtype(DType::F32)?;
    let (cos, sin) = (tables.cos.unsqueeze(1)?, tables.sin.unsqueeze(1)?); // [T, 1, half]
    let (a, b) = (f.narrow(2, 0, half)?, f.narrow(2, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rotated = if 2 * half < width {
        Tensor::cat(&[first, second, f.narrow(2, 2 * half, width - 2 * half)?], 2)?
    } else {
        Tensor::cat(&[first, second], 2)?
    };
    Ok(rotated.to_dtype(x.dtype())?)
}

/// See [`crate::ops::store_kv`].
pub fn store_kv(layer: &mut KvLayer, k: &Tensor, v: &Tensor, meta: &PagedMeta) -> Result<()> {
    let (tokens, heads, width) = k.dims3()?;
    let (cache_k, cache_v) = tensors("store_kv", layer)?;
    // scatter_set writes in place; the index repeats the slot along heads and width.
    let index = Tensor::new(meta.slot_mapping.as_slice(), k.device())?
        .reshape((tokens, 1, 1))?
        .broadcast_as((tokens, heads, width))?
        .contiguous()?;
    let dtype = cache_k.dtype();
    let stored = |x: &Tensor| -> Result<Tensor> {
        if dtype != DType::U8 {
            return Ok(x.to_dtype(dtype)?.contiguous()?);
        }
        let numbers = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bits: Vec<u8> = numbers.into_iter().map(fp8::from_f32).collect();
        Ok(Tensor::from_vec(bits, x.dims(), x.device())?)
    };
    cache_k.scatter_set(&index, &stored(k)?, 0)?;
    cache_v.scatter_set(&index, &stored(v)?, 0)?;
    Ok(())
}

/// Cached numbers as f32; bytes are fp8.
fn widened(x: &Tensor) -> Result<Tensor> {
    if x.dtype() != DType::U8 {
        return Ok(x.to_dtype(DType::F32)?);
    }
    let all: Vec<f32> = (0..=u8::MAX).map(fp8::to_f32).collect();
    let bits = x.flatten_all()?.to_dtype(DType::U32)?;
    Ok(Tensor::new(all, x.device())?.index_select(&bits, 0)?.reshape(x.dims())?)
}

/// See [`crate::ops::paged_attention`].
pub fn paged_attention(q: &Tensor, layer: &KvLayer, meta: &PagedMeta, params: &AttnParams) -> Result<Tensor> {
    let (_, heads, width) = q.dims3()?;
    let (cache_k, cache_v) = tensors("paged_attention", layer)?;
    let kv_heads = cache_k.dim(1)?;
    let group = heads / kv_heads;
    let mut outputs = Vec::with_capacity(meta.num_seqs());
    for seq in 0..meta.num_seqs() {
        let (start, end) = (meta.cu_seqlens_q[seq] as usize, meta.cu_seqlens_q[seq + 1] as usize);
        let (len_q, len_k) = (end - start, meta.seq_lens[seq] as usize);
        if len_q == 0 {
            continue;
        }
        let slots: Vec<u32> = (0..len_k).map(|pos| meta.slot(seq, pos) as u32).collect();
        let slots = Tensor::new(slots, q.device())?;
        let gather = |cache: &Tensor| -> Result<Tensor> {
            let rows = widened(&cache.index_select(&slots, 0)?)?; // [Lk, KVH, D]
            let rows = rows.transpose(0, 1)?.unsqueeze(1)?; // [KVH, 1, Lk, D]
            Ok(rows.broadcast_as((kv_heads, group, len_k, width))?.reshape((heads, len_k, width))?)
        };
        let (k, v) = (gather(cache_k)?, gather(cache_v)?);
        let q = q.narrow(0, start, len_q)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?; // [H, Lq, D]
        let mut scores = (q.matmul(&k.t()?)? * f64::from(params.scale))?; // [H, Lq, Lk]
        if let Some(cap) = params.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let mask: Vec<f32> = (0..len_q)
            .flat_map(|i| {
                let position = len_k - len_q + i;
                (0..len_k).map(move |j| {
                    let seen = j <= position && params.sliding_window.is_none_or(|w| j + w > position);
                    if seen { 0.0 } else { f32::NEG_INFINITY }
                })
            })
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, len_q, len_k), q.device())?)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        outputs.push(weights.matmul(&v)?.transpose(0, 1)?.contiguous()?); // [Lq, H, D]
    }
    Ok(Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())?)
}

/// `act(gate) * up`, element by element.
pub fn gated_activation(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok((activate(gate, activation)? * up)?)
}
