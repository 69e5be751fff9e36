//! Attention over a cache of scaled 16-bit floats by multiply-adds of 16-bit floats (AVX512-FP16): twice the rate of f32,
//! and keys and values need not be widened.
//!
//! For each chunk of keys and each block of up to twelve query rows:
//!
//! 1. scores [rows][64 keys] = queries * keys, chains of [`CHAIN`] features, their sums in f16, from 128 features in f32;
//! 2. weights = e^(score - greatest score) in f32, times the scales of the values, rounded to f16;
//! 3. sums [rows][features] += weights * values: the keys of a tile in one chain, the chunk in f16, then f32.
//!
//! Queries, and the weights of a chunk, are scaled by a power of two to fill the range (`halves.rs`). A row's result is made
//! of its own numbers alone and in an order given by positions, so its bits do not depend on its neighbours.

use std::arch::x86_64::*;
use std::ops::Range;

use super::softmax::{Softmax, join, positive_zeros};
use super::tiles::{Ahead, Gathered, Tiles, in_place};
use super::{CHUNK, Job, Piece, SEGMENT, TILES};
use crate::cpu::halves::{FACTOR_EXPONENT, pack_block, scale_to, widen};
use crate::cpu::line_gemm::MAX_BLOCK_ROWS;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Avx512, LANES, Simd};
use crate::ops::AttnParams;

/// Features that are summed one after another.
const CHAIN: usize = 16;
/// Features that are summed in f16.
const RUN: usize = 8 * CHAIN;
/// Lanes of a vector.
const HALF_LANES: usize = 2 * LANES;
/// Vectors of keys of a chunk.
const VECTORS: usize = CHUNK / HALF_LANES;

/// Calls `$self.$name::<M, N>($args)` for `$rows` rows, rounded up to some number that has a kernel, and `$vectors`.
macro_rules! with_rows {
    ($name:ident, ($rows:expr, $vectors:expr), $($arg:expr),* $(,)?) => {
        with_rows!(@cases $name, ($rows, $vectors), ($($arg),*), 1 2 3 4 6 8 12)
    };
    (@cases $name:ident, ($rows:expr, $vectors:expr), $args:tt, $($m:literal)*) => {
        match ($rows, $vectors) {
            $((..=$m, 1) => with_rows!(@call $name, $m, 1, $args),
            (..=$m, _) => with_rows!(@call $name, $m, 2, $args),)*
            (rows, _) => unreachable!("no kernel for {rows} rows"),
        }
    };
    (@call $name:ident, $m:literal, $n:literal, ($($arg:expr),*)) => {
        // SAFETY: given by the caller.
        unsafe { $name::<$m, $n>($($arg),*) }
    };
}

/// Rows of the kernel that computes `rows` rows.
fn kernel_rows(rows: usize) -> usize {
    [1, 2, 3, 4, 6, 8].into_iter().find(|m| *m >= rows).unwrap_or(MAX_BLOCK_ROWS)
}

/// Keys and values of scaled f16, and their scales.
#[derive(Clone, Copy)]
pub(super) struct Cache<'a> {
    pub(super) k: &'a [u16],
    pub(super) v: &'a [u16],
    pub(super) k_scales: &'a [f32],
    pub(super) v_scales: &'a [f32],
}

/// Query rows that are computed together.
struct Block {
    first: usize,
    rows: usize,
    /// `[features][rows of the kernel]`, each f16 twice, so that one load of 32 bits fills a vector with it.
    queries: Scratch<u32>,
    scales: [f32; MAX_BLOCK_ROWS],
}

#[repr(C, align(64))]
struct Scores([[f32; CHUNK]; MAX_BLOCK_ROWS]);

/// Each f16 twice.
#[repr(C, align(64))]
struct Weights([[u32; CHUNK]; MAX_BLOCK_ROWS]);

/// What the rows of `piece` see of the positions `keys`, which begin where a segment does or before all that is seen.
///
/// # Safety
/// AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16,f16c,fma,avx2")]
pub(super) unsafe fn attend(job: &Job<'_>, piece: Piece, keys: Range<usize>, cache: Cache<'_>) -> Softmax {
    let Job { store, params, group, .. } = *job;
    let (dim, padded) = (store.head_dim, store.padded_dim);
    let num_rows = (piece.end - piece.first) * group;
    let position = job.position(piece);
    if job.in_place() {
        // The first keys are on their way while the queries are packed.
        let start = keys.start / CHUNK * CHUNK;
        let first = in_place(job, piece, (start, CHUNK.min(keys.end - start)), cache.k, cache.v);
        let first = Ahead::keys(&first, dim);
        for line in 0..dim {
            // SAFETY: the instructions are given.
            unsafe { first.ask::<Avx512>(line) };
        }
    }
    // SAFETY: the instructions are given.
    let blocks = unsafe { query_blocks(job, piece) };
    let mut total = Softmax::new(num_rows, padded);
    let mut segment = Softmax::new(num_rows, padded);
    let mut gathered = Gathered::<u16>::default();
    let mut scores = Scores([[0.0; CHUNK]; MAX_BLOCK_ROWS]);
    // Rows that are none have the weight zero.
    let mut weights = Weights([[0; CHUNK]; MAX_BLOCK_ROWS]);

    for start in (keys.start / CHUNK * CHUNK..keys.end).step_by(CHUNK) {
        let num_keys = CHUNK.min(keys.end - start);
        let tiles = gathered.tiles(job, piece, (start, num_keys), cache.k, cache.v);
        let scales = scales_of(job, piece, (start, num_keys), cache);
        // While the keys are read the values are on their way, and then the next keys.
        let mut values = Ahead::values(&tiles, padded);
        let mut next = if start + CHUNK < keys.end && job.in_place() {
            let num_keys = CHUNK.min(keys.end - start - CHUNK);
            Ahead::keys(&in_place(job, piece, (start + CHUNK, num_keys), cache.k, cache.v), dim)
        } else {
            Ahead::nothing()
        };
        for block in &blocks {
            let queries = block.queries.as_ptr();
            let vectors = num_keys.div_ceil(HALF_LANES);
            with_rows!(score, (block.rows, vectors), queries, &tiles, dim, values, &mut scores);
            let mut scales_back = [1.0; MAX_BLOCK_ROWS];
            for row in 0..block.rows {
                let at = position + (block.first + row) / group;
                let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
                let seen = from.saturating_sub(start)..(at + 1).saturating_sub(start).min(num_keys);
                let sums = &mut segment.sums[(block.first + row) * padded..][..padded];
                let running =
                    (&mut segment.row_max[block.first + row], &mut segment.row_sum[block.first + row]);
                let (scores, weights) = (&scores.0[row], &mut weights.0[row]);
                // SAFETY: `sums` is whole vectors; the instructions are given.
                scales_back[row] = unsafe {
                    soften(scores, seen, params, (block.scales[row], &scales), running, sums, weights)
                };
            }
            let sums = &mut segment.sums[block.first * padded..][..block.rows * padded];
            for d in (0..padded).step_by(VECTORS * HALF_LANES) {
                let vectors = (padded - d).div_ceil(HALF_LANES);
                with_rows!(
                    add_values,
                    (block.rows, vectors),
                    &weights,
                    &tiles,
                    (d, padded),
                    num_keys,
                    next,
                    &scales_back,
                    sums,
                );
                next = Ahead::nothing();
            }
            values = Ahead::nothing();
        }
        if (start + CHUNK).is_multiple_of(SEGMENT) || start + CHUNK >= keys.end {
            // SAFETY: the sums are whole vectors; the instructions are given.
            unsafe {
                positive_zeros::<Avx512>(&mut segment.sums);
                join::<Avx512>(&mut total, &segment);
            }
            segment.clear();
        }
    }
    total
}

/// # Safety
/// AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16,f16c,fma,avx2")]
unsafe fn query_blocks(job: &Job<'_>, piece: Piece) -> Vec<Block> {
    let Job { q, store, group, .. } = *job;
    let dim = store.head_dim;
    let num_rows = (piece.end - piece.first) * group;
    let num_blocks = num_rows.div_ceil(MAX_BLOCK_ROWS);
    let nothing = vec![0.0; dim];
    let mut blocks = Vec::with_capacity(num_blocks);
    let mut first = 0;
    for block in 0..num_blocks {
        let rows = (num_rows - first).div_ceil(num_blocks - block);
        let width = kernel_rows(rows);
        let mut sources: [&[f32]; MAX_BLOCK_ROWS] = [&nothing; MAX_BLOCK_ROWS];
        for (row, source) in (first..).zip(&mut sources[..rows]) {
            let head = piece.kv_head * group + row % group;
            *source = &q.row(piece.first + row / group)[head * dim..][..dim];
        }
        let mut queries = Scratch::any(width * dim);
        let mut scales = [1.0; MAX_BLOCK_ROWS];
        // SAFETY: all sources have `dim` elements.
        unsafe { pack_block(&sources[..width], dim, &mut queries, &mut scales[..width]) };
        blocks.push(Block { first, rows, queries, scales });
        first += rows;
    }
    blocks
}

/// Scales of the keys and of the values of a chunk.
type Scales = ([f32; CHUNK], [f32; CHUNK]);

fn scales_of(job: &Job<'_>, piece: Piece, (start, num_keys): (usize, usize), cache: Cache<'_>) -> Scales {
    let Job { store, meta, .. } = *job;
    let (mut key_scales, mut value_scales) = ([0.0; CHUNK], [0.0; CHUNK]);
    // A tile's lie side by side if its keys do.
    let step = if job.in_place() { LANES } else { 1 };
    for key in (0..num_keys).step_by(step) {
        let slot = meta.slot(piece.seq, start + key);
        let at = ((slot / LANES) * store.num_kv_heads + piece.kv_head) * LANES + slot % LANES;
        key_scales[key..key + step].copy_from_slice(&cache.k_scales[at..at + step]);
        value_scales[key..key + step].copy_from_slice(&cache.v_scales[at..at + step]);
    }
    (key_scales, value_scales)
}

/// `scores[row][key] = queries[row] . keys[key]` for `M` rows and `N` vectors of keys, all scaled.
///
/// # Safety
/// AVX512-FP16; `queries` is `[dim][M]`; the tiles point to `dim * 16` keys.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16,f16c,fma,avx2")]
unsafe fn score<const M: usize, const N: usize>(
    queries: *const u32,
    tiles: &Tiles<u16>,
    dim: usize,
    ahead: Ahead,
    scores: &mut Scores,
) {
    let mut d = 0;
    while d < dim {
        let (first_run, run_end) = (d == 0, dim.min(d + RUN));
        let mut run = [[_mm512_setzero_ph(); N]; M];
        while d < run_end {
            let end = run_end.min(d + CHAIN);
            let mut chain = [[_mm512_setzero_ph(); N]; M];
            while d < end {
                // SAFETY: a feature below `dim`, given by the caller.
                unsafe {
                    ahead.ask::<Avx512>(d);
                    let mut keys = [_mm512_setzero_ph(); N];
                    for n in 0..N {
                        let low = _mm256_loadu_si256(tiles[2 * n].0.add(d * LANES).cast());
                        let high = _mm256_loadu_si256(tiles[2 * n + 1].0.add(d * LANES).cast());
                        keys[n] =
                            _mm512_castsi512_ph(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high));
                    }
                    for m in 0..M {
                        let q =
                            _mm512_castsi512_ph(_mm512_set1_epi32((*queries.add(d * M + m)).cast_signed()));
                        for n in 0..N {
                            chain[m][n] = _mm512_fmadd_ph(q, keys[n], chain[m][n]);
                        }
                    }
                }
                d += 1;
            }
            for m in 0..M {
                for n in 0..N {
                    run[m][n] = _mm512_add_ph(run[m][n], chain[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                for (half, mut sums) in widen(run[m][n]).into_iter().enumerate() {
                    // SAFETY: a row has `CHUNK` scores.
                    unsafe {
                        let p = scores.0[m].as_mut_ptr().add(n * HALF_LANES + half * LANES);
                        if !first_run {
                            sums = _mm512_add_ps(_mm512_loadu_ps(p), sums);
                        }
                        _mm512_storeu_ps(p, sums);
                    }
                }
            }
        }
    }
}

/// Turns a row's scaled scores of one chunk into scaled weights (0 outside of `seen`) and rescales what came before;
/// returns what the sums of these weights are to be multiplied by.
///
/// # Safety
/// AVX512-FP16; `sums` is whole vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16,f16c,fma,avx2")]
unsafe fn soften(
    scores: &[f32; CHUNK],
    seen: Range<usize>,
    params: &AttnParams,
    (query_scale, (key_scales, value_scales)): (f32, &Scales),
    (row_max, row_sum): (&mut f32, &mut f32),
    sums: &mut [f32],
    weights: &mut [u32; CHUNK],
) -> f32 {
    if seen.is_empty() {
        weights.fill(0);
        return 1.0;
    }
    // SAFETY: scores, scales and weights are CHUNK long, `sums` whole vectors; the instructions are given.
    unsafe {
        let (query_scale, scale) = (_mm512_set1_ps(query_scale), _mm512_set1_ps(params.scale));
        let seen = (u64::MAX >> (CHUNK - seen.len())) << seen.start;
        let mut x = [_mm512_setzero_ps(); TILES];
        let mut max = _mm512_set1_ps(*row_max);
        for t in 0..TILES {
            let score = _mm512_loadu_ps(scores.as_ptr().add(t * LANES));
            let score = _mm512_mul_ps(score, _mm512_loadu_ps(key_scales.as_ptr().add(t * LANES)));
            let mut score = _mm512_mul_ps(_mm512_mul_ps(score, query_scale), scale);
            if let Some(cap) = params.softcap {
                let capped = Avx512::to_array(score).map(|score| cap * (score / cap).tanh());
                score = _mm512_loadu_ps(capped.as_ptr());
            }
            let mask = (seen >> (t * LANES)) as u16;
            x[t] = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), mask, score);
            max = _mm512_max_ps(x[t], max);
        }
        let max = _mm512_reduce_max_ps(max);
        if *row_max != max && *row_sum > 0.0 {
            let factor = Avx512::exp(_mm512_set1_ps(*row_max - max));
            *row_sum *= _mm512_cvtss_f32(factor);
            for sums in sums.chunks_exact_mut(LANES) {
                let p = sums.as_mut_ptr();
                _mm512_storeu_ps(p, _mm512_mul_ps(_mm512_loadu_ps(p), factor));
            }
        }
        *row_max = max;
        let (mut total, mut largest) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for t in 0..TILES {
            let weight = Avx512::exp(_mm512_sub_ps(x[t], _mm512_set1_ps(max)));
            total = _mm512_add_ps(total, weight);
            x[t] = _mm512_mul_ps(weight, _mm512_loadu_ps(value_scales.as_ptr().add(t * LANES)));
            largest = _mm512_max_ps(x[t], largest);
        }
        *row_sum += _mm512_reduce_add_ps(total);
        let (factor, back) = scale_to(_mm512_reduce_max_ps(largest), FACTOR_EXPONENT);
        for t in 0..TILES {
            let scaled = _mm512_mul_ps(x[t], _mm512_set1_ps(factor));
            let half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scaled));
            let twice = _mm512_or_si512(half, _mm512_slli_epi32::<16>(half));
            _mm512_storeu_si512(weights.as_mut_ptr().add(t * LANES).cast(), twice);
        }
        back
    }
}

/// `sums[row][d..] += weights[row][key] * values[key][d..]` for `M` rows, of which as many are stored as `sums` has, and `N`
/// vectors of features.
///
/// # Safety
/// AVX512-FP16; the tiles point to `16 * padded` values; `d` is below `padded`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16,f16c,fma,avx2")]
unsafe fn add_values<const M: usize, const N: usize>(
    weights: &Weights,
    tiles: &Tiles<u16>,
    (d, padded): (usize, usize),
    num_keys: usize,
    ahead: Ahead,
    scales_back: &[f32; MAX_BLOCK_ROWS],
    sums: &mut [f32],
) {
    let rows = sums.len() / padded;
    // Features are padded to sixteen, not to whole vectors.
    let mut masks = [u32::MAX; N];
    if !(padded - d).is_multiple_of(HALF_LANES) && (padded - d) < N * HALF_LANES {
        masks[N - 1] = u32::MAX >> LANES;
    }
    let mut run = [[_mm512_setzero_ph(); N]; M];
    for first in (0..num_keys).step_by(LANES) {
        let mut values = tiles[first / LANES].1.wrapping_add(d);
        let mut chain = [[_mm512_setzero_ph(); N]; M];
        for key in first..num_keys.min(first + LANES) {
            // SAFETY: a key of the chunk and its features below `padded`.
            unsafe {
                ahead.ask::<Avx512>(key);
                let mut v = [_mm512_setzero_ph(); N];
                for n in 0..N {
                    let p = values.add(n * HALF_LANES).cast();
                    v[n] = _mm512_castsi512_ph(_mm512_maskz_loadu_epi16(masks[n], p));
                }
                for m in 0..M {
                    let weight =
                        _mm512_castsi512_ph(_mm512_set1_epi32(weights.0[m].get_unchecked(key).cast_signed()));
                    for n in 0..N {
                        chain[m][n] = _mm512_fmadd_ph(weight, v[n], chain[m][n]);
                    }
                }
            }
            values = values.wrapping_add(padded);
        }
        for m in 0..M {
            for n in 0..N {
                run[m][n] = _mm512_add_ph(run[m][n], chain[m][n]);
            }
        }
    }
    for m in 0..M {
        if m >= rows {
            break;
        }
        let back = _mm512_set1_ps(scales_back[m]);
        for n in 0..N {
            for (half, added) in widen(run[m][n]).into_iter().enumerate() {
                let column = d + n * HALF_LANES + half * LANES;
                if column < padded {
                    let p = sums[m * padded + column..][..LANES].as_mut_ptr();
                    // SAFETY: sixteen sums.
                    unsafe { _mm512_storeu_ps(p, _mm512_fmadd_ps(added, back, _mm512_loadu_ps(p))) };
                }
            }
        }
    }
}
