//! Every CPU kernel against its twin in `reference`, odd sizes and tails included, and its batch invariance.

use candle_core::{DType, Tensor};
use ingle_kernels::ops::{self, Activation, AttnParams, LateIds, PagedMeta, RopeTables};
use ingle_kernels::{KvDtype, KvLayer, Weight, isa, reference};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{CPU, bits, error, random, rng, values};

#[test]
fn linear_equals_the_formula() {
    let mut rng = rng(1);
    let (pairs, halves) = (matches!(isa().name(), "amx" | "avx512-bf16"), isa().name() == "avx512-fp16");
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (n, k) in [(1, 1), (16, 2), (17, 3), (33, 64), (130, 65), (576, 192), (48, 577)] {
            let parts = [random(&mut rng, &[n, k]), random(&mut rng, &[n.div_ceil(3), k])];
            let (packed, plain) =
                (Weight::stack(&parts, dtype, &CPU).unwrap(), Weight::portable(&parts, dtype, &CPU).unwrap());
            assert_eq!((packed.rows(), packed.cols()), (plain.rows(), plain.cols()));
            let bias = random(&mut rng, &[packed.rows()]);
            for m in [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 25, 66] {
                // A slice of a wider matrix, as the parts of a stacked projection are.
                let x = random(&mut rng, &[m, k + 5]).narrow(1, 2, k).unwrap();
                // Products of pairs read activations as bf16.
                let x = if pairs && dtype == DType::BF16 {
                    x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
                } else {
                    x
                };
                for bias in [None, Some(&bias)] {
                    let found = ops::linear(&x, &packed, bias).unwrap();
                    let wanted = reference::linear(&x, &plain, bias).unwrap();
                    // Sums of up to 577 products in another order, or partly in f16.
                    let bound = if halves && dtype != DType::F32 { 2e-3 } else { 4e-6 };
                    assert!(
                        error(&found, &wanted) < bound,
                        "{dtype:?} {m} x {n} x {k}: {}",
                        error(&found, &wanted)
                    );
                }
            }
        }
    }
}

#[test]
fn linear_does_not_depend_on_the_batch() {
    let mut rng = rng(2);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weight = Weight::new(random(&mut rng, &[200, 96]), dtype, &CPU).unwrap();
        let x = random(&mut rng, &[70, 96]);
        let all = bits(&ops::linear(&x, &weight, None).unwrap());
        for size in [1, 2, 3, 8, 32] {
            for first in [0, 5, 38] {
                let some = ops::linear(&x.narrow(0, first, size).unwrap(), &weight, None).unwrap();
                assert_eq!(bits(&some), all[first * 200..][..size * 200], "{dtype:?}, rows {first} + {size}");
            }
        }
    }
}

#[test]
fn embedding_reads_rows() {
    let mut rng = rng(3);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let matrix = random(&mut rng, &[37, 9]).to_dtype(dtype).unwrap();
        let weight = Weight::new(matrix.clone(), dtype, &CPU).unwrap();
        let ids = [0, 36, 15, 16, 17, 36];
        let found = ops::embedding(&ids, &weight, DType::F32).unwrap();
        let wanted =
            matrix.to_dtype(DType::F32).unwrap().index_select(&Tensor::new(&ids, &CPU).unwrap(), 0).unwrap();
        assert_eq!(bits(&found), bits(&wanted));
        assert!(ops::embedding(&[37], &weight, DType::F32).is_err());
        // 40 is no row, and an id that was never chosen is none either: row 0, whatever it may be good for.
        let late = |rows: &[(u32, u32)]| LateIds {
            chosen: ops::upload_ids(&[16, 40, u32::MAX, 2], &CPU).unwrap(),
            rows: rows.to_vec(),
        };
        let some = late(&[(1, 3), (5, 0), (2, 1), (3, 2)]);
        assert_eq!(some.resolve(&ids, 37).unwrap(), [0, 2, 0, 0, 17, 16]);
        let found = ops::embedding_late(&ids, &some, &weight, DType::F32).unwrap();
        let wanted = ops::embedding(&[0, 2, 0, 0, 17, 16], &weight, DType::F32).unwrap();
        assert_eq!(bits(&found), bits(&wanted));
        for wrong in [(6, 0), (0, 4)] {
            assert!(ops::embedding_late(&ids, &late(&[wrong]), &weight, DType::F32).is_err());
        }
    }
}

#[test]
fn a_residual_and_its_norm_have_the_bits_of_both_steps() {
    let mut rng = rng(12);
    for (rows, width) in [(1, 1), (3, 15), (2, 16), (5, 33), (40, 576)] {
        let (a, b) = (random(&mut rng, &[rows, width]), random(&mut rng, &[rows, width]));
        let weight = random(&mut rng, &[width]);
        for scale in [1.0, 0.22] {
            let (sum, normed) = ops::add_rms_norm((&a, &b), scale, &weight, 1e-5).unwrap();
            let wanted = ops::add(&a, &(&b * scale).unwrap()).unwrap();
            assert_eq!(bits(&sum), bits(&wanted), "{rows} x {width}, {scale}");
            assert_eq!(bits(&normed), bits(&ops::rms_norm(&wanted, &weight, 1e-5).unwrap()));
        }
        let narrow = random(&mut rng, &[rows, width + 1]);
        assert!(ops::add_rms_norm((&a, &narrow), 1.0, &weight, 1e-5).is_err());
    }
}

#[test]
fn rms_norm_equals_the_formula() {
    let mut rng = rng(4);
    for width in [1, 15, 16, 17, 64, 576] {
        let weight = random(&mut rng, &[width]);
        for shape in [vec![1, width], vec![7, width], vec![5, 3, width], vec![300, width]] {
            let x = random(&mut rng, &shape);
            let (found, wanted) =
                (ops::rms_norm(&x, &weight, 1e-5).unwrap(), reference::rms_norm(&x, &weight, 1e-5).unwrap());
            assert!(error(&found, &wanted) < 1e-6);
        }
        let wide = random(&mut rng, &[4, width + 3]).narrow(1, 1, width).unwrap();
        let (found, wanted) = (
            ops::rms_norm(&wide, &weight, 1e-5).unwrap(),
            reference::rms_norm(&wide, &weight, 1e-5).unwrap(),
        );
        assert!(error(&found, &wanted) < 1e-6);
    }
}

#[test]
fn rope_equals_the_formula() {
    let mut rng = rng(5);
    for (tokens, heads, dim, half) in [(1, 1, 2, 1), (7, 3, 16, 8), (9, 2, 20, 6), (65, 9, 64, 32)] {
        let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 31 + 5).collect();
        let inv_freq: Vec<f32> = (0..half).map(|i| 10_000.0_f32.powf(-(i as f32) / half as f32)).collect();
        let tables = RopeTables::new(&positions, &inv_freq, 1.3, &CPU).unwrap();
        let x = random(&mut rng, &[tokens, heads, dim]);
        assert!(error(&ops::rope(&x, &tables).unwrap(), &reference::rope(&x, &tables).unwrap()) < 1e-6);
        // A slice of the stacked projection, viewed as heads.
        let wide = random(&mut rng, &[tokens, (heads + 2) * dim]);
        let slice = wide.narrow(1, dim, heads * dim).unwrap().reshape((tokens, heads, dim)).unwrap();
        assert!(
            error(&ops::rope(&slice, &tables).unwrap(), &reference::rope(&slice, &tables).unwrap()) < 1e-6
        );
    }
}

#[test]
fn add_equals_the_formula() {
    let mut rng = rng(10);
    for (tokens, width) in [(1, 1), (3, 17), (300, 576)] {
        let a = random(&mut rng, &[tokens, width]);
        let b = random(&mut rng, &[tokens, width + 4]).narrow(1, 3, width).unwrap();
        assert_eq!(bits(&ops::add(&a, &b).unwrap()), bits(&(&a + &b).unwrap()));
    }
    assert!(ops::add(&random(&mut rng, &[2, 3]), &random(&mut rng, &[3, 2])).is_err());
}

#[test]
fn gated_activation_equals_the_formula() {
    let mut rng = rng(6);
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        for width in [1, 15, 16, 33, 1536] {
            let x = (random(&mut rng, &[5, 2 * width]) * 9.0).unwrap();
            let (gate, up) = (x.narrow(1, 0, width).unwrap(), x.narrow(1, width, width).unwrap());
            let found = ops::gated_activation(&x, activation).unwrap();
            let wanted = reference::gated_activation(&gate, &up, activation).unwrap();
            assert!(error(&found, &wanted) < 1e-6, "{activation:?} {width}: {}", error(&found, &wanted));
        }
    }
}

/// A step of some sequences over a cache whose blocks lie in random order; all keys and values are random.
struct Step {
    meta: PagedMeta,
    q: Tensor,
    fast: KvLayer,
    plain: KvLayer,
}

struct Shape {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    dtype: KvDtype,
}

/// `lens`: for each sequence how many tokens are cached before this step and how many it brings.
fn step(rng: &mut ChaCha8Rng, shape: &Shape, lens: &[(usize, usize)]) -> Step {
    let Shape { heads, kv_heads, dim, block_size, dtype } = *shape;
    let needed: usize = lens.iter().map(|(past, new)| (past + new).div_ceil(block_size)).sum();
    let num_blocks = needed + 3;
    let mut blocks: Vec<u32> = (0..num_blocks as u32).collect();
    blocks.shuffle(rng);
    let num_slots = num_blocks * block_size;
    let mut fast = KvLayer::new(num_slots, kv_heads, dim, dtype, &CPU).unwrap();
    // What bytes keep of a number is a formula of its own: the twin gets the rounded numbers.
    let int8 = dtype == KvDtype::Int8;
    let plain_dtype = if int8 { KvDtype::F32 } else { dtype };
    let mut plain = KvLayer::portable(num_slots, kv_heads, dim, plain_dtype, &CPU).unwrap();
    // Fill the whole cache, so that whatever lies behind a sequence's end is not zero.
    let everything =
        PagedMeta { slot_mapping: (0..num_slots as u32).collect(), block_size, ..PagedMeta::default() };
    let (k, v) = (random(rng, &[num_slots, kv_heads, dim]), random(rng, &[num_slots, kv_heads, dim]));
    ops::store_kv(&mut fast, &k, &v, &everything).unwrap();
    let (k, v) = if int8 { (heads_to_bytes(&k), heads_to_bytes(&v)) } else { (k, v) };
    ops::store_kv(&mut plain, &k, &v, &everything).unwrap();
    let mut meta =
        PagedMeta { block_size, cu_seqlens_q: vec![0], cu_blocks: vec![0], ..PagedMeta::default() };
    for &(past, new) in lens {
        let count = (past + new).div_ceil(block_size);
        meta.block_tables.extend(blocks.drain(..count));
        meta.cu_blocks.push(meta.block_tables.len() as u32);
        meta.positions.extend(past as u32..(past + new) as u32);
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.seq_lens.push((past + new) as u32);
    }
    let q = random(rng, &[meta.num_tokens(), heads, dim]);
    Step { meta, q, fast, plain }
}

/// Each head of each token in 127 steps of its largest element.
fn heads_to_bytes(x: &Tensor) -> Tensor {
    let (tokens, heads, dim) = x.dims3().unwrap();
    let mut rounded = values(x);
    for head in rounded.chunks_exact_mut(dim) {
        let largest = head.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let inverse = 127.0 / largest;
        for x in head {
            *x = (*x * inverse).round_ties_even() * (largest / 127.0);
        }
    }
    Tensor::from_vec(rounded, (tokens, heads, dim), &CPU).unwrap()
}

const PARAMS: AttnParams = AttnParams { scale: 0.6, sliding_window: None, softcap: None };

#[test]
fn attention_equals_the_formula() {
    let mut rng = rng(7);
    let lens: &[&[(usize, usize)]] = &[
        &[(0, 1)],
        &[(15, 1)],
        &[(0, 70)],
        &[(63, 1), (64, 1), (65, 1)],
        &[(100, 40), (0, 3), (7, 1), (0, 0), (130, 2)],
        // Long enough for several softmaxes, alone and beside another.
        &[(700, 1)],
        &[(250, 20), (511, 2)],
    ];
    for (heads, kv_heads, dim) in [(1, 1, 16), (9, 3, 64), (4, 4, 24), (4, 1, 128), (14, 2, 80), (2, 1, 5)] {
        for block_size in [16, 32, 1, 3, 24] {
            for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Int8] {
                for window in [None, Some(1), Some(20), Some(70), Some(300)] {
                    let params =
                        AttnParams { sliding_window: window, softcap: window.map(|_| 3.0), ..PARAMS };
                    let lens = lens[rng.random_range(0..lens.len())];
                    let step = step(&mut rng, &Shape { heads, kv_heads, dim, block_size, dtype }, lens);
                    let found = ops::paged_attention(&step.q, &step.fast, &step.meta, &params).unwrap();
                    let wanted = ops::paged_attention(&step.q, &step.plain, &step.meta, &params).unwrap();
                    let error = error(&found, &wanted);
                    let allowed = match (isa().name(), dtype) {
                        // Products of pairs read queries and weights as bf16.
                        ("amx" | "avx512-bf16", KvDtype::Bf16 | KvDtype::Int8) => 0.02,
                        // The plain cache rounds to bf16, this one to f16; sums of some products are f16.
                        ("avx512-fp16", KvDtype::Bf16 | KvDtype::F16) => 0.01,
                        _ => 3e-6,
                    };
                    assert!(
                        error < allowed,
                        "{heads}/{kv_heads} x {dim}, block {block_size}, {dtype:?}, {lens:?}: {error}"
                    );
                }
            }
        }
    }
}

/// The rows of `step` computed one token at a time, each as if it were the last of its sequence.
fn one_by_one(step: &Step, params: &AttnParams) -> Vec<u32> {
    let mut rows = Vec::new();
    for seq in 0..step.meta.num_seqs() {
        let table =
            &step.meta.block_tables[step.meta.cu_blocks[seq] as usize..step.meta.cu_blocks[seq + 1] as usize];
        for token in step.meta.cu_seqlens_q[seq]..step.meta.cu_seqlens_q[seq + 1] {
            let position = step.meta.positions[token as usize];
            let meta = PagedMeta {
                positions: vec![position],
                slot_mapping: Vec::new(),
                cu_seqlens_q: vec![0, 1],
                seq_lens: vec![position + 1],
                block_tables: table.to_vec(),
                cu_blocks: vec![0, table.len() as u32],
                block_size: step.meta.block_size,
            };
            let q = step.q.narrow(0, token as usize, 1).unwrap();
            rows.extend(bits(&ops::paged_attention(&q, &step.fast, &meta, params).unwrap()));
        }
    }
    rows
}

#[test]
fn attention_does_not_depend_on_batch_or_chunks() {
    let mut rng = rng(8);
    let caches = [
        (KvDtype::F32, 16),
        (KvDtype::Bf16, 16),
        (KvDtype::F16, 32),
        (KvDtype::Bf16, 3),
        (KvDtype::Int8, 16),
        (KvDtype::Int8, 3),
    ];
    for (dtype, block_size) in caches {
        for window in [None, Some(37), Some(300)] {
            let shape = Shape { heads: 6, kv_heads: 2, dim: 48, block_size, dtype };
            // Alone, the long ones are split over their keys; together they are not.
            let step = step(&mut rng, &shape, &[(0, 150), (90, 1), (61, 9), (200, 3), (0, 300), (640, 2)]);
            let params = AttnParams { sliding_window: window, ..PARAMS };
            let together = ops::paged_attention(&step.q, &step.fast, &step.meta, &params).unwrap();
            assert_eq!(
                bits(&together),
                one_by_one(&step, &params),
                "{dtype:?}, block {block_size}, {window:?}"
            );
        }
    }
}

#[test]
fn a_step_that_contradicts_itself_is_refused() {
    let shape = Shape { heads: 2, kv_heads: 1, dim: 16, block_size: 16, dtype: KvDtype::F32 };
    let good = step(&mut rng(9), &shape, &[(20, 2), (0, 5)]);
    let refused = |change: &dyn Fn(&mut PagedMeta)| {
        let mut meta = good.meta.clone();
        change(&mut meta);
        ops::paged_attention(&good.q, &good.fast, &meta, &PARAMS).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|meta| meta.block_tables[0] = 99));
    assert!(refused(&|meta| meta.seq_lens[0] = 40));
    assert!(refused(&|meta| meta.seq_lens[1] = 4));
    assert!(refused(&|meta| meta.cu_blocks[1] = 1));
    assert!(refused(&|meta| meta.cu_seqlens_q[2] = 6));
    assert!(refused(&|meta| meta.block_size = 0));
    let mut layer = KvLayer::new(16, 1, 16, KvDtype::F32, &CPU).unwrap();
    let k = Tensor::zeros((1, 1, 16), DType::F32, &CPU).unwrap();
    let at = |slot| PagedMeta { slot_mapping: vec![slot], block_size: 16, ..PagedMeta::default() };
    assert!(ops::store_kv(&mut layer, &k, &k, &at(15)).is_ok());
    assert!(ops::store_kv(&mut layer, &k, &k, &at(16)).is_err());
}
