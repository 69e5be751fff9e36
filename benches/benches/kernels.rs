//! Throughput of single kernels: `cargo bench -p ingle-benches --bench kernels [-- FILTER]`.
//!
//! Sizes are those of SmolLM2-135M and Llama-3.2-1B. Bytes are the weights (or keys and values) a call must read, items
//! its floating-point operations, so that the columns compare with the machine's limits.
#![allow(missing_docs)]

use candle_core::{DType, Device, Tensor};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ingle_kernels::ops::{
    self, Activation, AttnParams, PagedMeta, RelativeBias, RopeTables, RotateParams, SampleRow,
    SelfAttnParams,
};
use ingle_kernels::{KvDtype, KvLayer, Quantization, Weight};

fn main() {
    // As a server does: otherwise every large output costs its page faults again.
    ingle_kernels::keep_freed_memory();
    divan::main();
}

const CPU: Device = Device::Cpu;

fn random(shape: &[usize]) -> Tensor {
    Tensor::rand(-1.0_f32, 1.0, shape, &CPU).expect("memory for a bench")
}

/// `[rows, cols]` of weights: SmolLM2's gate and up, its head; Llama-3.2-1B's gate and up.
const MATRICES: [(usize, usize); 3] = [(3072, 576), (49152, 576), (16384, 2048)];

fn linear(
    bencher: Bencher<'_, '_>,
    (rows, cols): (usize, usize),
    tokens: usize,
    load: impl Fn(Tensor) -> ingle_kernels::Result<Weight>,
) {
    let weight = || load(random(&[rows, cols])).expect("a weight");
    // Several copies, so that a small matrix is read from memory as in a model, not from the nearest cache.
    let first = weight();
    let copies = (64 << 20) / first.num_bytes() + 1;
    let weights: Vec<Weight> = std::iter::once(first).chain((1..copies).map(|_| weight())).collect();
    let x = random(&[tokens, cols]);
    let mut turn = 0;
    bencher
        .counter(BytesCount::new(weights[0].num_bytes()))
        .counter(ItemsCount::new(2 * rows * cols * tokens))
        .bench_local(|| {
            turn += 1;
            ops::linear(&x, &weights[turn % copies], None).expect("fitting shapes")
        });
}

#[divan::bench(args = MATRICES, consts = [1, 4, 32, 512], sample_count = 20)]
fn linear_bf16<const TOKENS: usize>(bencher: Bencher<'_, '_>, matrix: (usize, usize)) {
    linear(bencher, matrix, TOKENS, |w| Weight::new(w, DType::BF16, &CPU));
}

#[divan::bench(args = MATRICES, consts = [1, 32, 512], sample_count = 20)]
fn linear_f32<const TOKENS: usize>(bencher: Bencher<'_, '_>, matrix: (usize, usize)) {
    linear(bencher, matrix, TOKENS, |w| Weight::new(w, DType::F32, &CPU));
}

#[divan::bench(args = MATRICES, consts = [1, 4, 32, 512], sample_count = 20)]
fn linear_int8<const TOKENS: usize>(bencher: Bencher<'_, '_>, matrix: (usize, usize)) {
    linear(bencher, matrix, TOKENS, |w| Weight::quantized(&[w], Quantization::Int8, &CPU));
}

#[divan::bench(args = MATRICES, consts = [1, 4, 32, 512], sample_count = 20)]
fn linear_int4<const TOKENS: usize>(bencher: Bencher<'_, '_>, matrix: (usize, usize)) {
    linear(bencher, matrix, TOKENS, |w| Weight::quantized(&[w], Quantization::Int4, &CPU));
}

/// Attention of SmolLM2: 9 heads over 3 of width 64, bf16 cache.
#[divan::bench(args = [(1, 1024, 1), (32, 256, 1), (1, 0, 512), (1, 1536, 512)], sample_count = 20)]
fn paged_attention_bf16(bencher: Bencher<'_, '_>, (seqs, past, new): (usize, usize, usize)) {
    let blocks = (past + new).div_ceil(16);
    let slots = seqs * blocks * 16;
    let mut layer = KvLayer::new(slots, 3, 64, KvDtype::Bf16, &CPU).expect("memory for a bench");
    let mut meta =
        PagedMeta { block_size: 16, cu_seqlens_q: vec![0], cu_blocks: vec![0], ..PagedMeta::default() };
    for seq in 0..seqs {
        meta.positions.extend(past as u32..(past + new) as u32);
        meta.cu_seqlens_q.push(((seq + 1) * new) as u32);
        meta.seq_lens.push((past + new) as u32);
        meta.block_tables.extend((seq * blocks) as u32..((seq + 1) * blocks) as u32);
        meta.cu_blocks.push(meta.block_tables.len() as u32);
    }
    let all = PagedMeta { slot_mapping: (0..slots as u32).collect(), ..meta.clone() };
    ops::store_kv(&mut layer, &random(&[slots, 3, 64]), &random(&[slots, 3, 64]), &all)
        .expect("fitting shapes");
    // Scores of some 1: the greatest so far grows now and then.
    let q = (random(&[seqs * new, 9, 64]) * 4.0).expect("memory for a bench");
    let params = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
    let pairs: usize = (1..=new).map(|i| past + i).sum();
    bencher
        .counter(BytesCount::new(seqs * (past + new) * 2 * 3 * 64 * 2))
        .counter(ItemsCount::new(seqs * pairs * 9 * 64 * 4))
        .bench_local(|| ops::paged_attention(&q, &layer, &meta, &params).expect("fitting shapes"));
}

#[divan::bench(args = [1, 32, 512], sample_count = 50)]
fn rms_norm_576(bencher: Bencher<'_, '_>, tokens: usize) {
    let (x, weight) = (random(&[tokens, 576]), random(&[576]));
    bencher.bench_local(|| ops::rms_norm(&x, &weight, 1e-5).expect("fitting shapes"));
}

/// A residual connection and the norm after it.
#[divan::bench(args = [1, 32, 512], sample_count = 50)]
fn add_rms_norm_576(bencher: Bencher<'_, '_>, tokens: usize) {
    let (x, part, weight) = (random(&[tokens, 576]), random(&[tokens, 576]), random(&[576]));
    bencher.bench_local(|| ops::add_rms_norm((&x, &part), 1.0, &weight, 1e-5).expect("fitting shapes"));
}

/// Rotation of SmolLM2's queries and keys, and the cache taking keys and values.
#[divan::bench(args = [(1, KvDtype::Bf16), (32, KvDtype::Bf16), (512, KvDtype::Bf16), (512, KvDtype::Int8)], sample_count = 50)]
fn rotate_store(bencher: Bencher<'_, '_>, (tokens, dtype): (usize, KvDtype)) {
    let mut layer =
        KvLayer::new(tokens.next_multiple_of(16), 3, 64, dtype, &CPU).expect("memory for a bench");
    let meta = PagedMeta {
        block_size: 16,
        positions: (0..tokens as u32).collect(),
        slot_mapping: (0..tokens as u32).collect(),
        ..PagedMeta::default()
    };
    let inv_freq: Vec<f32> = (0..32).map(|i| 10_000_f32.powf(-(i as f32) / 32.0)).collect();
    let tables = RopeTables::new(&meta.positions, &inv_freq, 1.0, &CPU).expect("tables");
    let params = RotateParams { norms: None, eps: 1e-5, tables: Some(&tables) };
    let qkv = random(&[tokens, 15, 64]);
    let part = |first, heads| qkv.narrow(1, first, heads).expect("a part");
    let (q, k, v) = (part(0, 9), part(9, 3), part(12, 3));
    bencher
        .bench_local(|| ops::rotate_store(&q, (&k, &v), &mut layer, &meta, &params).expect("fitting shapes"));
}

/// What lies between the attention of two layers of SmolLM2, on blocks of rows and one operation after another.
#[divan::bench(args = [(512, true), (512, false), (2048, true), (2048, false)], sample_count = 20)]
fn between_bf16(bencher: Bencher<'_, '_>, (tokens, in_blocks): (usize, bool)) {
    let weight = |rows, cols| Weight::new(random(&[rows, cols]), DType::BF16, &CPU).expect("a weight");
    let (o, gate_up, down, qkv) = (weight(576, 576), weight(3072, 576), weight(576, 1536), weight(960, 576));
    let (x, hidden, norm) = (random(&[tokens, 576]), random(&[tokens, 576]), random(&[576]));
    let compute = |rows: std::ops::Range<usize>| -> ingle_kernels::Result<[Tensor; 2]> {
        let (x, hidden) = (x.narrow(0, rows.start, rows.len())?, hidden.narrow(0, rows.start, rows.len())?);
        let part = ops::linear(&x, &o, None)?;
        let (hidden, x) = ops::add_rms_norm((&hidden, &part), 1.0, &norm, 1e-5)?;
        let part = ops::linear(&ops::gated_linear(&x, &gate_up, None, Activation::Silu)?, &down, None)?;
        let (hidden, x) = ops::add_rms_norm((&hidden, &part), 1.0, &norm, 1e-5)?;
        Ok([ops::linear(&x, &qkv, None)?, hidden])
    };
    let weights = [&o, &gate_up, &down, &qkv];
    let elements: usize = weights.iter().map(|weight| weight.rows() * weight.cols()).sum();
    let weight_bytes = if in_blocks { 0 } else { usize::MAX };
    bencher
        .counter(ItemsCount::new(2 * elements * tokens))
        .bench_local(|| ops::in_row_blocks(&x, [960, 576], weight_bytes, compute).expect("fitting shapes"));
}

/// Rows of SmolLM2's embedding.
#[divan::bench(args = [1, 32, 512], sample_count = 50)]
fn embedding_576(bencher: Bencher<'_, '_>, tokens: usize) {
    let table = Weight::new(random(&[49152, 576]), DType::BF16, &CPU).expect("a weight");
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7919 % 49152).collect();
    bencher.bench_local(|| ops::embedding(&ids, &table, DType::F32).expect("known ids"));
}

/// Tokens out of the logits of so many rows: the likeliest, and one drawn from the likeliest nine tenths.
#[divan::bench(args = [(1, true), (32, true), (1, false), (32, false)], sample_count = 20)]
fn sample_49152(bencher: Bencher<'_, '_>, (rows, greedy): (usize, bool)) {
    let logits = (random(&[rows, 49152]) * 8.0).expect("memory for a bench");
    let row = SampleRow { top_p: 0.9, uniform: 0.5, ..SampleRow::default() };
    let row = if greedy { SampleRow::default() } else { SampleRow { temperature: Some(1.0), ..row } };
    let rows = vec![row; rows];
    bencher.bench_local(|| ops::sample(&logits, &rows).expect("fitting shapes"));
}

#[divan::bench(args = [1, 32, 512], sample_count = 50)]
fn silu_mul_1536(bencher: Bencher<'_, '_>, tokens: usize) {
    let x = random(&[tokens, 3072]);
    bencher.bench_local(|| ops::gated_activation(&x, Activation::Silu).expect("fitting shapes"));
}

/// Attention of all-mpnet-base-v2: 12 heads of width 64 with a bias by distance; texts of `len` tokens.
#[divan::bench(args = [(1, 16), (32, 16), (1, 128), (8, 128), (1, 384), (4, 384)], sample_count = 20)]
fn self_attention_mpnet(bencher: Bencher<'_, '_>, (seqs, len): (usize, usize)) {
    let qkv = random(&[seqs * len, 36, 64]);
    let part = |idx: usize| qkv.narrow(1, 12 * idx, 12).expect("a part");
    let (q, k, v) = (part(0), part(1), part(2));
    let cu_seqlens: Vec<u32> = (0..=seqs).map(|seq| (seq * len) as u32).collect();
    let bias = RelativeBias::new(12, 384, |_, distance| distance as f32 / 1000.0).expect("a bias");
    let params = SelfAttnParams::bidirectional(0.125);
    bencher.counter(ItemsCount::new(seqs * len * len * 12 * 64 * 4)).bench_local(|| {
        ops::self_attention(&q, &k, &v, &cu_seqlens, Some(&bias), &params).expect("fitting shapes")
    });
}

#[divan::bench(args = [1, 128, 1024], sample_count = 50)]
fn layer_norm_768(bencher: Bencher<'_, '_>, tokens: usize) {
    let (x, residual) = (random(&[tokens, 768]), random(&[tokens, 768]));
    let (weight, bias) = (random(&[768]), random(&[768]));
    bencher.bench_local(|| {
        ops::layer_norm(&x, Some(&residual), &weight, Some(&bias), 1e-5).expect("fitting shapes")
    });
}

#[divan::bench(args = [1, 128, 1024], sample_count = 50)]
fn gelu_3072(bencher: Bencher<'_, '_>, tokens: usize) {
    let x = random(&[tokens, 3072]);
    bencher.bench_local(|| ops::activate(&x, Activation::Gelu).expect("fitting shapes"));
}
