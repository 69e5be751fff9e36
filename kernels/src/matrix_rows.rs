//! Matrices that are read while they are laid out.

use std::io;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::{bf16, f16};

use crate::error::{Error, Result, argument};

/// A matrix `[rows, cols]` whose rows are read when they are needed, by several threads at once. What is laid out for a kernel
/// from such a matrix is never in memory a second time: a few rows are, in the caches.
pub trait MatrixRows: Sync {
    /// Rows and columns.
    fn dims(&self) -> (usize, usize);

    /// Type of the elements: f32, bf16 or f16.
    fn dtype(&self) -> DType;

    /// Fills `out` with the elements from the first of row `first` on, in the machine's byte order. As many follow there.
    ///
    /// # Errors
    /// If they cannot be read.
    fn read(&self, first: usize, out: &mut [u8]) -> io::Result<()>;
}

/// A tensor in CPU memory.
struct TensorRows {
    /// Contiguous.
    tensor: Tensor,
    dims: (usize, usize),
}

impl TensorRows {
    fn new(tensor: &Tensor) -> Result<Self> {
        if !tensor.device().is_cpu() {
            return Err(argument("Weight", "weights are not in CPU memory"));
        }
        let readable = matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16);
        let tensor = if readable { tensor.clone() } else { tensor.to_dtype(DType::F32)? };
        Ok(Self { dims: tensor.dims2()?, tensor: tensor.contiguous()? })
    }
}

impl MatrixRows for TensorRows {
    fn dims(&self) -> (usize, usize) {
        self.dims
    }

    fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    fn read(&self, first: usize, out: &mut [u8]) -> io::Result<()> {
        let (storage, layout) = self.tensor.storage_and_layout();
        let start = layout.start_offset() + first * self.dims.1;
        let bytes: &[u8] = match &*storage {
            Storage::Cpu(CpuStorage::F32(values)) => bytemuck::cast_slice(&values[start..]),
            Storage::Cpu(CpuStorage::BF16(values)) => bytemuck::cast_slice(&values[start..]),
            Storage::Cpu(CpuStorage::F16(values)) => bytemuck::cast_slice(&values[start..]),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        out.copy_from_slice(&bytes[..out.len()]);
        Ok(())
    }
}

/// An element.
pub(crate) trait Number: bytemuck::Pod {
    const DTYPE: DType;

    fn widen(self) -> f32;
    /// The nearest.
    fn round(x: f32) -> Self;
}

impl Number for f32 {
    const DTYPE: DType = DType::F32;

    fn widen(self) -> f32 {
        self
    }
    fn round(x: f32) -> Self {
        x
    }
}

impl Number for bf16 {
    const DTYPE: DType = DType::BF16;

    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Number for f16 {
    const DTYPE: DType = DType::F16;

    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Matrices of the same width, one after another.
pub(crate) struct Stack<'a> {
    parts: Vec<&'a dyn MatrixRows>,
    dims: (usize, usize),
}

impl<'a> Stack<'a> {
    /// # Errors
    /// If the parts differ in their number of columns, or there is nothing in them.
    pub(crate) fn new(parts: impl IntoIterator<Item = &'a dyn MatrixRows>) -> Result<Self> {
        let parts: Vec<_> = parts.into_iter().collect();
        let dims = stacked_dims(parts.iter().map(|part| part.dims()))?;
        Ok(Self { parts, dims })
    }

    /// Rows of all parts, and columns.
    pub(crate) fn dims(&self) -> (usize, usize) {
        self.dims
    }

    /// These rows as numbers of type `T`, row after row.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn rows<T: Number>(&self, rows: Range<usize>) -> Result<Vec<T>> {
        let cols = self.dims.1;
        let mut values = vec![T::zeroed(); rows.len() * cols];
        let mut rest = values.as_mut_slice();
        let mut begin = 0;
        for (part, matrix) in self.parts.iter().enumerate() {
            let end = begin + matrix.dims().0;
            let here = rows.start.max(begin)..rows.end.min(end);
            let (out, later) = rest.split_at_mut(here.len() * cols);
            if !out.is_empty() {
                read_as(*matrix, here.start - begin, out)
                    .map_err(|source| Error::Unreadable { part, source })?;
            }
            (rest, begin) = (later, end);
        }
        Ok(values)
    }
}

/// Calls `then` with the stack of all `parts`, matrices in CPU memory.
pub(crate) fn with_stack<R>(parts: &[Tensor], then: impl FnOnce(&Stack<'_>) -> Result<R>) -> Result<R> {
    let parts = parts.iter().map(TensorRows::new).collect::<Result<Vec<_>>>()?;
    then(&Stack::new(parts.iter().map(|part| part as &dyn MatrixRows))?)
}

fn read_as<T: Number>(matrix: &dyn MatrixRows, first: usize, out: &mut [T]) -> io::Result<()> {
    match matrix.dtype() {
        stored if stored == T::DTYPE => matrix.read(first, bytemuck::cast_slice_mut(out)),
        DType::F32 => convert::<f32, T>(matrix, first, out),
        DType::BF16 => convert::<bf16, T>(matrix, first, out),
        DType::F16 => convert::<f16, T>(matrix, first, out),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn convert<S: Number, T: Number>(matrix: &dyn MatrixRows, first: usize, out: &mut [T]) -> io::Result<()> {
    let mut stored = vec![S::zeroed(); out.len()];
    matrix.read(first, bytemuck::cast_slice_mut(&mut stored))?;
    for (out, stored) in out.iter_mut().zip(stored) {
        *out = T::round(stored.widen());
    }
    Ok(())
}

/// Rows of all matrices together, and their common number of columns.
pub(crate) fn stacked_dims(parts: impl IntoIterator<Item = (usize, usize)>) -> Result<(usize, usize)> {
    let (mut total, mut width) = (0, None);
    for (rows, cols) in parts {
        let first = *width.get_or_insert(cols);
        if first != cols {
            return Err(argument("Weight", format!("parts of {cols} and {first} columns")));
        }
        total += rows;
    }
    match (total, width) {
        (rows @ 1.., Some(cols @ 1..)) => Ok((rows, cols)),
        _ => Err(argument("Weight", "an empty matrix")),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn rows_are_those_of_all_parts_in_any_type() {
        let part = |first: usize, rows: usize, dtype| {
            let values: Vec<_> = (0..rows * 3).map(|i| (first + i) as f32 / 8.0).collect();
            Tensor::from_vec(values, (rows, 3), &Device::Cpu)
                .and_then(|part| part.to_dtype(dtype))
                .expect("a part")
        };
        let parts = [
            part(0, 4, DType::BF16),
            part(12, 1, DType::F32),
            part(15, 5, DType::F16),
            part(30, 2, DType::F64),
        ];
        with_stack(&parts, |stack| {
            assert_eq!(stack.dims(), (12, 3));
            for first in 0..12 {
                for end in first..=12 {
                    let wanted: Vec<_> = (first * 3..end * 3).map(|i| i as f32 / 8.0).collect();
                    assert_eq!(stack.rows::<f32>(first..end)?, wanted);
                    let halves = stack.rows::<bf16>(first..end)?;
                    assert_eq!(halves.into_iter().map(bf16::to_f32).collect::<Vec<_>>(), wanted);
                }
            }
            Ok(())
        })
        .expect("readable");
    }

    #[test]
    fn what_cannot_be_stacked_is_refused() {
        let zeros = |rows, cols| Tensor::zeros((rows, cols), DType::F32, &Device::Cpu).expect("zeros");
        for parts in [vec![], vec![zeros(0, 3)], vec![zeros(2, 3), zeros(2, 4)]] {
            assert!(with_stack(&parts, |_| Ok(())).is_err());
        }
        let vector = Tensor::zeros(3, DType::F32, &Device::Cpu).expect("zeros");
        assert!(with_stack(&[vector], |_| Ok(())).is_err());
    }
}
