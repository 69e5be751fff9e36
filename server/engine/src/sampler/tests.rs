use proptest::prelude::*;

use super::*;

fn params() -> SamplingParams {
    SamplingParams::default()
}

fn spec(seed: u64, num_output: usize) -> SampleSpec {
    SampleSpec { choice: 0, num_output, output: vec![], seed, banned: vec![] }
}

fn pick_with(
    row: &[f32],
    sampling: &SamplingParams,
    prompt: &[u32],
    spec: &SampleSpec,
) -> (u32, Option<TokenLogprobs>) {
    let request = Request { prompt: prompt.to_vec(), sampling: sampling.clone(), ..Request::default() };
    match sample(row, &request, spec) {
        SampleResult::Token { id, logprobs } => (id, logprobs),
        SampleResult::NonFinite | SampleResult::Failed(_) => panic!("the row is finite"),
    }
}

fn pick(row: &[f32], sampling: &SamplingParams, spec: &SampleSpec) -> u32 {
    pick_with(row, sampling, &[], spec).0
}

/// How often each token is drawn in `count` positions.
fn histogram(row: &[f32], sampling: &SamplingParams, count: usize) -> Vec<usize> {
    let mut seen = vec![0; row.len()];
    for position in 0..count {
        seen[pick(row, sampling, &spec(42, position)) as usize] += 1;
    }
    seen
}

fn drawn(row: &[f32], sampling: &SamplingParams) -> Vec<usize> {
    let seen = histogram(row, sampling, 4000);
    (0..row.len()).filter(|id| seen[*id] > 0).collect()
}

/// Logits of these probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

fn chi_square(seen: &[usize], probabilities: &[f64]) -> f64 {
    let total: usize = seen.iter().sum();
    let parts = seen.iter().zip(probabilities).map(|(seen, p)| {
        let expected = p * total as f64;
        (*seen as f64 - expected).powi(2) / expected
    });
    parts.sum()
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.4, 0.3, 0.15, 0.1, 0.05];
    let row = logits(&[0.4, 0.3, 0.15, 0.1, 0.05]);
    // 99.9 % of honest samples are below 18.5 at four degrees of freedom; the seed is fixed.
    let plain = histogram(&row, &params(), 20_000);
    assert!(chi_square(&plain, &probabilities) < 18.5, "{plain:?}");
    // The sorted way to draw, which top_p = 1 - eps takes.
    let sorted = histogram(&row, &SamplingParams { top_p: 0.999_99, ..params() }, 20_000);
    assert!(chi_square(&sorted, &probabilities) < 18.5, "{sorted:?}");
    let hot = histogram(&row, &SamplingParams { temperature: 2.0, ..params() }, 20_000);
    let roots: Vec<f64> = probabilities.iter().map(|p| p.sqrt()).collect();
    let sum: f64 = roots.iter().sum();
    let roots: Vec<f64> = roots.iter().map(|root| root / sum).collect();
    assert!(chi_square(&hot, &roots) < 18.5, "{hot:?}");
    // And the test itself can fail.
    assert!(chi_square(&hot, &probabilities) > 100.0);
}

#[test]
fn cut_offs_keep_exactly_their_sets() {
    let row = logits(&[0.05, 0.4, 0.1, 0.3, 0.15]);
    let set = |change: fn(&mut SamplingParams)| {
        let mut params = params();
        change(&mut params);
        drawn(&row, &params)
    };
    assert_eq!(set(|_| {}), [0, 1, 2, 3, 4]);
    assert_eq!(set(|p| p.top_k = 1), [1]);
    assert_eq!(set(|p| p.top_k = 3), [1, 3, 4]);
    assert_eq!(set(|p| p.top_k = 100), [0, 1, 2, 3, 4]);
    assert_eq!(set(|p| p.top_p = 0.39), [1]);
    assert_eq!(set(|p| p.top_p = 0.65), [1, 3]);
    assert_eq!(set(|p| p.top_p = 0.75), [1, 3, 4]);
    assert_eq!(set(|p| p.top_p = 1e-9), [1]);
    assert_eq!(set(|p| p.min_p = 0.3), [1, 3, 4]);
    assert_eq!(set(|p| p.min_p = 1.0), [1]);
    // top_p is a share of what top_k leaves: 0.4 and 0.3 of 0.7.
    assert_eq!(set(|p| (p.top_k, p.top_p) = (2, 0.5)), [1]);
    assert_eq!(set(|p| (p.top_k, p.top_p) = (2, 0.6)), [1, 3]);
}

#[test]
fn equal_logits_go_to_the_lowest_id() {
    let row = [1.0, 3.0, 3.0, 3.0, 2.0];
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    assert_eq!(pick(&row, &greedy, &spec(0, 0)), 1);
    assert_eq!(drawn(&row, &SamplingParams { top_k: 2, ..params() }), [1, 2]);
    let (_, logprobs) = pick_with(&row, &SamplingParams { logprobs: Some(3), ..greedy }, &[], &spec(0, 0));
    let top: Vec<u32> = logprobs.expect("asked for").top.iter().map(|(id, _)| *id).collect();
    assert_eq!(top, [1, 2, 3]);
}

#[test]
fn bias_bans_and_penalties_move_the_greedy_choice() {
    let row = [1.0, 5.0, 4.5, -1.0];
    let greedy = SamplingParams { temperature: 0.0, ..params() };
    let with = |change: fn(&mut SamplingParams), prompt: &[u32], output: &[u32], banned: &[u32]| {
        let mut params = greedy.clone();
        change(&mut params);
        let spec = SampleSpec { output: output.to_vec(), banned: banned.to_vec(), ..spec(0, output.len()) };
        pick_with(&row, &params, prompt, &spec).0
    };
    assert_eq!(with(|_| {}, &[1], &[1], &[]), 1);
    assert_eq!(with(|p| p.logit_bias = vec![(3, 100.0)], &[], &[], &[]), 3);
    assert_eq!(with(|p| p.logit_bias = vec![(1, -100.0)], &[], &[], &[]), 2);
    assert_eq!(with(|_| {}, &[], &[], &[1]), 2);
    assert_eq!(with(|_| {}, &[], &[], &[1, 2, 1, 77]), 0);
    // A ban of everything bans nothing.
    assert_eq!(with(|_| {}, &[], &[], &[0, 1, 2, 3]), 1);
    // Presence counts once, frequency each time, both only the answer.
    assert_eq!(with(|p| p.presence_penalty = 1.0, &[], &[1, 1], &[]), 2);
    assert_eq!(with(|p| p.presence_penalty = 1.0, &[1], &[], &[]), 1);
    assert_eq!(with(|p| p.presence_penalty = 0.4, &[], &[1, 1, 1], &[]), 1);
    assert_eq!(with(|p| p.frequency_penalty = 0.4, &[], &[1], &[]), 1);
    assert_eq!(with(|p| p.frequency_penalty = 0.4, &[], &[1, 1], &[]), 2);
    // Repetition counts the prompt too, and makes negative logits more so.
    assert_eq!(with(|p| p.repetition_penalty = 1.2, &[1], &[], &[]), 2);
    assert_eq!(with(|p| p.repetition_penalty = 0.1, &[0], &[], &[]), 0);
    let mut only_negative = [-1.0, -1.1];
    penalize(&mut only_negative, &SamplingParams { repetition_penalty: 2.0, ..params() }, &[0], &[]);
    assert_eq!(only_negative, [-2.0, -1.1]);
}

#[test]
fn extremes_stay_finite() {
    let row = [f32::MAX, f32::MIN, 1e38, -1e38];
    for temperature in [1e-5, 1e-3, 2.0] {
        let params = SamplingParams { temperature, logprobs: Some(4), ..params() };
        let (id, logprobs) = pick_with(&row, &params, &[], &spec(0, 0));
        assert_eq!(id, 0);
        let logprobs = logprobs.expect("asked for");
        assert!(logprobs.top.iter().all(|(_, p)| p.is_finite() && *p <= 0.0), "{logprobs:?}");
    }
    let params = SamplingParams { repetition_penalty: f32::MIN_POSITIVE, temperature: 0.0, ..params() };
    assert_eq!(pick_with(&row, &params, &[2], &spec(0, 0)).0, 0);
}

#[test]
fn a_row_with_one_bad_value_is_refused_wherever_it_is() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in 0..9 {
            let mut row = [0.5_f32; 9];
            row[at] = bad;
            let request = Request::default();
            assert_eq!(sample(&row, &request, &spec(0, 0)), SampleResult::NonFinite);
            assert_eq!(token_logprobs(&row, 0, 2), Err(NonFinite));
        }
    }
    assert_eq!(token_logprobs(&[], 0, 2), Err(NonFinite));
}

#[test]
fn seed_choice_and_position_each_make_another_draw() {
    let row = vec![0.0; 1000];
    let draw =
        |seed, choice, num_output| pick(&row, &params(), &SampleSpec { choice, ..spec(seed, num_output) });
    assert_eq!(draw(1, 0, 5), draw(1, 0, 5));
    let different = [draw(1, 0, 5), draw(2, 0, 5), draw(1, 1, 5), draw(1, 0, 6)];
    let mut unique = different.to_vec();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), 4, "{different:?}");
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    let row = logits(&[0.5, 0.3, 0.2]);
    let params =
        SamplingParams { logprobs: Some(2), logit_bias: vec![(2, 100.0)], temperature: 0.5, ..params() };
    let (id, logprobs) = pick_with(&row, &params, &[], &spec(0, 0));
    let logprobs = logprobs.expect("asked for");
    assert_eq!(id, 2);
    assert!((logprobs.logprob - 0.2_f32.ln()).abs() < 1e-5, "{logprobs:?}");
    assert_eq!(logprobs.top.len(), 2);
    assert!((logprobs.top[0].1 - 0.5_f32.ln()).abs() < 1e-5 && logprobs.top[0].0 == 0);
}

fn row() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-30.0..30.0_f32, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn probabilities_sum_to_one_and_descend(row in row(), k in 0..300_usize) {
        let scores = token_logprobs(&row, 0, k).expect("finite");
        prop_assert_eq!(scores.top.len(), k.min(row.len()));
        let pairs: Vec<(f32, u32)> = scores.top.iter().map(|(id, p)| (-p, *id)).collect();
        prop_assert!(pairs.windows(2).all(|w| w[0].0 <= w[1].0));
        let all = token_logprobs(&row, 0, row.len()).expect("finite");
        let sum: f64 = all.top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
        prop_assert!((sum - 1.0).abs() < 1e-4, "{}", sum);
        // The same set as a full sort gives.
        let mut sorted: Vec<(u32, f32)> = row.iter().copied().enumerate().map(|(i, l)| (i as u32, l)).collect();
        sorted.sort_by(likelier);
        let ids: Vec<u32> = sorted.iter().take(k).map(|(id, _)| *id).collect();
        prop_assert_eq!(scores.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
    }

    /// Against the plain way: sort everything, then cut.
    #[test]
    fn the_kept_tokens_are_those_of_a_full_sort(
        row in row(), top_k in 1..320_usize, top_p in 0.01..1.0_f32, min_p in 0.0..0.5_f32,
    ) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shifted: Vec<f32> = row.iter().map(|l| l - max).collect();
        let min_logit = if min_p > 0.0 { min_p.ln() } else { f32::NEG_INFINITY };
        let kept = likeliest(&shifted, min_logit, top_k, top_p);
        let mut sorted: Vec<(u32, f32)> = shifted.iter().copied().enumerate().map(|(i, l)| (i as u32, l)).collect();
        sorted.retain(|(_, l)| *l >= min_logit);
        sorted.sort_by(likelier);
        sorted.truncate(top_k);
        let all: f64 = sorted.iter().map(|(_, l)| f64::from(*l).exp()).sum();
        let mut sum = 0.0;
        let mut count = 0;
        while count < sorted.len() && sum < f64::from(top_p) * all {
            sum += f64::from(sorted[count].1).exp();
            count += 1;
        }
        // The sums are of different order, so the last token may fall either way at the very edge.
        prop_assert!(kept.len().abs_diff(count) <= 1 && !kept.is_empty());
        for (kept, sorted) in kept.iter().zip(&sorted) {
            prop_assert_eq!(kept.0, sorted.0);
        }
    }

    #[test]
    fn any_parameters_give_a_token(
        row in row(), temperature in 0.0..2.0_f32, top_p in 0.001..=1.0_f32, top_k in 0..400_u32,
        min_p in 0.0..=1.0_f32, penalty in 0.01..10.0_f32, seed: u64, output in prop::collection::vec(0..400_u32, 0..20),
    ) {
        let params = SamplingParams {
            temperature, top_p, top_k, min_p, repetition_penalty: penalty, frequency_penalty: 1.0,
            logprobs: Some(3), ..params()
        };
        let spec = SampleSpec { output, ..spec(seed, 3) };
        let (id, logprobs) = pick_with(&row, &params, &[], &spec);
        prop_assert!((id as usize) < row.len());
        prop_assert!(logprobs.expect("asked for").logprob.is_finite());
        // The same again.
        prop_assert_eq!(id, pick(&row, &params, &spec));
    }
}

/// What devices sample by is the same rule: same random number, same token.
#[test]
fn rows_for_devices_choose_the_same_tokens() {
    use ingle_models::{SampleRow, sample_row};
    use rand::Rng;

    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for case in 0..3000_usize {
        let vocab = rng.random_range(1..400_usize);
        // Every other row in steps of an eighth, as bf16 logits often are: many are equal.
        let row: Vec<f32> = (0..vocab)
            .map(|_| rng.random_range(-6.0..6.0_f32))
            .map(|logit| if case % 2 == 0 { logit } else { (logit * 8.0).round() / 8.0 })
            .collect();
        let mut ids = |count| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..440)).collect() };
        let (prompt, output, banned, biased) = (ids(case % 7), ids(case % 11), ids(case % 4), ids(case % 3));
        let mut pick = |values: &[f32]| values[rng.random_range(0..values.len())];
        let sampling = SamplingParams {
            temperature: pick(&[0.0, 0.3, 1.0, 1.7]),
            top_p: pick(&[1.0, 1.0, 0.95, 0.5, 0.01]),
            top_k: pick(&[0.0, 0.0, 1.0, 20.0, 300.0]) as u32,
            min_p: pick(&[0.0, 0.0, 0.05, 1.0]),
            repetition_penalty: pick(&[1.0, 1.3, 0.7]),
            presence_penalty: pick(&[0.0, 0.0, 0.5]),
            frequency_penalty: pick(&[0.0, 0.0, -0.4]),
            logit_bias: biased.iter().map(|id| (*id, pick(&[-100.0, -1.0, 3.5]))).collect(),
            ..SamplingParams::default()
        };
        let spec = SampleSpec { choice: 0, num_output: output.len(), output, seed: case as u64, banned };
        let device_row = SampleRow {
            temperature: (!sampling.is_greedy()).then_some(sampling.temperature),
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            prompt: &prompt,
            output: &spec.output,
            banned: &spec.banned,
            logit_bias: &sampling.logit_bias,
            uniform: uniform(&spec),
        };
        let (wanted, _) = pick_with(&row, &sampling, &prompt, &spec);
        assert_eq!(sample_row(&mut row.clone(), &device_row), Some(wanted), "case {case}: {device_row:?}");
    }
}
