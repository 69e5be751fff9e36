//! What is computed number by number or row by row.

use candle_core::{DType, Device, Tensor};

use super::{Checker, Pair, put, tolerance};
use crate::ops::{self, Activation, RopeTables};
use crate::reference;

/// Rows and widths: one, odd, a warp, more than a block of threads.
const SHAPES: [(usize, usize); 9] =
    [(1, 64), (1, 1), (3, 96), (7, 129), (1, 2048), (33, 576), (5, 4104), (2, 70), (1, 16_384)];
const ACTIVATIONS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        let name = dtype.as_str();
        checker.run(format!("rms_norm {name}"), tolerance(dtype), |random, device, check| {
            for (rows, width) in SHAPES {
                let (x, weight) =
                    (random.tensor(&[rows, width], dtype)?, random.tensor(&[width], DType::F32)?);
                let found = ops::rms_norm(&put(&x, dtype, device)?, &weight.to_device(device)?, 1e-5)?;
                let wanted = reference::rms_norm(&x, &weight, 1e-5)?;
                check(Pair { found, wanted, scale: None, case: format!("{rows} x {width}") })?;
            }
            Ok(())
        });
        checker.run(format!("add_rms_norm {name}"), tolerance(dtype), |random, device, check| {
            for (idx, (rows, width)) in SHAPES.into_iter().enumerate() {
                // Rows further apart than they are wide, as parts of a stacked projection are.
                let a = random.tensor(&[rows, width + 8], dtype)?;
                let b = random.tensor(&[rows, width], dtype)?;
                let weight = random.tensor(&[width], DType::F32)?;
                let scale = [1.0, 0.5][idx % 2];
                let (there, other) = (put(&a, dtype, device)?.narrow(1, 8, width)?, put(&b, dtype, device)?);
                let (sum, normed) =
                    ops::add_rms_norm((&there, &other), scale, &weight.to_device(device)?, 1e-5)?;
                let wanted =
                    (a.narrow(1, 8, width)? + (b * scale)?)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
                let case = format!("{rows} x {width}");
                let norm = reference::rms_norm(&wanted, &weight, 1e-5)?;
                check(Pair { found: normed, wanted: norm, scale: None, case: format!("{case}, normed") })?;
                check(Pair { found: sum, wanted, scale: None, case: format!("{case}, the sum") })?;
            }
            Ok(())
        });
        checker.run(format!("layer_norm {name}"), tolerance(dtype), |random, device, check| {
            for (idx, (rows, width)) in SHAPES.into_iter().enumerate() {
                let (x, residual) =
                    (random.tensor(&[rows, width], dtype)?, random.tensor(&[rows, width], dtype)?);
                let (weight, bias) = (random.tensor(&[width], dtype)?, random.tensor(&[width], dtype)?);
                let (with_residual, with_bias) = (idx % 2 == 0, idx % 3 != 0);
                let on = |x: &Tensor| put(x, dtype, device);
                let found = ops::layer_norm(
                    &on(&x)?,
                    with_residual.then(|| on(&residual)).transpose()?.as_ref(),
                    &on(&weight)?,
                    with_bias.then(|| on(&bias)).transpose()?.as_ref(),
                    1e-5,
                )?;
                let residual = with_residual.then_some(&residual);
                let wanted = reference::layer_norm(&x, residual, &weight, with_bias.then_some(&bias), 1e-5)?;
                check(Pair { found, wanted, scale: None, case: format!("{rows} x {width}") })?;
            }
            Ok(())
        });
        checker.run(format!("add {name}"), tolerance(dtype), |random, device, check| {
            for (rows, width) in SHAPES {
                let (a, b) = (random.tensor(&[rows, width], dtype)?, random.tensor(&[rows, width], dtype)?);
                let found = ops::add(&put(&a, dtype, device)?, &put(&b, dtype, device)?)?;
                check(Pair { found, wanted: (&a + &b)?, scale: None, case: format!("{rows} x {width}") })?;
            }
            Ok(())
        });
        checker.run(format!("gated_activation {name}"), tolerance(dtype), |random, device, check| {
            for (rows, width) in SHAPES {
                let both = random.tensor(&[rows, 2 * width], dtype)?;
                let (gate, up) = (both.narrow(1, 0, width)?, both.narrow(1, width, width)?);
                for activation in ACTIVATIONS {
                    let found = ops::gated_activation(&put(&both, dtype, device)?, activation)?;
                    let wanted = reference::gated_activation(&gate, &up, activation)?;
                    check(Pair {
                        found,
                        wanted,
                        scale: None,
                        case: format!("{activation:?}, {rows} x {width}"),
                    })?;
                }
            }
            Ok(())
        });
        checker.run(format!("activate {name}"), tolerance(dtype), |random, device, check| {
            for (rows, width) in SHAPES {
                let x = random.tensor(&[rows, width], dtype)?;
                for activation in ACTIVATIONS {
                    let found = ops::activate(&put(&x, dtype, device)?, activation)?;
                    let wanted = reference::activate(&x, activation)?;
                    check(Pair {
                        found,
                        wanted,
                        scale: None,
                        case: format!("{activation:?}, {rows} x {width}"),
                    })?;
                }
            }
            Ok(())
        });
        checker.run(format!("rope {name}"), tolerance(dtype), |random, device, check| {
            // Tokens, heads, width of a head, rotated part of it.
            for (tokens, heads, dim, rotated) in
                [(1, 32, 64, 64), (7, 3, 128, 128), (33, 2, 96, 96), (5, 4, 80, 32), (2, 1, 256, 256)]
            {
                let x = random.tensor(&[tokens, heads, dim], dtype)?;
                let positions: Vec<u32> = (0..tokens).map(|_| random.below(4000) as u32).collect();
                let frequencies: Vec<f32> =
                    (0..rotated / 2).map(|i| 10_000_f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
                let tables = |device: &Device| RopeTables::new(&positions, &frequencies, 1.0, device);
                let found = ops::rope(&put(&x, dtype, device)?, &tables(device)?)?;
                let wanted = reference::rope(&x, &tables(&Device::Cpu)?)?;
                check(Pair {
                    found,
                    wanted,
                    scale: None,
                    case: format!("{tokens} x {heads} x {rotated} of {dim}"),
                })?;
            }
            Ok(())
        });
    }
}
