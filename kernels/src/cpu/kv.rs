//! Keys and values of one layer in CPU memory.

use super::buffer::AlignedBuf;
use super::elementwise::rotate_head;
use super::rounding::round_to_bytes;
use super::scratch::Scratch;
use super::simd::LANES;
#[cfg(target_arch = "x86_64")]
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::{Isa, dispatch, isa};
use super::{OutPtr, Rows, pool};
use crate::KvDtype;
use crate::error::{Result, argument};

/// Slots in tiles of sixteen, so that one vector holds the same feature of sixteen keys:
///
/// ```text
/// keys:   [tile][kv head][head_dim][16 slots]
/// values: [tile][kv head][16 slots][padded head_dim]
/// ```
///
/// Slot `s` is lane `s % 16` of tile `s / 16`. With a block size that is a multiple of sixteen, sixteen aligned
/// positions of a sequence are one tile and attention reads it in place; otherwise it gathers.
///
/// Bytes, and 16-bit floats that are multiplied as such, have a scale for each slot's key and value of a head:
/// `[tile][kv head][16 slots]`.
///
/// Dot products of bf16 want two numbers side by side that are multiplied with two others, so where these compute, bf16 lies in
/// pairs of features (keys) and of slots (values):
///
/// ```text
/// keys:   [tile][kv head][head_dim / 2][16 slots][2]
/// values: [tile][kv head][8 pairs of slots][head_dim][2]
/// ```
#[derive(Debug)]
pub(crate) struct KvStore {
    pub(super) num_slots: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    /// `head_dim` rounded up to whole vectors; the rest stays zero.
    pub(super) padded_dim: usize,
    pub(super) data: KvData,
}

#[derive(Debug)]
pub(super) enum KvData {
    F32 {
        k: AlignedBuf<f32>,
        v: AlignedBuf<f32>,
    },
    Bf16 {
        k: AlignedBuf<u16>,
        v: AlignedBuf<u16>,
    },
    /// bf16 in pairs.
    #[cfg(target_arch = "x86_64")]
    Pairs {
        k: AlignedBuf<u16>,
        v: AlignedBuf<u16>,
    },
    F16 {
        k: AlignedBuf<u16>,
        v: AlignedBuf<u16>,
    },
    Int8 {
        k: AlignedBuf<i8>,
        v: AlignedBuf<i8>,
        k_scales: AlignedBuf<f32>,
        v_scales: AlignedBuf<f32>,
    },
    /// f16, scaled to magnitudes below 1 by a power of two. Keeps what bf16 and f16 keep, but for numbers that are
    /// less than `2^-14` of a row's largest.
    #[cfg(target_arch = "x86_64")]
    Halves {
        k: AlignedBuf<u16>,
        v: AlignedBuf<u16>,
        k_scales: AlignedBuf<f32>,
        v_scales: AlignedBuf<f32>,
    },
}

/// Heads in pairs are whole steps of the products.
#[cfg(target_arch = "x86_64")]
const PAIRED_DIM: usize = 32;
/// Elements from which storing them is worth a parallel region.
const PARALLEL_ELEMENTS: usize = 1 << 12;

/// How 16-bit numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Plain,
    /// bf16 and f16 as [`KvData::Halves`].
    #[cfg(target_arch = "x86_64")]
    Halves,
    /// bf16 as [`KvData::Pairs`], if heads fill whole lines; the rest as it is.
    #[cfg(target_arch = "x86_64")]
    Pairs,
}

/// That of the instruction set in use.
fn layout() -> Layout {
    #[cfg(target_arch = "x86_64")]
    match isa() {
        Isa::Avx512Fp16 => return Layout::Halves,
        Isa::Avx512Bf16 => return Layout::Pairs,
        _ => {}
    }
    Layout::Plain
}

/// Whether caches of 16-bit numbers have scales.
fn as_halves() -> bool {
    #[cfg(target_arch = "x86_64")]
    return layout() == Layout::Halves;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Bytes that the key (or the value) of one token and head of `head_dim` elements takes.
pub(crate) fn head_bytes(dtype: KvDtype, head_dim: usize) -> usize {
    let scale = match dtype {
        KvDtype::Int8 => size_of::<f32>(),
        KvDtype::Bf16 | KvDtype::F16 if as_halves() => size_of::<f32>(),
        _ => 0,
    };
    dtype.element_bytes() * head_dim + scale
}

impl KvStore {
    pub(crate) fn new(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Result<Self> {
        Self::with(num_slots, (num_kv_heads, head_dim), dtype, layout())
    }

    /// As [`KvStore::new`] in a layout that may be used.
    pub(super) fn with(
        num_slots: usize,
        (num_kv_heads, head_dim): (usize, usize),
        dtype: KvDtype,
        layout: Layout,
    ) -> Result<Self> {
        let padded_dim = head_dim.next_multiple_of(LANES);
        let too_large = || argument("KvLayer::new", format!("{num_slots} slots are too many"));
        let rows = num_slots.next_multiple_of(LANES).checked_mul(num_kv_heads).ok_or_else(too_large)?;
        let k_len = rows.checked_mul(head_dim).ok_or_else(too_large)?;
        let v_len = rows.checked_mul(padded_dim).ok_or_else(too_large)?;
        let f32s = |len| AlignedBuf::<f32>::zeroed(len).ok_or_else(too_large);
        let u16s = |len| AlignedBuf::<u16>::zeroed(len).ok_or_else(too_large);
        let i8s = |len| AlignedBuf::<i8>::zeroed(len).ok_or_else(too_large);
        let data = match dtype {
            #[cfg(target_arch = "x86_64")]
            KvDtype::Bf16 if layout == Layout::Pairs && head_dim.is_multiple_of(PAIRED_DIM) => {
                KvData::Pairs { k: u16s(k_len)?, v: u16s(v_len)? }
            }
            #[cfg(target_arch = "x86_64")]
            KvDtype::Bf16 | KvDtype::F16 if layout == Layout::Halves => KvData::Halves {
                k: u16s(k_len)?,
                v: u16s(v_len)?,
                k_scales: f32s(rows)?,
                v_scales: f32s(rows)?,
            },
            KvDtype::F32 => KvData::F32 { k: f32s(k_len)?, v: f32s(v_len)? },
            KvDtype::Bf16 => KvData::Bf16 { k: u16s(k_len)?, v: u16s(v_len)? },
            KvDtype::F16 => KvData::F16 { k: u16s(k_len)?, v: u16s(v_len)? },
            KvDtype::Fp8 => {
                return Err(argument("KvLayer::new", "an fp8 cache is for GPUs only; the CPU has int8"));
            }
            KvDtype::Int8 => {
                KvData::Int8 { k: i8s(k_len)?, v: i8s(v_len)?, k_scales: f32s(rows)?, v_scales: f32s(rows)? }
            }
        };
        Ok(Self { num_slots, num_kv_heads, head_dim, padded_dim, data })
    }

    pub(crate) fn num_slots(&self) -> usize {
        self.num_slots
    }

    pub(crate) fn heads(&self) -> (usize, usize) {
        (self.num_kv_heads, self.head_dim)
    }

    /// Stores the key and value rows into their slots.
    pub(crate) fn store(&mut self, rows: &NewRows<'_>) {
        let shape = (self.num_kv_heads, self.head_dim, self.padded_dim);
        match &mut self.data {
            KvData::F32 { k, v } => scatter(rows, shape, (k, v), |x, out, _| out.copy_from_slice(x)),
            KvData::Bf16 { k, v } => scatter(rows, shape, (k, v), |x, out, _| {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = half::bf16::from_f32(*x).to_bits();
                }
            }),
            #[cfg(target_arch = "x86_64")]
            KvData::Pairs { k, v } => scatter_pairs(rows, shape, (k, v)),
            KvData::F16 { k, v } => scatter(rows, shape, (k, v), |x, out, _| {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = half::f16::from_f32(*x).to_bits();
                }
            }),
            KvData::Int8 { k, v, k_scales, v_scales } => {
                let scales = [OutPtr(k_scales.as_mut_ptr()), OutPtr(v_scales.as_mut_ptr())];
                scatter(rows, shape, (k, v), |x, out, (side, at)| {
                    // SAFETY: as long as the buffers have slots and heads; the slot's part of a side is this piece's alone.
                    let scale = unsafe { scales[side as usize].slice(at, 1) };
                    round_to_bytes(x, x.len(), out, scale, &mut [0]);
                });
            }
            #[cfg(target_arch = "x86_64")]
            KvData::Halves { k, v, k_scales, v_scales } => {
                let scales = [OutPtr(k_scales.as_mut_ptr()), OutPtr(v_scales.as_mut_ptr())];
                scatter(rows, shape, (k, v), |x, out, (side, at)| {
                    // SAFETY: as above; such caches are made only where the instructions were detected.
                    unsafe { scales[side as usize].slice(at, 1)[0] = super::halves::round_row(x, out) };
                });
            }
        }
    }
}

/// Keys and values of new tokens.
#[derive(Clone, Copy)]
pub(crate) struct NewRows<'a> {
    /// `[num_tokens, num_kv_heads * head_dim]`
    pub(crate) k: Rows<'a>,
    pub(crate) v: Rows<'a>,
    /// `[num_tokens]`, all below the number of slots.
    pub(crate) slots: &'a [u32],
    /// Cosines and sines that the keys are rotated by on their way, as [`super::rope`] does; `None`: they are as they shall be.
    pub(crate) rotation: Option<(Rows<'a>, Rows<'a>)>,
}

#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

impl NewRows<'_> {
    /// Calls `store(side, head, slot, numbers, scratch)` for each side of each head of each token, all tokens of a side and head in
    /// one piece of a parallel region: whatever the slots are, such pieces share no memory. `scratch` has room for a head.
    fn for_each<T: bytemuck::Pod>(
        &self,
        (heads, dim): (usize, usize),
        store: impl Fn(Side, usize, usize, &[f32], &mut [T]) + Sync,
    ) {
        let piece = |idx: usize| {
            let (head, side) = (idx / 2, if idx.is_multiple_of(2) { Side::Keys } else { Side::Values });
            let (mut rotated, mut scratch) = (Scratch::any(dim), Scratch::any(dim));
            for (token, slot) in self.slots.iter().enumerate() {
                let rows = if matches!(side, Side::Keys) { self.k } else { self.v };
                let mut numbers = &rows.row(token)[head * dim..][..dim];
                if let (Side::Keys, Some((cos, sin))) = (side, self.rotation) {
                    rotate_head(numbers, (cos.row(token), sin.row(token)), &mut rotated);
                    numbers = &rotated;
                }
                store(side, head, *slot as usize, numbers, &mut scratch);
            }
        };
        if self.slots.len() * heads * dim < PARALLEL_ELEMENTS {
            (0..2 * heads).for_each(piece);
        } else {
            pool::run(2 * heads, piece);
        }
    }
}

/// Brings rows into tiles. `convert` gets a head of a row, its place, and what and where it is: `[tile][kv head][16 slots]`.
fn scatter<T: bytemuck::Pod + Send>(
    rows: &NewRows<'_>,
    (heads, dim, padded): (usize, usize, usize),
    (k_out, v_out): (&mut [T], &mut [T]),
    convert: impl Fn(&[f32], &mut [T], (Side, usize)) + Sync,
) {
    let (k_out, v_out) = (OutPtr(k_out.as_mut_ptr()), OutPtr(v_out.as_mut_ptr()));
    rows.for_each((heads, dim), |side, head, slot, numbers, key: &mut [T]| {
        let (row, lane) = (slot / LANES * heads + head, slot % LANES);
        let place = (side, row * LANES + lane);
        match side {
            Side::Keys => {
                convert(numbers, key, place);
                // SAFETY: slots are below `num_slots`; the keys of this head are this piece's alone.
                let tile = unsafe { k_out.slice(row * dim * LANES, dim * LANES) };
                for (out, x) in tile.iter_mut().skip(lane).step_by(LANES).zip(key) {
                    *out = *x;
                }
            }
            Side::Values => {
                // SAFETY: as above.
                let out = unsafe { v_out.slice((row * LANES + lane) * padded, dim) };
                convert(numbers, out, place);
            }
        }
    });
}

/// Brings rows into tiles of pairs, as bf16.
#[cfg(target_arch = "x86_64")]
fn scatter_pairs(
    rows: &NewRows<'_>,
    (heads, dim, _): (usize, usize, usize),
    (k_out, v_out): (&mut [u16], &mut [u16]),
) {
    let (k_out, v_out) = (OutPtr(k_out.as_mut_ptr()), OutPtr(v_out.as_mut_ptr()));
    rows.for_each((heads, dim), |side, head, slot, numbers, rounded: &mut [u16]| {
        let (at, lane) = ((slot / LANES * heads + head) * dim * LANES, slot % LANES);
        let out = &mut *rounded;
        dispatch!(round_to_bf16(numbers, out) -> (), [numbers: &[f32], out: &mut [u16]]);
        match side {
            Side::Keys => {
                // SAFETY: slots are below `num_slots`; the keys of this head are this piece's alone.
                let tile = unsafe { k_out.slice(at, dim * LANES) };
                let pairs = tile.chunks_exact_mut(2).skip(lane).step_by(LANES);
                for (out, pair) in pairs.zip(rounded.chunks_exact(2)) {
                    out.copy_from_slice(pair);
                }
            }
            Side::Values => {
                // SAFETY: as above.
                let tile = unsafe { v_out.slice(at, LANES * dim) };
                let row = &mut tile[lane / 2 * 2 * dim..][..2 * dim];
                for (out, x) in row.iter_mut().skip(lane % 2).step_by(2).zip(rounded) {
                    *out = *x;
                }
            }
        }
    });
}

/// # Safety
/// The instruction set of `S`; `row` is whole vectors, `out` as long.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn round_to_bf16<S: Simd>(row: &[f32], out: &mut [u16]) {
    for (x, out) in row.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: both have sixteen elements; the instruction set is given.
        unsafe { S::store_bf16(out.as_mut_ptr(), S::load(x.as_ptr())) };
    }
}
