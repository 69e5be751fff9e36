#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};

use super::*;

fn choose(logits: &[f32], row: &SampleRow<'_>) -> Option<u32> {
    let tensor = Tensor::from_slice(logits, (1, logits.len()), &Device::Cpu).unwrap();
    sample(&tensor, std::slice::from_ref(row)).unwrap()[0]
}

/// Ids drawn as the random number goes through `[0, 1)`, without repeats of the same one in a row.
fn drawn_in_order(logits: &[f32], row: SampleRow<'_>) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..4096)
        .map(|i| choose(logits, &SampleRow { uniform: f64::from(i) / 4096.0, ..row }).unwrap())
        .collect();
    ids.dedup();
    ids
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
    uniform: 0.0,
};

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    assert_eq!(choose(&[1.0, 3.0, 3.0, 2.0], &SampleRow::default()), Some(1));
    assert_eq!(choose(&[-2.0, -2.0], &SampleRow::default()), Some(0));
}

#[test]
fn rows_that_are_not_finite_choose_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(choose(&[1.0, bad, 0.0], &SampleRow::default()), None);
        assert_eq!(choose(&[1.0, bad, 0.0], &PLAIN), None);
    }
}

#[test]
fn all_tokens_are_drawn_by_id_and_a_few_by_likelihood() {
    let logits = [0.0, 2.0, 1.0, 2.0];
    assert_eq!(drawn_in_order(&logits, PLAIN), [0, 1, 2, 3]);
    assert_eq!(drawn_in_order(&logits, SampleRow { top_k: 3, ..PLAIN }), [1, 3, 2]);
    assert_eq!(drawn_in_order(&logits, SampleRow { top_k: 2, ..PLAIN }), [1, 3]);
    // Shares are .39 .39 .14 .05: 0.5 needs two, 0.8 needs three.
    assert_eq!(drawn_in_order(&logits, SampleRow { top_p: 0.3, ..PLAIN }), [1]);
    assert_eq!(drawn_in_order(&logits, SampleRow { top_p: 0.5, ..PLAIN }), [1, 3]);
    assert_eq!(drawn_in_order(&logits, SampleRow { top_p: 0.8, ..PLAIN }), [1, 3, 2]);
    // exp(-1) = .37 of the likeliest, exp(-2) = .14
    assert_eq!(drawn_in_order(&logits, SampleRow { min_p: 0.3, ..PLAIN }), [1, 2, 3]);
    assert_eq!(drawn_in_order(&logits, SampleRow { min_p: 0.3, top_k: 4, top_p: 0.99, ..PLAIN }), [1, 3, 2]);
}

#[test]
fn shares_follow_the_temperature() {
    let logits = [0.0, 3.0_f32.ln()];
    let first = |row: SampleRow<'_>| {
        let zeros = (0..1000).map(|i| SampleRow { uniform: f64::from(i) / 1000.0, ..row });
        zeros.filter(|row| choose(&logits, row) == Some(0)).count()
    };
    assert_eq!(first(PLAIN), 250);
    assert_eq!(first(SampleRow { temperature: Some(0.5), ..PLAIN }), 100);
}

#[test]
fn edits_keep_the_order_of_the_steps() {
    let row = SampleRow {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        prompt: &[3, 3, 9],
        output: &[1, 1, 3],
        banned: &[0, 0],
        logit_bias: &[(1, 4.0), (0, 100.0)],
        ..PLAIN
    };
    let mut logits = [5.0, 1.0, 5.0, -1.0];
    for edit in edits_of(&row, logits.len()) {
        logits[edit.id as usize] = edit.apply(logits[edit.id as usize]);
    }
    // 1: (1 + 4) / 2 - (0.5 + 2 * 0.25); 3: -1 * 2 - 0.75; 9 is outside.
    assert_eq!(logits, [f32::NEG_INFINITY, 1.5, 5.0, -2.75]);
    assert_eq!(choose(&[5.0, 1.0, 5.0, -1.0], &SampleRow { temperature: None, ..row }), Some(2));
}

#[test]
fn banning_everything_bans_nothing() {
    let row = SampleRow { banned: &[0, 1, 7], ..SampleRow::default() };
    assert_eq!(choose(&[1.0, 2.0], &row), Some(1));
    assert_eq!(choose(&[1.0, 2.0, 0.0], &row), Some(2));
}

#[test]
fn penalties_stay_finite() {
    let row = SampleRow { repetition_penalty: 2.0, output: &[0, 1], ..SampleRow::default() };
    assert_eq!(choose(&[f32::MIN, f32::MIN / 2.0], &row), Some(0));
}

#[test]
fn parameters_out_of_range_are_refused() {
    let logits = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
    for row in [
        SampleRow { temperature: Some(0.0), ..PLAIN },
        SampleRow { top_p: 0.0, ..PLAIN },
        SampleRow { min_p: 1.5, ..PLAIN },
        SampleRow { uniform: 1.0, ..PLAIN },
        SampleRow { repetition_penalty: f32::NAN, ..PLAIN },
        SampleRow { logit_bias: &[(0, f32::INFINITY)], ..PLAIN },
    ] {
        assert!(sample(&logits, &[row]).is_err(), "{row:?}");
    }
    assert!(sample(&logits, &[PLAIN, PLAIN]).is_err());
}
