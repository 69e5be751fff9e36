//! A weight matrix packed for the matrix kernels.

use candle_core::{CpuStorage, DType, Storage, Tensor};

use super::buffer::AlignedBuf;
use super::simd::LANES;
use super::{OutPtr, Unwritten, pool};
use crate::error::{Result, argument};

/// A matrix `[rows, cols]` in panels of sixteen rows, so that one vector holds the same column of sixteen rows:
///
/// ```text
/// f32:        panel p: for each column k:       w[16p + 0..16][k]
/// others:     panel p: for each pair k, k + 1:  w[16p][k], w[16p][k+1], w[16p+1][k], w[16p+1][k+1], ...
/// ```
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

/// Columns of a bf16 tile.
pub(super) const BF16_TILE_COLS: usize = 32;

#[derive(Debug)]
pub(super) enum Panels {
    F32(AlignedBuf<f32>),
    Bf16(AlignedBuf<u16>),
    F16(AlignedBuf<u16>),
}

impl PackedMatrix {
    /// Packs the rows of all `parts`, one after another, as `dtype`. Each part is a CPU matrix of the same width.
    pub(crate) fn pack(parts: &[Tensor], dtype: DType) -> Result<Self> {
        let cols = parts.first().map_or(Ok(0), |part| part.dim(1))?;
        let rows = parts.iter().map(|part| part.dim(0)).sum::<candle_core::Result<usize>>()?;
        let too_large = || argument("PackedMatrix::pack", format!("[{rows}, {cols}] is too large"));
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
        }
    }
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
