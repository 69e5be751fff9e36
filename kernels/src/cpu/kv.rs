//! Keys and values of one layer in CPU memory.

use super::Rows;
use super::buffer::AlignedBuf;
use super::quant_gemm::round_to_bytes;
use super::simd::LANES;
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
/// Bytes have a scale for each slot's key and value of a head: `[tile][kv head][16 slots]`.
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
    F32 { k: AlignedBuf<f32>, v: AlignedBuf<f32> },
    Bf16 { k: AlignedBuf<u16>, v: AlignedBuf<u16> },
    F16 { k: AlignedBuf<u16>, v: AlignedBuf<u16> },
    Int8 { k: AlignedBuf<i8>, v: AlignedBuf<i8>, k_scales: AlignedBuf<f32>, v_scales: AlignedBuf<f32> },
}

impl KvStore {
    pub(crate) fn new(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
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

    /// Stores the key and value rows `[num_tokens, num_kv_heads * head_dim]` into `slots`, all below `num_slots`.
    pub(crate) fn store(&mut self, k: Rows<'_>, v: Rows<'_>, slots: &[u32]) {
        let (heads, dim, padded) = (self.num_kv_heads, self.head_dim, self.padded_dim);
        match &mut self.data {
            KvData::F32 { k: k_out, v: v_out } => {
                scatter(k, v, slots, (heads, dim, padded), k_out, v_out, |x| x)
            }
            KvData::Bf16 { k: k_out, v: v_out } => {
                scatter(k, v, slots, (heads, dim, padded), k_out, v_out, |x| {
                    half::bf16::from_f32(x).to_bits()
                });
            }
            KvData::F16 { k: k_out, v: v_out } => {
                scatter(k, v, slots, (heads, dim, padded), k_out, v_out, |x| {
                    half::f16::from_f32(x).to_bits()
                });
            }
            KvData::Int8 { k: k_out, v: v_out, k_scales, v_scales } => {
                let mut codes = vec![0_i8; dim];
                for (token, slot) in slots.iter().enumerate() {
                    let (tile, lane) = (*slot as usize / LANES, *slot as usize % LANES);
                    for head in 0..heads {
                        let row = tile * heads + head;
                        let k_scale = &mut k_scales[row * LANES + lane..][..1];
                        round_to_bytes(
                            &k.row(token)[head * dim..][..dim],
                            dim,
                            &mut codes,
                            k_scale,
                            &mut [0],
                        );
                        for (d, code) in codes.iter().enumerate() {
                            k_out[row * dim * LANES + d * LANES + lane] = *code;
                        }
                        let v_row = &mut v_out[(row * LANES + lane) * padded..][..dim];
                        let v_scale = &mut v_scales[row * LANES + lane..][..1];
                        round_to_bytes(&v.row(token)[head * dim..][..dim], dim, v_row, v_scale, &mut [0]);
                    }
                }
            }
        }
    }
}

fn scatter<T: Copy>(
    k: Rows<'_>,
    v: Rows<'_>,
    slots: &[u32],
    (heads, dim, padded): (usize, usize, usize),
    k_out: &mut [T],
    v_out: &mut [T],
    convert: impl Fn(f32) -> T,
) {
    for (token, slot) in slots.iter().enumerate() {
        let (tile, lane) = (*slot as usize / LANES, *slot as usize % LANES);
        for head in 0..heads {
            let k_tile = &mut k_out[(tile * heads + head) * dim * LANES..][..dim * LANES];
            for (d, x) in k.row(token)[head * dim..][..dim].iter().enumerate() {
                k_tile[d * LANES + lane] = convert(*x);
            }
            let v_row = &mut v_out[((tile * heads + head) * LANES + lane) * padded..][..dim];
            for (out, x) in v_row.iter_mut().zip(&v.row(token)[head * dim..][..dim]) {
                *out = convert(*x);
            }
        }
    }
}
