//! Where tensors come from.

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{BlockType, Fp8Matrix, MatrixRows, QuantizedBlocks};

use crate::Result;
use crate::error::invalid;

/// A type of blocks in a quantised checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockFormat {
    /// One that there is a kernel for.
    Kernel(BlockType),
    /// Another; its name.
    Other(String),
}

impl BlockFormat {
    /// Name as GGUF tools spell it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Kernel(block_type) => block_type.name(),
            Self::Other(name) => name,
        }
    }
}

/// A checkpoint: named tensors in one or several files. Names and orientation are those of transformers
/// (`model.layers.0.self_attn.q_proj.weight`, `[out_features, in_features]`), whatever the file calls them.
pub trait TensorSource {
    /// Folder or file, for messages.
    fn path(&self) -> &Path;

    /// All names, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape of a tensor, `None` if it is absent.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// File that holds a tensor, for messages.
    fn file_of(&self, name: &str) -> &Path {
        let _ = name;
        self.path()
    }

    /// Type that [`TensorSource::load`] gives a tensor in; `None` if the config, not the file, says so.
    ///
    /// # Errors
    /// If the stored type cannot be read.
    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        let _ = name;
        Ok(None)
    }

    /// How a quantised tensor is stored; `None` for plain numbers.
    fn block_format(&self, name: &str) -> Option<BlockFormat> {
        let _ = name;
        None
    }

    /// What people call the format of a tensor that was quantised before it was saved, other than as blocks of a GGUF
    /// file: `GPTQ int4 g128`, `FP8`.
    fn stored_as(&self, name: &str) -> Option<&str> {
        let _ = name;
        None
    }

    /// Reads the blocks of a tensor whose format is [`BlockFormat::Kernel`].
    ///
    /// # Errors
    /// As [`TensorSource::load`]; if it has another format.
    fn load_blocks(&self, name: &str) -> Result<QuantizedBlocks> {
        Err(invalid(self.path(), format!("tensor {name} has no blocks")))
    }

    /// Whether a tensor is stored as e4m3 numbers that [`Fp8Matrix`] can have, and the number of columns that must stay
    /// together in each part of it.
    fn fp8_step(&self, name: &str) -> Option<usize> {
        let _ = name;
        None
    }

    /// Reads a tensor that has a [`TensorSource::fp8_step`], its numbers unchanged.
    ///
    /// # Errors
    /// As [`TensorSource::load`]; if it is stored otherwise.
    fn load_fp8(&self, name: &str) -> Result<Fp8Matrix> {
        Err(invalid(self.path(), format!("tensor {name} has no e4m3 numbers that are kept")))
    }

    /// Reads one tensor to CPU memory in its stored type; quantised ones dequantised.
    ///
    /// # Errors
    /// If it is absent or its bytes cannot be read.
    fn load(&self, name: &str) -> Result<Tensor>;

    /// A matrix whose rows are read when they are laid out, in the same type as by [`TensorSource::load`]; `None` if it must be
    /// loaded.
    ///
    /// # Errors
    /// If it is absent.
    fn rows(&self, name: &str) -> Result<Option<Box<dyn MatrixRows + '_>>> {
        let _ = name;
        Ok(None)
    }

    /// As [`TensorSource::load`], of dimension `dim` only these ranges, one after another. They lie within the shape.
    ///
    /// # Errors
    /// As [`TensorSource::load`].
    fn load_part(&self, name: &str, dim: usize, ranges: &[Range<usize>]) -> Result<Tensor> {
        let tensor = self.load(name)?;
        let parts = ranges.iter().map(|range| tensor.narrow(dim, range.start, range.len()));
        Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, dim)?)
    }

    /// As [`TensorSource::load`], onto `device`.
    ///
    /// # Errors
    /// As [`TensorSource::load`]; if the device is out of memory.
    fn load_on(&self, name: &str, device: &Device) -> Result<Tensor> {
        Ok(self.load(name)?.to_device(device)?)
    }
}
