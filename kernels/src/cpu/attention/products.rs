//! Scores of a chunk's keys, and sums of its values.

use super::tiles::{Ahead, Element, Tiles};
use super::{CHUNK, TILES};
use crate::cpu::simd::{LANES, Simd};

/// [`score_rows`] of all rows, as many at a time as registers hold.
///
/// # Safety
/// The tiles have dim * 16 keys; the instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn score_all<S: Simd, E: Element>(
    queries: &[f32],
    tiles: &Tiles<E::Raw>,
    (dim, num_rows, num_tiles): (usize, usize, usize),
    mut ahead: Ahead,
    scores: &mut [f32],
) {
    let mut row = 0;
    while row < num_rows {
        let rows = (num_rows - row).min(S::ACCUMULATORS / TILES).max(1);
        // SAFETY: given by the caller.
        unsafe {
            let scores = &mut scores[row * CHUNK..];
            score_rows::<S, E>(&queries[row * dim..], tiles, dim, rows, num_tiles, ahead, scores);
            ahead = Ahead::nothing();
        }
        row += rows;
    }
}

/// [`add_values`] of all rows, as many at a time as registers hold.
///
/// # Safety
/// The tiles have 16 * padded values; the instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn add_all<S: Simd, E: Element>(
    weights: &[f32],
    tiles: &Tiles<E::Raw>,
    (padded, num_rows, num_keys): (usize, usize, usize),
    mut ahead: Ahead,
    sums: &mut [f32],
) {
    let mut row = 0;
    while row < num_rows {
        let rows = (num_rows - row).min(S::ACCUMULATORS / TILES).max(1);
        // SAFETY: given by the caller.
        unsafe {
            let sums = &mut sums[row * padded..];
            add_values::<S, E>(&weights[row * CHUNK..], tiles, padded, rows, num_keys, ahead, sums);
            ahead = Ahead::nothing();
        }
        row += rows;
    }
}

/// `scores[row][key] = queries[row] . keys[key]`, each a chain of multiply-adds over the features in order.
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Element>(
    queries: &[f32],
    tiles: &Tiles<E::Raw>,
    dim: usize,
    rows: usize,
    num_tiles: usize,
    ahead: Ahead,
    scores: &mut [f32],
) {
    macro_rules! cases {
        ($($m:literal),*) => {
            match rows {
                // SAFETY: given by the caller.
                $($m => unsafe { score::<S, E, $m>(queries, tiles, dim, num_tiles, ahead, scores) },)*
                _ => unreachable!("no kernel for {rows} rows"),
            }
        };
    }
    cases!(1, 2, 3, 4, 5, 6);
}

#[inline(always)]
unsafe fn score<S: Simd, E: Element, const M: usize>(
    queries: &[f32],
    tiles: &Tiles<E::Raw>,
    dim: usize,
    num_tiles: usize,
    ahead: Ahead,
    scores: &mut [f32],
) {
    let queries = &queries[..M * dim];
    let scores = &mut scores[..M * CHUNK];
    // SAFETY: the tiles have dim * 16 keys; the slices were cut to size above.
    unsafe {
        if num_tiles == TILES {
            let mut sums = [[S::splat(0.0); TILES]; M];
            for d in 0..dim {
                ahead.ask::<S>(d);
                let keys: [S::V; TILES] = std::array::from_fn(|t| E::load::<S>(tiles[t].0.add(d * LANES)));
                for m in 0..M {
                    let x = S::splat(*queries.as_ptr().add(m * dim + d));
                    for t in 0..TILES {
                        sums[m][t] = S::fma(x, keys[t], sums[m][t]);
                    }
                }
            }
            for m in 0..M {
                for t in 0..TILES {
                    S::store(scores.as_mut_ptr().add(m * CHUNK + t * LANES), sums[m][t]);
                }
            }
        } else {
            for t in 0..num_tiles {
                let mut sums = [S::splat(0.0); M];
                for d in 0..dim {
                    if t == 0 {
                        ahead.ask::<S>(d);
                    }
                    let keys = E::load::<S>(tiles[t].0.add(d * LANES));
                    for m in 0..M {
                        sums[m] = S::fma(S::splat(*queries.as_ptr().add(m * dim + d)), keys, sums[m]);
                    }
                }
                for m in 0..M {
                    S::store(scores.as_mut_ptr().add(m * CHUNK + t * LANES), sums[m]);
                }
            }
        }
    }
}

/// `sums[row] += weights[row][key] * values[key]`, keys in order.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Element>(
    weights: &[f32],
    tiles: &Tiles<E::Raw>,
    padded: usize,
    rows: usize,
    num_keys: usize,
    ahead: Ahead,
    sums: &mut [f32],
) {
    macro_rules! cases {
        ($($m:literal),*) => {
            match rows {
                // SAFETY: given by the caller.
                $($m => unsafe { add_value_rows::<S, E, $m>(weights, tiles, padded, num_keys, ahead, sums) },)*
                _ => unreachable!("no kernel for {rows} rows"),
            }
        };
    }
    cases!(1, 2, 3, 4, 5, 6);
}

#[inline(always)]
unsafe fn add_value_rows<S: Simd, E: Element, const M: usize>(
    weights: &[f32],
    tiles: &Tiles<E::Raw>,
    padded: usize,
    num_keys: usize,
    mut ahead: Ahead,
    sums: &mut [f32],
) {
    let weights = &weights[..M * CHUNK];
    let sums = &mut sums[..M * padded];
    let mut d = 0;
    while d < padded {
        // SAFETY: the tiles have 16 rows of `padded` values; the slices were cut to size above.
        unsafe {
            if padded - d >= TILES * LANES {
                add_value_columns::<S, E, M, TILES>(weights, tiles, padded, num_keys, d, ahead, sums);
                d += TILES * LANES;
            } else {
                add_value_columns::<S, E, M, 1>(weights, tiles, padded, num_keys, d, ahead, sums);
                d += LANES;
            }
            ahead = Ahead::nothing();
        }
    }
}

#[inline(always)]
unsafe fn add_value_columns<S: Simd, E: Element, const M: usize, const N: usize>(
    weights: &[f32],
    tiles: &Tiles<E::Raw>,
    padded: usize,
    num_keys: usize,
    d: usize,
    ahead: Ahead,
    sums: &mut [f32],
) {
    // SAFETY: given by the caller.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                acc[m][n] = S::load(sums.as_ptr().add(m * padded + d + n * LANES));
            }
        }
        for key in 0..num_keys {
            ahead.ask::<S>(key);
            let row = tiles[key / LANES].1.add((key % LANES) * padded + d);
            let values: [S::V; N] = std::array::from_fn(|n| E::load::<S>(row.add(n * LANES)));
            for m in 0..M {
                let weight = S::splat(*weights.as_ptr().add(m * CHUNK + key));
                for n in 0..N {
                    acc[m][n] = S::fma(weight, values[n], acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                S::store(sums.as_mut_ptr().add(m * padded + d + n * LANES), acc[m][n]);
            }
        }
    }
}
