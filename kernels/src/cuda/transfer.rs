//! Copies between host and device that nobody waits for.
//!
//! A copy from or to ordinary memory makes the caller wait for all that the stream was given before; one from or to pinned
//! memory is work on the stream like any other. So numbers pass through pinned buffers, each of which is used again when
//! its latest copy is done, which an event on the stream says.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, CudaViewMut, PinnedHostSlice};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Storage, Tensor};

use crate::error::Result;

/// Buffers kept for later, at most.
const MOST_KEPT: usize = 64;
/// Numbers of the smallest buffer.
const LEAST_LEN: usize = 1024;

thread_local! {
    /// Buffers of the calling thread, which is the only one that makes calls to the device; the latest used come last.
    static KEPT: RefCell<HashMap<DeviceId, Vec<Buffer>>> = RefCell::default();
}

/// Pinned memory and the end of its latest copy.
#[derive(Debug)]
struct Buffer {
    memory: PinnedHostSlice<u32>,
    copied: CudaEvent,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The device must not read or write memory that is gone. If it is lost it does neither.
        let _ = self.copied.synchronize();
    }
}

impl Buffer {
    /// One of at least `len` numbers that no copy uses.
    fn take(device: &CudaDevice, len: usize) -> Result<Self> {
        let kept = KEPT.with_borrow_mut(|kept| -> Result<Option<Self>> {
            let Some(buffers) = kept.get_mut(&device.id()) else { return Ok(None) };
            for at in 0..buffers.len() {
                if buffers[at].memory.len() >= len && buffers[at].copied.try_is_complete().w()? {
                    return Ok(Some(buffers.remove(at)));
                }
            }
            Ok(None)
        })?;
        if let Some(buffer) = kept {
            return Ok(buffer);
        }
        let stream = device.cuda_stream();
        let len = len.next_power_of_two().max(LEAST_LEN);
        // SAFETY: any bytes are numbers, and those that are copied have been written. Plain pinned memory, not
        // write-combined: it is also read.
        let memory = unsafe { stream.context().alloc_pinned_with_flags::<u32>(len, 0) }.w()?;
        Ok(Self { memory, copied: stream.context().new_event(None).w()? })
    }

    /// Keeps it for a later copy; its latest may be under way.
    fn keep(self, device: &CudaDevice) {
        let evicted = KEPT.with_borrow_mut(|kept| {
            let buffers = kept.entry(device.id()).or_default();
            buffers.push(self);
            (buffers.len() > MOST_KEPT).then(|| buffers.remove(0))
        });
        drop(evicted);
    }
}

/// Begins to copy `numbers` to `to`, which has room for as many.
pub(super) fn write(device: &CudaDevice, numbers: &[u32], to: &mut CudaViewMut<'_, u32>) -> Result<()> {
    let stream = device.cuda_stream();
    let mut buffer = Buffer::take(device, numbers.len())?;
    let from = &mut buffer.memory.as_mut_slice().w()?[..numbers.len()];
    from.copy_from_slice(numbers);
    stream.memcpy_htod(&*from, to).w()?;
    buffer.copied.record(&stream).w()?;
    buffer.keep(device);
    Ok(())
}

/// Begins to copy `numbers` to new memory of the device.
pub(super) fn upload(device: &CudaDevice, numbers: &[u32]) -> Result<CudaSlice<u32>> {
    // SAFETY: all of it is written before anything that is launched later reads it. At least one, as there is no empty memory.
    let mut slice = unsafe { device.alloc::<u32>(numbers.len().max(1))? };
    if !numbers.is_empty() {
        write(device, numbers, &mut slice.slice_mut(0..numbers.len()))?;
    }
    Ok(slice)
}

/// As [`upload`], as a tensor.
pub(crate) fn tensor(numbers: &[u32], device: &CudaDevice) -> Result<Tensor> {
    Ok(wrap(upload(device, numbers)?, numbers.len(), device))
}

/// The first `len` numbers of `slice`.
pub(super) fn wrap(slice: CudaSlice<u32>, len: usize, device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, len, BackpropOp::none(), false)
}

/// Numbers on their way from the device.
#[derive(Debug)]
pub(crate) struct Download {
    device: CudaDevice,
    /// `None` once it has been given back.
    buffer: Option<Buffer>,
    len: usize,
}

impl Download {
    /// Begins to copy all of `from`.
    pub(super) fn begin(device: &CudaDevice, from: &CudaSlice<u32>, len: usize) -> Result<Self> {
        let stream = device.cuda_stream();
        let mut buffer = Buffer::take(device, len)?;
        let to = &mut buffer.memory.as_mut_slice().w()?[..len];
        let copied = stream.memcpy_dtoh(&from.slice(0..len), to).w();
        // Recorded also after an error: whatever was begun must end before the memory is used again.
        buffer.copied.record(&stream).w()?;
        copied?;
        Ok(Self { device: device.clone(), buffer: Some(buffer), len })
    }

    /// Waits for the numbers, and for nothing that was given to the device after them.
    pub(crate) fn wait(&self) -> Result<Vec<u32>> {
        let Some(buffer) = &self.buffer else { return Ok(Vec::new()) };
        buffer.copied.synchronize().w()?;
        Ok(buffer.memory.as_slice().w()?[..self.len].to_vec())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            buffer.keep(&self.device);
        }
    }
}
