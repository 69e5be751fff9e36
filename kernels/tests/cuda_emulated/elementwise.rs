//! Norms, activations, rows of embeddings, and rotation with the cache store.

use super::harness::{
    Buffer, Format, Grid, SEEDS, assert_close, available, encoded, launch, random, rng, room, try_launch,
};
use crate::args;

pub(crate) const FLOATS: [Format; 3] = [Format::F32, Format::Bf16, Format::F16];

pub(crate) fn rounded(format: Format, values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|x| format.round(x)).collect()
}

#[test]
fn rms_norm_adds_and_norms() {
    if !available() {
        return;
    }
    let mut rng = rng(1);
    for format in FLOATS {
        for (rows, width, extra, block) in [
            (1, 1, 0, 32),
            (3, 17, 3, 32),
            (2, 64, 8, 32),
            (2, 100, 4, 64),
            (3, 576, 0, 256),
            (1, 2056, 16, 128),
        ] {
            for b_scale in [None, Some(1.0_f32), Some(0.22)] {
                let stride = width + extra;
                let a = rounded(format, random(&mut rng, rows * stride));
                let b = rounded(format, random(&mut rng, rows * stride));
                let weight = random(&mut rng, width);
                let (eps, scale) = (1e-5_f32, b_scale.unwrap_or(1.0));
                let (mut sums, mut normed) = (Vec::new(), Vec::new());
                for row in 0..rows {
                    let sum: Vec<f32> = (0..width)
                        .map(|i| match b_scale {
                            None => a[row * stride + i],
                            Some(scale) => {
                                format.round(a[row * stride + i] + format.round(b[row * stride + i] * scale))
                            }
                        })
                        .collect();
                    let squares: f64 = sum.iter().map(|x| f64::from(*x).powi(2)).sum();
                    let factor = 1.0 / (squares / width as f64 + f64::from(eps)).sqrt();
                    normed.extend(sum.iter().zip(&weight).map(|(x, w)| (f64::from(*x) * factor) as f32 * w));
                    sums.extend(sum);
                }
                let (a, b, weight) = (encoded(format, &a), encoded(format, &b), Buffer::new(&weight));
                let mut bits = None;
                for seed in SEEDS {
                    let (sum, out) = (room(format, rows * width), room(format, rows * width));
                    let (b, to) = b_scale.map_or((0, 0), |_| (b.address(), sum.address()));
                    launch(
                        &format!("rms_norm_{}", format.name()),
                        Grid::new([rows as u32, 1, 1], block),
                        seed,
                        args![
                            a.address(),
                            stride,
                            b,
                            stride,
                            to,
                            weight.address(),
                            out.address(),
                            width as u32,
                            eps,
                            scale
                        ],
                    );
                    let found = (sum.read(), out.read());
                    let what = format!("{format:?} {rows} x {width} {b_scale:?}");
                    if b_scale.is_some() {
                        assert_eq!(format.decode(&found.0), sums, "{what}");
                    }
                    assert_close(
                        &format.decode(&found.1),
                        &normed,
                        format.epsilon() * 1.5 + 1e-6,
                        1e-7,
                        &what,
                    );
                    assert_eq!(
                        *bits.get_or_insert_with(|| found.clone()),
                        found,
                        "{what}: the order of threads shows"
                    );
                }
            }
        }
    }
}

/// The activation that has this number in cuda/activation.cuh.
pub(crate) fn activated(x: f32, activation: u32) -> f32 {
    let x = f64::from(x);
    let erf = |x: f64| {
        // The series: enough terms for |x| < 3.
        let mut term = x;
        let mut sum = x;
        for n in 1..60 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    let y = match activation {
        0 => x / (1.0 + (-x).exp()),
        1 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        2 => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
        _ => x.max(0.0),
    };
    y as f32
}

#[test]
fn gates_are_activated_and_multiplied() {
    if !available() {
        return;
    }
    let mut rng = rng(2);
    for format in FLOATS {
        for activation in 0..4 {
            for (rows, width, extra) in [(1, 1, 0), (3, 20, 0), (5, 72, 8), (2, 1032, 0)] {
                let stride = 2 * width + extra;
                let x: Vec<f32> = random(&mut rng, rows * stride).into_iter().map(|x| x * 3.0).collect();
                let (x, bias) = (rounded(format, x), rounded(format, random(&mut rng, 2 * width)));
                let with_bias = (activation + rows as u32).is_multiple_of(2);
                let wanted: Vec<f32> = (0..rows * width)
                    .map(|i| {
                        let row = &x[i / width * stride..];
                        let bias = |i: usize| if with_bias { bias[i] } else { 0.0 };
                        let (gate, up) = (i % width, width + i % width);
                        let gate = activated(row[gate] + bias(gate), activation);
                        format.round(gate) * (row[up] + bias(up))
                    })
                    .collect();
                let (x, bias) = (encoded(format, &x), encoded(format, &bias));
                for seed in SEEDS {
                    let out = room(format, rows * width);
                    launch(
                        &format!("gated_{}", format.name()),
                        Grid::new([2, rows.min(2) as u32, 1], 64),
                        seed,
                        args![
                            x.address(),
                            stride,
                            if with_bias { bias.address() } else { 0 },
                            out.address(),
                            width as u32,
                            rows as u32,
                            activation
                        ],
                    );
                    let what = format!("{format:?} {rows} x {width}, activation {activation}");
                    assert_close(
                        &format.decode(&out.read()),
                        &wanted,
                        format.epsilon() * 2.0 + 2e-5,
                        1e-6,
                        &what,
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_gathered() {
    if !available() {
        return;
    }
    let mut rng = rng(3);
    for format in FLOATS {
        for (vocab, width) in [(3, 1), (11, 24), (7, 19)] {
            let table = rounded(format, random(&mut rng, vocab * width));
            let ids = [0, vocab as u32 - 1, 1, 1, vocab as u32, u32::MAX];
            for scale in [1.0_f32, 2.5] {
                let wanted: Vec<f32> = ids
                    .iter()
                    .flat_map(|id| {
                        (0..width).map(|i| {
                            table.get(*id as usize * width + i).map_or(0.0, |x| format.round(x * scale))
                        })
                    })
                    .collect();
                let (rows, ids) = (encoded(format, &table), Buffer::new(&ids));
                let out = room(format, 6 * width);
                launch(
                    &format!("gather_{}", format.name()),
                    Grid::new([6, 1, 1], 32),
                    1,
                    args![
                        rows.address(),
                        width,
                        ids.address(),
                        out.address(),
                        width as u32,
                        vocab as u32,
                        scale
                    ],
                );
                assert_eq!(format.decode(&out.read()), wanted, "{format:?} {vocab} x {width}");
            }
        }
    }
}

#[test]
fn chosen_ids_come_into_their_rows() {
    if !available() {
        return;
    }
    for count in [1_u32, 3, 256, 300] {
        let limit = 90;
        // Some are too large, as where a row chose nothing.
        let chosen: Vec<u32> = (0..count).map(|i| if i % 7 == 3 { u32::MAX } else { i * 31 % 97 }).collect();
        let rows: Vec<u32> = (0..count).map(|i| 2 * i + 1).collect();
        let places: Vec<u32> = (0..count).rev().collect();
        let known: Vec<u32> = (0..2 * count + 1).map(|i| 1000 + i).collect();
        let mut wanted = known.clone();
        for (row, place) in rows.iter().zip(&places) {
            let id = chosen[*place as usize];
            wanted[*row as usize] = if id < limit { id } else { 0 };
        }
        for seed in SEEDS {
            let ids = Buffer::new(&known);
            let (rows, places, chosen) = (Buffer::new(&rows), Buffer::new(&places), Buffer::new(&chosen));
            launch(
                "place_ids",
                Grid::new([count.div_ceil(256), 1, 1], 256),
                seed,
                args![ids.address(), rows.address(), places.address(), chosen.address(), count, limit],
            );
            assert_eq!(ids.read(), wanted, "{count} ids");
        }
    }
}

/// As in cuda/elementwise.cu.
#[repr(C)]
struct RotateStore {
    inputs: [usize; 3],
    strides: [usize; 3],
    norms: [usize; 2],
    cos: usize,
    sin: usize,
    positions: usize,
    slots: usize,
    outputs: [usize; 3],
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    half: u32,
    num_slots: u32,
    eps: f32,
}

#[test]
fn heads_are_normed_rotated_and_stored() {
    if !available() {
        return;
    }
    let mut rng = rng(4);
    for (format, cache) in [
        (Format::F32, Format::F32),
        (Format::Bf16, Format::Bf16),
        (Format::F16, Format::F16),
        (Format::Bf16, Format::Fp8),
        (Format::F16, Format::Fp8),
    ] {
        for (tokens, heads, kv_heads, dim, half, norm) in [
            (1, 1, 1, 2, 1, false),
            (3, 3, 1, 64, 32, true),
            (5, 4, 2, 80, 20, false),
            (2, 2, 2, 24, 0, true),
        ] {
            let stride = (heads + 2 * kv_heads) * dim;
            let qkv = rounded(format, random(&mut rng, tokens * stride));
            let (q_norm, k_norm) = (random(&mut rng, dim), random(&mut rng, dim));
            let table = 9;
            let (cos, sin) = (random(&mut rng, table * half), random(&mut rng, table * half));
            let positions: Vec<u32> = (0..tokens as u32).map(|t| (t * 5 + 2) % table as u32).collect();
            let num_slots = 8;
            // The last token of several has no slot.
            let slots: Vec<u32> = (0..tokens)
                .map(|t| if t > 0 && t + 1 == tokens { u32::MAX } else { (t as u32 * 3 + 1) % 8 })
                .collect();
            let eps = 1e-6_f32;

            let head = |token: usize, head: usize, weight: Option<&[f32]>, rotate: bool| -> Vec<f32> {
                let x = &qkv[token * stride + head * dim..][..dim];
                let x: Vec<f32> = match weight {
                    Some(weight) => {
                        let squares: f32 = x.iter().map(|x| x * x).sum();
                        let factor = 1.0 / (squares / dim as f32 + eps).sqrt();
                        x.iter().zip(weight).map(|(x, w)| format.round(x * factor * w)).collect()
                    }
                    None => x.to_vec(),
                };
                let mut y = x.clone();
                if rotate {
                    let row = positions[token] as usize * half;
                    for i in 0..half {
                        let (c, s) = (cos[row + i], sin[row + i]);
                        y[i] = format.round(x[i] * c - x[i + half] * s);
                        y[i + half] = format.round(x[i + half] * c + x[i] * s);
                    }
                }
                y
            };
            let (mut q, mut k, mut v) = (
                Vec::new(),
                vec![f32::NAN; num_slots * kv_heads * dim],
                vec![f32::NAN; num_slots * kv_heads * dim],
            );
            for (token, slot) in slots.iter().enumerate() {
                for h in 0..heads {
                    q.extend(head(token, h, norm.then_some(&q_norm), true));
                }
                for h in 0..kv_heads {
                    if *slot as usize >= num_slots {
                        continue;
                    }
                    let at = (*slot as usize * kv_heads + h) * dim;
                    k[at..at + dim].copy_from_slice(&head(token, heads + h, norm.then_some(&k_norm), true));
                    v[at..at + dim].copy_from_slice(&head(token, heads + kv_heads + h, None, false));
                }
            }

            let input = encoded(format, &qkv);
            let part = |head: usize| input.address() + head * dim * format.size();
            let tables = (Buffer::new(&cos), Buffer::new(&sin), Buffer::new(&positions), Buffer::new(&slots));
            let norms = (Buffer::new(&q_norm), Buffer::new(&k_norm));
            let mut bits = None;
            for seed in SEEDS {
                let outputs = (
                    room(format, tokens * heads * dim),
                    room(cache, num_slots * kv_heads * dim),
                    room(cache, num_slots * kv_heads * dim),
                );
                let arguments = RotateStore {
                    inputs: [part(0), part(heads), part(heads + kv_heads)],
                    strides: [stride; 3],
                    norms: if norm { [norms.0.address(), norms.1.address()] } else { [0; 2] },
                    cos: tables.0.address(),
                    sin: tables.1.address(),
                    positions: tables.2.address(),
                    slots: tables.3.address(),
                    outputs: [outputs.0.address(), outputs.1.address(), outputs.2.address()],
                    tokens: tokens as u32,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    head_dim: dim as u32,
                    half: half as u32,
                    num_slots: num_slots as u32,
                    eps,
                };
                let name = match (format, cache) {
                    (format, cache) if format == cache => format!("rotate_store_{}", format.name()),
                    (format, _) => format!("rotate_store_{}_fp8", format.name()),
                };
                let warps = 4;
                let blocks = (heads + 2 * kv_heads).div_ceil(warps);
                launch(
                    &name,
                    Grid::new([tokens as u32, blocks as u32, 1], 32 * warps as u32),
                    seed,
                    args![arguments],
                );

                let found = (outputs.0.read(), outputs.1.read(), outputs.2.read());
                let what =
                    format!("{format:?} to {cache:?}, {tokens} tokens, {heads} + {kv_heads} heads of {dim}");
                // A norm summed in another order may round to the next number, and that again in the cache.
                let (relative, absolute) = (format.epsilon() * 3.0, 1e-6 + format.epsilon());
                assert_close(&format.decode(&found.0), &q, relative, absolute, &what);
                for (found, wanted) in [(&found.1, &k), (&found.2, &v)] {
                    for (i, (found, wanted)) in cache.decode(found).iter().zip(wanted).enumerate() {
                        let allowed = cache.epsilon() * wanted.abs() + absolute;
                        let same = found.is_nan() && wanted.is_nan() || (found - wanted).abs() <= allowed;
                        assert!(same, "{what}: cached number {i} is {found}, wanted {wanted}");
                        if !norm && half == 0 && !wanted.is_nan() {
                            assert_eq!(*found, cache.round(*wanted), "{what}");
                        }
                    }
                }
                // Values pass through one rounding only: exact.
                let values = found.2.clone();
                for (found, wanted) in cache.decode(&values).iter().zip(&v) {
                    assert!(wanted.is_nan() || *found == cache.round(*wanted), "{what}: {found}, {wanted}");
                }
                assert_eq!(
                    *bits.get_or_insert_with(|| found.clone()),
                    found,
                    "{what}: the order of threads shows"
                );
            }
        }
    }
}

#[test]
fn formats_round_to_nearest_even() {
    if !available() {
        return;
    }
    let mut rng = rng(5);
    // Random patterns of bits, every fp8 number and the middles between them.
    let mut values: Vec<f32> = (0..4096).map(|_| f32::from_bits(rand::Rng::random(&mut rng))).collect();
    values.extend(random(&mut rng, 4096).into_iter().map(|x| x * 460.0));
    values.extend((0..=255).map(super::harness::fp8_to_f32));
    values
        .extend((0..126).map(|i| (super::harness::fp8_to_f32(i) + super::harness::fp8_to_f32(i + 1)) / 2.0));
    values.extend([
        0.0,
        -0.0,
        65504.0,
        65519.9,
        65520.0,
        448.0,
        464.0,
        1e-8,
        f32::INFINITY,
        f32::NEG_INFINITY,
    ]);
    values.retain(|x| !x.is_nan());
    for format in [Format::Bf16, Format::F16, Format::Fp8] {
        let (from, to) = (Buffer::new(&values), room(format, values.len()));
        launch(
            &format!("convert_{}", format.name()),
            Grid::new([1, 1, 1], 32),
            0,
            args![from.address(), to.address(), values.len() as u32],
        );
        let (found, wanted) = (to.read(), format.encode(&values));
        for (i, x) in values.iter().enumerate() {
            let at = i * format.size()..(i + 1) * format.size();
            assert_eq!(found[at.clone()], wanted[at], "{x} ({:08x}) as {format:?}", x.to_bits());
        }
    }
}

#[test]
fn what_is_wrong_is_found() {
    if !available() {
        return;
    }
    let out = Buffer::<f32>::unwritten(64);
    let run = |case: u32, seed: u32| {
        try_launch("planted_bugs", Grid::new([1, 1, 1], 64).shared(256), seed, args![out.address(), case])
            .map(|()| out.read().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(0, 0), run(0, 1));
    assert_ne!(run(1, 0), run(1, 1), "a missing barrier shows in the order of threads");
    let says = |case, text: &str| {
        let error = run(case, 0).expect_err("a planted bug");
        assert!(error.contains(text), "{error}");
    };
    says(2, "waits at a barrier of its block for ever");
    says(3, "is not aligned");
    says(4, "has not waited for");
    says(5, "while lane");
}
