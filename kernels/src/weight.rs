//! A weight matrix, laid out once at load for the kernel that will read it.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::cpu::PackedMatrix;
use crate::error::{Result, argument};

/// A matrix `[out_features, in_features]` that [`crate::ops::linear`] and [`crate::ops::embedding`] read.
///
/// Projections that share their input (q, k, v; gate, up) are stacked into one `Weight` at load, so that one call
/// computes them all. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    storage: Storage,
}

/// How weights are rounded when they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Signed bytes, symmetric, one f32 scale an output feature. Activations stay f32.
    Int8,
}

#[derive(Debug, Clone)]
pub(crate) enum Storage {
    /// In the layout of the CPU kernels.
    Packed(Arc<PackedMatrix>),
    /// Row-major, on any device.
    Dense(Tensor),
}

impl Weight {
    /// Stacks matrices `[n_i, in_features]` along their rows and lays them out for `device`, stored as `dtype`.
    ///
    /// # Errors
    /// If a part is not a matrix, the parts differ in their number of columns, or the device has no kernel for `dtype`.
    pub fn stack(parts: &[Tensor], dtype: DType, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            return Self::portable(parts, dtype, device);
        }
        let (rows, cols) = check_parts(parts)?;
        Ok(Self { rows, cols, storage: Storage::Packed(Arc::new(PackedMatrix::pack(parts, dtype)?)) })
    }

    /// As [`Weight::stack`], rounded to `quantization` (on the CPU only).
    ///
    /// # Errors
    /// As [`Weight::stack`]; if the device has no kernel for quantised weights.
    pub fn quantized(parts: &[Tensor], quantization: Quantization, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            return Err(argument(
                "Weight::quantized",
                format!("{quantization:?} weights are for the CPU only"),
            ));
        }
        let (rows, cols) = check_parts(parts)?;
        let matrix = match quantization {
            Quantization::Int8 => PackedMatrix::quantize(parts)?,
        };
        Ok(Self { rows, cols, storage: Storage::Packed(Arc::new(matrix)) })
    }

    /// As [`Weight::stack`], row-major, which only the reference operations read.
    ///
    /// # Errors
    /// As [`Weight::stack`].
    pub fn portable(parts: &[Tensor], dtype: DType, device: &Device) -> Result<Self> {
        let (rows, cols) = check_parts(parts)?;
        let parts = parts.iter().map(|part| part.to_dtype(dtype)).collect::<candle_core::Result<Vec<_>>>()?;
        let dense = Tensor::cat(&parts, 0)?.to_device(device)?.contiguous()?;
        Ok(Self { rows, cols, storage: Storage::Dense(dense) })
    }

    /// Lays out one matrix `[out_features, in_features]`.
    ///
    /// # Errors
    /// As [`Weight::stack`].
    pub fn new(matrix: Tensor, dtype: DType, device: &Device) -> Result<Self> {
        Self::stack(&[matrix], dtype, device)
    }

    /// Number of output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes this weight occupies in device memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.storage {
            Storage::Packed(matrix) => matrix.num_bytes(),
            Storage::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }
}

/// Rows of all parts together, and their common number of columns.
fn check_parts(parts: &[Tensor]) -> Result<(usize, usize)> {
    let mut total = (0, None);
    for part in parts {
        let (rows, cols) = part.dims2()?;
        if *total.1.get_or_insert(cols) != cols {
            return Err(argument("Weight::stack", format!("parts of {cols} and {:?} columns", total.1)));
        }
        total.0 += rows;
    }
    match total {
        (rows @ 1.., Some(cols @ 1..)) => Ok((rows, cols)),
        _ => Err(argument("Weight::stack", "an empty matrix")),
    }
}
