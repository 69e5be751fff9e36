//! Weight matrices of whole-number codes.

use std::sync::atomic::{AtomicU32, Ordering};

use super::buffer::AlignedBuf;
use super::dot::STEP_BYTES;
use super::rounding::round_to_bytes;
use super::simd::{LANES, Simd};
use super::{OutPtr, Unwritten, dispatch, pool};
use crate::error::{Result, argument};
use crate::matrix_rows::Stack;
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

    /// Rounds all rows of `stack` to bytes: 255 steps a group of 32 columns.
    pub(crate) fn int8(stack: &Stack<'_>) -> Result<Self> {
        Self::round(stack, CodeWidth::Byte)
    }

    /// Rounds all rows of `stack` to half bytes: sixteen steps a group of 32 columns, placed to make the sum of the
    /// squared errors of the group small.
    pub(crate) fn int4(stack: &Stack<'_>) -> Result<Self> {
        Self::round(stack, CodeWidth::Half)
    }

    fn round(stack: &Stack<'_>, width: CodeWidth) -> Result<Self> {
        let (rows, cols) = stack.dims();
        let mut matrix = Self::empty(rows, cols, width, false)?;
        matrix.zero = if width == CodeWidth::Byte { 128 } else { 8 };
        let rows_of = |panel: usize| stack.rows::<f32>(panel * LANES..rows.min((panel + 1) * LANES));
        let largest = AtomicU32::new(0);
        pool::try_run(matrix.num_panels(), |panel| {
            largest.fetch_max(largest_magnitude(&rows_of(panel)?), Ordering::Relaxed);
            Ok(())
        })?;
        let largest = f32::from_bits(largest.into_inner());
        // The greatest scale a group can have becomes about one: f16 then keeps eleven bits of all that matter.
        let steps = if width == CodeWidth::Byte { 127.0 } else { 8.0 };
        if largest > 0.0 {
            matrix.unit = (largest / steps).log2().ceil().clamp(-120.0, 120.0).exp2();
        }
        let unit = matrix.unit;
        matrix.fill(|panel, writer| {
            match width {
                CodeWidth::Byte => writer.round_to_bytes(&rows_of(panel)?, cols, unit),
                CodeWidth::Half => writer.round_to_halves(&rows_of(panel)?, cols, unit),
            }
            Ok(())
        })?;
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
                            writer.bytes(lane, group * GROUP, bytemuck::cast_slice(&block[2..]));
                        }
                        BlockType::Q4_0 | BlockType::Q4_1 => {
                            let codes = if block_type == BlockType::Q4_1 {
                                writer.min(lane, group, f16_at(2));
                                &block[4..]
                            } else {
                                &block[2..]
                            };
                            for (i, both) in codes.iter().enumerate() {
                                writer.half(lane, group * GROUP + i, both & 15);
                                writer.half(lane, group * GROUP + 16 + i, both >> 4);
                            }
                        }
                    }
                }
            }
            Ok(())
        })?;
        Ok(matrix)
    }

    /// Calls `write` for every panel on all threads, with what writes it.
    fn fill(&mut self, write: impl Fn(usize, &mut PanelWriter<'_>) -> Result<()> + Sync) -> Result<()> {
        let (panel_bytes, groups) = (self.width.panel_bytes(self.depth), self.num_groups());
        let codes = OutPtr(self.codes.as_mut_ptr());
        let scales = OutPtr(self.scales.as_mut_ptr());
        let mins = self.mins.as_mut().map(|mins| OutPtr(mins.as_mut_ptr()));
        pool::try_run(self.rows.div_ceil(LANES), |panel| {
            // SAFETY: one piece a panel; panels do not overlap and lie in the buffers by their sizes.
            let (codes, scales, mins) = unsafe {
                (
                    codes.slice(panel * panel_bytes, panel_bytes),
                    scales.slice(panel * groups * LANES, groups * LANES),
                    mins.as_ref().map(|mins| mins.slice(panel * groups * LANES, groups * LANES)),
                )
            };
            write(panel, &mut PanelWriter { codes, scales, mins })
        })
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
}

impl PanelWriter<'_> {
    /// Codes from column `first` on, a multiple of four; they become unsigned ones with their zero at 128.
    fn bytes(&mut self, lane: usize, first: usize, codes: &[i8]) {
        let quads = self.codes.as_chunks_mut::<4>().0[first / 4 * LANES + lane..].iter_mut().step_by(LANES);
        for (quad, codes) in quads.zip(codes.chunks(4)) {
            for (byte, code) in quad.iter_mut().zip(codes) {
                *byte = code.cast_unsigned() ^ 0x80;
            }
        }
    }

    #[inline(always)]
    fn half(&mut self, lane: usize, col: usize, code: u8) {
        let (at, shift) = CodeWidth::Half.place(lane, col);
        self.codes[at] |= code << shift;
    }

    /// Rows of `cols` elements.
    fn round_to_bytes(&mut self, rows: &[f32], cols: usize, unit: f32) {
        let groups = cols.div_ceil(GROUP);
        let (mut codes, mut scales, mut sums) = (vec![0; cols], vec![0.0; groups], vec![0; groups]);
        for (lane, row) in rows.chunks_exact(cols).enumerate() {
            round_to_bytes(row, GROUP, &mut codes, &mut scales, &mut sums);
            self.bytes(lane, 0, &codes);
            for (group, scale) in scales.iter().enumerate() {
                self.scale(lane, group, half::f16::from_f32(scale / unit).to_bits());
            }
        }
    }

    /// As above.
    fn round_to_halves(&mut self, rows: &[f32], cols: usize, unit: f32) {
        for group in 0..cols.div_ceil(GROUP) {
            let columns = group * GROUP..cols.min((group + 1) * GROUP);
            let mut block = [[0.0_f32; LANES]; GROUP];
            for (lane, row) in rows.chunks_exact(cols).enumerate() {
                for (values, x) in block.iter_mut().zip(&row[columns.clone()]) {
                    values[lane] = *x;
                }
            }
            let (scales, codes) = dispatch!(round_halves(&block) -> Halves, [block: &[[f32; LANES]; GROUP]]);
            for lane in 0..rows.len() / cols {
                self.scale(lane, group, half::f16::from_f32(scales[lane] / unit).to_bits());
                for (column, codes) in columns.clone().zip(&codes) {
                    self.half(lane, column, (codes[lane] + 8) as u8);
                }
            }
        }
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

/// Bits of the largest magnitude that is finite; magnitudes are ordered as their bits are.
fn largest_magnitude(values: &[f32]) -> u32 {
    let magnitudes = values.iter().map(|x| x.abs().to_bits());
    magnitudes.map(|bits| if bits < f32::INFINITY.to_bits() { bits } else { 0 }).fold(0, u32::max)
}

/// Each row's scale, and the codes, counted from zero.
type Halves = ([f32; LANES], [[i8; LANES]; GROUP]);

/// One group of sixteen rows, `[column][row]`, as half bytes.
///
/// Sixteen steps from -8 to 7. The element of the greatest magnitude need not be at the end of the scale: a few scales
/// around that one are tried, of both signs, each then fitted to its codes by least squares; the best is kept.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn round_halves<S: Simd>(block: &[[f32; LANES]; GROUP]) -> Halves {
    // SAFETY: rows of the block and of the codes have sixteen elements; the instruction set is given.
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
        (scales, codes_of::<S>(block, &inverses))
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
unsafe fn codes_of<S: Simd>(block: &[[f32; LANES]; GROUP], inverse: &[f32; LANES]) -> [[i8; LANES]; GROUP] {
    let mut codes = [[0_i8; LANES]; GROUP];
    for (codes, values) in codes.iter_mut().zip(block) {
        // SAFETY: as above.
        unsafe {
            let code = S::mul(S::load(values.as_ptr()), S::load(inverse.as_ptr()));
            let code = S::min(S::max(S::round(code), S::splat(-8.0)), S::splat(7.0));
            S::store_i8(codes.as_mut_ptr(), code);
        }
    }
    codes
}
