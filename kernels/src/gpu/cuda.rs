//! The CUDA half: a context, its stream and its memory pool.
#![allow(unsafe_code, reason = "calls of the driver; each says what it needs")]

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaSlice, DeviceRepr, PinnedHostSlice, result, sys,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Storage, Tensor};
use half::{bf16, f16};

use super::DeviceMemory;
use super::upload::{self, ReadAt};
use crate::error::{Result, argument};

/// Opens GPU `ordinal` with a stream of its own.
///
/// candle's plain `new_cuda` uses the stream of whichever thread calls, so that a tensor made on one thread and read on
/// another would race; here all threads share one.
pub(super) fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: tensors of this device live on its one stream, which orders all uses and frees of them. The events
        // that are given up here order uses on several streams; they would also forbid capturing a graph.
        unsafe { cuda.disable_event_tracking() };
        keep_freed(cuda)?;
    }
    Ok(device)
}

/// Freed memory stays in the pool: a step frees what the next one allocates, and giving it back to the driver at every
/// synchronisation in between costs more than the step's own kernels.
fn keep_freed(device: &CudaDevice) -> Result<()> {
    if let Some(pool) = pool(device)? {
        let mut threshold = u64::MAX;
        let value = std::ptr::from_mut(&mut threshold).cast();
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and the attribute is a u64.
        unsafe { result::mem_pool::set_attribute(pool, attribute, value) }.w()?;
    }
    Ok(())
}

/// The pool that tensors are allocated from; `None` where the device has none and memory is allocated directly.
fn pool(device: &CudaDevice) -> Result<Option<sys::CUmemoryPool>> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(None);
    }
    context.bind_to_thread().w()?;
    // SAFETY: the context was made for this device.
    Ok(Some(unsafe { result::device::get_mem_pool(context.cu_device()) }.w()?))
}

pub(super) fn memory(device: &CudaDevice) -> Result<DeviceMemory> {
    let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
    Ok(DeviceMemory { free: free as u64, total: total as u64 })
}

pub(super) fn release(device: &CudaDevice) -> Result<()> {
    KEPT.with(RefCell::take);
    device.cuda_stream().synchronize().w()?;
    if let Some(pool) = pool(device)? {
        // SAFETY: the pool is the device's own; memory in use is not touched.
        unsafe { result::mem_pool::trim_to(pool, 0) }.w()?;
    }
    Ok(())
}

/// Bytes a second that a copy within the device moves, those read and those written together.
pub(super) fn copy_rate(device: &CudaDevice) -> Result<f64> {
    const COPIES: u32 = 10;
    let bytes = usize::try_from(memory(device)?.free / 4).unwrap_or(usize::MAX).min(2 << 30);
    let from = device.alloc_zeros::<u8>(bytes)?;
    let mut to = device.alloc_zeros::<u8>(bytes)?;
    let seconds = super::fastest(3, || {
        for _ in 0..COPIES {
            device.memcpy_dtod(&from, &mut to)?;
        }
        Ok(device.cuda_stream().synchronize().w()?)
    })?;
    Ok(2.0 * bytes as f64 * f64::from(COPIES) / seconds)
}

/// See [`super::read_tensor`]. The buffers are pinned: the device fetches from them by itself, at the bus's full speed.
pub(super) fn read_tensor(
    device: &CudaDevice,
    dtype: DType,
    (shape, count, bytes): (Shape, usize, usize),
    read: &ReadAt<'_>,
) -> Result<Tensor> {
    let storage = match dtype {
        DType::BF16 => {
            CudaStorage::wrap_cuda_slice(filled::<bf16>(device, count, bytes, read)?, device.clone())
        }
        DType::F16 => {
            CudaStorage::wrap_cuda_slice(filled::<f16>(device, count, bytes, read)?, device.clone())
        }
        _ => CudaStorage::wrap_cuda_slice(filled::<f32>(device, count, bytes, read)?, device.clone()),
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

fn filled<T: DeviceRepr>(
    device: &CudaDevice,
    count: usize,
    bytes: usize,
    read: &ReadAt<'_>,
) -> Result<CudaSlice<T>> {
    let stream = device.cuda_stream();
    // SAFETY: all of it is written below, before anybody reads it on the same stream.
    let mut slice = unsafe { device.alloc::<T>(count)? };
    let mut staging = Staging::take(stream.context())?;
    let [first, second] = &mut staging.buffers;
    let buffers = [first.as_mut_slice().w()?, second.as_mut_slice().w()?];
    upload::stream(bytes, buffers, read, &mut |at, part| {
        // SAFETY: T is a number without padding, of which the device has `count`, which are `bytes` bytes.
        let mut all = unsafe { slice.transmute_mut::<u8>(bytes) }
            .ok_or_else(|| argument("read_tensor", format!("{bytes} bytes in {count} numbers")))?;
        let mut to = all.slice_mut(at..at + part.len());
        stream.memcpy_htod(part, &mut to).w()?;
        // The buffer is filled again once this returns.
        Ok(stream.synchronize().w()?)
    })?;
    KEPT.with(|kept| kept.replace(Some(staging)));
    Ok(slice)
}

/// Two pinned buffers.
struct Staging {
    buffers: [PinnedHostSlice<u8>; 2],
}

thread_local! {
    /// Those of the tensor before: pinning takes longer than copying. [`release`] lets go of them.
    static KEPT: RefCell<Option<Staging>> = const { RefCell::new(None) };
}

impl Staging {
    fn take(context: &Arc<CudaContext>) -> Result<Self> {
        let kept = KEPT.with(|kept| kept.borrow_mut().take());
        if let Some(staging) = kept.filter(|staging| staging.buffers[0].context() == context) {
            return Ok(staging);
        }
        // SAFETY: bytes of any value are valid, and those that are copied have been written. Plain pinned memory, not
        // write-combined: several threads fill it in pieces.
        let buffer = || unsafe { context.alloc_pinned_with_flags::<u8>(upload::CHUNK, 0) }.w();
        Ok(Self { buffers: [buffer()?, buffer()?] })
    }
}
