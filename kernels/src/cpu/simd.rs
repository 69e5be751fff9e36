//! Sixteen f32 lanes on every instruction set.
//!
//! The kernels are written once over [`Simd`]; each implementation below maps a logical vector of sixteen lanes onto
//! one, two or sixteen registers. All methods are unsafe for one reason: the processor must have the instruction set,
//! which `dispatch!` guarantees.

/// Number of lanes of a logical vector.
pub(super) const LANES: usize = 16;

/// A vector of sixteen f32 lanes.
///
/// # Safety
/// Every method needs the instruction set of the implementation; those with pointers need [`LANES`] readable (or
/// writable) elements there (`pair` loads: twice as many).
pub(super) trait Simd: Copy {
    /// The vector.
    type V: Copy;

    /// How many vectors of accumulators a kernel may keep in registers beside its operands.
    const ACCUMULATORS: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Widens sixteen bf16.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// The nearest bf16, ties to even; NaN stays NaN. (Matrix units want it, which only x86-64 has.)
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// Widens sixteen f16.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// Widens sixteen signed bytes.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// The sixteen whole numbers as the nearest f32.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    unsafe fn load_i32(p: *const i32) -> Self::V;
    /// Widens sixteen pairs of bf16: all first halves, all second halves.
    unsafe fn load_bf16_pair(p: *const u16) -> (Self::V, Self::V);
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `x * 2^n` for a whole number `n` in `-126..=127`.
    unsafe fn scale_by_power(x: Self::V, n: Self::V) -> Self::V;
    /// To the nearest whole number, ties to even.
    unsafe fn round(x: Self::V) -> Self::V;
    /// Sixteen whole numbers in `-128..=127`, to the nearest and ties to even.
    unsafe fn store_i8(p: *mut i8, v: Self::V);
    /// Bits `shift..` of sixteen little-endian words of 32 bits at `p`, those of `mask`, as whole numbers.
    unsafe fn load_bits(p: *const u8, shift: u32, mask: u32) -> Self::V;
    /// Asks for the line of `p` to be brought into the first-level cache.
    unsafe fn prefetch(p: *const u8);

    #[inline(always)]
    unsafe fn to_array(v: Self::V) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `out` has sixteen elements; the instruction set is given.
        unsafe { Self::store(out.as_mut_ptr(), v) };
        out
    }

    /// Sum of the lanes in one fixed order.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: the instruction set is given.
        let mut a = unsafe { Self::to_array(v) };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                a[i] += a[i + width];
            }
            width /= 2;
        }
        a[0]
    }

    /// Greatest lane.
    #[inline(always)]
    unsafe fn max_lane(v: Self::V) -> f32 {
        // SAFETY: the instruction set is given.
        unsafe { Self::to_array(v) }.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `e^x`, within 2 ULP for results that are normal numbers; 0 from about -87.3 down.
    ///
    /// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, then a polynomial of degree 6 (Cephes' `expf` coefficients).
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: the instruction set is given.
        unsafe {
            let low = Self::splat(-87.336_54);
            let clamped = Self::min(Self::max(x, low), Self::splat(88.0));
            let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            // ln 2 in two parts, the first exact in few bits, so that r keeps its precision.
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let y = Self::add(Self::fma(p, Self::mul(r, r), r), Self::splat(1.0));
            Self::zero_below(Self::scale_by_power(y, n), x, low)
        }
    }

    /// `v` where `x >= low` (or unordered), else 0.
    unsafe fn zero_below(v: Self::V, x: Self::V, low: Self::V) -> Self::V;
}

/// Plain arrays; the compiler turns them into what the target has (NEON on aarch64).
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; LANES];
    const ACCUMULATORS: usize = if cfg!(target_arch = "aarch64") { 6 } else { 2 };

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: sixteen elements, given by the caller.
        let raw = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        let raw = v.map(|x| half::bf16::from_f32(x).to_bits());
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(raw) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        // SAFETY: sixteen elements, given by the caller.
        let raw = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|x| half::f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32) -> Self::V {
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<[i32; LANES]>().read_unaligned() }.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: thirty-two elements, given by the caller.
        let raw = unsafe { p.cast::<[u16; 2 * LANES]>().read_unaligned() };
        let wide = |i: usize| f32::from_bits(u32::from(raw[i]) << 16);
        (std::array::from_fn(|i| wide(2 * i)), std::array::from_fn(|i| wide(2 * i + 1)))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // A fused multiply-add is a library call where the target has none; two roundings are then the better deal.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn scale_by_power(x: Self::V, n: Self::V) -> Self::V {
        map2(x, n, |x, n| x * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn round(x: Self::V) -> Self::V {
        // Adding and subtracting 1.5 * 2^23 leaves no bits for a fraction; callers stay far below that.
        x.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::V) {
        let bytes = v.map(|x| x.round_ties_even() as i8);
        // SAFETY: sixteen elements, given by the caller.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(bytes) }
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8, shift: u32, mask: u32) -> Self::V {
        // SAFETY: sixteen words, given by the caller.
        let words = unsafe { p.cast::<[u32; LANES]>().read_unaligned() };
        words.map(|word| (u32::from_le(word) >> shift & mask) as f32)
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn zero_below(v: Self::V, x: Self::V, low: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] < low[i] { 0.0 } else { v[i] })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub(in crate::cpu) struct Avx512;

    // SAFETY comments: each block needs AVX-512 F/BW/VL/DQ, which is the contract of the trait, and touches memory only
    // at the pointers it is given.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx512 {
        type V = __m512;
        const ACCUMULATORS: usize = 24;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m512 {
            unsafe {
                let raw = _mm256_loadu_si256(p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut u16, v: __m512) {
            unsafe {
                let bits = _mm512_castps_si512(v);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let raw = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet));
                _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(raw));
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_i32(p: *const i32) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16_pair(p: *const u16) -> (__m512, __m512) {
            unsafe {
                let raw = _mm512_loadu_si512(p.cast());
                let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                (
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw)),
                    _mm512_castsi512_ps(_mm512_and_si512(raw, high)),
                )
            }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn scale_by_power(x: __m512, n: __m512) -> __m512 {
            unsafe { _mm512_scalef_ps(x, n) }
        }
        #[inline(always)]
        unsafe fn round(x: __m512) -> __m512 {
            unsafe { _mm512_roundscale_ps::<0>(x) }
        }
        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            unsafe {
                let halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                sum_of_eight(halves)
            }
        }
        #[inline(always)]
        unsafe fn max_lane(v: __m512) -> f32 {
            unsafe {
                let halves = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                max_of_eight(halves)
            }
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: __m512) {
            unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))) }
        }
        #[inline(always)]
        unsafe fn load_bits(p: *const u8, shift: u32, mask: u32) -> __m512 {
            unsafe {
                let words = _mm512_srl_epi32(_mm512_loadu_si512(p.cast()), _mm_cvtsi32_si128(shift as i32));
                _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask as i32)))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn zero_below(v: __m512, x: __m512, low: __m512) -> __m512 {
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, low), v) }
        }
    }

    /// In the order of [`Simd::sum`]: the second half onto the first, three times.
    #[inline(always)]
    unsafe fn sum_of_eight(v: __m256) -> f32 {
        // SAFETY: AVX, which both instruction sets have.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn max_of_eight(v: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub(in crate::cpu) struct Avx2;

    type Two = (__m256, __m256);

    // SAFETY comments: as above with AVX2, FMA and F16C.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx2 {
        type V = Two;
        const ACCUMULATORS: usize = 6;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Two {
            unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Two {
            unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Two) {
            unsafe {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Two {
            unsafe {
                let half = |p: *const u16| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                (half(p), half(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut u16, v: Two) {
            unsafe {
                let half = |v| {
                    let bits = _mm256_castps_si256(v);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
                };
                // Packing works within halves of a register: put the quarters back in order.
                let raw = _mm256_packus_epi32(half(v.0), half(v.1));
                _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(raw));
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Two {
            unsafe {
                (
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> Two {
            unsafe {
                let bytes = _mm_loadu_si128(p.cast());
                let half = |bytes| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                (half(bytes), half(_mm_unpackhi_epi64(bytes, bytes)))
            }
        }
        #[inline(always)]
        unsafe fn load_i32(p: *const i32) -> Two {
            unsafe {
                let half = |p: *const i32| _mm256_cvtepi32_ps(_mm256_loadu_si256(p.cast()));
                (half(p), half(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_pair(p: *const u16) -> (Two, Two) {
            unsafe {
                let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast()));
                let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let first = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
                let second = |x| _mm256_castsi256_ps(_mm256_and_si256(x, high));
                ((first(a), first(b)), (second(a), second(b)))
            }
        }
        #[inline(always)]
        unsafe fn fma(a: Two, b: Two, c: Two) -> Two {
            unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn add(a: Two, b: Two) -> Two {
            unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn sub(a: Two, b: Two) -> Two {
            unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn mul(a: Two, b: Two) -> Two {
            unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn div(a: Two, b: Two) -> Two {
            unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn max(a: Two, b: Two) -> Two {
            unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn min(a: Two, b: Two) -> Two {
            unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn scale_by_power(x: Two, n: Two) -> Two {
            unsafe {
                let half = |x, n| {
                    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
                };
                (half(x.0, n.0), half(x.1, n.1))
            }
        }
        #[inline(always)]
        unsafe fn round(x: Two) -> Two {
            unsafe { (_mm256_round_ps::<8>(x.0), _mm256_round_ps::<8>(x.1)) }
        }
        #[inline(always)]
        unsafe fn sum(v: Two) -> f32 {
            unsafe { sum_of_eight(_mm256_add_ps(v.0, v.1)) }
        }
        #[inline(always)]
        unsafe fn max_lane(v: Two) -> f32 {
            unsafe { max_of_eight(_mm256_max_ps(v.0, v.1)) }
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: Two) {
            unsafe {
                let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
                // Packing works within halves of a register: put the quarters back in order.
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
            }
        }
        #[inline(always)]
        unsafe fn load_bits(p: *const u8, shift: u32, mask: u32) -> Two {
            unsafe {
                let half = |p: *const u8| {
                    let words =
                        _mm256_srl_epi32(_mm256_loadu_si256(p.cast()), _mm_cvtsi32_si128(shift as i32));
                    _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(mask as i32)))
                };
                (half(p), half(p.add(32)))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn zero_below(v: Two, x: Two, low: Two) -> Two {
            unsafe {
                let half = |v, x, low| _mm256_and_ps(v, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, low));
                (half(v.0, x.0, low.0), half(v.1, x.1, low.1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp_of(xs: [f32; LANES]) -> [f32; LANES] {
        unsafe fn kernel<S: Simd>(xs: [f32; LANES]) -> [f32; LANES] {
            // SAFETY: dispatched; the array has sixteen elements.
            unsafe { S::to_array(S::exp(S::load(xs.as_ptr()))) }
        }
        super::super::dispatch!(kernel(xs) -> [f32; LANES], [xs: [f32; LANES]])
    }

    fn to_bf16(xs: [f32; LANES]) -> [u16; LANES] {
        unsafe fn kernel<S: Simd>(xs: [f32; LANES]) -> [u16; LANES] {
            let mut out = [0; LANES];
            // SAFETY: dispatched; both arrays have sixteen elements.
            unsafe { S::store_bf16(out.as_mut_ptr(), S::load(xs.as_ptr())) };
            out
        }
        super::super::dispatch!(kernel(xs) -> [u16; LANES], [xs: [f32; LANES]])
    }

    #[test]
    fn bf16_is_the_nearest() {
        let edges = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x1_8001];
        let numbers = [0.0_f32, 1.0, 3.0e-39, 1.17e-38, 255.0, f32::MAX, f32::INFINITY];
        for number in numbers {
            for edge in edges {
                let bits = number.to_bits().wrapping_add(edge);
                let xs = std::array::from_fn(|i| {
                    let bits = bits.wrapping_add(i as u32);
                    f32::from_bits(if i % 2 == 0 { bits } else { bits ^ 1 << 31 })
                });
                assert_eq!(to_bf16(xs), xs.map(|x| half::bf16::from_f32(x).to_bits()), "{xs:?}");
            }
        }
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            assert!(to_bf16([nan; LANES]).iter().all(|x| half::bf16::from_bits(*x).is_nan()));
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut x = -87.0_f32;
        while x < 87.9 {
            let xs = std::array::from_fn(|i| x + i as f32 * 0.001);
            for (y, x) in exp_of(xs).into_iter().zip(xs) {
                let exact = f64::from(x).exp();
                let ulp = f64::from(f32::EPSILON) * exact;
                assert!((f64::from(y) - exact).abs() <= 2.0 * ulp, "exp({x}) = {y}, not {exact}");
            }
            x += 0.016;
        }
        assert_eq!(exp_of([f32::NEG_INFINITY; LANES]), [0.0; LANES]);
        assert_eq!(exp_of([-200.0; LANES]), [0.0; LANES]);
        assert_eq!(exp_of([0.0; LANES]), [1.0; LANES]);
    }
}
