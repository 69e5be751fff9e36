//! Attention over a paged cache of bf16 or bytes on the matrix unit: scores and weighted values are tile products of
//! bf16, the softmax between them is f32.
//!
//! For each chunk of keys, as [`super::super::attention`] cuts them, and each tile of sixteen query rows:
//!
//! 1. scores [16 rows][64 keys] = queries * keys, over the features in steps of 32;
//! 2. weights = e^(score - greatest score), rounded to bf16; what came before is rescaled if the greatest has grown;
//! 3. sums [16 rows][features] += weights * values, the first 32 keys, then the other 32.
//!
//! Queries and weights lose all but eight bits, which is what cached keys and values have as well. A row's weights are
//! divided by the sum of the *rounded* ones, so that they add up to one.
//!
//! **Batch invariance.** A tile product computes each row by itself, in an order given by the position in the chunk
//! alone, so a row has the same bits in any tile, whoever its neighbours are: one row uses the same tiles as many, in
//! decoding too. There the tiles are mostly empty, and reading the cache is what takes the time. Keys that a row does
//! not see have the weight zero, and those behind the end of the sequence count as zero values: adding their products
//! changes no sum. (It may turn -0 into 0, so the results have no -0.)

use std::arch::asm;

use super::super::attention::{CHUNK, Gathered, Job, Piece, Tiles};
use super::super::simd::{LANES, Simd};
use super::{TILE_BYTES, TILE_COLS, TILE_ROWS, configure, release};
use crate::ops::AttnParams;

/// Tiles of keys of a chunk.
const KEY_TILES: usize = CHUNK / LANES;
/// Elements of a tile of pairs.
const TILE_PAIRS: usize = TILE_ROWS * LANES;

/// How cached elements become bf16.
pub(in crate::cpu) trait Element {
    type Raw: Copy + Default;

    /// # Safety
    /// Sixteen readable elements at `p`.
    unsafe fn load(p: *const Self::Raw) -> [u16; LANES];
}

pub(in crate::cpu) struct Bf16;
/// Bytes: bf16 has room for their eight bits.
pub(in crate::cpu) struct Int8;

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

/// The rows of a piece.
struct State {
    num_rows: usize,
    /// Features, padded to the depth of a tile.
    depth: usize,
    /// bf16, `[num_rows, padded][depth]`
    queries: Vec<u16>,
    /// Weighted values, `[num_rows, padded][depth]`.
    sums: Vec<f32>,
    row_max: Vec<f32>,
    row_sum: Vec<f32>,
    /// Pairs of features, `[tile of keys][depth / 2][16 keys][2]`; the features beyond the last are zero.
    keys: Vec<u32>,
    /// Pairs of keys, `[half of the chunk][depth / 16][16 pairs of keys][16 features][2]`.
    values: Vec<u32>,
}

impl State {
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    unsafe fn new<S: Simd>(job: &Job<'_>, piece: Piece) -> Self {
        let Job { q, store, group, .. } = *job;
        let dim = store.head_dim;
        let depth = dim.next_multiple_of(TILE_COLS);
        let num_rows = (piece.end - piece.first) * group;
        let padded_rows = num_rows.next_multiple_of(TILE_ROWS);
        let mut queries = vec![0_u16; padded_rows * depth];
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
            sums: vec![0.0; padded_rows * depth],
            row_max: vec![f32::NEG_INFINITY; num_rows],
            row_sum: vec![0.0; num_rows],
            keys: vec![0; CHUNK * depth / 2],
            values: vec![0; CHUNK / 2 * depth],
        }
    }

    /// Brings the keys of a chunk into tiles. Tiles beyond `num_keys` keep what they have; nobody sees their scores.
    ///
    /// # Safety
    /// The tiles point to `dim * 16` keys.
    #[inline(always)]
    unsafe fn load_keys<E: Element>(&mut self, tiles: &Tiles<E::Raw>, dim: usize, num_keys: usize) {
        let tile_len = self.depth / 2 * LANES;
        for (tile, out) in tiles.iter().zip(self.keys.chunks_exact_mut(tile_len)).take(num_keys.div_ceil(LANES)) {
            for (pair, out) in out.chunks_exact_mut(LANES).take(dim.div_ceil(2)).enumerate() {
                // SAFETY: features below `dim`, given by the caller.
                let (first, second) = unsafe {
                    let p = tile.0.add(2 * pair * LANES);
                    (E::load(p), if 2 * pair + 1 < dim { E::load(p.add(LANES)) } else { [0; LANES] })
                };
                join(first, second, out);
            }
        }
    }

    /// Brings the values of a chunk into tiles; those beyond `num_keys` are zero.
    ///
    /// # Safety
    /// The tiles point to `16 * padded` values.
    #[inline(always)]
    unsafe fn load_values<E: Element>(&mut self, tiles: &Tiles<E::Raw>, padded: usize, num_keys: usize) {
        let half_len = self.depth / LANES * TILE_PAIRS;
        for pair in 0..CHUNK / 2 {
            let half = &mut self.values[pair / TILE_ROWS * half_len..][..half_len];
            for column in 0..padded / LANES {
                let load = |key: usize| {
                    if key < num_keys {
                        // SAFETY: a key of the chunk and whole vectors of its values, given by the caller.
                        unsafe { E::load(tiles[key / LANES].1.add(key % LANES * padded + column * LANES)) }
                    } else {
                        [0; LANES]
                    }
                };
                let out = &mut half[column * TILE_PAIRS + pair % TILE_ROWS * LANES..][..LANES];
                join(load(2 * pair), load(2 * pair + 1), out);
            }
        }
    }
}

/// `out[i]` is the pair of `first[i]` and `second[i]`, as tiles want them.
#[inline(always)]
fn join(first: [u16; LANES], second: [u16; LANES], out: &mut [u32]) {
    for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
        *out = u32::from(first) | u32::from(second) << 16;
    }
}

/// # Safety
/// Tiles may be used; `k`, `v` and their scales are the buffers of `job.store`; the rows of `piece` are nobody else's; the
/// instruction set of `S`.
#[inline(always)]
pub(in crate::cpu) unsafe fn attend<S: Simd, E: Element>(
    job: &Job<'_>,
    piece: Piece,
    (k, v): (&[E::Raw], &[E::Raw]),
    scales: Option<(&[f32], &[f32])>,
) {
    let Job { q, store, meta, params, group, y, .. } = *job;
    let (dim, padded) = (store.head_dim, store.padded_dim);
    // Position of the piece's first token: the tokens of this step are the last of the sequence.
    let seq_len = meta.seq_lens[piece.seq] as usize;
    let position = seq_len - (meta.cu_seqlens_q[piece.seq + 1] as usize - piece.first);
    let last_position = position + (piece.end - piece.first) - 1;
    let first_seen = params.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));

    // SAFETY: the instruction set is given.
    let mut state = unsafe { State::new::<S>(job, piece) };
    let mut gathered = Gathered::<E::Raw>::default();
    let (mut key_scales, mut value_scales) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    // SAFETY: tiles may be used, and stay configured to the end.
    unsafe { configure() };
    for chunk in first_seen / CHUNK..=last_position / CHUNK {
        let start = chunk * CHUNK;
        let num_keys = CHUNK.min(last_position + 1 - start);
        let tiles = gathered.tiles(job, piece, (start, num_keys), k, v);
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
            state.load_keys::<E>(&tiles, dim, num_keys);
            state.load_values::<E>(&tiles, padded, num_keys);
            for first in (0..state.num_rows).step_by(TILE_ROWS) {
                visit::<S>(&mut state, first, params, scales, &seen);
            }
        }
    }
    // SAFETY: as above.
    unsafe { release() };
    for row in 0..state.num_rows {
        let (token, head) = (piece.first + row / group, piece.kv_head * group + row % group);
        // SAFETY: this token's part of this head is written by this piece alone.
        let out = unsafe { y.slice(token * q.width + head * dim, dim) };
        let scale = 1.0 / state.row_sum[row];
        for (out, sum) in out.iter_mut().zip(&state.sums[row * state.depth..][..dim]) {
            *out = sum * scale + 0.0;
        }
    }
}

/// One chunk for the tile of rows from `first` on.
///
/// # Safety
/// Tiles are configured; the instruction set of `S`.
#[inline(always)]
unsafe fn visit<S: Simd>(
    state: &mut State,
    first: usize,
    params: &AttnParams,
    scales: Option<Scales<'_>>,
    seen: &impl Fn(usize) -> std::ops::Range<usize>,
) {
    let depth = state.depth;
    let mut scores = Scores([[0.0; CHUNK]; TILE_ROWS]);
    // Rows that are none have the weight zero.
    let mut weights = Weights([[0; CHUNK]; TILE_ROWS]);
    let queries = &state.queries[first * depth..][..TILE_ROWS * depth];
    // SAFETY: sixteen rows of queries and of sums, a chunk of keys and values; the instruction set is given.
    unsafe {
        score(queries, &state.keys, depth, &mut scores);
        for row in 0..TILE_ROWS.min(state.num_rows - first) {
            let at = first + row;
            let sums = &mut state.sums[at * depth..][..depth];
            let running = (&mut state.row_max[at], &mut state.row_sum[at]);
            soften::<S>(&mut scores.0[row], seen(at), (params, scales), running, &mut weights.0[row], sums);
        }
        let sums = &mut state.sums[first * depth..][..TILE_ROWS * depth];
        add_values(&weights, &state.values, depth, sums);
    }
}

#[repr(C, align(64))]
struct Scores([[f32; CHUNK]; TILE_ROWS]);

#[repr(C, align(64))]
struct Weights([[u16; CHUNK]; TILE_ROWS]);

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

/// `scores[row][key] = queries[row] . keys[key]`
///
/// # Safety
/// Tiles are configured.
unsafe fn score(queries: &[u16], keys: &[u32], depth: usize, scores: &mut Scores) {
    assert!(depth.is_multiple_of(TILE_COLS) && depth > 0, "whole tiles");
    assert!(queries.len() == TILE_ROWS * depth && keys.len() == CHUNK * depth / 2, "sizes");
    let tile_len = depth / 2 * LANES;
    let keys = keys.as_ptr();
    // SAFETY: `depth / 32` tiles of queries and for each of the four tiles of keys, by the sizes above; the stores stay
    // in `scores`; tile registers belong to nobody between blocks, and are declared as changed.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{q} + {q_row} * 1]",
            "tileloadd tmm5, [{k0} + {row} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{k1} + {row} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tileloadd tmm7, [{k2} + {row} * 1]",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tileloadd tmm5, [{k3} + {row} * 1]",
            "tdpbf16ps tmm3, tmm4, tmm5",
            "add {k0}, 1024",
            "add {k1}, 1024",
            "add {k2}, 1024",
            "add {k3}, 1024",
            "add {q}, 64",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {out_row} * 1], tmm0",
            "tilestored [{out} + {out_row} * 1 + 64], tmm1",
            "tilestored [{out} + {out_row} * 1 + 128], tmm2",
            "tilestored [{out} + {out_row} * 1 + 192], tmm3",
            q = inout(reg) queries.as_ptr() => _,
            q_row = in(reg) size_of::<u16>() * depth,
            k0 = inout(reg) keys => _,
            k1 = inout(reg) keys.add(tile_len) => _,
            k2 = inout(reg) keys.add(2 * tile_len) => _,
            k3 = inout(reg) keys.add(3 * tile_len) => _,
            row = in(reg) TILE_BYTES / TILE_ROWS,
            steps = inout(reg) depth / TILE_COLS => _,
            out = in(reg) scores.0.as_mut_ptr(),
            out_row = in(reg) size_of::<[f32; CHUNK]>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    const { assert!(KEY_TILES == 4) };
}

/// `sums[row] += weights[row] . values`, two tiles of features at a time.
///
/// # Safety
/// Tiles are configured.
unsafe fn add_values(weights: &Weights, values: &[u32], depth: usize, sums: &mut [f32]) {
    assert!(depth.is_multiple_of(TILE_COLS) && depth > 0, "whole tiles");
    assert!(sums.len() == TILE_ROWS * depth && values.len() == CHUNK / 2 * depth, "sizes");
    let values = values.as_ptr();
    // SAFETY: two tiles of weights, `depth / 16` tiles of values for each half of the chunk and of sums, by the sizes
    // above; tile registers belong to nobody between blocks, and are declared as changed.
    unsafe {
        asm!(
            "tileloadd tmm4, [{w} + {w_row} * 1]",
            "tileloadd tmm5, [{w} + {w_row} * 1 + 64]",
            "2:",
            "tileloadd tmm0, [{sums} + {sums_row} * 1]",
            "tileloadd tmm6, [{v0} + {row} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm1, [{sums} + {sums_row} * 1 + 64]",
            "tileloadd tmm7, [{v0} + {row} * 1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm2, [{v1} + {row} * 1]",
            "tdpbf16ps tmm0, tmm5, tmm2",
            "tileloadd tmm3, [{v1} + {row} * 1 + 1024]",
            "tdpbf16ps tmm1, tmm5, tmm3",
            "tilestored [{sums} + {sums_row} * 1], tmm0",
            "tilestored [{sums} + {sums_row} * 1 + 64], tmm1",
            "add {v0}, 2048",
            "add {v1}, 2048",
            "add {sums}, 128",
            "dec {steps}",
            "jnz 2b",
            w = in(reg) weights.0.as_ptr(),
            w_row = in(reg) size_of::<[u16; CHUNK]>(),
            sums = inout(reg) sums.as_mut_ptr() => _,
            sums_row = in(reg) size_of::<f32>() * depth,
            v0 = inout(reg) values => _,
            v1 = inout(reg) values.add(depth / LANES * TILE_PAIRS) => _,
            row = in(reg) TILE_BYTES / TILE_ROWS,
            steps = inout(reg) depth / TILE_COLS => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
