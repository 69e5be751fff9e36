//! Products by dense and coded matrices, through the plans and layouts that the device gets.

use candle_core::{Device, Tensor};
use half::f16;
use ingle_kernels::tiles::{LinearArgs, LinearPlan, LinearShape, ROUNDED_FP8, TiledMatrix, can_gate};
use ingle_kernels::{BlockType, Fp8Matrix, Quantization, QuantizedBlocks};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::harness::{
    Buffer, Format, Grid, SEEDS, assert_close, available, encoded, fp8_to_f32, launch, random, rng, room,
};
use crate::args;

const TYPES: [Format; 2] = [Format::Bf16, Format::F16];

/// A matrix as a kernel reads it, and as it is meant.
struct Matrix {
    format: &'static str,
    rows: usize,
    cols: usize,
    codes: Buffer<u8>,
    scales: Buffer<u16>,
    mins: Buffer<u16>,
    row_scales: Buffer<f32>,
    has: [bool; 3],
    unit: f32,
    /// Rows may be read sixteen bytes at a time, if it is dense.
    wide: bool,
    meant: Vec<f64>,
}

impl Matrix {
    fn tiled(tiles: &TiledMatrix, meant: Vec<f64>) -> Self {
        assert_eq!(meant.len(), tiles.rows * tiles.cols);
        Self {
            format: tiles.format.name(),
            rows: tiles.rows,
            cols: tiles.cols,
            codes: Buffer::new(&tiles.codes),
            scales: Buffer::new(&tiles.scales),
            mins: Buffer::new(&tiles.mins),
            row_scales: Buffer::new(&tiles.row_scales),
            has: [!tiles.scales.is_empty(), !tiles.mins.is_empty(), !tiles.row_scales.is_empty()],
            unit: tiles.unit,
            wide: false,
            meant,
        }
    }

    /// Row-major; `offset` numbers after an aligned address.
    fn dense(rng: &mut ChaCha8Rng, format: Format, rows: usize, cols: usize, offset: usize) -> Self {
        let values: Vec<f32> = random(rng, rows * cols).into_iter().map(|x| format.round(x)).collect();
        let bytes = format.encode(&values);
        Self {
            format: "dense",
            rows,
            cols,
            codes: Buffer::with_offset(&bytes, offset * format.size()),
            scales: Buffer::new(&[]),
            mins: Buffer::new(&[]),
            row_scales: Buffer::new(&[]),
            has: [false; 3],
            unit: 1.0,
            wide: cols.is_multiple_of(8) && offset.is_multiple_of(8),
            meant: values.into_iter().map(f64::from).collect(),
        }
    }

    /// Random blocks of a GGUF file, in parts of several rows.
    fn blocks(rng: &mut ChaCha8Rng, block_type: BlockType, rows: usize, cols: usize) -> Self {
        let (mut meant, mut parts, mut left) = (Vec::new(), Vec::new(), rows);
        while left > 0 {
            let part_rows = left.min(1 + rows / 3);
            left -= part_rows;
            let mut bytes = Vec::new();
            for _ in 0..part_rows * cols / 32 {
                let scale = f16::from_f32(rng.random_range(0.001..0.02));
                let min = f16::from_f32(rng.random_range(-0.2..0.1));
                bytes.extend(scale.to_le_bytes());
                let codes: Vec<u8> = (0..32).map(|_| rng.random()).collect();
                let value = |code: f64| f64::from(scale.to_f32()) * code;
                match block_type {
                    BlockType::Q8_0 => {
                        meant.extend(codes.iter().map(|code| value(f64::from(*code as i8))));
                        bytes.extend(&codes);
                    }
                    BlockType::Q4_0 | BlockType::Q4_1 => {
                        let codes: Vec<u8> = codes.iter().map(|code| code & 15).collect();
                        if block_type == BlockType::Q4_1 {
                            bytes.extend(min.to_le_bytes());
                            meant
                                .extend(codes.iter().map(|c| value(f64::from(*c)) + f64::from(min.to_f32())));
                        } else {
                            meant.extend(codes.iter().map(|c| value(f64::from(*c) - 8.0)));
                        }
                        bytes.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
                    }
                }
            }
            parts.push(QuantizedBlocks { block_type, rows: part_rows, cols, bytes });
        }
        Self::tiled(&TiledMatrix::from_blocks(&parts).expect("blocks"), meant)
    }

    /// In parts of several rows; `grouped`: with factors for groups of columns, but in the first part.
    fn fp8(rng: &mut ChaCha8Rng, rows: usize, cols: usize, grouped: bool) -> Self {
        let groups = cols.div_ceil(Fp8Matrix::GROUP);
        let (mut meant, mut parts, mut left) = (Vec::new(), Vec::new(), rows);
        while left > 0 {
            let part_rows = left.min(1 + rows / 2);
            left -= part_rows;
            let row_scales: Vec<f32> = (0..part_rows).map(|_| rng.random_range(0.0005..0.002)).collect();
            let num_factors =
                if grouped && (!parts.is_empty() || left == 0) { part_rows * groups } else { 0 };
            let factors: Vec<f16> =
                (0..num_factors).map(|_| f16::from_f32(rng.random_range(0.1..1.0))).collect();
            // Every number, the least ones and both zeros too.
            let bytes: Vec<u8> = (0..part_rows * cols)
                .map(|_| rng.random::<u8>())
                .map(|code| if code & 127 == 127 { code ^ 1 } else { code })
                .collect();
            for (at, code) in bytes.iter().enumerate() {
                let (row, col) = (at / cols, at % cols);
                let factor = factors.get(row * groups + col / Fp8Matrix::GROUP).copied().unwrap_or(f16::ONE);
                let scale = f64::from(row_scales[row]) * f64::from(factor.to_f32());
                meant.push(f64::from(fp8_to_f32(*code)) * scale);
            }
            parts.push(Fp8Matrix { bytes, rows: part_rows, cols, row_scales, factors });
        }
        Self::tiled(&TiledMatrix::from_fp8(&parts).expect("numbers"), meant)
    }

    /// One of each format.
    fn each(rng: &mut ChaCha8Rng, activations: Format, rows: usize, cols: usize) -> Vec<Self> {
        let mut all = vec![Self::dense(rng, activations, rows, cols, 0)];
        all.extend([false, true].map(|grouped| Self::fp8(rng, rows, cols, grouped)));
        if cols.is_multiple_of(32) {
            for block_type in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
                all.push(Self::blocks(rng, block_type, rows, cols));
            }
        }
        all
    }
}

#[derive(Clone, Copy, Default)]
struct Extra<'a> {
    bias: Option<&'a [f32]>,
    activation: Option<u32>,
    one_order: bool,
    /// Activations are rounded to e4m3, a scale a token.
    rounded: bool,
    /// Numbers between the rows of the activations.
    gap: usize,
}

/// The product by the kernels; `x` in numbers of `activations`.
fn product(activations: Format, m: &Matrix, x: &[f32], extra: Extra<'_>, seed: u32) -> Vec<f32> {
    let (tokens, stride) = (x.len() / m.cols, m.cols + extra.gap);
    let mut spread = vec![f32::NAN; tokens * stride];
    for (row, x) in spread.chunks_mut(stride).zip(x.chunks(m.cols)) {
        row[..m.cols].copy_from_slice(x);
    }
    let gated = extra.activation.is_some();
    let width = if gated { m.rows / 2 } else { m.rows };
    let x = encoded(activations, &spread);
    let bias = encoded(activations, extra.bias.unwrap_or(&[]));
    let y = room(activations, tokens * width);
    let shape = LinearShape { tokens, rows: m.rows, cols: m.cols, gated };
    // Few multiprocessors, so that small matrices are split too, but not all of them.
    let format = if extra.rounded { ROUNDED_FP8 } else { m.format };
    let plan = LinearPlan::new(activations.name(), format, shape, 8, extra.one_order);
    let padded = m.cols.next_multiple_of(64);
    let x_codes = Buffer::<u8>::unwritten(if extra.rounded { tokens * padded } else { 0 });
    let token_scales = Buffer::<f32>::unwritten(if extra.rounded { tokens } else { 0 });
    if extra.rounded {
        launch(
            &format!("round_rows_{}", activations.name()),
            Grid::new([tokens as u32, 1, 1], 256),
            seed,
            args![x.address(), stride as u32, m.cols as u32, x_codes.address(), token_scales.address()],
        );
    }
    let partial =
        Buffer::<f32>::unwritten(if plan.splits > 1 { plan.splits as usize * tokens * m.rows } else { 0 });
    let given = |present: bool, address: usize| if present { address as u64 } else { 0 };
    let arguments = LinearArgs {
        x: if extra.rounded { x_codes.address() } else { x.address() } as u64,
        codes: m.codes.address() as u64,
        scales: given(m.has[0], m.scales.address()),
        mins: given(m.has[1], m.mins.address()),
        row_scales: given(m.has[2], m.row_scales.address()),
        token_scales: given(extra.rounded, token_scales.address()),
        bias: given(extra.bias.is_some(), bias.address()),
        y: y.address() as u64,
        partial: given(plan.splits > 1, partial.address()),
        tokens: tokens as u32,
        rows: m.rows as u32,
        cols: m.cols as u32,
        x_stride: if extra.rounded { padded } else { stride } as u32,
        unit: m.unit,
        activation: extra.activation.unwrap_or(LinearArgs::NOT_GATED),
        flags: (if m.cols.is_multiple_of(8) && stride.is_multiple_of(8) { LinearArgs::WIDE_X } else { 0 })
            + if m.wide { LinearArgs::WIDE_WEIGHTS } else { 0 },
    };
    let grid = Grid { grid: plan.grid, block: plan.block, shared_bytes: plan.shared_bytes };
    launch(&plan.name, grid, seed, args![arguments]);
    if plan.splits > 1 {
        launch(
            &format!("finish_linear_{}", activations.name()),
            Grid::new([width.div_ceil(256) as u32, tokens as u32, 1], 256),
            seed,
            args![arguments, plan.splits],
        );
    }
    activations.decode(&y.read())
}

/// Sums in double precision, and the sum of the magnitudes of what is added.
fn sums(m: &Matrix, x: &[f32]) -> Vec<(f64, f64)> {
    let of_token = |x: &[f32]| -> Vec<(f64, f64)> {
        m.meant
            .chunks(m.cols)
            .map(|w| {
                let terms = w.iter().zip(x).map(|(w, x)| w * f64::from(*x));
                terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
            })
            .collect()
    };
    x.chunks(m.cols).flat_map(of_token).collect()
}

fn check(activations: Format, m: &Matrix, found: &[f32], sums: &[(f64, f64)], what: &str) {
    assert_eq!(found.len(), sums.len(), "{what}");
    for (i, (found, (sum, size))) in found.iter().zip(sums).enumerate() {
        // Half a step of the result, and what f32 sums lose; a minimum is that of code 8, rounded once more.
        let allowed = f64::from(activations.epsilon()) * 0.51 * sum.abs() + 4e-6 * size + 1e-6;
        let error = (f64::from(*found) - sum).abs();
        assert!(error <= allowed, "{what}, {}: number {i} is {found}, wanted {sum}", m.format);
    }
}

fn activations_of(rng: &mut ChaCha8Rng, format: Format, count: usize) -> Vec<f32> {
    random(rng, count).into_iter().map(|x| format.round(x)).collect()
}

#[test]
fn products_are_right_at_every_shape() {
    if !available() {
        return;
    }
    let mut rng = rng(20);
    for activations in TYPES {
        for (rows, cols) in [(1, 32), (17, 96), (130, 1056), (5, 40), (3, 37)] {
            for m in Matrix::each(&mut rng, activations, rows, cols) {
                let all = [1, 2, 3, 7, 16, 17, 33];
                // The other type is read and multiplied the same way.
                let some = if activations == Format::Bf16 { &all[..] } else { &all[3..6] };
                for &tokens in some {
                    let x = activations_of(&mut rng, activations, tokens * cols);
                    let wanted = sums(&m, &x);
                    let what = format!("{activations:?} [{tokens}, {cols}] by [{rows}, {cols}]");
                    let found = product(activations, &m, &x, Extra::default(), 1);
                    check(activations, &m, &found, &wanted, &what);
                }
            }
        }
    }
}

#[test]
fn the_order_of_threads_does_not_show() {
    if !available() {
        return;
    }
    let mut rng = rng(21);
    for m in Matrix::each(&mut rng, Format::Bf16, 50, 1056) {
        for tokens in [3, 12, 40] {
            let x = activations_of(&mut rng, Format::Bf16, tokens * m.cols);
            let [a, b, c] = SEEDS.map(|seed| product(Format::Bf16, &m, &x, Extra::default(), seed));
            assert!(a == b && b == c, "{} {tokens}", m.format);
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_any_company() {
    if !available() {
        return;
    }
    let mut rng = rng(22);
    for m in Matrix::each(&mut rng, Format::Bf16, 40, 1056) {
        let x = activations_of(&mut rng, Format::Bf16, 70 * m.cols);
        let of = |tokens: std::ops::Range<usize>, one_order: bool| {
            let extra = Extra { one_order, ..Extra::default() };
            product(Format::Bf16, &m, &x[tokens.start * m.cols..tokens.end * m.cols], extra, 0)
        };
        let few = of(0..16, false);
        for tokens in [0..1, 3..5, 2..9, 1..12] {
            let alone = of(tokens.clone(), false);
            assert_eq!(alone, few[tokens.start * m.rows..tokens.end * m.rows], "{} {tokens:?}", m.format);
        }
        let many = of(0..70, true);
        assert_eq!(many, of(0..70, false), "{}", m.format);
        for tokens in [0..1, 3..5, 20..37, 30..70] {
            let alone = of(tokens.clone(), true);
            assert_eq!(alone, many[tokens.start * m.rows..tokens.end * m.rows], "{} {tokens:?}", m.format);
        }
    }
}

#[test]
fn a_bias_is_added_and_gaps_are_not_read() {
    if !available() {
        return;
    }
    let mut rng = rng(23);
    for activations in TYPES {
        for m in Matrix::each(&mut rng, activations, 50, 608) {
            for tokens in [1, 5, 19] {
                let x = activations_of(&mut rng, activations, tokens * m.cols);
                let bias = activations_of(&mut rng, activations, m.rows);
                let mut wanted = sums(&m, &x);
                for (i, (sum, _)) in wanted.iter_mut().enumerate() {
                    *sum += f64::from(bias[i % m.rows]);
                }
                for (gap, seed) in [(8, 7), (3, 0)] {
                    let extra = Extra { bias: Some(&bias), gap, ..Extra::default() };
                    let found = product(activations, &m, &x, extra, seed);
                    check(activations, &m, &found, &wanted, &format!("{tokens} tokens, bias, gaps of {gap}"));
                }
            }
        }
    }
}

fn activated(x: f64, activation: u32) -> f64 {
    // The integral by Simpson's rule; past six there is nothing left of it.
    let erf = |x: f64| {
        let (steps, end) = (2000, x.clamp(-6.0, 6.0));
        let term = |i: i32| (-(end * f64::from(i) / f64::from(steps)).powi(2)).exp();
        let inner: f64 = (1..steps).map(|i| term(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        (term(0) + inner + term(steps)) * end / f64::from(3 * steps) * 2.0 / std::f64::consts::PI.sqrt()
    };
    match activation {
        0 => x / (1.0 + (-x).exp()),
        1 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        2 => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
        _ => x.max(0.0),
    }
}

#[test]
fn gates_are_activated_and_multiplied() {
    if !available() {
        return;
    }
    let mut rng = rng(24);
    for (half, cols) in [(16, 64), (48, 1056), (80, 96)] {
        assert!(can_gate(2 * half));
        for m in Matrix::each(&mut rng, Format::Bf16, 2 * half, cols) {
            for (tokens, activation) in [(1, 0), (9, 1), (17, 2), (34, 3), (33, 0)] {
                let x: Vec<f32> = activations_of(&mut rng, Format::Bf16, tokens * cols)
                    .into_iter()
                    .map(|x| Format::Bf16.round(x * 0.3))
                    .collect();
                let bias = activations_of(&mut rng, Format::Bf16, 2 * half);
                let extra = Extra { bias: Some(&bias), activation: Some(activation), ..Extra::default() };
                let found = product(Format::Bf16, &m, &x, extra, 1);
                let sums = sums(&m, &x);
                let wanted: Vec<f32> = (0..tokens * half)
                    .map(|i| {
                        let at = |row: usize| sums[i / half * 2 * half + row].0 + f64::from(bias[row]);
                        let (gate, up) = (at(i % half), at(half + i % half));
                        (activated(gate, activation) * up) as f32
                    })
                    .collect();
                let what = format!("{} {tokens} tokens, {half} gates, activation {activation}", m.format);
                assert_close(&found, &wanted, Format::Bf16.epsilon(), 2e-4, &what);
            }
        }
    }
    assert!(!can_gate(48) && !can_gate(7));
}

/// Weights and activations of e4m3 numbers: exact products of the rounded ones.
#[test]
fn rounded_activations_are_multiplied_exactly() {
    if !available() {
        return;
    }
    let mut rng = rng(27);
    for activations in TYPES {
        for (rows, cols, gap) in [(17, 64, 0), (130, 1056, 8), (32, 45, 0), (64, 600, 3)] {
            let m = Matrix::fp8(&mut rng, rows, cols, false);
            for tokens in [1, 19, 40] {
                let mut x = activations_of(&mut rng, activations, tokens * cols);
                // Tokens of different sizes; one is nothing at all.
                for (token, x) in x.chunks_mut(cols).enumerate() {
                    let factor = [1.0, 0.0, 64.0, 0.001][token % 4];
                    x.iter_mut().for_each(|x| *x = activations.round(*x * factor));
                }
                let rounded: Vec<f32> = x
                    .chunks(cols)
                    .flat_map(|x| {
                        let largest = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                        let scale = (largest * (1.0 / 448.0)).max(1e-30);
                        let inverse = 1.0 / scale;
                        x.iter().map(move |x| Format::Fp8.round(x * inverse) * scale).collect::<Vec<_>>()
                    })
                    .collect();
                let bias = activations_of(&mut rng, activations, rows);
                let extra = Extra { rounded: true, bias: Some(&bias), gap, ..Extra::default() };
                let [found, other] = [0, 7].map(|seed| product(activations, &m, &x, extra, seed));
                assert_eq!(found, other, "the order of threads shows");
                let mut wanted = sums(&m, &rounded);
                wanted.iter_mut().enumerate().for_each(|(i, (sum, _))| *sum += f64::from(bias[i % rows]));
                check(
                    activations,
                    &m,
                    &found,
                    &wanted,
                    &format!("{tokens} rounded tokens by [{rows}, {cols}]"),
                );
                // Products of two results are beyond f16.
                if can_gate(rows) && activations == Format::Bf16 {
                    let gated = product(activations, &m, &x, Extra { activation: Some(3), ..extra }, 1);
                    let gates: Vec<f32> = (0..tokens * rows / 2)
                        .map(|i| {
                            let row = i / (rows / 2) * rows + i % (rows / 2);
                            (wanted[row].0.max(0.0) * wanted[row + rows / 2].0) as f32
                        })
                        .collect();
                    assert_close(&gated, &gates, activations.epsilon(), 1e-3, "gated");
                }
            }
        }
    }
}

/// Weights rounded at load: the codes are the CPU's, also where the columns do not fill a group.
#[test]
fn rounded_weights_are_those_of_the_cpu() {
    if !available() {
        return;
    }
    let mut rng = rng(25);
    for (rows, cols) in [(19, 64), (33, 100), (16, 7)] {
        let parts: Vec<Tensor> = [rows / 2, rows - rows / 2]
            .map(|rows| Tensor::from_vec(random(&mut rng, rows * cols), (rows, cols), &Device::Cpu).unwrap())
            .to_vec();
        for quantization in [Quantization::Int8, Quantization::Int4, Quantization::Fp8] {
            let tiles = TiledMatrix::quantized(&parts, quantization).unwrap();
            let meant: Vec<f32> = match quantization {
                Quantization::Fp8 => {
                    let all = Tensor::cat(&parts, 0).unwrap().to_vec2::<f32>().unwrap();
                    let rounded = |row: Vec<f32>| {
                        let scale = row.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 448.0;
                        row.into_iter().map(move |x| Format::Fp8.round(x / scale) * scale).collect::<Vec<_>>()
                    };
                    all.into_iter().flat_map(rounded).collect()
                }
                _ => {
                    let weight =
                        ingle_kernels::Weight::quantized(&parts, quantization, &Device::Cpu).unwrap();
                    let ids: Vec<u32> = (0..rows as u32).collect();
                    let all = ingle_kernels::ops::embedding(&ids, &weight, candle_core::DType::F32).unwrap();
                    all.flatten_all().unwrap().to_vec1().unwrap()
                }
            };
            let m = Matrix::tiled(&tiles, meant.iter().map(|x| f64::from(*x)).collect());
            for tokens in [1, 17] {
                let x = activations_of(&mut rng, Format::Bf16, tokens * cols);
                let found = product(Format::Bf16, &m, &x, Extra::default(), 0);
                check(Format::Bf16, &m, &found, &sums(&m, &x), &format!("{quantization:?} [{rows}, {cols}]"));
            }
            rows_are_unpacked(&m);
        }
    }
}

/// Rows by ids and in order, in every type of output.
fn rows_are_unpacked(m: &Matrix) {
    let kind = match m.format {
        "fp8" | "fp8g" => "fp8",
        "int8" => "bytes",
        _ => "halves",
    };
    let ids: Vec<u32> = vec![m.rows as u32 - 1, 0, (m.rows / 2) as u32, 0];
    let id_buffer = Buffer::new(&ids);
    for out in [Format::F32, Format::Bf16, Format::F16] {
        let type_name = if out == Format::F32 { "float" } else { out.name() };
        for first_row in [None, Some(m.rows.min(3) as u32 - 1)] {
            let rows: Vec<u32> = match first_row {
                None => ids.clone(),
                Some(first) => (first..m.rows as u32).collect(),
            };
            let y = room(out, rows.len() * m.cols);
            let given = |present: bool, address: usize| if present { address } else { 0 };
            launch(
                &format!("unpack_{kind}_{type_name}"),
                Grid::new([m.cols.div_ceil(2048) as u32, rows.len() as u32, 1], 256),
                1,
                args![
                    m.codes.address(),
                    given(m.has[0], m.scales.address()),
                    given(m.has[1], m.mins.address()),
                    given(m.has[2], m.row_scales.address()),
                    m.rows as u32,
                    m.cols as u32,
                    given(first_row.is_none(), id_buffer.address()),
                    first_row.unwrap_or(0),
                    m.unit,
                    y.address(),
                ],
            );
            let wanted: Vec<f32> = rows
                .iter()
                .flat_map(|row| &m.meant[*row as usize * m.cols..][..m.cols])
                .map(|x| *x as f32)
                .collect();
            let epsilon = out.epsilon() * 0.51 + 1e-6;
            // The least numbers of f16 are coarse.
            assert_close(&out.decode(&y.read()), &wanted, epsilon, 1e-6, &format!("{kind} as {out:?}"));
        }
    }
}

#[test]
fn blocks_are_unpacked() {
    if !available() {
        return;
    }
    let mut rng = rng(26);
    for block_type in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        for (rows, cols) in [(1, 32), (37, 160)] {
            rows_are_unpacked(&Matrix::blocks(&mut rng, block_type, rows, cols));
        }
    }
    for grouped in [false, true] {
        rows_are_unpacked(&Matrix::fp8(&mut rng, 18, 45, grouped));
    }
}
