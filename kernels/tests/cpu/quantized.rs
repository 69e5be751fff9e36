//! Weights of whole-number codes against the formula in f64, and their batch invariance.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Tensor};
use ingle_kernels::{BlockType, Quantization, QuantizedBlocks, Weight, ops};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{CPU, bits, error, random, rng, values};

const GROUP: usize = 32;
const SHAPES: [(usize, usize); 7] = [(1, 1), (16, 2), (17, 3), (33, 64), (130, 65), (100, 96), (576, 224)];

/// The values that a weight stands for, `[rows, cols]`.
fn dequantized(weight: &Weight) -> Tensor {
    let ids: Vec<u32> = (0..weight.rows() as u32).collect();
    ops::embedding(&ids, weight, DType::F32).unwrap()
}

/// What is left of activations: the largest element of a row, and each group of the others in 127 steps of its largest.
fn rounded(x: &Tensor) -> Vec<Vec<f64>> {
    let mut rows: Vec<Vec<f32>> = x.to_vec2().unwrap();
    let round = |group: &[f32]| {
        let largest = group.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let inverse = 127.0 / largest;
        let codes =
            group.iter().map(move |x| if largest == 0.0 { 0.0 } else { (x * inverse).round_ties_even() });
        codes.map(|code| f64::from(code * (largest / 127.0))).collect::<Vec<_>>()
    };
    let row = |row: &mut Vec<f32>| {
        let kept =
            (0..row.len()).max_by(|a, b| row[*a].abs().total_cmp(&row[*b].abs()).then(b.cmp(a))).unwrap();
        let value = std::mem::take(&mut row[kept]);
        let mut rounded: Vec<f64> = row.chunks(GROUP).flat_map(round).collect();
        rounded[kept] = f64::from(value);
        rounded
    };
    rows.iter_mut().map(row).collect()
}

fn formula(x: &Tensor, weight: &Weight, bias: &Tensor) -> Tensor {
    let weights: Vec<Vec<f32>> = dequantized(weight).to_vec2().unwrap();
    let bias = values(bias);
    let rows = rounded(x);
    let rows = rows.iter().map(|x| {
        let outputs = weights.iter().zip(&bias).map(|(w, bias)| {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * x);
            (products.sum::<f64>() + f64::from(*bias)) as f32
        });
        outputs.collect::<Vec<_>>()
    });
    Tensor::new(rows.collect::<Vec<_>>(), &CPU).unwrap()
}

fn check(weight: &Weight, rng: &mut ChaCha8Rng, what: &str) {
    let bias = random(rng, &[weight.rows()]);
    let x = random(rng, &[70, weight.cols() + 3]).narrow(1, 1, weight.cols()).unwrap();
    let all = ops::linear(&x, weight, Some(&bias)).unwrap();
    let wanted = formula(&x, weight, &bias);
    // Whole-number sums are exact; a few f32 roundings a group remain.
    assert!(error(&all, &wanted) < 2e-6, "{what}: {}", error(&all, &wanted));
    for (first, size) in [(0, 1), (3, 2), (5, 3), (9, 4), (20, 5), (8, 8), (40, 13), (38, 32)] {
        let some = ops::linear(&x.narrow(0, first, size).unwrap(), weight, Some(&bias)).unwrap();
        let rows = all.narrow(0, first, size).unwrap();
        assert_eq!(bits(&some), bits(&rows), "rows {first} + {size} of {what}");
    }
    let plain = ops::linear(&x, weight, None).unwrap().broadcast_add(&bias).unwrap();
    assert!(error(&all, &plain) < 1e-6, "{what}");
}

#[test]
fn products_are_the_formula_on_rounded_values() {
    let mut rng = rng(11);
    for quantization in [Quantization::Int8, Quantization::Int4] {
        for (n, k) in SHAPES {
            let parts = [random(&mut rng, &[n, k]), random(&mut rng, &[n.div_ceil(3), k])];
            let weight = Weight::quantized(&parts, quantization, &CPU).unwrap();
            assert_eq!((weight.rows(), weight.cols()), (n + n.div_ceil(3), k));
            check(&weight, &mut rng, &format!("{quantization:?} {n} x {k}"));
        }
    }
}

/// Root of the mean squared error, as a share of the values' own.
fn noise(found: &Tensor, wanted: &Tensor) -> f64 {
    let (found, wanted) = (values(found), values(wanted));
    let square = |x: f32| f64::from(x) * f64::from(x);
    let errors: f64 = found.iter().zip(&wanted).map(|(a, b)| square(a - b)).sum();
    (errors / wanted.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn rounding_stays_close() {
    let mut rng = rng(12);
    // Magnitudes from tiny to large in one matrix: scales must not vanish.
    for magnitude in [1e-12_f32, 1e-3, 1.0, 1e6] {
        for (n, k) in SHAPES {
            let matrix = (random(&mut rng, &[n, k]) * f64::from(magnitude)).unwrap();
            let rounded = |quantization| {
                let weight = Weight::quantized(std::slice::from_ref(&matrix), quantization, &CPU).unwrap();
                noise(&dequantized(&weight), &matrix)
            };
            let (int8, int4) = (rounded(Quantization::Int8), rounded(Quantization::Int4));
            assert!(int8 < 0.006, "int8 of {n} x {k}: {int8}");
            assert!(int4 < 0.09, "int4 of {n} x {k}: {int4}");
        }
    }
}

#[test]
fn int4_is_no_worse_than_q4_0() {
    let mut rng = rng(13);
    let matrix = random(&mut rng, &[64, 256]);
    let q4_0 = QTensor::quantize(&matrix, GgmlDType::Q4_0).unwrap().dequantize(&CPU).unwrap();
    let weight = Weight::quantized(std::slice::from_ref(&matrix), Quantization::Int4, &CPU).unwrap();
    let (ours, theirs) = (noise(&dequantized(&weight), &matrix), noise(&q4_0, &matrix));
    assert!(ours < theirs, "{ours} against {theirs}");
}

#[test]
fn an_outlier_does_not_coarsen_its_neighbours() {
    let mut rng = rng(18);
    let weight = Weight::quantized(&[random(&mut rng, &[48, 96])], Quantization::Int8, &CPU).unwrap();
    let mut x = values(&random(&mut rng, &[1, 96]));
    for at in [0, 40, 95] {
        let before = std::mem::replace(&mut x[at], -3000.0);
        let found = Tensor::from_vec(x.clone(), (1, 96), &CPU).unwrap();
        let wanted = found.matmul(&dequantized(&weight).t().unwrap()).unwrap();
        let outlier = (dequantized(&weight).narrow(1, at, 1).unwrap().t().unwrap() * 3000.0).unwrap();
        // What the other elements give, without the outlier's part.
        let rest = |y: Tensor| y.broadcast_add(&outlier).unwrap();
        let found = rest(ops::linear(&found, &weight, None).unwrap());
        assert!(noise(&found, &rest(wanted)) < 0.01, "at {at}");
        x[at] = before;
    }
}

#[test]
fn zeros_stay_zeros() {
    let mut rng = rng(14);
    for quantization in [Quantization::Int8, Quantization::Int4] {
        let zeros = Tensor::zeros((3, 40), DType::F32, &CPU).unwrap();
        let weight = Weight::quantized(&[zeros], quantization, &CPU).unwrap();
        let y = ops::linear(&random(&mut rng, &[2, 40]), &weight, None).unwrap();
        assert!(values(&y).iter().all(|y| *y == 0.0));
        let zero_x = Tensor::zeros((2, 40), DType::F32, &CPU).unwrap();
        let weight = Weight::quantized(&[random(&mut rng, &[3, 40])], quantization, &CPU).unwrap();
        assert!(values(&ops::linear(&zero_x, &weight, None).unwrap()).iter().all(|y| *y == 0.0));
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let mut rng = rng(15);
    let weight = Weight::quantized(&[random(&mut rng, &[20, 40])], Quantization::Int8, &CPU).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17, 39] {
            let mut x = values(&random(&mut rng, &[2, 40]));
            x[40 + at] = bad;
            let y = ops::linear(&Tensor::from_vec(x, (2, 40), &CPU).unwrap(), &weight, None).unwrap();
            let y: Vec<Vec<f32>> = y.to_vec2().unwrap();
            assert!(y[0].iter().all(|y| y.is_finite()), "the other row is not touched");
            assert!(y[1].iter().all(|y| y.is_nan()), "{bad} at {at} went unseen");
        }
    }
}

/// Blocks of random codes with sane scales.
fn blocks(rng: &mut ChaCha8Rng, block_type: BlockType, rows: usize, cols: usize) -> QuantizedBlocks {
    let mut bytes = Vec::new();
    for _ in 0..rows * cols / BlockType::BLOCK_SIZE {
        let start = bytes.len();
        bytes.extend((0..block_type.block_bytes()).map(|_| rng.random::<u8>()));
        let scale = half::f16::from_f32(rng.random_range(-0.1..0.1));
        bytes[start..start + 2].copy_from_slice(&scale.to_le_bytes());
        if block_type == BlockType::Q4_1 {
            let min = half::f16::from_f32(rng.random_range(-1.0..0.0));
            bytes[start + 2..start + 4].copy_from_slice(&min.to_le_bytes());
        }
    }
    QuantizedBlocks { block_type, rows, cols, bytes }
}

#[test]
fn blocks_of_a_file_are_kept_as_they_are() {
    let mut rng = rng(16);
    for (block_type, dtype) in [
        (BlockType::Q8_0, GgmlDType::Q8_0),
        (BlockType::Q4_0, GgmlDType::Q4_0),
        (BlockType::Q4_1, GgmlDType::Q4_1),
    ] {
        for (n, k) in [(1, 32), (17, 64), (130, 96), (64, 576)] {
            let parts = [blocks(&mut rng, block_type, n, k), blocks(&mut rng, block_type, n.div_ceil(3), k)];
            let weight = Weight::from_blocks(&parts, &CPU).unwrap();
            let wanted = parts.each_ref().map(|part| {
                let storage = QStorage::from_data((&part.bytes).into(), &CPU, dtype).unwrap();
                QTensor::new(storage, (part.rows, part.cols)).unwrap().dequantize(&CPU).unwrap()
            });
            let wanted = Tensor::cat(&wanted, 0).unwrap();
            assert!(error(&dequantized(&weight), &wanted) < 2e-7, "{block_type:?}");
            check(&weight, &mut rng, &format!("{block_type:?} {n} x {k}"));
        }
    }
}

#[test]
fn blocks_that_do_not_fit_are_refused() {
    let mut rng = rng(17);
    let good = blocks(&mut rng, BlockType::Q4_0, 4, 64);
    assert!(Weight::from_blocks(&[], &CPU).is_err());
    let other = blocks(&mut rng, BlockType::Q8_0, 4, 64);
    assert!(Weight::from_blocks(&[good.clone(), other], &CPU).is_err());
    let mut short = good.clone();
    short.bytes.pop();
    assert!(Weight::from_blocks(&[good.clone(), short], &CPU).is_err());
    for (rows, cols) in [(0, 64), (4, 0), (4, 63), (usize::MAX, 64), (8, 32)] {
        let wrong = QuantizedBlocks { rows, cols, ..good.clone() };
        let accepted = Weight::from_blocks(&[wrong], &CPU);
        assert_eq!(accepted.is_ok(), (rows, cols) == (8, 32), "{rows} x {cols}");
    }
}
