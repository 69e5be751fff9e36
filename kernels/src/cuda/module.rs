//! Functions of the embedded modules, each looked up once a device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
    sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{DeviceId, WrapErr};

use super::attention::AttentionArgs;
use super::elementwise::RotateStoreArgs;
use super::encoder::LayerNormArgs;
use crate::error::{Result, argument};
use crate::tiles::LinearArgs;

/// A source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum File {
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Encoder,
    LinearBf16,
    LinearF16,
    LinearFp8,
    Sampling,
    Unpack,
}

impl File {
    fn binary(self) -> &'static [u8] {
        match self {
            Self::AttentionDecode => include_bytes!(concat!(env!("OUT_DIR"), "/attention_decode.fatbin")),
            Self::AttentionPrefill => include_bytes!(concat!(env!("OUT_DIR"), "/attention_prefill.fatbin")),
            Self::Elementwise => include_bytes!(concat!(env!("OUT_DIR"), "/elementwise.fatbin")),
            Self::Encoder => include_bytes!(concat!(env!("OUT_DIR"), "/encoder.fatbin")),
            Self::LinearBf16 => include_bytes!(concat!(env!("OUT_DIR"), "/linear_bf16.fatbin")),
            Self::LinearF16 => include_bytes!(concat!(env!("OUT_DIR"), "/linear_f16.fatbin")),
            Self::LinearFp8 => include_bytes!(concat!(env!("OUT_DIR"), "/linear_fp8.fatbin")),
            Self::Sampling => include_bytes!(concat!(env!("OUT_DIR"), "/sampling.fatbin")),
            Self::Unpack => include_bytes!(concat!(env!("OUT_DIR"), "/unpack.fatbin")),
        }
    }
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<(DeviceId, File), Arc<CudaModule>>,
    functions: HashMap<DeviceId, HashMap<String, CudaFunction>>,
    multiprocessors: HashMap<DeviceId, usize>,
    capabilities: HashMap<DeviceId, (i32, i32)>,
}

thread_local! {
    static LOADED: RefCell<Loaded> = RefCell::default();
}

/// Kernel `name` of `file`.
pub(super) fn function(device: &CudaDevice, file: File, name: &str) -> Result<CudaFunction> {
    LOADED.with_borrow_mut(|loaded| {
        if let Some(function) = loaded.functions.get(&device.id()).and_then(|names| names.get(name)) {
            return Ok(function.clone());
        }
        let module = match loaded.modules.get(&(device.id(), file)) {
            Some(module) => module.clone(),
            None => {
                let binary = Ptx::from_binary(file.binary().to_vec());
                let module = device.cuda_stream().context().load_module(binary).w()?;
                loaded.modules.insert((device.id(), file), module.clone());
                module
            }
        };
        let function = module.load_function(name).w()?;
        if file == File::AttentionPrefill {
            // Tiles take more than the 48 KiB a block gets unasked; no device served here has less than this.
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, super::attention::MAX_SHARED_BYTES).w()?;
        }
        loaded.functions.entry(device.id()).or_default().insert(name.to_owned(), function.clone());
        Ok(function)
    })
}

/// Multiprocessors of the device.
pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    LOADED.with_borrow_mut(|loaded| {
        if let Some(count) = loaded.multiprocessors.get(&device.id()) {
            return Ok(*count);
        }
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = device.cuda_stream().context().attribute(attribute).w()?;
        let count =
            usize::try_from(count).map_err(|_| argument("cuda", "a device without multiprocessors"))?;
        loaded.multiprocessors.insert(device.id(), count);
        Ok(count)
    })
}

/// The device's generation: 8.9 is an L4, 9.0 an H100 or H200.
pub(super) fn capability(device: &CudaDevice) -> Result<(i32, i32)> {
    LOADED.with_borrow_mut(|loaded| {
        if let Some(capability) = loaded.capabilities.get(&device.id()) {
            return Ok(*capability);
        }
        let capability = device.cuda_stream().context().compute_capability().w()?;
        loaded.capabilities.insert(device.id(), capability);
        Ok(capability)
    })
}

/// Whether the device's tensor cores multiply e4m3 numbers.
pub(super) fn computes_fp8(device: &CudaDevice) -> Result<bool> {
    Ok(capability(device)? >= (8, 9))
}

/// Launches kernel `name` with `arguments`, each of exactly the type that the kernel declares.
///
/// # Safety
/// The arguments must be the kernel's, addresses among them those of memory of `device` of the sizes it reads and
/// writes.
pub(super) unsafe fn launch(
    device: &CudaDevice,
    (file, name): (File, &str),
    (grid, block, shared_bytes): ([u32; 3], u32, u32),
    arguments: &[Argument],
) -> Result<()> {
    let function = function(device, file, name)?;
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for argument in arguments {
        match argument {
            Argument::Address(x) => builder.arg(x),
            Argument::U32(x) => builder.arg(x),
            Argument::F32(x) => builder.arg(x),
            Argument::Attention(x) => builder.arg(x),
            Argument::RotateStore(x) => builder.arg(x),
            Argument::LayerNorm(x) => builder.arg(x),
            Argument::Linear(x) => builder.arg(x),
        };
    }
    let config = LaunchConfig {
        grid_dim: (grid[0], grid[1], grid[2]),
        block_dim: (block, 1, 1),
        shared_mem_bytes: shared_bytes,
    };
    // SAFETY: given by the caller.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// An argument of a kernel.
pub(super) enum Argument {
    Address(u64),
    U32(u32),
    F32(f32),
    Attention(AttentionArgs),
    RotateStore(RotateStoreArgs),
    LayerNorm(LayerNormArgs),
    Linear(LinearArgs),
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for AttentionArgs {}
// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for RotateStoreArgs {}
// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for LayerNormArgs {}
// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for LinearArgs {}

/// Where `slice` begins.
pub(super) fn address<T>(device: &CudaDevice, slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(&device.cuda_stream()).0
}

/// As [`address`], to write to.
pub(super) fn address_mut<T>(device: &CudaDevice, slice: &mut CudaSlice<T>) -> u64 {
    slice.device_ptr_mut(&device.cuda_stream()).0
}
