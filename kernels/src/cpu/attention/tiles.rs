//! The keys and values of a chunk: where they are and how they are read.

use super::{CHUNK, Job, Piece, TILES};
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{LANES, Simd};

/// How a cached element is read.
pub(super) trait Element {
    type Raw: Copy + Default;

    /// # Safety
    /// Sixteen readable elements at `p`; the instruction set of `S`.
    unsafe fn load<S: Simd>(p: *const Self::Raw) -> S::V;
}

pub(super) struct F32;
pub(super) struct Bf16;
pub(super) struct F16;
pub(super) struct Int8;

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

/// Pointers to the keys and values of the tiles of a chunk.
pub(super) type Tiles<T> = [(*const T, *const T); TILES];

/// The tiles of a chunk where they lie; the cache keeps sixteen positions side by side ([`Job::in_place`]).
#[inline(always)]
pub(super) fn in_place<T>(
    job: &Job<'_>,
    piece: Piece,
    (start, num_keys): (usize, usize),
    k: &[T],
    v: &[T],
) -> Tiles<T> {
    let Job { store, meta, .. } = *job;
    let (k_len, v_len) = (store.head_dim * LANES, LANES * store.padded_dim);
    std::array::from_fn(|tile| {
        // Tiles beyond the keys are not read; they name the first to be some valid place.
        let tile = if tile * LANES < num_keys { tile } else { 0 };
        let slot = meta.slot(piece.seq, start + tile * LANES);
        let row = (slot / LANES) * store.num_kv_heads + piece.kv_head;
        (k[row * k_len..][..k_len].as_ptr(), v[row * v_len..][..v_len].as_ptr())
    })
}

/// What will be read next, to be asked for a line at a time: tiles are too short for the processor to notice by itself.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    tiles: [*const u8; TILES],
    lines: usize,
}

impl Ahead {
    const LINE: usize = 64;

    pub(super) fn nothing() -> Self {
        Self { tiles: [std::ptr::null(); TILES], lines: 0 }
    }

    /// The keys of `tiles`.
    pub(super) fn keys<T>(tiles: &Tiles<T>, dim: usize) -> Self {
        Self { tiles: tiles.map(|tile| tile.0.cast()), lines: dim * LANES * size_of::<T>() / Self::LINE }
    }

    /// The values of `tiles`.
    pub(super) fn values<T>(tiles: &Tiles<T>, padded: usize) -> Self {
        Self { tiles: tiles.map(|tile| tile.1.cast()), lines: padded * LANES * size_of::<T>() / Self::LINE }
    }

    /// The keys of the chunk at `start` of those below `end`, if there is one and it lies in place.
    pub(super) fn next_keys<T>(
        job: &Job<'_>,
        piece: Piece,
        (start, end): (usize, usize),
        (k, v): (&[T], &[T]),
    ) -> Self {
        if start >= end || !job.in_place() {
            return Self::nothing();
        }
        let num_keys = CHUNK.min(end - start);
        Self::keys(&in_place(job, piece, (start, num_keys), k, v), job.store.head_dim)
    }

    /// Asks for line `idx` of each tile, if there are as many.
    ///
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    pub(super) unsafe fn ask<S: Simd>(&self, idx: usize) {
        if idx < self.lines {
            for tile in self.tiles {
                // SAFETY: given by the caller; a prefetch may name any address.
                unsafe { S::prefetch(tile.wrapping_add(idx * Self::LINE)) };
            }
        }
    }
}

/// Copies of tiles whose positions are scattered over the cache.
pub(super) struct Gathered<T> {
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
    pub(super) fn tiles(
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
        if job.in_place() {
            return in_place(job, piece, (start, num_keys), k, v);
        }
        let row = |slot: usize| (slot / LANES) * store.num_kv_heads + piece.kv_head;
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
pub(super) struct Widened {
    k: Scratch<f32>,
    v: Scratch<f32>,
}

impl Widened {
    /// # Safety
    /// The tiles point to dim * 16 keys and 16 * padded values; the instruction set of `S`.
    #[inline(always)]
    pub(super) unsafe fn tiles<S: Simd, E: Element>(
        &mut self,
        tiles: &Tiles<E::Raw>,
        (dim, padded): (usize, usize),
        num_keys: usize,
    ) -> Tiles<f32> {
        if self.k.is_empty() {
            // Tiles beyond the last key are not written below: what an earlier operation left could be NaN.
            let zeros = |len| Scratch::filled(len, 0.0);
            (self.k, self.v) = (zeros(TILES * dim * LANES), zeros(TILES * LANES * padded));
        }
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
    pub(super) fn current(&self, (dim, padded): (usize, usize)) -> Tiles<f32> {
        std::array::from_fn(|tile| {
            (self.k[tile * dim * LANES..].as_ptr(), self.v[tile * LANES * padded..].as_ptr())
        })
    }
}
