//! Products of bf16 pairs by dot products (AVX512-BF16).

use std::arch::x86_64::*;

use super::pairs::{Scores, TILE_PAIRS, Unit, Weights};
use super::{CHUNK, TILES};
use crate::cpu::amx::{TILE_COLS, TILE_ROWS};
use crate::cpu::bf16_gemm::dot;
use crate::cpu::simd::LANES;

/// Rows that are multiplied at once: with [`TILES`] vectors each they fill the registers.
const ROWS: usize = 6;

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

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn score(queries: &[u16], keys: &[u32], depth: usize, rows: usize, scores: &mut Scores) {
        assert!(queries.len() == TILE_ROWS * depth && keys.len() == CHUNK * depth / 2, "sizes");
        for first in (0..rows.min(TILE_ROWS)).step_by(ROWS) {
            let queries = queries[first * depth..].as_ptr().cast();
            let scores = scores.0[first..].as_mut_ptr();
            with_rows!(rows.min(TILE_ROWS) - first, score_rows; queries, keys.as_ptr(), depth, scores);
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add_values(weights: &Weights, values: &[u32], depth: usize, rows: usize, sums: &mut [f32]) {
        assert!(depth.is_multiple_of(TILE_COLS) && sums.len() == TILE_ROWS * depth, "whole tiles");
        assert!(values.len() == CHUNK / 2 * depth, "sizes");
        for first in (0..rows.min(TILE_ROWS)).step_by(ROWS) {
            let count = rows.min(TILE_ROWS) - first;
            let weights = weights.0[first..].as_ptr().cast();
            let mut feature = 0;
            while feature < depth {
                let sums = sums[first * depth + feature..].as_mut_ptr();
                let values = values[feature / LANES * TILE_PAIRS..].as_ptr();
                if depth - feature >= TILES * LANES {
                    with_rows!(count, add_columns, 4; weights, values, depth, sums);
                    feature += TILES * LANES;
                } else {
                    with_rows!(count, add_columns, 2; weights, values, depth, sums);
                    feature += TILE_COLS;
                }
            }
        }
    }
}

/// `M` rows of queries by a chunk of keys.
///
/// # Safety
/// AVX512-BF16; `queries` is `[M][depth / 2]`, `keys` `[TILES][depth / 2][16]`, `scores` has `M` rows.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn score_rows<const M: usize>(
    queries: *const u32,
    keys: *const u32,
    depth: usize,
    scores: *mut [f32; CHUNK],
) {
    let pairs = depth / 2;
    let mut sums = [[_mm512_setzero_ps(); TILES]; M];
    for pair in 0..pairs {
        let mut tiles = [_mm512_setzero_si512(); TILES];
        for (t, keys_of_tile) in tiles.iter_mut().enumerate() {
            // SAFETY: a pair of features of a tile.
            *keys_of_tile = unsafe { _mm512_loadu_si512(keys.add((t * pairs + pair) * LANES).cast()) };
        }
        for m in 0..M {
            // SAFETY: a pair of features of a row.
            let query = _mm512_set1_epi32(unsafe { *queries.add(m * pairs + pair) }.cast_signed());
            for t in 0..TILES {
                sums[m][t] = dot(sums[m][t], query, tiles[t]);
            }
        }
    }
    for m in 0..M {
        for t in 0..TILES {
            // SAFETY: a row has `CHUNK` scores.
            unsafe { _mm512_storeu_ps(scores.add(m).cast::<f32>().add(t * LANES), sums[m][t]) };
        }
    }
}

/// `M` rows of weights by `N` tiles of features.
///
/// # Safety
/// AVX512-BF16; `weights` is `[M][CHUNK / 2]`, `values` the chunk's from these tiles on, `sums` `M` rows, `depth` apart, from
/// these features on.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_columns<const M: usize, const N: usize>(
    weights: *const u32,
    values: *const u32,
    depth: usize,
    sums: *mut f32,
) {
    const PAIRS: usize = CHUNK / 2;
    let half_len = depth / LANES * TILE_PAIRS;
    let mut total = [[_mm512_setzero_ps(); N]; M];
    for m in 0..M {
        for n in 0..N {
            // SAFETY: sixteen features of a row.
            total[m][n] = unsafe { _mm512_loadu_ps(sums.add(m * depth + n * LANES)) };
        }
    }
    for pair in 0..PAIRS {
        // SAFETY: half the chunk's pairs come after the other half, and in it the tiles one after another.
        let line = unsafe { values.add(pair / TILE_ROWS * half_len + pair % TILE_ROWS * LANES) };
        let mut tiles = [_mm512_setzero_si512(); N];
        for (n, tile) in tiles.iter_mut().enumerate() {
            // SAFETY: a pair of keys of a tile.
            *tile = unsafe { _mm512_loadu_si512(line.add(n * TILE_PAIRS).cast()) };
        }
        for m in 0..M {
            // SAFETY: a pair of keys of a row.
            let weight = _mm512_set1_epi32(unsafe { *weights.add(m * PAIRS + pair) }.cast_signed());
            for n in 0..N {
                total[m][n] = dot(total[m][n], weight, tiles[n]);
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
