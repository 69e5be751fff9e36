//! Weight matrices of codes in the layout of the CUDA kernels (`cuda/matrix.cuh` draws it), made in host memory.
//!
//! A row of tiles is sixteen rows; a tile has 64 columns, two blocks of 32; a lane of a warp is `4 g + t` and has eight
//! columns of rows `g` and `g + 8` of each block. Nothing here needs a device.

mod large;
mod plan;

use std::sync::Mutex;

use candle_core::Tensor;
use half::f16;

use crate::cpu::{self, QuantMatrix};
use crate::error::{Result, argument};
use crate::fp8::Fp8Matrix;
use crate::matrix_rows::with_stack;
use crate::weight::{BlockType, Quantization, QuantizedBlocks};
pub use large::{PANEL_TOKENS, panel_rows, token_group};
pub use plan::{LinearArgs, LinearPlan, LinearShape, MAX_TOKENS, ROUNDED_FP8, SKINNY_TOKENS, can_gate};

const TILE_ROWS: usize = 16;
const TILE_COLS: usize = 64;
const BLOCK: usize = 32;

/// What a matrix of tiles holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileFormat {
    /// e4m3 numbers, an f32 scale for each row.
    Fp8,
    /// As `Fp8`, and an f16 factor for each 32 columns of a row.
    Fp8Grouped,
    /// Signed bytes, an f16 scale for each 32 columns of a row.
    Int8,
    /// Half bytes counted from 8, an f16 scale for each 32 columns of a row.
    Int4,
    /// Half bytes, an f16 scale and an f16 minimum for each 32 columns of a row.
    Int4WithMinima,
}

impl TileFormat {
    /// As the kernels' names have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp8 => "fp8",
            Self::Fp8Grouped => "fp8g",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int4WithMinima => "int4m",
        }
    }

    /// Bytes of one tile's codes.
    #[must_use]
    pub fn tile_bytes(self) -> usize {
        match self {
            Self::Fp8 | Self::Fp8Grouped | Self::Int8 => TILE_ROWS * TILE_COLS,
            Self::Int4 | Self::Int4WithMinima => TILE_ROWS * TILE_COLS / 2,
        }
    }
}

/// A matrix `[rows, cols]` in tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct TiledMatrix {
    /// What the codes are.
    pub format: TileFormat,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Tile after tile, row of tiles after row of tiles.
    pub codes: Vec<u8>,
    /// Bits of f16; empty for `Fp8`.
    pub scales: Vec<u16>,
    /// Bits of f16; empty unless the format has minima.
    pub mins: Vec<u16>,
    /// One a row for `Fp8` and `Fp8Grouped`, else empty.
    pub row_scales: Vec<f32>,
    /// Factor on all scales.
    pub unit: f32,
}

/// One block of one row, before it is laid out.
struct Block {
    /// Bytes (`Int8`: two's complement), or half bytes in their lower bits.
    codes: [u8; BLOCK],
    scale: u16,
    min: u16,
}

impl TiledMatrix {
    /// The rows of all `parts`, one after another, codes and scales unchanged.
    ///
    /// # Errors
    /// If the parts differ in type or columns, or a size does not fit its bytes.
    pub fn from_blocks(parts: &[QuantizedBlocks]) -> Result<Self> {
        let (block_type, rows, cols) = QuantizedBlocks::check(parts)?;
        let format = match block_type {
            BlockType::Q8_0 => TileFormat::Int8,
            BlockType::Q4_0 => TileFormat::Int4,
            BlockType::Q4_1 => TileFormat::Int4WithMinima,
        };
        let starts = starts(parts.iter().map(|part| part.rows));
        let size = block_type.block_bytes();
        Self::build(format, rows, cols, 1.0, |row, block| {
            let (part, row) = part_of(&starts, row);
            let bytes = &parts[part].bytes[(row * (cols / BLOCK) + block) * size..][..size];
            let f16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let min = if block_type == BlockType::Q4_1 { f16_at(2) } else { 0 };
            let packed = &bytes[if block_type == BlockType::Q4_1 { 4 } else { 2 }..];
            let codes = match block_type {
                BlockType::Q8_0 => std::array::from_fn(|i| packed[i]),
                BlockType::Q4_0 | BlockType::Q4_1 => {
                    std::array::from_fn(|i| if i < 16 { packed[i] & 15 } else { packed[i - 16] >> 4 })
                }
            };
            Block { codes, scale: f16_at(0), min }
        })
    }

    /// As [`TiledMatrix::from_blocks`], of e4m3 numbers.
    ///
    /// # Errors
    /// If a size does not fit, the parts differ in columns, or a number is NaN.
    pub fn from_fp8(parts: &[Fp8Matrix]) -> Result<Self> {
        let (rows, cols) = Fp8Matrix::check(parts)?;
        const { assert!(Fp8Matrix::GROUP == BLOCK) };
        let starts = starts(parts.iter().map(|part| part.rows));
        // A part without factors beside one that has them gets factors of one.
        let grouped = parts.iter().any(|part| !part.factors.is_empty());
        let format = if grouped { TileFormat::Fp8Grouped } else { TileFormat::Fp8 };
        let mut matrix = Self::build(format, rows, cols, 1.0, |row, block| {
            let (part, row) = part_of(&starts, row);
            let part = &parts[part];
            let factor = part.factors.get(row * part.groups() + block).copied().unwrap_or(f16::ONE);
            let row = &part.bytes[row * cols..][..cols];
            let codes = std::array::from_fn(|i| row.get(block * BLOCK + i).copied().unwrap_or(0));
            Block { codes, scale: factor.to_bits(), min: 0 }
        })?;
        matrix.row_scales = parts.iter().flat_map(|part| part.row_scales.iter().copied()).collect();
        Ok(matrix)
    }

    /// Rounds the rows of all `parts` as [`crate::Weight::quantized`] says, to the same codes as on the CPU.
    ///
    /// # Errors
    /// If the parts are not matrices of finite numbers in CPU memory with the same number of columns.
    pub fn quantized(parts: &[Tensor], quantization: Quantization) -> Result<Self> {
        match quantization {
            Quantization::Int8 => Self::from_rounded(&with_stack(parts, QuantMatrix::int8)?),
            Quantization::Int4 => Self::from_rounded(&with_stack(parts, QuantMatrix::int4)?),
            Quantization::Fp8 => {
                Self::from_fp8(&parts.iter().map(Fp8Matrix::round).collect::<Result<Vec<_>>>()?)
            }
        }
    }

    /// Takes over codes that were rounded for the CPU kernels.
    fn from_rounded(matrix: &QuantMatrix) -> Result<Self> {
        let format = if matrix.is_bytes() { TileFormat::Int8 } else { TileFormat::Int4 };
        let (rows, cols) = matrix.dims();
        let bias = if matrix.is_bytes() { 0 } else { 8 };
        Self::build(format, rows, cols, matrix.unit(), |row, block| {
            let (codes, scale) = matrix.read_group(row, block);
            Block { codes: codes.map(|code| (code + bias) as u8), scale, min: 0 }
        })
    }

    fn build(
        format: TileFormat,
        rows: usize,
        cols: usize,
        unit: f32,
        block_at: impl Fn(usize, usize) -> Block + Sync,
    ) -> Result<Self> {
        let too_large = || argument("TiledMatrix", format!("[{rows}, {cols}] is too large"));
        // The kernels count rows and columns in 32 bits.
        if rows == 0 || cols == 0 || rows.max(cols) > i32::MAX as usize {
            return Err(too_large());
        }
        let (tile_rows, steps) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(TILE_COLS));
        let tiles = tile_rows.checked_mul(steps).ok_or_else(too_large)?;
        let bytes = tiles.checked_mul(format.tile_bytes()).ok_or_else(too_large)?;
        let halves = matches!(format, TileFormat::Int4 | TileFormat::Int4WithMinima);
        // A code of zero; where there are minima, scale and minimum of the padding are zero.
        let mut codes = vec![if halves { 0x88 } else { 0 }; bytes];
        let num_scales = |wanted: bool| if wanted { tiles * TILE_ROWS * 2 } else { 0 };
        let mut scales = vec![0_u16; num_scales(format != TileFormat::Fp8)];
        let mut mins = vec![0_u16; num_scales(format == TileFormat::Int4WithMinima)];
        let row_of_tiles = steps * TILE_ROWS * 2;
        let mut piece_scales = scales.chunks_exact_mut(row_of_tiles);
        let mut piece_mins = mins.chunks_exact_mut(row_of_tiles);
        let pieces: Vec<_> = codes
            .chunks_exact_mut(steps * format.tile_bytes())
            .map(|codes| Mutex::new((codes, piece_scales.next(), piece_mins.next())))
            .collect();
        cpu::in_parallel(pieces.len(), |tile_row| {
            // Each piece is taken once; a poisoned one belongs to a thread that panicked, which ends the region.
            let mut piece = pieces[tile_row].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (codes, scales, mins) = &mut *piece;
            for row in 0..TILE_ROWS.min(rows - tile_row * TILE_ROWS) {
                for block in 0..cols.div_ceil(BLOCK) {
                    let found = block_at(tile_row * TILE_ROWS + row, block);
                    let tile = &mut codes[block / 2 * format.tile_bytes()..][..format.tile_bytes()];
                    place_codes(tile, halves, row, block % 2, &found.codes);
                    let at = block / 2 * TILE_ROWS * 2 + row % 8 * 4 + block % 2 * 2 + row / 8;
                    if let Some(scales) = scales {
                        scales[at] = found.scale;
                    }
                    if let Some(mins) = mins {
                        mins[at] = found.min;
                    }
                }
            }
        });
        drop(pieces);
        Ok(Self { format, rows, cols, codes, scales, mins, row_scales: Vec::new(), unit })
    }

    /// Bytes it takes in device memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.codes.len() + 2 * (self.scales.len() + self.mins.len()) + 4 * self.row_scales.len()
    }
}

/// Writes a block of row `row` of a tile.
fn place_codes(tile: &mut [u8], halves: bool, row: usize, block: usize, codes: &[u8; BLOCK]) {
    let (g, half) = (row % 8, row / 8);
    for (t, codes) in codes.chunks_exact(8).enumerate() {
        let lane = g * 4 + t;
        if halves {
            // Pairs of neighbours lie sixteen bits apart.
            let word = codes
                .iter()
                .enumerate()
                .fold(0_u32, |word, (i, code)| word | u32::from(code & 15) << (i / 2 * 4 + i % 2 * 16));
            tile[lane * 16 + (block * 2 + half) * 4..][..4].copy_from_slice(&word.to_le_bytes());
        } else {
            let to = &mut tile[block * 512 + lane * 16 + half * 8..][..8];
            for (word, codes) in to.chunks_exact_mut(4).zip(codes.chunks_exact(4)) {
                word.copy_from_slice(&[codes[0], codes[2], codes[1], codes[3]]);
            }
        }
    }
}

/// First row of each part, and the end.
fn starts(rows: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut starts = vec![0];
    for rows in rows {
        starts.push(starts[starts.len() - 1] + rows);
    }
    starts
}

/// The part that holds `row` of all, and which of its rows that is.
fn part_of(starts: &[usize], row: usize) -> (usize, usize) {
    let part = starts.partition_point(|start| *start <= row) - 1;
    (part, row - starts[part])
}
