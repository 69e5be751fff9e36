//! The gated MLP of a layer, dense or as one expert of a mixture.

use candle_core::Tensor;
use ingle_kernels::{Activation, ops};

use crate::error::Result;
use crate::linear::Linear;

/// `down(act(gate(x)) * up(x))`
#[derive(Debug)]
pub(crate) struct Mlp {
    /// Gate above up.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
}

impl Mlp {
    /// `[num_tokens, hidden] -> [num_tokens, hidden]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Linear { weight, bias } = &self.gate_up;
        // [T, hidden] -> [T, 2 * intermediate] -> [T, intermediate]
        let gated = ops::gated_linear(x, weight, bias.as_ref(), self.activation)?;
        self.down.forward(&gated)
    }
}
