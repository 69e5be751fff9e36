//! Attention within sequences by dot products of bf16 pairs (AVX512-BF16), summed in f32; the softmax between them is f32.
//!
//! A vector holds one number of sixteen queries, as in the parent module, or a pair of numbers of each:
//!
//! 1. once a piece, keys become rows of pairs of features, and values, feature by feature, pairs of keys;
//! 2. scores [key][query] += pair of features of a key * that of sixteen queries;
//! 3. weights = e^(score - greatest score), rounded, the weights of two keys side by side;
//! 4. sums [feature][query] += a feature of two values * their weights of sixteen queries.
//!
//! A query's weights are divided by the sum of the *rounded* ones, so that they add up to one. A last key without a partner
//! is joined by a value of zeros with the weight zero.

use std::arch::x86_64::*;
use std::ops::Range;

use super::pairs::{AHEAD, Operands, ask, interleave, round_row};
use super::{Block, CHUNK, LOWEST, MAX_VECTORS, Piece, SelfAttention};
use crate::cpu::OutPtr;
use crate::cpu::bf16_gemm::dot;
use crate::cpu::exp2::exp2;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Avx512, LANES};

/// Keys, or features of values, that are multiplied at once: with [`MAX_VECTORS`] sums each they fill the registers.
const ROWS: usize = 8;

/// The queries of `piece`. The width of heads is even.
///
/// # Safety
/// AVX512-BF16; outputs of these queries are nobody else's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn run(job: &SelfAttention<'_>, piece: Piece, group: usize, out: OutPtr<f32>) {
    let keys = seen(job, piece, piece.first, piece.end);
    // SAFETY: given by the caller.
    let operands = unsafe { Operands::new(job, piece, piece.head / group * job.head_dim, keys) };
    let vectors = |first: usize| (piece.end - first).div_ceil(LANES).min(MAX_VECTORS);
    let mut scratch = Working::new(job.head_dim, vectors(piece.first) * LANES);
    let mut first = piece.first;
    while first < piece.end {
        let vectors = vectors(first);
        let block = Block { job, piece, group, first, end: piece.end.min(first + vectors * LANES), out };
        // SAFETY: given by the caller.
        unsafe {
            match vectors {
                1 => attend::<1>(&block, &operands, &mut scratch),
                2 => attend::<2>(&block, &operands, &mut scratch),
                _ => attend::<MAX_VECTORS>(&block, &operands, &mut scratch),
            }
        }
        first = block.end;
    }
}

/// Positions that the queries `first..end` see, and perhaps one more before them: pairs begin at even positions.
fn seen(job: &SelfAttention<'_>, piece: Piece, first: usize, end: usize) -> Range<usize> {
    let keys = job.seen(piece, first, end);
    keys.start / 2 * 2..keys.end
}

/// Working memory of a block of `lanes` queries.
struct Working {
    /// Pairs of features of a query, `[head_dim / 2]`.
    query: Scratch<u32>,
    /// Pairs of features, `[head_dim / 2][lanes]`, scaled.
    queries: Scratch<u32>,
    /// `[CHUNK][lanes]`
    scores: Scratch<f32>,
    /// Pairs of keys, `[CHUNK / 2][lanes]`.
    weights: Scratch<u32>,
    /// `[head_dim][lanes]`: weighted values.
    sums: Scratch<f32>,
}

impl Working {
    fn new(dim: usize, lanes: usize) -> Self {
        Self {
            query: Scratch::any(dim / 2),
            queries: Scratch::any(dim / 2 * lanes),
            scores: Scratch::any(CHUNK * lanes),
            weights: Scratch::any(CHUNK / 2 * lanes),
            sums: Scratch::any(dim * lanes),
        }
    }
}

/// `N` vectors of queries.
///
/// # Safety
/// AVX512-BF16; `block` has at most `N * 16` queries, `scratch` is as large; outputs of these queries are nobody else's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn attend<const N: usize>(block: &Block<'_>, operands: &Operands, scratch: &mut Working) {
    let Block { job, piece, first, end, .. } = *block;
    let (dim, lanes) = (job.head_dim, N * LANES);
    let queries = &mut scratch.queries[..dim / 2 * lanes];
    let scores = &mut scratch.scores[..CHUNK * lanes];
    let weights = &mut scratch.weights[..CHUNK / 2 * lanes];
    let sums = &mut scratch.sums[..dim * lanes];
    for lane in 0..lanes {
        // Lanes beyond the last query repeat it; their results are dropped.
        let at = (first + lane).min(end - 1);
        ask(&job.q, piece.start + at + AHEAD, piece.head * dim, dim);
        let row = &job.q.row(piece.start + at)[piece.head * dim..][..dim];
        // SAFETY: half as many pairs as features; the instructions are given.
        unsafe { round_row(row, job.params.scale, scratch.query.as_mut_ptr()) };
        for (pair, numbers) in scratch.query.iter().enumerate() {
            queries[pair * lanes + lane] = *numbers;
        }
    }
    let mut max = [_mm512_set1_ps(LOWEST); N];
    let mut total = [_mm512_setzero_ps(); N];
    let keys = seen(job, piece, first, end);
    for start in keys.clone().step_by(CHUNK) {
        let count = CHUNK.min(keys.end - start);
        let skipped = start - operands.start;
        let rows = &operands.keys[skipped * (dim / 2)..][..count * (dim / 2)];
        let values = &operands.values[skipped / 2 * dim..][..count.div_ceil(2) * dim];
        // SAFETY: scratch and operands are cut above; the instructions are given.
        unsafe {
            score::<N>(queries, rows, count, scores);
            block.adjust::<Avx512, N>(start, count, scores);
            let factor = soften::<N>(scores, count, weights, &mut max, &mut total);
            let factor = (start > keys.start).then_some(factor);
            let weights = &weights[..count.div_ceil(2) * lanes];
            let whole = dim / ROWS * ROWS;
            for d in (0..whole).step_by(ROWS) {
                add_values::<ROWS, N>(weights, values, (dim, d), factor, sums);
            }
            for d in whole..dim {
                add_values::<1, N>(weights, values, (dim, d), factor, sums);
            }
        }
    }
    // SAFETY: given by the caller.
    unsafe { block.write::<Avx512, N>(sums, &total) };
}

/// `scores[key][query] = queries . keys[key]` for `count` keys. Rows up to the next multiple of [`ROWS`] are written, too.
///
/// # Safety
/// AVX512-BF16; `keys` is `[count][pairs]` for the pairs of features that `queries` has.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn score<const N: usize>(queries: &[u32], keys: &[u32], count: usize, scores: &mut [f32]) {
    let lanes = N * LANES;
    let pairs = queries.len() / lanes;
    for first in (0..count).step_by(ROWS) {
        let scores = scores[first * lanes..][..ROWS * lanes].as_mut_ptr();
        // Rows beyond the last key read the last one.
        let mut rows = [keys.as_ptr(); ROWS];
        for (m, row) in rows.iter_mut().enumerate() {
            *row = row.wrapping_add((first + m).min(count - 1) * pairs);
        }
        let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
        for pair in 0..pairs {
            let mut x = [_mm512_setzero_si512(); N];
            for n in 0..N {
                // SAFETY: a pair of features of N vectors of queries.
                x[n] = unsafe { _mm512_loadu_si512(queries.as_ptr().add(pair * lanes + n * LANES).cast()) };
            }
            for m in 0..ROWS {
                // SAFETY: a pair of features of a key.
                let key = _mm512_set1_epi32(unsafe { *rows[m].add(pair) }.cast_signed());
                for n in 0..N {
                    sums[m][n] = dot(sums[m][n], x[n], key);
                }
            }
        }
        for m in 0..ROWS {
            for n in 0..N {
                // SAFETY: so many rows of N vectors.
                unsafe { _mm512_storeu_ps(scores.add(m * lanes + n * LANES), sums[m][n]) };
            }
        }
    }
}

/// Turns scores into unnormalised weights, pairs of keys side by side; returns by what earlier sums must be scaled.
///
/// # Safety
/// AVX512-BF16; `scores` has `count` rows of `N` vectors, `weights` half as many, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn soften<const N: usize>(
    scores: &[f32],
    count: usize,
    weights: &mut [u32],
    max: &mut [__m512; N],
    total: &mut [__m512; N],
) -> [__m512; N] {
    let lanes = N * LANES;
    let pairs = count.div_ceil(2);
    let scores = scores[..count * lanes].as_ptr();
    let weights = weights[..pairs * lanes].as_mut_ptr();
    let mut factor = [_mm512_setzero_ps(); N];
    for n in 0..N {
        let old = max[n];
        for key in 0..count {
            // SAFETY: a row of N vectors.
            max[n] = _mm512_max_ps(max[n], unsafe { _mm512_loadu_ps(scores.add(key * lanes + n * LANES)) });
        }
        factor[n] = exp_of_difference(old, max[n]);
        let mut sum = _mm512_mul_ps(total[n], factor[n]);
        for pair in 0..pairs {
            let at = 2 * pair * lanes + n * LANES;
            // SAFETY: rows of N vectors.
            let (first, second) = unsafe {
                let first = exp_of_difference(_mm512_loadu_ps(scores.add(at)), max[n]);
                let second = if 2 * pair + 1 < count {
                    exp_of_difference(_mm512_loadu_ps(scores.add(at + lanes)), max[n])
                } else {
                    _mm512_setzero_ps()
                };
                (first, second)
            };
            let rounded = interleave(first, second);
            // SAFETY: half as many rows.
            unsafe { _mm512_storeu_si512(weights.add(pair * lanes + n * LANES).cast(), rounded) };
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(rounded)));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(rounded, high)));
        }
        total[n] = sum;
    }
    factor
}

/// `e^(x - y)` for `x <= y`; what is far below is zero. Both may be -1e30, and `x` minus infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn exp_of_difference(x: __m512, y: __m512) -> __m512 {
    exp2(_mm512_mul_ps(_mm512_sub_ps(x, y), _mm512_set1_ps(std::f32::consts::LOG2_E)))
}

/// `sums[d + m][query] = sums[d + m][query] * factor + weights[key][query] * values[key][d + m]`, pairs of keys in order;
/// without a factor the old sums count as zero.
///
/// # Safety
/// AVX512-BF16; `values` is `[pairs][dim]` for the pairs of keys that `weights` has, `sums` `[dim]` rows of `N` vectors; features
/// `d..d + M` exist.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_values<const M: usize, const N: usize>(
    weights: &[u32],
    values: &[u32],
    (dim, d): (usize, usize),
    factor: Option<[__m512; N]>,
    sums: &mut [f32],
) {
    let lanes = N * LANES;
    let sums = sums[d * lanes..][..M * lanes].as_mut_ptr();
    let mut acc = [[_mm512_setzero_ps(); N]; M];
    if let Some(factor) = factor {
        for m in 0..M {
            for n in 0..N {
                // SAFETY: so many rows of N vectors.
                acc[m][n] =
                    unsafe { _mm512_mul_ps(_mm512_loadu_ps(sums.add(m * lanes + n * LANES)), factor[n]) };
            }
        }
    }
    for (weights, values) in weights.chunks_exact(lanes).zip(values.chunks_exact(dim)) {
        let mut weight = [_mm512_setzero_si512(); N];
        for n in 0..N {
            // SAFETY: N vectors.
            weight[n] = unsafe { _mm512_loadu_si512(weights.as_ptr().add(n * LANES).cast()) };
        }
        for m in 0..M {
            // SAFETY: a feature, given by the caller.
            let value = _mm512_set1_epi32(unsafe { *values.get_unchecked(d + m) }.cast_signed());
            for n in 0..N {
                acc[m][n] = dot(acc[m][n], weight[n], value);
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            // SAFETY: as where they were loaded.
            unsafe { _mm512_storeu_ps(sums.add(m * lanes + n * LANES), acc[m][n]) };
        }
    }
}
