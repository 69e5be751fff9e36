//! Sums and exchanges between the GPUs of one machine, by NCCL. All ranks must call the same operations in the same order,
//! each from one thread.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::cudarc::nccl::{result, sys};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Layout, Storage, Tensor};
use half::{bf16, f16};

use crate::error::{Error, Result, argument};

/// What the ranks of one group have in common.
#[derive(Debug, Clone, Copy)]
pub struct NcclId(sys::ncclUniqueId);

impl NcclId {
    /// The id of a new group.
    ///
    /// # Errors
    /// If NCCL cannot be used.
    pub fn new() -> Result<Self> {
        result::get_uniqueid().map(Self).map_err(|error| failed("NcclId::new", &error))
    }
}

fn failed(op: &'static str, error: &result::NcclError) -> Error {
    argument(op, format!("NCCL says {:?}", error.0))
}

/// NCCL's handle; `None` once it has been given back.
#[derive(Debug)]
struct Handle(Mutex<Option<sys::ncclComm_t>>);

// SAFETY: NCCL allows a communicator to be used by any thread, by one at a time; the lock sees to that.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    fn abort(&self) {
        let comm = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(comm) = comm {
            // SAFETY: a communicator that was made and, being taken, is given back once. Nothing is left to do if it fails.
            let _ = unsafe { result::comm_abort(comm) };
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Ends a rank's exchange from any thread: what it waits for on its GPU ends, and later calls are errors.
#[derive(Debug, Clone)]
pub struct NcclAbort(Arc<Handle>);

impl NcclAbort {
    /// Ends it.
    pub fn abort(&self) {
        self.0.abort();
    }
}

/// One rank of a group of GPUs.
#[derive(Debug)]
pub struct NcclRank {
    handle: Arc<Handle>,
    device: CudaDevice,
    world_size: usize,
}

impl NcclRank {
    /// Joins the group `id` as `rank` of `world_size`; returns when all have joined.
    ///
    /// # Errors
    /// If `device` is no CUDA device, or NCCL refuses.
    pub fn join(id: NcclId, rank: usize, world_size: usize, device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(argument("NcclRank::join", "the device is not CUDA"));
        };
        let (Ok(rank), Ok(ranks)) = (i32::try_from(rank), i32::try_from(world_size)) else {
            return Err(argument("NcclRank::join", format!("rank {rank} of {world_size}")));
        };
        let bound = device.cuda_stream().context().bind_to_thread();
        bound.map_err(|error| argument("NcclRank::join", error.to_string()))?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: `comm` is a place for the handle, and this thread's context is the device's.
        unsafe { result::comm_init_rank(&raw mut comm, ranks, id.0, rank) }
            .map_err(|error| failed("NcclRank::join", &error))?;
        Ok(Self { handle: Arc::new(Handle(Mutex::new(Some(comm)))), device: device.clone(), world_size })
    }

    /// What ends the exchange from elsewhere.
    #[must_use]
    pub fn abort_handle(&self) -> NcclAbort {
        NcclAbort(self.handle.clone())
    }

    /// Whether the exchange has been ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.handle.0.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// The sum over all ranks of `x` (f32, bf16 or f16, of the same shape on all).
    ///
    /// # Errors
    /// If `x` is not on this rank's GPU, or NCCL fails.
    pub fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        let storage = self.exchange(x, false)?;
        Ok(Tensor::from_storage(storage, x.shape().clone(), BackpropOp::none(), false))
    }

    /// `x` of all ranks (of the same type and shape), in their order.
    ///
    /// # Errors
    /// As [`NcclRank::all_reduce_sum`].
    pub fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let storage = self.exchange(x, true)?;
        let shape: Vec<usize> = std::iter::once(self.world_size).chain(x.dims().iter().copied()).collect();
        let all = Tensor::from_storage(storage, shape, BackpropOp::none(), false);
        (0..self.world_size).map(|rank| Ok(all.get(rank)?)).collect()
    }

    fn exchange(&self, x: &Tensor, gather: bool) -> Result<Storage> {
        let x = x.contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(argument("NcclRank", "the tensor is not in a GPU's memory"));
        };
        Ok(Storage::Cuda(match x.dtype() {
            DType::F32 => self.enqueue::<f32>(storage, layout, sys::ncclDataType_t::ncclFloat32, gather)?,
            DType::BF16 => {
                self.enqueue::<bf16>(storage, layout, sys::ncclDataType_t::ncclBfloat16, gather)?
            }
            DType::F16 => self.enqueue::<f16>(storage, layout, sys::ncclDataType_t::ncclFloat16, gather)?,
            other => return Err(argument("NcclRank", format!("{other:?} is not exchanged"))),
        }))
    }

    /// Puts the exchange into the device's stream.
    fn enqueue<T: CudaDType + DeviceRepr>(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
        dtype: sys::ncclDataType_t,
        gather: bool,
    ) -> Result<CudaStorage> {
        let not_contiguous = || argument("NcclRank", "the tensor is not contiguous");
        let (begin, end) = layout.contiguous_offsets().ok_or_else(not_contiguous)?;
        let source = storage.as_cuda_slice::<T>()?.slice(begin..end);
        let count = end - begin;
        let stream = self.device.cuda_stream();
        let results = if gather { count * self.world_size } else { count };
        // SAFETY: every element is written by the exchange before anything later in the stream reads it.
        let mut target = unsafe { self.device.alloc::<T>(results)? };
        {
            let (from, _reading) = source.device_ptr(&stream);
            let (to, _writing) = target.device_ptr_mut(&stream);
            let (from, to) = (from as *const c_void, to as *mut c_void);
            let comm = self.handle.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The name of the call that ended it: `Fault` knows it.
            let ended = || argument("NcclRank", "ncclCommAbort has ended the exchange between the GPUs");
            let comm = comm.ok_or_else(ended)?;
            let stream = stream.cu_stream() as sys::cudaStream_t;
            // SAFETY: both buffers are on this rank's device and hold that many elements; the communicator is alive, which the
            // lock keeps so until the call returns.
            let status = unsafe {
                if gather {
                    result::all_gather(from, to, count, dtype, comm, stream)
                } else {
                    result::all_reduce(from, to, count, dtype, sys::ncclRedOp_t::ncclSum, comm, stream)
                }
            };
            status.map_err(|error| failed("NcclRank", &error))?;
        }
        Ok(CudaStorage::wrap_cuda_slice(target, self.device.clone()))
    }
}
