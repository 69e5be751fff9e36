//! Reads the tensors of a layout one at a time and lays them out for the device.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{Quantization, Weight};

use crate::causal_lm::{LoadProgress, ProgressFn};
use crate::decoder::Placement;
use crate::error::{Error, Result};
use crate::layout::{LinearSpec, TensorSpec};
use crate::linear::Linear;
use crate::source::{BlockFormat, TensorSource};

/// Loads specs that [`crate::layout::ModelSpec::check`] has passed. At most one layout unit (the parts of one stacked
/// matrix) is in memory twice.
pub(crate) struct Loader<'a> {
    source: &'a dyn TensorSource,
    /// Type that matrices are stored in, unless they are quantised.
    dtype: DType,
    quantization: Option<Quantization>,
    keep_blocks: bool,
    keep_fp8: bool,
    /// Type that activations, and so biases, have.
    activation_dtype: DType,
    device: &'a Device,
    unit_offset_norms: bool,
    progress: Option<&'a ProgressFn>,
    state: LoadProgress,
    weight_bytes: usize,
    /// What matrices became, with their number of elements.
    formats: BTreeMap<String, usize>,
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
            keep_blocks: placement.keep_blocks,
            keep_fp8: placement.keep_fp8,
            activation_dtype: placement.activation_dtype,
            device: &placement.device,
            unit_offset_norms,
            progress,
            state,
            weight_bytes: 0,
            formats: BTreeMap::new(),
        }
    }

    /// Bytes of everything loaded so far, in device memory.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// What the matrices loaded so far are made of, the largest share first.
    pub(crate) fn weight_format(&self) -> String {
        let mut formats: Vec<_> = self.formats.iter().collect();
        formats.sort_by_key(|(_, elements)| std::cmp::Reverse(**elements));
        let names: Vec<_> = formats.into_iter().map(|(name, _)| name.as_str()).collect();
        names.join(", ")
    }

    /// One tensor in CPU memory.
    pub(crate) fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor> {
        let tensor = self.source.load(&spec.name)?;
        self.loaded(tensor.elem_count());
        Ok(tensor)
    }

    /// One tensor on the device, if it goes there as it is, else in CPU memory.
    fn part(&mut self, spec: &TensorSpec) -> Result<Tensor> {
        if self.device.is_cpu() || self.quantization.is_some() {
            return self.tensor(spec);
        }
        let tensor = self.source.load_on(&spec.name, self.device)?;
        self.loaded(tensor.elem_count());
        Ok(tensor)
    }

    fn loaded(&mut self, elements: usize) {
        self.state.tensors_loaded += 1;
        self.state.parameters_loaded += elements;
        if let Some(progress) = self.progress {
            progress(self.state);
        }
    }

    /// Matrices stacked along their rows.
    pub(crate) fn stack(&mut self, parts: &[Tensor]) -> Result<Weight> {
        self.stack_from(parts, None)
    }

    /// As [`Loader::stack`] for matrices that the checkpoint holds in the format `from`.
    fn stack_from(&mut self, parts: &[Tensor], from: Option<&str>) -> Result<Weight> {
        let weight = match self.quantization {
            Some(quantization) => Weight::quantized(parts, quantization, self.device)?,
            None => Weight::stack(parts, self.dtype, self.device)?,
        };
        Ok(self.counted(weight, self.format(from)))
    }

    /// What matrices become that the checkpoint holds in the format `from`.
    fn format(&self, from: Option<&str>) -> String {
        let format = self.quantization.map_or(self.dtype.as_str(), Quantization::name);
        from.map_or_else(|| format.to_owned(), |from| format!("{format} (from {from})"))
    }

    fn counted(&mut self, weight: Weight, format: String) -> Weight {
        self.weight_bytes += weight.num_bytes();
        *self.formats.entry(format).or_default() += weight.rows() * weight.cols();
        weight
    }

    /// The named matrices, stacked along their rows.
    fn named(&mut self, specs: &[TensorSpec]) -> Result<Weight> {
        let from = specs.first().and_then(|spec| self.source.stored_as(&spec.name)).map(str::to_owned);
        if self.keep_fp8 && specs.iter().all(|spec| self.source.fp8_step(&spec.name).is_some()) {
            let mut parts = Vec::with_capacity(specs.len());
            for spec in specs {
                let part = self.source.load_fp8(&spec.name)?;
                self.loaded(part.bytes.len());
                parts.push(part);
            }
            let weight = Weight::from_fp8(&parts, self.device)?;
            return Ok(self.counted(weight, from.unwrap_or_else(|| Quantization::Fp8.name().to_owned())));
        }
        let formats = specs.iter().map(|spec| self.source.block_format(&spec.name));
        let formats = formats.collect::<Option<Vec<_>>>().filter(|_| self.keep_blocks);
        match formats.as_deref() {
            Some([first @ BlockFormat::Kernel(block_type), rest @ ..]) if rest.iter().all(|f| f == first) => {
                let mut parts = Vec::with_capacity(specs.len());
                for spec in specs {
                    let blocks = self.source.load_blocks(&spec.name)?;
                    self.loaded(blocks.rows.saturating_mul(blocks.cols));
                    parts.push(blocks);
                }
                let weight = Weight::from_blocks(&parts, self.device)?;
                Ok(self.counted(weight, from.unwrap_or_else(|| block_type.name().to_owned())))
            }
            Some(formats) => {
                let parts = specs.iter().map(|spec| self.tensor(spec)).collect::<Result<Vec<_>>>()?;
                let mut names: Vec<_> = formats.iter().map(BlockFormat::name).collect();
                names.dedup();
                let weight = Weight::quantized(&parts, Quantization::Int8, self.device)?;
                Ok(self.counted(weight, format!("int8 (from {})", names.join(" and "))))
            }
            None => {
                if let Some(weight) = self.read(specs)? {
                    return Ok(self.counted(weight, self.format(from.as_deref())));
                }
                let parts = specs.iter().map(|spec| self.part(spec)).collect::<Result<Vec<_>>>()?;
                self.stack_from(&parts, from.as_deref())
            }
        }
    }

    /// The named matrices in CPU memory, if the source gives them row by row.
    fn read(&mut self, specs: &[TensorSpec]) -> Result<Option<Weight>> {
        if !self.device.is_cpu() {
            return Ok(None);
        }
        let source = self.source;
        let parts = specs.iter().map(|spec| source.rows(&spec.name)).collect::<Result<Option<Vec<_>>>>()?;
        let Some(parts) = parts else { return Ok(None) };
        let parts: Vec<_> = parts.iter().map(Box::as_ref).collect();
        let weight = Weight::read(&parts, self.dtype, self.quantization).map_err(|error| match error {
            ingle_kernels::Error::Unreadable { part, source: why } => {
                let file = specs.get(part).map_or(source.path(), |spec| source.file_of(&spec.name));
                Error::Io { path: file.to_owned(), source: why }
            }
            other => other.into(),
        })?;
        for part in parts {
            let (rows, cols) = part.dims();
            self.loaded(rows * cols);
        }
        Ok(Some(weight))
    }

    /// Norm weights are stored minus one.
    pub(crate) fn unit_offset_norms(&mut self, offset: bool) {
        self.unit_offset_norms = offset;
    }

    /// A table whose rows are only looked up: never quantised, and in rows as they are stored.
    pub(crate) fn table(&mut self, spec: &TensorSpec) -> Result<Weight> {
        let matrix = if self.device.is_cpu() {
            self.tensor(spec)?
        } else {
            let tensor = self.source.load_on(&spec.name, self.device)?;
            self.loaded(tensor.elem_count());
            tensor
        };
        let weight = Weight::portable(&[matrix], self.dtype, self.device)?;
        self.weight_bytes += weight.num_bytes();
        Ok(weight)
    }

    /// An embedding or a head. Half bytes would cost more there than in all layers together, so they become bytes.
    pub(crate) fn matrix(&mut self, spec: &TensorSpec) -> Result<Weight> {
        let quantization = self.quantization;
        if quantization == Some(Quantization::Int4) {
            self.quantization = Some(Quantization::Int8);
        }
        let weight = self.named(std::slice::from_ref(spec));
        self.quantization = quantization;
        weight
    }

    pub(crate) fn linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        let weight = self.named(&spec.weights)?;
        let biases = spec.biases.iter().map(|spec| self.tensor(spec)).collect::<Result<Vec<_>>>()?;
        let bias = match biases.as_slice() {
            [] => None,
            biases => Some(self.vector(&Tensor::cat(biases, 0)?, self.activation_dtype)?),
        };
        Ok(Linear { weight, bias })
    }

    /// As [`Loader::linear`], but never quantised, and multiplied in the type of activations: for a few rows whose sums
    /// are the answer, which 16-bit sums would round to three digits.
    pub(crate) fn exact_linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        let keep = (std::mem::take(&mut self.keep_blocks), std::mem::take(&mut self.keep_fp8));
        let quantization = self.quantization.take();
        let dtype = std::mem::replace(&mut self.dtype, self.activation_dtype);
        let linear = self.linear(spec);
        self.dtype = dtype;
        self.quantization = quantization;
        (self.keep_blocks, self.keep_fp8) = keep;
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
