//! The cache and attention over it, mixed batches, and a recorded step.

use candle_core::{DType, Device, Tensor};
use ingle_kernels::ops::{self, AttnParams, PagedMeta, RopeTables, RotateParams, SelfAttnParams};
use ingle_kernels::{KvDtype, KvLayer, StepGraph, StepLimits, reference};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{CPU, HALVES, assert_close, gpu, random, rng, upload, values};

const BLOCK_SIZE: usize = 16;

/// Sequences of `(queries, keys)` with blocks in random order, and a batch that stores all their keys.
fn batches(rng: &mut ChaCha8Rng, seqs: &[(usize, usize)]) -> (PagedMeta, PagedMeta, usize) {
    let num_blocks = seqs.iter().map(|(_, len)| len.div_ceil(BLOCK_SIZE)).sum::<usize>() + 2;
    let mut free: Vec<u32> = (0..num_blocks as u32).collect();
    free.shuffle(rng);
    let start = PagedMeta {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        block_size: BLOCK_SIZE,
        ..PagedMeta::default()
    };
    let (mut queries, mut keys) = (start.clone(), start);
    for (idx, (num_queries, len)) in seqs.iter().enumerate() {
        let blocks = free.split_off(free.len() - len.div_ceil(BLOCK_SIZE));
        for (meta, first) in [(&mut queries, len - num_queries), (&mut keys, 0)] {
            meta.block_tables.extend(&blocks);
            meta.cu_blocks.push(meta.block_tables.len() as u32);
            meta.seq_lens.push(*len as u32);
            for position in first..*len {
                meta.positions.push(position as u32);
                let slot = meta.slot(idx, position);
                meta.slot_mapping.push(slot as u32);
            }
            meta.cu_seqlens_q.push(meta.positions.len() as u32);
        }
    }
    (queries, keys, num_blocks * BLOCK_SIZE)
}

fn tables(len: usize, half: usize, by_position: bool, positions: &[u32], device: &Device) -> RopeTables {
    let inv_freq: Vec<f32> = (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
    let all: Vec<u32> = (0..len as u32).collect();
    let positions = if by_position { &all } else { positions };
    RopeTables { by_position, ..RopeTables::new(positions, &inv_freq, 1.0, device).unwrap() }
}

#[test]
#[ignore = "needs a GPU"]
fn attention_over_the_cache_equals_the_formula() {
    let (device, mut rng) = (gpu(), rng());
    let seqs = [(1, 1), (1, 129), (17, 33), (1, 1025), (5, 5), (70, 200), (1, 128), (2, 300)];
    let shapes = [
        (8, 2, 64),
        (4, 4, 80),
        (6, 2, 96),
        (14, 2, 64),
        (32, 8, 128),
        (8, 4, 256),
        (20, 1, 128),
        (3, 1, 24),
    ];
    for (heads, kv_heads, dim) in shapes {
        for dtype in HALVES {
            for cache in [KvDtype::of(dtype).unwrap(), KvDtype::Fp8] {
                let (queries, keys, slots) = batches(&mut rng, &seqs);
                let norms = (random(&mut rng, &[dim], DType::F32), random(&mut rng, &[dim], DType::F32));
                // Rows of the stacked projection; queries of tokens that bring none are left unused.
                let all = random(&mut rng, &[keys.num_tokens(), (heads + 2 * kv_heads) * dim], dtype);
                let all = all.reshape((keys.num_tokens(), heads + 2 * kv_heads, dim)).unwrap();
                let run = |device: &Device, dtype: DType, layer: &mut KvLayer, by_position: bool| {
                    let x = upload(&all, dtype, device);
                    let part = |start, len| x.narrow(1, start, len).unwrap();
                    let norms = (upload(&norms.0, DType::F32, device), upload(&norms.1, DType::F32, device));
                    let tables = tables(1025, dim / 2, by_position, &keys.positions, device);
                    let params =
                        RotateParams { norms: Some((&norms.0, &norms.1)), eps: 1e-6, tables: Some(&tables) };
                    let kv = (&part(heads, kv_heads), &part(heads + kv_heads, kv_heads));
                    let q = ops::rotate_store(&part(0, heads), kv, layer, &keys, &params).unwrap();
                    let rows: Vec<u32> = (0..seqs.len())
                        .flat_map(|seq| {
                            let end = keys.cu_seqlens_q[seq + 1];
                            end - (queries.cu_seqlens_q[seq + 1] - queries.cu_seqlens_q[seq])..end
                        })
                        .collect();
                    q.index_select(&Tensor::new(rows, device).unwrap(), 0).unwrap()
                };
                let mut on_device = KvLayer::new(slots, kv_heads, dim, cache, &device).unwrap();
                let mut plain = KvLayer::portable(slots, kv_heads, dim, cache, &CPU).unwrap();
                let q = run(&device, dtype, &mut on_device, true);
                let plain_q = run(&CPU, DType::F32, &mut plain, false);
                let what = format!("{dtype:?}, {cache:?}, {heads} / {kv_heads} heads of {dim}");
                assert_close(&q, &plain_q, dtype, (3.0, 0.05), &what);
                for (window, softcap) in [(None, None), (Some(100), Some(20.0))] {
                    let params =
                        AttnParams { scale: 1.0 / (dim as f32).sqrt(), sliding_window: window, softcap };
                    let found = ops::paged_attention(&q, &on_device, &queries, &params).unwrap();
                    let plain_q = upload(&q, DType::F32, &CPU);
                    let wanted = reference::paged_attention(&plain_q, &plain, &queries, &params).unwrap();
                    // Keys in a cache of bytes may have been rounded to neighbours, where their norms were summed in
                    // another order.
                    let steps = if cache == KvDtype::Fp8 { 24.0 } else { 4.0 };
                    let steps = if dtype == DType::F16 && cache == KvDtype::Fp8 { 100.0 } else { steps };
                    assert_close(&found, &wanted, dtype, (steps, 1.0), &format!("{what}, {params:?}"));
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_sequence_does_not_depend_on_its_batch_mates() {
    let (device, mut rng) = (gpu(), rng());
    let seqs = [(1, 700), (9, 40), (1, 3), (1, 129), (33, 150)];
    let (heads, kv_heads, dim) = (8, 2, 64);
    let (queries, _, slots) = batches(&mut rng, &seqs);
    let dtype = DType::BF16;
    let mut layer = KvLayer::new(slots, kv_heads, dim, KvDtype::Bf16, &device).unwrap();
    let everywhere = PagedMeta {
        positions: vec![0; slots],
        slot_mapping: (0..slots as u32).collect(),
        ..PagedMeta::default()
    };
    let mut stored = |heads: usize| upload(&random(&mut rng, &[slots, heads, dim], dtype), dtype, &device);
    let (any_q, k, v) = (stored(1), stored(kv_heads), stored(kv_heads));
    let plain = RotateParams { norms: None, eps: 0.0, tables: None };
    ops::rotate_store(&any_q, (&k, &v), &mut layer, &everywhere, &plain).unwrap();
    let q = upload(&random(&mut rng, &[queries.num_tokens(), heads, dim], dtype), dtype, &device);
    let params = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
    let all = values(&ops::paged_attention(&q, &layer, &queries, &params).unwrap());
    for seq in 0..seqs.len() {
        let (start, end) = (queries.cu_seqlens_q[seq] as usize, queries.cu_seqlens_q[seq + 1] as usize);
        let blocks = queries.cu_blocks[seq] as usize..queries.cu_blocks[seq + 1] as usize;
        let alone = PagedMeta {
            positions: queries.positions[start..end].to_vec(),
            slot_mapping: queries.slot_mapping[start..end].to_vec(),
            cu_seqlens_q: vec![0, (end - start) as u32],
            seq_lens: vec![queries.seq_lens[seq]],
            cu_blocks: vec![0, blocks.len() as u32],
            block_tables: queries.block_tables[blocks].to_vec(),
            block_size: BLOCK_SIZE,
        };
        let q = q.narrow(0, start, end - start).unwrap();
        let found = values(&ops::paged_attention(&q, &layer, &alone, &params).unwrap());
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&all[start * heads * dim..end * heads * dim]), "sequence {seq}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn attention_without_a_cache_equals_the_formula() {
    let (device, mut rng) = (gpu(), rng());
    let cu_seqlens = [0, 3, 70, 71, 300];
    for dtype in HALVES {
        for (heads, kv_heads, dim) in [(12, 12, 64), (4, 2, 128), (2, 1, 80)] {
            for (left, right) in [(None, None), (None, Some(0)), (Some(20), Some(7))] {
                let qkv = random(&mut rng, &[300, heads + 2 * kv_heads, dim], dtype);
                let params = SelfAttnParams { scale: 0.1, left, right, softcap: None };
                let run = |qkv: &Tensor| {
                    let part = |start, len| qkv.narrow(1, start, len).unwrap();
                    let (k, v) = (part(heads, kv_heads), part(heads + kv_heads, kv_heads));
                    ops::self_attention(&part(0, heads), &k, &v, &cu_seqlens, None, &params).unwrap()
                };
                let (found, wanted) = (run(&upload(&qkv, dtype, &device)), run(&qkv));
                assert_close(
                    &found,
                    &wanted,
                    dtype,
                    (4.0, 0.5),
                    &format!("{dtype:?}, heads of {dim}, {params:?}"),
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_recorded_step_equals_the_same_step_kernel_by_kernel() {
    let (device, mut rng) = (gpu(), rng());
    let (heads, kv_heads, dim, dtype) = (8, 2, 64, DType::BF16);
    let width = heads * dim;
    let mut layer = KvLayer::new(64 * BLOCK_SIZE, kv_heads, dim, KvDtype::Bf16, &device).unwrap();
    let norm = upload(&random(&mut rng, &[width], DType::F32), DType::F32, &device);
    let matrix = upload(&random(&mut rng, &[(heads + 2 * kv_heads) * dim, width], dtype), dtype, &device);
    let tables = tables(600, dim / 2, true, &[], &device);
    let params = RotateParams { norms: None, eps: 0.0, tables: Some(&tables) };
    let attn = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
    let mut compute = |hidden: &Tensor, meta: &PagedMeta| -> ingle_kernels::Result<Tensor> {
        let tokens = hidden.dims()[0];
        let x = ops::rms_norm(hidden, &norm, 1e-6)?.matmul(&matrix.t()?)?;
        let x = x.reshape((tokens, heads + 2 * kv_heads, dim))?;
        let (k, v) = (x.narrow(1, heads, kv_heads)?, x.narrow(1, heads + kv_heads, kv_heads)?);
        let q = ops::rotate_store(&x.narrow(1, 0, heads)?, (&k, &v), &mut layer, meta, &params)?;
        let out = ops::paged_attention(&q, &layer, meta, &attn)?;
        Ok(out.reshape((tokens, width))?.to_dtype(DType::F32)?)
    };
    // Two sequences that grow over the edge of a part, the third row is padding.
    let meta = |step: usize| PagedMeta {
        positions: vec![120 + step as u32, step as u32, 0],
        slot_mapping: vec![(120 + step) as u32, (512 + step) as u32, u32::MAX],
        cu_seqlens_q: vec![0, 1, 2, 3],
        seq_lens: vec![121 + step as u32, 1 + step as u32, 0],
        cu_blocks: vec![0, 32, 64, 64],
        block_tables: (0..64).collect(),
        block_size: BLOCK_SIZE,
    };
    let input = Tensor::zeros((3, width), dtype, &device).unwrap();
    let output = Tensor::zeros((3, width), DType::F32, &device).unwrap();
    let limits = StepLimits { num_blocks: 128, longest: 512, all_tokens: 1024 };
    let first = meta(0);
    let mut graph =
        StepGraph::record(&first, limits, (input, output), |hidden| compute(hidden, &first)).unwrap();
    for step in 0..40 {
        let hidden = upload(&random(&mut rng, &[2, width], dtype), dtype, &device);
        let padding = Tensor::zeros((1, width), dtype, &device).unwrap();
        let eager = compute(&Tensor::cat(&[&hidden, &padding], 0).unwrap(), &meta(step)).unwrap();
        let eager = values(&eager.narrow(0, 0, 2).unwrap());
        let replayed = graph.replay(&meta(step), &hidden).unwrap().expect("fits").narrow(0, 0, 2).unwrap();
        assert_eq!(values(&replayed), eager, "step {step}");
    }
    // Longer than what was recorded for.
    let mut long = meta(0);
    long.seq_lens[0] = rng.random_range(513..600);
    long.cu_blocks = vec![0, 40, 64, 64];
    assert!(graph.replay(&long, &Tensor::zeros((3, width), dtype, &device).unwrap()).unwrap().is_none());
}
