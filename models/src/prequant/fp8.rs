//! FP8 weights: one byte of the type E4M3 each, and scales to multiply them by.

use half::f16;
use ingle_kernels::Fp8Matrix;

use super::grouped::by_rows;

/// What a scale is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleOf {
    Tensor,
    Row,
    /// Rows and columns of a block; the last ones may be smaller.
    Block(usize, usize),
}

impl ScaleOf {
    /// What scales of shape `scales` are for in a matrix `[rows, cols]`; `block` is what the config says.
    pub(super) fn of(
        scales: &[usize],
        (rows, cols): (usize, usize),
        block: Option<(usize, usize)>,
    ) -> Option<Self> {
        match (scales, block) {
            ([], _) | ([1], _) | ([1, 1], None) => Some(Self::Tensor),
            ([n] | [n, 1], None) if *n == rows => Some(Self::Row),
            ([down, across], Some((r, c))) if *down == rows.div_ceil(r) && *across == cols.div_ceil(c) => {
                Some(Self::Block(r, c))
            }
            _ => None,
        }
    }
}

impl ScaleOf {
    /// Columns that must stay together where [`ScaleOf::by_rows`] can say it; `None` where it cannot.
    pub(super) fn step(self) -> Option<usize> {
        match self {
            Self::Tensor | Self::Row => Some(1),
            Self::Block(_, cols) => cols.is_multiple_of(Fp8Matrix::GROUP).then_some(Fp8Matrix::GROUP),
        }
    }

    /// The same scales as those of rows, and factors of groups of columns, as [`Fp8Matrix`] has them. A row's scale is
    /// the largest of its blocks', which is kept exactly; factors are at most one, rounded to f16: off by 2^-11 of
    /// themselves, where a code is off by 2^-4.
    pub(super) fn by_rows(self, scales: &[f32], (rows, cols): (usize, usize)) -> (Vec<f32>, Vec<f16>) {
        let (block_rows, block_cols) = match self {
            Self::Tensor => return (vec![scales[0]; rows], Vec::new()),
            Self::Row => return (scales.to_vec(), Vec::new()),
            Self::Block(rows, cols) => (rows, cols),
        };
        let (mut row_scales, mut factors) = (Vec::with_capacity(rows), Vec::new());
        for row in 0..rows {
            let across = cols.div_ceil(block_cols);
            let of_row = &scales[row / block_rows * across..][..across];
            // Not `max`, which would pass over a NaN.
            let largest = of_row
                .iter()
                .copied()
                .fold(0.0, |max, scale: f32| if scale.abs() <= max { max } else { scale.abs() });
            row_scales.push(largest);
            let groups = (0..cols).step_by(Fp8Matrix::GROUP);
            factors.extend(groups.map(|col| match of_row[col / block_cols] / largest {
                factor if largest > 0.0 => f16::from_f32(factor),
                _ => f16::ONE,
            }));
        }
        (row_scales, factors)
    }
}

/// The numbers that `codes` stand for, `[rows, cols]`, exact but for the product's rounding to f32.
pub(super) fn values(codes: &[u8], cols: usize, scales: &[f32], scale_of: ScaleOf) -> Vec<f32> {
    let table: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
    let mut values = vec![0.0; codes.len()];
    by_rows(&mut values, cols, |row, values| {
        let codes = &codes[row * cols..][..cols];
        match scale_of {
            ScaleOf::Tensor | ScaleOf::Row => {
                let scale = scales[if scale_of == ScaleOf::Row { row } else { 0 }];
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = table[usize::from(*code)] * scale;
                }
            }
            ScaleOf::Block(block_rows, block_cols) => {
                let scales = &scales[row / block_rows * cols.div_ceil(block_cols)..];
                let blocks = values.chunks_mut(block_cols).zip(codes.chunks(block_cols));
                for ((values, codes), scale) in blocks.zip(scales) {
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = table[usize::from(*code)] * scale;
                    }
                }
            }
        }
    });
    values
}

/// The number of a code: a sign, four bits of exponent above 2^-7, three of mantissa. There is no infinity, and the one
/// NaN is all ones.
pub(super) fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}
