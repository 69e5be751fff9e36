//! What follows pooling: dense layers, and the head of a classification model.

use candle_core::{Device, Tensor};
use ingle_kernels::{Activation, LayerNorm, ops};

use super::PoolingMode;
use super::layout::NormSpec;
use crate::error::Result;
use crate::layout::LinearSpec;
use crate::linear::Linear;

/// The classification head of a family: `out(norm(activation(dense(pooled))))`.
#[derive(Debug, Clone)]
pub(crate) struct HeadKind {
    pub(crate) pooling: PoolingMode,
    pub(crate) dense: &'static str,
    /// The name of `dense` takes the prefix of the body.
    pub(crate) dense_in_body: bool,
    pub(crate) dense_bias: bool,
    pub(crate) activation: DenseActivation,
    pub(crate) norm: Option<&'static str>,
    pub(crate) out: &'static str,
}

/// The tensors of a [`HeadKind`].
#[derive(Debug)]
pub(crate) struct HeadSpec {
    pub(crate) dense: LinearSpec,
    pub(crate) norm: Option<NormSpec>,
    pub(crate) out: LinearSpec,
}

/// Activation of a dense layer on pooled vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DenseActivation {
    Identity,
    Tanh,
    Sigmoid,
    Mlp(Activation),
}

/// A layer norm's parameters.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) eps: f32,
}

impl Norm {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::layer_norm(x, None, &self.weight, self.bias.as_ref(), self.eps)?)
    }

    /// As operations take it.
    pub(crate) fn params(&self) -> LayerNorm<'_> {
        LayerNorm { weight: &self.weight, bias: self.bias.as_ref(), eps: self.eps }
    }
}

/// One layer on pooled vectors.
#[derive(Debug)]
pub(crate) struct DenseLayer {
    pub(crate) linear: Linear,
    pub(crate) activation: DenseActivation,
    pub(crate) norm: Option<Norm>,
}

impl DenseLayer {
    /// `[num_seqs, in] -> [num_seqs, out]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.linear.forward(x)?;
        let y = match self.activation {
            DenseActivation::Identity => y,
            DenseActivation::Mlp(activation) => ops::activate(&y, activation)?,
            DenseActivation::Tanh => map(&y, f32::tanh)?,
            DenseActivation::Sigmoid => map(&y, |x| 1.0 / (1.0 + (-x).exp()))?,
        };
        match &self.norm {
            Some(norm) => norm.forward(&y),
            None => Ok(y),
        }
    }
}

/// A few numbers, one by one.
fn map(x: &Tensor, f: impl Fn(f32) -> f32) -> Result<Tensor> {
    let values: Vec<f32> = x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let values: Vec<f32> = values.into_iter().map(f).collect();
    Ok(Tensor::from_vec(values, x.shape(), &Device::Cpu)?.to_device(x.device())?)
}
