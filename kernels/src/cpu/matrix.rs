//! A weight matrix packed for the matrix kernels.

use candle_core::DType;
use half::{bf16, f16};

use super::buffer::{AlignedBuf, Zeroable};
use super::simd::LANES;
#[cfg(target_arch = "x86_64")]
use super::{Isa, halves::round_row, isa};
use super::{OutPtr, Unwritten, pool};
use crate::error::{Result, argument};
use crate::matrix_rows::{Number, Stack};

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
    /// Packs all rows of `stack` as `dtype`.
    pub(crate) fn pack(stack: &Stack<'_>, dtype: DType) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512Fp16 && matches!(dtype, DType::BF16 | DType::F16) {
            return Self::pack_halves(stack, dtype);
        }
        Self::pack_panels(stack, dtype)
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn pack_halves(stack: &Stack<'_>, dtype: DType) -> Result<Self> {
        let (rows, cols) = stack.dims();
        let panels = match dtype {
            DType::BF16 => HalfPanels::pack::<bf16>(stack)?,
            _ => HalfPanels::pack::<f16>(stack)?,
        };
        Ok(Self { rows, cols, depth: cols, panels: Panels::Half(panels) })
    }

    pub(super) fn pack_panels(stack: &Stack<'_>, dtype: DType) -> Result<Self> {
        let (rows, cols) = stack.dims();
        let depth = cols.next_multiple_of(if dtype == DType::BF16 { BF16_TILE_COLS } else { 2 });
        let panels = match dtype {
            DType::F32 => Panels::F32(spread::<f32, f32, 1>(stack, depth, |x| x)?),
            DType::BF16 => Panels::Bf16(spread::<bf16, u16, 2>(stack, depth, bf16::to_bits)?),
            DType::F16 => Panels::F16(spread::<f16, u16, 2>(stack, depth, f16::to_bits)?),
            other => return Err(argument("PackedMatrix::pack", format!("{other:?} weights on the CPU"))),
        };
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

/// Columns that are spread at a time: what is written then stays in the first-level cache.
const SPREAD_COLS: usize = 128;

/// Zeros for `rows` by `cols` elements.
fn zeros<T: Zeroable>(rows: usize, cols: usize) -> Result<AlignedBuf<T>> {
    let buffer = rows.checked_mul(cols).and_then(AlignedBuf::zeroed);
    let too_large = || argument("PackedMatrix::pack", format!("[{rows}, {cols}] is too large"));
    Ok(buffer.ok_or_else(too_large)?.with_large_pages())
}

#[cfg(target_arch = "x86_64")]
impl HalfPanels {
    /// Numbers are rounded to `T` first, as they are everywhere else.
    fn pack<T: Number>(stack: &Stack<'_>) -> Result<Self> {
        let (rows, cols) = stack.dims();
        let padded_rows = rows.next_multiple_of(HALF_LANES);
        let mut data = zeros(padded_rows, cols)?;
        let mut scales = vec![0.0; padded_rows];
        let (data_out, scales_out) = (OutPtr(data.as_mut_ptr()), OutPtr(scales.as_mut_ptr()));
        pool::try_run(padded_rows / HALF_LANES, |panel| {
            let first = panel * HALF_LANES;
            let values = stack.rows::<T>(first..rows.min(first + HALF_LANES))?;
            // SAFETY: one piece a panel; panels do not overlap and lie in the buffers by their padded sizes.
            let (out, scales) = unsafe {
                (data_out.slice(first * cols, HALF_LANES * cols), scales_out.slice(first, HALF_LANES))
            };
            let mut wide = vec![0.0_f32; cols];
            let mut rounded = vec![0_u16; values.len()];
            let rows = values.chunks_exact(cols).zip(rounded.chunks_exact_mut(cols));
            for ((row, rounded), scale) in rows.zip(scales) {
                for (wide, value) in wide.iter_mut().zip(row) {
                    *wide = value.widen();
                }
                // SAFETY: only where the instructions were detected are weights packed so.
                *scale = unsafe { round_row(&wide, rounded) };
            }
            for begin in (0..cols).step_by(SPREAD_COLS) {
                let end = cols.min(begin + SPREAD_COLS);
                for (lane, row) in rounded.chunks_exact(cols).enumerate() {
                    let to =
                        out[begin * HALF_LANES..end * HALF_LANES].iter_mut().skip(lane).step_by(HALF_LANES);
                    for (to, from) in to.zip(&row[begin..end]) {
                        *to = *from;
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { data, scales })
    }
}

/// Spreads all rows over panels of sixteen rows by `depth` columns; `GROUP` columns of a row stay together.
fn spread<T: Number, U: Zeroable + Send, const GROUP: usize>(
    stack: &Stack<'_>,
    depth: usize,
    bits: impl Fn(T) -> U + Sync,
) -> Result<AlignedBuf<U>> {
    let (rows, cols) = stack.dims();
    let mut data = zeros(rows.next_multiple_of(LANES), depth)?;
    let out = OutPtr(data.as_mut_ptr());
    pool::try_run(rows.div_ceil(LANES), |panel| {
        let first = panel * LANES;
        let values = stack.rows::<T>(first..rows.min(first + LANES))?;
        // SAFETY: one piece a panel; panels do not overlap and lie in the buffer by its padded size.
        let out: &mut [U] = unsafe { out.slice(first * depth, LANES * depth) };
        for begin in (0..cols).step_by(SPREAD_COLS) {
            let end = cols.min(begin + SPREAD_COLS);
            let (out, _) = out[begin * LANES..].as_chunks_mut::<GROUP>();
            for (lane, row) in values.chunks_exact(cols).enumerate() {
                let (groups, tail) = row[begin..end].as_chunks::<GROUP>();
                let mut out = out[lane..].iter_mut().step_by(LANES);
                for (values, out) in groups.iter().zip(out.by_ref()) {
                    *out = values.map(&bits);
                }
                if let Some(out) = out.next() {
                    for (out, value) in out.iter_mut().zip(tail) {
                        *out = bits(*value);
                    }
                }
            }
        }
        Ok(())
    })?;
    Ok(data)
}
