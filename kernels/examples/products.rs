//! Speed of products by weights, and of sampling, on a GPU: what `benches/NOTES.md` predicts.
//!
//! `cargo run --release -p ingle-kernels --features cuda --example products`
//!
//! For the matrices of an 8-billion-parameter Llama, each format and several numbers of tokens: microseconds a product, and
//! bytes of weights a second. A matrix has as many copies as exceed the caches of the chip, read in turn.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use ingle_kernels::{BlockType, Fp8Matrix, QuantizedBlocks, SampleRow, Weight, ops};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

const MATRICES: [(&str, usize, usize); 5] = [
    ("q, k, v", 6144, 4096),
    ("o", 4096, 4096),
    ("gate, up", 28672, 4096),
    ("down", 4096, 14336),
    ("head", 128_256, 4096),
];
const TOKENS: [usize; 8] = [1, 4, 8, 16, 17, 64, 128, 512];
/// More than the second-level cache of any chip holds.
const CACHES: usize = 400 << 20;

#[derive(Clone, Copy)]
enum Format {
    Bf16,
    Fp8,
    Blocks(BlockType),
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Blocks(block_type) => block_type.name(),
        }
    }

    fn make(self, rng: &mut ChaCha8Rng, rows: usize, cols: usize, device: &Device) -> Result<Weight> {
        let weight = match self {
            Self::Bf16 => {
                let matrix = Tensor::randn(0.0_f32, 0.02, (rows, cols), device)?.to_dtype(DType::BF16)?;
                Weight::stack(&[matrix], DType::BF16, device)
            }
            Self::Fp8 => {
                let mut bytes = vec![0; rows * cols];
                rng.fill_bytes(&mut bytes);
                // No NaN.
                bytes.iter_mut().for_each(|byte| *byte &= 0xbf);
                Weight::from_fp8(
                    &[Fp8Matrix { bytes, rows, cols, row_scales: vec![0.01; rows], factors: Vec::new() }],
                    device,
                )
            }
            Self::Blocks(block_type) => {
                let mut bytes = vec![0; rows * cols / BlockType::BLOCK_SIZE * block_type.block_bytes()];
                rng.fill_bytes(&mut bytes);
                for block in bytes.chunks_exact_mut(block_type.block_bytes()) {
                    block[..2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
                    if block_type == BlockType::Q4_1 {
                        block[2..4].copy_from_slice(&half::f16::from_f32(-0.08).to_le_bytes());
                    }
                }
                Weight::from_blocks(&[QuantizedBlocks { block_type, rows, cols, bytes }], device)
            }
        };
        weight.map_err(candle_core::Error::wrap)
    }
}

/// Seconds of one call of `work`, which hears the number of the call; the best of five series.
fn seconds(device: &Device, mut work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let (calls, mut best) = (20, f64::INFINITY);
    for series in 0..6 {
        device.synchronize()?;
        let start = Instant::now();
        for call in 0..calls {
            work(series * calls + call)?;
        }
        device.synchronize()?;
        // The first series loads kernels and fills pools.
        if series > 0 {
            best = best.min(start.elapsed().as_secs_f64() / calls as f64);
        }
    }
    Ok(best)
}

fn products(device: &Device, rng: &mut ChaCha8Rng) -> Result<()> {
    let blocks = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1].map(Format::Blocks);
    for format in [Format::Bf16, Format::Fp8].into_iter().chain(blocks) {
        for (name, rows, cols) in MATRICES {
            let first = format.make(rng, rows, cols, device)?;
            let bytes = first.num_bytes();
            let copies = (CACHES / bytes).clamp(1, 16);
            let mut weights = vec![first];
            for _ in 1..copies {
                weights.push(format.make(rng, rows, cols, device)?);
            }
            for tokens in TOKENS {
                let x = Tensor::randn(0.0_f32, 1.0, (tokens, cols), device)?.to_dtype(DType::BF16)?;
                let time = seconds(device, |call| {
                    let y = ops::linear(&x, &weights[call % weights.len()], None);
                    y.map(drop).map_err(candle_core::Error::wrap)
                })?;
                let flops = 2.0 * (tokens * rows * cols) as f64 / time;
                println!(
                    "{:<5} {name:<9} {tokens:>4} tokens  {:>8.1} us  {:>6.2} TB/s of weights  {:>7.1} TFLOP/s",
                    format.name(),
                    time * 1e6,
                    bytes as f64 / time / 1e12,
                    flops / 1e12,
                );
            }
        }
    }
    Ok(())
}

fn sampling(device: &Device, rng: &mut ChaCha8Rng) -> Result<()> {
    let drawn = SampleRow { temperature: Some(0.8), ..SampleRow::default() };
    let kinds = [
        ("greedy", SampleRow::default()),
        ("all tokens", drawn),
        ("top_p 0.95", SampleRow { top_p: 0.95, ..drawn }),
        ("top_k 50", SampleRow { top_k: 50, ..drawn }),
    ];
    for rows in [1, 8, 64] {
        let logits = (Tensor::randn(0.0_f32, 3.0, (rows, 128_256), device)?).to_dtype(DType::BF16)?;
        for (name, row) in kinds {
            let params: Vec<_> = (0..rows).map(|_| SampleRow { uniform: rng.random(), ..row }).collect();
            let time = seconds(device, |_| {
                ops::sample(&logits, &params).map(drop).map_err(candle_core::Error::wrap)
            })?;
            println!("sample {rows:>3} rows of 128256, {name:<11} {:>8.1} us", time * 1e6);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    sampling(&device, &mut rng)?;
    products(&device, &mut rng)
}
