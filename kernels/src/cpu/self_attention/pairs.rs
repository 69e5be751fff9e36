//! Rows of f32 as pairs of bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Piece, SelfAttention};
use crate::cpu::Rows;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::LANES;

/// So many rows ahead are asked for: a head's part of rows lies too far apart for the processor to foresee it.
pub(super) const AHEAD: usize = 8;

/// Word `2 i` is word `i` of the first operand, word `2 i + 1` that of the second.
static INTERLEAVED: [u32; LANES] = {
    let mut words = [0; LANES];
    let mut i = 0;
    while i < LANES {
        words[i] = ((i + LANES) << 16 | i) as u32;
        i += 1;
    }
    words
};

/// Keys and values of a piece.
pub(super) struct Operands {
    /// Position of the first, even.
    pub(super) start: usize,
    /// Pairs of features, `[keys][dim / 2]`.
    pub(super) keys: Scratch<u32>,
    /// Pairs of keys, `[keys / 2, rounded up][dim]`.
    pub(super) values: Scratch<u32>,
}

impl Operands {
    /// Those of the heads whose features begin at `column`, at the positions `at`.
    ///
    /// # Safety
    /// AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn new(job: &SelfAttention<'_>, piece: Piece, column: usize, at: Range<usize>) -> Self {
        let dim = job.head_dim;
        let (len, pairs) = (at.len() * (dim / 2), at.len().div_ceil(2) * dim);
        let (mut keys, mut values) = (Scratch::<u32>::any(len), Scratch::<u32>::any(pairs));
        for (position, out) in at.clone().zip(keys.chunks_exact_mut(dim / 2)) {
            ask(&job.k, piece.start + position + AHEAD, column, dim);
            let row = &job.k.row(piece.start + position)[column..][..dim];
            // SAFETY: half as many pairs as features; the instructions are given.
            unsafe { round_row(row, 1.0, out.as_mut_ptr()) };
        }
        for (position, out) in at.clone().step_by(2).zip(values.chunks_exact_mut(dim)) {
            ask(&job.v, piece.start + position + AHEAD, column, dim);
            ask(&job.v, piece.start + position + 1 + AHEAD, column, dim);
            let row = |position| &job.v.row(piece.start + position)[column..][..dim];
            let second = (position + 1 < at.end).then(|| row(position + 1));
            // SAFETY: rows and output have as many elements; the instructions are given.
            unsafe { join_rows(row(position), second, out.as_mut_ptr()) };
        }
        Self { start: at.start, keys, values }
    }
}

/// Asks for `len` elements of row `idx` from `column` on, if there is such a row, to be brought into the nearest cache.
pub(super) fn ask(rows: &Rows<'_>, idx: usize, column: usize, len: usize) {
    let start = rows.data.as_ptr().wrapping_add(idx * rows.stride + column);
    for at in (0..len).step_by(LANES) {
        // SAFETY: nothing is read; an address may be any.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at).cast()) };
    }
}

/// The elements of `row` times `scale`, rounded, as pairs; their number is even.
///
/// # Safety
/// AVX512-BF16; `out` has room for the pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn round_row(row: &[f32], scale: f32, out: *mut u32) {
    let scale = _mm512_set1_ps(scale);
    for first in (0..row.len()).step_by(2 * LANES) {
        let mask = first_bits((row.len() - first).min(2 * LANES));
        let written = first_bits(((row.len() - first) / 2).min(LANES));
        // SAFETY: the masks leave what the row has from `first` on, and half as many pairs.
        unsafe {
            let x = row.as_ptr().add(first);
            let low = _mm512_maskz_loadu_ps(mask as u16, x);
            let high = _mm512_maskz_loadu_ps((mask >> LANES) as u16, x.wrapping_add(LANES));
            let pairs = round(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
            _mm512_mask_storeu_epi32(out.add(first / 2).cast(), written as u16, pairs);
        }
    }
}

/// Pairs of an element of `first` and one of `second`, which is zeros if there is none.
///
/// # Safety
/// AVX512-BF16; `second` is as long as `first`, and `out` has room for as many pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn join_rows(first: &[f32], second: Option<&[f32]>, out: *mut u32) {
    for start in (0..first.len()).step_by(LANES) {
        let mask = first_bits((first.len() - start).min(LANES)) as u16;
        // SAFETY: the mask leaves what the rows have from `start` on.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask, first.as_ptr().add(start));
            let high = match second {
                Some(second) => _mm512_maskz_loadu_ps(mask, second.as_ptr().add(start)),
                None => _mm512_setzero_ps(),
            };
            _mm512_mask_storeu_epi32(out.add(start).cast(), mask, interleave(low, high));
        }
    }
}

/// The lowest `count` bits of 32.
fn first_bits(count: usize) -> u32 {
    ((1_u64 << count) - 1) as u32
}

/// The elements of `low`, then those of `high`, rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the same 512 bits, as the type that is stored.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Pairs of an element of `first` and one of `second`, rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn interleave(first: __m512, second: __m512) -> __m512i {
    // SAFETY: sixteen numbers.
    let words = unsafe { _mm512_loadu_si512(INTERLEAVED.as_ptr().cast()) };
    _mm512_permutexvar_epi16(words, round(first, second))
}
