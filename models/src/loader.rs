//! Reads the tensors of a layout one at a time and lays them out for the device.

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{Quantization, Weight};

use crate::causal_lm::{LoadProgress, ProgressFn};
use crate::decoder::Placement;
use crate::error::Result;
use crate::layout::{LinearSpec, TensorSpec};
use crate::linear::Linear;
use crate::source::TensorSource;

/// Loads specs that [`crate::layout::ModelSpec::check`] has passed. At most one layout unit (the parts of one stacked
/// matrix) is in memory twice.
pub(crate) struct Loader<'a> {
    source: &'a dyn TensorSource,
    /// Type that matrices are stored in, unless they are quantised.
    dtype: DType,
    quantization: Option<Quantization>,
    /// Type that activations, and so biases, have.
    activation_dtype: DType,
    device: &'a Device,
    unit_offset_norms: bool,
    progress: Option<&'a ProgressFn>,
    state: LoadProgress,
    weight_bytes: usize,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        source: &'a dyn TensorSource,
        placement: &'a Placement,
        unit_offset_norms: bool,
        progress: Option<&'a ProgressFn>,
        total: (usize, usize),
    ) -> Self {
        let state = LoadProgress {
            tensors_loaded: 0,
            num_tensors: total.0,
            parameters_loaded: 0,
            num_parameters: total.1,
        };
        Self {
            source,
            dtype: placement.dtype,
            quantization: placement.quantization,
            activation_dtype: placement.activation_dtype,
            device: &placement.device,
            unit_offset_norms,
            progress,
            state,
            weight_bytes: 0,
        }
    }

    /// Bytes of everything loaded so far, in device memory.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// One tensor in CPU memory.
    pub(crate) fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor> {
        let tensor = self.source.load(&spec.name)?;
        self.state.tensors_loaded += 1;
        self.state.parameters_loaded += tensor.elem_count();
        if let Some(progress) = self.progress {
            progress(self.state);
        }
        Ok(tensor)
    }

    /// Matrices stacked along their rows.
    pub(crate) fn stack(&mut self, parts: &[Tensor]) -> Result<Weight> {
        let weight = match self.quantization {
            Some(quantization) => Weight::quantized(parts, quantization, self.device)?,
            None => Weight::stack(parts, self.dtype, self.device)?,
        };
        self.weight_bytes += weight.num_bytes();
        Ok(weight)
    }

    /// Norm weights are stored minus one.
    pub(crate) fn unit_offset_norms(&mut self, offset: bool) {
        self.unit_offset_norms = offset;
    }

    /// A table whose rows are only looked up: never quantised, and in rows as they are stored.
    pub(crate) fn table(&mut self, spec: &TensorSpec) -> Result<Weight> {
        let matrix = self.tensor(spec)?;
        let weight = Weight::portable(&[matrix], self.dtype, self.device)?;
        self.weight_bytes += weight.num_bytes();
        Ok(weight)
    }

    pub(crate) fn matrix(&mut self, spec: &TensorSpec) -> Result<Weight> {
        let matrix = self.tensor(spec)?;
        self.stack(&[matrix])
    }

    pub(crate) fn linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        let parts = spec.weights.iter().map(|spec| self.tensor(spec)).collect::<Result<Vec<_>>>()?;
        let weight = self.stack(&parts)?;
        let biases = spec.biases.iter().map(|spec| self.tensor(spec)).collect::<Result<Vec<_>>>()?;
        let bias = match biases.as_slice() {
            [] => None,
            biases => Some(self.vector(&Tensor::cat(biases, 0)?, self.activation_dtype)?),
        };
        Ok(Linear { weight, bias })
    }

    /// As [`Loader::linear`], but never quantised.
    pub(crate) fn exact_linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        let quantization = self.quantization.take();
        let linear = self.linear(spec);
        self.quantization = quantization;
        linear
    }

    /// A norm weight, f32 whatever the rest is: it is small, and the norm is computed in f32.
    pub(crate) fn norm(&mut self, spec: &TensorSpec) -> Result<Tensor> {
        let weight = self.tensor(spec)?.to_dtype(DType::F32)?;
        let weight = if self.unit_offset_norms { (weight + 1.0)? } else { weight };
        self.vector(&weight, DType::F32)
    }

    pub(crate) fn opt_norm(&mut self, spec: Option<&TensorSpec>) -> Result<Option<Tensor>> {
        spec.map(|spec| self.norm(spec)).transpose()
    }

    fn vector(&mut self, vector: &Tensor, dtype: DType) -> Result<Tensor> {
        self.weight_bytes += vector.elem_count() * dtype.size_in_bytes();
        Ok(vector.to_dtype(dtype)?.to_device(self.device)?)
    }
}
