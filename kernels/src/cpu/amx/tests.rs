//! The tile kernels against formulas and against the kernels of vectors, on the matrix unit where there is one and
//! emulated elsewhere.

use candle_core::{DType, Device, Tensor};

use super::super::matrix::Panels;
use super::super::quant_gemm::product as quantized_product;
use super::super::{PackedMatrix, QuantMatrix, Rows, written};
use super::{bytes, emulator, first_product_is_right, has_tiles, matmul, may_use_tiles};
use crate::matrix_rows::with_stack;
use crate::weight::{BlockType, QuantizedBlocks};

/// From here on this thread may use tiles.
pub(in crate::cpu) fn use_tiles() {
    if has_tiles() {
        assert!(may_use_tiles());
    } else {
        emulator::install();
    }
}

pub(in crate::cpu) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Numbers in -1..1 that repeat for a seed.
pub(in crate::cpu) fn numbers(seed: u32, count: usize) -> Vec<f32> {
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
    use_tiles();
    assert!(first_product_is_right());
    for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 64), (70, 100), (96, 576)] {
        let w = numbers(7, n * k);
        let matrix = Tensor::from_vec(w.clone(), (n, k), &Device::Cpu).expect("a tensor");
        let packed =
            with_stack(&[matrix], |stack| PackedMatrix::pack_panels(stack, DType::BF16)).expect("packs");
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
            assert_eq!(bits(&some), bits(&all[first * n..][..rows * n]), "rows {first} + {rows}, {n} x {k}");
        }
    }
}

/// Blocks of a file with codes of all values and scales of both signs.
fn blocks(block_type: BlockType, rows: usize, cols: usize) -> QuantizedBlocks {
    let mut bytes = Vec::new();
    let count = rows * cols / BlockType::BLOCK_SIZE;
    let noise = numbers(3, count * block_type.block_bytes());
    for (noise, scale) in noise.chunks_exact(block_type.block_bytes()).zip(numbers(4, count)) {
        let start = bytes.len();
        bytes.extend(noise.iter().map(|x| (x * 128.0) as i32 as u8));
        let header = [half::f16::from_f32(scale), half::f16::from_f32(scale * 3.0 - 0.5)];
        let fields = if block_type == BlockType::Q4_1 { 2 } else { 1 };
        for (i, field) in header.iter().take(fields).enumerate() {
            bytes[start + 2 * i..][..2].copy_from_slice(&field.to_le_bytes());
        }
    }
    QuantizedBlocks { block_type, rows, cols, bytes }
}

/// All kinds of whole-number weights, `[n, k]`.
fn quantized(n: usize, k: usize) -> Vec<(&'static str, QuantMatrix)> {
    let matrix = [Tensor::from_vec(numbers(7, n * k), (n, k), &Device::Cpu).expect("a tensor")];
    let mut weights = vec![
        ("int8", with_stack(&matrix, QuantMatrix::int8).expect("rounds")),
        ("int4", with_stack(&matrix, QuantMatrix::int4).expect("rounds")),
    ];
    if k.is_multiple_of(BlockType::BLOCK_SIZE) {
        for (name, block_type) in
            [("Q8_0", BlockType::Q8_0), ("Q4_0", BlockType::Q4_0), ("Q4_1", BlockType::Q4_1)]
        {
            let blocks = [blocks(block_type, n, k)];
            weights.push((name, QuantMatrix::from_blocks(&blocks).expect("takes over")));
        }
    }
    weights
}

#[test]
fn byte_tiles_have_the_bits_of_vectors() {
    use_tiles();
    assert!(bytes::first_product_is_right());
    for (n, k) in [(1, 1), (16, 8), (17, 33), (40, 64), (90, 96), (33, 100), (70, 136), (16, 576)] {
        let (bias, x) = (numbers(9, n), numbers(8, 70 * (k + 3)));
        for (name, w) in quantized(n, k) {
            let compute = |rows: usize, bias: Option<&[f32]>, tiled: usize| {
                // Rows that are slices of wider ones.
                let x = Rows::new(&x, rows, k, k + 3).expect("a matrix");
                // SAFETY: the product writes all of its output.
                let y = unsafe {
                    written(rows * n, |y| {
                        quantized_product(x, &w, bias, y, tiled);
                        Ok::<(), ()>(())
                    })
                };
                y.expect("written")
            };
            for bias in [None, Some(&bias[..])] {
                let wanted = compute(70, bias, 0);
                for rows in [1, 7, 8, 15, 16, 17, 24, 31, 33, 48, 70] {
                    for tiled in [bytes::tiled_rows(rows), rows.min(16), rows] {
                        let found = compute(rows, bias, tiled);
                        let wanted = &wanted[..rows * n];
                        assert_eq!(bits(&found), bits(wanted), "{tiled} of {rows} rows, {name} {n} x {k}");
                    }
                }
            }
        }
    }
}

#[test]
fn few_rows_stay_with_vectors() {
    let tiled = [1, 7, 8, 16, 17, 23, 24, 512, 519, 520].map(bytes::tiled_rows);
    assert_eq!(tiled, [0, 0, 8, 16, 16, 16, 24, 512, 512, 520]);
}
