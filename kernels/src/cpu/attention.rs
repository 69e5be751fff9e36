//! Causal attention over the paged cache.
//!
//! A piece of work is one key/value head of one sequence and some of its query rows (a token's query heads that share
//! the key head are rows side by side). Keys are visited in chunks of [`CHUNK`] positions that begin at multiples of
//! `CHUNK` **in the sequence**, with an online softmax from chunk to chunk. A row's result therefore does not depend on
//! how many rows it is computed with, on where a prefill was cut, or on which blocks hold the keys.

use super::kv::{KvData, KvStore};
use super::simd::{LANES, Simd};
use super::{OutPtr, Rows, Unwritten, dispatch, pool};
use crate::ops::{AttnParams, PagedMeta};

/// Keys per chunk.
const CHUNK: usize = 64;
const TILES: usize = CHUNK / LANES;
/// Query rows of a piece from which its keys and values are widened once.
const WIDENED_ROWS: usize = 13;
/// Query rows of one piece at most.
const PIECE_ROWS: usize = 48;

/// Attention of `q` rows `[num_tokens, num_heads * head_dim]` into `y`, contiguous and of the same shape.
pub(crate) fn paged_attention(
    q: Rows<'_>,
    store: &KvStore,
    meta: &PagedMeta,
    params: &AttnParams,
    y: &mut Unwritten,
) {
    let num_heads = q.width / store.head_dim;
    let group = num_heads / store.num_kv_heads;
    assert!(q.width == num_heads * store.head_dim && num_heads == group * store.num_kv_heads, "heads");
    assert!(y.len() == q.num_rows * q.width && q.num_rows == meta.num_tokens(), "sizes");
    let tokens_per_piece = (PIECE_ROWS / group).max(1);
    let mut pieces = Vec::new();
    for seq in 0..meta.num_seqs() {
        let (start, end) = (meta.cu_seqlens_q[seq] as usize, meta.cu_seqlens_q[seq + 1] as usize);
        for kv_head in 0..store.num_kv_heads {
            for first in (start..end).step_by(tokens_per_piece) {
                pieces.push(Piece { seq, kv_head, first, end: end.min(first + tokens_per_piece) });
            }
        }
    }
    // The longest first, so that threads end together.
    pieces.sort_by_key(|piece| {
        let seen = meta.seq_lens[piece.seq] as usize + piece.end - meta.cu_seqlens_q[piece.seq + 1] as usize;
        std::cmp::Reverse(seen * (piece.end - piece.first))
    });
    let job = Job { q, store, meta, params, group, y: OutPtr::new(y) };
    pool::run(pieces.len(), |idx| {
        let piece = pieces[idx];
        let job = &job;
        dispatch!(run(job, piece) -> (), [job: &Job<'_>, piece: Piece]);
    });
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    seq: usize,
    kv_head: usize,
    /// Tokens of the batch.
    first: usize,
    end: usize,
}

struct Job<'a> {
    q: Rows<'a>,
    store: &'a KvStore,
    meta: &'a PagedMeta,
    params: &'a AttnParams,
    group: usize,
    y: OutPtr<f32>,
}

#[inline(always)]
unsafe fn run<S: Simd>(job: &Job<'_>, piece: Piece) {
    // SAFETY: the element type matches the buffers; the rest is the contract of `attend`.
    unsafe {
        match &job.store.data {
            KvData::F32 { k, v } => attend::<S, F32>(job, piece, (k, v), None),
            KvData::Bf16 { k, v } => attend::<S, Bf16>(job, piece, (k, v), None),
            KvData::F16 { k, v } => attend::<S, F16>(job, piece, (k, v), None),
            KvData::Int8 { k, v, k_scales, v_scales } => {
                attend::<S, Int8>(job, piece, (k, v), Some((k_scales, v_scales)));
            }
        }
    }
}

/// How a cached element is read.
trait Element {
    type Raw: Copy + Default;

    /// # Safety
    /// Sixteen readable elements at `p`; the instruction set of `S`.
    unsafe fn load<S: Simd>(p: *const Self::Raw) -> S::V;
}

struct F32;
struct Bf16;
struct F16;
struct Int8;

impl Element for Int8 {
    type Raw = i8;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const i8) -> S::V {
        // SAFETY: given by the caller.
        unsafe { S::load_i8(p) }
    }
}

impl Element for F32 {
    type Raw = f32;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: given by the caller.
        unsafe { S::load(p) }
    }
}

impl Element for Bf16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: given by the caller.
        unsafe { S::load_bf16(p) }
    }
}

impl Element for F16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: given by the caller.
        unsafe { S::load_f16(p) }
    }
}

/// # Safety
/// `k`, `v` and their scales are the buffers of `job.store`; the rows of `piece` are nobody else's; the instruction set
/// of `S`.
#[inline(always)]
unsafe fn attend<S: Simd, E: Element>(
    job: &Job<'_>,
    piece: Piece,
    (k, v): (&[E::Raw], &[E::Raw]),
    scales: Option<(&[f32], &[f32])>,
) {
    let Job { q, store, meta, params, group, y } = *job;
    let (dim, padded) = (store.head_dim, store.padded_dim);
    let num_tokens = piece.end - piece.first;
    let num_rows = num_tokens * group;
    // Position of the piece's first token: the tokens of this step are the last of the sequence.
    let seq_len = meta.seq_lens[piece.seq] as usize;
    let position = seq_len - (meta.cu_seqlens_q[piece.seq + 1] as usize - piece.first);
    let last_position = position + num_tokens - 1;
    let first_seen = params.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));

    // [rows][dim], queries; [rows][padded], weighted values; [rows][CHUNK], scores.
    let mut queries = vec![0.0_f32; num_rows * dim];
    for token in 0..num_tokens {
        let source = &q.row(piece.first + token)[piece.kv_head * group * dim..][..group * dim];
        queries[token * group * dim..][..group * dim].copy_from_slice(source);
    }
    let mut sums = vec![0.0_f32; num_rows * padded];
    let mut scores = vec![0.0_f32; num_rows * CHUNK];
    let mut row_max = vec![f32::NEG_INFINITY; num_rows];
    let mut row_sum = vec![0.0_f32; num_rows];
    let mut gathered = Gathered::<E::Raw>::default();
    let mut widened = Widened::default();
    let (mut key_scales, mut value_scales) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);

    for chunk in first_seen / CHUNK..=last_position / CHUNK {
        let start = chunk * CHUNK;
        let num_keys = CHUNK.min(last_position + 1 - start);
        let tiles = gathered.tiles(job, piece, (start, num_keys), k, v);
        let num_tiles = num_keys.div_ceil(LANES);
        if let Some((k_scales, v_scales)) = scales {
            for key in 0..num_keys {
                let slot = meta.slot(piece.seq, start + key);
                let at = ((slot / LANES) * store.num_kv_heads + piece.kv_head) * LANES + slot % LANES;
                (key_scales[key], value_scales[key]) = (k_scales[at], v_scales[at]);
            }
        }
        // SAFETY: each tile points to dim * 16 keys and 16 * padded values; the instruction set is given.
        unsafe {
            if num_rows >= WIDENED_ROWS {
                let tiles = widened.tiles::<S, E>(&tiles, (dim, padded), num_keys);
                score_all::<S, F32>(&queries, &tiles, (dim, num_rows, num_tiles), &mut scores);
            } else {
                score_all::<S, E>(&queries, &tiles, (dim, num_rows, num_tiles), &mut scores);
            }
            for row in 0..num_rows {
                let at = position + row / group;
                let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
                let seen = from.saturating_sub(start)..(at + 1).saturating_sub(start).min(num_keys);
                let scores = &mut scores[row * CHUNK..][..CHUNK];
                let sums = &mut sums[row * padded..][..padded];
                if scales.is_some() {
                    multiply::<S>(scores, &key_scales);
                }
                soften::<S>(scores, seen, params, &mut row_max[row], &mut row_sum[row], sums);
                if scales.is_some() {
                    multiply::<S>(scores, &value_scales);
                }
            }
            if num_rows >= WIDENED_ROWS {
                let tiles = widened.current((dim, padded));
                add_all::<S, F32>(&scores, &tiles, (padded, num_rows, num_keys), &mut sums);
            } else {
                add_all::<S, E>(&scores, &tiles, (padded, num_rows, num_keys), &mut sums);
            }
        }
    }
    for row in 0..num_rows {
        let (token, head) = (piece.first + row / group, piece.kv_head * group + row % group);
        // SAFETY: this token's part of this head is written by this piece alone.
        let out = unsafe { y.slice(token * q.width + head * dim, dim) };
        let scale = 1.0 / row_sum[row];
        for (out, sum) in out.iter_mut().zip(&sums[row * padded..][..dim]) {
            *out = sum * scale;
        }
    }
}

/// Pointers to the keys and values of the tiles of a chunk.
type Tiles<T> = [(*const T, *const T); TILES];

/// Copies of tiles whose positions are scattered over the cache.
struct Gathered<T> {
    k: Vec<T>,
    v: Vec<T>,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        Self { k: Vec::new(), v: Vec::new() }
    }
}

impl<T: Copy + Default> Gathered<T> {
    #[inline(always)]
    fn tiles(
        &mut self,
        job: &Job<'_>,
        piece: Piece,
        (start, num_keys): (usize, usize),
        k: &[T],
        v: &[T],
    ) -> Tiles<T> {
        let Job { store, meta, .. } = *job;
        let (dim, padded) = (store.head_dim, store.padded_dim);
        let (k_len, v_len) = (dim * LANES, LANES * padded);
        let row = |slot: usize| (slot / LANES) * store.num_kv_heads + piece.kv_head;
        if meta.block_size.is_multiple_of(LANES) {
            return std::array::from_fn(|tile| {
                // Tiles beyond the keys are not read; they name the first to be some valid place.
                let tile = if tile * LANES < num_keys { tile } else { 0 };
                let row = row(meta.slot(piece.seq, start + tile * LANES));
                (k[row * k_len..][..k_len].as_ptr(), v[row * v_len..][..v_len].as_ptr())
            });
        }
        self.k.clear();
        self.k.resize(TILES * k_len, T::default());
        self.v.clear();
        self.v.resize(TILES * v_len, T::default());
        for key in 0..num_keys {
            let slot = meta.slot(piece.seq, start + key);
            let (row, from, to) = (row(slot), slot % LANES, key % LANES);
            let (k_to, v_to) = ((key / LANES) * k_len, (key / LANES) * v_len);
            for d in 0..dim {
                self.k[k_to + d * LANES + to] = k[row * k_len + d * LANES + from];
            }
            self.v[v_to + to * padded..][..padded]
                .copy_from_slice(&v[row * v_len + from * padded..][..padded]);
        }
        std::array::from_fn(|tile| (self.k[tile * k_len..].as_ptr(), self.v[tile * v_len..].as_ptr()))
    }
}

/// The keys and values of a chunk as f32, for pieces of many rows: widening them for every few rows would take a quarter
/// of the time.
#[derive(Default)]
struct Widened {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Widened {
    /// # Safety
    /// The tiles point to dim * 16 keys and 16 * padded values; the instruction set of `S`.
    #[inline(always)]
    unsafe fn tiles<S: Simd, E: Element>(
        &mut self,
        tiles: &Tiles<E::Raw>,
        (dim, padded): (usize, usize),
        num_keys: usize,
    ) -> Tiles<f32> {
        self.k.resize(TILES * dim * LANES, 0.0);
        self.v.resize(TILES * LANES * padded, 0.0);
        for (tile, (k, v)) in tiles.iter().enumerate().take(num_keys.div_ceil(LANES)) {
            let (k_out, v_out) = (
                self.k[tile * dim * LANES..][..dim * LANES].as_mut_ptr(),
                self.v[tile * LANES * padded..][..LANES * padded].as_mut_ptr(),
            );
            // SAFETY: both sides have these sizes, whole vectors.
            unsafe {
                for i in (0..dim * LANES).step_by(LANES) {
                    S::store(k_out.add(i), E::load::<S>(k.add(i)));
                }
                for i in (0..LANES * padded).step_by(LANES) {
                    S::store(v_out.add(i), E::load::<S>(v.add(i)));
                }
            }
        }
        self.current((dim, padded))
    }

    /// The tiles widened last.
    fn current(&self, (dim, padded): (usize, usize)) -> Tiles<f32> {
        std::array::from_fn(|tile| {
            (self.k[tile * dim * LANES..].as_ptr(), self.v[tile * LANES * padded..].as_ptr())
        })
    }
}

/// [`score_rows`] of all rows, as many at a time as registers hold.
///
/// # Safety
/// The tiles have dim * 16 keys; the instruction set of `S`.
#[inline(always)]
unsafe fn score_all<S: Simd, E: Element>(
    queries: &[f32],
    tiles: &Tiles<E::Raw>,
    (dim, num_rows, num_tiles): (usize, usize, usize),
    scores: &mut [f32],
) {
    let mut row = 0;
    while row < num_rows {
        let rows = (num_rows - row).min(S::ACCUMULATORS / TILES).max(1);
        // SAFETY: given by the caller.
        unsafe {
            let scores = &mut scores[row * CHUNK..];
            score_rows::<S, E>(&queries[row * dim..], tiles, dim, rows, num_tiles, scores);
        }
        row += rows;
    }
}

/// [`add_values`] of all rows, as many at a time as registers hold.
///
/// # Safety
/// The tiles have 16 * padded values; the instruction set of `S`.
#[inline(always)]
unsafe fn add_all<S: Simd, E: Element>(
    weights: &[f32],
    tiles: &Tiles<E::Raw>,
    (padded, num_rows, num_keys): (usize, usize, usize),
    sums: &mut [f32],
) {
    let mut row = 0;
    while row < num_rows {
        let rows = (num_rows - row).min(S::ACCUMULATORS / TILES).max(1);
        // SAFETY: given by the caller.
        unsafe {
            let sums = &mut sums[row * padded..];
            add_values::<S, E>(&weights[row * CHUNK..], tiles, padded, rows, num_keys, sums);
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
    scores: &mut [f32],
) {
    macro_rules! cases {
        ($($m:literal),*) => {
            match rows {
                // SAFETY: given by the caller.
                $($m => unsafe { score::<S, E, $m>(queries, tiles, dim, num_tiles, scores) },)*
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
    scores: &mut [f32],
) {
    let queries = &queries[..M * dim];
    let scores = &mut scores[..M * CHUNK];
    // SAFETY: the tiles have dim * 16 keys; the slices were cut to size above.
    unsafe {
        if num_tiles == TILES {
            let mut sums = [[S::splat(0.0); TILES]; M];
            for d in 0..dim {
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

/// `scores[key] *= scales[key]`
#[inline(always)]
unsafe fn multiply<S: Simd>(scores: &mut [f32], scales: &[f32; CHUNK]) {
    let scores = &mut scores[..CHUNK];
    for i in (0..CHUNK).step_by(LANES) {
        // SAFETY: both are CHUNK long; the instruction set is given.
        unsafe {
            let p = scores.as_mut_ptr().add(i);
            S::store(p, S::mul(S::load(p), S::load(scales.as_ptr().add(i))));
        }
    }
}

/// Turns a row's scores of one chunk into unnormalised weights (0 outside of `seen`) and rescales what came before.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &mut [f32],
    seen: std::ops::Range<usize>,
    params: &AttnParams,
    row_max: &mut f32,
    row_sum: &mut f32,
    sums: &mut [f32],
) {
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    for score in &mut scores[seen] {
        *score *= params.scale;
        if let Some(cap) = params.softcap {
            *score = cap * (*score / cap).tanh();
        }
    }
    // SAFETY: `scores` is CHUNK long, `sums` whole vectors; the instruction set is given.
    unsafe {
        let mut max = S::load(scores.as_ptr());
        for t in 1..TILES {
            max = S::max(max, S::load(scores.as_ptr().add(t * LANES)));
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
        for t in 0..TILES {
            let p = scores.as_mut_ptr().add(t * LANES);
            let weight = S::exp(S::sub(S::load(p), S::splat(max)));
            S::store(p, weight);
            total = S::add(total, weight);
        }
        *row_sum += S::sum(total);
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
    sums: &mut [f32],
) {
    macro_rules! cases {
        ($($m:literal),*) => {
            match rows {
                // SAFETY: given by the caller.
                $($m => unsafe { add_value_rows::<S, E, $m>(weights, tiles, padded, num_keys, sums) },)*
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
    sums: &mut [f32],
) {
    let weights = &weights[..M * CHUNK];
    let sums = &mut sums[..M * padded];
    let mut d = 0;
    while d < padded {
        // SAFETY: the tiles have 16 rows of `padded` values; the slices were cut to size above.
        unsafe {
            if padded - d >= TILES * LANES {
                add_value_columns::<S, E, M, TILES>(weights, tiles, padded, num_keys, d, sums);
                d += TILES * LANES;
            } else {
                add_value_columns::<S, E, M, 1>(weights, tiles, padded, num_keys, d, sums);
                d += LANES;
            }
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
