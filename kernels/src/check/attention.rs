//! Attention: through the cache, and over the tokens of a step.

use candle_core::{DType, Device, Tensor};

use super::{Checker, Pair, Random, put, tolerance};
use crate::cpu::isa;
use crate::error::Result;
use crate::kv_layer::{KvDtype, KvLayer};
use crate::ops::{self, AttnParams, PagedMeta, RelativeBias, SelfAttnParams};
use crate::reference;

/// Query heads, key heads, width of a head: every width that kernels are made for and some between, groups of one to
/// more than a tile's rows.
pub(super) const HEADS: [(usize, usize, usize); 10] = [
    (4, 4, 64),
    (8, 2, 64),
    (14, 2, 64),
    (6, 1, 128),
    (32, 8, 128),
    (20, 1, 128),
    (3, 3, 80),
    (6, 2, 96),
    (4, 2, 256),
    (3, 1, 24),
];
/// As encoders have them.
const ENCODER_HEADS: [(usize, usize, usize); 3] = [(12, 12, 32), (12, 12, 64), (4, 4, 128)];
/// Lengths in the cache and of the queries at their end: prompts, a chunk of one, decoding, long contexts.
pub(super) const STEPS: [&[(usize, usize)]; 5] = [
    &[(1, 1)],
    &[(17, 17), (5, 5), (64, 64)],
    &[(40, 7), (33, 1), (129, 100), (16, 1)],
    &[(1500, 1)],
    &[(700, 1), (3, 1), (16, 1), (17, 1), (255, 1), (1025, 1), (31, 1), (64, 1), (90, 1)],
];

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        for &kv_dtype in cached(&checker.device, dtype) {
            let name = format!("paged_attention {} over {}", dtype.as_str(), kv_dtype.name());
            let allowed = tolerance(dtype).max(rounding(&checker.device, kv_dtype));
            checker.run(name, allowed, |random, device, check| {
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
                for (idx, heads) in HEADS.into_iter().chain(ENCODER_HEADS).enumerate() {
                    for lengths in [&[1][..], &[5, 33, 1], &[130, 64], &[300]] {
                        for biased in [false, true] {
                            check(over_the_step(random, device, heads, (lengths, biased), idx, dtype)?)?;
                        }
                    }
                }
                Ok(())
            },
        );
    }
}

/// Sequences in blocks in random order.
pub(super) struct Paged {
    /// What is in the cache before the step.
    pub(super) before: PagedMeta,
    /// The step.
    pub(super) step: PagedMeta,
    pub(super) num_slots: usize,
}

impl Paged {
    const BLOCK: usize = 16;

    /// Of these lengths, each with queries for its last tokens.
    pub(super) fn new(random: &mut Random, lengths: &[(usize, usize)]) -> Self {
        let total: usize = lengths.iter().map(|(len, _)| len.div_ceil(Self::BLOCK)).sum();
        let num_blocks = total + 3;
        let mut free: Vec<u32> = (0..num_blocks as u32).collect();
        let mut step = PagedMeta {
            block_size: Self::BLOCK,
            cu_seqlens_q: vec![0],
            cu_blocks: vec![0],
            ..PagedMeta::default()
        };
        let mut before = step.clone();
        for (len, queries) in lengths {
            for _ in 0..len.div_ceil(Self::BLOCK) {
                let block = free.swap_remove(random.below(free.len()));
                step.block_tables.push(block);
            }
            step.cu_blocks.push(step.block_tables.len() as u32);
            step.seq_lens.push(*len as u32);
            for position in 0..*len {
                let slot = step.slot(step.seq_lens.len() - 1, position) as u32;
                let part = if position < len - queries { &mut before } else { &mut step };
                part.positions.push(position as u32);
                part.slot_mapping.push(slot);
            }
            step.cu_seqlens_q.push(step.positions.len() as u32);
        }
        Self { before, step, num_slots: num_blocks * Self::BLOCK }
    }
}

/// What the instruction set in use may lose over a cache of `kept`: queries and weights rounded to bf16, or all numbers and
/// sums of some products to f16.
pub(super) fn rounding(device: &Device, kept: KvDtype) -> f32 {
    match (isa().name(), kept) {
        _ if !device.is_cpu() => 0.0,
        ("amx" | "avx512-bf16", KvDtype::Bf16 | KvDtype::Int8) => 2e-2,
        ("avx512-fp16", KvDtype::Bf16 | KvDtype::F16) => 6e-3,
        _ => 0.0,
    }
}

/// Types of the cache beside activations of `dtype`.
pub(super) fn cached(device: &Device, dtype: DType) -> &'static [KvDtype] {
    match (device.is_cpu(), device.is_cuda(), dtype) {
        (true, ..) => &[KvDtype::F32, KvDtype::Bf16, KvDtype::F16],
        (_, true, DType::BF16) => &[KvDtype::Bf16, KvDtype::Fp8],
        (_, true, DType::F16) => &[KvDtype::F16, KvDtype::Fp8],
        (_, _, DType::BF16) => &[KvDtype::Bf16],
        (_, _, DType::F16) => &[KvDtype::F16],
        _ => &[KvDtype::F32],
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
    let Paged { before, step, num_slots } = Paged::new(random, lengths);
    let params = AttnParams {
        scale: 1.0 / (dim as f32).sqrt(),
        sliding_window: (random.below(3) == 0).then_some(37),
        softcap: (random.below(3) == 0).then_some(20.0),
    };
    let mut there = KvLayer::new(num_slots, kv_heads, dim, kv_dtype, device)?;
    let mut here = KvLayer::portable(num_slots, kv_heads, dim, kv_dtype, &Device::Cpu)?;
    for part in [&before, &step] {
        let tokens = part.slot_mapping.len();
        if tokens == 0 {
            continue;
        }
        let k = random.tensor(&[tokens, kv_heads, dim], dtype)?;
        let v = random.tensor(&[tokens, kv_heads, dim], dtype)?;
        ops::store_kv(&mut there, &put(&k, dtype, device)?, &put(&v, dtype, device)?, part)?;
        reference::store_kv(&mut here, &k, &v, part)?;
    }
    let q = random.tensor(&[step.positions.len(), heads, dim], dtype)?;
    Ok(Pair {
        found: ops::paged_attention(&put(&q, dtype, device)?, &there, &step, &params)?,
        wanted: reference::paged_attention(&q, &here, &step, &params)?,
        scale: None,
        case: format!("{heads} heads over {kv_heads} of {dim}, {lengths:?}, {params:?}"),
    })
}

/// Queries, keys and values are parts of one tensor, as a stacked projection leaves them.
fn over_the_step(
    random: &mut Random,
    device: &Device,
    (heads, kv_heads, dim): (usize, usize, usize),
    (lengths, biased): (&[usize], bool),
    idx: usize,
    dtype: DType,
) -> Result<Pair> {
    let tokens: usize = lengths.iter().sum();
    let mut cu_seqlens = vec![0_u32];
    for len in lengths {
        cu_seqlens.push(cu_seqlens.last().copied().unwrap_or(0) + *len as u32);
    }
    let all = random.tensor(&[tokens, heads + 2 * kv_heads, dim], dtype)?;
    let scale = 1.0 / (dim as f32).sqrt();
    let params = match idx % 3 {
        0 => SelfAttnParams::bidirectional(scale),
        1 => SelfAttnParams { right: Some(0), ..SelfAttnParams::bidirectional(scale) },
        _ => SelfAttnParams { left: Some(9), right: Some(9), ..SelfAttnParams::bidirectional(scale) },
    };
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let bias = biased
        .then(|| RelativeBias::new(heads, longest, |head, distance| (head as f32 - distance as f32) * 1e-2))
        .transpose()?;
    let parts = |all: &Tensor| -> Result<[Tensor; 3]> {
        let part = |start, len| all.narrow(1, start, len);
        Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
    };
    let ([q, k, v], here) = (parts(&put(&all, dtype, device)?)?, parts(&all)?);
    Ok(Pair {
        found: ops::self_attention(&q, &k, &v, &cu_seqlens, bias.as_ref(), &params)?,
        wanted: reference::self_attention(&here[0], &here[1], &here[2], &cu_seqlens, bias.as_ref(), &params)?,
        scale: None,
        case: format!("{heads} heads over {kv_heads} of {dim}, {lengths:?}, biased: {biased}, {params:?}"),
    })
}
