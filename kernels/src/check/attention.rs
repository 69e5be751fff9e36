//! Attention: through the cache, and over the tokens of a step.

use candle_core::{DType, Device};

use super::{Checker, Pair, Random, put, tolerance};
use crate::error::Result;
use crate::kv_layer::{KvDtype, KvLayer};
use crate::ops::{self, AttnParams, PagedMeta, RelativeBias, SelfAttnParams};
use crate::reference;

/// Query heads, key heads, width of a head.
const HEADS: [(usize, usize, usize); 6] =
    [(4, 4, 64), (8, 2, 64), (6, 1, 128), (32, 8, 128), (3, 3, 80), (4, 2, 256)];
/// Lengths in the cache and of the queries at their end: prompts, a chunk of one, decoding, long contexts.
const STEPS: [&[(usize, usize)]; 5] = [
    &[(1, 1)],
    &[(17, 17), (5, 5), (64, 64)],
    &[(40, 7), (33, 1), (129, 100), (16, 1)],
    &[(1500, 1)],
    &[(700, 1), (3, 1), (16, 1), (17, 1), (255, 1), (1025, 1), (31, 1), (64, 1), (90, 1)],
];

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        let cached: &[KvDtype] = if checker.device.is_cpu() {
            &[KvDtype::F32, KvDtype::Bf16, KvDtype::F16]
        } else {
            match dtype {
                DType::BF16 => &[KvDtype::Bf16],
                DType::F16 => &[KvDtype::F16],
                _ => &[KvDtype::F32],
            }
        };
        for &kv_dtype in cached {
            let name = format!("paged_attention {} over {}", dtype.as_str(), kv_dtype.name());
            checker.run(name, tolerance(dtype), |random, device, check| {
                for (heads, kv_heads, dim) in HEADS {
                    for step in STEPS {
                        check(paged(random, device, (heads, kv_heads, dim), step, (dtype, kv_dtype))?)?;
                    }
                }
                Ok(())
            });
        }
        checker.run(
            format!("self_attention {}", dtype.as_str()),
            tolerance(dtype),
            |random, device, check| {
                for (idx, (heads, _, dim)) in HEADS.into_iter().enumerate() {
                    for lengths in [&[1][..], &[5, 33, 1], &[130, 64], &[300]] {
                        check(over_the_step(random, device, (heads, dim), lengths, idx, dtype)?)?;
                    }
                }
                Ok(())
            },
        );
    }
}

/// Keys and values of all positions are stored, in one step or two, in blocks in random order; then the queries look.
fn paged(
    random: &mut Random,
    device: &Device,
    (heads, kv_heads, dim): (usize, usize, usize),
    lengths: &[(usize, usize)],
    (dtype, kv_dtype): (DType, KvDtype),
) -> Result<Pair> {
    const BLOCK: usize = 16;
    let total: usize = lengths.iter().map(|(len, _)| len.div_ceil(BLOCK)).sum();
    let num_blocks = total + 3;
    let mut free: Vec<u32> = (0..num_blocks as u32).collect();
    let mut meta =
        PagedMeta { block_size: BLOCK, cu_seqlens_q: vec![0], cu_blocks: vec![0], ..PagedMeta::default() };
    let mut before = meta.clone();
    for (len, queries) in lengths {
        for _ in 0..len.div_ceil(BLOCK) {
            let block = free.swap_remove(random.below(free.len()));
            meta.block_tables.push(block);
        }
        meta.cu_blocks.push(meta.block_tables.len() as u32);
        meta.seq_lens.push(*len as u32);
        let table = meta.block_tables[meta.cu_blocks[meta.seq_lens.len() - 1] as usize..].to_vec();
        for position in 0..*len {
            let slot = table[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32;
            let part = if position < len - queries { &mut before } else { &mut meta };
            part.positions.push(position as u32);
            part.slot_mapping.push(slot);
        }
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
    }
    let params = AttnParams {
        scale: 1.0 / (dim as f32).sqrt(),
        sliding_window: (random.below(3) == 0).then_some(37),
        softcap: (random.below(3) == 0).then_some(20.0),
    };
    let mut there = KvLayer::new(num_blocks * BLOCK, kv_heads, dim, kv_dtype, device)?;
    let mut here = KvLayer::portable(num_blocks * BLOCK, kv_heads, dim, kv_dtype, &Device::Cpu)?;
    for part in [&before, &meta] {
        let tokens = part.slot_mapping.len();
        if tokens == 0 {
            continue;
        }
        let k = random.tensor(&[tokens, kv_heads, dim], dtype)?;
        let v = random.tensor(&[tokens, kv_heads, dim], dtype)?;
        ops::store_kv(&mut there, &put(&k, dtype, device)?, &put(&v, dtype, device)?, part)?;
        reference::store_kv(&mut here, &k, &v, part)?;
    }
    let q = random.tensor(&[meta.positions.len(), heads, dim], dtype)?;
    Ok(Pair {
        found: ops::paged_attention(&put(&q, dtype, device)?, &there, &meta, &params)?,
        wanted: reference::paged_attention(&q, &here, &meta, &params)?,
        case: format!("{heads} heads over {kv_heads} of {dim}, {lengths:?}, {params:?}"),
    })
}

fn over_the_step(
    random: &mut Random,
    device: &Device,
    (heads, dim): (usize, usize),
    lengths: &[usize],
    idx: usize,
    dtype: DType,
) -> Result<Pair> {
    let tokens: usize = lengths.iter().sum();
    let mut cu_seqlens = vec![0_u32];
    for len in lengths {
        cu_seqlens.push(cu_seqlens.last().copied().unwrap_or(0) + *len as u32);
    }
    let mut part = || random.tensor(&[tokens, heads, dim], dtype);
    let (q, k, v) = (part()?, part()?, part()?);
    let scale = 1.0 / (dim as f32).sqrt();
    let params = match idx % 3 {
        0 => SelfAttnParams::bidirectional(scale),
        1 => SelfAttnParams { right: Some(0), ..SelfAttnParams::bidirectional(scale) },
        _ => SelfAttnParams { left: Some(9), right: Some(9), ..SelfAttnParams::bidirectional(scale) },
    };
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let bias = (idx.is_multiple_of(2))
        .then(|| RelativeBias::new(heads, longest, |head, distance| (head as f32 - distance as f32) * 1e-2))
        .transpose()?;
    let on = |x| put(x, dtype, device);
    Ok(Pair {
        found: ops::self_attention(&on(&q)?, &on(&k)?, &on(&v)?, &cu_seqlens, bias.as_ref(), &params)?,
        wanted: reference::self_attention(&q, &k, &v, &cu_seqlens, bias.as_ref(), &params)?,
        case: format!("{heads} heads of {dim}, {lengths:?}, {params:?}"),
    })
}
