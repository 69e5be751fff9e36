//! What lies between matrix products.

use candle_core::{DType, Tensor};
use ingle_kernels::ops::{self, Activation, RopeTables};
use ingle_kernels::{Weight, reference};
use rand::Rng;

use super::{CPU, HALVES, assert_close, gpu, random, rng, upload};

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
#[ignore = "needs a GPU"]
fn norms_equal_the_formula() {
    let (device, mut rng) = (gpu(), rng());
    for dtype in FLOATS {
        for (rows, width) in [(1, 1), (3, 17), (5, 128), (2, 576), (33, 2048), (4, 4104), (1, 16_384)] {
            let (a, b) =
                (random(&mut rng, &[rows, width + 8], dtype), random(&mut rng, &[rows, width], dtype));
            let a = a.narrow(1, 8, width).unwrap();
            let weight = random(&mut rng, &[width], DType::F32);
            let what = format!("{dtype:?} {rows} x {width}");
            let on_device = (upload(&a, dtype, &device), upload(&b, dtype, &device));
            let weight_on_device = upload(&weight, DType::F32, &device);
            let found = ops::rms_norm(&on_device.0, &weight_on_device, 1e-5).unwrap();
            let wanted = reference::rms_norm(&a, &weight, 1e-5).unwrap();
            assert_close(&found, &wanted, dtype, (1.5, 1e-3), &what);

            let pair = (&on_device.0, &on_device.1);
            let (sum, normed) = ops::add_rms_norm(pair, 1.0, &weight_on_device, 1e-5).unwrap();
            let wanted = (&a + &b).unwrap().to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            assert_close(&sum, &wanted, dtype, (0.01, 1e-3), &what);
            let wanted = reference::rms_norm(&wanted, &weight, 1e-5).unwrap();
            assert_close(&normed, &wanted, dtype, (1.5, 1e-3), &what);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gates_equal_the_formula() {
    let (device, mut rng) = (gpu(), rng());
    for dtype in FLOATS {
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu] {
            for (rows, width) in [(1, 1), (3, 20), (65, 1536), (2, 8200)] {
                let x = random(&mut rng, &[rows, 2 * width], dtype);
                let found = ops::gated_activation(&upload(&x, dtype, &device), activation).unwrap();
                let wanted = ops::gated_activation(&x, activation).unwrap();
                assert_close(&found, &wanted, dtype, (3.0, 0.05), &format!("{dtype:?} {activation:?}"));
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rows_of_embeddings_are_found() {
    let (device, mut rng) = (gpu(), rng());
    for dtype in FLOATS {
        let table = random(&mut rng, &[1003, 72], dtype);
        let weight = Weight::new(table.clone(), dtype, &device).unwrap();
        let ids: Vec<u32> = (0..77).map(|_| rng.random_range(0..1003)).collect();
        let found = ops::embedding(&ids, &weight, dtype).unwrap();
        let wanted = table.index_select(&Tensor::new(ids, &CPU).unwrap(), 0).unwrap();
        assert_close(&found, &wanted, dtype, (0.0, 0.0), "rows are copies");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn heads_are_rotated() {
    let (device, mut rng) = (gpu(), rng());
    for dtype in HALVES {
        for (tokens, heads, dim, half) in [(1, 1, 16, 8), (67, 9, 64, 32), (3, 2, 80, 20), (300, 4, 128, 64)]
        {
            let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 31 + 5).collect();
            let inv_freq: Vec<f32> = (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
            let tables = |device| RopeTables::new(&positions, &inv_freq, 1.2, device).unwrap();
            let x = random(&mut rng, &[tokens, (heads + 1) * dim], dtype);
            let x = x.narrow(1, dim, heads * dim).unwrap().reshape((tokens, heads, dim)).unwrap();
            let found = ops::rope(&upload(&x, dtype, &device), &tables(&device)).unwrap();
            let wanted = reference::rope(&x, &tables(&CPU)).unwrap();
            assert_close(
                &found,
                &wanted,
                dtype,
                (1.0, 0.01),
                &format!("{dtype:?} {tokens} x {heads} x {dim}"),
            );
        }
    }
}
