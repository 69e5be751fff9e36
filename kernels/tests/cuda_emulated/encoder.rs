//! What an encoder does between its products: sums with their layer norm, bias and activation, pooling.

use rand::Rng;

use super::elementwise::{FLOATS, activated, rounded};
use super::harness::{
    Buffer, Format, Grid, SEEDS, assert_close, available, encoded, launch, random, rng, room,
};
use crate::args;

/// As in cuda/encoder.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LayerNorm {
    parts: [usize; 3],
    ids: [usize; 3],
    strides: [usize; 3],
    added: usize,
    weight: usize,
    bias: usize,
    sum: usize,
    out: usize,
    rows: u32,
    width: u32,
    eps: f32,
}

/// Rows, width, what rows are further apart than they are wide, whether parts are chosen by ids.
const NORMS: [(usize, usize, usize, bool); 8] = [
    (1, 1, 0, false),
    (3, 17, 3, false),
    (5, 64, 8, true),
    (2, 100, 4, false),
    (9, 384, 0, true),
    (4, 768, 16, false),
    (3, 1100, 1, true),
    (2, 2056, 0, false),
];

/// Rows of random numbers far from zero, `stride` apart.
fn table(rng: &mut rand_chacha::ChaCha8Rng, format: Format, count: usize, stride: usize) -> Vec<f32> {
    let shift = rng.random_range(-3.0..3.0_f32);
    rounded(format, random(rng, count * stride).into_iter().map(|x| x + shift).collect())
}

#[test]
fn sums_are_normed() {
    if !available() {
        return;
    }
    let mut rng = rng(40);
    for format in FLOATS {
        for (case, (rows, width, extra, by_id)) in NORMS.into_iter().enumerate() {
            for num_parts in 1..=3 {
                let (stride, eps) = (width + extra, 1e-5_f32);
                let (with_added, with_bias, keeps) =
                    (num_parts > 1, (case + num_parts) % 3 != 0, (case + num_parts) % 2 == 0);
                let num_rows = if by_id { 7 } else { rows };
                let tables: Vec<_> =
                    (0..num_parts).map(|_| table(&mut rng, format, num_rows, stride)).collect();
                let ids: Vec<Vec<u32>> = (0..num_parts)
                    .map(|_| {
                        (0..rows as u32)
                            .map(|row| if by_id { rng.random_range(0..num_rows as u32) } else { row })
                            .collect()
                    })
                    .collect();
                let added = rounded(format, random(&mut rng, width));
                let (weight, bias) = (random(&mut rng, width), random(&mut rng, width));
                let (mut sums, mut normed) = (Vec::new(), Vec::new());
                for row in 0..rows {
                    let part =
                        |(table, ids): (&Vec<f32>, &Vec<u32>), i| table[ids[row] as usize * stride + i];
                    let sum: Vec<f64> = (0..width)
                        .map(|i| {
                            let parts = tables.iter().zip(&ids).map(|both| f64::from(part(both, i)));
                            parts.sum::<f64>() + if with_added { f64::from(added[i]) } else { 0.0 }
                        })
                        .collect();
                    let mean = sum.iter().sum::<f64>() / width as f64;
                    let variance = sum.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                    let factor = 1.0 / (variance + f64::from(eps)).sqrt();
                    for (i, x) in sum.into_iter().enumerate() {
                        let shift = if with_bias { f64::from(bias[i]) } else { 0.0 };
                        normed.push(((x - mean) * factor * f64::from(weight[i]) + shift) as f32);
                        sums.push(x as f32);
                    }
                }

                let tables: Vec<_> = tables.iter().map(|table| encoded(format, table)).collect();
                let ids: Vec<_> = ids.iter().map(|ids| Buffer::new(ids)).collect();
                let (added, weight, bias) =
                    (encoded(format, &added), Buffer::new(&weight), Buffer::new(&bias));
                let mut bits = None;
                for seed in SEEDS {
                    let (sum, out) = (room(format, rows * width), room(format, rows * width));
                    let mut p = LayerNorm {
                        added: if with_added { added.address() } else { 0 },
                        weight: weight.address(),
                        bias: if with_bias { bias.address() } else { 0 },
                        sum: if keeps { sum.address() } else { 0 },
                        out: out.address(),
                        rows: rows as u32,
                        width: width as u32,
                        eps,
                        ..LayerNorm::default()
                    };
                    for (at, (table, ids)) in tables.iter().zip(&ids).enumerate() {
                        (p.parts[at], p.strides[at]) = (table.address(), stride);
                        p.ids[at] = if by_id { ids.address() } else { 0 };
                    }
                    let grid = Grid::new([rows.div_ceil(4) as u32, 1, 1], 128);
                    launch(&format!("layer_norm_{}", format.name()), grid, seed, args![p]);
                    let what = format!("{format:?} {rows} x {width}, {num_parts} parts, by id: {by_id}");
                    let found = (sum.read(), out.read());
                    if keeps {
                        // The sum of f32 numbers may round to a neighbour of what the exact sum rounds to.
                        let step = format.epsilon();
                        assert_close(&format.decode(&found.0), &sums, step, 1e-6, &what);
                    }
                    // Around 9 the mean is rounded at 1e-6, which a small variance scales up.
                    let absolute = 1e-4 + format.epsilon() / 4.0;
                    assert_close(&format.decode(&found.1), &normed, format.epsilon(), absolute, &what);
                    let first = bits.get_or_insert_with(|| found.clone());
                    assert_eq!(*first, found, "{what}: the order of threads shows");
                }
            }
        }
    }
}

#[test]
fn biases_are_added_and_activated() {
    if !available() {
        return;
    }
    let mut rng = rng(41);
    for format in FLOATS {
        for activation in 0..5_u32 {
            for (rows, width, extra, with_bias) in
                [(1, 1, 0, true), (3, 20, 0, false), (7, 72, 8, true), (5, 1032, 0, true), (3, 33, 2, false)]
            {
                let stride = width + extra;
                let x: Vec<f32> = random(&mut rng, rows * stride).into_iter().map(|x| x * 2.0).collect();
                let (x, bias) = (rounded(format, x), rounded(format, random(&mut rng, width)));
                let wanted: Vec<f32> = (0..rows * width)
                    .map(|i| {
                        let shift = if with_bias { bias[i % width] } else { 0.0 };
                        let value = x[i / width * stride + i % width] + shift;
                        if activation == 4 { value } else { activated(value, activation) }
                    })
                    .collect();
                let (bias, mut bits) = (encoded(format, &bias), None);
                for seed in SEEDS {
                    // Over itself where rows are contiguous, as after a product.
                    let (x, out) = (encoded(format, &x), room(format, rows * width));
                    let to = if extra == 0 { &x } else { &out };
                    launch(
                        &format!("bias_activate_{}", format.name()),
                        Grid::new([2, rows.min(3) as u32, 1], 64),
                        seed,
                        args![
                            x.address(),
                            stride,
                            if with_bias { bias.address() } else { 0 },
                            to.address(),
                            width as u32,
                            rows as u32,
                            activation
                        ],
                    );
                    let what = format!("{format:?} {rows} x {width}, activation {activation}");
                    let found = to.read();
                    out.read();
                    let relative = format.epsilon() + 1e-5;
                    assert_close(&format.decode(&found), &wanted, relative, 1e-6, &what);
                    let first = bits.get_or_insert_with(|| found.clone());
                    assert_eq!(*first, found, "{what}: the order of threads shows");
                }
            }
        }
    }
}

#[test]
fn sequences_are_pooled() {
    if !available() {
        return;
    }
    let mut rng = rng(42);
    for format in FLOATS {
        for (lens, width, extra) in
            [(&[1][..], 1, 0), (&[3, 1, 20], 33, 2), (&[9, 40], 200, 0), (&[130, 7, 8, 16], 264, 8)]
        {
            let tokens: usize = lens.iter().sum();
            let stride = width + extra;
            let x = rounded(format, random(&mut rng, tokens * stride));
            let mut cu_seqlens = vec![0_u32];
            lens.iter().for_each(|len| cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *len as u32));
            for mode in 0..6_u32 {
                let pooled = |seq: usize, i: usize| {
                    let rows = cu_seqlens[seq] as usize..cu_seqlens[seq + 1] as usize;
                    let values: Vec<f64> = rows.map(|row| f64::from(x[row * stride + i])).collect();
                    let len = values.len() as f64;
                    match mode {
                        0 => values[0],
                        1 => values[values.len() - 1],
                        2 => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                        3 => values.iter().sum::<f64>() / len,
                        4 => values.iter().sum::<f64>() / len.sqrt(),
                        _ => {
                            let weighted = values.iter().enumerate().map(|(at, x)| (at as f64 + 1.0) * x);
                            weighted.sum::<f64>() / (len * (len + 1.0) / 2.0)
                        }
                    }
                };
                let wanted: Vec<f32> =
                    (0..lens.len() * width).map(|i| pooled(i / width, i % width) as f32).collect();
                let (rows, cuts) = (encoded(format, &x), Buffer::new(&cu_seqlens));
                let mut bits = None;
                for seed in SEEDS {
                    // Beside what another mode makes.
                    let out_stride = width + 5;
                    let out = Buffer::<f32>::unwritten((lens.len() - 1) * out_stride + width);
                    // Fewer blocks than the columns need: each takes several.
                    let grid = Grid::new([1 + (width > 200) as u32, lens.len() as u32, 1], 256);
                    launch(
                        &format!("pool_{}", format.name()),
                        grid,
                        seed,
                        args![
                            rows.address(),
                            stride,
                            cuts.address(),
                            out.address(),
                            out_stride,
                            width as u32,
                            mode
                        ],
                    );
                    let found: Vec<f32> = out.read();
                    let found: Vec<f32> =
                        (0..lens.len() * width).map(|i| found[i / width * out_stride + i % width]).collect();
                    let what = format!("{format:?} {lens:?} x {width}, mode {mode}");
                    assert_close(&found, &wanted, 1e-5, 1e-5, &what);
                    let first = bits.get_or_insert_with(|| found.clone());
                    assert_eq!(*first, found, "{what}: the order of threads shows");
                }
            }
        }
    }
}
