//! Codes of four or eight bits with a zero and a scale for each group of input features: `scale * (code - zero)`.

use half::f16;
use ingle_kernels::{BlockType, QuantizedBlocks, num_threads};

use super::scheme::GROUP_STEP;

/// Where the codes of a word lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// Side by side in a column of `[in_features, out_features]`: GPTQ.
    Inputs,
    /// Side by side in a row of `[in_features, out_features]`, in the order of [`FIELD_OF`].
    Outputs,
}

/// Where in an AWQ word the code of an output feature lies: its codes are, from the lowest bits up, of the features 0, 2,
/// 4, 6, 1, 3, 5 and 7.
const FIELD_OF: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The tensors of one projection as they are stored, in memory. Their sizes fit each other.
#[derive(Debug)]
pub(super) struct Grouped {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bits: u32,
    pub(super) packing: Packing,
    pub(super) qweight: Vec<u32>,
    /// `[groups, rows]`
    pub(super) zeros: Vec<u16>,
    /// `[groups, rows]`
    pub(super) scales: Vec<f32>,
    /// Group of each column.
    pub(super) group_of: Vec<u32>,
}

impl Grouped {
    /// Zeros of `[groups, rows]`, packed along the rows.
    pub(super) fn unpack_zeros(words: &[u32], bits: u32, packing: Packing, minus_one: bool) -> Vec<u16> {
        let (per_word, mask) = (codes_per_word(bits), mask(bits));
        let mut zeros = vec![0; words.len() * per_word];
        for (word, zeros) in words.iter().zip(zeros.chunks_exact_mut(per_word)) {
            for (at, zero) in zeros.iter_mut().enumerate() {
                let field = if packing == Packing::Outputs { FIELD_OF[at] } else { at };
                *zero = ((word >> (field as u32 * bits)) & mask) as u16 + u16::from(minus_one);
            }
        }
        zeros
    }

    /// The code of column `col` of row `row`.
    fn code(&self, row: usize, col: usize) -> u8 {
        let per_word = codes_per_word(self.bits);
        let (word, field) = match self.packing {
            Packing::Inputs => (col / per_word * self.rows + row, col % per_word),
            Packing::Outputs => (col * (self.rows / per_word) + row / per_word, FIELD_OF[row % per_word]),
        };
        ((self.qweight[word] >> (field as u32 * self.bits)) & mask(self.bits)) as u8
    }

    /// All values, row after row: exact products in f32 of what is stored.
    pub(super) fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        by_rows(&mut values, self.cols, |row, values| {
            for (col, value) in values.iter_mut().enumerate() {
                let group = self.group_of[col] as usize * self.rows + row;
                let steps = i32::from(self.code(row, col)) - i32::from(self.zeros[group]);
                *value = self.scales[group] * steps as f32;
            }
        });
        values
    }

    /// Whether every zero is the middle code.
    pub(super) fn is_symmetric(&self) -> bool {
        let middle = 1 << (self.bits - 1);
        self.zeros.iter().all(|zero| *zero == middle)
    }

    /// The same matrix in the kernels' blocks. Groups are a multiple of a block's columns, and in order.
    ///
    /// Q8_0 and Q4_0 blocks, for zeros in the middle, are exact as long as the scales are f16 numbers. A Q4_1 block holds
    /// `-scale * zero` as one f16: it is off by at most 2^-11 of itself, so by `zero / 2048` steps of the code, 1/128
    /// of a step at most. Returns `None` if a scale or minimum is no finite f16 number.
    pub(super) fn blocks(&self, block_type: BlockType) -> Option<QuantizedBlocks> {
        let f16s = |value: f32| Some(f16::from_f32(value)).filter(|value| value.is_finite());
        let scales: Vec<f16> = self.scales.iter().map(|scale| f16s(*scale)).collect::<Option<_>>()?;
        let mins =
            scales.iter().zip(&self.zeros).map(|(scale, zero)| f16s(-scale.to_f32() * f32::from(*zero)));
        let mins: Vec<f16> = mins.collect::<Option<_>>()?;
        let row_bytes = self.cols / BlockType::BLOCK_SIZE * block_type.block_bytes();
        let mut bytes = vec![0; self.rows * row_bytes];
        by_rows(&mut bytes, row_bytes, |row, bytes| {
            for (idx, block) in bytes.chunks_exact_mut(block_type.block_bytes()).enumerate() {
                let first = idx * GROUP_STEP;
                let group = self.group_of[first] as usize * self.rows + row;
                block[..2].copy_from_slice(&scales[group].to_le_bytes());
                let codes = match block_type {
                    BlockType::Q8_0 => {
                        for (i, out) in block[2..].iter_mut().enumerate() {
                            *out = self.code(row, first + i).wrapping_sub(128);
                        }
                        continue;
                    }
                    BlockType::Q4_0 => &mut block[2..],
                    BlockType::Q4_1 => {
                        block[2..4].copy_from_slice(&mins[group].to_le_bytes());
                        &mut block[4..]
                    }
                };
                for (i, out) in codes.iter_mut().enumerate() {
                    *out = self.code(row, first + i) | (self.code(row, first + 16 + i) << 4);
                }
            }
        });
        Some(QuantizedBlocks { block_type, rows: self.rows, cols: self.cols, bytes })
    }
}

pub(super) fn codes_per_word(bits: u32) -> usize {
    (32 / bits) as usize
}

fn mask(bits: u32) -> u32 {
    (1 << bits) - 1
}

/// Calls `write(row, values)` for every row of `out`, on several threads.
pub(super) fn by_rows<T: Send>(out: &mut [T], width: usize, write: impl Fn(usize, &mut [T]) + Sync) {
    if width == 0 {
        return;
    }
    let rows = out.len() / width;
    let per_thread = rows.div_ceil(num_threads()).max(1);
    std::thread::scope(|scope| {
        for (idx, part) in out.chunks_mut(per_thread * width).enumerate() {
            let write = &write;
            scope.spawn(move || {
                for (row, values) in part.chunks_exact_mut(width).enumerate() {
                    write(idx * per_thread + row, values);
                }
            });
        }
    });
}
