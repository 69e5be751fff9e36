//! A weight matrix packed for the matrix kernels.

use candle_core::{CpuStorage, DType, Storage, Tensor};

use super::buffer::AlignedBuf;
use super::simd::LANES;
#[cfg(target_arch = "x86_64")]
use super::{Isa, halves::round_row, isa};
use super::{OutPtr, Unwritten, pool};
use crate::error::{Error, Result, argument};

/// A matrix `[rows, cols]` in panels of sixteen rows, so that one vector holds the same column of sixteen rows:
///
/// ```text
/// f32:        panel p: for each column k:       w[16p + 0..16][k]
/// others:     panel p: for each pair k, k + 1:  w[16p][k], w[16p][k+1], w[16p+1][k], w[16p+1][k+1], ...
/// ```
///
/// Where the processor multiplies 16-bit floats, bf16 and f16 are [`HalfPanels`] instead.
///
/// Rows are padded with zeros to a multiple of sixteen, columns to an even number; those of bf16 to a multiple of 32:
/// 32 columns of a panel, as they lie, are a tile of a matrix unit.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// `cols`, padded.
    pub(super) depth: usize,
    pub(super) panels: Panels,
}

/// Rows of a panel of 16-bit floats.
#[cfg(target_arch = "x86_64")]
pub(super) const HALF_LANES: usize = 32;

/// Columns of a bf16 tile.
pub(super) const BF16_TILE_COLS: usize = 32;

#[derive(Debug)]
pub(super) enum Panels {
    F32(AlignedBuf<f32>),
    Bf16(AlignedBuf<u16>),
    F16(AlignedBuf<u16>),
    #[cfg(target_arch = "x86_64")]
    Half(HalfPanels),
}

/// Panels of 32 rows as f16, each row scaled by a power of two so that its largest magnitude is below 1:
///
/// ```text
/// panel p: for each column k:  w[32p + 0..32][k]
/// ```
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
pub(super) struct HalfPanels {
    pub(super) data: AlignedBuf<u16>,
    /// What a row's numbers are multiplied by; padded to whole panels.
    pub(super) scales: Vec<f32>,
}

impl PackedMatrix {
    /// Packs the rows of all `parts`, one after another, as `dtype`. Each part is a CPU matrix of the same width.
    pub(crate) fn pack(parts: &[Tensor], dtype: DType) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512Fp16 && matches!(dtype, DType::BF16 | DType::F16) {
            return Self::pack_halves(parts, dtype);
        }
        Self::pack_panels(parts, dtype)
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn pack_halves(parts: &[Tensor], dtype: DType) -> Result<Self> {
        let (rows, cols) = stacked(parts)?;
        let panels = HalfPanels::pack(parts, dtype, rows, cols)?.ok_or_else(|| too_large(rows, cols))?;
        Ok(Self { rows, cols, depth: cols, panels: Panels::Half(panels) })
    }

    pub(super) fn pack_panels(parts: &[Tensor], dtype: DType) -> Result<Self> {
        let (rows, cols) = stacked(parts)?;
        let too_large = || too_large(rows, cols);
        let depth = cols.next_multiple_of(if dtype == DType::BF16 { BF16_TILE_COLS } else { 2 });
        let padded = rows.next_multiple_of(LANES).checked_mul(depth).ok_or_else(too_large)?;
        let mut panels = match dtype {
            DType::F32 => Panels::F32(AlignedBuf::zeroed(padded).ok_or_else(too_large)?.with_large_pages()),
            DType::BF16 => Panels::Bf16(AlignedBuf::zeroed(padded).ok_or_else(too_large)?.with_large_pages()),
            DType::F16 => Panels::F16(AlignedBuf::zeroed(padded).ok_or_else(too_large)?.with_large_pages()),
            other => return Err(argument("PackedMatrix::pack", format!("{other:?} weights on the CPU"))),
        };
        let mut first_row = 0;
        for part in parts {
            // Already in the wanted type in nearly every case; then this is a reference, not a copy.
            let part = part.to_dtype(dtype)?.contiguous()?;
            let (storage, layout) = part.storage_and_layout();
            let start = layout.start_offset();
            let count = part.elem_count();
            match (&mut panels, &*storage) {
                (Panels::F32(out), Storage::Cpu(CpuStorage::F32(w))) => {
                    pack_rows(&w[start..][..count], (cols, depth), first_row, out, 1, |x| x);
                }
                (Panels::Bf16(out), Storage::Cpu(CpuStorage::BF16(w))) => {
                    pack_rows(&w[start..][..count], (cols, depth), first_row, out, 2, |x| x.to_bits());
                }
                (Panels::F16(out), Storage::Cpu(CpuStorage::F16(w))) => {
                    pack_rows(&w[start..][..count], (cols, depth), first_row, out, 2, |x| x.to_bits());
                }
                _ => return Err(argument("PackedMatrix::pack", "weights are not in CPU memory")),
            }
            first_row += part.dim(0)?;
        }
        Ok(Self { rows, cols, depth, panels })
    }

    pub(crate) fn num_bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(data) => data.len() * 4,
            Panels::Bf16(data) | Panels::F16(data) => data.len() * 2,
            #[cfg(target_arch = "x86_64")]
            Panels::Half(HalfPanels { data, scales }) => data.len() * 2 + scales.len() * 4,
        }
    }

    /// Number of panels of sixteen rows.
    pub(super) fn num_panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Copies row `idx` into `out` (`cols` elements).
    pub(crate) fn read_row(&self, idx: usize, out: &mut Unwritten) {
        let (panel, lane) = (idx / LANES, idx % LANES);
        let cols = self.depth;
        let pair = |k: usize| panel * LANES * cols + (k / 2) * 2 * LANES + lane * 2 + k % 2;
        match &self.panels {
            Panels::F32(data) => {
                for (k, out) in out.iter_mut().enumerate() {
                    out.write(data[panel * LANES * cols + k * LANES + lane]);
                }
            }
            Panels::Bf16(data) => {
                for (k, out) in out.iter_mut().enumerate() {
                    out.write(half::bf16::from_bits(data[pair(k)]).to_f32());
                }
            }
            Panels::F16(data) => {
                for (k, out) in out.iter_mut().enumerate() {
                    out.write(half::f16::from_bits(data[pair(k)]).to_f32());
                }
            }
            #[cfg(target_arch = "x86_64")]
            Panels::Half(HalfPanels { data, scales }) => {
                let (panel, lane) = (idx / HALF_LANES, idx % HALF_LANES);
                for (k, out) in out.iter_mut().enumerate() {
                    let bits = data[(panel * cols + k) * HALF_LANES + lane];
                    out.write(half::f16::from_bits(bits).to_f32() * scales[idx]);
                }
            }
        }
    }
}

/// Rows of all parts, and columns.
fn stacked(parts: &[Tensor]) -> Result<(usize, usize)> {
    let cols = parts.first().map_or(Ok(0), |part| part.dim(1))?;
    let rows = parts.iter().map(|part| part.dim(0)).sum::<candle_core::Result<usize>>()?;
    Ok((rows, cols))
}

fn too_large(rows: usize, cols: usize) -> Error {
    argument("PackedMatrix::pack", format!("[{rows}, {cols}] is too large"))
}

#[cfg(target_arch = "x86_64")]
impl HalfPanels {
    /// `None` if it is too large.
    fn pack(parts: &[Tensor], dtype: DType, rows: usize, cols: usize) -> Result<Option<Self>> {
        let padded_rows = rows.next_multiple_of(HALF_LANES);
        let Some(mut data) = padded_rows.checked_mul(cols).and_then(AlignedBuf::zeroed) else {
            return Ok(None);
        };
        data = data.with_large_pages();
        let mut scales = vec![0.0; padded_rows];
        let mut first_row = 0;
        for part in parts {
            let part = part.to_dtype(dtype)?.contiguous()?;
            let (storage, layout) = part.storage_and_layout();
            let range = layout.start_offset()..layout.start_offset() + part.elem_count();
            match &*storage {
                Storage::Cpu(CpuStorage::BF16(w)) => {
                    pack_halves(&w[range], cols, first_row, &mut data, &mut scales, |x| x.to_f32());
                }
                Storage::Cpu(CpuStorage::F16(w)) => {
                    pack_halves(&w[range], cols, first_row, &mut data, &mut scales, |x| x.to_f32());
                }
                _ => return Err(argument("PackedMatrix::pack", "weights are not in CPU memory")),
            }
            first_row += part.dim(0)?;
        }
        Ok(Some(Self { data, scales }))
    }
}

/// Scales, rounds and spreads row-major `w` over the panels from row `first_row` on.
#[cfg(target_arch = "x86_64")]
fn pack_halves<T: Copy + Sync>(
    w: &[T],
    cols: usize,
    first_row: usize,
    data: &mut [u16],
    scales: &mut [f32],
    widen: impl Fn(T) -> f32 + Sync,
) {
    if cols == 0 {
        return;
    }
    let end_row = first_row + w.len() / cols;
    let (first_panel, last_panel) = (first_row / HALF_LANES, end_row.div_ceil(HALF_LANES));
    let (data, scales) = (OutPtr(data.as_mut_ptr()), OutPtr(scales.as_mut_ptr()));
    pool::run(last_panel - first_panel, |piece| {
        let panel = first_panel + piece;
        // SAFETY: one piece a panel; panels do not overlap and lie in the buffers by their padded sizes.
        let (out, scales) = unsafe {
            (
                data.slice(panel * HALF_LANES * cols, HALF_LANES * cols),
                scales.slice(panel * HALF_LANES, HALF_LANES),
            )
        };
        let mut row = vec![0.0_f32; cols];
        let mut rounded = vec![0_u16; HALF_LANES * cols];
        let lanes =
            (0..HALF_LANES).filter(|lane| (first_row..end_row).contains(&(panel * HALF_LANES + lane)));
        for lane in lanes.clone() {
            let idx = panel * HALF_LANES + lane - first_row;
            for (value, w) in row.iter_mut().zip(&w[idx * cols..][..cols]) {
                *value = widen(*w);
            }
            // SAFETY: only where the instructions were detected are weights packed so.
            scales[lane] = unsafe { round_row(&row, &mut rounded[lane * cols..][..cols]) };
        }
        // A few columns at a time: what is written stays in the first-level cache.
        for first in (0..cols).step_by(HALF_LANES) {
            let end = cols.min(first + HALF_LANES);
            for lane in lanes.clone() {
                let from = &rounded[lane * cols..][first..end];
                let to = &mut out[first * HALF_LANES..end * HALF_LANES];
                for (to, from) in to.iter_mut().skip(lane).step_by(HALF_LANES).zip(from) {
                    *to = *from;
                }
            }
        }
    });
}

/// Spreads row-major `w` over the panels from row `first_row` on; `group` columns of a row stay together.
fn pack_rows<T: Copy + Sync, U: Copy + Send>(
    w: &[T],
    (cols, padded_cols): (usize, usize),
    first_row: usize,
    out: &mut [U],
    group: usize,
    convert: impl Fn(T) -> U + Sync,
) {
    if cols == 0 {
        return;
    }
    let num_rows = w.len() / cols;
    let (first_panel, last_panel) = (first_row / LANES, (first_row + num_rows).div_ceil(LANES));
    let out = OutPtr(out.as_mut_ptr());
    pool::run(last_panel - first_panel, |piece| {
        let panel = first_panel + piece;
        // SAFETY: one piece a panel; panels do not overlap and lie in the buffer by its padded size.
        let panel_out = unsafe { out.slice(panel * LANES * padded_cols, LANES * padded_cols) };
        for lane in 0..LANES {
            let Some(row) = (panel * LANES + lane).checked_sub(first_row).filter(|row| *row < num_rows)
            else {
                continue;
            };
            let source = &w[row * cols..][..cols];
            for (chunk, values) in source.chunks(group).enumerate() {
                for (i, value) in values.iter().enumerate() {
                    panel_out[chunk * group * LANES + lane * group + i] = convert(*value);
                }
            }
        }
    });
}
