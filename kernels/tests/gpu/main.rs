//! Our CUDA kernels on a GPU, each against the plain formula in f32 on the processor.
//!
//! They are ignored where tests are run as usual, because a machine without a GPU can say nothing about them:
//! `cargo test --release -p ingle-kernels --features cuda --test gpu -- --ignored` runs them, and fails without a GPU.
//! Inputs differ from run to run; `INGLE_SEED` repeats those of one.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod attention;
mod elementwise;

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const CPU: Device = Device::Cpu;
pub(crate) const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// The first GPU, as the server uses it: one stream, no events between streams.
#[allow(unsafe_code)]
pub(crate) fn gpu() -> Device {
    let device = Device::new_cuda_with_stream(0).expect("these tests need an NVIDIA GPU");
    // SAFETY: a test uses one stream only.
    unsafe { device.as_cuda_device().expect("a GPU").disable_event_tracking() };
    device
}

pub(crate) fn rng() -> ChaCha8Rng {
    let given = std::env::var("INGLE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| rand::rng().random());
    println!("INGLE_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Random numbers that `dtype` holds exactly, as f32 on the processor.
pub(crate) fn random(rng: &mut ChaCha8Rng, shape: &[usize], dtype: DType) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.5..1.5)).collect();
    let exact = Tensor::from_vec(values, shape, &CPU).unwrap().to_dtype(dtype).unwrap();
    exact.to_dtype(DType::F32).unwrap()
}

pub(crate) fn upload(x: &Tensor, dtype: DType, device: &Device) -> Tensor {
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

pub(crate) fn values(x: &Tensor) -> Vec<f32> {
    let x = x.to_dtype(DType::F32).unwrap().to_device(&CPU).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Step between 1 and the next number.
pub(crate) fn epsilon(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 1.0 / 128.0,
        DType::F16 => 1.0 / 1024.0,
        _ => f32::EPSILON,
    }
}

/// Fails unless all numbers agree within `steps` of `dtype`, relative to the larger of the number and `unit`.
pub(crate) fn assert_close(
    found: &Tensor,
    wanted: &Tensor,
    dtype: DType,
    (steps, unit): (f32, f32),
    what: &str,
) {
    assert_eq!(found.dims(), wanted.dims(), "{what}");
    for (i, (found, wanted)) in values(found).into_iter().zip(values(wanted)).enumerate() {
        let allowed = steps * epsilon(dtype) * wanted.abs().max(unit) + 1e-6;
        assert!((found - wanted).abs() <= allowed, "{what}: number {i} is {found}, wanted {wanted}");
    }
}
