//! Attention within the sequences of a ragged batch, keys and values read where the projection wrote them.
//!
//! A vector holds one number of sixteen **queries**: scores are kept as `[key][query]`, so that the softmax runs down
//! the keys without a sum across lanes, and keys and values need no repacking. A piece of work is one head of one
//! sequence and some of its queries, in blocks of a few vectors. A block goes over the keys in chunks of [`CHUNK`] with
//! an online softmax from chunk to chunk; blocks and chunks begin at positions fixed by the sequence alone, so a row's
//! bits depend on nothing else in the batch. All of it is f32, unless `dots.rs` may round.

#[cfg(target_arch = "x86_64")]
mod dots;
#[cfg(target_arch = "x86_64")]
mod pairs;

use std::ops::Range;

use super::scratch::Scratch;
use super::simd::{LANES, Simd};
#[cfg(target_arch = "x86_64")]
use super::{Isa, isa};
use super::{OutPtr, Rows, Unwritten, dispatch, pool};
use crate::ops::{RelativeBias, SelfAttnParams};

/// Keys per chunk, a multiple of the rows of every kernel.
const CHUNK: usize = 64;
/// Query vectors of a block at most.
const MAX_VECTORS: usize = 3;
/// Queries of a piece at most: whole blocks.
const PIECE_QUERIES: usize = 4 * MAX_VECTORS * LANES;
/// Below every score, and finite, so that differences with it are numbers.
const LOWEST: f32 = -1e30;

/// What is to be computed.
pub(crate) struct SelfAttention<'a> {
    /// `[num_tokens, num_heads * head_dim]`
    pub(crate) q: Rows<'a>,
    /// `[num_tokens, num_kv_heads * head_dim]`
    pub(crate) k: Rows<'a>,
    pub(crate) v: Rows<'a>,
    pub(crate) head_dim: usize,
    pub(crate) cu_seqlens: &'a [u32],
    pub(crate) bias: Option<&'a RelativeBias>,
    pub(crate) params: &'a SelfAttnParams,
}

impl SelfAttention<'_> {
    /// Positions that queries `first..end` see, together.
    fn seen(&self, piece: Piece, first: usize, end: usize) -> Range<usize> {
        let from = self.params.left.map_or(0, |left| first.saturating_sub(left));
        from..self.params.right.map_or(piece.len, |right| piece.len.min(end.saturating_add(right)))
    }
}

/// Computes `job` into `y`, contiguous and of the shape of `q`.
pub(crate) fn self_attention(job: &SelfAttention<'_>, y: &mut Unwritten) {
    let SelfAttention { q, k, v, head_dim, .. } = *job;
    let (heads, kv_heads) = (q.width / head_dim, k.width / head_dim);
    assert!(q.width == heads * head_dim && k.width == kv_heads * head_dim && v.width == k.width, "heads");
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "groups of heads");
    assert!(k.num_rows == q.num_rows && v.num_rows == q.num_rows && y.len() == q.num_rows * q.width, "sizes");
    assert!(job.cu_seqlens.last().is_none_or(|last| *last as usize == q.num_rows), "sequences");
    let mut pieces = Vec::new();
    for pair in job.cu_seqlens.windows(2) {
        let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        assert!(job.bias.is_none_or(|bias| bias.reach() >= len), "reach of the bias");
        for head in 0..heads {
            for first in (0..len).step_by(PIECE_QUERIES) {
                pieces.push(Piece { start, len, head, first, end: len.min(first + PIECE_QUERIES) });
            }
        }
    }
    // The longest first, so that threads end together.
    pieces.sort_by_key(|piece| std::cmp::Reverse((piece.end - piece.first) * piece.len));
    let group = heads / kv_heads;
    let out = OutPtr::new(y);
    #[cfg(target_arch = "x86_64")]
    if job.params.bf16 && head_dim.is_multiple_of(2) && isa() == Isa::Avx512Bf16 {
        pool::run(pieces.len(), |idx| {
            // SAFETY: `isa()` returns a set only after detecting it; pieces are different queries or heads.
            unsafe { dots::run(job, pieces[idx], group, out) };
        });
        return;
    }
    pool::run(pieces.len(), |idx| {
        let piece = pieces[idx];
        dispatch!(
            run(job, piece, group, out) -> (),
            [job: &SelfAttention<'_>, piece: Piece, group: usize, out: OutPtr<f32>]
        );
    });
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    /// First row of the sequence.
    start: usize,
    len: usize,
    head: usize,
    /// Positions of the queries.
    first: usize,
    end: usize,
}

#[inline(always)]
unsafe fn run<S: Simd>(job: &SelfAttention<'_>, piece: Piece, group: usize, out: OutPtr<f32>) {
    // Kernels keep `M * N` sums in registers beside `N` vectors of operands.
    // SAFETY: given by the caller.
    unsafe {
        let most = if S::ACCUMULATORS >= 24 { MAX_VECTORS } else { 1 };
        let vectors = |first: usize| (piece.end - first).div_ceil(LANES).min(most);
        let mut scratch = Working::new(job.head_dim, vectors(piece.first) * LANES);
        let mut first = piece.first;
        while first < piece.end {
            let vectors = vectors(first);
            let block = Block { job, piece, group, first, end: piece.end.min(first + vectors * LANES), out };
            match vectors {
                _ if S::ACCUMULATORS < 4 => block.run::<S, 2, 1>(&mut scratch),
                _ if S::ACCUMULATORS < 24 => block.run::<S, 4, 1>(&mut scratch),
                1 => block.run::<S, 8, 1>(&mut scratch),
                2 => block.run::<S, 8, 2>(&mut scratch),
                _ => block.run::<S, 8, 3>(&mut scratch),
            }
            first = block.end;
        }
    }
}

/// Working memory of a block of `lanes` queries.
struct Working {
    /// `[head_dim][lanes]`, scaled.
    queries: Scratch<f32>,
    /// `[CHUNK][lanes]`
    scores: Scratch<f32>,
    /// `[head_dim][lanes]`: weighted values.
    sums: Scratch<f32>,
}

impl Working {
    fn new(head_dim: usize, lanes: usize) -> Self {
        let rows = |rows| Scratch::any(rows * lanes);
        Self { queries: rows(head_dim), scores: rows(CHUNK), sums: rows(head_dim) }
    }
}

/// Queries `first..end` of a piece.
struct Block<'a> {
    job: &'a SelfAttention<'a>,
    piece: Piece,
    group: usize,
    first: usize,
    end: usize,
    out: OutPtr<f32>,
}

impl Block<'_> {
    /// `N` vectors of queries; kernels take `M` keys, or `M` features of values, at a time.
    ///
    /// # Safety
    /// `end - first` is at most `N * 16`; `scratch` is as large; these queries of this head are nobody else's; the
    /// instruction set of `S`.
    #[inline(always)]
    unsafe fn run<S: Simd, const M: usize, const N: usize>(&self, scratch: &mut Working) {
        let Self { job, piece, group, first, end, .. } = *self;
        let dim = job.head_dim;
        let lanes = N * LANES;
        let (queries, scores, sums) = (
            &mut scratch.queries[..dim * lanes],
            &mut scratch.scores[..CHUNK * lanes],
            &mut scratch.sums[..dim * lanes],
        );
        for lane in 0..lanes {
            // Lanes beyond the last query repeat it; their results are dropped.
            let at = (first + lane).min(end - 1);
            let source = &job.q.row(piece.start + at)[piece.head * dim..][..dim];
            for (d, x) in source.iter().enumerate() {
                queries[d * lanes + lane] = x * job.params.scale;
            }
        }
        let Range { start: from, end: to } = job.seen(piece, first, end);
        let kv = (piece.head / group) * dim;
        // SAFETY: each row of keys and values has `dim` elements from `kv` on, and rows `start..start + len` exist, which
        // slicing the last one checks; scratch is sized above.
        unsafe {
            let mut max = [S::splat(LOWEST); N];
            let mut total = [S::splat(0.0); N];
            let last = piece.start + piece.len - 1;
            assert!(job.k.row(last).len() >= kv + dim && job.v.row(last).len() >= kv + dim, "rows");
            for start in (from..to).step_by(CHUNK) {
                let count = CHUNK.min(to - start);
                let row = piece.start + start;
                let keys = job.k.row(row).as_ptr().add(kv);
                score::<S, M, N>(queries, (keys, job.k.stride), dim, count, scores);
                self.adjust::<S, N>(start, count, scores);
                let factor = soften::<S, N>(scores, count, &mut max, &mut total);
                let values = job.v.row(row).as_ptr().add(kv);
                let factor = (start > from).then_some(factor);
                let whole = dim / M * M;
                for d in (0..whole).step_by(M) {
                    add_values::<S, M, N>(scores, (values, job.v.stride), count, d, factor, sums);
                }
                for d in whole..dim {
                    add_values::<S, 1, N>(scores, (values, job.v.stride), count, d, factor, sums);
                }
            }
            self.write::<S, N>(sums, &total);
        }
    }

    /// Writes `sums`, `[head_dim][N * 16]`, divided by the totals of their weights.
    ///
    /// # Safety
    /// These queries of this head are nobody else's; the instruction set of `S`.
    #[inline(always)]
    unsafe fn write<S: Simd, const N: usize>(&self, sums: &[f32], total: &[S::V; N]) {
        let Self { job, piece, first, end, out, .. } = *self;
        let (dim, lanes) = (job.head_dim, N * LANES);
        for n in 0..N {
            // SAFETY: the instruction set is given.
            let scale = unsafe { S::to_array(S::div(S::splat(1.0), total[n])) };
            for (lane, scale) in scale.iter().enumerate() {
                let at = first + n * LANES + lane;
                if at >= end {
                    break;
                }
                // SAFETY: a row of `y`, which is as large as `q`; nobody else's, given by the caller.
                let y = unsafe { out.slice((piece.start + at) * job.q.width + piece.head * dim, dim) };
                for (d, y) in y.iter_mut().enumerate() {
                    *y = sums[d * lanes + n * LANES + lane] * scale;
                }
            }
        }
    }

    /// Bias, cap and mask of the scores with `count` keys from `start` on.
    #[inline(always)]
    unsafe fn adjust<S: Simd, const N: usize>(&self, start: usize, count: usize, scores: &mut [f32]) {
        let Self { job, piece, first, end, .. } = *self;
        let lanes = N * LANES;
        if let Some(bias) = job.bias {
            let values = bias.head(piece.head);
            for key in 0..count {
                // Lane l is the query at first + l.
                let at = first + bias.reach() - 1 - (start + key);
                let values = &values[at..][..lanes];
                // SAFETY: both slices have N vectors.
                unsafe {
                    let scores = scores[key * lanes..][..lanes].as_mut_ptr();
                    for n in 0..N {
                        let p = scores.add(n * LANES);
                        S::store(p, S::add(S::load(p), S::load(values.as_ptr().add(n * LANES))));
                    }
                }
            }
        }
        if let Some(cap) = job.params.softcap {
            for score in &mut scores[..count * lanes] {
                *score = cap * (*score / cap).tanh();
            }
        }
        // Every query of the block sees every key of the chunk, mostly.
        let (last_query, last_key) = (end - 1, start + count - 1);
        let all_left = job.params.left.is_none_or(|left| start + left >= last_query);
        let all_right = job.params.right.is_none_or(|right| last_key <= first + right);
        if all_left && all_right {
            return;
        }
        for key in 0..count {
            let at = start + key;
            let begin = job.params.right.map_or(0, |right| at.saturating_sub(right).saturating_sub(first));
            let stop = job.params.left.map_or(lanes, |left| (at + left + 1).saturating_sub(first));
            let row = &mut scores[key * lanes..][..lanes];
            row[..begin.min(lanes)].fill(f32::NEG_INFINITY);
            row[stop.min(lanes)..].fill(f32::NEG_INFINITY);
        }
    }
}

/// `scores[key][query] = queries . keys[key]` for `count` keys, each a chain of multiply-adds over the features in order.
/// Rows up to the next multiple of `M` are written, too.
///
/// # Safety
/// `keys` is the first of `count` rows of `dim` elements, a stride apart; the instruction set of `S`.
#[inline(always)]
unsafe fn score<S: Simd, const M: usize, const N: usize>(
    queries: &[f32],
    keys: (*const f32, usize),
    dim: usize,
    count: usize,
    scores: &mut [f32],
) {
    let lanes = N * LANES;
    let queries = queries[..dim * lanes].as_ptr();
    for first in (0..count).step_by(M) {
        let scores = scores[first * lanes..][..M * lanes].as_mut_ptr();
        // SAFETY: given by the caller; rows beyond the last key read the last one.
        unsafe {
            let rows: [*const f32; M] =
                std::array::from_fn(|m| keys.0.add((first + m).min(count - 1) * keys.1));
            let mut sums = [[S::splat(0.0); N]; M];
            for d in 0..dim {
                let x: [S::V; N] = std::array::from_fn(|n| S::load(queries.add(d * lanes + n * LANES)));
                for m in 0..M {
                    let key = S::splat(*rows[m].add(d));
                    for n in 0..N {
                        sums[m][n] = S::fma(x[n], key, sums[m][n]);
                    }
                }
            }
            for m in 0..M {
                for n in 0..N {
                    S::store(scores.add(m * lanes + n * LANES), sums[m][n]);
                }
            }
        }
    }
}

/// Turns scores into unnormalised weights; returns by what earlier sums must be scaled.
#[inline(always)]
unsafe fn soften<S: Simd, const N: usize>(
    scores: &mut [f32],
    count: usize,
    max: &mut [S::V; N],
    total: &mut [S::V; N],
) -> [S::V; N] {
    let lanes = N * LANES;
    let scores = scores[..count * lanes].as_mut_ptr();
    // SAFETY: `scores` has `count` rows of N vectors; the instruction set is given.
    unsafe {
        let old = *max;
        for key in 0..count {
            for n in 0..N {
                max[n] = S::max(max[n], S::load(scores.add(key * lanes + n * LANES)));
            }
        }
        let mut factor = [S::splat(0.0); N];
        for n in 0..N {
            factor[n] = S::exp(S::sub(old[n], max[n]));
            total[n] = S::mul(total[n], factor[n]);
        }
        for key in 0..count {
            for n in 0..N {
                let p = scores.add(key * lanes + n * LANES);
                let weight = S::exp(S::sub(S::load(p), max[n]));
                S::store(p, weight);
                total[n] = S::add(total[n], weight);
            }
        }
        factor
    }
}

/// `sums[d + m][query] = sums[d + m][query] * factor + weights[key][query] * values[key][d + m]`, keys in order; without
/// a factor the old sums count as zero.
///
/// # Safety
/// `values` is the first of `count` rows with at least `d + M` elements, a stride apart; the instruction set of `S`.
#[inline(always)]
unsafe fn add_values<S: Simd, const M: usize, const N: usize>(
    weights: &[f32],
    values: (*const f32, usize),
    count: usize,
    d: usize,
    factor: Option<[S::V; N]>,
    sums: &mut [f32],
) {
    let lanes = N * LANES;
    let weights = weights[..count * lanes].as_ptr();
    let sums = sums[d * lanes..][..M * lanes].as_mut_ptr();
    // SAFETY: given by the caller and by the slices above.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        if let Some(factor) = factor {
            for m in 0..M {
                for n in 0..N {
                    acc[m][n] = S::mul(S::load(sums.add(m * lanes + n * LANES)), factor[n]);
                }
            }
        }
        for key in 0..count {
            let row = values.0.add(key * values.1 + d);
            let weight: [S::V; N] = std::array::from_fn(|n| S::load(weights.add(key * lanes + n * LANES)));
            for m in 0..M {
                let value = S::splat(*row.add(m));
                for n in 0..N {
                    acc[m][n] = S::fma(weight[n], value, acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                S::store(sums.add(m * lanes + n * LANES), acc[m][n]);
            }
        }
    }
}
