//! A weight matrix, laid out once at load for the kernel that will read it.

use candle_core::{DType, Device, Tensor};

use crate::error::{Result, argument};

/// A matrix `[out_features, in_features]` that [`crate::ops::linear`] and [`crate::ops::embedding`] read.
///
/// Projections that share their input (q, k, v; gate, up) are stacked into one `Weight` at load, so that one call
/// computes them all.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    storage: Storage,
}

#[derive(Debug, Clone)]
pub(crate) enum Storage {
    /// Row-major, on any device.
    Dense(Tensor),
}

impl Weight {
    /// Stacks matrices `[n_i, in_features]` along their rows and lays them out for `device`, stored as `dtype`.
    ///
    /// # Errors
    /// If a part is not a matrix or the parts differ in their number of columns.
    pub fn stack(parts: &[Tensor], dtype: DType, device: &Device) -> Result<Self> {
        let mut cols = None;
        for part in parts {
            let (_, c) = part.dims2()?;
            if *cols.get_or_insert(c) != c {
                return Err(argument("Weight::stack", format!("parts of {c} and {cols:?} columns")));
            }
        }
        let cols = cols.ok_or_else(|| argument("Weight::stack", "no parts"))?;
        let parts = parts.iter().map(|p| p.to_dtype(dtype)).collect::<candle_core::Result<Vec<_>>>()?;
        let dense = Tensor::cat(&parts, 0)?.to_device(device)?.contiguous()?;
        Ok(Self { rows: dense.dim(0)?, cols, storage: Storage::Dense(dense) })
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
            Storage::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }
}
