//! What surrounds a library's product of fp8 numbers: codes row after row, activations rounded, sums scaled. The product itself
//! is done here as the library does it, on rows of both.

use half::f16;
use ingle_kernels::Fp8Matrix;
use ingle_kernels::tiles::TiledMatrix;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::harness::{
    Buffer, Format, Grid, SEEDS, available, encoded, fp8_to_f32, launch, random, rng, room,
};
use crate::args;

fn matrix(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Fp8Matrix {
    let bytes = (0..rows * cols).map(|_| rng.random::<u8>());
    let bytes = bytes.map(|code| if code & 127 == 127 { code ^ 1 } else { code }).collect();
    let row_scales = (0..rows).map(|_| rng.random_range(0.0005..0.002)).collect();
    Fp8Matrix { bytes, rows, cols, row_scales, factors: Vec::<f16>::new() }
}

/// `count` rows from `first` on, by the kernel.
fn codes_by_rows(tiles: &TiledMatrix, first: usize, count: usize, seed: u32) -> Vec<u8> {
    let padded = tiles.cols.next_multiple_of(64);
    let codes = Buffer::new(&tiles.codes);
    let out = Buffer::<u8>::unwritten(count * padded);
    let grid = [padded.div_ceil(256) as u32, count.div_ceil(16) as u32, 1];
    launch(
        "fp8_by_rows",
        Grid::new(grid, 256),
        seed,
        args![codes.address(), tiles.cols as u32, first as u32, count as u32, out.address()],
    );
    out.read()
}

#[test]
fn codes_lie_row_after_row() {
    if !available() {
        return;
    }
    let mut rng = rng(40);
    for (rows, cols, first, count) in
        [(16, 64, 0, 16), (48, 45, 16, 32), (300, 600, 128, 172), (37, 7, 32, 5), (20, 130, 0, 9)]
    {
        let matrix = matrix(&mut rng, rows, cols);
        let tiles = TiledMatrix::from_fp8(std::slice::from_ref(&matrix)).unwrap();
        let [found, other, third] = SEEDS.map(|seed| codes_by_rows(&tiles, first, count, seed));
        assert!(found == other && other == third, "the order of threads shows");
        let padded = cols.next_multiple_of(64);
        for (row, found) in found.chunks(padded).enumerate() {
            let mut wanted = matrix.bytes[(first + row) * cols..][..cols].to_vec();
            wanted.resize(padded, 0);
            wanted.chunks_exact_mut(4).for_each(|word| word.swap(1, 2));
            assert_eq!(found, wanted, "row {row} from {first} of [{rows}, {cols}]");
        }
    }
}

/// Activations as codes, four to a word in the order of the tiles, and the scale of each token.
fn rounded(activations: Format, x: &[f32], cols: usize) -> (Vec<u8>, Vec<f32>) {
    let tokens = x.len() / cols;
    let x = encoded(activations, x);
    let codes = Buffer::<u8>::unwritten(tokens * cols.next_multiple_of(64));
    let scales = Buffer::<f32>::unwritten(tokens);
    launch(
        &format!("round_rows_{}", activations.name()),
        Grid::new([tokens as u32, 1, 1], 256),
        1,
        args![x.address(), cols as u32, cols as u32, codes.address(), scales.address()],
    );
    (codes.read(), scales.read())
}

/// In panels of 32 rows, as the device has them of more.
#[test]
fn a_product_in_panels_is_that_of_the_rounded_numbers() {
    if !available() {
        return;
    }
    let mut rng = rng(41);
    for activations in [Format::Bf16, Format::F16] {
        for (rows, cols, tokens, with_bias) in [(48, 64, 5, true), (80, 100, 3, false), (32, 600, 9, true)] {
            let matrix = matrix(&mut rng, rows, cols);
            let tiles = TiledMatrix::from_fp8(std::slice::from_ref(&matrix)).unwrap();
            let mut number = |count| -> Vec<f32> {
                random(&mut rng, count).into_iter().map(|x| activations.round(x)).collect()
            };
            let (x, bias) = (number(tokens * cols), number(rows));
            let (x_codes, token_scales) = rounded(activations, &x, cols);
            let x_rows: Vec<&[u8]> = x_codes.chunks(cols.next_multiple_of(64)).collect();
            let y = room(activations, tokens * rows);
            for first in (0..rows).step_by(32) {
                let count = (rows - first).min(32);
                let w_codes = codes_by_rows(&tiles, first, count, 0);
                let w_rows: Vec<&[u8]> = w_codes.chunks(cols.next_multiple_of(64)).collect();
                let dot = |w: &[u8], x: &[u8]| -> f32 {
                    let terms = w.iter().zip(x).map(|(w, x)| fp8_to_f32(*w) * fp8_to_f32(*x));
                    terms.map(f64::from).sum::<f64>() as f32
                };
                let sums: Vec<f32> = x_rows
                    .iter()
                    .flat_map(|x| w_rows.iter().map(|w| dot(w, x)).collect::<Vec<_>>())
                    .collect();
                let sums = Buffer::new(&sums);
                let (row_scales, tokens_at) = (Buffer::new(&tiles.row_scales), Buffer::new(&token_scales));
                let biases = encoded(activations, &bias);
                let bias_at = if with_bias { biases.address() + first * activations.size() } else { 0 };
                launch(
                    &format!("scale_sums_{}", activations.name()),
                    // Fewer blocks than tokens: each does several.
                    Grid::new([count.div_ceil(4 * 256) as u32, 2, 1], 256),
                    7,
                    args![
                        sums.address(),
                        row_scales.address() + first * size_of::<f32>(),
                        tokens_at.address(),
                        bias_at,
                        count as u32,
                        tokens as u32,
                        tiles.unit,
                        y.address() + first * activations.size(),
                        rows as u32,
                    ],
                );
            }
            let found = activations.decode(&y.read());
            for (at, found) in found.iter().enumerate() {
                let (token, row) = (at / rows, at % rows);
                let inverse = 1.0 / token_scales[token];
                let x = x[token * cols..][..cols].iter().map(|x| Format::Fp8.round(x * inverse));
                let w = matrix.bytes[row * cols..][..cols].iter().map(|code| fp8_to_f32(*code));
                let sum: f64 = x.zip(w).map(|(x, w)| f64::from(x * w)).sum();
                let scale = f64::from(token_scales[token]) * f64::from(matrix.row_scales[row]);
                let bias = if with_bias { f64::from(bias[row]) } else { 0.0 };
                let wanted = sum * scale + bias;
                let allowed = f64::from(activations.epsilon()) * 0.51 * wanted.abs() + 1e-5;
                let error = (f64::from(*found) - wanted).abs();
                assert!(error <= allowed, "[{rows}, {cols}], {at}: {found}, wanted {wanted}");
            }
        }
    }
}
