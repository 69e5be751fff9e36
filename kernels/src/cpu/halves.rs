//! Rows of 16-bit floats: each brought into their narrow range by a power of two of its own.

use std::arch::x86_64::*;

use super::line_gemm::MAX_BLOCK_ROWS;
use super::simd::LANES;

/// The largest magnitude of a row that is multiplied by one below 1 is scaled to less than `2^FACTOR_EXPONENT`: then 128
/// products can be summed.
pub(super) const FACTOR_EXPONENT: i32 = 8;

/// The power of two that brings magnitudes up to `largest` below `2^exponent`, and its inverse.
pub(super) fn scale_to(largest: f32, exponent: i32) -> (f32, f32) {
    // Exponent of the next power of two above; numbers too small for a factor's own range stay small.
    let biased = ((largest.to_bits() >> 23) & 0xff) as i32;
    let shift = (exponent - 1 - (biased - 127)).clamp(-120, 120);
    let power = |shift: i32| f32::from_bits(((127 + shift) as u32) << 23);
    (power(shift), power(-shift))
}

/// Scales, rounds and transposes rows of `depth` elements; writes all of `out`, `[depth][rows]`.
///
/// # Safety
/// AVX-512 F/BW/VL/DQ; all rows have `depth` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_block(rows: &[&[f32]], depth: usize, out: &mut [u32], scales: &mut [f32]) {
    let mut factors = [0.0; MAX_BLOCK_ROWS];
    for ((row, factor), scale) in rows.iter().zip(&mut factors).zip(scales) {
        (*factor, *scale) = scale_to(largest_magnitude(row), FACTOR_EXPONENT);
    }
    let mut rounded = [[0_u32; LANES]; MAX_BLOCK_ROWS];
    let mut k = 0;
    while k < depth {
        let width = LANES.min(depth - k);
        let mask = u16::MAX >> (LANES - width);
        for ((row, factor), rounded) in rows.iter().zip(factors).zip(&mut rounded) {
            // SAFETY: the mask leaves `width` elements from `k` on; `rounded` has sixteen.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, row.as_ptr().add(k));
                let x = _mm512_mul_ps(x, _mm512_set1_ps(factor));
                let half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
                let twice = _mm512_or_si512(half, _mm512_slli_epi32::<16>(half));
                _mm512_storeu_si512(rounded.as_mut_ptr().cast(), twice);
            }
        }
        for (column, out) in out[k * rows.len()..].chunks_exact_mut(rows.len()).take(width).enumerate() {
            for (out, rounded) in out.iter_mut().zip(&rounded) {
                *out = rounded[column];
            }
        }
        k += LANES;
    }
}

/// Rounds a row to `out`, scaled to magnitudes below 1; returns what brings them back.
///
/// # Safety
/// AVX-512 F/BW/VL/DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn round_row(row: &[f32], out: &mut [u16]) -> f32 {
    let (factor, scale) = scale_to(largest_magnitude(row), 0);
    let factor = _mm512_set1_ps(factor);
    for (row, out) in row.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let mask = u16::MAX >> (LANES - row.len().min(out.len()));
        // SAFETY: the mask leaves as many elements as there are.
        unsafe {
            let x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row.as_ptr()), factor);
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, halves);
        }
    }
    scale
}

/// The largest magnitude of a row; NaN counts as nothing: it stays what it is under any scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn largest_magnitude(row: &[f32]) -> f32 {
    let (vectors, tail) = row.as_chunks::<LANES>();
    let mut largest = _mm512_setzero_ps();
    for x in vectors {
        // SAFETY: sixteen elements.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        // Of a NaN and a number this instruction gives its second operand.
        largest = _mm512_max_ps(_mm512_abs_ps(x), largest);
    }
    tail.iter().fold(_mm512_reduce_max_ps(largest), |max, x| max.max(x.abs()))
}

/// Lanes 0..16 and 16..32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16")]
pub(super) fn widen(x: __m512h) -> [__m512; 2] {
    let x = _mm512_castph_si512(x);
    [_mm512_cvtph_ps(_mm512_castsi512_si256(x)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(x))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_exact() {
        for x in [1.0_f32, 0.75, 255.9, 3e38, 1e-37, 65504.0] {
            let (factor, inverse) = scale_to(x, FACTOR_EXPONENT);
            assert!(x * factor < 256.0 && (x * factor >= 128.0 || x < 1e-30), "{x}");
            assert_eq!(x * factor * inverse, x);
        }
        assert!(scale_to(0.0, 0).0.is_finite() && scale_to(f32::INFINITY, 0).0 > 0.0);
    }
}
