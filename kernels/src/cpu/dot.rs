//! Dot products of bytes on every instruction set.
//!
//! Weights are unsigned codes, sixteen rows by four columns to 64 bytes; activations are signed codes, four columns to
//! an `i32`. (Where only signed bytes can be multiplied, codes are moved by 128 as they are loaded.) All sums are whole numbers in `i32` lanes: they are exact, so every instruction set gives the same bits
//! and no order of summation matters. All methods are unsafe for the reason given in [`super::simd`].

use super::simd::{LANES, Simd};

/// Bytes of four columns of a panel of sixteen rows.
pub(super) const STEP_BYTES: usize = 4 * LANES;

/// Dot products beside the float vectors of `S`.
///
/// # Safety
/// Every method needs the instruction set of the implementation; pointers need [`STEP_BYTES`] readable bytes.
pub(super) trait Dot<S: Simd> {
    /// Sums for sixteen rows.
    type Sums: Copy;
    /// Four columns of sixteen rows.
    type Codes: Copy;
    /// Four columns of one activation.
    type Quad: Copy;

    /// How many sums a kernel may keep in registers beside as many float vectors.
    const ACCUMULATORS: usize;
    /// What byte codes count from once they are loaded; half bytes always count from zero.
    const BYTES_FROM: i32 = 0;

    /// Every row's sum is `first`.
    unsafe fn start(first: i32) -> Self::Sums;
    /// 64 unsigned bytes, less [`Self::BYTES_FROM`].
    unsafe fn load(p: *const u8) -> Self::Codes;
    /// 128 unsigned half bytes: those in the low halves, then those in the high halves.
    unsafe fn load_halves(p: *const u8) -> (Self::Codes, Self::Codes);
    /// The same four signed bytes for all rows.
    unsafe fn quad(p: *const i8) -> Self::Quad;
    /// `sums + codes . quad`
    unsafe fn add(sums: Self::Sums, codes: Self::Codes, quad: Self::Quad) -> Self::Sums;
    /// The sums as the nearest f32.
    unsafe fn to_float(sums: Self::Sums) -> S::V;
}

/// Plain arrays.
pub(super) struct PortableDot;

impl Dot<super::simd::Portable> for PortableDot {
    type Sums = [i32; LANES];
    type Codes = [u8; STEP_BYTES];
    type Quad = [i8; 4];
    const ACCUMULATORS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

    #[inline(always)]
    unsafe fn start(first: i32) -> Self::Sums {
        [first; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::Codes {
        // SAFETY: 64 bytes, given by the caller.
        unsafe { p.cast::<Self::Codes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_halves(p: *const u8) -> (Self::Codes, Self::Codes) {
        // SAFETY: 64 bytes, given by the caller.
        let both = unsafe { p.cast::<Self::Codes>().read_unaligned() };
        (both.map(|x| x & 15), both.map(|x| x >> 4))
    }
    #[inline(always)]
    unsafe fn quad(p: *const i8) -> Self::Quad {
        // SAFETY: four bytes, given by the caller.
        unsafe { p.cast::<Self::Quad>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn add(sums: Self::Sums, codes: Self::Codes, quad: Self::Quad) -> Self::Sums {
        std::array::from_fn(|row| {
            let products: [i32; 4] =
                std::array::from_fn(|i| i32::from(codes[4 * row + i]) * i32::from(quad[i]));
            sums[row] + (products[0] + products[1]) + (products[2] + products[3])
        })
    }
    #[inline(always)]
    unsafe fn to_float(sums: Self::Sums) -> [f32; LANES] {
        sums.map(|sum| sum as f32)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2Dot, Avx512Dot, VnniDot};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::simd::{Avx2, Avx512};
    use super::Dot;

    /// AVX-512 VNNI: one instruction for four columns of sixteen rows.
    pub(in crate::cpu) struct VnniDot;

    // SAFETY comments: each block needs AVX-512 F/BW/VL/DQ and VNNI, which is the contract of the trait, and touches
    // memory only at the pointers it is given.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Dot<Avx512> for VnniDot {
        type Sums = __m512i;
        type Codes = __m512i;
        type Quad = __m512i;
        const ACCUMULATORS: usize = 12;

        #[inline(always)]
        unsafe fn start(first: i32) -> __m512i {
            unsafe { _mm512_set1_epi32(first) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load_halves(p: *const u8) -> (__m512i, __m512i) {
            unsafe { halves_512(_mm512_loadu_si512(p.cast())) }
        }
        #[inline(always)]
        unsafe fn quad(p: *const i8) -> __m512i {
            unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn add(sums: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, codes, quad) }
        }
        #[inline(always)]
        unsafe fn to_float(sums: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(sums) }
        }
    }

    #[inline(always)]
    unsafe fn halves_512(both: __m512i) -> (__m512i, __m512i) {
        // SAFETY: AVX-512 F, given by the caller.
        unsafe {
            let low = _mm512_set1_epi8(15);
            (_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16::<4>(both), low))
        }
    }

    /// AVX-512 without VNNI: bytes widened to 16 bits, two sums a row. (The byte instruction would saturate.)
    pub(in crate::cpu) struct Avx512Dot;

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Dot<Avx512> for Avx512Dot {
        /// Rows 0..8 and 8..16, two neighbouring lanes a row.
        type Sums = (__m512i, __m512i);
        type Codes = (__m512i, __m512i);
        type Quad = __m512i;
        const ACCUMULATORS: usize = 6;

        #[inline(always)]
        unsafe fn start(first: i32) -> Self::Sums {
            // In the first lane of each row's two.
            unsafe {
                let x = _mm512_set1_epi64(i64::from(first.cast_unsigned()));
                (x, x)
            }
        }
        #[inline(always)]
        unsafe fn load(p: *const u8) -> Self::Codes {
            unsafe { wide_512(_mm512_loadu_si512(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_halves(p: *const u8) -> (Self::Codes, Self::Codes) {
            unsafe {
                let (low, high) = halves_512(_mm512_loadu_si512(p.cast()));
                (wide_512(low), wide_512(high))
            }
        }
        #[inline(always)]
        unsafe fn quad(p: *const i8) -> __m512i {
            unsafe { _mm512_cvtepi8_epi16(_mm256_set1_epi32(p.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn add(sums: Self::Sums, codes: Self::Codes, quad: __m512i) -> Self::Sums {
            unsafe {
                (
                    _mm512_add_epi32(sums.0, _mm512_madd_epi16(codes.0, quad)),
                    _mm512_add_epi32(sums.1, _mm512_madd_epi16(codes.1, quad)),
                )
            }
        }
        #[inline(always)]
        unsafe fn to_float(sums: Self::Sums) -> __m512 {
            unsafe {
                let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
                let first = _mm512_permutex2var_epi32(sums.0, even, sums.1);
                let second = _mm512_permutex2var_epi32(sums.0, odd, sums.1);
                _mm512_cvtepi32_ps(_mm512_add_epi32(first, second))
            }
        }
    }

    #[inline(always)]
    unsafe fn wide_512(bytes: __m512i) -> (__m512i, __m512i) {
        // SAFETY: AVX-512 BW, given by the caller.
        unsafe {
            (
                _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)),
                _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64::<1>(bytes)),
            )
        }
    }

    /// AVX2: as [`Avx512Dot`] in registers of half the width.
    pub(in crate::cpu) struct Avx2Dot;

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Dot<Avx2> for Avx2Dot {
        /// Four rows each, two neighbouring lanes a row.
        type Sums = [__m256i; 4];
        /// Sixteen bytes each.
        type Codes = [__m128i; 4];
        type Quad = __m256i;
        const ACCUMULATORS: usize = 2;

        #[inline(always)]
        unsafe fn start(first: i32) -> Self::Sums {
            unsafe { [_mm256_set1_epi64x(i64::from(first.cast_unsigned())); 4] }
        }
        #[inline(always)]
        unsafe fn load(p: *const u8) -> Self::Codes {
            unsafe { std::array::from_fn(|i| _mm_loadu_si128(p.add(16 * i).cast())) }
        }
        #[inline(always)]
        unsafe fn load_halves(p: *const u8) -> (Self::Codes, Self::Codes) {
            unsafe {
                let both = Self::load(p);
                let low = _mm_set1_epi8(15);
                (
                    both.map(|x| _mm_and_si128(x, low)),
                    both.map(|x| _mm_and_si128(_mm_srli_epi16::<4>(x), low)),
                )
            }
        }
        #[inline(always)]
        unsafe fn quad(p: *const i8) -> __m256i {
            unsafe { _mm256_cvtepi8_epi16(_mm_set1_epi32(p.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn add(sums: Self::Sums, codes: Self::Codes, quad: __m256i) -> Self::Sums {
            unsafe {
                std::array::from_fn(|i| {
                    let products = _mm256_madd_epi16(_mm256_cvtepu8_epi16(codes[i]), quad);
                    _mm256_add_epi32(sums[i], products)
                })
            }
        }
        #[inline(always)]
        unsafe fn to_float(sums: Self::Sums) -> (__m256, __m256) {
            unsafe {
                // Adds neighbours; the order of rows then is 0 1 4 5 2 3 6 7 in pairs of quarters.
                let join = |a, b| {
                    let pairs = _mm256_hadd_epi32(a, b);
                    _mm256_cvtepi32_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(pairs))
                };
                (join(sums[0], sums[1]), join(sums[2], sums[3]))
            }
        }
    }
}
