//! The encoders' kernels against their twins in `reference`, odd sizes and tails included, and their batch invariance.

use candle_core::{DType, Tensor};
use ingle_kernels::ops::{self, Activation, LayerNorm, RelativeBias, SelfAttnParams};
use ingle_kernels::{Weight, reference};
use rand_chacha::ChaCha8Rng;

use super::{CPU, bits, error, random, rng, values};

#[test]
fn layer_norm_equals_the_formula() {
    let mut rng = rng(1);
    for width in [1, 2, 15, 16, 17, 48, 100, 384, 768] {
        for rows in [1, 3, 70] {
            // Rows that are slices of wider ones, far from zero: the variance must not be a difference of squares.
            let x = (random(&mut rng, &[rows, width + 3]).narrow(1, 2, width).unwrap() + 7.0).unwrap();
            let (residual, weight) = (random(&mut rng, &[rows, width]), random(&mut rng, &[width]));
            let bias = random(&mut rng, &[width]);
            for residual in [None, Some(&residual)] {
                for bias in [None, Some(&bias)] {
                    let found = ops::layer_norm(&x, residual, &weight, bias, 1e-5).unwrap();
                    let wanted = reference::layer_norm(&x, residual, &weight, bias, 1e-5).unwrap();
                    // The mean of numbers around 7 is rounded at 1e-7 of it, the rest is scaled up from there.
                    assert!(error(&found, &wanted) < 2e-5, "{rows} x {width}: {}", error(&found, &wanted));
                }
            }
        }
    }
    let x = random(&mut rng, &[2, 8]);
    let refused = |x: &Tensor, residual: Option<&Tensor>, width: usize| {
        ops::layer_norm(x, residual, &Tensor::ones(width, DType::F32, &CPU).unwrap(), None, 1e-5).is_err()
    };
    assert!(!refused(&x, Some(&x), 8));
    assert!(refused(&x, None, 7));
    assert!(refused(&x, Some(&random(&mut rng, &[1, 8])), 8));
}

#[test]
fn what_follows_a_product_has_the_bits_of_its_parts() {
    let mut rng = rng(11);
    let weight = Weight::new(random(&mut rng, &[48, 33]), DType::F32, &CPU).unwrap();
    let (x, residual) = (random(&mut rng, &[7, 33]), random(&mut rng, &[7, 48]));
    let (bias, scale, shift) = (random(&mut rng, &[48]), random(&mut rng, &[48]), random(&mut rng, &[48]));
    let norm = LayerNorm { weight: &scale, bias: Some(&shift), eps: 1e-5 };
    let product = ops::linear(&x, &weight, Some(&bias)).unwrap();
    for keep_sum in [true, false] {
        let (sum, normed) =
            ops::linear_layer_norm(&x, (&weight, Some(&bias)), &residual, &norm, keep_sum).unwrap();
        let wanted_sum = ops::add(&residual, &product).unwrap();
        assert_eq!(sum.as_ref().map(bits), keep_sum.then(|| bits(&wanted_sum)));
        let wanted = ops::layer_norm(&wanted_sum, None, &scale, Some(&shift), 1e-5).unwrap();
        assert_eq!(bits(&normed), bits(&wanted));
    }
    let found = ops::activated_linear(&x, &weight, Some(&bias), Activation::Gelu).unwrap();
    assert_eq!(bits(&found), bits(&ops::activate(&product, Activation::Gelu).unwrap()));

    let linear = (&weight, Some(&bias));
    let narrow = LayerNorm { weight: &x.narrow(0, 0, 1).unwrap().flatten_all().unwrap(), ..norm };
    assert!(ops::linear_layer_norm(&x, linear, &residual, &narrow, false).is_err());
    assert!(ops::linear_layer_norm(&x, linear, &x, &norm, false).is_err());
    assert!(ops::activated_linear(&residual, &weight, None, Activation::Gelu).is_err());
}

#[test]
fn rows_of_tables_are_added_up_and_normed() {
    let mut rng = rng(12);
    let tables: Vec<Weight> = [9, 2]
        .into_iter()
        .map(|rows| Weight::portable(&[random(&mut rng, &[rows, 33])], DType::F32, &CPU).unwrap())
        .collect();
    let weight = random(&mut rng, &[33]);
    let norm = LayerNorm { weight: &weight, bias: None, eps: 1e-5 };
    let embed = |parts: &[(&[u32], &Weight)]| ops::embedding_layer_norm(parts, &norm, DType::F32);
    let found = embed(&[(&[8, 0, 3], &tables[0]), (&[1, 0, 1], &tables[1])]).unwrap();
    let rows = |ids: &[u32], table| ops::embedding(ids, table, DType::F32).unwrap();
    let sum = ops::add(&rows(&[8, 0, 3], &tables[0]), &rows(&[1, 0, 1], &tables[1])).unwrap();
    assert_eq!(bits(&found), bits(&ops::layer_norm(&sum, None, &weight, None, 1e-5).unwrap()));
    assert!(embed(&[]).is_err());
    assert!(embed(&[(&[9], &tables[0])]).is_err());
    assert!(embed(&[(&[0, 1], &tables[0]), (&[0], &tables[1])]).is_err());
}

#[test]
fn activations_equal_the_formula() {
    let mut rng = rng(2);
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu] {
        for width in [1, 15, 16, 33, 3072] {
            let x = (random(&mut rng, &[5, width]) * 9.0).unwrap();
            let found = ops::activate(&x, activation).unwrap();
            let wanted = reference::activate(&x, activation).unwrap();
            assert!(error(&found, &wanted) < 1e-6, "{activation:?} {width}: {}", error(&found, &wanted));
        }
    }
}

/// `0.5 x (1 + erf(x / sqrt 2))` in f64 by the series of the normal distribution, which converges for all |x| here.
fn exact_gelu(x: f64) -> f64 {
    let t = x / std::f64::consts::SQRT_2;
    let (mut term, mut sum) = (t, t);
    for n in 1..200 {
        term *= -t * t / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 * x * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
}

#[test]
fn gelu_is_the_exact_one() {
    let xs: Vec<f32> = (-450..=450).map(|i| i as f32 / 100.0).collect();
    let x = Tensor::from_vec(xs.clone(), (1, xs.len()), &CPU).unwrap();
    for (x, y) in xs.iter().zip(values(&ops::activate(&x, Activation::Gelu).unwrap())) {
        let exact = exact_gelu(f64::from(*x));
        let off = (f64::from(y) - exact).abs();
        // The approximation by tanh is up to 5e-4 off.
        assert!(off < 1e-6, "gelu({x}) = {y}, not {exact}");
    }
}

pub(super) struct Inputs {
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) cu_seqlens: Vec<u32>,
}

/// Views of a stacked projection, as a model makes them.
pub(super) fn inputs(
    rng: &mut ChaCha8Rng,
    (heads, kv_heads, dim): (usize, usize, usize),
    lens: &[usize],
) -> Inputs {
    let tokens = lens.iter().sum();
    let qkv = (random(rng, &[tokens, heads + 2 * kv_heads, dim]) * 2.0).unwrap();
    let mut cu_seqlens = vec![0];
    for len in lens {
        cu_seqlens.push(cu_seqlens.last().unwrap() + *len as u32);
    }
    Inputs {
        q: qkv.narrow(1, 0, heads).unwrap(),
        k: qkv.narrow(1, heads, kv_heads).unwrap(),
        v: qkv.narrow(1, heads + kv_heads, kv_heads).unwrap(),
        cu_seqlens,
    }
}

pub(super) fn attend(x: &Inputs, bias: Option<&RelativeBias>, params: &SelfAttnParams) -> Tensor {
    ops::self_attention(&x.q, &x.k, &x.v, &x.cu_seqlens, bias, params).unwrap()
}

/// All ways of looking that models have, and some narrow ones.
pub(super) fn all_params() -> Vec<SelfAttnParams> {
    let plain = SelfAttnParams::bidirectional(0.3);
    vec![
        plain,
        SelfAttnParams { right: Some(0), ..plain },
        SelfAttnParams { left: Some(19), right: Some(0), ..plain },
        SelfAttnParams { left: Some(8), right: Some(8), ..plain },
        SelfAttnParams { left: Some(64), right: Some(64), softcap: Some(2.0), ..plain },
        SelfAttnParams { left: Some(0), right: Some(0), ..plain },
        SelfAttnParams { left: Some(0), right: Some(70), ..plain },
    ]
}

pub(super) fn some_bias(rng: &mut ChaCha8Rng, heads: usize, reach: usize) -> RelativeBias {
    let table = values(&random(rng, &[heads * 2 * reach]));
    RelativeBias::new(heads, reach, |head, distance| {
        4.0 * table[head * 2 * reach + (distance + reach as isize) as usize]
    })
    .unwrap()
}

#[test]
fn self_attention_equals_the_formula() {
    let mut rng = rng(3);
    let lens: &[&[usize]] = &[&[1], &[16, 1, 17], &[47, 48, 49], &[64, 0, 65, 2], &[130, 5, 200, 63], &[250]];
    for (heads, kv_heads, dim) in
        [(1, 1, 16), (4, 4, 12), (3, 3, 64), (6, 2, 32), (2, 1, 5), (2, 2, 128), (1, 1, 1)]
    {
        for lens in lens {
            let x = inputs(&mut rng, (heads, kv_heads, dim), lens);
            let bias = some_bias(&mut rng, heads, 250);
            for params in all_params() {
                for bias in [None, Some(&bias)] {
                    let found = attend(&x, bias, &params);
                    let wanted =
                        reference::self_attention(&x.q, &x.k, &x.v, &x.cu_seqlens, bias, &params).unwrap();
                    let error = error(&found, &wanted);
                    // Scores of some 20 are rounded at 2e-6, and the weights with them.
                    assert!(
                        error < 1e-5,
                        "{heads}/{kv_heads} x {dim}, {lens:?}, {params:?}, bias {}: {error}",
                        bias.is_some()
                    );
                }
            }
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    let mut rng = rng(4);
    let lens = [70, 1, 200, 16, 48, 33];
    let x = inputs(&mut rng, (4, 2, 24), &lens);
    let bias = some_bias(&mut rng, 4, 200);
    for params in all_params() {
        let together = attend(&x, Some(&bias), &params);
        for (seq, len) in lens.iter().enumerate() {
            let start = x.cu_seqlens[seq] as usize;
            let cut = |x: &Tensor| x.narrow(0, start, *len).unwrap();
            let alone = Inputs { q: cut(&x.q), k: cut(&x.k), v: cut(&x.v), cu_seqlens: vec![0, *len as u32] };
            assert_eq!(bits(&attend(&alone, Some(&bias), &params)), bits(&cut(&together)), "{params:?}");
        }
    }
}

#[test]
fn scores_of_any_size_are_weighted() {
    let mut rng = rng(5);
    let mut x = inputs(&mut rng, (2, 2, 16), &[100]);
    x.q = (x.q * 60.0).unwrap();
    x.k = (x.k * 60.0).unwrap();
    let params = SelfAttnParams::bidirectional(1.0);
    let wanted = reference::self_attention(&x.q, &x.k, &x.v, &x.cu_seqlens, None, &params).unwrap();
    // Scores of some 10^4 are rounded at 10^-3, and the weights with them.
    assert!(error(&attend(&x, None, &params), &wanted) < 5e-3);
}

#[test]
fn shapes_that_contradict_each_other_are_refused() {
    let mut rng = rng(6);
    let x = inputs(&mut rng, (4, 2, 8), &[5, 6]);
    let params = SelfAttnParams::bidirectional(1.0);
    let run = |cu_seqlens: &[u32], bias: Option<&RelativeBias>| {
        ops::self_attention(&x.q, &x.k, &x.v, cu_seqlens, bias, &params)
    };
    assert!(run(&[0, 5, 11], None).is_ok());
    for wrong in [&[0, 5][..], &[0, 12], &[1, 11], &[0, 7, 5, 11], &[]] {
        assert!(run(wrong, None).is_err(), "{wrong:?}");
    }
    assert!(run(&[0, 5, 11], Some(&some_bias(&mut rng, 4, 6))).is_ok());
    assert!(run(&[0, 5, 11], Some(&some_bias(&mut rng, 4, 5))).is_err());
    assert!(run(&[0, 5, 11], Some(&some_bias(&mut rng, 2, 6))).is_err());
    assert!(RelativeBias::new(2, 0, |_, _| 0.0).is_err());
    let three = random(&mut rng, &[11, 3, 8]);
    assert!(ops::self_attention(&x.q, &three, &three, &[0, 11], None, &params).is_err());
    assert!(ops::self_attention(&x.q, &x.k, &three, &[0, 11], None, &params).is_err());
}
