//! Products by dot products of bf16 pairs (AVX512-BF16), summed in f32: where they have the rate of f32 multiply-adds, twice
//! as many products a second, and weights need not be widened.
//!
//! Activations are rounded to bf16, as matrix units do it. An instruction adds two products to a sum without rounding them
//! first, in an order of its own; numbers below the normal range count as zero.

use std::arch::x86_64::*;

use super::line_gemm::{self, LINE, Lines, MAX_BLOCK_ROWS, Tile};
use super::matrix::PackedMatrix;
use super::simd::LANES;
use super::{Rows, Unwritten};

/// Whether the instructions are worth using here: AMD's processors that have them start as many a cycle as multiply-adds of
/// f32. Intel's start half as many, so that nothing is won over f32 sums, which are more exact.
pub(super) fn is_fast() -> bool {
    use std::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    name == b"AuthenticAMD"
}

/// Computes `y = x * w^T (+ bias)` for a bf16 weight with panels `data`; `y` is `[x.num_rows, w.rows]`, contiguous, and need
/// not be initialised to values.
///
/// # Safety
/// AVX512-BF16.
pub(super) unsafe fn matmul(
    x: Rows<'_>,
    w: &PackedMatrix,
    data: &[u16],
    bias: Option<&[f32]>,
    y: &mut Unwritten,
) {
    let pairs = Pairs { data, depth: w.depth / 2 };
    // SAFETY: given by the caller.
    unsafe { line_gemm::matmul(x, &pairs, w.rows, bias, y) }
}

/// A line is two columns of sixteen rows, side by side.
struct Pairs<'a> {
    data: &'a [u16],
    depth: usize,
}

impl Lines for Pairs<'_> {
    const PANEL_ROWS: usize = LANES;

    fn panels(&self) -> &[u16] {
        self.data
    }

    fn depth(&self) -> usize {
        self.depth
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pack(&self, rows: &[&[f32]], out: &mut [u32], _scales: &mut [f32]) {
        let width = rows.first().map_or(0, |row| row.len());
        let mut rounded = [[0_u32; LANES]; MAX_BLOCK_ROWS];
        for (first, out) in (0..).step_by(LINE).zip(out.chunks_mut(LANES * rows.len())) {
            // What is beyond the last column is zero.
            let mask = (u64::from(u32::MAX) << width.saturating_sub(first).min(LINE) >> 32) as u32;
            for (row, rounded) in rows.iter().zip(&mut rounded) {
                // SAFETY: the masks leave what the row has from `first` on; `rounded` has sixteen pairs.
                unsafe { round_pairs(row.as_ptr().wrapping_add(first), mask, rounded.as_mut_ptr()) };
            }
            for (pair, out) in out.chunks_exact_mut(rows.len()).enumerate() {
                for (out, rounded) in out.iter_mut().zip(&rounded) {
                    *out = rounded[pair];
                }
            }
        }
    }

    /// The sums are in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn multiply<const M: usize, const N: usize>(tile: &Tile) {
        let Tile { weights, panel_len, x, ref lines, sums, .. } = *tile;
        let mut total = [[_mm512_setzero_ps(); N]; M];
        if lines.start > 0 {
            for m in 0..M {
                for n in 0..N {
                    // SAFETY: there are so many sums.
                    total[m][n] = unsafe { _mm512_loadu_ps(sums.add((m * N + n) * LANES)) };
                }
            }
        }
        for k in lines.clone() {
            let mut w = [_mm512_setzero_si512(); N];
            for n in 0..N {
                tile.ask(k, n);
                // SAFETY: line `k` of a panel.
                w[n] = unsafe { _mm512_loadu_si512(weights.add(n * panel_len + k * LINE).cast()) };
            }
            for m in 0..M {
                // SAFETY: number `k` of the block.
                let x = _mm512_set1_epi32(unsafe { *x.add(k * M + m) }.cast_signed());
                for n in 0..N {
                    total[m][n] = dot(total[m][n], x, w[n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                // SAFETY: there are so many sums.
                unsafe { _mm512_storeu_ps(sums.add((m * N + n) * LANES), total[m][n]) };
            }
        }
    }

    #[inline(always)]
    unsafe fn finish(&self, sums: *const f32, _scale: f32, _column: usize) -> __m512 {
        // SAFETY: given by the caller.
        unsafe { _mm512_loadu_ps(sums) }
    }
}

/// `sums[i] + x[2i] * w[2i] + x[2i + 1] * w[2i + 1]`, `x` and `w` as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn dot(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: the same 512 bits, as the type that the instruction wants.
    let (x, w) =
        unsafe { (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w)) };
    _mm512_dpbf16_ps(sums, x, w)
}

/// Rounds the 32 elements at `x` that `mask` names to bf16, the others to zero, and writes them to `out` as sixteen pairs.
///
/// # Safety
/// The elements are readable, `out` writable.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn round_pairs(x: *const f32, mask: u32, out: *mut u32) {
    // SAFETY: given by the caller; what the mask leaves out is not read.
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask as u16, x);
        let high = _mm512_maskz_loadu_ps((mask >> LANES) as u16, x.wrapping_add(LANES));
        let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(out.cast(), pairs);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::super::amx::tests::{bits, numbers};
    use super::super::written;
    use super::*;
    use crate::matrix_rows::with_stack;

    /// Also where the instructions are there and not the ones in use.
    fn product(x: &[f32], rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
        let super::super::matrix::Panels::Bf16(data) = &w.panels else { panic!("a bf16 weight") };
        let x = Rows::new(x, rows, w.cols, w.cols).expect("a matrix");
        // SAFETY: the product writes all of its output; the instructions were detected by `is_there`.
        unsafe {
            written(rows * w.rows, |y| {
                matmul(x, w, data, bias, y);
                Ok::<(), ()>(())
            })
        }
        .expect("written")
    }

    fn is_there() -> bool {
        let there = is_x86_feature_detected!("avx512bf16");
        if !there {
            eprintln!("this processor has no dot products of bf16: nothing to test");
        }
        there
    }

    fn bf16(x: f32) -> f64 {
        half::bf16::from_f32(x).to_f64()
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        if !is_there() {
            return;
        }
        for (n, k) in [(1, 1), (17, 2), (16, 3), (33, 31), (40, 33), (130, 257), (70, 600)] {
            let w = numbers(1, n * k);
            let tensor = Tensor::from_slice(&w, (n, k), &Device::Cpu).expect("a matrix");
            let packed =
                with_stack(&[tensor], |stack| PackedMatrix::pack_panels(stack, DType::BF16)).expect("packs");
            let bias = numbers(2, n);
            for m in [1, 2, 3, 5, 7, 12, 13, 40, 100] {
                let x = numbers(3, m * k);
                let found = product(&x, m, &packed, Some(&bias));
                for (row, found) in found.chunks_exact(n).enumerate() {
                    let x = &x[row * k..][..k];
                    for (column, found) in found.iter().enumerate() {
                        let w = &w[column * k..][..k];
                        let wanted: f64 = x.iter().zip(w).map(|(x, w)| bf16(*x) * bf16(*w)).sum();
                        let wanted = wanted + f64::from(bias[column]);
                        // Sums of up to 600 products in f32.
                        assert!(
                            (f64::from(*found) - wanted).abs() < 2e-5,
                            "{m} x {n} x {k}: {found} {wanted}"
                        );
                    }
                    // The same bits alone.
                    assert_eq!(bits(&product(x, 1, &packed, Some(&bias))), bits(found), "{m} x {n} x {k}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        if !is_there() {
            return;
        }
        let (n, k) = (40, 33);
        let w = Tensor::ones((n, k), DType::BF16, &Device::Cpu).expect("a matrix");
        let packed = with_stack(&[w], |stack| PackedMatrix::pack_panels(stack, DType::BF16)).expect("packs");
        let mut x = vec![1.0_f32; 5 * k];
        (x[k + 2], x[3 * k + 32]) = (f32::NAN, f32::INFINITY);
        for (row, y) in product(&x, 5, &packed, None).chunks(n).enumerate() {
            match row {
                1 => assert!(y.iter().all(|y| y.is_nan())),
                3 => assert!(y.iter().all(|y| !y.is_finite())),
                _ => assert_eq!(y, vec![k as f32; n]),
            }
        }
    }
}
