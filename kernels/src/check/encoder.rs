//! What encoders do besides attention: products with the norm or activation that follows, sums of embeddings, pooling.

use candle_core::{DType, Device, Tensor};

use super::{Checker, Pair, Random, put, tolerance};
use crate::error::Result;
use crate::ops::{self, Activation, LayerNorm, PoolingMode};
use crate::reference;
use crate::weight::Weight;

/// Tokens, columns and rows of a matrix: one kernel for all, the library's product and a kernel, odd widths, wide rows.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 64, 96), (7, 96, 384), (16, 768, 768), (33, 70, 129), (200, 768, 3072), (130, 128, 2056)];
const MODES: [PoolingMode; 6] = [
    PoolingMode::Cls,
    PoolingMode::Last,
    PoolingMode::Max,
    PoolingMode::Mean,
    PoolingMode::MeanSqrtLen,
    PoolingMode::WeightedMean,
];

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        let name = dtype.as_str();
        checker.run(format!("linear_layer_norm {name}"), tolerance(dtype), |random, device, check| {
            for (idx, (tokens, cols, rows)) in SHAPES.into_iter().enumerate() {
                let Product { x, matrix, bias, product } = Product::new(random, tokens, (rows, cols), dtype)?;
                let residual = random.tensor(&[tokens, rows], dtype)?;
                let (weight, shift) =
                    (random.tensor(&[rows], DType::F32)?, random.tensor(&[rows], DType::F32)?);
                let matrix = Weight::new(matrix, dtype, device)?;
                let on = |x: &Tensor| put(x, dtype, device);
                let (there, bias_there) = (weight.to_device(device)?, shift.to_device(device)?);
                let norm =
                    LayerNorm { weight: &there, bias: (idx % 2 == 0).then_some(&bias_there), eps: 1e-5 };
                let keeps = idx % 3 != 0;
                let linear = (&matrix, Some(&on(&bias)?));
                let (sum, found) = ops::linear_layer_norm(&on(&x)?, linear, &on(&residual)?, &norm, keeps)?;
                let shift = (idx % 2 == 0).then_some(&shift);
                let wanted = reference::layer_norm(&product, Some(&residual), &weight, shift, 1e-5)?;
                let case = format!("{tokens} by {rows} x {cols}");
                check(Pair { found, wanted, scale: None, case: case.clone() })?;
                if let Some(found) = sum.filter(|_| keeps) {
                    check(Pair {
                        found,
                        wanted: (product + residual)?,
                        scale: None,
                        case: format!("{case}, the sum"),
                    })?;
                }
            }
            Ok(())
        });
        checker.run(format!("activated_linear {name}"), tolerance(dtype), |random, device, check| {
            for (tokens, cols, rows) in SHAPES {
                let Product { x, matrix, bias, product } = Product::new(random, tokens, (rows, cols), dtype)?;
                let matrix = Weight::new(matrix, dtype, device)?;
                let (x, bias) = (put(&x, dtype, device)?, put(&bias, dtype, device)?);
                for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Relu]
                {
                    let found = ops::activated_linear(&x, &matrix, Some(&bias), activation)?;
                    let wanted = reference::activate(&product, activation)?;
                    check(Pair {
                        found,
                        wanted,
                        scale: None,
                        case: format!("{activation:?}, {tokens} by {rows} x {cols}"),
                    })?;
                }
            }
            Ok(())
        });
        checker.run(format!("embedding_layer_norm {name}"), tolerance(dtype), |random, device, check| {
            for (tokens, width) in [(1, 64), (9, 33), (200, 768)] {
                for num_tables in 1..=3 {
                    check(embeddings(random, device, (tokens, width), num_tables, dtype)?)?;
                }
            }
            Ok(())
        });
        checker.run(format!("pool {name}"), tolerance(dtype), |random, device, check| {
            for (lengths, width) in [(&[1][..], 64), (&[5, 33, 1], 70), (&[300, 12], 768)] {
                let mut cu_seqlens = vec![0_u32];
                for len in lengths {
                    cu_seqlens.push(cu_seqlens.last().copied().unwrap_or(0) + *len);
                }
                let x = random.tensor(&[cu_seqlens.last().copied().unwrap_or(0) as usize, width], dtype)?;
                let shape = (lengths.len(), MODES.len() * width);
                let tensor = |x: Vec<f32>| Tensor::from_vec(x, shape, &Device::Cpu);
                let found = tensor(ops::pool(&put(&x, dtype, device)?, &cu_seqlens, &MODES)?)?;
                let wanted = tensor(reference::pool(&x, &cu_seqlens, &MODES)?)?;
                check(Pair { found, wanted, scale: None, case: format!("{lengths:?} x {width}") })?;
            }
            Ok(())
        });
    }
}

/// A product in host memory: `product = x matrix^T + bias`.
struct Product {
    x: Tensor,
    matrix: Tensor,
    bias: Tensor,
    product: Tensor,
}

impl Product {
    fn new(random: &mut Random, tokens: usize, (rows, cols): (usize, usize), dtype: DType) -> Result<Self> {
        let x = random.tensor(&[tokens, cols], dtype)?;
        let (matrix, bias) = (random.tensor(&[rows, cols], dtype)?, random.tensor(&[rows], dtype)?);
        let product = x.matmul(&matrix.t()?)?.broadcast_add(&bias)?;
        Ok(Self { x, matrix, bias, product })
    }
}

/// Rows of several tables added up and normed.
fn embeddings(
    random: &mut Random,
    device: &Device,
    (tokens, width): (usize, usize),
    num_tables: usize,
    dtype: DType,
) -> Result<Pair> {
    let (weight, bias) = (random.tensor(&[width], DType::F32)?, random.tensor(&[width], DType::F32)?);
    let (mut tables, mut all_ids, mut sum) = (Vec::new(), Vec::new(), None);
    for count in [50, 2, 300].into_iter().take(num_tables) {
        let table = random.tensor(&[count, width], dtype)?;
        let ids: Vec<u32> = (0..tokens).map(|_| random.below(count) as u32).collect();
        let rows = table.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
        sum = Some(match sum {
            Some(sum) => (sum + rows)?,
            None => rows,
        });
        tables.push(Weight::portable(&[table], dtype, device)?);
        all_ids.push(ids);
    }
    let sum = sum.ok_or_else(|| crate::error::argument("embeddings", "no table"))?;
    let parts: Vec<_> = all_ids.iter().map(Vec::as_slice).zip(&tables).collect();
    let (there, bias_there) = (weight.to_device(device)?, bias.to_device(device)?);
    let norm = LayerNorm { weight: &there, bias: Some(&bias_there), eps: 1e-5 };
    Ok(Pair {
        found: ops::embedding_layer_norm(&parts, &norm, dtype)?,
        wanted: reference::layer_norm(&sum, None, &weight, Some(&bias), 1e-5)?,
        scale: None,
        case: format!("{tokens} x {width} of {num_tables} tables"),
    })
}
