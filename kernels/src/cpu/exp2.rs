//! Powers of two for weights that are rounded to bf16.

use std::arch::x86_64::*;

/// `2^x` for `x < 127`, within `3e-6` of itself; 1 for 0, 0 for -infinity, NaN for NaN.
///
/// `x = n + r` with `|r| <= 1/2`; the polynomial of degree 4 has the smallest greatest relative error of those that are 1 at 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // The second operand is the result where one is NaN.
    let x = _mm512_max_ps(_mm512_set1_ps(-200.0), x);
    let n = _mm512_roundscale_ps::<0>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(0.009_582_848);
    for c in [0.055_906_434, 0.240_240_99, 0.693_124_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::LANES;

    /// # Safety
    /// AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn powers_of_two(x: &[f32; LANES]) -> [f32; LANES] {
        let mut y = [0.0; LANES];
        // SAFETY: sixteen numbers each.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), exp2(_mm512_loadu_ps(x.as_ptr()))) };
        y
    }

    #[test]
    fn powers_of_two_are_near() {
        if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("avx512dq") {
            eprintln!("this processor has no AVX-512: nothing to test");
            return;
        }
        for i in 0..10_000 {
            let x: [f32; LANES] = std::array::from_fn(|lane| 10.0 - (i * LANES + lane) as f32 / 1300.0);
            // SAFETY: detected above.
            let y = unsafe { powers_of_two(&x) };
            for (x, y) in x.iter().zip(y) {
                let wanted = f64::from(*x).exp2();
                assert!((f64::from(y) - wanted).abs() <= 3.5e-6 * wanted, "2^{x} is not {y}");
            }
        }
        let mut x = [0.0; LANES];
        x[1..5].copy_from_slice(&[f32::NEG_INFINITY, -1e30, f32::NAN, -1.0]);
        // SAFETY: detected above.
        let y = unsafe { powers_of_two(&x) };
        assert!(y[0] == 1.0 && y[1] == 0.0 && y[2] == 0.0 && y[3].is_nan() && (y[4] - 0.5).abs() < 2e-6);
    }
}
