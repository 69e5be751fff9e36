//! The CPU kernels against plain formulas.
//!
//! The instruction set is chosen once a process; `every_instruction_set` runs this binary again for each lower one.

#![allow(clippy::unwrap_used, missing_docs)]

mod encoders;
mod quantized;
mod reference_twins;
mod rounded_attention;

use candle_core::{Device, Tensor};
use ingle_kernels::{Isa, isa};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CPU: Device = Device::Cpu;

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, as a share of the largest value.
fn error(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let (found, wanted) = (values(found), values(wanted));
    let scale = wanted.iter().fold(1e-3_f32, |max, x| max.max(x.abs()));
    let worst =
        found.iter().zip(&wanted).map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() });
    worst.fold(0.0, f32::max) / scale
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_instruction_set_asked_for_is_used() {
    if let Ok(wanted) = std::env::var("INGLE_ISA") {
        assert_eq!(isa().name(), wanted, "this processor has {:?}", Isa::available());
    }
}

/// Runs all other tests once for every lower instruction set that this processor has.
#[test]
fn every_instruction_set() {
    if std::env::var_os("INGLE_ISA").is_some() {
        return;
    }
    assert_eq!(isa(), Isa::available()[0]);
    for lower in &Isa::available()[1..] {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .env("INGLE_ISA", lower.name())
            .args(["--quiet", "--skip", "every_instruction_set"])
            .status()
            .unwrap();
        assert!(status.success(), "the kernels fail on {}", lower.name());
    }
}
