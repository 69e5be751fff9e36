//! The tile kernel against the formula, on the matrix unit where there is one and emulated elsewhere.

use candle_core::{DType, Device, Tensor};

use super::super::matrix::Panels;
use super::super::{PackedMatrix, Rows, written};
use super::{emulator, first_product_is_right, has_tiles, matmul, may_use_tiles};

/// Numbers in -1..1 that repeat for a seed.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn product(x: &[f32], rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    let Panels::Bf16(data) = &w.panels else { panic!("a bf16 weight") };
    let x = Rows::new(x, rows, w.cols, w.cols).expect("a matrix");
    // SAFETY: the product writes all of its output.
    let y = unsafe {
        written(rows * w.rows, |y| {
            matmul(x, w, data, bias, y);
            Ok::<(), ()>(())
        })
    };
    y.expect("written")
}

#[test]
fn tiles_give_the_formula_and_no_row_depends_on_another() {
    if has_tiles() {
        assert!(may_use_tiles());
    } else {
        emulator::install();
    }
    assert!(first_product_is_right());
    for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 64), (70, 100), (96, 576)] {
        let w = numbers(7, n * k);
        let matrix = Tensor::from_vec(w.clone(), (n, k), &Device::Cpu).expect("a tensor");
        let packed = PackedMatrix::pack(&[matrix], DType::BF16).expect("packs");
        let bias = numbers(9, n);
        let x = numbers(8, 70 * k);
        let all = product(&x, 70, &packed, Some(&bias));
        let round = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
        for row in 0..70 {
            for column in 0..n {
                let products = (0..k).map(|i| round(x[row * k + i]) * round(w[column * k + i]));
                let wanted = products.sum::<f64>() + f64::from(bias[column]);
                let found = f64::from(all[row * n + column]);
                assert!((found - wanted).abs() < 2e-5, "{n} x {k} at {row}, {column}: {found}, not {wanted}");
            }
        }
        for (first, rows) in [(0, 1), (3, 2), (5, 3), (8, 8), (20, 16), (30, 17), (38, 32), (2, 33)] {
            let some = product(&x[first * k..][..rows * k], rows, &packed, Some(&bias));
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&some), bits(&all[first * n..][..rows * n]), "rows {first} + {rows}, {n} x {k}");
        }
    }
}
