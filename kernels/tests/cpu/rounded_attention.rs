//! Attention without a cache where it may round to bf16. Where nothing is rounded all of this holds, too.

use candle_core::{DType, Tensor};
use ingle_kernels::ops::SelfAttnParams;
use ingle_kernels::{RelativeBias, reference};

use super::encoders::{Inputs, all_params, attend, inputs, some_bias};
use super::{bits, error, rng, values};

/// With a scale that loses no bits.
fn rounding(params: SelfAttnParams) -> SelfAttnParams {
    SelfAttnParams { scale: 0.25, bf16: true, ..params }
}

/// Inputs that bf16 holds exactly.
fn exact(x: Inputs) -> Inputs {
    let round = |x: &Tensor| x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    Inputs { q: round(&x.q), k: round(&x.k), v: round(&x.v), ..x }
}

fn wanted(x: &Inputs, bias: Option<&RelativeBias>, params: &SelfAttnParams) -> Tensor {
    reference::self_attention(&x.q, &x.k, &x.v, &x.cu_seqlens, bias, params).unwrap()
}

#[test]
fn only_weights_are_rounded_where_inputs_are_exact() {
    let mut rng = rng(21);
    let lens: &[&[usize]] = &[&[1], &[2, 3, 15], &[16, 1, 17], &[63, 64, 0, 65], &[100, 5], &[385]];
    let shapes = [
        (1, 1, 16),
        (4, 4, 12),
        (3, 3, 64),
        (6, 2, 32),
        (2, 1, 5),
        (2, 2, 128),
        (2, 2, 96),
        (1, 1, 1),
        (4, 2, 2),
        (2, 1, 34),
    ];
    for (heads, kv_heads, dim) in shapes {
        for lens in lens {
            let x = exact(inputs(&mut rng, (heads, kv_heads, dim), lens));
            let bias = some_bias(&mut rng, heads, 385);
            for params in all_params().into_iter().map(rounding) {
                for bias in [None, Some(&bias)] {
                    let error = error(&attend(&x, bias, &params), &wanted(&x, bias, &params));
                    // Each weight is off by 2^-9 of it at most, and their sum, which divides, likewise.
                    let biased = bias.is_some();
                    let shape = (heads, kv_heads, dim);
                    assert!(error < 4e-3, "{shape:?}, {lens:?}, {params:?}, biased {biased}: {error}");
                }
            }
        }
    }
}

#[test]
fn what_inputs_lose_is_little() {
    let mut rng = rng(22);
    for dim in [32, 64, 128] {
        let x = inputs(&mut rng, (3, 3, dim), &[7, 130, 300]);
        let params =
            SelfAttnParams { bf16: true, ..SelfAttnParams::bidirectional(1.0 / (dim as f32).sqrt()) };
        let error = error(&attend(&x, None, &params), &wanted(&x, None, &params));
        assert!(error < 1e-2, "{dim}: {error}");
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    let mut rng = rng(23);
    let lens = [70, 1, 200, 16, 48, 33, 385];
    for dim in [24, 64] {
        let x = inputs(&mut rng, (4, 2, dim), &lens);
        let bias = some_bias(&mut rng, 4, 385);
        for params in all_params().into_iter().map(rounding) {
            let together = attend(&x, Some(&bias), &params);
            for (seq, len) in lens.iter().enumerate() {
                let start = x.cu_seqlens[seq] as usize;
                let cut = |x: &Tensor| x.narrow(0, start, *len).unwrap();
                let cu_seqlens = vec![0, *len as u32];
                let alone = Inputs { q: cut(&x.q), k: cut(&x.k), v: cut(&x.v), cu_seqlens };
                assert_eq!(bits(&attend(&alone, Some(&bias), &params)), bits(&cut(&together)), "{params:?}");
            }
        }
    }
}

#[test]
fn scores_of_any_size_are_weighted() {
    let mut rng = rng(24);
    let mut x = exact(inputs(&mut rng, (2, 2, 16), &[100, 3]));
    // Powers of two: nothing is rounded.
    x.q = (x.q * 64.0).unwrap();
    x.k = (x.k * 64.0).unwrap();
    let params = rounding(SelfAttnParams::bidirectional(1.0));
    // Scores of some 10^4 are rounded at 10^-3, and the weights with them.
    assert!(error(&attend(&x, None, &params), &wanted(&x, None, &params)) < 1e-2);
}

#[test]
fn what_is_no_number_stays_in_its_sequence() {
    let mut rng = rng(25);
    let x = inputs(&mut rng, (2, 2, 32), &[5, 17, 3]);
    let params = rounding(SelfAttnParams::bidirectional(1.0));
    let poison = |x: &Tensor| {
        let mut numbers = values(x);
        numbers[9 * 64 + 3] = f32::NAN;
        Tensor::from_vec(numbers, x.dims(), x.device()).unwrap()
    };
    let clean = attend(&x, None, &params);
    let with = |k: &Tensor, v: &Tensor| {
        let (q, k, v) = (x.q.clone(), k.clone(), v.clone());
        attend(&Inputs { q, k, v, cu_seqlens: x.cu_seqlens.clone() }, None, &params)
    };
    let (key, value) = (with(&poison(&x.k), &x.v), with(&x.k, &poison(&x.v)));
    for (start, len) in [(0, 5), (22, 3)] {
        let cut = |x: &Tensor| bits(&x.narrow(0, start, len).unwrap());
        assert_eq!(cut(&key), cut(&clean));
        assert_eq!(cut(&value), cut(&clean));
    }
    assert!(values(&value.narrow(0, 5, 17).unwrap()).iter().any(|x| x.is_nan()), "nothing is hidden");
}
