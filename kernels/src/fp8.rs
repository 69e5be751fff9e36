//! Floats of 8 bits: sign, 4 bits of exponent, 3 of mantissa; no infinities, NaN has all bits but the sign set (e4m3).

use candle_core::{DType, Device, Tensor};
use half::f16;

use crate::error::{Result, argument};

/// A matrix `[rows, cols]` of e4m3 numbers, row after row. Those of a row are multiplied by a scale of its own and, if
/// there are any, those of [`Fp8Matrix::GROUP`] columns of a row by a factor.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Matrix {
    /// `rows * cols` numbers.
    pub bytes: Vec<u8>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// What the numbers of each row are multiplied by.
    pub row_scales: Vec<f32>,
    /// `[rows, groups of columns]`, the last of which may be smaller; empty if there are none.
    pub factors: Vec<f16>,
}

impl Fp8Matrix {
    /// Columns that share a factor.
    pub const GROUP: usize = 32;

    /// Rounds a matrix, each row scaled so that its largest magnitude is the format's largest.
    ///
    /// # Errors
    /// If it is not a matrix of finite numbers.
    pub fn round(matrix: &Tensor) -> Result<Self> {
        let (rows, cols) = matrix.dims2()?;
        let values = matrix.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut bytes = Vec::with_capacity(values.len());
        let mut row_scales = Vec::with_capacity(rows);
        for row in values.chunks_exact(cols.max(1)) {
            let largest = row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            if row.iter().any(|x| !x.is_finite()) {
                return Err(argument("Fp8Matrix::round", "a weight is NaN or infinite"));
            }
            // The least normal scale: numbers of a row of zeros, or of nearly nothing, are zeros.
            let scale = (largest / MAX).max(f32::MIN_POSITIVE);
            bytes.extend(row.iter().map(|x| from_f32(x / scale)));
            row_scales.push(scale);
        }
        Ok(Self { bytes, rows, cols, row_scales, factors: Vec::new() })
    }

    /// Groups of columns in a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(Self::GROUP)
    }

    /// Rows and columns of all parts stacked along their rows.
    pub(crate) fn check(parts: &[Self]) -> Result<(usize, usize)> {
        let wrong = |what: String| Err(argument("Weight::from_fp8", what));
        let Some(cols) = parts.first().map(|part| part.cols) else { return wrong("no parts".into()) };
        for part in parts {
            let Self { bytes, rows, cols: part_cols, row_scales, factors } = part;
            let fits = rows.checked_mul(cols) == Some(bytes.len()) && row_scales.len() == *rows;
            let fits = fits && (factors.is_empty() || factors.len() == rows * part.groups());
            if !fits || *part_cols != cols || bytes.is_empty() {
                let (bytes, scales, factors) = (bytes.len(), row_scales.len(), factors.len());
                return wrong(format!(
                    "[{rows}, {part_cols}] in {bytes} bytes, {scales} scales and {factors} factors"
                ));
            }
            let scales_are_finite =
                row_scales.iter().all(|x| x.is_finite()) && factors.iter().all(|x| x.is_finite());
            if bytes.iter().any(|byte| byte & 0x7f == 0x7f) || !scales_are_finite {
                return wrong("a weight is NaN or infinite".into());
            }
        }
        Ok((parts.iter().map(|part| part.rows).sum(), cols))
    }

    /// The numbers as they are meant.
    pub(crate) fn to_tensor(&self) -> Result<Tensor> {
        let mut values = Vec::with_capacity(self.bytes.len());
        for (row, bytes) in self.bytes.chunks_exact(self.cols).enumerate() {
            let factors = self.factors.get(row * self.groups()..).unwrap_or_default();
            for (group, bytes) in bytes.chunks(Self::GROUP).enumerate() {
                let scale = self.row_scales[row] * factors.get(group).map_or(1.0, |factor| factor.to_f32());
                values.extend(bytes.iter().map(|byte| to_f32(*byte) * scale));
            }
        }
        Ok(Tensor::from_vec(values, (self.rows, self.cols), &Device::Cpu)?)
    }
}

/// The largest number.
pub(crate) const MAX: f32 = 448.0;

/// The nearest number, ties to the even one; beyond the largest, the largest. Bit for bit as GPUs convert.
pub(crate) fn from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return 0x7f;
    }
    let magnitude = x.abs().min(MAX);
    // The unit of the last place: an eighth of the power of two below, at least that of the smallest normal number.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let units = magnitude * 2.0_f32.powi(3 - exponent);
    // Exact: at most 16 units, and powers of two only scale.
    let count = units.round_ties_even() as u8;
    // 8 units are the next exponent's first number, so rounding up may carry.
    sign | (count + (((exponent + 6) as u8) << 3))
}

/// Exact.
pub(crate) fn to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::{from_f32, to_f32};

    #[test]
    fn every_number_is_itself_and_middles_go_to_the_even_neighbour() {
        for bits in 0..=255_u8 {
            let x = to_f32(bits);
            assert!(x.is_nan() || from_f32(x) == bits, "{bits:#x} is {x}");
        }
        assert_eq!((to_f32(0x7e), to_f32(1), to_f32(0x38)), (448.0, 2.0_f32.powi(-9), 1.0));
        for bits in 0..0x7e_u8 {
            let (low, high) = (to_f32(bits), to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            assert_eq!(from_f32(middle), even, "between {low} and {high}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() - 1)), bits);
            assert_eq!(from_f32(-f32::from_bits(middle.to_bits() + 1)), 0x80 | (bits + 1));
        }
        assert_eq!((from_f32(1e9), from_f32(f32::NEG_INFINITY), from_f32(f32::NAN)), (0x7e, 0xfe, 0x7f));
    }
}
