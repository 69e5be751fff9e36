//! GPUs as places to compute: which there are, opening one, its memory, and what its errors mean.
//!
//! [`nvidia`] asks the driver without being linked to it, so that a build without CUDA can say what it is missing. All
//! else works on a candle device and does nothing on the CPU.

#[cfg(feature = "cuda")]
mod cuda;
mod fault;
mod nvidia;
mod upload;

#[cfg(feature = "cuda")]
use candle_core::{DType, Tensor};
use candle_core::{Device, DeviceLocation};

use crate::error::Result;
pub use fault::Fault;
pub use nvidia::{Driver, Gpu, NoGpu, nvidia};
pub use upload::{ReadAt, read_tensor};

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not in use by anybody.
    pub free: u64,
    /// All there is.
    pub total: u64,
}

/// Opens the NVIDIA GPU number `ordinal`, in the driver's order.
///
/// # Errors
/// If this build has no CUDA, or the driver gives no such GPU.
pub fn open_cuda(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return cuda::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    Ok(Device::new_cuda(ordinal)?)
}

/// Opens the Apple GPU.
///
/// # Errors
/// If this build has no Metal, or there is no such GPU.
pub fn open_metal() -> Result<Device> {
    Ok(Device::new_metal(0)?)
}

/// Name of `device` for people.
#[must_use]
pub fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Metal { .. } => "metal".to_owned(),
        DeviceLocation::Cuda { gpu_id } => {
            let gpu = nvidia().ok().and_then(|driver| driver.gpus.get(gpu_id).map(ToString::to_string));
            format!("cuda:{gpu_id} ({})", gpu.as_deref().unwrap_or("its driver does not say what"))
        }
    }
}

/// Memory of `device`; `None` where nobody tells (on the CPU, ask the system).
///
/// # Errors
/// If the driver does not answer.
pub fn device_memory(device: &Device) -> Result<Option<DeviceMemory>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::memory(device).map(Some),
        _ => Ok(None),
    }
}

/// Waits for all that `device` has been given to do, and returns freed memory that was kept for later to the driver.
///
/// # Errors
/// If work given before has failed: this is where such an error comes to light.
pub fn release_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::release(device),
        _ => Ok(()),
    }
}

/// What a device can do at most, measured now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceLimits {
    /// Bytes a second that a copy within its memory moves, those read and those written together.
    pub copy_bytes_per_second: f64,
    /// Operations a second of a large product of bf16 matrices.
    pub matrix_ops_per_second: f64,
}

/// Measures `device`; `None` for the CPU, which `probe` measures.
///
/// # Errors
/// If it has too little memory left, or fails.
pub fn device_limits(device: &Device) -> Result<Option<DeviceLimits>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let copy_bytes_per_second = cuda::copy_rate(cuda)?;
            Ok(Some(DeviceLimits { copy_bytes_per_second, matrix_ops_per_second: matrix_rate(device)? }))
        }
        _ => Ok(None),
    }
}

/// Of the vendor's own product, which is what others are held against.
#[cfg(feature = "cuda")]
fn matrix_rate(device: &Device) -> Result<f64> {
    const SIZE: usize = 8192;
    const PRODUCTS: u32 = 8;
    // Numbers as they occur: a processor that multiplies zeros needs less power and runs faster.
    let matrix = |seed: usize| -> Result<Tensor> {
        let row: Vec<f32> = (0..SIZE).map(|i| ((i * 7919 + seed) % 1009) as f32 / 1009.0 - 0.5).collect();
        let row = Tensor::from_vec(row, (1, SIZE), device)?.to_dtype(DType::BF16)?;
        Ok(row.broadcast_as((SIZE, SIZE))?.contiguous()?)
    };
    let (a, b) = (matrix(1)?, matrix(2)?);
    let seconds = fastest(4, || {
        for _ in 0..PRODUCTS {
            a.matmul(&b)?;
        }
        synchronize(device)
    })?;
    Ok(2.0 * (SIZE as f64).powi(3) * f64::from(PRODUCTS) / seconds)
}

/// Seconds of the fastest of `times` runs, after one that does not count.
#[cfg(feature = "cuda")]
fn fastest(times: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let begin = std::time::Instant::now();
        run()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Waits for all that `device` has been given to do.
///
/// # Errors
/// If some of it has failed.
pub fn synchronize(device: &Device) -> Result<()> {
    Ok(device.synchronize()?)
}
