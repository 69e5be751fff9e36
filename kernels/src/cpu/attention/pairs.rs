//! Attention over a cache of bf16 or bytes by products of bf16 pairs, on tiles (`amx.rs`) or by dot products (`dots.rs`); the
//! softmax between them is f32.
//!
//! For each chunk of keys and each tile of sixteen query rows:
//!
//! 1. scores [16 rows][64 keys] = queries * keys, over the features in steps of 32;
//! 2. weights = e^(score - greatest score), rounded to bf16; what came before is rescaled if the greatest has grown;
//! 3. sums [16 rows][features] += weights * values, the first 32 keys, then the other 32.
//!
//! Queries and weights keep eight bits, as many as cached keys and values have. A row's weights are divided by the sum
//! of the *rounded* ones, so that they add up to one.
//!
//! **Batch invariance.** A product computes each row by itself, in an order given by the position in the chunk
//! alone, so a row has the same bits in any tile, whoever its neighbours are: one row uses the same tiles as many, in
//! decoding too. There tiles are mostly empty, and reading the cache is what takes the time. Keys that a row does
//! not see have the weight zero, and those behind the end of the sequence count as zero values: adding their products
//! changes no sum. (It may turn -0 into 0, so no sum is left -0.)

use super::softmax::{Softmax, join, positive_zeros};
use super::tiles::{Ahead, Gathered, Tiles, in_place};
use super::{CHUNK, Job, Piece, SEGMENT};
use crate::cpu::amx::{TILE_COLS, TILE_ROWS};
use crate::cpu::simd::{LANES, Simd};
use crate::ops::AttnParams;

/// What multiplies pairs.
///
/// # Safety
/// All methods need the instructions of the implementation; products only between `begin` and `end`. `depth` is a multiple of
/// 32, not 0.
pub(super) trait Unit {
    unsafe fn begin();
    unsafe fn end();

    /// `scores[row][key] = queries[row] . keys[key]` for the first `rows` rows; others may be written, too.
    ///
    /// `queries`: `[16 rows][depth]`; `keys` as in [`Operands`].
    unsafe fn score(queries: &[u16], keys: &[u32], depth: usize, rows: usize, scores: &mut Scores);

    /// `sums[row] += weights[row] . values` for the first `rows` rows; those of the others are zero.
    ///
    /// `sums`: `[16 rows][depth]`; `values` as in [`Operands`].
    unsafe fn add_values(weights: &Weights, values: &[u32], depth: usize, rows: usize, sums: &mut [f32]);
}

/// Elements of a tile of pairs.
pub(super) const TILE_PAIRS: usize = TILE_ROWS * LANES;

/// How cached elements become bf16.
pub(super) trait Element {
    type Raw: Copy + Default;

    /// # Safety
    /// Sixteen readable elements at `p`.
    unsafe fn load(p: *const Self::Raw) -> [u16; LANES];
}

pub(super) struct Bf16;
/// Bytes: bf16 has room for their eight bits.
pub(super) struct Int8;

impl Element for Bf16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn load(p: *const u16) -> [u16; LANES] {
        // SAFETY: given by the caller.
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }
    }
}

impl Element for Int8 {
    type Raw = i8;

    #[inline(always)]
    unsafe fn load(p: *const i8) -> [u16; LANES] {
        // SAFETY: given by the caller.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        bytes.map(|byte| (f32::from(byte).to_bits() >> 16) as u16)
    }
}

/// Scales of the keys and values of a chunk of bytes.
type Scales<'a> = (&'a [f32; CHUNK], &'a [f32; CHUNK]);

/// Queries of a piece, and the keys and values of a chunk, as tiles.
struct Operands {
    num_rows: usize,
    /// Features, padded to the depth of a tile.
    depth: usize,
    /// bf16, `[num_rows, padded][depth]`
    queries: Vec<u16>,
    /// Pairs of features, `[tile of keys][depth / 2][16 keys][2]`; the features beyond the last are zero.
    keys: Vec<u32>,
    /// Pairs of keys, `[half of the chunk][depth / 16][16 pairs of keys][16 features][2]`.
    values: Vec<u32>,
}

impl Operands {
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    unsafe fn new<S: Simd>(job: &Job<'_>, piece: Piece) -> Self {
        let Job { q, store, group, .. } = *job;
        let dim = store.head_dim;
        let depth = dim.next_multiple_of(TILE_COLS);
        let num_rows = (piece.end - piece.first) * group;
        let mut queries = vec![0_u16; num_rows.next_multiple_of(TILE_ROWS) * depth];
        let mut padded = vec![0.0_f32; depth];
        for (row, queries) in queries.chunks_exact_mut(depth).take(num_rows).enumerate() {
            let head = piece.kv_head * group + row % group;
            padded[..dim].copy_from_slice(&q.row(piece.first + row / group)[head * dim..][..dim]);
            for (queries, x) in queries.chunks_exact_mut(LANES).zip(padded.chunks_exact(LANES)) {
                // SAFETY: both have sixteen elements; the instruction set is given.
                unsafe { S::store_bf16(queries.as_mut_ptr(), S::load(x.as_ptr())) };
            }
        }
        Self {
            num_rows,
            depth,
            queries,
            keys: vec![0; CHUNK * depth / 2],
            values: vec![0; CHUNK / 2 * depth],
        }
    }

    /// Brings the keys of a chunk into tiles. Tiles beyond `num_keys` keep what they have; nobody sees their scores.
    ///
    /// # Safety
    /// The tiles point to `dim * 16` keys; the instruction set of `S`.
    #[inline(always)]
    unsafe fn load_keys<S: Simd, E: Element>(
        &mut self,
        tiles: &Tiles<E::Raw>,
        (dim, num_keys): (usize, usize),
        ahead: Ahead,
    ) {
        let tile_len = self.depth / 2 * LANES;
        let num_tiles = num_keys.div_ceil(LANES);
        for (tile, out) in self.keys.chunks_exact_mut(tile_len).take(num_tiles).enumerate() {
            for (pair, out) in out.chunks_exact_mut(LANES).take(dim.div_ceil(2)).enumerate() {
                // SAFETY: features below `dim`, given by the caller.
                let (first, second) = unsafe {
                    if tile == 0 {
                        ahead.ask::<S>(pair);
                    }
                    let p = tiles[tile].0.add(2 * pair * LANES);
                    (E::load(p), if 2 * pair + 1 < dim { E::load(p.add(LANES)) } else { [0; LANES] })
                };
                interleave(first, second, out);
            }
        }
    }

    /// Brings the values of a chunk into tiles; those beyond `num_keys` are zero.
    ///
    /// # Safety
    /// The tiles point to `16 * padded` values; the instruction set of `S`.
    #[inline(always)]
    unsafe fn load_values<S: Simd, E: Element>(
        &mut self,
        tiles: &Tiles<E::Raw>,
        (padded, num_keys): (usize, usize),
        ahead: Ahead,
    ) {
        let half_len = self.depth / LANES * TILE_PAIRS;
        for pair in 0..CHUNK / 2 {
            let half = &mut self.values[pair / TILE_ROWS * half_len..][..half_len];
            for column in 0..padded / LANES {
                // SAFETY: the instruction set is given.
                unsafe { ahead.ask::<S>(pair * (padded / LANES) + column) };
                let load = |key: usize| {
                    if key < num_keys {
                        // SAFETY: a key of the chunk and whole vectors of its values, given by the caller.
                        unsafe { E::load(tiles[key / LANES].1.add(key % LANES * padded + column * LANES)) }
                    } else {
                        [0; LANES]
                    }
                };
                let out = &mut half[column * TILE_PAIRS + pair % TILE_ROWS * LANES..][..LANES];
                interleave(load(2 * pair), load(2 * pair + 1), out);
            }
        }
    }
}

/// `out[i]` is the pair of `first[i]` and `second[i]`, as tiles want them.
#[inline(always)]
fn interleave(first: [u16; LANES], second: [u16; LANES], out: &mut [u32]) {
    for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
        *out = u32::from(first) | u32::from(second) << 16;
    }
}

/// What the rows of `piece` see of the positions `keys`, which begin where a segment does or before all that is seen.
///
/// # Safety
/// `k`, `v` and their scales are the buffers of `job.store`; the instruction sets of `S` and `U`.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Element, U: Unit>(
    job: &Job<'_>,
    piece: Piece,
    keys: std::ops::Range<usize>,
    (k, v): (&[E::Raw], &[E::Raw]),
    scales: Option<(&[f32], &[f32])>,
) -> Softmax {
    let Job { store, meta, params, group, .. } = *job;
    let (dim, padded) = (store.head_dim, store.padded_dim);
    let position = job.position(piece);

    // SAFETY: the instruction set is given.
    let mut operands = unsafe { Operands::new::<S>(job, piece) };
    let padded_rows = operands.num_rows.next_multiple_of(TILE_ROWS);
    let mut total = Softmax::new(padded_rows, operands.depth);
    let mut segment = Softmax::new(padded_rows, operands.depth);
    let mut gathered = Gathered::<E::Raw>::default();
    let (mut key_scales, mut value_scales) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    // SAFETY: the instruction set is given.
    unsafe { U::begin() };
    for start in (keys.start / CHUNK * CHUNK..keys.end).step_by(CHUNK) {
        let num_keys = CHUNK.min(keys.end - start);
        let tiles = gathered.tiles(job, piece, (start, num_keys), k, v);
        // While the keys are read the values are on their way, and then the next keys.
        let values = Ahead::values(&tiles, padded);
        let next = if start + CHUNK < keys.end && job.in_place() {
            let num_keys = CHUNK.min(keys.end - start - CHUNK);
            Ahead::keys(&in_place(job, piece, (start + CHUNK, num_keys), k, v), dim)
        } else {
            Ahead::nothing()
        };
        if let Some((k_scales, v_scales)) = scales {
            for key in 0..num_keys {
                let slot = meta.slot(piece.seq, start + key);
                let at = ((slot / LANES) * store.num_kv_heads + piece.kv_head) * LANES + slot % LANES;
                (key_scales[key], value_scales[key]) = (k_scales[at], v_scales[at]);
            }
        }
        let scales = scales.map(|_| (&key_scales, &value_scales));
        let seen = |row: usize| {
            let at = position + row / group;
            let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
            from.saturating_sub(start)..(at + 1).saturating_sub(start).min(num_keys)
        };
        // SAFETY: each tile points to dim * 16 keys and 16 * padded values; the rest is given.
        unsafe {
            operands.load_keys::<S, E>(&tiles, (dim, num_keys), values);
            operands.load_values::<S, E>(&tiles, (padded, num_keys), next);
            for first in (0..operands.num_rows).step_by(TILE_ROWS) {
                visit::<S, U>(&operands, &mut segment, first, (params, scales), &seen);
            }
            if (start + CHUNK).is_multiple_of(SEGMENT) || start + CHUNK >= keys.end {
                positive_zeros::<S>(&mut segment.sums);
                join::<S>(&mut total, &segment);
                segment.clear();
            }
        }
    }
    // SAFETY: as above.
    unsafe { U::end() };
    total
}

/// One chunk for the tile of rows from `first` on.
///
/// # Safety
/// The instruction sets of `S` and `U`, which has begun.
#[inline(always)]
unsafe fn visit<S: Simd, U: Unit>(
    operands: &Operands,
    segment: &mut Softmax,
    first: usize,
    (params, scales): (&AttnParams, Option<Scales<'_>>),
    seen: &impl Fn(usize) -> std::ops::Range<usize>,
) {
    let depth = operands.depth;
    let mut scores = Scores([[0.0; CHUNK]; TILE_ROWS]);
    // Rows that are none have the weight zero.
    let mut weights = Weights([[0; CHUNK]; TILE_ROWS]);
    let queries = &operands.queries[first * depth..][..TILE_ROWS * depth];
    let rows = TILE_ROWS.min(operands.num_rows - first);
    // SAFETY: sixteen rows of queries and of sums, a chunk of keys and values; the instruction set is given.
    unsafe {
        U::score(queries, &operands.keys, depth, rows, &mut scores);
        for row in 0..rows {
            let at = first + row;
            let sums = &mut segment.sums[at * depth..][..depth];
            let running = (&mut segment.row_max[at], &mut segment.row_sum[at]);
            soften::<S>(&mut scores.0[row], seen(at), (params, scales), running, &mut weights.0[row], sums);
        }
        let sums = &mut segment.sums[first * depth..][..TILE_ROWS * depth];
        U::add_values(&weights, &operands.values, depth, rows, sums);
    }
}

#[repr(C, align(64))]
pub(super) struct Scores(pub(super) [[f32; CHUNK]; TILE_ROWS]);

/// bf16
#[repr(C, align(64))]
pub(super) struct Weights(pub(super) [[u16; CHUNK]; TILE_ROWS]);

/// Turns a row's scores of one chunk into unnormalised weights (0 outside of `seen`) and rescales what came before.
///
/// # Safety
/// `sums` is whole vectors; the instruction set of `S`.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &mut [f32; CHUNK],
    seen: std::ops::Range<usize>,
    (params, scales): (&AttnParams, Option<Scales<'_>>),
    (row_max, row_sum): (&mut f32, &mut f32),
    weights: &mut [u16; CHUNK],
    sums: &mut [f32],
) {
    if seen.is_empty() {
        return;
    }
    // SAFETY: scores, weights and scales are CHUNK long, `sums` whole vectors; the instruction set is given.
    unsafe {
        let scale = S::splat(params.scale);
        for i in (0..CHUNK).step_by(LANES) {
            let mut score = S::load(scores.as_ptr().add(i));
            if let Some((key_scales, _)) = scales {
                score = S::mul(score, S::load(key_scales.as_ptr().add(i)));
            }
            S::store(scores.as_mut_ptr().add(i), S::mul(score, scale));
        }
        if let Some(cap) = params.softcap {
            for score in &mut scores[seen.clone()] {
                *score = cap * (*score / cap).tanh();
            }
        }
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let mut max = S::load(scores.as_ptr());
        for i in (LANES..CHUNK).step_by(LANES) {
            max = S::max(max, S::load(scores.as_ptr().add(i)));
        }
        let max = S::max_lane(max).max(*row_max);
        if *row_max != max && *row_sum > 0.0 {
            let factor = S::to_array(S::exp(S::splat(*row_max - max)))[0];
            *row_sum *= factor;
            for i in (0..sums.len()).step_by(LANES) {
                let p = sums.as_mut_ptr().add(i);
                S::store(p, S::mul(S::load(p), S::splat(factor)));
            }
        }
        *row_max = max;
        let mut total = S::splat(0.0);
        for i in (0..CHUNK).step_by(LANES) {
            let weight = S::exp(S::sub(S::load(scores.as_ptr().add(i)), S::splat(max)));
            let p = weights.as_mut_ptr().add(i);
            match scales {
                // What is rounded here is a weight times a scale, which says little about the weight.
                Some((_, value_scales)) => {
                    S::store_bf16(p, S::mul(weight, S::load(value_scales.as_ptr().add(i))));
                    total = S::add(total, weight);
                }
                None => {
                    S::store_bf16(p, weight);
                    total = S::add(total, S::load_bf16(p));
                }
            }
        }
        *row_sum += S::sum(total);
    }
}
