//! Vectors and byte dot products of 64-bit ARM.
//!
//! A logical vector is four registers. Bytes are multiplied signed: codes count from 128 once they are loaded (half bytes
//! are small enough as they are). `sdot` is written as assembly: its intrinsic is not stable yet.

use std::arch::aarch64::*;
use std::arch::asm;

use super::dot::Dot;
use super::simd::{LANES, Simd};

/// Registers of a logical vector.
const REGS: usize = 4;

type V = [float32x4_t; REGS];

/// NEON, which every processor of the target has.
#[derive(Clone, Copy)]
pub(super) struct Neon;

#[inline(always)]
fn map(a: V, f: impl Fn(float32x4_t) -> float32x4_t) -> V {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> V {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// Widens four bf16.
///
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn widen(raw: uint16x4_t) -> float32x4_t {
    // SAFETY: given by the caller.
    unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(raw)) }
}

/// The nearest bf16 of four numbers in the upper halves of lanes, ties to even; NaN stays NaN.
///
/// # Safety
/// NEON.
#[inline(always)]
#[allow(dead_code)]
unsafe fn narrow(x: float32x4_t) -> uint16x4_t {
    // SAFETY: given by the caller.
    unsafe {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(x, x), rounded, quiet))
    }
}

// SAFETY comments: each block needs NEON, which is the contract of the trait, and touches memory only at the pointers it is
// given.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    type V = V;
    /// Twenty registers of sums leave eight for a pair of weights and four to spare.
    const ACCUMULATORS: usize = 5;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        unsafe { [vdupq_n_f32(x); REGS] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        unsafe { std::array::from_fn(|i| vld1q_f32(p.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        unsafe {
            for i in 0..REGS {
                vst1q_f32(p.add(4 * i), v[i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        unsafe { std::array::from_fn(|i| widen(vld1_u16(p.add(4 * i)))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: V) {
        unsafe {
            for i in 0..REGS {
                vst1_u16(p.add(4 * i), narrow(v[i]));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        unsafe { std::array::from_fn(|i| vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p.add(4 * i))))) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> V {
        unsafe {
            let bytes = vld1q_s8(p);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32) -> V {
        unsafe { std::array::from_fn(|i| vcvtq_f32_s32(vld1q_s32(p.add(4 * i)))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const u16) -> (V, V) {
        unsafe {
            let high = vdupq_n_u32(0xffff_0000);
            let pairs: [uint32x4_t; REGS] = std::array::from_fn(|i| vld1q_u32(p.cast::<u32>().add(4 * i)));
            (
                pairs.map(|pair| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pair))),
                pairs.map(|pair| vreinterpretq_f32_u32(vandq_u32(pair, high))),
            )
        }
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map2(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        // The second of the two if they do not compare, as the other instruction sets have it.
        map2(a, b, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(a, b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn scale_by_power(x: V, n: V) -> V {
        map2(x, n, |x, n| unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        })
    }
    #[inline(always)]
    unsafe fn round(x: V) -> V {
        map(x, |x| unsafe { vrndnq_f32(x) })
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: V) {
        unsafe {
            let words = |a, b| vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(a)), vcvtnq_s32_f32(b));
            let (low, high) = (words(v[0], v[1]), words(v[2], v[3]));
            vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(low), high));
        }
    }
    #[inline(always)]
    unsafe fn load_bits(p: *const u8, shift: u32, mask: u32) -> V {
        unsafe {
            // Shifted by a register, and to the right by a negative count.
            let (by, mask) = (vdupq_n_s32(-(shift as i32)), vdupq_n_u32(mask));
            std::array::from_fn(|i| {
                let words = vreinterpretq_u32_u8(vld1q_u8(p.add(16 * i)));
                vcvtq_f32_u32(vandq_u32(vshlq_u32(words, by), mask))
            })
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a hint, which changes no register and may name any address.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly)) };
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        // In the order of the default: the second half onto the first, until one is left.
        unsafe {
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    unsafe fn max_lane(v: V) -> f32 {
        // A lane that is no number counts for nothing, as in the default.
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(v[0], v[1]), vmaxnmq_f32(v[2], v[3]))) }
    }
    #[inline(always)]
    unsafe fn zero_below(v: V, x: V, low: V) -> V {
        unsafe {
            std::array::from_fn(|i| {
                let below = vcltq_f32(x[i], low[i]);
                vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v[i]), below))
            })
        }
    }
}

/// Sixteen codes of a register: four columns of four rows.
type Codes = [int8x16_t; REGS];

/// # Safety
/// NEON; 64 readable bytes at `p`.
#[inline(always)]
unsafe fn load_signed(p: *const u8) -> Codes {
    // SAFETY: given by the caller.
    unsafe {
        std::array::from_fn(|i| vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p.add(16 * i)), vdupq_n_u8(128))))
    }
}

/// # Safety
/// As [`load_signed`].
#[inline(always)]
unsafe fn load_signed_halves(p: *const u8) -> (Codes, Codes) {
    // SAFETY: given by the caller.
    unsafe {
        let both: [uint8x16_t; REGS] = std::array::from_fn(|i| vld1q_u8(p.add(16 * i)));
        (
            both.map(|x| vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15)))),
            both.map(|x| vreinterpretq_s8_u8(vshrq_n_u8::<4>(x))),
        )
    }
}

/// # Safety
/// NEON; four readable bytes at `p`.
#[inline(always)]
unsafe fn load_quad(p: *const i8) -> int8x16_t {
    // SAFETY: given by the caller.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(p.cast::<i32>().read_unaligned())) }
}

/// With the dot products of ARMv8.2: one instruction for four columns of four rows.
pub(super) struct NeonDot;

// SAFETY comments: as above with dot products.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dot<Neon> for NeonDot {
    /// Four rows each.
    type Sums = [int32x4_t; REGS];
    type Codes = Codes;
    type Quad = int8x16_t;
    /// Half of the registers for whole-number sums, whose codes come and go; the f32 sums are used once a group.
    const ACCUMULATORS: usize = 4;
    const BYTES_FROM: i32 = 128;

    #[inline(always)]
    unsafe fn start(first: i32) -> Self::Sums {
        unsafe { [vdupq_n_s32(first); REGS] }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Codes {
        unsafe { load_signed(p) }
    }
    #[inline(always)]
    unsafe fn load_halves(p: *const u8) -> (Codes, Codes) {
        unsafe { load_signed_halves(p) }
    }
    #[inline(always)]
    unsafe fn quad(p: *const i8) -> int8x16_t {
        unsafe { load_quad(p) }
    }
    #[inline(always)]
    unsafe fn add(mut sums: Self::Sums, codes: Codes, quad: int8x16_t) -> Self::Sums {
        for i in 0..REGS {
            // The assembler takes the instruction only where it is told that it exists, whatever the crate is built for.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) sums[i],
                    in(vreg) codes[i],
                    in(vreg) quad,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn to_float(sums: Self::Sums) -> V {
        unsafe { sums.map(|sums| vcvtq_f32_s32(sums)) }
    }
}

/// Without dot products: bytes multiplied to 16 bits, neighbours added to two sums a row.
pub(super) struct NeonPairs;

// SAFETY comments: as above without dot products.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dot<Neon> for NeonPairs {
    /// Two rows each, two neighbouring lanes a row.
    type Sums = [int32x4_t; 2 * REGS];
    type Codes = Codes;
    type Quad = int8x16_t;
    const ACCUMULATORS: usize = 2;
    const BYTES_FROM: i32 = 128;

    #[inline(always)]
    unsafe fn start(first: i32) -> Self::Sums {
        // In the first lane of each row's two.
        unsafe { [vreinterpretq_s32_u64(vdupq_n_u64(u64::from(first.cast_unsigned()))); 2 * REGS] }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Codes {
        unsafe { load_signed(p) }
    }
    #[inline(always)]
    unsafe fn load_halves(p: *const u8) -> (Codes, Codes) {
        unsafe { load_signed_halves(p) }
    }
    #[inline(always)]
    unsafe fn quad(p: *const i8) -> int8x16_t {
        unsafe { load_quad(p) }
    }
    #[inline(always)]
    unsafe fn add(mut sums: Self::Sums, codes: Codes, quad: int8x16_t) -> Self::Sums {
        unsafe {
            for i in 0..REGS {
                // -128 * 127 is the least of the products: two of them would not fit, one does.
                let low = vmull_s8(vget_low_s8(codes[i]), vget_low_s8(quad));
                let high = vmull_high_s8(codes[i], quad);
                sums[2 * i] = vpadalq_s16(sums[2 * i], low);
                sums[2 * i + 1] = vpadalq_s16(sums[2 * i + 1], high);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn to_float(sums: Self::Sums) -> V {
        unsafe { std::array::from_fn(|i| vcvtq_f32_s32(vpaddq_s32(sums[2 * i], sums[2 * i + 1]))) }
    }
}

const _: () = assert!(LANES == 4 * REGS);
