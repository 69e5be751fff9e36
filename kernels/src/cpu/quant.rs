//! Weight matrices of whole-number codes.

use candle_core::{CpuStorage, DType, Storage, Tensor};

use super::buffer::AlignedBuf;
use super::dot::STEP_BYTES;
use super::simd::LANES;
use super::{OutPtr, Unwritten, pool};
use crate::error::{Result, argument};
use crate::weight::{BlockType, QuantizedBlocks};

/// Columns that a kernel takes at once: two steps of four, or one step of half bytes.
pub(super) const STEP_COLS: usize = 8;

/// A matrix `[rows, cols]` of unsigned codes in panels of sixteen rows, with a scale for each row and group of columns:
///
/// ```text
/// value = unit * scale * (code - zero)            or, with minima,   unit * (scale * code + min)
///
/// bytes:       panel: for each four columns k:    code[row 0][k..k+4], code[row 1][k..k+4], ... row 15
/// half bytes:  panel: for each eight columns k:   the same for k..k+4 in the low halves, k+4..k+8 in the high halves
/// scales:      panel: for each group:             scale[row 0], ... scale[row 15]
/// ```
///
/// Rows are padded with zeros to a multiple of sixteen, columns to a multiple of eight. Four bytes of a row side by
/// side are what byte dot products and byte tiles want.
#[derive(Debug)]
pub(crate) struct QuantMatrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// `cols`, padded.
    pub(super) depth: usize,
    /// Columns that share a scale; the last group may be shorter.
    pub(super) group: usize,
    pub(super) width: CodeWidth,
    pub(super) codes: AlignedBuf<u8>,
    /// f16 bits.
    pub(super) scales: AlignedBuf<u16>,
    /// f16 bits, laid out as the scales.
    pub(super) mins: Option<AlignedBuf<u16>>,
    /// What a zero value is coded as, if there are no minima.
    pub(super) zero: i32,
    /// A power of two on all scales, so that they use the range of f16 well.
    pub(super) unit: f32,
}

/// Size of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CodeWidth {
    Byte,
    Half,
}

impl CodeWidth {
    /// Bytes that `cols` columns of a panel take.
    pub(super) fn panel_bytes(self, cols: usize) -> usize {
        match self {
            Self::Byte => cols * LANES,
            Self::Half => cols * LANES / 2,
        }
    }

    /// Position of column `col` of row `lane` in its panel, and how far its bits are shifted.
    fn place(self, lane: usize, col: usize) -> (usize, u32) {
        match self {
            Self::Byte => (col / 4 * STEP_BYTES + lane * 4 + col % 4, 0),
            Self::Half => {
                let shift = if col % 8 < 4 { 0 } else { 4 };
                (col / 8 * STEP_BYTES + lane * 4 + col % 4, shift)
            }
        }
    }
}

/// One group of a row, rounded.
struct Group {
    scale: f32,
    /// `code - zero`
    codes: [i8; MAX_GROUP],
}

/// Columns of a group when weights are rounded at load.
const GROUP: usize = 32;
const MAX_GROUP: usize = GROUP;

impl QuantMatrix {
    fn empty(rows: usize, cols: usize, group: usize, width: CodeWidth, minima: bool) -> Result<Self> {
        let too_large = || argument("QuantMatrix", format!("[{rows}, {cols}] is too large"));
        let depth = cols.checked_next_multiple_of(STEP_COLS).ok_or_else(too_large)?;
        let panels = rows.div_ceil(LANES);
        let code_bytes = depth
            .checked_mul(LANES)
            .map(|_| width.panel_bytes(depth))
            .and_then(|bytes| bytes.checked_mul(panels))
            .ok_or_else(too_large)?;
        let groups = cols.div_ceil(group) * LANES * panels;
        Ok(Self {
            rows,
            cols,
            depth,
            group,
            width,
            codes: AlignedBuf::zeroed(code_bytes).ok_or_else(too_large)?.with_large_pages(),
            scales: AlignedBuf::zeroed(groups).ok_or_else(too_large)?.with_large_pages(),
            mins: match minima {
                true => Some(AlignedBuf::zeroed(groups).ok_or_else(too_large)?.with_large_pages()),
                false => None,
            },
            zero: 0,
            unit: 1.0,
        })
    }

    /// Rounds the rows of all `parts`, one after another, to bytes: 255 steps a group of 32 columns.
    pub(crate) fn int8(parts: &[Tensor]) -> Result<Self> {
        Self::round(parts, CodeWidth::Byte, |values| {
            let max = values.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            round_group(values, max / 127.0, 127.0)
        })
    }

    /// Rounds the rows of all `parts` to half bytes: sixteen steps a group of 32 columns, placed to make the sum of the
    /// squared errors of the group small.
    pub(crate) fn int4(parts: &[Tensor]) -> Result<Self> {
        Self::round(parts, CodeWidth::Half, best_half_bytes)
    }

    fn round(parts: &[Tensor], width: CodeWidth, round: impl Fn(&[f32]) -> Group + Sync) -> Result<Self> {
        let cols = parts.first().map_or(Ok(0), |part| part.dim(1))?;
        let rows = parts.iter().map(|part| part.dim(0)).sum::<candle_core::Result<usize>>()?;
        let mut matrix = Self::empty(rows, cols, GROUP, width, false)?;
        matrix.zero = if width == CodeWidth::Byte { 128 } else { 8 };
        let parts = parts
            .iter()
            .map(|part| part.to_dtype(DType::F32)?.contiguous())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let storages: Vec<_> = parts.iter().map(|part| part.storage_and_layout()).collect();
        let mut sources = Vec::with_capacity(parts.len());
        for ((storage, layout), part) in storages.iter().zip(&parts) {
            let Storage::Cpu(CpuStorage::F32(w)) = &**storage else {
                return Err(argument("QuantMatrix::round", "weights are not in CPU memory"));
            };
            sources.push(&w[layout.start_offset()..][..part.elem_count()]);
        }
        let row = |idx: usize| {
            let mut idx = idx;
            for source in &sources {
                if idx < source.len() / cols {
                    return &source[idx * cols..][..cols];
                }
                idx -= source.len() / cols;
            }
            unreachable!("the rows of the parts add up")
        };
        let largest = sources.iter().flat_map(|w| w.iter()).fold(0.0_f32, |max, x| max.max(x.abs()));
        // The greatest scale a group can have becomes about one: f16 then keeps eleven bits of all that matter.
        let steps = if width == CodeWidth::Byte { 127.0 } else { 8.0 };
        matrix.unit =
            if largest > 0.0 { (largest / steps).log2().ceil().clamp(-120.0, 120.0).exp2() } else { 1.0 };
        let unit = matrix.unit;
        matrix.fill(|idx, write| {
            for (group, values) in row(idx).chunks(GROUP).enumerate() {
                let Group { scale, codes } = round(values);
                write.scale(group, half::f16::from_f32(scale / unit).to_bits());
                for (i, code) in codes[..values.len()].iter().enumerate() {
                    write.code(group * GROUP + i, (i32::from(*code) + write.zero) as u8);
                }
            }
        });
        Ok(matrix)
    }

    /// Takes over the codes and scales of blocks of a GGUF file, unchanged.
    pub(crate) fn from_blocks(parts: &[QuantizedBlocks]) -> Result<Self> {
        let Some(first) = parts.first() else { return Err(argument("QuantMatrix::from_blocks", "no parts")) };
        let (block_type, cols) = (first.block_type, first.cols);
        if parts.iter().any(|part| part.block_type != block_type || part.cols != cols) {
            return Err(argument("QuantMatrix::from_blocks", "parts of different types"));
        }
        let rows = parts.iter().map(|part| part.rows).sum();
        let width = if block_type == BlockType::Q8_0 { CodeWidth::Byte } else { CodeWidth::Half };
        let mut matrix = Self::empty(rows, cols, 32, width, block_type == BlockType::Q4_1)?;
        matrix.zero = match block_type {
            BlockType::Q8_0 => 128,
            BlockType::Q4_0 => 8,
            BlockType::Q4_1 => 0,
        };
        let row_bytes = cols / 32 * block_type.block_bytes();
        matrix.fill(|idx, write| {
            let mut idx = idx;
            let part = parts.iter().find(|part| {
                let here = idx < part.rows;
                idx -= if here { 0 } else { part.rows };
                here
            });
            let row = &part.expect("the rows of the parts add up").bytes[idx * row_bytes..][..row_bytes];
            for (group, block) in row.chunks_exact(block_type.block_bytes()).enumerate() {
                let f16_at = |i: usize| u16::from_le_bytes([block[i], block[i + 1]]);
                write.scale(group, f16_at(0));
                match block_type {
                    BlockType::Q8_0 => {
                        for (i, code) in block[2..].iter().enumerate() {
                            write.code(group * 32 + i, code.wrapping_add(128));
                        }
                    }
                    BlockType::Q4_0 | BlockType::Q4_1 => {
                        let codes = if block_type == BlockType::Q4_1 {
                            write.min(group, f16_at(2));
                            &block[4..]
                        } else {
                            &block[2..]
                        };
                        for (i, both) in codes.iter().enumerate() {
                            write.code(group * 32 + i, both & 15);
                            write.code(group * 32 + 16 + i, both >> 4);
                        }
                    }
                }
            }
        });
        Ok(matrix)
    }

    /// Calls `row` for every row on all threads, with what writes it.
    fn fill(&mut self, row: impl Fn(usize, &mut RowWriter<'_>) + Sync) {
        let (panel_bytes, groups) = (self.width.panel_bytes(self.depth), self.num_groups());
        let (rows, cols, width, zero) = (self.rows, self.cols, self.width, self.zero);
        let codes = OutPtr(self.codes.as_mut_ptr());
        let scales = OutPtr(self.scales.as_mut_ptr());
        let mins = self.mins.as_mut().map(|mins| OutPtr(mins.as_mut_ptr()));
        pool::run(rows.div_ceil(LANES), |panel| {
            // SAFETY: one piece a panel; panels do not overlap and lie in the buffers by their sizes.
            let (codes, scales, mut mins) = unsafe {
                (
                    codes.slice(panel * panel_bytes, panel_bytes),
                    scales.slice(panel * groups * LANES, groups * LANES),
                    mins.as_ref().map(|mins| mins.slice(panel * groups * LANES, groups * LANES)),
                )
            };
            for lane in 0..LANES.min(rows - panel * LANES) {
                let mins = mins.as_deref_mut();
                let mut writer = RowWriter { codes, scales, mins, lane, width, zero, cols };
                row(panel * LANES + lane, &mut writer);
            }
        });
    }

    pub(crate) fn num_bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len() + self.mins.as_ref().map_or(0, |mins| 2 * mins.len())
    }

    /// Number of panels of sixteen rows.
    pub(super) fn num_panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Number of groups of a row.
    pub(super) fn num_groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Copies row `idx` into `out` (`cols` elements).
    pub(crate) fn read_row(&self, idx: usize, out: &mut Unwritten) {
        let (panel, lane) = (idx / LANES, idx % LANES);
        let codes = &self.codes[panel * self.width.panel_bytes(self.depth)..];
        for (k, out) in out.iter_mut().enumerate() {
            let (at, shift) = self.width.place(lane, k);
            let code = match self.width {
                CodeWidth::Byte => codes[at],
                CodeWidth::Half => (codes[at] >> shift) & 15,
            };
            let group = (panel * self.num_groups() + k / self.group) * LANES + lane;
            let scale = half::f16::from_bits(self.scales[group]).to_f32();
            let value = match &self.mins {
                Some(mins) => scale * f32::from(code) + half::f16::from_bits(mins[group]).to_f32(),
                None => scale * (i32::from(code) - self.zero) as f32,
            };
            out.write(value * self.unit);
        }
    }
}

/// Writes one row of a panel.
struct RowWriter<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u16],
    mins: Option<&'a mut [u16]>,
    lane: usize,
    width: CodeWidth,
    zero: i32,
    cols: usize,
}

impl RowWriter<'_> {
    fn code(&mut self, col: usize, code: u8) {
        debug_assert!(col < self.cols);
        let (at, shift) = self.width.place(self.lane, col);
        self.codes[at] |= code << shift;
    }

    fn scale(&mut self, group: usize, scale: u16) {
        self.scales[group * LANES + self.lane] = scale;
    }

    fn min(&mut self, group: usize, min: u16) {
        if let Some(mins) = &mut self.mins {
            mins[group * LANES + self.lane] = min;
        }
    }
}

/// `values` in steps of `scale`, at most `limit` of them.
fn round_group(values: &[f32], scale: f32, limit: f32) -> Group {
    let mut codes = [0; MAX_GROUP];
    // A group of zeros has no scale; its codes are zero.
    if scale > 0.0 && scale.is_finite() {
        for (code, x) in codes.iter_mut().zip(values) {
            *code = (x / scale).round_ties_even().clamp(-limit, limit) as i8;
        }
    }
    Group { scale, codes }
}

/// Sixteen steps from -8 to 7. The element of the greatest magnitude need not be at the end of the scale: a few scales
/// around that one are tried, of both signs, each then fitted to its codes by least squares; the best is kept.
fn best_half_bytes(values: &[f32]) -> Group {
    let extreme = values.iter().fold(0.0_f32, |max, x| if x.abs() > max.abs() { *x } else { max });
    let mut best = Group { scale: 0.0, codes: [0; MAX_GROUP] };
    if extreme == 0.0 || !extreme.is_finite() {
        best.scale = extreme;
        return best;
    }
    let mut best_gain = f32::NEG_INFINITY;
    for sign in [-1.0_f32, 1.0] {
        for factor in 0..13 {
            let inverse = sign * (8.6 - 0.25 * factor as f32) / extreme;
            let mut codes = [0_i8; MAX_GROUP];
            let (mut products, mut squares) = (0.0_f32, 0.0_f32);
            for (code, x) in codes.iter_mut().zip(values) {
                let rounded = (x * inverse).round_ties_even().clamp(-8.0, 7.0);
                *code = rounded as i8;
                products += rounded * x;
                squares += rounded * rounded;
            }
            // With the scale products / squares, the squared error is sum(x^2) - products^2 / squares.
            let gain = products * products / squares;
            if squares > 0.0 && gain > best_gain {
                best_gain = gain;
                best = Group { scale: products / squares, codes };
            }
        }
    }
    best
}
