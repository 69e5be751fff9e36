//! A projection.

use candle_core::Tensor;
use ingle_kernels::{Weight, ops};

use crate::error::Result;

/// A matrix, possibly of several stacked projections, and its bias.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    /// `[out_features]`
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// `[num_tokens, in] -> [num_tokens, out]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::linear(x, &self.weight, self.bias.as_ref())?)
    }
}
