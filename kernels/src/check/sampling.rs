//! Tokens chosen on the device, beside those that the plain formula chooses for the same random numbers.

use candle_core::{DType, Device, Tensor};

use super::{Checker, Pair, Random, put};
use crate::error::Result;
use crate::ops::{self, SampleRow};

/// Rows and tokens: one of each, odd, a large vocabulary, more rows than multiprocessors.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 37), (5, 4099), (64, 32000), (1, 151_936), (200, 1000)];
/// `top_k`, `top_p`, `min_p`
const CUTS: [(u32, f32, f32); 7] = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.05),
    (40, 0.8, 0.01),
    (3000, 0.999, 0.0),
];

pub(super) fn check(checker: &mut Checker<'_>) {
    for &dtype in checker.dtypes() {
        // The same tokens, not nearly the same.
        checker.run(format!("sample {}", dtype.as_str()), 0.0, |random, device, check| {
            for (rows, vocab) in SHAPES {
                check(chosen(random, device, (rows, vocab), dtype)?)?;
            }
            check(not_finite(random, device, dtype)?)
        });
    }
}

/// Rows of all kinds: greedy, drawn, cut, with penalties, biases and bans.
fn chosen(random: &mut Random, device: &Device, (rows, vocab): (usize, usize), dtype: DType) -> Result<Pair> {
    // Between -8 and 8; in bf16 many are equal.
    let logits = (random.tensor(&[rows, vocab], DType::F32)? * 8.0)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(vocab) as u32).collect() };
    let (prompt, output, banned) = (ids(30), ids(50), ids(vocab.min(9)));
    let bias: Vec<(u32, f32)> = ids(6).into_iter().map(|id| (id, 2.5)).collect();
    let params: Vec<SampleRow<'_>> = (0..rows)
        .map(|row| {
            let (top_k, top_p, min_p) = CUTS[row % CUTS.len()];
            let edited = row % 3 == 1;
            SampleRow {
                temperature: (row % 5 != 4).then_some([1.0, 0.6, 1.5][row % 3]),
                top_k,
                top_p,
                min_p,
                repetition_penalty: if edited { 1.2 } else { 1.0 },
                presence_penalty: if edited { 0.5 } else { 0.0 },
                frequency_penalty: if edited { 0.1 } else { 0.0 },
                prompt: &prompt,
                output: &output,
                banned: if edited { &banned } else { &[] },
                logit_bias: if edited { &bias } else { &[] },
                uniform: random.below(1 << 24) as f64 / f64::from(1 << 24),
            }
        })
        .collect();
    let found = ops::sample(&put(&logits, dtype, device)?, &params)?;
    let mut wanted = Vec::with_capacity(rows);
    for (row, params) in params.iter().enumerate() {
        let mut logits = logits.get(row)?.to_vec1::<f32>()?;
        wanted.push(ops::sample_row(&mut logits, params));
    }
    pair(&found, &wanted, format!("{rows} rows of {vocab}"))
}

/// A row that holds NaN or infinity chooses nothing, and its neighbours do.
fn not_finite(random: &mut Random, device: &Device, dtype: DType) -> Result<Pair> {
    let vocab = 5000;
    let mut logits = random.tensor(&[6, vocab], dtype)?.to_vec2::<f32>()?;
    for (row, bad) in [(1, f32::NAN), (2, f32::INFINITY), (4, f32::NEG_INFINITY)] {
        logits[row][random.below(vocab)] = bad;
    }
    let drawn = SampleRow { temperature: Some(1.0), uniform: 0.5, ..SampleRow::default() };
    let params = [SampleRow::default(), drawn, SampleRow::default(), drawn, drawn, SampleRow::default()];
    let tensor = Tensor::new(logits.clone(), &Device::Cpu)?;
    let found = ops::sample(&put(&tensor, dtype, device)?, &params)?;
    let wanted: Vec<Option<u32>> =
        logits.iter_mut().zip(&params).map(|(logits, params)| ops::sample_row(logits, params)).collect();
    pair(&found, &wanted, "rows that are not finite".to_owned())
}

/// Ids as exact numbers; -1 for none.
fn pair(found: &[Option<u32>], wanted: &[Option<u32>], case: String) -> Result<Pair> {
    let tensor = |ids: &[Option<u32>]| {
        let ids: Vec<f32> = ids.iter().map(|id| id.map_or(-1.0, |id| id as f32)).collect();
        Tensor::new(ids, &Device::Cpu)
    };
    Ok(Pair { found: tensor(found)?, wanted: tensor(wanted)?, scale: None, case })
}
