//! Attention over a cache that keeps bf16 in pairs, by dot products that read them where they lie.

use std::ops::Range;

use super::dots::{self, Values};
use super::pairs::{Chunk, Extent, Scores, Weights, run};
use super::softmax::Softmax;
use super::tiles::{Ahead, Tiles, in_place};
use super::{CHUNK, Job, Piece, TILES};
use crate::cpu::simd::{LANES, Simd};

/// As [`super::pairs::attend`] for [`crate::cpu::kv::KvData::Pairs`], which has no scales.
///
/// # Safety
/// `k`, `v` are the buffers of `job.store`; the instruction set of `S`, and AVX512-BF16.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd>(
    job: &Job<'_>,
    piece: Piece,
    keys: Range<usize>,
    cache: (&[u16], &[u16]),
    _: Option<(&[f32], &[f32])>,
) -> Softmax {
    // SAFETY: given by the caller.
    unsafe { run::<S, _>(job, piece, keys, InCache::new(cache), None) }
}

struct InCache<'a> {
    cache: (&'a [u16], &'a [u16]),
    /// Copies of keys and of values whose positions are scattered over the cache.
    gathered: (Vec<u16>, Vec<u16>),
    tiles: Tiles<u16>,
    /// While scores are computed.
    values: Ahead,
    /// While values are added.
    next: Ahead,
}

impl<'a> InCache<'a> {
    fn new(cache: (&'a [u16], &'a [u16])) -> Self {
        Self {
            cache,
            gathered: Default::default(),
            tiles: [(std::ptr::null(), std::ptr::null()); TILES],
            values: Ahead::nothing(),
            next: Ahead::nothing(),
        }
    }

    /// Copies the `num_keys` positions from `start` on to tiles of their own.
    fn gather(&mut self, job: &Job<'_>, piece: Piece, start: usize, num_keys: usize) -> Tiles<u16> {
        let Job { store, meta, .. } = *job;
        let dim = store.head_dim;
        let tile_len = dim * LANES;
        let ((k, v), (keys, values)) = (self.cache, &mut self.gathered);
        keys.clear();
        keys.resize(TILES * tile_len, 0);
        values.clear();
        values.resize(TILES * tile_len, 0);
        for key in 0..num_keys {
            let slot = meta.slot(piece.seq, start + key);
            let from = ((slot / LANES) * store.num_kv_heads + piece.kv_head) * tile_len;
            let (to, old, new) = (key / LANES * tile_len, slot % LANES, key % LANES);
            for pair in 0..dim / 2 {
                let at = |lane: usize| (pair * LANES + lane) * 2;
                keys[to + at(new)..][..2].copy_from_slice(&k[from + at(old)..][..2]);
            }
            for feature in 0..dim {
                let at = |lane: usize| (lane / 2 * dim + feature) * 2 + lane % 2;
                values[to + at(new)] = v[from + at(old)];
            }
        }
        std::array::from_fn(|tile| (keys[tile * tile_len..].as_ptr(), values[tile * tile_len..].as_ptr()))
    }
}

impl Chunk for InCache<'_> {
    unsafe fn begin(&self) {}

    unsafe fn end(&self) {}

    #[inline(always)]
    unsafe fn take<S: Simd>(&mut self, job: &Job<'_>, piece: Piece, start: usize, end: usize) {
        let num_keys = CHUNK.min(end - start);
        let (k, v) = self.cache;
        self.tiles = if job.in_place() {
            in_place(job, piece, (start, num_keys), k, v)
        } else {
            self.gather(job, piece, start, num_keys)
        };
        self.values = Ahead::values(&self.tiles, job.store.padded_dim);
        self.next = Ahead::next_keys(job, piece, (start + CHUNK, end), self.cache);
    }

    unsafe fn score(&self, queries: &[u16], extent: Extent, first: bool, scores: &mut Scores) {
        let ahead = if first { self.values } else { Ahead::nothing() };
        // SAFETY: a head has `depth` features, whose pairs are lines of these tiles; the rest is given by the caller.
        unsafe { dots::score(queries, self.tiles.map(|tile| tile.0.cast()), extent, ahead, scores) };
    }

    unsafe fn add_values(&self, weights: &Weights, extent: Extent, first: bool, sums: &mut [f32]) {
        let ahead = if first { self.next } else { Ahead::nothing() };
        let values = Values {
            tiles: self.tiles.map(|tile| tile.1.cast()),
            pair_stride: extent.depth,
            column_stride: LANES,
        };
        // SAFETY: as above; tiles have values for all keys.
        unsafe { dots::add_values(weights, &values, extent, ahead, sums) };
    }
}
