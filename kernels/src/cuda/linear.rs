//! Products by weights on the device, and rows of weights.
//!
//! Up to sixteen tokens, any weights: our kernel, which reads the weights once, at the speed of memory. More tokens by codes: our
//! tiled kernel, in which fp8 weights meet activations that are rounded to fp8 too, where tensor cores multiply such numbers.
//! More by dense weights, and from [`PANEL_TOKENS`] on by codes: a library (`large`). With [`crate::set_deterministic`]
//! always the tiled kernel.

mod large;
mod lt;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use super::ids::Ids;
use super::module::{Argument, File, address, address_mut, computes_fp8, launch, multiprocessors};
use crate::error::{Result, argument};
use crate::ops::{self, Activation, LateIds};
use crate::tiles::{
    LinearArgs, LinearPlan, LinearShape, MAX_TOKENS, PANEL_TOKENS, ROUNDED_FP8, SKINNY_TOKENS, TileFormat,
    TiledMatrix, can_gate,
};

/// A matrix of codes in device memory.
#[derive(Debug)]
pub(crate) struct DeviceTiles {
    format: TileFormat,
    rows: usize,
    cols: usize,
    unit: f32,
    codes: CudaSlice<u8>,
    scales: Option<CudaSlice<u16>>,
    mins: Option<CudaSlice<u16>>,
    row_scales: Option<CudaSlice<f32>>,
    device: CudaDevice,
}

impl DeviceTiles {
    pub(crate) fn upload(tiles: &TiledMatrix, device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let halves = |values: &[u16]| match values {
            [] => Ok(None),
            values => device.clone_htod(values).map(Some),
        };
        let row_scales = match tiles.row_scales.as_slice() {
            [] => None,
            scales => Some(device.clone_htod(scales)?),
        };
        Ok(Self {
            format: tiles.format,
            rows: tiles.rows,
            cols: tiles.cols,
            unit: tiles.unit,
            codes: device.clone_htod(tiles.codes.as_slice())?,
            scales: halves(&tiles.scales)?,
            mins: halves(&tiles.mins)?,
            row_scales,
            device,
        })
    }

    pub(crate) fn num_bytes(&self) -> usize {
        let halves = |part: &Option<CudaSlice<u16>>| part.as_ref().map_or(0, |part| 2 * part.len());
        let row_scales = self.row_scales.as_ref().map_or(0, |scales| 4 * scales.len());
        self.codes.len() + halves(&self.scales) + halves(&self.mins) + row_scales
    }

    /// Addresses of codes, scales, minima and scales of rows.
    fn addresses(&self) -> [u64; 4] {
        let halves =
            |part: &Option<CudaSlice<u16>>| part.as_ref().map_or(0, |part| address(&self.device, part));
        let row_scales = self.row_scales.as_ref().map_or(0, |scales| address(&self.device, scales));
        [address(&self.device, &self.codes), halves(&self.scales), halves(&self.mins), row_scales]
    }

    /// Rows `ids` as `[ids.len(), cols]` in `dtype`.
    pub(crate) fn embedding(&self, ids: &[u32], late: Option<&LateIds>, dtype: DType) -> Result<Tensor> {
        let ids_on_device = Ids::upload(&self.device, ids, late, self.rows)?;
        let ids_at = ids_on_device.address(&self.device);
        match dtype {
            DType::F32 => self.rows_as::<f32>(ids_at, 0, ids.len()),
            DType::F16 => self.rows_as::<f16>(ids_at, 0, ids.len()),
            DType::BF16 => self.rows_as::<bf16>(ids_at, 0, ids.len()),
            _ => Ok(self.rows_as::<f32>(ids_at, 0, ids.len())?.to_dtype(dtype)?),
        }
    }

    /// The rows at `ids`, or `count` from `first` on if it is 0.
    fn rows_as<T: Number>(&self, ids: u64, first: usize, count: usize) -> Result<Tensor> {
        let mut out = room::<T>(&self.device, count, self.cols)?;
        let out_at = address_mut(&self.device, &mut out);
        self.unpack::<T>(ids, first, count, out_at)?;
        Ok(tensor(out, (count, self.cols), &self.device))
    }

    fn unpack<T: Number>(&self, ids: u64, first: usize, count: usize, out: u64) -> Result<()> {
        let kind = match self.format {
            TileFormat::Fp8 | TileFormat::Fp8Grouped => "fp8",
            TileFormat::Int8 => "bytes",
            TileFormat::Int4 | TileFormat::Int4WithMinima => "halves",
        };
        let [codes, scales, mins, row_scales] = self.addresses();
        // The grid's second dimension ends at 65535.
        for start in (0..count).step_by(32768) {
            let rows = (count - start).min(32768);
            let ids = if ids == 0 { 0 } else { ids + 4 * start as u64 };
            // SAFETY: the matrix as it was uploaded; `out` has room for `count` rows; ids were checked, late ones where they were put in place.
            unsafe {
                launch(
                    &self.device,
                    (File::Unpack, &format!("unpack_{kind}_{}", T::IN_C)),
                    ([self.cols.div_ceil(8 * 256) as u32, rows as u32, 1], 256, 0),
                    &[
                        Argument::Address(codes),
                        Argument::Address(scales),
                        Argument::Address(mins),
                        Argument::Address(row_scales),
                        Argument::U32(self.rows as u32),
                        Argument::U32(self.cols as u32),
                        Argument::Address(ids),
                        Argument::U32((first + start) as u32),
                        Argument::F32(self.unit),
                        Argument::Address(out + (start * self.cols * size_of::<T>()) as u64),
                    ],
                )?;
            }
        }
        Ok(())
    }
}

/// A matrix as products read it.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// `[rows, cols]`, row-major.
    Dense(&'a Tensor),
    Tiles(&'a DeviceTiles),
}

impl Operand<'_> {
    fn dims(self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(matrix) => Ok(matrix.dims2()?),
            Self::Tiles(tiles) => Ok((tiles.rows, tiles.cols)),
        }
    }
}

/// `x [tokens, cols]` times the matrix transposed, gated if an activation is given; `None` where the plain operations should do it. Shapes
/// were checked.
pub(crate) fn linear(
    x: &Tensor,
    matrix: Operand<'_>,
    bias: Option<&Tensor>,
    gate: Option<Activation>,
) -> Result<Option<Tensor>> {
    match x.dtype() {
        DType::BF16 => product::<bf16>(x, matrix, bias, gate),
        DType::F16 => product::<f16>(x, matrix, bias, gate),
        _ => match matrix {
            Operand::Dense(_) => Ok(None),
            // Types that nobody computes in on a GPU but to compare: right, and no more.
            Operand::Tiles(tiles) => {
                let weights = tiles.rows_as::<f32>(0, 0, tiles.rows)?.to_dtype(x.dtype())?;
                let y = x.contiguous()?.matmul(&weights.t()?)?;
                let y = match bias {
                    Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
                    None => y,
                };
                gated(y, gate).map(Some)
            }
        },
    }
}

/// Kinds of large products that cuBLASLt has refused on `device`, in words.
pub(crate) fn refused_by_library(device: &Device) -> Vec<String> {
    device.as_cuda_device().map(lt::refused).unwrap_or_default()
}

fn product<T: Number>(
    x: &Tensor,
    matrix: Operand<'_>,
    bias: Option<&Tensor>,
    gate: Option<Activation>,
) -> Result<Option<Tensor>> {
    let (tokens, _) = x.dims2()?;
    let (rows, cols) = matrix.dims()?;
    let one_order = crate::is_deterministic();
    let ours = one_order
        || match matrix {
            Operand::Dense(_) => tokens <= SKINNY_TOKENS,
            Operand::Tiles(_) => tokens < PANEL_TOKENS,
        };
    if matches!(matrix, Operand::Dense(matrix) if matrix.dtype() != T::DTYPE || !matrix.is_contiguous())
        || tokens == 0
    {
        return Ok(None);
    }
    let x = if x.stride()[1] == 1 || cols == 1 { x.clone() } else { x.contiguous()? };
    let bias = bias.map(|bias| bias.to_dtype(T::DTYPE)?.contiguous()).transpose()?;
    if !ours {
        return large::product::<T>(&x, matrix, bias.as_ref(), gate);
    }
    // What the kernel cannot do while it stores is done afterwards.
    let (fused, after) = if can_gate(rows) { (gate, None) } else { (None, gate) };
    let device = x.device().as_cuda_device()?;
    let width = if fused.is_some() { rows / 2 } else { rows };
    let mut y = room::<T>(device, tokens, width)?;
    let y_at = address_mut(device, &mut y);
    let x_at = Address::of::<T>(&x)?;
    let (format, codes, unit, weights_wide) = match matrix {
        Operand::Dense(matrix) => {
            let at = Address::of::<T>(matrix)?;
            ("dense", [at.start, 0, 0, 0], 1.0, at.wide(cols))
        }
        Operand::Tiles(tiles) => (tiles.format.name(), tiles.addresses(), tiles.unit, false),
    };
    let args = LinearArgs {
        codes: codes[0],
        scales: codes[1],
        mins: codes[2],
        row_scales: codes[3],
        bias: bias.as_ref().map_or(Ok(0), |bias| Address::of::<T>(bias).map(|bias| bias.start))?,
        rows: rows as u32,
        cols: cols as u32,
        x_stride: x_at.stride as u32,
        unit,
        activation: fused.map_or(LinearArgs::NOT_GATED, super::elementwise::number),
        flags: if x_at.wide(cols) { LinearArgs::WIDE_X } else { 0 }
            + if weights_wide { LinearArgs::WIDE_WEIGHTS } else { 0 },
        ..LinearArgs::default()
    };
    let rounds = matches!(matrix, Operand::Tiles(tiles) if tiles.format == TileFormat::Fp8);
    let rounded = if rounds && !one_order && tokens > SKINNY_TOKENS && computes_fp8(device)? {
        Some(Rounded::new::<T>(device, &x_at, (tokens, cols))?)
    } else {
        None
    };
    for first in (0..tokens).step_by(MAX_TOKENS) {
        let count = (tokens - first).min(MAX_TOKENS);
        let from = |start: u64, stride: usize| start + (first * stride * size_of::<T>()) as u64;
        let args = LinearArgs {
            x: from(x_at.start, x_at.stride),
            y: from(y_at, width),
            tokens: count as u32,
            ..args
        };
        let (format, file, args) = match &rounded {
            Some(rounded) => (ROUNDED_FP8, File::LinearFp8, rounded.part(device, first, args)),
            None => (format, T::FILE, args),
        };
        let shape = LinearShape { tokens: count, rows, cols, gated: fused.is_some() };
        let plan = LinearPlan::new(T::NAME, format, shape, multiprocessors(device)?, one_order);
        run::<T>(device, (&plan, file), args, width)?;
    }
    gated(tensor(y, (tokens, width), device), after).map(Some)
}

/// The gate as an operation of its own.
fn gated(y: Tensor, gate: Option<Activation>) -> Result<Tensor> {
    match gate {
        Some(activation) => ops::gated_activation(&y, activation),
        None => Ok(y),
    }
}

/// Activations as e4m3 numbers, columns padded to whole tiles, and each token's scale.
struct Rounded {
    codes: CudaSlice<u8>,
    scales: CudaSlice<f32>,
    cols: usize,
}

impl Rounded {
    fn new<T: Number>(device: &CudaDevice, x: &Address, (tokens, cols): (usize, usize)) -> Result<Self> {
        let padded = cols.next_multiple_of(64);
        let too_large = || argument("linear", "too many tokens");
        // SAFETY: `round_rows` writes all codes and scales before anything reads them.
        let (mut codes, mut scales) = unsafe {
            let len = tokens.checked_mul(padded).ok_or_else(too_large)?;
            (device.alloc::<u8>(len)?, device.alloc::<f32>(tokens)?)
        };
        let arguments = [
            Argument::Address(x.start),
            Argument::U32(x.stride as u32),
            Argument::U32(cols as u32),
            Argument::Address(address_mut(device, &mut codes)),
            Argument::Address(address_mut(device, &mut scales)),
        ];
        let kernel = (File::LinearFp8, format!("round_rows_{}", T::NAME));
        // SAFETY: `x` has `tokens` rows of `cols`; the outputs are as large as the kernel's comment says.
        unsafe {
            launch(device, (kernel.0, &kernel.1), ([tokens as u32, 1, 1], 256, 0), &arguments)?;
        }
        Ok(Self { codes, scales, cols: padded })
    }

    /// `args` with the activations from token `first` on replaced.
    fn part(&self, device: &CudaDevice, first: usize, args: LinearArgs) -> LinearArgs {
        LinearArgs {
            x: address(device, &self.codes) + (first * self.cols) as u64,
            x_stride: self.cols as u32,
            token_scales: address(device, &self.scales) + 4 * first as u64,
            ..args
        }
    }
}

fn run<T: Number>(
    device: &CudaDevice,
    (plan, file): (&LinearPlan, File),
    args: LinearArgs,
    width: usize,
) -> Result<()> {
    let launch_plan = |args: LinearArgs| {
        let size = (plan.grid, plan.block, plan.shared_bytes);
        // SAFETY: addresses, shapes and strides of tensors and matrices that were checked against each other.
        unsafe { launch(device, (file, &plan.name), size, &[Argument::Linear(args)]) }
    };
    if plan.splits <= 1 {
        return launch_plan(args);
    }
    let sums = (plan.splits as usize * args.tokens as usize).checked_mul(args.rows as usize);
    let sums = sums.ok_or_else(|| argument("linear", "too many tokens"))?;
    // SAFETY: the tiled kernel writes all of it before `finish_linear` reads it.
    let mut partial = unsafe { device.alloc::<f32>(sums)? };
    let args = LinearArgs { partial: address_mut(device, &mut partial), ..args };
    launch_plan(args)?;
    let grid = [width.div_ceil(256) as u32, args.tokens, 1];
    // SAFETY: as above; `partial` is freed on the same stream, after this.
    unsafe {
        launch(
            device,
            (T::FILE, &format!("finish_linear_{}", T::NAME)),
            (grid, 256, 0),
            &[Argument::Linear(args), Argument::U32(plan.splits)],
        )
    }
}

/// Where a tensor's rows lie.
struct Address {
    start: u64,
    /// Elements from row to row.
    stride: usize,
    size: usize,
}

impl Address {
    fn of<T: Number>(x: &Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(argument("linear", "a tensor is not on the GPU"));
        };
        let device = x.device().as_cuda_device()?;
        let size = size_of::<T>();
        let start = address(device, storage.as_cuda_slice::<T>()?) + (layout.start_offset() * size) as u64;
        // A single row has no next.
        let dims = layout.dims();
        let stride = if dims.first() == Some(&1) { layout.shape().elem_count() } else { layout.stride()[0] };
        u32::try_from(stride).map_err(|_| argument("linear", "rows are too far apart"))?;
        Ok(Self { start, stride, size })
    }

    /// Whether rows of `width` may be read sixteen bytes at a time.
    fn wide(&self, width: usize) -> bool {
        let aligned = self.start.is_multiple_of(16) && (self.stride * self.size).is_multiple_of(16);
        aligned && (width * self.size).is_multiple_of(16)
    }
}

/// Numbers of activations.
trait Number: CudaDType + DeviceRepr + 'static {
    const DTYPE: DType;
    /// As the kernels' names have it.
    const NAME: &'static str;
    /// As C has it.
    const IN_C: &'static str;
    const FILE: File;
    const BLAS: sys::cudaDataType;
    const LT: lt::Numbers;
}

impl Number for bf16 {
    const DTYPE: DType = DType::BF16;
    const NAME: &'static str = "bf16";
    const IN_C: &'static str = "bf16";
    const FILE: File = File::LinearBf16;
    const BLAS: sys::cudaDataType = sys::cudaDataType::CUDA_R_16BF;
    const LT: lt::Numbers = lt::Numbers::CUDA_R_16BF;
}

impl Number for f16 {
    const DTYPE: DType = DType::F16;
    const NAME: &'static str = "f16";
    const IN_C: &'static str = "f16";
    const FILE: File = File::LinearF16;
    const BLAS: sys::cudaDataType = sys::cudaDataType::CUDA_R_16F;
    const LT: lt::Numbers = lt::Numbers::CUDA_R_16F;
}

impl Number for f32 {
    const DTYPE: DType = DType::F32;
    const NAME: &'static str = "f32";
    const IN_C: &'static str = "float";
    // Never launched: products of f32 are candle's.
    const FILE: File = File::Unpack;
    const BLAS: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;
    const LT: lt::Numbers = lt::Numbers::CUDA_R_32F;
}

fn room<T: Number>(device: &CudaDevice, rows: usize, cols: usize) -> Result<CudaSlice<T>> {
    let len = rows.checked_mul(cols).filter(|len| *len > 0);
    let len = len.ok_or_else(|| argument("linear", format!("an output of [{rows}, {cols}]")))?;
    // SAFETY: every caller's kernel writes all of it before anything reads it.
    Ok(unsafe { device.alloc::<T>(len)? })
}

fn tensor<T: Number>(values: CudaSlice<T>, shape: (usize, usize), device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
