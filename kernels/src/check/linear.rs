//! Matrix products and rows of matrices, in every format of weights.

use candle_core::{DType, Device, Tensor};

use super::{Checker, Pair, Random, largest, put, tolerance};
use crate::cpu::isa;
use crate::error::{Result, argument};
use crate::fp8::Fp8Matrix;
use crate::ops::{self, Activation, LateIds};
use crate::tiles::panel_rows;
use crate::weight::{BlockType, Quantization, QuantizedBlocks, Weight};

/// Rows and columns of a matrix; columns of whole blocks, and others.
const SHAPES: [(usize, usize); 5] = [(48, 64), (257, 96), (96, 1024), (1000, 160), (2048, 512)];
const ODD: (usize, usize) = (33, 70);
/// Rows of activations: decoding alone and together, and prompts.
const TOKENS: [usize; 9] = [1, 2, 3, 8, 9, 17, 64, 200, 300];

pub(super) fn check(checker: &mut Checker<'_>) {
    if checker.device.is_cuda() {
        // Before shapes that a library may refuse.
        checker.run("large products are cuBLASLt's".into(), Format::Fp8.allowed(), large);
        for format in [Format::Fp8, Format::Fp8Grouped] {
            let name = format!("large products by {} in panels", format.name());
            checker
                .run(name, format.allowed(), |random, device, check| panels(&format, random, device, check));
        }
    }
    for &dtype in checker.dtypes() {
        let stored: &[DType] =
            if checker.device.is_cpu() { &[DType::F32, DType::BF16, DType::F16] } else { &[dtype] };
        for &stored in stored {
            let name = format!("linear {} by {}", dtype.as_str(), stored.as_str());
            let allowed = tolerance(dtype).max(if checker.device.is_cpu() { rounding(stored) } else { 0.0 });
            checker.run(name, allowed, |random, device, check| {
                for (rows, cols) in SHAPES.into_iter().chain([ODD]) {
                    let matrix = random.tensor(&[rows, cols], stored)?;
                    let weight = Weight::new(matrix.clone(), stored, device)?;
                    products((&weight, &matrix), dtype, random, device, check)?;
                }
                Ok(())
            });
        }
        for format in formats(&checker.device) {
            let name = format!("linear {} by {}", dtype.as_str(), format.name());
            // Kernels may round activations to bytes or to fp8 while they multiply.
            let allowed = tolerance(dtype).max(format.allowed());
            checker.run(name, allowed, |random, device, check| {
                for (rows, cols) in SHAPES {
                    let (weight, matrix) = format.make(rows, cols, random, device)?;
                    products((&weight, &matrix), dtype, random, device, check)?;
                }
                Ok(())
            });
            if dtype == DType::F32 && !checker.device.is_cpu() {
                continue;
            }
            let name = format!("linear {} by {}, alone and together", dtype.as_str(), format.name());
            checker.run(name, 0.0, |random, device, check| company(&format, dtype, random, device, check));
        }
    }
}

/// What the instruction set in use may lose by rounding beside `stored` weights: the activations to bf16, or sums of some
/// products to f16.
fn rounding(stored: DType) -> f32 {
    match (isa().name(), stored) {
        ("amx" | "avx512-bf16", DType::BF16) => 1.2e-2,
        ("avx512-fp16", DType::BF16 | DType::F16) => 6e-3,
        _ => 0.0,
    }
}

/// A token's result has the same bits alone and among others, when that is asked for.
fn company(
    format: &Format,
    dtype: DType,
    random: &mut Random,
    device: &Device,
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    let before = crate::is_deterministic();
    crate::set_deterministic(true);
    let outcome = (|| {
        let (weight, matrix) = format.make(256, 1024, random, device)?;
        let x = put(&random.tensor(&[300, matrix.dim(1)?], dtype)?, dtype, device)?;
        let together = ops::linear(&x, &weight, None)?;
        for (first, count) in [(0, 1), (3, 2), (10, 17), (6, 64), (20, 270)] {
            let found = ops::linear(&x.narrow(0, first, count)?, &weight, None)?;
            let wanted = together.narrow(0, first, count)?;
            check(Pair { found, wanted, scale: None, case: format!("{count} of 300 tokens") })?;
        }
        Ok(())
    })();
    crate::set_deterministic(before);
    outcome
}

/// Products that cuBLASLt is to do: what it refuses is done all the same, but slower than is meant.
fn large(random: &mut Random, device: &Device, check: &mut dyn FnMut(Pair) -> Result<()>) -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let (rows, cols, tokens) = (512, 768, 320);
        let dense = random.tensor(&[rows, cols], dtype)?;
        for (weight, matrix) in [
            (Weight::new(dense.clone(), dtype, device)?, dense),
            Format::Fp8.make(rows, cols, random, device)?,
        ] {
            let (x, bias) = (random.tensor(&[tokens, cols], dtype)?, random.tensor(&[rows], dtype)?);
            let (x_there, bias_there) = (put(&x, dtype, device)?, put(&bias, dtype, device)?);
            for bias_there in [None, Some(&bias_there)] {
                let found = ops::linear(&x_there, &weight, bias_there)?;
                let product = x.matmul(&matrix.t()?)?;
                let wanted = if bias_there.is_some() { product.broadcast_add(&bias)? } else { product };
                check(Pair { found, wanted, scale: None, case: format!("{tokens} by {rows} x {cols}") })?;
            }
        }
    }
    match ops::refused_by_library(device).first() {
        Some(refused) => Err(argument("cuBLASLt", refused.as_str())),
        None => Ok(()),
    }
}

/// A matrix of two panels: its first and last rows, and those where one ends and the other begins.
fn panels(
    format: &Format,
    random: &mut Random,
    device: &Device,
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    let (cols, tokens, some) = (2048, 260, 32);
    let first_panel = panel_rows(usize::MAX, cols);
    let rows = first_panel + 240;
    let mut matrix = Fp8Matrix {
        bytes: (0..rows * cols / 8).flat_map(|_| random.next().to_le_bytes()).collect(),
        rows,
        cols,
        row_scales: (0..rows).map(|_| (random.below(100) as f32 + 1.0) * 1e-4).collect(),
        factors: Vec::new(),
    };
    // None is NaN.
    matrix.bytes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code ^= 1);
    if matches!(format, Format::Fp8Grouped) {
        matrix.factors = factors(&matrix, random);
    }
    let groups = matrix.groups();
    let dtype = DType::BF16;
    let (x, bias) = (random.tensor(&[tokens, cols], dtype)?, random.tensor(&[rows], dtype)?);
    let weight = Weight::from_fp8(std::slice::from_ref(&matrix), device)?;
    let found = ops::linear(&put(&x, dtype, device)?, &weight, Some(&put(&bias, dtype, device)?))?;
    for first in [0, first_panel - some / 2, rows - some] {
        let part = Fp8Matrix {
            bytes: matrix.bytes[first * cols..][..some * cols].to_vec(),
            rows: some,
            row_scales: matrix.row_scales[first..][..some].to_vec(),
            factors: matrix.factors.get(first * groups..(first + some) * groups).unwrap_or_default().to_vec(),
            cols,
        };
        let wanted = x.matmul(&part.to_tensor()?.t()?)?.broadcast_add(&bias.narrow(0, first, some)?)?;
        let found = found.narrow(1, first, some)?;
        check(Pair { found, wanted, scale: None, case: format!("rows from {first} of {rows} x {cols}") })?;
    }
    Ok(())
}

/// One for each group of columns.
fn factors(matrix: &Fp8Matrix, random: &mut Random) -> Vec<half::f16> {
    let mut factor = || half::f16::from_f32((random.below(100) as f32 + 1.0) / 100.0);
    (0..matrix.rows * matrix.groups()).map(|_| factor()).collect()
}

/// Products with a few numbers of rows, with a bias and without, and some rows of the matrix itself.
fn products(
    (weight, matrix): (&Weight, &Tensor),
    dtype: DType,
    random: &mut Random,
    device: &Device,
    check: &mut dyn FnMut(Pair) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = matrix.dims2()?;
    for tokens in TOKENS {
        let (x, bias) = (random.tensor(&[tokens, cols], dtype)?, random.tensor(&[rows], dtype)?);
        let with_bias = random.below(2) == 0;
        let on_device = with_bias.then(|| put(&bias, dtype, device)).transpose()?;
        let found = ops::linear(&put(&x, dtype, device)?, weight, on_device.as_ref())?;
        let product = x.matmul(&matrix.t()?)?;
        let wanted = if with_bias { product.broadcast_add(&bias)? } else { product };
        check(Pair { found, wanted, scale: None, case: format!("{tokens} by {rows} x {cols}") })?;
    }
    for tokens in [1, 9, 40, 300] {
        if rows.is_multiple_of(2) {
            let (x, bias) = (random.tensor(&[tokens, cols], dtype)?, random.tensor(&[rows], dtype)?);
            let with_bias = random.below(2) == 0;
            let on_device = with_bias.then(|| put(&bias, dtype, device)).transpose()?;
            let x_there = put(&x, dtype, device)?;
            let found = ops::gated_linear(&x_there, weight, on_device.as_ref(), Activation::Silu)?;
            let product = x.matmul(&matrix.t()?)?;
            let product = if with_bias { product.broadcast_add(&bias)? } else { product };
            let (gate, up) = (product.narrow(1, 0, rows / 2)?, product.narrow(1, rows / 2, rows / 2)?);
            // Both factors are rounded, so an output may be off by a share of the largest factors, however small it is.
            let scale = Some(largest(&gate)? * largest(&up)?);
            let wanted = (gate.silu()? * up)?;
            check(Pair { found, wanted, scale, case: format!("{tokens} by {rows} x {cols}, gated") })?;
        }
    }
    let ids: Vec<u32> = (0..5).map(|_| random.below(rows) as u32).chain([rows as u32 - 1]).collect();
    let found = ops::embedding(&ids, weight, dtype)?;
    let wanted = matrix.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
    check(Pair { found, wanted, scale: None, case: format!("rows of {rows} x {cols}") })?;
    // As many again, of which some are taken from what is on the device; where nothing was chosen it is row 0.
    let chosen = [rows as u32 - 1, u32::MAX, random.below(rows) as u32];
    let late = LateIds { chosen: ops::upload_ids(&chosen, device)?, rows: vec![(4, 0), (0, 2), (3, 1)] };
    let found = ops::embedding_late(&ids, &late, weight, dtype)?;
    let ids = [chosen[2], ids[1], ids[2], 0, chosen[0], ids[5]];
    let wanted = matrix.index_select(&Tensor::new(&ids, &Device::Cpu)?, 0)?;
    check(Pair { found, wanted, scale: None, case: format!("late rows of {rows} x {cols}") })
}

/// A format of rounded weights.
enum Format {
    Rounded(Quantization),
    Blocks(BlockType),
    Fp8,
    /// With factors for groups of columns.
    Fp8Grouped,
}

fn formats(_: &Device) -> Vec<Format> {
    let rounded = [Quantization::Int8, Quantization::Int4].map(Format::Rounded);
    let blocks = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1].map(Format::Blocks);
    rounded.into_iter().chain(blocks).chain([Format::Fp8, Format::Fp8Grouped]).collect()
}

impl Format {
    fn name(&self) -> &'static str {
        match self {
            Self::Rounded(quantization) => quantization.name(),
            Self::Blocks(block_type) => block_type.name(),
            Self::Fp8 => "fp8",
            Self::Fp8Grouped => "grouped fp8",
        }
    }

    fn allowed(&self) -> f32 {
        match self {
            // Three bits of mantissa on both sides, and twice in a gated product.
            Self::Fp8 => 1e-1,
            Self::Rounded(_) | Self::Blocks(_) | Self::Fp8Grouped => 2e-2,
        }
    }

    /// A weight on the device, and the numbers that its codes stand for.
    fn make(
        &self,
        rows: usize,
        cols: usize,
        random: &mut Random,
        device: &Device,
    ) -> Result<(Weight, Tensor)> {
        let cpu = &Device::Cpu;
        let (here, there) = match self {
            Self::Rounded(quantization) => {
                let matrix = [random.tensor(&[rows, cols], DType::F32)?];
                (
                    Weight::quantized(&matrix, *quantization, cpu)?,
                    Weight::quantized(&matrix, *quantization, device)?,
                )
            }
            Self::Fp8 | Self::Fp8Grouped => {
                let mut matrix = Fp8Matrix::round(&random.tensor(&[rows, cols], DType::F32)?)?;
                if matches!(self, Self::Fp8Grouped) {
                    matrix.factors = factors(&matrix, random);
                }
                let parts = [matrix];
                (Weight::from_fp8(&parts, cpu)?, Weight::from_fp8(&parts, device)?)
            }
            Self::Blocks(block_type) => {
                let parts = [blocks(*block_type, rows, cols, random)];
                (Weight::from_blocks(&parts, cpu)?, Weight::from_blocks(&parts, device)?)
            }
        };
        let all: Vec<u32> = (0..rows as u32).collect();
        Ok((there, ops::embedding(&all, &here, DType::F32)?))
    }
}

/// Blocks of random codes, scales near one hundredth and, where the type has them, minima.
fn blocks(block_type: BlockType, rows: usize, cols: usize, random: &mut Random) -> QuantizedBlocks {
    let halves = if block_type == BlockType::Q4_1 { 2 } else { 1 };
    let mut bytes = Vec::with_capacity(rows * cols / BlockType::BLOCK_SIZE * block_type.block_bytes());
    for _ in 0..rows * cols / BlockType::BLOCK_SIZE {
        for half in 0..halves {
            let number = (random.below(100) as f32 + 1.0) * if half == 0 { 1e-4 } else { -1e-3 };
            bytes.extend(half::f16::from_f32(number).to_le_bytes());
        }
        bytes.extend((2 * halves..block_type.block_bytes()).map(|_| random.next() as u8));
    }
    QuantizedBlocks { block_type, rows, cols, bytes }
}
