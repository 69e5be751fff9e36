//! Products of many tokens, whose limit is arithmetic: by cuBLASLt, or by cuBLAS where that has nothing.
//!
//! Dense weights are multiplied as they are. Codes are unpacked before, some rows at a time: to numbers of the activations' type,
//! or, of fp8 weights with a scale a row on devices that multiply such numbers, to rows of the same codes. Activations are
//! then rounded to fp8 as the tiled kernel has them, so 17 tokens and 2,048 lose the same. Scales of rows and tokens are the
//! library's business on Hopper, a kernel's of ours on other devices.

use std::ops::Range;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::{CudaDevice, Tensor};

use super::super::module::{Argument, File, address, address_mut, capability, computes_fp8, launch};
use super::super::{elementwise, encoder};
use super::lt::{self, Numbers};
use super::{Address, DeviceTiles, Number, Operand, Rounded, room, tensor};
use crate::error::{Result, argument};
use crate::ops::Activation;
use crate::tiles::{TileFormat, panel_rows};

/// Rows of a tile: what fp8 matrices must be whole multiples of here, more than any library's kernel asks for.
const TILE_ROWS: usize = 16;
/// Lanes of a tile that have sixteen bytes each.
const TILE_LANES: usize = 64;
/// Tokens whose sums are kept in f32 at a time.
const SUM_TOKENS: usize = 2048;
/// The generation whose library takes scales of rows.
const HOPPER: (i32, i32) = (9, 0);

/// As [`super::linear`]; shapes and types were checked, and a row of `x` lies side by side.
pub(super) fn product<T: Number>(
    x: &Tensor,
    matrix: Operand<'_>,
    bias: Option<&Tensor>,
    gate: Option<Activation>,
) -> Result<Option<Tensor>> {
    // A gate reads its product anyway, and adds the bias then.
    let early = if gate.is_none() { bias } else { None };
    let (y, with_bias) = match matrix {
        Operand::Dense(matrix) => match dense::<T>(x, matrix, early)? {
            Some(y) => (y, true),
            None => return Ok(None),
        },
        Operand::Tiles(tiles) => match by_fp8::<T>(x, tiles, early)? {
            Some(y) => (y, true),
            None => by_panels::<T>(x, tiles, early)?,
        },
    };
    match (gate, early) {
        (Some(activation), _) => elementwise::gated_activation(&y, bias, activation),
        (None, Some(bias)) if !with_bias => encoder::bias_activate(&y, Some(bias), None, true),
        _ => Ok(Some(y)),
    }
}

/// By a matrix in the type of the activations; `None` if cuBLASLt has nothing for it.
fn dense<T: Number>(x: &Tensor, matrix: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let ((tokens, cols), (rows, _)) = (x.dims2()?, matrix.dims2()?);
    let device = x.device().as_cuda_device()?;
    let x = Address::of::<T>(x)?;
    let mut y = room::<T>(device, tokens, rows)?;
    let product = lt::Product {
        w: Address::of::<T>(matrix)?.start,
        ..of_numbers::<T>(&x, (tokens, rows, cols), bias, address_mut(device, &mut y))?
    };
    // SAFETY: tensors that are as large as their shapes say.
    let done = unsafe { lt::multiply(device, &product)? };
    Ok(done.then(|| tensor(y, (tokens, rows), device)))
}

/// By a matrix of `T`, row after row, whose address is still to be put in.
fn of_numbers<T: Number>(
    x: &Address,
    (tokens, rows, cols): (usize, usize, usize),
    bias: Option<&Tensor>,
    y: u64,
) -> Result<lt::Product> {
    Ok(lt::Product {
        rows,
        cols,
        tokens,
        operands: T::LT,
        w: 0,
        w_stride: cols,
        x: x.start,
        x_stride: x.stride,
        results: T::LT,
        y,
        y_stride: rows,
        bias: bias.map_or(Ok(0), |bias| Address::of::<T>(bias).map(|bias| bias.start))?,
        alpha: 1.0,
        scales: [0, 0],
    })
}

/// The part of `whole` by some of the rows, which lie at `w`.
fn part<T: Number>(whole: &lt::Product, rows: &Range<usize>, w: u64) -> lt::Product {
    let after = |at: u64, size: usize| if at == 0 { 0 } else { at + (rows.start * size) as u64 };
    lt::Product {
        rows: rows.len(),
        w,
        y: after(whole.y, size_of::<T>()),
        bias: after(whole.bias, size_of::<T>()),
        scales: [after(whole.scales[0], size_of::<f32>()), whole.scales[1]],
        ..*whole
    }
}

/// Calls `each` for some rows of a matrix after others, with room for them in numbers of `size` bytes, until one says `false`.
fn in_panels(
    device: &CudaDevice,
    (rows, cols, size): (usize, usize, usize),
    mut each: impl FnMut(&Range<usize>, u64) -> Result<bool>,
) -> Result<bool> {
    let most = panel_rows(rows, cols);
    let bytes = most.checked_mul(cols).and_then(|count| count.checked_mul(size));
    let bytes = bytes.ok_or_else(|| argument("linear", "too many columns"))?;
    // SAFETY: rows are unpacked before they are read.
    let mut panel = unsafe { device.alloc::<u8>(bytes)? };
    let at = address_mut(device, &mut panel);
    for first in (0..rows).step_by(most) {
        if !each(&(first..rows.min(first + most)), at)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// By codes as numbers of the activations' type, and whether the bias is in it.
fn by_panels<T: Number>(x: &Tensor, tiles: &DeviceTiles, bias: Option<&Tensor>) -> Result<(Tensor, bool)> {
    let (device, (tokens, _)) = (&tiles.device, x.dims2()?);
    let (rows, cols) = (tiles.rows, tiles.cols);
    let mut y = room::<T>(device, tokens, rows)?;
    let y_at = address_mut(device, &mut y);
    let whole = of_numbers::<T>(&Address::of::<T>(x)?, (tokens, rows, cols), bias, y_at)?;
    let size = (rows, cols, size_of::<T>());
    let unpacked = |panel: &Range<usize>, at: u64| -> Result<lt::Product> {
        tiles.unpack::<T>(0, panel.start, panel.len(), at)?;
        Ok(part::<T>(&whole, panel, at))
    };
    // SAFETY: the panel holds its rows; `x` and `y` are as large as their shapes say.
    let done = in_panels(device, size, |panel, at| unsafe { lt::multiply(device, &unpacked(panel, at)?) })?;
    if !done {
        in_panels(device, size, |panel, at| gemm::<T>(device, &unpacked(panel, at)?).map(|()| true))?;
    }
    Ok((tensor(y, (tokens, rows), device), done))
}

/// `product` by cuBLAS, without its bias.
fn gemm<T: Number>(device: &CudaDevice, product: &lt::Product) -> Result<()> {
    let int =
        |x: usize| i32::try_from(x).map_err(|_| argument("linear", format!("{x} is too large for cuBLAS")));
    let (one, zero) = (1.0_f32, 0.0_f32);
    // It counts columns first: y^T [rows, tokens] = w [rows, cols] x^T [cols, tokens].
    // SAFETY: addresses of memory of the sizes that `product` says, all on the handle's stream.
    unsafe {
        gemm_ex(
            *device.cublas_handle().handle(),
            sys::cublasOperation_t::CUBLAS_OP_T,
            sys::cublasOperation_t::CUBLAS_OP_N,
            int(product.rows)?,
            int(product.tokens)?,
            int(product.cols)?,
            (&raw const one).cast(),
            product.w as *const _,
            T::BLAS,
            int(product.w_stride)?,
            product.x as *const _,
            T::BLAS,
            int(product.x_stride)?,
            (&raw const zero).cast(),
            product.y as *mut _,
            T::BLAS,
            int(product.y_stride)?,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()?;
    Ok(())
}

/// By fp8 weights as they are and activations rounded to fp8; `None` where that cannot be done.
fn by_fp8<T: Number>(x: &Tensor, tiles: &DeviceTiles, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let device = &tiles.device;
    let fits = tiles.format == TileFormat::Fp8 && tiles.rows.is_multiple_of(TILE_ROWS);
    let Some(row_scales) = tiles.row_scales.as_ref().filter(|_| fits) else { return Ok(None) };
    if !computes_fp8(device)? {
        return Ok(None);
    }
    let (tokens, cols) = x.dims2()?;
    let x = Address::of::<T>(x)?;
    let rounded = Rounded::new::<T>(device, &x, (tokens, cols))?;
    let mut y = room::<T>(device, tokens, tiles.rows)?;
    let y_at = address_mut(device, &mut y);
    let whole = lt::Product {
        operands: Numbers::CUDA_R_8F_E4M3,
        x: address(device, &rounded.codes),
        x_stride: rounded.cols,
        alpha: tiles.unit,
        scales: [address(device, row_scales), address(device, &rounded.scales)],
        ..of_numbers::<T>(&x, (tokens, tiles.rows, rounded.cols), bias, y_at)?
    };
    let library_scales = capability(device)? == HOPPER;
    let done = in_panels(device, (tiles.rows, rounded.cols, 1), |panel, at| {
        rows_of_codes(tiles, panel, at)?;
        let part = part::<T>(&whole, panel, at);
        // SAFETY: the panel and the rounded activations hold their rows, scales are as many as rows and tokens.
        Ok(library_scales && unsafe { lt::multiply(device, &part)? } || scaled_after::<T>(device, &part)?)
    })?;
    Ok(done.then(|| tensor(y, (tokens, tiles.rows), device)))
}

/// Codes of `rows`, which begin with a row of tiles, row after row at `out`; columns padded to whole tiles.
fn rows_of_codes(tiles: &DeviceTiles, rows: &Range<usize>, out: u64) -> Result<()> {
    let lanes = tiles.cols.div_ceil(64) * TILE_LANES;
    let arguments = [
        Argument::Address(address(&tiles.device, &tiles.codes)),
        Argument::U32(tiles.cols as u32),
        Argument::U32(rows.start as u32),
        Argument::U32(rows.len() as u32),
        Argument::Address(out),
    ];
    let grid = [lanes.div_ceil(256) as u32, rows.len().div_ceil(TILE_ROWS) as u32, 1];
    // SAFETY: the matrix as it was uploaded, and room for `rows` of it.
    unsafe { launch(&tiles.device, (File::Unpack, "fp8_by_rows"), (grid, 256, 0), &arguments) }
}

/// `product` with its scales and bias put on by a kernel of ours, to sums in f32. `false`: the library has nothing for it.
fn scaled_after<T: Number>(device: &CudaDevice, product: &lt::Product) -> Result<bool> {
    let lt::Product { rows, y_stride, scales: [row_scales, token_scales], .. } = *product;
    let most = product.tokens.min(SUM_TOKENS);
    let mut sums = room::<f32>(device, most, rows)?;
    let sums_at = address_mut(device, &mut sums);
    for first in (0..product.tokens).step_by(most) {
        let tokens = most.min(product.tokens - first);
        let bare = lt::Product {
            tokens,
            x: product.x + (first * product.x_stride) as u64,
            results: Numbers::CUDA_R_32F,
            y: sums_at,
            y_stride: rows,
            bias: 0,
            alpha: 1.0,
            scales: [0, 0],
            ..*product
        };
        // SAFETY: as for `product`; there is room for the sums of `most` tokens.
        if !unsafe { lt::multiply(device, &bare)? } {
            return Ok(false);
        }
        let arguments = [
            Argument::Address(sums_at),
            Argument::Address(row_scales),
            Argument::Address(token_scales + (first * size_of::<f32>()) as u64),
            Argument::Address(product.bias),
            Argument::U32(rows as u32),
            Argument::U32(tokens as u32),
            Argument::F32(product.alpha),
            Argument::Address(product.y + (first * y_stride * size_of::<T>()) as u64),
            Argument::U32(y_stride as u32),
        ];
        let grid = [rows.div_ceil(4 * 256) as u32, tokens as u32, 1];
        let kernel = format!("scale_sums_{}", T::NAME);
        // SAFETY: as above; rows are a multiple of four, and so is where a row of `y` begins.
        unsafe { launch(device, (File::LinearFp8, &kernel), (grid, 256, 0), &arguments)? };
    }
    Ok(true)
}
