//! Causal attention over the paged cache.
//!
//! A piece of work is one key/value head of one sequence and some of its query rows (a token's query heads that share
//! the key head are rows side by side). Keys are visited in chunks of [`CHUNK`] positions that begin at multiples of
//! `CHUNK` **in the sequence**, with an online softmax from chunk to chunk. Every [`SEGMENT`] positions a softmax of its
//! own begins, and the segments' results are joined in order: where there are fewer pieces than threads can share,
//! segments become pieces (split-KV). A row's result therefore does not depend on how many rows it is computed with, on
//! where a prefill was cut, on which blocks hold the keys, or on how the work was shared.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod dots;
#[cfg(target_arch = "x86_64")]
mod half;
#[cfg(target_arch = "x86_64")]
mod in_cache;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod products;
#[cfg(target_arch = "x86_64")]
mod soften;
mod softmax;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod tiles;

use std::ops::Range;
use std::sync::OnceLock;

use self::products::{add_all, score_all};
use self::softmax::{Softmax, join, multiply, soften};
use self::tiles::{Ahead, Bf16, Element, F16, F32, Gathered, Int8, Widened};
use super::kv::{KvData, KvStore};
use super::scratch::Scratch;
use super::simd::{LANES, Simd};
#[cfg(target_arch = "x86_64")]
use super::{Isa, isa};
use super::{OutPtr, Rows, Unwritten, dispatch, pool};
use crate::ops::{AttnParams, PagedMeta};

/// Keys per chunk.
const CHUNK: usize = 64;
const TILES: usize = CHUNK / LANES;
/// Keys after which another softmax begins, in chunks' lengths.
const SEGMENT: usize = 4 * CHUNK;
/// Query rows of a piece from which its keys and values are widened once.
const WIDENED_ROWS: usize = 13;
/// Query rows of one piece at most.
const PIECE_ROWS: usize = 48;
/// The same where keys and values are brought into pairs for each piece.
const PAIRED_ROWS: usize = 2 * PIECE_ROWS;

/// Attention of `q` rows `[num_tokens, num_heads * head_dim]` into `y`, contiguous and of the same shape.
pub(crate) fn paged_attention(
    q: Rows<'_>,
    store: &KvStore,
    meta: &PagedMeta,
    params: &AttnParams,
    y: &mut Unwritten,
) {
    #[cfg(target_arch = "x86_64")]
    let unit = match isa() {
        Isa::Amx => Unit::Tiles,
        Isa::Avx512Bf16 => Unit::Dots,
        _ => Unit::Vectors,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let unit = Unit::Vectors;
    compute(q, store, meta, params, unit, y);
}

/// What multiplies numbers of caches of bf16 and bytes; what is used here must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Multiply-adds of f32.
    Vectors,
    #[cfg(target_arch = "x86_64")]
    Tiles,
    #[cfg(target_arch = "x86_64")]
    Dots,
}

/// As [`paged_attention`], by `unit`.
fn compute(
    q: Rows<'_>,
    store: &KvStore,
    meta: &PagedMeta,
    params: &AttnParams,
    unit: Unit,
    y: &mut Unwritten,
) {
    let num_heads = q.width / store.head_dim;
    let group = num_heads / store.num_kv_heads;
    assert!(q.width == num_heads * store.head_dim && num_heads == group * store.num_kv_heads, "heads");
    assert!(y.len() == q.num_rows * q.width && q.num_rows == meta.num_tokens(), "sizes");
    let rows = if unit == Unit::Vectors { PIECE_ROWS } else { PAIRED_ROWS };
    let tokens_per_piece = (rows / group).max(1);
    let mut pieces = Vec::new();
    for seq in 0..meta.num_seqs() {
        let (start, end) = (meta.cu_seqlens_q[seq] as usize, meta.cu_seqlens_q[seq + 1] as usize);
        for kv_head in 0..store.num_kv_heads {
            for first in (start..end).step_by(tokens_per_piece) {
                pieces.push(Piece { seq, kv_head, first, end: end.min(first + tokens_per_piece) });
            }
        }
    }
    let job = Job { q, store, meta, params, group, unit, y: OutPtr::new(y) };
    if pieces.len() < PIECES_PER_THREAD * pool::num_threads() {
        return attend_split(&job, &pieces);
    }
    // The longest first, so that threads end together.
    pieces.sort_by_key(|piece| std::cmp::Reverse(job.keys_seen(*piece).len() * (piece.end - piece.first)));
    pool::run(pieces.len(), |idx| {
        job.write(pieces[idx], &attend(&job, pieces[idx], job.keys_seen(pieces[idx])));
    });
}

/// As many pieces for each thread make up for differences in their length.
const PIECES_PER_THREAD: usize = 4;

/// One region over the segments of all pieces, then what they gave is joined in order.
fn attend_split(job: &Job<'_>, pieces: &[Piece]) {
    let segments: Vec<(Piece, Range<usize>)> = pieces
        .iter()
        .flat_map(|piece| {
            let keys = job.keys_seen(*piece);
            (keys.start / SEGMENT..=(keys.end - 1) / SEGMENT).map(move |segment| {
                let part = keys.start.max(segment * SEGMENT)..keys.end.min((segment + 1) * SEGMENT);
                (*piece, part)
            })
        })
        .collect();
    let parts: Vec<OnceLock<Softmax>> = segments.iter().map(|_| OnceLock::new()).collect();
    pool::run(segments.len(), |idx| {
        let (piece, keys) = &segments[idx];
        // Each index runs once, so the place is empty.
        let _ = parts[idx].set(attend(job, *piece, keys.clone()));
    });
    let mut parts = parts.into_iter().filter_map(OnceLock::into_inner).zip(&segments).peekable();
    while let Some((mut total, (piece, _))) = parts.next() {
        while let Some((part, _)) = parts.next_if(|(_, (next, _))| next == piece) {
            let (total, part) = (&mut total, &part);
            dispatch!(join(total, part) -> (), [total: &mut Softmax, part: &Softmax]);
        }
        job.write(*piece, &total);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    unit: Unit,
    y: OutPtr<f32>,
}

impl Job<'_> {
    /// Sixteen positions from a multiple of sixteen lie side by side in the cache.
    fn in_place(&self) -> bool {
        self.meta.block_size.is_multiple_of(LANES)
    }

    /// Position of the piece's first token: the tokens of this step are the last of the sequence.
    fn position(&self, piece: Piece) -> usize {
        let seq_len = self.meta.seq_lens[piece.seq] as usize;
        seq_len - (self.meta.cu_seqlens_q[piece.seq + 1] as usize - piece.first)
    }

    /// Positions that some row of the piece sees; never empty.
    fn keys_seen(&self, piece: Piece) -> Range<usize> {
        let position = self.position(piece);
        let first = self.params.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + piece.end - piece.first
    }

    /// Writes the rows of `piece`.
    fn write(&self, piece: Piece, result: &Softmax) {
        dispatch!(write(self, piece, result) -> (), [job: &Job<'_>, piece: Piece, result: &Softmax]);
    }
}

/// [`Job::write`]. Which zero a sum is may depend on how many zeros were added, so none is written as -0.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn write<S: Simd>(job: &Job<'_>, piece: Piece, result: &Softmax) {
    let (dim, padded) = (job.store.head_dim, result.padded());
    let num_rows = (piece.end - piece.first) * job.group;
    for (row, sum) in result.row_sum.iter().enumerate().take(num_rows) {
        let token = piece.first + row / job.group;
        let head = piece.kv_head * job.group + row % job.group;
        // SAFETY: this token's part of this head is written for this piece alone.
        let out = unsafe { job.y.slice(token * job.q.width + head * dim, dim) };
        let scale = 1.0 / sum;
        for (out, sum) in out.iter_mut().zip(&result.sums[row * padded..][..dim]) {
            *out = sum * scale + 0.0;
        }
    }
}

/// What the rows of `piece` see of the positions `keys`, which begin where a segment does or before all that is seen.
fn attend(job: &Job<'_>, piece: Piece, keys: Range<usize>) -> Softmax {
    // A function for each type: all in one would be too large for the compiler to inline what it is made of.
    macro_rules! of {
        ($attend:path, [$($element:ty),*], $raw:ty, $kv:expr, $scales:expr) => {{
            type Buffers<'a> = (&'a [$raw], &'a [$raw]);
            type Scales<'a> = Option<(&'a [f32], &'a [f32])>;
            #[inline(always)]
            unsafe fn typed<S: Simd>(
                job: &Job<'_>,
                piece: Piece,
                keys: Range<usize>,
                kv: Buffers<'_>,
                scales: Scales<'_>,
            ) -> Softmax {
                // SAFETY: the element type matches the buffers; the rest is given by the caller.
                unsafe {
                    use $attend as attend;
                    attend::<S $(, $element)*>(job, piece, keys, kv, scales)
                }
            }
            dispatch!(
                typed(job, piece, keys, $kv, $scales) -> Softmax,
                [job: &Job<'_>, piece: Piece, keys: Range<usize>, kv: Buffers<'_>, scales: Scales<'_>]
            )
        }};
    }
    match (&job.store.data, job.unit) {
        #[cfg(target_arch = "x86_64")]
        (KvData::Bf16 { k, v }, Unit::Tiles) => {
            of!(pairs::attend, [pairs::Bf16, amx::Tiles], u16, (k, v), None)
        }
        #[cfg(target_arch = "x86_64")]
        (KvData::Bf16 { k, v }, Unit::Dots) => {
            of!(pairs::attend, [pairs::Bf16, dots::Dots], u16, (k, v), None)
        }
        // Such caches are made only where there are dot products of bf16.
        #[cfg(target_arch = "x86_64")]
        (KvData::Pairs { k, v }, _) => of!(in_cache::attend, [], u16, (k, v), None),
        #[cfg(target_arch = "x86_64")]
        (KvData::Int8 { k, v, k_scales, v_scales }, Unit::Tiles) => {
            of!(pairs::attend, [pairs::Int8, amx::Tiles], i8, (k, v), Some((k_scales, v_scales)))
        }
        #[cfg(target_arch = "x86_64")]
        (KvData::Int8 { k, v, k_scales, v_scales }, Unit::Dots) => {
            of!(pairs::attend, [pairs::Int8, dots::Dots], i8, (k, v), Some((k_scales, v_scales)))
        }
        #[cfg(target_arch = "x86_64")]
        (KvData::Halves { k, v, k_scales, v_scales }, _) => {
            // SAFETY: such caches are made only where the instructions were detected.
            unsafe { half::attend(job, piece, keys, half::Cache { k, v, k_scales, v_scales }) }
        }
        (KvData::F32 { k, v }, _) => of!(attend_typed, [F32], f32, (k, v), None),
        (KvData::Bf16 { k, v }, Unit::Vectors) => of!(attend_typed, [Bf16], u16, (k, v), None),
        (KvData::F16 { k, v }, _) => of!(attend_typed, [F16], u16, (k, v), None),
        (KvData::Int8 { k, v, k_scales, v_scales }, Unit::Vectors) => {
            of!(attend_typed, [Int8], i8, (k, v), Some((k_scales, v_scales)))
        }
    }
}

/// # Safety
/// `k`, `v` and their scales are the buffers of `job.store`; the instruction set of `S`.
#[inline(always)]
unsafe fn attend_typed<S: Simd, E: Element>(
    job: &Job<'_>,
    piece: Piece,
    keys: Range<usize>,
    (k, v): (&[E::Raw], &[E::Raw]),
    scales: Option<(&[f32], &[f32])>,
) -> Softmax {
    let Job { q, store, meta, params, group, .. } = *job;
    let (dim, padded) = (store.head_dim, store.padded_dim);
    let num_tokens = piece.end - piece.first;
    let num_rows = num_tokens * group;
    let position = job.position(piece);

    // [rows][dim], queries; [rows][CHUNK], scores.
    let mut queries = Scratch::<f32>::any(num_rows * dim);
    for token in 0..num_tokens {
        let source = &q.row(piece.first + token)[piece.kv_head * group * dim..][..group * dim];
        queries[token * group * dim..][..group * dim].copy_from_slice(source);
    }
    let mut scores = Scratch::filled(num_rows * CHUNK, 0.0_f32);
    let mut total = Softmax::new(num_rows, padded);
    let mut segment = Softmax::new(num_rows, padded);
    let mut gathered = Gathered::<E::Raw>::default();
    let mut widened = Widened::default();
    let (mut key_scales, mut value_scales) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);

    for start in (keys.start / CHUNK * CHUNK..keys.end).step_by(CHUNK) {
        let num_keys = CHUNK.min(keys.end - start);
        let tiles = gathered.tiles(job, piece, (start, num_keys), k, v);
        let num_tiles = num_keys.div_ceil(LANES);
        // While the keys are read the values are on their way, and then the next keys.
        let values = Ahead::values(&tiles, padded);
        let next = Ahead::next_keys(job, piece, (start + CHUNK, keys.end), (k, v));
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
                score_all::<S, F32>(
                    &queries,
                    &tiles,
                    (dim, num_rows, num_tiles),
                    Ahead::nothing(),
                    &mut scores,
                );
            } else {
                score_all::<S, E>(&queries, &tiles, (dim, num_rows, num_tiles), values, &mut scores);
            }
            for row in 0..num_rows {
                let at = position + row / group;
                let from = params.sliding_window.map_or(0, |window| (at + 1).saturating_sub(window));
                let seen = from.saturating_sub(start)..(at + 1).saturating_sub(start).min(num_keys);
                let scores = &mut scores[row * CHUNK..][..CHUNK];
                let sums = &mut segment.sums[row * padded..][..padded];
                if scales.is_some() {
                    multiply::<S>(scores, &key_scales);
                }
                let (row_max, row_sum) = (&mut segment.row_max[row], &mut segment.row_sum[row]);
                soften::<S>(scores, seen, params, row_max, row_sum, sums);
                if scales.is_some() {
                    multiply::<S>(scores, &value_scales);
                }
            }
            if num_rows >= WIDENED_ROWS {
                let tiles = widened.current((dim, padded));
                add_all::<S, F32>(&scores, &tiles, (padded, num_rows, num_keys), next, &mut segment.sums);
            } else {
                add_all::<S, E>(&scores, &tiles, (padded, num_rows, num_keys), next, &mut segment.sums);
            }
            if (start + CHUNK).is_multiple_of(SEGMENT) || start + CHUNK >= keys.end {
                join::<S>(&mut total, &segment);
                segment.clear();
            }
        }
    }
    total
}
