//! Attention over a cache of bf16 or bytes by products of bf16 pairs, on tiles (`amx.rs`) or by dot products (`dots.rs`); the
//! softmax between them is f32. What is not cached in pairs (`in_cache.rs`) is brought into them a chunk at a time.
//!
//! For each chunk of keys and each tile of sixteen query rows:
//!
//! 1. scores [16 rows][64 keys] = queries * keys, over the features in steps of 32;
//! 2. weights = e^(score - greatest score), rounded to bf16; what came before is rescaled if the greatest has grown much;
//! 3. sums [16 rows][features] += weights * values, the first 32 keys, then the other 32.
//!
//! Queries and weights keep eight bits, as many as cached keys and values have. A row's weights are divided by the sum
//! of the *rounded* ones, so that they add up to one.
//!
//! **Batch invariance.** A product computes each row by itself, in an order given by the position in the chunk
//! alone, so a row has the same bits in any tile, whoever its neighbours are: one row uses the same tiles as many, in
//! decoding too. There tiles are mostly empty, and reading the cache is what takes the time. Keys that a row does
//! not see have the weight zero, and those behind the end of the sequence count as zero values: adding their products
//! changes no sum. (It may turn -0 into 0, so no output is left -0.)

use std::marker::PhantomData;
use std::ops::Range;

use super::soften::{Scales, Segment, soften};
use super::softmax::{Softmax, join};
use super::tiles::{Ahead, Gathered, Tiles};
use super::{CHUNK, Job, Piece, SEGMENT};
use crate::cpu::amx::{TILE_COLS, TILE_ROWS};
use crate::cpu::scratch::Scratch;
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

    /// `scores[row][key] = queries[row] . keys[key]` within `extent`; others may be written, too.
    ///
    /// `queries`: `[16 rows][depth]`; `keys` as in [`Packed`].
    unsafe fn score(queries: &[u16], keys: &[u32], extent: Extent, scores: &mut Scores);

    /// `sums[row] += weights[row] . values` within `extent`; weights outside of it are zero.
    ///
    /// `sums`: `[16 rows][depth]`; `values` as in [`Packed`].
    unsafe fn add_values(weights: &Weights, values: &[u32], extent: Extent, sums: &mut [f32]);
}

/// What of a tile of rows and of a chunk has to be multiplied.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    /// Features, padded.
    pub(super) depth: usize,
    /// The first so many rows.
    pub(super) rows: usize,
    /// The first so many keys: what lies behind them no row sees.
    pub(super) keys: usize,
}

/// The keys and values of a chunk, and what multiplies them.
///
/// # Safety
/// As for [`Unit`]; what is taken belongs to the job's cache. `queries`, `scores`, `weights` and `sums` are as there.
pub(super) trait Chunk {
    unsafe fn begin(&self);
    unsafe fn end(&self);
    /// Takes the chunk at `start` of the keys below `end`.
    unsafe fn take<S: Simd>(&mut self, job: &Job<'_>, piece: Piece, start: usize, end: usize);
    /// `first`: these are the first rows that meet this chunk.
    unsafe fn score(&self, queries: &[u16], extent: Extent, first: bool, scores: &mut Scores);
    unsafe fn add_values(&self, weights: &Weights, extent: Extent, first: bool, sums: &mut [f32]);
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

/// Queries of a piece.
struct Queries {
    num_rows: usize,
    /// Features, padded to the depth of a tile.
    depth: usize,
    /// bf16, `[num_rows, padded][depth]`
    data: Scratch<u16>,
}

impl Queries {
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    unsafe fn new<S: Simd>(job: &Job<'_>, piece: Piece) -> Self {
        let Job { q, store, group, .. } = *job;
        let dim = store.head_dim;
        let depth = padded_depth(dim);
        let num_rows = (piece.end - piece.first) * group;
        let mut data = Scratch::filled(num_rows.next_multiple_of(TILE_ROWS) * depth, 0_u16);
        let mut padded = Scratch::filled(depth, 0.0_f32);
        for (row, queries) in data.chunks_exact_mut(depth).take(num_rows).enumerate() {
            let head = piece.kv_head * group + row % group;
            let mut x = &q.row(piece.first + row / group)[head * dim..][..dim];
            if dim != depth {
                padded[..dim].copy_from_slice(x);
                x = &padded;
            }
            for (queries, x) in queries.chunks_exact_mut(LANES).zip(x.chunks_exact(LANES)) {
                // SAFETY: both have sixteen elements; the instruction set is given.
                unsafe { S::store_bf16(queries.as_mut_ptr(), S::load(x.as_ptr())) };
            }
        }
        Self { num_rows, depth, data }
    }
}

fn padded_depth(dim: usize) -> usize {
    dim.next_multiple_of(TILE_COLS)
}

/// A chunk of a cache of `E`, brought into tiles for `U`.
struct Packed<'a, E: Element, U> {
    cache: (&'a [E::Raw], &'a [E::Raw]),
    gathered: Gathered<E::Raw>,
    depth: usize,
    /// Pairs of features, `[tile of keys][depth / 2][16 keys][2]`; the features beyond the last are zero.
    keys: Scratch<u32>,
    /// Pairs of keys, `[half of the chunk][depth / 16][16 pairs of keys][16 features][2]`.
    values: Scratch<u32>,
    unit: PhantomData<U>,
}

impl<'a, E: Element, U> Packed<'a, E, U> {
    fn new(cache: (&'a [E::Raw], &'a [E::Raw]), dim: usize) -> Self {
        let depth = padded_depth(dim);
        Self {
            cache,
            gathered: Gathered::default(),
            depth,
            keys: Scratch::filled(CHUNK * depth / 2, 0),
            values: Scratch::filled(CHUNK / 2 * depth, 0),
            unit: PhantomData,
        }
    }

    /// Brings the keys of a chunk into tiles. Tiles beyond `num_keys` keep what they have; nobody sees their scores.
    ///
    /// # Safety
    /// The tiles point to `dim * 16` keys; the instruction set of `S`.
    #[inline(always)]
    unsafe fn load_keys<S: Simd>(
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
    unsafe fn load_values<S: Simd>(
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

impl<E: Element, U: Unit> Chunk for Packed<'_, E, U> {
    unsafe fn begin(&self) {
        // SAFETY: given by the caller.
        unsafe { U::begin() };
    }

    unsafe fn end(&self) {
        // SAFETY: given by the caller.
        unsafe { U::end() };
    }

    #[inline(always)]
    unsafe fn take<S: Simd>(&mut self, job: &Job<'_>, piece: Piece, start: usize, end: usize) {
        let (dim, padded) = (job.store.head_dim, job.store.padded_dim);
        let (k, v) = self.cache;
        let num_keys = CHUNK.min(end - start);
        let tiles = self.gathered.tiles(job, piece, (start, num_keys), k, v);
        // While the keys are read the values are on their way, and then the next keys.
        let values = Ahead::values(&tiles, padded);
        let next = Ahead::next_keys(job, piece, (start + CHUNK, end), (k, v));
        // SAFETY: each tile points to dim * 16 keys and 16 * padded values; the rest is given.
        unsafe {
            self.load_keys::<S>(&tiles, (dim, num_keys), values);
            self.load_values::<S>(&tiles, (padded, num_keys), next);
        }
    }

    unsafe fn score(&self, queries: &[u16], extent: Extent, _: bool, scores: &mut Scores) {
        // SAFETY: given by the caller.
        unsafe { U::score(queries, &self.keys, extent, scores) };
    }

    unsafe fn add_values(&self, weights: &Weights, extent: Extent, _: bool, sums: &mut [f32]) {
        // SAFETY: given by the caller.
        unsafe { U::add_values(weights, &self.values, extent, sums) };
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
    keys: Range<usize>,
    kv: (&[E::Raw], &[E::Raw]),
    scales: Option<(&[f32], &[f32])>,
) -> Softmax {
    // SAFETY: given by the caller.
    unsafe { run::<S, _>(job, piece, keys, Packed::<E, U>::new(kv, job.store.head_dim), scales) }
}

/// As [`attend`], over chunks that `chunk` takes.
///
/// # Safety
/// The scales are those of `job.store`; the instruction sets of `S` and `chunk`.
#[inline(always)]
pub(super) unsafe fn run<S: Simd, C: Chunk>(
    job: &Job<'_>,
    piece: Piece,
    keys: Range<usize>,
    mut chunk: C,
    scales: Option<(&[f32], &[f32])>,
) -> Softmax {
    let Job { store, meta, params, group, .. } = *job;
    let position = job.position(piece);
    // SAFETY: the instruction set is given.
    let queries = unsafe { Queries::new::<S>(job, piece) };
    let padded_rows = queries.num_rows.next_multiple_of(TILE_ROWS);
    let mut total = Softmax::new(padded_rows, queries.depth);
    let mut segment = Segment::new(padded_rows, queries.depth);
    let mut between = Between::new();
    let positions: Vec<usize> = (0..queries.num_rows).map(|row| position + row / group).collect();
    let (mut key_scales, mut value_scales) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    // SAFETY: the instruction set is given.
    unsafe { chunk.begin() };
    for start in (keys.start / CHUNK * CHUNK..keys.end).step_by(CHUNK) {
        let num_keys = CHUNK.min(keys.end - start);
        if let Some((k_scales, v_scales)) = scales {
            for key in 0..num_keys {
                let slot = meta.slot(piece.seq, start + key);
                let at = ((slot / LANES) * store.num_kv_heads + piece.kv_head) * LANES + slot % LANES;
                (key_scales[key], value_scales[key]) = (k_scales[at], v_scales[at]);
            }
        }
        let scales = scales.map(|_| (&key_scales, &value_scales));
        let seen = |row: usize| {
            let at = positions[row];
            let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
            from.saturating_sub(start)..(at + 1).saturating_sub(start).min(num_keys)
        };
        // SAFETY: given by the caller.
        unsafe {
            chunk.take::<S>(job, piece, start, keys.end);
            for first in (0..queries.num_rows).step_by(TILE_ROWS) {
                visit::<S, C>(&queries, &chunk, (&mut segment, &mut between), first, (params, scales), &seen);
            }
            if (start + CHUNK).is_multiple_of(SEGMENT) || start + CHUNK >= keys.end {
                join::<S>(&mut total, segment.softmax::<S>());
                segment.clear();
            }
        }
    }
    // SAFETY: as above.
    unsafe { chunk.end() };
    total
}

/// One chunk for the tile of rows from `first` on.
///
/// # Safety
/// The instruction sets of `S` and of `chunk`, which has begun and taken something.
#[inline(always)]
unsafe fn visit<S: Simd, C: Chunk>(
    queries: &Queries,
    chunk: &C,
    (segment, between): (&mut Segment, &mut Between),
    first: usize,
    (params, scales): (&AttnParams, Option<Scales<'_>>),
    seen: &impl Fn(usize) -> Range<usize>,
) {
    let depth = queries.depth;
    let Between { scores, weights } = between;
    let rows = TILE_ROWS.min(queries.num_rows - first);
    // Later rows see no less of what comes last.
    let extent = Extent { depth, rows, keys: seen(first + rows - 1).end };
    if extent.keys == 0 {
        return;
    }
    let queries = &queries.data[first * depth..][..TILE_ROWS * depth];
    // SAFETY: sixteen rows of queries and of sums, a chunk of keys and values; the instruction set is given.
    unsafe {
        chunk.score(queries, extent, first == 0, scores);
        // The first row's keys end first, the last row's begin last.
        let all = rows == TILE_ROWS && seen(first) == (0..CHUNK) && seen(first + rows - 1) == (0..CHUNK);
        let seen =
            (!all).then(|| std::array::from_fn(|row| if row < rows { seen(first + row) } else { 0..0 }));
        let mut rows = segment.rows_from(first);
        soften(scores, seen.as_ref(), (params, scales), &mut rows, weights);
        chunk.add_values(weights, extent, first == 0, rows.sums);
    }
}

/// What a tile of rows has between its two products, in one place for all tiles.
struct Between {
    scores: Scores,
    weights: Weights,
}

impl Between {
    fn new() -> Self {
        Self { scores: Scores([[0.0; CHUNK]; TILE_ROWS]), weights: Weights([[0; CHUNK]; TILE_ROWS]) }
    }
}

/// `[16 rows][keys of a chunk]`
#[repr(C, align(64))]
pub(super) struct Scores(pub(super) [[f32; CHUNK]; TILE_ROWS]);

/// bf16
#[repr(C, align(64))]
pub(super) struct Weights(pub(super) [[u16; CHUNK]; TILE_ROWS]);
