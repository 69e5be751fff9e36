//! Tensors as kernels see them: addresses, rows and strides.

use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use super::module::address;
use crate::error::{Result, argument};

/// The device of `x`, if that is a GPU.
pub(super) fn device_of(x: &Tensor) -> Option<CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Some(device.clone()),
        _ => None,
    }
}

/// The name that kernels for activations of `dtype` end with.
pub(super) fn suffix(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::BF16 => Some("bf16"),
        DType::F16 => Some("f16"),
        _ => None,
    }
}

/// Where the first number of `x` lies. It holds while `x` lives: what is freed later is freed after what was launched
/// before, on the same stream.
pub(super) fn address_of(device: &CudaDevice, x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(argument("cuda", "a tensor lies on another device"));
    };
    let base = match x.dtype() {
        DType::F32 => address(device, storage.as_cuda_slice::<f32>()?),
        DType::BF16 => address(device, storage.as_cuda_slice::<bf16>()?),
        DType::F16 => address(device, storage.as_cuda_slice::<f16>()?),
        DType::U8 => address(device, storage.as_cuda_slice::<u8>()?),
        DType::U32 => address(device, storage.as_cuda_slice::<u32>()?),
        other => return Err(argument("cuda", format!("no kernel reads {other:?}"))),
    };
    Ok(base + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

/// A tensor whose numbers nothing has written yet.
pub(super) fn unwritten(device: &CudaDevice, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    // SAFETY: whoever asks launches a kernel that writes all of it, before anything can read it on the same stream.
    let storage = unsafe {
        match dtype {
            DType::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(count)?, device.clone()),
            DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(count)?, device.clone()),
            DType::F16 => CudaStorage::wrap_cuda_slice(device.alloc::<f16>(count)?, device.clone()),
            other => return Err(argument("cuda", format!("no kernel writes {other:?}"))),
        }
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// `x` with its dimensions but the first side by side, and the elements from row to row. Copied only if they are not.
pub(super) fn rows(x: &Tensor) -> Result<(Tensor, u64)> {
    let (dims, strides) = (x.dims(), x.stride());
    let mut width = 1;
    let inner = dims.iter().zip(strides).skip(1).rev().all(|(dim, stride)| {
        let fits = *stride == width || *dim == 1;
        width *= dim;
        fits
    });
    match strides.first() {
        Some(stride) if inner => Ok((x.clone(), *stride as u64)),
        _ => Ok((x.contiguous()?, dims.iter().skip(1).product::<usize>() as u64)),
    }
}

/// As [`rows`], with every row of whole 16-byte pieces at a multiple of 16 bytes.
pub(super) fn aligned_rows(device: &CudaDevice, x: &Tensor) -> Result<(Tensor, u64)> {
    let (x, stride) = rows(x)?;
    let bytes = stride * x.dtype().size_in_bytes() as u64;
    if address_of(device, &x)?.is_multiple_of(16) && bytes.is_multiple_of(16) {
        return Ok((x, stride));
    }
    let width: usize = x.dims().iter().skip(1).product();
    // `contiguous` alone would return what is contiguous but misplaced.
    Ok((x.copy()?.contiguous()?, width as u64))
}

/// A size as kernels take it.
pub(super) fn narrow(size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| argument("cuda", format!("{size} does not fit in 32 bits")))
}
