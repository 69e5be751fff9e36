//! A weight matrix, laid out once at load for the kernel that will read it.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::cpu::{PackedMatrix, QuantMatrix};
use crate::error::{Result, argument};
use crate::fp8::Fp8Matrix;
use crate::matrix_rows::{MatrixRows, Stack, stacked_dims, with_stack};

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
    /// Bytes, symmetric, with an f16 scale for each 32 elements of a row: 8.5 bits an element. Activations are rounded
    /// likewise while they are multiplied.
    Int8,
    /// Half bytes, symmetric, with an f16 scale for each 32 elements of a row: 4.5 bits an element. Activations as with
    /// `Int8`.
    Int4,
    /// e4m3 numbers with an f32 scale for each row: 8 bits an element. CUDA only. Activations of more than sixteen tokens
    /// may be rounded likewise while they are multiplied, with a scale for each token.
    Fp8,
}

impl Quantization {
    /// Name as the command line spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }

    /// Bytes that `elements` elements take, scales included.
    #[must_use]
    pub fn num_bytes(self, elements: usize) -> usize {
        let bits = match self {
            Self::Int8 => 17,
            Self::Int4 => 9,
            // Without the scales of rows, which are a few bytes in thousands.
            Self::Fp8 => 16,
        };
        elements.div_ceil(16).saturating_mul(bits)
    }
}

/// Block types of GGUF files that are computed with as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 32 signed bytes and an f16 scale.
    Q8_0,
    /// 32 half bytes, zero at 8, and an f16 scale.
    Q4_0,
    /// 32 half bytes, an f16 scale and an f16 minimum.
    Q4_1,
}

impl BlockType {
    /// Elements of a row in one block.
    pub const BLOCK_SIZE: usize = 32;

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }

    /// Name as GGUF tools spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        }
    }
}

/// A matrix `[rows, cols]` as a GGUF file stores it: row after row in blocks of [`BlockType::BLOCK_SIZE`] columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizedBlocks {
    /// Of all blocks.
    pub block_type: BlockType,
    /// Output features.
    pub rows: usize,
    /// Input features, a multiple of the block size.
    pub cols: usize,
    /// `rows * cols / 32` blocks.
    pub bytes: Vec<u8>,
}

impl QuantizedBlocks {
    /// Type, rows and columns of all parts stacked along their rows.
    pub(crate) fn check(parts: &[Self]) -> Result<(BlockType, usize, usize)> {
        let wrong = |what: String| Err(argument("Weight::from_blocks", what));
        let Some(first) = parts.first() else { return wrong("no parts".into()) };
        for part in parts {
            let Self { block_type, rows, cols, bytes } = part;
            let blocks = rows.checked_mul(cols / BlockType::BLOCK_SIZE);
            let expected = blocks.and_then(|blocks| blocks.checked_mul(block_type.block_bytes()));
            let whole = *cols > 0 && cols.is_multiple_of(BlockType::BLOCK_SIZE) && *rows > 0;
            if *cols != first.cols || !whole || expected != Some(bytes.len()) {
                return wrong(format!("[{rows}, {cols}] in {} bytes of {block_type:?}", bytes.len()));
            }
            if *block_type != first.block_type {
                return wrong(format!("parts of {block_type:?} and {:?}", first.block_type));
            }
        }
        Ok((first.block_type, parts.iter().map(|part| part.rows).sum(), first.cols))
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Storage {
    /// In the layout of the CPU kernels.
    Packed(Arc<PackedMatrix>),
    /// Codes in the layout of the CPU kernels.
    Quantized(Arc<QuantMatrix>),
    /// Row-major, on any device.
    Dense(Tensor),
    /// Codes in the layout of the CUDA kernels.
    #[cfg(feature = "cuda")]
    Tiles(Arc<crate::cuda::linear::DeviceTiles>),
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
        with_stack(parts, |stack| Self::packed(stack, dtype, None))
    }

    /// As [`Weight::stack`] or, if `quantization` is given, [`Weight::quantized`] in CPU memory, for matrices that are read
    /// while they are laid out.
    ///
    /// # Errors
    /// As there; [`crate::Error::Unreadable`] if rows cannot be read.
    pub fn read(parts: &[&dyn MatrixRows], dtype: DType, quantization: Option<Quantization>) -> Result<Self> {
        Self::packed(&Stack::new(parts.iter().copied())?, dtype, quantization)
    }

    fn packed(stack: &Stack<'_>, dtype: DType, quantization: Option<Quantization>) -> Result<Self> {
        let (rows, cols) = stack.dims();
        let storage = match quantization {
            None => Storage::Packed(Arc::new(PackedMatrix::pack(stack, dtype)?)),
            Some(Quantization::Int8) => Storage::Quantized(Arc::new(QuantMatrix::int8(stack)?)),
            Some(Quantization::Int4) => Storage::Quantized(Arc::new(QuantMatrix::int4(stack)?)),
            Some(Quantization::Fp8) => {
                return Err(argument("Weight::quantized", "fp8 weights are for CUDA devices only"));
            }
        };
        Ok(Self { rows, cols, storage })
    }

    /// As [`Weight::stack`], rounded to `quantization`, on the CPU or a CUDA device.
    ///
    /// # Errors
    /// As [`Weight::stack`]; if the device has no kernel for quantised weights.
    pub fn quantized(parts: &[Tensor], quantization: Quantization, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            check_parts(parts)?;
            let parts = parts.iter().map(|part| part.to_device(&Device::Cpu));
            let parts = parts.collect::<candle_core::Result<Vec<_>>>()?;
            return Self::tiled(|| crate::tiles::TiledMatrix::quantized(&parts, quantization), device);
        }
        if !device.is_cpu() {
            return Err(argument(
                "Weight::quantized",
                format!("{quantization:?} weights are for the CPU and for CUDA devices only"),
            ));
        }
        // Numbers are rounded from f32, whatever type they have.
        with_stack(parts, |stack| Self::packed(stack, DType::F32, Some(quantization)))
    }

    /// Stacks matrices of GGUF blocks along their rows, codes and scales unchanged, on the CPU or a CUDA device.
    ///
    /// # Errors
    /// If the parts differ in type or columns, a size does not fit its bytes, or `device` has no kernel for them.
    pub fn from_blocks(parts: &[QuantizedBlocks], device: &Device) -> Result<Self> {
        let (_, rows, cols) = QuantizedBlocks::check(parts)?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Self::tiled(|| crate::tiles::TiledMatrix::from_blocks(parts), device);
        }
        if !device.is_cpu() {
            return Err(argument(
                "Weight::from_blocks",
                "quantised weights are for the CPU and for CUDA devices only",
            ));
        }
        let matrix = QuantMatrix::from_blocks(parts)?;
        Ok(Self { rows, cols, storage: Storage::Quantized(Arc::new(matrix)) })
    }

    /// Stacks matrices of e4m3 numbers along their rows, unchanged on a CUDA device; elsewhere they become bf16.
    ///
    /// # Errors
    /// If the parts differ in columns, a size does not fit, or a number is NaN.
    pub fn from_fp8(parts: &[Fp8Matrix], device: &Device) -> Result<Self> {
        Fp8Matrix::check(parts)?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Self::tiled(|| crate::tiles::TiledMatrix::from_fp8(parts), device);
        }
        let parts = parts.iter().map(Fp8Matrix::to_tensor).collect::<Result<Vec<_>>>()?;
        Self::stack(&parts, DType::BF16, device)
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
            Storage::Quantized(matrix) => matrix.num_bytes(),
            Storage::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
            #[cfg(feature = "cuda")]
            Storage::Tiles(tiles) => tiles.num_bytes(),
        }
    }

    /// For the CUDA kernels, if it lies on such a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_cuda(&self) -> Option<crate::cuda::linear::Operand<'_>> {
        use crate::cuda::linear::Operand;
        match &self.storage {
            Storage::Dense(matrix) if matrix.device().is_cuda() => Some(Operand::Dense(matrix)),
            Storage::Tiles(tiles) => Some(Operand::Tiles(tiles)),
            _ => None,
        }
    }

    /// The rows as numbers of `dtype`, if they lie on a CUDA device as such.
    #[cfg(feature = "cuda")]
    pub(crate) fn dense_on_cuda(&self, dtype: DType) -> Option<&Tensor> {
        match &self.storage {
            Storage::Dense(matrix) if matrix.device().is_cuda() && matrix.dtype() == dtype => Some(matrix),
            _ => None,
        }
    }

    /// On a CUDA device, tiles that `make` lays out in host memory.
    #[cfg(feature = "cuda")]
    fn tiled(make: impl FnOnce() -> Result<crate::tiles::TiledMatrix>, device: &Device) -> Result<Self> {
        let tiles = make()?;
        let (rows, cols) = (tiles.rows, tiles.cols);
        let tiles = crate::cuda::linear::DeviceTiles::upload(&tiles, device)?;
        Ok(Self { rows, cols, storage: Storage::Tiles(Arc::new(tiles)) })
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }
}

fn check_parts(parts: &[Tensor]) -> Result<(usize, usize)> {
    let dims = parts.iter().map(Tensor::dims2).collect::<candle_core::Result<Vec<_>>>()?;
    stacked_dims(dims)
}
