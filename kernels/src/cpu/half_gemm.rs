//! Products by multiply-adds of 16-bit floats (AVX512-FP16): twice the rate of f32.
//!
//! f16 has eleven significant bits, three more than bf16, but a narrow range. So each row of x and each row of w is
//! brought into it by a power of two of its own, which is exact; what is smaller than `2^-25` of the largest element of a
//! weight's row is lost. Products are summed in three levels, so that an f16 never sums many of them: [`CHAIN`] products in
//! one chain, the chains of a run in f16 again, runs in f32. The error of a sum is that of rounding the
//! activations to bf16 or less, which is what matrix units do (`benches/NOTES.md` has the figures).

use std::arch::x86_64::*;

use super::halves::{pack_block, widen};
use super::line_gemm::{self, LINE, Lines, Tile};
use super::matrix::{HALF_LANES, HalfPanels};
use super::simd::LANES;
use super::{Rows, Unwritten};

/// Products that are summed one after another.
const CHAIN: usize = 16;

/// Computes `y = x * w^T (+ bias)`; `y` is `[x.num_rows, num_rows of w]`, contiguous, and need not be initialised to values.
pub(super) fn matmul(x: Rows<'_>, w: &HalfPanels, num_rows: usize, bias: Option<&[f32]>, y: &mut Unwritten) {
    let w = Halves { w, depth: x.width };
    // SAFETY: weights are packed so only where the instructions were detected.
    unsafe { line_gemm::matmul(x, &w, num_rows, bias, y) }
}

/// A line is a column of 32 rows; x has each f16 twice, so that one load of 32 bits fills a vector with it: there is none for
/// 16 bits.
struct Halves<'a> {
    w: &'a HalfPanels,
    depth: usize,
}

impl Lines for Halves<'_> {
    const PANEL_ROWS: usize = HALF_LANES;

    fn panels(&self) -> &[u16] {
        &self.w.data
    }

    fn depth(&self) -> usize {
        self.depth
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16")]
    unsafe fn pack(&self, rows: &[&[f32]], out: &mut [u32], scales: &mut [f32]) {
        // SAFETY: the instructions are given; all rows have `depth` elements.
        unsafe { pack_block(rows, self.depth, out, scales) };
    }

    /// The chains are in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16")]
    unsafe fn multiply<const M: usize, const N: usize>(tile: &Tile) {
        let Tile { weights, panel_len, x, ref lines, sums, .. } = *tile;
        let mut k = lines.start;
        let mut run = [[_mm512_setzero_ph(); N]; M];
        while k < lines.end {
            let end = lines.end.min(k + CHAIN);
            let mut chain = [[_mm512_setzero_ph(); N]; M];
            while k < end {
                let mut w = [_mm512_setzero_ph(); N];
                for n in 0..N {
                    tile.ask(k, n);
                    // SAFETY: line `k` of a panel.
                    unsafe {
                        let p = weights.add(n * panel_len + k * LINE);
                        w[n] = _mm512_castsi512_ph(_mm512_loadu_si512(p.cast()));
                    }
                }
                for m in 0..M {
                    // SAFETY: number `k` of the block.
                    let x = unsafe { *x.add(k * M + m) };
                    let x = _mm512_castsi512_ph(_mm512_set1_epi32(x.cast_signed()));
                    for n in 0..N {
                        chain[m][n] = _mm512_fmadd_ph(x, w[n], chain[m][n]);
                    }
                }
                k += 1;
            }
            for m in 0..M {
                for n in 0..N {
                    run[m][n] = _mm512_add_ph(run[m][n], chain[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                for (half, mut sum) in widen(run[m][n]).into_iter().enumerate() {
                    // SAFETY: there are so many sums.
                    unsafe {
                        let p = sums.add((m * N + n) * HALF_LANES + half * LANES);
                        if lines.start > 0 {
                            sum = _mm512_add_ps(_mm512_loadu_ps(p), sum);
                        }
                        _mm512_storeu_ps(p, sum);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn finish(&self, sums: *const f32, scale: f32, column: usize) -> __m512 {
        // SAFETY: sixteen sums; scales are padded to whole panels.
        unsafe {
            let scales = _mm512_loadu_ps(self.w.scales[column..][..LANES].as_ptr());
            // One after the other: their product may be out of range where the result is not.
            _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(sums), scales), _mm512_set1_ps(scale))
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use half::f16;
    use rand::{Rng, SeedableRng};

    use super::super::halves::{FACTOR_EXPONENT, scale_to};
    use super::super::line_gemm::RUN;
    use super::super::{Isa, PackedMatrix, isa, written};
    use super::*;
    use crate::matrix_rows::with_stack;

    fn product(x: &[f32], rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
        let x = Rows::new(x, rows, w.cols, w.cols).expect("as long as its shape");
        let compute = |y: &mut Unwritten| {
            super::super::matmul(x, w, bias, y);
            Ok::<_, ()>(())
        };
        // SAFETY: `matmul` writes all of `y`.
        unsafe { written(rows * w.rows, compute) }.expect("computes")
    }

    /// The nearest f16, ties to even. (The conversion at hand goes by way of f32, and so rounds twice.)
    fn nearest(x: f64) -> f16 {
        let near = f16::from_f32(x as f32).to_bits();
        let candidates = [near, near.wrapping_sub(1), near.wrapping_add(1)].map(f16::from_bits);
        let distance = |y: &f16| (y.to_f64() - x).abs();
        let closer = |a: f16, b: f16| match distance(&a).total_cmp(&distance(&b)) {
            std::cmp::Ordering::Equal if b.to_bits().is_multiple_of(2) => b,
            std::cmp::Ordering::Greater => b,
            _ => a,
        };
        candidates.into_iter().filter(|y| y.is_finite()).reduce(closer).expect("a finite sum")
    }

    /// The three levels in plain numbers: f64 holds a product of f16 exactly, and a sum of it with another but for what is
    /// far below the last place of an f16; it is then rounded once.
    fn by_the_book(x: &[f32], w: &[f32], bias: f32) -> f32 {
        let largest = |row: &[f32]| row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let ((x_factor, x_scale), (w_factor, w_scale)) =
            (scale_to(largest(x), FACTOR_EXPONENT), scale_to(largest(w), 0));
        let mut sum = 0.0_f32;
        for (x, w) in x.chunks(RUN).zip(w.chunks(RUN)) {
            let mut run = f16::ZERO;
            for (x, w) in x.chunks(CHAIN).zip(w.chunks(CHAIN)) {
                let mut chain = f16::ZERO;
                for (x, w) in x.iter().zip(w) {
                    let (x, w) = (f16::from_f32(x * x_factor), f16::from_f32(w * w_factor));
                    chain = nearest(x.to_f64() * w.to_f64() + chain.to_f64());
                }
                run = nearest(run.to_f64() + chain.to_f64());
            }
            sum += run.to_f32();
        }
        sum * w_scale * x_scale + bias
    }

    fn used() -> bool {
        let used = isa() == Isa::Avx512Fp16;
        if !used {
            eprintln!("not the instruction set in use: nothing to test");
        }
        used
    }

    #[test]
    fn every_bit_is_as_defined() {
        if !used() {
            return;
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (n, k) in [(1, 1), (17, 15), (32, 16), (33, 17), (70, 129), (130, 300)] {
            for dtype in [DType::BF16, DType::F16] {
                // Rows of all sizes, and outliers, as weights and activations have them.
                let mut numbers = |rows: usize, sizes: &[f32]| -> Vec<f32> {
                    (0..rows * k)
                        .map(|i| {
                            let x: f32 = rng.random_range(-1.0..1.0);
                            x * sizes[i / k % sizes.len()] * if i % 97 == 5 { 300.0 } else { 1.0 }
                        })
                        .collect()
                };
                let w = numbers(n, &[0.02, 1.0, 3.0, 0.0]);
                let w = Tensor::from_vec(w, (n, k), &Device::Cpu)
                    .and_then(|w| w.to_dtype(dtype))
                    .expect("a matrix");
                let packed =
                    with_stack(std::slice::from_ref(&w), |stack| PackedMatrix::pack_halves(stack, dtype))
                        .expect("packs");
                let w = w.to_dtype(DType::F32).and_then(|w| w.to_vec2::<f32>()).expect("numbers");
                let bias = numbers(n, &[1.0])[..n].to_vec();
                for m in [1, 2, 3, 5, 8, 13, 25, 40] {
                    let x = numbers(m, &[1.0, 1e-3, 0.0, 700.0, 1e30, 1e-30, 1e-42]);
                    let found = product(&x, m, &packed, Some(&bias));
                    for (x, found) in x.chunks(k).zip(found.chunks(n)) {
                        for ((w, bias), found) in w.iter().zip(&bias).zip(found) {
                            let wanted = by_the_book(x, w, *bias);
                            assert_eq!(
                                found.to_bits(),
                                wanted.to_bits(),
                                "{m} x {n} x {k}: {found} {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        if !used() {
            return;
        }
        let (n, k) = (40, 33);
        let w = Tensor::ones((n, k), DType::BF16, &Device::Cpu).expect("a matrix");
        let packed = with_stack(&[w], |stack| PackedMatrix::pack_halves(stack, DType::BF16)).expect("packs");
        let mut x = vec![1.0_f32; 5 * k];
        (x[k + 2], x[3 * k + 32]) = (f32::NAN, f32::INFINITY);
        let y = product(&x, 5, &packed, None);
        for (row, y) in y.chunks(n).enumerate() {
            match row {
                1 => assert!(y.iter().all(|y| y.is_nan())),
                3 => assert!(y.iter().all(|y| !y.is_finite())),
                _ => assert_eq!(y, vec![k as f32; n]),
            }
        }
    }
}
