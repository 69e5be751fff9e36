//! Products of bf16 pairs by dot products (AVX512-BF16).

use std::arch::x86_64::*;

use super::pairs::{Extent, Scores, TILE_PAIRS, Unit, Weights};
use super::tiles::Ahead;
use super::{CHUNK, TILES};
use crate::cpu::amx::{TILE_COLS, TILE_ROWS};
use crate::cpu::bf16_gemm::dot;
use crate::cpu::simd::{Avx512, LANES};

/// Rows that are multiplied at once: with [`TILES`] vectors each they fill the registers.
const ROWS: usize = 6;

/// Pairs of keys in a tile of the cache.
const TILE_PAIRS_OF_KEYS: usize = LANES / 2;

/// Needs AVX512-BF16.
pub(super) struct Dots;

/// Calls `$name::<M, ..>($args)` for `$rows` rows.
macro_rules! with_rows {
    ($rows:expr, $name:ident $(, $n:literal)?; $($arg:expr),* $(,)?) => {
        match $rows {
            // SAFETY: given by the caller.
            1 => unsafe { $name::<1 $(, $n)?>($($arg),*) },
            // SAFETY: given by the caller.
            2 => unsafe { $name::<2 $(, $n)?>($($arg),*) },
            // SAFETY: given by the caller.
            3 => unsafe { $name::<3 $(, $n)?>($($arg),*) },
            // SAFETY: given by the caller.
            4 => unsafe { $name::<4 $(, $n)?>($($arg),*) },
            // SAFETY: given by the caller.
            5 => unsafe { $name::<5 $(, $n)?>($($arg),*) },
            // SAFETY: given by the caller.
            _ => unsafe { $name::<ROWS $(, $n)?>($($arg),*) },
        }
    };
}

impl Unit for Dots {
    unsafe fn begin() {}

    unsafe fn end() {}

    unsafe fn score(queries: &[u16], keys: &[u32], extent: Extent, scores: &mut Scores) {
        let depth = extent.depth;
        assert!(keys.len() == CHUNK * depth / 2, "sizes");
        let keys = std::array::from_fn(|tile| keys[tile * depth / 2 * LANES..].as_ptr());
        // SAFETY: four tiles of keys; the rest is given by the caller.
        unsafe { score(queries, keys, extent, Ahead::nothing(), scores) };
    }

    unsafe fn add_values(weights: &Weights, values: &[u32], extent: Extent, sums: &mut [f32]) {
        let depth = extent.depth;
        assert!(values.len() == CHUNK / 2 * depth, "sizes");
        let half_len = depth / LANES * TILE_PAIRS;
        let tile = |tile: usize| values[tile / 2 * half_len + tile % 2 * TILE_PAIRS / 2..].as_ptr();
        let values =
            Values { tiles: std::array::from_fn(tile), pair_stride: LANES, column_stride: TILE_PAIRS };
        // SAFETY: a chunk of values; the rest is given by the caller.
        unsafe { add_values(weights, &values, extent, Ahead::nothing(), sums) };
    }
}

/// The values of a chunk, in pairs of keys.
pub(super) struct Values {
    /// Of eight pairs each.
    pub(super) tiles: [*const u32; TILES],
    /// From a pair's features to the next pair's.
    pub(super) pair_stride: usize,
    /// From sixteen features to the next.
    pub(super) column_stride: usize,
}

/// [`Unit::score`] of keys `[TILES][depth / 2][16]`; asks for something on the way.
///
/// # Safety
/// AVX512-BF16; a tile of keys has `depth / 2` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2,avx512bf16")]
pub(super) unsafe fn score(
    queries: &[u16],
    keys: [*const u32; TILES],
    extent: Extent,
    ahead: Ahead,
    scores: &mut Scores,
) {
    let Extent { depth, rows, keys: num_keys } = extent;
    assert!(queries.len() == TILE_ROWS * depth, "sizes");
    let mut ahead = ahead;
    for first in (0..rows.min(TILE_ROWS)).step_by(ROWS) {
        let count = rows.min(TILE_ROWS) - first;
        let queries = queries[first * depth..].as_ptr().cast();
        let scores = scores.0[first..].as_mut_ptr();
        match num_keys.div_ceil(LANES) {
            1 => with_rows!(count, score_rows, 1; queries, keys, depth, ahead, scores),
            2 => with_rows!(count, score_rows, 2; queries, keys, depth, ahead, scores),
            3 => with_rows!(count, score_rows, 3; queries, keys, depth, ahead, scores),
            _ => with_rows!(count, score_rows, 4; queries, keys, depth, ahead, scores),
        }
        ahead = Ahead::nothing();
    }
}

/// [`Unit::add_values`]; asks for something on the way.
///
/// # Safety
/// AVX512-BF16; the tiles of values have pairs of `depth` features for all keys.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2,avx512bf16")]
pub(super) unsafe fn add_values(
    weights: &Weights,
    values: &Values,
    extent: Extent,
    ahead: Ahead,
    sums: &mut [f32],
) {
    let Extent { depth, rows, .. } = extent;
    assert!(depth.is_multiple_of(TILE_COLS) && sums.len() == TILE_ROWS * depth, "whole tiles");
    let mut ahead = ahead;
    for first in (0..rows.min(TILE_ROWS)).step_by(ROWS) {
        let count = rows.min(TILE_ROWS) - first;
        let weights = weights.0[first..].as_ptr().cast();
        let mut column = 0;
        while column < depth / LANES {
            let sums = sums[first * depth + column * LANES..].as_mut_ptr();
            if depth / LANES - column >= TILES {
                with_rows!(count, add_columns, 4; weights, values, column, extent, ahead, sums);
                column += TILES;
            } else {
                with_rows!(count, add_columns, 2; weights, values, column, extent, ahead, sums);
                column += TILE_COLS / LANES;
            }
            ahead = Ahead::nothing();
        }
    }
}

/// `M` rows of queries by `N` tiles of keys.
///
/// # Safety
/// AVX512-BF16; `queries` is `[M][depth / 2]`, `keys` `[TILES][depth / 2][16]`, `scores` has `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2,avx512bf16")]
unsafe fn score_rows<const M: usize, const N: usize>(
    queries: *const u32,
    keys: [*const u32; TILES],
    depth: usize,
    ahead: Ahead,
    scores: *mut [f32; CHUNK],
) {
    let pairs = depth / 2;
    let mut sums = [[_mm512_setzero_ps(); N]; M];
    for pair in 0..pairs {
        let mut tiles = [_mm512_setzero_si512(); N];
        for (keys_of_tile, keys) in tiles.iter_mut().zip(keys) {
            // SAFETY: a pair of features of a tile.
            *keys_of_tile = unsafe { _mm512_loadu_si512(keys.add(pair * LANES).cast()) };
        }
        // SAFETY: the instruction set is given.
        unsafe { ahead.ask::<Avx512>(pair) };
        for m in 0..M {
            // SAFETY: a pair of features of a row.
            let query = _mm512_set1_epi32(unsafe { *queries.add(m * pairs + pair) }.cast_signed());
            for t in 0..N {
                sums[m][t] = dot(sums[m][t], query, tiles[t]);
            }
        }
    }
    for m in 0..M {
        for t in 0..N {
            // SAFETY: a row has `CHUNK` scores.
            unsafe { _mm512_storeu_ps(scores.add(m).cast::<f32>().add(t * LANES), sums[m][t]) };
        }
    }
}

/// `M` rows of weights by `N` columns of sixteen features.
///
/// # Safety
/// AVX512-BF16; `weights` is `[M][CHUNK / 2]`, `values` has these columns, `sums` `M` rows, `depth` apart, from these features
/// on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2,avx512bf16")]
unsafe fn add_columns<const M: usize, const N: usize>(
    weights: *const u32,
    values: &Values,
    column: usize,
    Extent { depth, keys: num_keys, .. }: Extent,
    ahead: Ahead,
    sums: *mut f32,
) {
    const PAIRS: usize = CHUNK / 2;
    let mut total = [[_mm512_setzero_ps(); N]; M];
    for m in 0..M {
        for n in 0..N {
            // SAFETY: sixteen features of a row.
            total[m][n] = unsafe { _mm512_loadu_ps(sums.add(m * depth + n * LANES)) };
        }
    }
    let num_pairs = num_keys.div_ceil(2);
    for (tile, from) in values.tiles.iter().enumerate().take(num_pairs.div_ceil(TILE_PAIRS_OF_KEYS)) {
        let first = tile * TILE_PAIRS_OF_KEYS;
        for pair in first..num_pairs.min(first + TILE_PAIRS_OF_KEYS) {
            // The other half of an odd last pair belongs to somebody else, and may be anything: zero times NaN would be seen.
            let mask = if 2 * pair + 1 < num_keys { u32::MAX } else { u32::from(u16::MAX) };
            let mask = _mm512_set1_epi32(mask.cast_signed());
            let mut lines = [_mm512_setzero_si512(); N];
            for (n, line) in lines.iter_mut().enumerate() {
                let at = (pair - first) * values.pair_stride + (column + n) * values.column_stride;
                // SAFETY: a pair of keys of a column.
                *line = unsafe { _mm512_and_si512(_mm512_loadu_si512(from.add(at).cast()), mask) };
            }
            // SAFETY: the instruction set is given.
            unsafe { ahead.ask::<Avx512>(pair) };
            for m in 0..M {
                // SAFETY: a pair of keys of a row.
                let weight = _mm512_set1_epi32(unsafe { *weights.add(m * PAIRS + pair) }.cast_signed());
                for n in 0..N {
                    total[m][n] = dot(total[m][n], weight, lines[n]);
                }
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            // SAFETY: as where they were loaded.
            unsafe { _mm512_storeu_ps(sums.add(m * depth + n * LANES), total[m][n]) };
        }
    }
}
