//! Weight matrices of whole-number codes.

use candle_core::{CpuStorage, DType, Storage, Tensor};

use super::buffer::AlignedBuf;
use super::dot::STEP_BYTES;
use super::simd::{LANES, Simd};
use super::{OutPtr, Unwritten, dispatch, pool};
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

/// Columns that share a scale; the last group of a row may be shorter. Blocks of GGUF files have as many.
pub(super) const GROUP: usize = 32;

impl QuantMatrix {
    fn empty(rows: usize, cols: usize, width: CodeWidth, minima: bool) -> Result<Self> {
        let too_large = || argument("QuantMatrix", format!("[{rows}, {cols}] is too large"));
        let depth = cols.checked_next_multiple_of(STEP_COLS).ok_or_else(too_large)?;
        let panels = rows.div_ceil(LANES);
        let code_bytes = depth
            .checked_mul(LANES)
            .map(|_| width.panel_bytes(depth))
            .and_then(|bytes| bytes.checked_mul(panels))
            .ok_or_else(too_large)?;
        let groups = cols.div_ceil(GROUP) * LANES * panels;
        Ok(Self {
            rows,
            cols,
            depth,
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
        Self::round(parts, CodeWidth::Byte)
    }

    /// Rounds the rows of all `parts` to half bytes: sixteen steps a group of 32 columns, placed to make the sum of the
    /// squared errors of the group small.
    pub(crate) fn int4(parts: &[Tensor]) -> Result<Self> {
        Self::round(parts, CodeWidth::Half)
    }

    fn round(parts: &[Tensor], width: CodeWidth) -> Result<Self> {
        let cols = parts.first().map_or(Ok(0), |part| part.dim(1))?;
        let rows = parts.iter().map(|part| part.dim(0)).sum::<candle_core::Result<usize>>()?;
        let mut matrix = Self::empty(rows, cols, width, false)?;
        matrix.zero = if width == CodeWidth::Byte { 128 } else { 8 };
        let parts = parts
            .iter()
            .map(|part| part.to_dtype(DType::F32)?.contiguous())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let storages: Vec<_> = parts.iter().map(|part| part.storage_and_layout()).collect();
        let mut all_rows: Vec<&[f32]> = Vec::with_capacity(rows);
        for ((storage, layout), part) in storages.iter().zip(&parts) {
            let Storage::Cpu(CpuStorage::F32(w)) = &**storage else {
                return Err(argument("QuantMatrix::round", "weights are not in CPU memory"));
            };
            all_rows.extend(w[layout.start_offset()..][..part.elem_count()].chunks_exact(cols));
        }
        let largest = all_rows.iter().flat_map(|row| row.iter()).fold(0.0_f32, |max, x| max.max(x.abs()));
        // The greatest scale a group can have becomes about one: f16 then keeps eleven bits of all that matter.
        let steps = if width == CodeWidth::Byte { 127.0 } else { 8.0 };
        if largest > 0.0 {
            matrix.unit = (largest / steps).log2().ceil().clamp(-120.0, 120.0).exp2();
        }
        let unit = matrix.unit;
        matrix.fill(|panel, writer| {
            let rows = &all_rows[panel * LANES..][..LANES.min(rows - panel * LANES)];
            for group in 0..cols.div_ceil(GROUP) {
                let columns = group * GROUP..cols.min((group + 1) * GROUP);
                let mut block = [[0.0_f32; LANES]; GROUP];
                for (lane, row) in rows.iter().enumerate() {
                    for (values, x) in block.iter_mut().zip(&row[columns.clone()]) {
                        values[lane] = *x;
                    }
                }
                let (scales, codes) = round_block(&block, width);
                for lane in 0..rows.len() {
                    writer.scale(lane, group, half::f16::from_f32(scales[lane] / unit).to_bits());
                    for (column, codes) in columns.clone().zip(&codes) {
                        writer.code(lane, column, (i32::from(codes[lane]) + writer.zero) as u8);
                    }
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
        let mut matrix = Self::empty(rows, cols, width, block_type == BlockType::Q4_1)?;
        matrix.zero = match block_type {
            BlockType::Q8_0 => 128,
            BlockType::Q4_0 => 8,
            BlockType::Q4_1 => 0,
        };
        let row_bytes = cols / GROUP * block_type.block_bytes();
        let row_of = |mut idx: usize| {
            for part in parts {
                if idx < part.rows {
                    return &part.bytes[idx * row_bytes..][..row_bytes];
                }
                idx -= part.rows;
            }
            unreachable!("the rows of the parts add up")
        };
        matrix.fill(|panel, writer| {
            for lane in 0..LANES.min(rows - panel * LANES) {
                let blocks = row_of(panel * LANES + lane).chunks_exact(block_type.block_bytes());
                for (group, block) in blocks.enumerate() {
                    let f16_at = |i: usize| u16::from_le_bytes([block[i], block[i + 1]]);
                    writer.scale(lane, group, f16_at(0));
                    match block_type {
                        BlockType::Q8_0 => {
                            for (i, code) in block[2..].iter().enumerate() {
                                writer.code(lane, group * GROUP + i, code.wrapping_add(128));
                            }
                        }
                        BlockType::Q4_0 | BlockType::Q4_1 => {
                            let codes = if block_type == BlockType::Q4_1 {
                                writer.min(lane, group, f16_at(2));
                                &block[4..]
                            } else {
                                &block[2..]
                            };
                            for (i, both) in codes.iter().enumerate() {
                                writer.code(lane, group * GROUP + i, both & 15);
                                writer.code(lane, group * GROUP + 16 + i, both >> 4);
                            }
                        }
                    }
                }
            }
        });
        Ok(matrix)
    }

    /// Calls `write` for every panel on all threads, with what writes it.
    fn fill(&mut self, write: impl Fn(usize, &mut PanelWriter<'_>) + Sync) {
        let (panel_bytes, groups) = (self.width.panel_bytes(self.depth), self.num_groups());
        let (width, zero) = (self.width, self.zero);
        let codes = OutPtr(self.codes.as_mut_ptr());
        let scales = OutPtr(self.scales.as_mut_ptr());
        let mins = self.mins.as_mut().map(|mins| OutPtr(mins.as_mut_ptr()));
        pool::run(self.rows.div_ceil(LANES), |panel| {
            // SAFETY: one piece a panel; panels do not overlap and lie in the buffers by their sizes.
            let (codes, scales, mins) = unsafe {
                (
                    codes.slice(panel * panel_bytes, panel_bytes),
                    scales.slice(panel * groups * LANES, groups * LANES),
                    mins.as_ref().map(|mins| mins.slice(panel * groups * LANES, groups * LANES)),
                )
            };
            write(panel, &mut PanelWriter { codes, scales, mins, width, zero });
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
        self.cols.div_ceil(GROUP)
    }

    /// `[rows, cols]`.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether a code is a byte, else half of one.
    pub(crate) fn is_bytes(&self) -> bool {
        self.width == CodeWidth::Byte
    }

    /// The factor on all scales.
    pub(crate) fn unit(&self) -> f32 {
        self.unit
    }

    /// Codes of group `group` of row `row`, counted from zero and zero after the last column, and the scale's bits.
    pub(crate) fn read_group(&self, row: usize, group: usize) -> ([i32; GROUP], u16) {
        let (panel, lane) = (row / LANES, row % LANES);
        let panel_codes = &self.codes[panel * self.width.panel_bytes(self.depth)..];
        let mut codes = [0; GROUP];
        for (col, code) in (group * GROUP..self.cols.min((group + 1) * GROUP)).zip(&mut codes) {
            let (at, shift) = self.width.place(lane, col);
            let mask = if self.width == CodeWidth::Byte { 255 } else { 15 };
            *code = i32::from(panel_codes[at] >> shift & mask) - self.zero;
        }
        (codes, self.scales[(panel * self.num_groups() + group) * LANES + lane])
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
            let group = (panel * self.num_groups() + k / GROUP) * LANES + lane;
            let scale = half::f16::from_bits(self.scales[group]).to_f32();
            let value = match &self.mins {
                Some(mins) => scale * f32::from(code) + half::f16::from_bits(mins[group]).to_f32(),
                None => scale * (i32::from(code) - self.zero) as f32,
            };
            out.write(value * self.unit);
        }
    }
}

/// Writes the rows of one panel.
struct PanelWriter<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [u16],
    mins: Option<&'a mut [u16]>,
    width: CodeWidth,
    zero: i32,
}

impl PanelWriter<'_> {
    #[inline(always)]
    fn code(&mut self, lane: usize, col: usize, code: u8) {
        let (at, shift) = self.width.place(lane, col);
        self.codes[at] |= code << shift;
    }

    fn scale(&mut self, lane: usize, group: usize, scale: u16) {
        self.scales[group * LANES + lane] = scale;
    }

    fn min(&mut self, lane: usize, group: usize, min: u16) {
        if let Some(mins) = &mut self.mins {
            mins[group * LANES + lane] = min;
        }
    }
}

/// One group of sixteen rows, `[column][row]`: each row's scale, and the codes, counted from zero.
fn round_block(block: &[[f32; LANES]; GROUP], width: CodeWidth) -> ([f32; LANES], [[i8; LANES]; GROUP]) {
    type Rounded = ([f32; LANES], [[i8; LANES]; GROUP]);
    match width {
        CodeWidth::Byte => dispatch!(round_bytes(block) -> Rounded, [block: &[[f32; LANES]; GROUP]]),
        CodeWidth::Half => dispatch!(round_halves(block) -> Rounded, [block: &[[f32; LANES]; GROUP]]),
    }
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn round_bytes<S: Simd>(block: &[[f32; LANES]; GROUP]) -> ([f32; LANES], [[i8; LANES]; GROUP]) {
    // SAFETY: rows of the block and of the codes have sixteen elements; the instruction set is given.
    unsafe {
        let largest = largest_of::<S>(block);
        let scales = largest.map(|x| x / 127.0);
        // A group of zeros has no scale; its codes are zero.
        let inverse = scales.map(|scale| if scale > 0.0 && scale.is_finite() { 1.0 / scale } else { 0.0 });
        (scales, codes_of::<S>(block, &inverse, 127.0, 127.0))
    }
}

/// Sixteen steps from -8 to 7. The element of the greatest magnitude need not be at the end of the scale: a few scales
/// around that one are tried, of both signs, each then fitted to its codes by least squares; the best is kept.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn round_halves<S: Simd>(block: &[[f32; LANES]; GROUP]) -> ([f32; LANES], [[i8; LANES]; GROUP]) {
    // SAFETY: as above.
    unsafe {
        let largest = largest_of::<S>(block);
        let mut best_gain = [0.0_f32; LANES];
        let (mut scales, mut inverses) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        for sign in [-1.0_f32, 1.0] {
            for factor in 0..13 {
                let steps = sign * (8.6 - 0.25 * factor as f32);
                let inverse = largest.map(|x| if x > 0.0 && x.is_finite() { steps / x } else { 0.0 });
                let inverse_lanes = S::load(inverse.as_ptr());
                let (mut products, mut squares) = (S::splat(0.0), S::splat(0.0));
                for values in block {
                    let x = S::load(values.as_ptr());
                    let code = S::round(S::mul(x, inverse_lanes));
                    let code = S::min(S::max(code, S::splat(-8.0)), S::splat(7.0));
                    products = S::fma(code, x, products);
                    squares = S::fma(code, code, squares);
                }
                let (products, squares) = (S::to_array(products), S::to_array(squares));
                for lane in 0..LANES {
                    // With the scale products / squares, the squared error is sum(x^2) - products^2 / squares.
                    let gain = products[lane] * (products[lane] / squares[lane]);
                    if squares[lane] > 0.0 && gain > best_gain[lane] {
                        best_gain[lane] = gain;
                        scales[lane] = products[lane] / squares[lane];
                        inverses[lane] = inverse[lane];
                    }
                }
            }
        }
        (scales, codes_of::<S>(block, &inverses, 8.0, 7.0))
    }
}

/// Each row's largest magnitude.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn largest_of<S: Simd>(block: &[[f32; LANES]; GROUP]) -> [f32; LANES] {
    // SAFETY: as above.
    unsafe {
        let mut largest = S::splat(0.0);
        for values in block {
            let x = S::load(values.as_ptr());
            largest = S::max(largest, S::max(x, S::sub(S::splat(0.0), x)));
        }
        S::to_array(largest)
    }
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn codes_of<S: Simd>(
    block: &[[f32; LANES]; GROUP],
    inverse: &[f32; LANES],
    low: f32,
    high: f32,
) -> [[i8; LANES]; GROUP] {
    let mut codes = [[0_i8; LANES]; GROUP];
    for (codes, values) in codes.iter_mut().zip(block) {
        // SAFETY: as above.
        unsafe {
            let code = S::mul(S::load(values.as_ptr()), S::load(inverse.as_ptr()));
            let code = S::min(S::max(S::round(code), S::splat(-low)), S::splat(high));
            S::store_i8(codes.as_mut_ptr(), code);
        }
    }
    codes
}
