//! Attention on tiles, by dot products of bf16 and by 16-bit floats against the formula and against itself in other chunks; on
//! the matrix unit where there is one and emulated elsewhere.

use super::super::amx::tests::{bits, numbers, use_tiles};
use super::super::halves::scale_to;
use super::super::kv::Layout;
use super::super::{Isa, KvStore, NewRows, Rows, isa, written};
use super::{CHUNK, compute};
use crate::KvDtype;
use crate::ops::{AttnParams, PagedMeta};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Tiles,
    Dots,
    /// Over a cache in pairs.
    InCache,
    Halves,
}

impl Unit {
    /// Whether it may be used here.
    fn prepare(self) -> bool {
        match self {
            _ if !is_x86_feature_detected!("avx512f") => {
                eprintln!("this processor has no AVX-512: nothing to test");
                return false;
            }
            Self::Tiles => use_tiles(),
            Self::Dots | Self::InCache if is_x86_feature_detected!("avx512bf16") => {}
            Self::Dots | Self::InCache => {
                eprintln!("this processor has no dot products of bf16: nothing to test");
                return false;
            }
            Self::Halves if isa() == Isa::Avx512Fp16 => {}
            Self::Halves => {
                eprintln!("16-bit floats are not the instruction set in use: nothing to test");
                return false;
            }
        }
        true
    }
}

struct Shape {
    unit: Unit,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    dtype: KvDtype,
}

/// A step over a full cache whose blocks lie in another order than the sequences have them.
struct Step {
    shape: Shape,
    meta: PagedMeta,
    q: Vec<f32>,
    /// `[slot][kv head][dim]`, as the cache keeps them.
    k: Vec<f32>,
    v: Vec<f32>,
    store: KvStore,
}

/// What a cache keeps of the heads of a token.
fn rounded(x: &[f32], shape: &Shape) -> Vec<f32> {
    match (shape.unit, shape.dtype) {
        (Unit::Halves, _) => {
            let round = |head: &[f32]| {
                let (factor, scale) = scale_to(head.iter().fold(0.0_f32, |max, x| max.max(x.abs())), 0);
                head.iter().map(|x| half::f16::from_f32(x * factor).to_f32() * scale).collect::<Vec<_>>()
            };
            x.chunks_exact(shape.dim).flat_map(round).collect()
        }
        (Unit::Tiles | Unit::Dots | Unit::InCache, KvDtype::Bf16) => {
            x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect()
        }
        _ => {
            let round = |head: &[f32]| {
                let largest = head.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                let round = move |x: &f32| (x * (127.0 / largest)).round_ties_even() * (largest / 127.0);
                head.iter().map(round).collect::<Vec<_>>()
            };
            x.chunks_exact(shape.dim).flat_map(round).collect()
        }
    }
}

impl Step {
    /// `lens`: for each sequence how many tokens are cached before this step and how many it brings.
    fn new(shape: Shape, lens: &[(usize, usize)]) -> Self {
        let Shape { unit, heads, kv_heads, dim, block_size, dtype } = shape;
        let needed: usize = lens.iter().map(|(past, new)| (past + new).div_ceil(block_size)).sum();
        let num_blocks = needed + 2;
        // An odd step visits all blocks of a count that is a power of two, in no order.
        let order = num_blocks.next_power_of_two();
        let mut blocks = (0..order).map(|i| (i * 5 + 3) % order).filter(|block| *block < num_blocks);
        let num_slots = num_blocks * block_size;
        let width = kv_heads * dim;
        let (k, v) = (numbers(21, num_slots * width), numbers(22, num_slots * width));
        let layout = match unit {
            Unit::Halves => Layout::Halves,
            Unit::InCache => Layout::Pairs,
            Unit::Tiles | Unit::Dots => Layout::Plain,
        };
        let mut store = KvStore::with(num_slots, (kv_heads, dim), dtype, layout).expect("fits");
        let slots: Vec<u32> = (0..num_slots as u32).collect();
        let rows = |x| Rows::new(x, num_slots, width, width).expect("a matrix");
        store.store(&NewRows { k: rows(&k), v: rows(&v), slots: &slots, rotation: None });
        let mut meta =
            PagedMeta { block_size, cu_seqlens_q: vec![0], cu_blocks: vec![0], ..PagedMeta::default() };
        for &(past, new) in lens {
            let count = (past + new).div_ceil(block_size);
            meta.block_tables.extend(blocks.by_ref().take(count).map(|block| block as u32));
            meta.cu_blocks.push(meta.block_tables.len() as u32);
            meta.positions.extend(past as u32..(past + new) as u32);
            meta.cu_seqlens_q.push(meta.positions.len() as u32);
            meta.seq_lens.push((past + new) as u32);
        }
        // Scores of some 2: weights of all magnitudes.
        let q = numbers(23, meta.num_tokens() * heads * dim).iter().map(|x| 4.0 * x).collect();
        let (k, v) = (rounded(&k, &shape), rounded(&v, &shape));
        Self { shape, meta, q, k, v, store }
    }

    fn attend(&self, tokens: std::ops::Range<usize>, meta: &PagedMeta, params: &AttnParams) -> Vec<f32> {
        let width = self.shape.heads * self.shape.dim;
        let q = &self.q[tokens.start * width..tokens.end * width];
        let q = Rows::new(q, tokens.len(), width, width).expect("a matrix");
        // SAFETY: attention writes all of its output.
        let y = unsafe {
            written(tokens.len() * width, |y| {
                let unit = match self.shape.unit {
                    Unit::Tiles => super::Unit::Tiles,
                    Unit::Dots | Unit::InCache => super::Unit::Dots,
                    Unit::Halves => super::Unit::Vectors,
                };
                compute(q, &self.store, meta, params, unit, y);
                Ok::<(), ()>(())
            })
        };
        y.expect("written")
    }

    /// The formula in f64 on what the cache keeps.
    fn formula(&self, params: &AttnParams) -> Vec<f32> {
        let Shape { heads, kv_heads, dim, .. } = self.shape;
        let mut outputs = Vec::new();
        for seq in 0..self.meta.num_seqs() {
            for token in self.meta.cu_seqlens_q[seq] as usize..self.meta.cu_seqlens_q[seq + 1] as usize {
                let at = self.meta.positions[token] as usize;
                let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
                for head in 0..heads {
                    let row = |x: &'_ [f32], slot: usize| {
                        x[(slot * kv_heads + head / (heads / kv_heads)) * dim..][..dim].to_vec()
                    };
                    let q = &self.q[(token * heads + head) * dim..][..dim];
                    let keys = from..=at;
                    let scores: Vec<f64> = keys
                        .clone()
                        .map(|key| {
                            let k = row(&self.k, self.meta.slot(seq, key));
                            let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(k)).sum();
                            let score = dot * f64::from(params.scale);
                            params.softcap.map_or(score, |cap| {
                                let cap = f64::from(cap);
                                cap * (score / cap).tanh()
                            })
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let mut sums = vec![0.0_f64; dim];
                    for (key, weight) in keys.zip(&weights) {
                        for (sum, v) in sums.iter_mut().zip(row(&self.v, self.meta.slot(seq, key))) {
                            *sum += weight * f64::from(v);
                        }
                    }
                    outputs.extend(sums.iter().map(|sum| (sum / total) as f32));
                }
            }
        }
        outputs
    }

    /// The tokens `first..first + count` of sequence `seq` alone, as if they were its last.
    fn alone(&self, seq: usize, first: usize, count: usize) -> (std::ops::Range<usize>, PagedMeta) {
        let token = self.meta.cu_seqlens_q[seq] as usize + first;
        let blocks = self.meta.cu_blocks[seq] as usize..self.meta.cu_blocks[seq + 1] as usize;
        let table = &self.meta.block_tables[blocks];
        let positions = self.meta.positions[token..token + count].to_vec();
        let meta = PagedMeta {
            seq_lens: vec![positions[count - 1] + 1],
            positions,
            slot_mapping: Vec::new(),
            cu_seqlens_q: vec![0, count as u32],
            block_tables: table.to_vec(),
            cu_blocks: vec![0, table.len() as u32],
            block_size: self.meta.block_size,
        };
        (token..token + count, meta)
    }
}

fn params() -> [AttnParams; 3] {
    let plain = AttnParams { scale: 0.3, sliding_window: None, softcap: None };
    [
        plain,
        AttnParams { sliding_window: Some(37), ..plain },
        AttnParams { sliding_window: Some(1), softcap: Some(3.0), ..plain },
    ]
}

const LENS: &[(usize, usize)] = &[(0, 70), (63, 1), (64, 2), (100, 40), (0, 1), (300, 3)];

#[test]
fn attention_on_tiles_equals_the_formula() {
    equals_the_formula(
        Unit::Tiles,
        &[(16, KvDtype::Bf16), (3, KvDtype::Bf16), (16, KvDtype::Int8), (24, KvDtype::Int8)],
        // Values are in -1..1. Queries and weights are off by 2^-9 of themselves at most.
        (0.02, 0.002),
    );
}

#[test]
fn attention_by_dot_products_equals_the_formula() {
    equals_the_formula(
        Unit::Dots,
        &[(16, KvDtype::Bf16), (3, KvDtype::Bf16), (16, KvDtype::Int8), (24, KvDtype::Int8)],
        // As on tiles: what is rounded is the same.
        (0.02, 0.002),
    );
}

#[test]
fn attention_over_pairs_equals_the_formula() {
    equals_the_formula(Unit::InCache, &[(16, KvDtype::Bf16), (3, KvDtype::Bf16)], (0.02, 0.002));
}

/// Pairs in the cache are those that would be made for each chunk.
#[test]
fn where_pairs_are_made_changes_no_bit() {
    if !Unit::InCache.prepare() {
        return;
    }
    for (block_size, dim) in [(16, 64), (3, 64), (32, 32), (24, 96), (16, 128)] {
        let step = |unit| {
            let shape = Shape { unit, heads: 6, kv_heads: 2, dim, block_size, dtype: KvDtype::Bf16 };
            Step::new(shape, LENS)
        };
        let (made, cached) = (step(Unit::Dots), step(Unit::InCache));
        for params in params() {
            let all = 0..made.meta.num_tokens();
            let made = made.attend(all.clone(), &made.meta, &params);
            assert_eq!(bits(&cached.attend(all, &cached.meta, &params)), bits(&made), "{block_size}, {dim}");
        }
    }
}

#[test]
fn attention_by_16_bit_floats_equals_the_formula() {
    // Sums lose a few times 2^-11 of what they are made of.
    equals_the_formula(
        Unit::Halves,
        &[(16, KvDtype::Bf16), (3, KvDtype::Bf16), (32, KvDtype::F16)],
        (0.016, 0.0015),
    );
}

/// `bounds`: of the largest difference and of the root of the mean square.
fn equals_the_formula(unit: Unit, caches: &[(usize, KvDtype)], bounds: (f32, f64)) {
    if !unit.prepare() {
        return;
    }
    for (heads, kv_heads, dim) in
        [(1, 1, 16), (9, 3, 64), (2, 2, 24), (4, 1, 128), (14, 2, 80), (2, 1, 5), (2, 1, 288)]
    {
        for (block_size, dtype) in caches.iter().copied() {
            let step = Step::new(Shape { unit, heads, kv_heads, dim, block_size, dtype }, LENS);
            for params in params() {
                let found = step.attend(0..step.meta.num_tokens(), &step.meta, &params);
                let wanted = step.formula(&params);
                let (mut square, mut worst) = (0.0_f64, 0.0_f32);
                for (found, wanted) in found.iter().zip(&wanted) {
                    let off = (found - wanted).abs();
                    assert!(off.is_finite());
                    worst = worst.max(off);
                    square += f64::from(off) * f64::from(off);
                }
                let mean = (square / found.len() as f64).sqrt();
                let what = format!("{heads}/{kv_heads} x {dim}, block {block_size}, {dtype:?}, {params:?}");
                println!("{what}: {worst} at most, {mean} in the mean");
                assert!(worst < bounds.0 && mean < bounds.1, "{what}: {worst} at most, {mean} in the mean");
            }
        }
    }
}

#[test]
fn nothing_depends_on_batch_or_chunks() {
    let caches = [
        (Unit::Tiles, KvDtype::Bf16, 16),
        (Unit::Tiles, KvDtype::Bf16, 3),
        (Unit::Tiles, KvDtype::Int8, 16),
        (Unit::Dots, KvDtype::Bf16, 16),
        (Unit::Dots, KvDtype::Bf16, 3),
        (Unit::Dots, KvDtype::Int8, 16),
        (Unit::InCache, KvDtype::Bf16, 16),
        (Unit::InCache, KvDtype::Bf16, 3),
        (Unit::Halves, KvDtype::Bf16, 16),
        (Unit::Halves, KvDtype::F16, 3),
    ];
    for (unit, dtype, block_size) in caches {
        if !unit.prepare() {
            continue;
        }
        let dim = if unit == Unit::InCache { 96 } else { 40 };
        let step = Step::new(Shape { unit, heads: 6, kv_heads: 2, dim, block_size, dtype }, LENS);
        for params in params() {
            let together = step.attend(0..step.meta.num_tokens(), &step.meta, &params);
            // One by one as in decoding, and in chunks of a prefill.
            for size in [1, 7, 32] {
                let mut parts = Vec::new();
                for (seq, (_, new)) in LENS.iter().enumerate() {
                    for first in (0..*new).step_by(size) {
                        let (tokens, meta) = step.alone(seq, first, size.min(new - first));
                        parts.extend(step.attend(tokens, &meta, &params));
                    }
                }
                assert_eq!(bits(&parts), bits(&together), "{dtype:?}, {block_size}, {params:?}, by {size}");
            }
        }
    }
}

#[test]
fn what_lies_behind_a_sequence_is_not_read() {
    for unit in [Unit::Tiles, Unit::Dots, Unit::InCache, Unit::Halves] {
        if !unit.prepare() {
            continue;
        }
        for len in [20, 21] {
            let shape = Shape { unit, heads: 2, kv_heads: 1, dim: 32, block_size: 16, dtype: KvDtype::Bf16 };
            let mut step = Step::new(shape, &[(0, len)]);
            let [params, ..] = params();
            let wanted = step.attend(0..len, &step.meta, &params);
            let slots: Vec<u32> = (len..32).map(|key| step.meta.slot(0, key) as u32).collect();
            for bad in [f32::NAN, f32::INFINITY] {
                let bad = vec![bad; slots.len() * 32];
                let rows = Rows::new(&bad, slots.len(), 32, 32).expect("a matrix");
                step.store.store(&NewRows { k: rows, v: rows, slots: &slots, rotation: None });
                assert_eq!(bits(&step.attend(0..len, &step.meta, &params)), bits(&wanted));
            }
        }
    }
}

#[test]
fn scores_that_rise_from_chunk_to_chunk_have_their_weights() {
    const LEN: usize = 300;
    for unit in [Unit::Tiles, Unit::Dots, Unit::InCache] {
        if !unit.prepare() {
            continue;
        }
        let shape = Shape { unit, heads: 3, kv_heads: 1, dim: 64, block_size: 16, dtype: KvDtype::Bf16 };
        let mut step = Step::new(shape, &[(0, LEN)]);
        // Of scores as large as these a rounded query would change the weights.
        for q in &mut step.q {
            *q = half::bf16::from_f32(*q).to_f32();
        }
        // Greatest scores of 1, 2, 11 and 22 powers of two: by more and by less than sums are left as they are.
        for position in 0..LEN {
            let slot = step.meta.slot(0, position);
            let factor = [0.125, 0.25, 1.0, 2.0, 4.0][position / CHUNK];
            step.k[slot * 64..][..64].iter_mut().for_each(|k| *k *= factor);
        }
        let slots: Vec<u32> = (0..step.k.len() as u32 / 64).collect();
        let rows = |x| Rows::new(x, slots.len(), 64, 64).expect("a matrix");
        step.store.store(&NewRows { k: rows(&step.k), v: rows(&step.v), slots: &slots, rotation: None });
        let [params, ..] = params();
        let found = step.attend(0..LEN, &step.meta, &params);
        for (found, wanted) in found.iter().zip(step.formula(&params)) {
            assert!((found - wanted).abs() < 0.01, "{found} {wanted}");
        }
        let (tokens, meta) = step.alone(0, LEN - 1, 1);
        assert_eq!(bits(&step.attend(tokens, &meta, &params)), bits(&found[(LEN - 1) * 3 * 64..]));
    }
}

/// Keys and values of very different sizes, as models with outliers have them.
#[test]
fn scales_keep_numbers_of_any_size() {
    if !Unit::Halves.prepare() {
        return;
    }
    let shape =
        Shape { unit: Unit::Halves, heads: 4, kv_heads: 2, dim: 64, block_size: 16, dtype: KvDtype::Bf16 };
    let mut step = Step::new(shape, &[(0, 90)]);
    let size = |slot: usize| [1.0_f32, 3e-6, 5e4, 0.0, 1e-2][slot % 5];
    // Scores must not grow, or one key would have all the weight.
    for (i, (k, v)) in step.k.iter_mut().zip(&mut step.v).enumerate() {
        let slot = i / (2 * 64);
        *k *= size(slot + 1).min(1.0);
        *v *= size(slot);
    }
    let slots: Vec<u32> = (0..step.k.len() as u32 / 128).collect();
    let (k, v) = (step.k.clone(), step.v.clone());
    let rows = |x| Rows::new(x, slots.len(), 128, 128).expect("a matrix");
    step.store.store(&NewRows { k: rows(&k), v: rows(&v), slots: &slots, rotation: None });
    let [params, ..] = params();
    let (found, wanted) = (step.attend(0..90, &step.meta, &params), step.formula(&params));
    for (found, wanted) in found.chunks_exact(64).zip(wanted.chunks_exact(64)) {
        let largest = wanted.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        for (found, wanted) in found.iter().zip(wanted) {
            assert!((found - wanted).abs() <= 0.01 * largest, "{found} {wanted}");
        }
    }
}
