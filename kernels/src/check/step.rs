//! What a layer does between its products, in one go: heads normed, rotated and stored, then seen by the queries. Whether
//! a sequence's result depends on its batch mates, and whether a recorded step is the step.

use candle_core::{DType, Device, Tensor};

use super::attention::{HEADS, Paged, STEPS, cached, rounding};
use super::{Checker, Pair, Random, put, tolerance};
use crate::error::Result;
use crate::kv_layer::{KvDtype, KvLayer};
use crate::ops::{self, AttnParams, PagedMeta, RopeTables, RotateParams};
use crate::reference;

const EPS: f32 = 1e-6;

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        for &kv_dtype in cached(&checker.device, dtype) {
            let types = format!("{} over {}", dtype.as_str(), kv_dtype.name());
            // A key that is summed in another order may be rounded to the next number of eight bits.
            let rounded = rounding(&checker.device, kv_dtype).max(2e-3);
            let allowed = if kv_dtype == KvDtype::Fp8 { 2e-1 } else { tolerance(dtype).max(rounded) };
            checker.run(format!("rotate_store {types}"), allowed, |random, device, check| {
                for (idx, heads) in HEADS.into_iter().enumerate() {
                    for lengths in STEPS {
                        layer(random, device, heads, lengths, (dtype, kv_dtype), idx, check)?;
                    }
                }
                Ok(())
            });
            // Plain operations promise nothing to the bit.
            if dtype == DType::F32 && !checker.device.is_cpu() {
                continue;
            }
            let name = format!("paged_attention {types}, alone and together");
            checker.run(name, 0.0, |random, device, check| company(random, device, (dtype, kv_dtype), check));
        }
    }
    #[cfg(feature = "cuda")]
    if checker.device.is_cuda() {
        for dtype in [DType::BF16, DType::F16] {
            let name = format!("a recorded step {}", dtype.as_str());
            checker.run(name, 0.0, |random, device, check| recorded(random, device, dtype, check));
        }
    }
}

/// Divisors of the rotation of `half` pairs.
fn inv_freq(half: usize) -> Vec<f32> {
    (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect()
}

/// Tables of the positions below `len`, as a model keeps them.
fn by_position(len: usize, half: usize, device: &Device) -> Result<RopeTables> {
    let all: Vec<u32> = (0..len as u32).collect();
    Ok(RopeTables { by_position: true, ..RopeTables::new(&all, &inv_freq(half), 1.0, device)? })
}

/// Heads of a stacked projection: queries, keys, values.
fn split(all: &Tensor, heads: usize, kv_heads: usize) -> Result<[Tensor; 3]> {
    let part = |start, len| all.narrow(1, start, len);
    Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
}

/// Two steps of one layer, with norms of heads and without; the second looks at what both have stored.
fn layer(
    random: &mut Random,
    device: &Device,
    (heads, kv_heads, dim): (usize, usize, usize),
    lengths: &[(usize, usize)],
    (dtype, kv_dtype): (DType, KvDtype),
    idx: usize,
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    let Paged { before, step, num_slots } = Paged::new(random, lengths);
    let longest = step.seq_lens.iter().copied().max().unwrap_or(1) as usize;
    let mut there = KvLayer::new(num_slots, kv_heads, dim, kv_dtype, device)?;
    let mut here = KvLayer::portable(num_slots, kv_heads, dim, kv_dtype, &Device::Cpu)?;
    let norms = (random.tensor(&[dim], DType::F32)?, random.tensor(&[dim], DType::F32)?);
    let there_norms = (norms.0.to_device(device)?, norms.1.to_device(device)?);
    let with_norms = idx.is_multiple_of(2);
    let tables = by_position(longest, dim / 2, device)?;
    let params = RotateParams {
        norms: with_norms.then_some((&there_norms.0, &there_norms.1)),
        eps: EPS,
        tables: Some(&tables),
    };
    let attn = AttnParams { scale: 1.0 / (dim as f32).sqrt(), sliding_window: None, softcap: None };
    let case = format!("{heads} heads over {kv_heads} of {dim}, {lengths:?}");
    for (meta, is_last) in [(&before, false), (&step, true)] {
        let tokens = meta.num_tokens();
        if tokens == 0 {
            continue;
        }
        let all = random.tensor(&[tokens, heads + 2 * kv_heads, dim], dtype)?;
        let [q, k, v] = split(&put(&all, dtype, device)?, heads, kv_heads)?;
        let q = ops::rotate_store(&q, (&k, &v), &mut there, meta, &params)?;
        let [plain_q, plain_k, v] = split(&all, heads, kv_heads)?;
        let tables = RopeTables::new(&meta.positions, &inv_freq(dim / 2), 1.0, &Device::Cpu)?;
        let rotated = |x: &Tensor, norm: &Tensor| {
            let x = if with_norms { reference::rms_norm(&x.contiguous()?, norm, EPS)? } else { x.clone() };
            reference::rope(&x, &tables)
        };
        let (plain_q, plain_k) = (rotated(&plain_q, &norms.0)?, rotated(&plain_k, &norms.1)?);
        // Rounded as they are between two kernels.
        let rounded = |x: &Tensor| -> Result<Tensor> { Ok(x.to_dtype(dtype)?.to_dtype(DType::F32)?) };
        reference::store_kv(&mut here, &rounded(&plain_k)?, &v.contiguous()?, meta)?;
        if is_last {
            let found = ops::paged_attention(&q, &there, meta, &attn)?;
            let wanted = reference::paged_attention(&rounded(&plain_q)?, &here, meta, &attn)?;
            check(Pair { found, wanted, scale: None, case: format!("{case}, attention") })?;
        }
        check(Pair { found: q, wanted: plain_q, scale: None, case: format!("{case}, queries") })?;
    }
    Ok(())
}

/// Sequences of all kinds together, and each alone: the same bits.
fn company(
    random: &mut Random,
    device: &Device,
    (dtype, kv_dtype): (DType, KvDtype),
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    let (heads, kv_heads, dim) = (8, 2, 64);
    let lengths = [(700, 1), (40, 9), (3, 1), (129, 1), (150, 33)];
    let Paged { before, step, num_slots } = Paged::new(random, &lengths);
    let mut layer = KvLayer::new(num_slots, kv_heads, dim, kv_dtype, device)?;
    for meta in [&before, &step] {
        let mut stored = || put(&random.tensor(&[meta.num_tokens(), kv_heads, dim], dtype)?, dtype, device);
        let (k, v) = (stored()?, stored()?);
        ops::store_kv(&mut layer, &k, &v, meta)?;
    }
    let q = put(&random.tensor(&[step.num_tokens(), heads, dim], dtype)?, dtype, device)?;
    let params = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
    let together = ops::paged_attention(&q, &layer, &step, &params)?;
    for (seq, length) in lengths.into_iter().enumerate() {
        let (first, end) = (step.cu_seqlens_q[seq] as usize, step.cu_seqlens_q[seq + 1] as usize);
        let blocks = step.cu_blocks[seq] as usize..step.cu_blocks[seq + 1] as usize;
        let alone = PagedMeta {
            positions: step.positions[first..end].to_vec(),
            slot_mapping: step.slot_mapping[first..end].to_vec(),
            cu_seqlens_q: vec![0, (end - first) as u32],
            seq_lens: vec![step.seq_lens[seq]],
            cu_blocks: vec![0, blocks.len() as u32],
            block_tables: step.block_tables[blocks].to_vec(),
            block_size: step.block_size,
        };
        let found = ops::paged_attention(&q.narrow(0, first, end - first)?, &layer, &alone, &params)?;
        check(Pair {
            found,
            wanted: together.narrow(0, first, end - first)?,
            scale: None,
            case: format!("{length:?}"),
        })?;
    }
    Ok(())
}

/// A decode step recorded once and replayed while its two sequences grow over the edge of a part of attention and of a
/// block; a third row is padding.
#[cfg(feature = "cuda")]
fn recorded(
    random: &mut Random,
    device: &Device,
    dtype: DType,
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    use crate::weight::Weight;
    use crate::{StepGraph, StepLimits};

    let (heads, kv_heads, dim) = (8, 2, 64);
    let width = heads * dim;
    let mut layer = KvLayer::new(64 * 16, kv_heads, dim, crate::KvDtype::Fp8, device)?;
    let norm = put(&random.tensor(&[width], DType::F32)?, DType::F32, device)?;
    let matrix = random.tensor(&[(heads + 2 * kv_heads) * dim, width], dtype)?;
    let weight = Weight::new(matrix, dtype, device)?;
    let tables = by_position(600, dim / 2, device)?;
    let params = RotateParams { norms: None, eps: 0.0, tables: Some(&tables) };
    let attn = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
    let mut compute = |hidden: &Tensor, meta: &PagedMeta| -> Result<Tensor> {
        let x = ops::linear(&ops::rms_norm(hidden, &norm, EPS)?, &weight, None)?;
        let x = x.reshape((hidden.dim(0)?, heads + 2 * kv_heads, dim))?;
        let [q, k, v] = split(&x, heads, kv_heads)?;
        let q = ops::rotate_store(&q, (&k, &v), &mut layer, meta, &params)?;
        let out = ops::paged_attention(&q, &layer, meta, &attn)?;
        Ok(out.reshape((hidden.dim(0)?, width))?.to_dtype(DType::F32)?)
    };
    let meta = |step: u32| PagedMeta {
        positions: vec![120 + step, step, 0],
        slot_mapping: vec![120 + step, 512 + step, u32::MAX],
        cu_seqlens_q: vec![0, 1, 2, 3],
        seq_lens: vec![121 + step, 1 + step, 0],
        cu_blocks: vec![0, 32, 64, 64],
        block_tables: (0..64).collect(),
        block_size: 16,
    };
    let (input, output) =
        (Tensor::zeros((3, width), dtype, device)?, Tensor::zeros((3, width), DType::F32, device)?);
    let limits = StepLimits { num_blocks: 128, longest: 512, all_tokens: 1024 };
    let first = meta(0);
    let mut graph = StepGraph::record(&first, limits, (input, output), |hidden| compute(hidden, &first))?;
    for step in 0..24 {
        let hidden = put(&random.tensor(&[2, width], dtype)?, dtype, device)?;
        let padded = Tensor::cat(&[&hidden, &Tensor::zeros((1, width), dtype, device)?], 0)?;
        let wanted = compute(&padded, &meta(step))?.narrow(0, 0, 2)?;
        let replayed = graph.replay(&meta(step), &hidden)?;
        let Some(found) = replayed else {
            return Err(crate::error::argument("StepGraph", format!("step {step} does not fit")));
        };
        check(Pair { found: found.narrow(0, 0, 2)?, wanted, scale: None, case: format!("step {step}") })?;
    }
    // Longer than what was recorded for: refused, not computed wrong.
    let mut long = meta(0);
    long.seq_lens[0] = 520;
    long.cu_blocks = vec![0, 40, 64, 64];
    if graph.replay(&long, &Tensor::zeros((3, width), dtype, device)?)?.is_some() {
        return Err(crate::error::argument("StepGraph", "a sequence too long was replayed"));
    }
    Ok(())
}
