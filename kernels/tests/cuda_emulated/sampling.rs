//! Sampling against the plain formula, which is the engine's own.

use ingle_kernels::SampleRow;
use ingle_kernels::ops::{DeviceRows, sample_row, scan_parts};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::harness::{Buffer, Format, Grid, available, encoded, launch, rng};
use crate::args;

/// The tokens that the kernels choose from `logits [rows.len(), vocab]`.
fn choose(format: Format, logits: &[f32], rows: &[SampleRow<'_>], seed: u32) -> Vec<Option<u32>> {
    let vocab = logits.len() / rows.len();
    let device = DeviceRows::new(rows, vocab);
    let words = Buffer::new(&device.words);
    let edits = words.address() + rows.len() * DeviceRows::ROW_WORDS * 4;
    let logits = encoded(format, logits);
    let work = Buffer::<f32>::unwritten(device.num_slots * vocab);
    let num_parts = scan_parts(vocab);
    let parts = Buffer::<[u32; 3]>::unwritten(rows.len() * num_parts);
    let tokens = Buffer::<u32>::unwritten(rows.len());
    launch(
        &format!("sample_scan_{}", format.name()),
        Grid::new([num_parts as u32, rows.len() as u32, 1], 256),
        seed,
        args![logits.address(), work.address(), words.address(), parts.address(), vocab as u32],
    );
    let grid = [rows.len() as u32, 1, 1];
    if device.num_edits > 0 {
        launch(
            "sample_edit",
            Grid::new(grid, 256),
            seed,
            args![work.address(), words.address(), edits, vocab as u32],
        );
    }
    launch(
        "sample_choose",
        Grid::new(grid, 1024),
        seed,
        args![
            work.address(),
            words.address(),
            parts.address(),
            tokens.address(),
            num_parts as u32,
            vocab as u32
        ],
    );
    tokens.read().into_iter().map(|token| (token != u32::MAX).then_some(token)).collect()
}

/// Compares all rows with the formula; each row of logits as `format` holds it.
fn compare(format: Format, logits: &[f32], rows: &[SampleRow<'_>], seed: u32, what: &str) {
    let logits: Vec<f32> = logits.iter().map(|x| format.round(*x)).collect();
    let found = choose(format, &logits, rows, seed);
    let vocab = logits.len() / rows.len();
    for ((found, row), logits) in found.iter().zip(rows).zip(logits.chunks(vocab)) {
        let wanted = sample_row(&mut logits.to_vec(), row);
        assert_eq!(*found, wanted, "{what}, {format:?}, {vocab} tokens: {row:?}");
    }
}

fn normal(rng: &mut ChaCha8Rng, count: usize, spread: f32) -> Vec<f32> {
    (0..count).map(|_| (0..6).map(|_| rng.random_range(-1.0..1.0_f32)).sum::<f32>() * spread).collect()
}

const PLAIN: SampleRow<'static> = SampleRow {
    temperature: Some(1.0),
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    prompt: &[],
    output: &[],
    banned: &[],
    logit_bias: &[],
    uniform: 0.5,
};

#[test]
fn the_likeliest_token_wins() {
    if !available() {
        return;
    }
    let mut rng = rng(30);
    for format in [Format::F32, Format::Bf16, Format::F16] {
        for vocab in [1, 31, 5001] {
            // Of bf16 numbers many are equal: the first of the largest.
            let mut logits = normal(&mut rng, 3 * vocab, 1.0);
            logits[..vocab].fill(-3.0);
            compare(format, &logits, &[SampleRow::default(); 3], 1, "greedy");
        }
    }
}

#[test]
fn rows_that_are_not_finite_choose_nothing() {
    if !available() {
        return;
    }
    for vocab in [40, 5000] {
        for at in [0, vocab - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut logits = vec![0.5; 4 * vocab];
                logits[vocab + at] = bad;
                logits[2 * vocab + at] = bad;
                let rows = [SampleRow::default(), SampleRow::default(), PLAIN, PLAIN];
                for format in [Format::F32, Format::Bf16] {
                    let found = choose(format, &logits, &rows, 0);
                    assert_eq!(found[..3], [Some(0), None, None], "{bad} at {at} of {vocab}");
                    assert!(found[3].is_some());
                }
            }
        }
    }
}

#[test]
fn draws_are_those_of_the_formula() {
    if !available() {
        return;
    }
    let mut rng = rng(31);
    for (vocab, spread) in [(1, 1.0), (33, 3.0), (4100, 8.0)] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (20, 1.0, 0.0),
            (900, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 0.0001, 0.0),
            (0, 0.9999, 0.0),
            (0, 1.0, 0.05),
            (40, 0.8, 0.0),
            (300, 0.95, 0.001),
            (5000, 0.5, 1.0),
        ] {
            // A weight of less than 2^-46 of the largest is none to the kernels: such a token is never the first.
            let least = if spread < 4.0 { 0.0 } else { 1e-9 };
            let rows: Vec<SampleRow<'_>> = [least, 0.9999, 0.0, 0.0]
                .iter()
                .enumerate()
                .map(|(i, uniform)| SampleRow {
                    temperature: Some([1.0, 0.7, 0.05, 2.0][i]),
                    top_k,
                    top_p,
                    min_p,
                    uniform: if i < 2 { *uniform } else { rng.random() },
                    ..PLAIN
                })
                .collect();
            let logits = normal(&mut rng, rows.len() * vocab, spread);
            // Of bf16 logits many are equal.
            let format = if top_k == 40 || top_p == 0.9 { Format::Bf16 } else { Format::F32 };
            compare(format, &logits, &rows, 7, "draw");
        }
    }
}

/// More tokens in one bin of logits than its list holds, and more equal ones than can be told apart.
#[test]
fn flat_rows_are_searched_in_place() {
    if !available() {
        return;
    }
    let mut rng = rng(32);
    for (spread, top_k, top_p) in [(0.0, 3000, 1.0), (0.002, 0, 0.6), (0.002, 4500, 0.3)] {
        let rows = [0.25, 0.9].map(|uniform| SampleRow { top_k, top_p, uniform, ..PLAIN });
        let logits = normal(&mut rng, rows.len() * 4400, spread);
        compare(Format::F32, &logits, &rows, 0, "flat");
    }
}

#[test]
fn edits_come_first() {
    if !available() {
        return;
    }
    let mut rng = rng(33);
    let vocab = 300;
    for case in 0..6 {
        let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..320)).collect() };
        let (prompt, output, banned) = (ids(60), ids(90), ids(40));
        let bias: Vec<(u32, f32)> = ids(30).into_iter().zip((0..30).map(|i| i as f32 - 12.0)).collect();
        let row = SampleRow {
            temperature: (case % 3 > 0).then_some(0.8),
            top_k: [0, 0, 30][case % 3],
            repetition_penalty: [1.0, 1.3, 0.8, 1.0][case % 4],
            presence_penalty: [0.0, 0.4][case % 2],
            frequency_penalty: [0.3, 0.0, -0.2][case % 3],
            prompt: &prompt,
            output: &output,
            banned: &banned,
            logit_bias: &bias,
            uniform: case as f64 / 6.0,
            ..PLAIN
        };
        let everything: Vec<u32> = (0..vocab as u32).collect();
        let all_but_one: Vec<u32> = (0..vocab as u32).filter(|id| *id != 77).collect();
        let rows = [
            row,
            SampleRow::default(),
            SampleRow { banned: &everything, ..row },
            SampleRow { banned: &all_but_one, ..row },
        ];
        let logits = normal(&mut rng, rows.len() * vocab, 2.0);
        compare(Format::F32, &logits, &rows, case as u32, "edits");
    }
}

/// The same bits in any company: the row alone, among others, in any order of threads.
#[test]
fn rows_do_not_see_each_other() {
    if !available() {
        return;
    }
    let mut rng = rng(34);
    let vocab = 700;
    let rows = [
        SampleRow { top_p: 0.9, uniform: 0.3, ..PLAIN },
        SampleRow::default(),
        SampleRow { top_k: 50, uniform: 0.8, ..PLAIN },
        SampleRow { uniform: 0.6, logit_bias: &[(3, 5.0)], ..PLAIN },
    ];
    let logits = normal(&mut rng, rows.len() * vocab, 1.5);
    let together = choose(Format::F32, &logits, &rows, 0);
    for seed in [1, 5] {
        assert_eq!(choose(Format::F32, &logits, &rows, seed), together);
    }
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(choose(Format::F32, &logits[i * vocab..][..vocab], &[*row], 0), together[i..=i]);
    }
}
