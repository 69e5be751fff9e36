//! Sampling of one row in plain Rust: the formula, and the oracle of the device kernels.

use super::{SampleRow, edits_of};

/// Chooses a token from `logits`, which are overwritten; `None` if one of them is NaN or infinite, or there is none.
///
/// Same result as the engine's own sampler for the same random number: logits are scaled in f32 with the largest taken
/// off first; without `top_k` and `top_p` weights are f32 and tokens are drawn in order of their ids, else weights are
/// f64 and tokens are drawn likeliest first, lower ids first among equals.
#[must_use]
pub fn sample_row(logits: &mut [f32], row: &SampleRow<'_>) -> Option<u32> {
    if logits.is_empty() || logits.iter().any(|logit| !logit.is_finite()) {
        return None;
    }
    for edit in edits_of(row, logits.len()) {
        if let Some(logit) = logits.get_mut(edit.id as usize) {
            *logit = edit.apply(*logit);
        }
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let Some(temperature) = row.temperature else {
        return Some(logits.iter().position(|logit| *logit == max).unwrap_or(0) as u32);
    };
    // The maximum is taken off first, so that a small temperature cannot overflow.
    logits.iter_mut().for_each(|logit| *logit = (*logit - max) / temperature);
    let min_logit = if row.min_p > 0.0 { row.min_p.ln() } else { f32::NEG_INFINITY };
    let top_k = if row.top_k == 0 { usize::MAX } else { row.top_k as usize };
    if top_k >= logits.len() && row.top_p >= 1.0 {
        let kept = logits.iter().map(|logit| if *logit >= min_logit { logit.exp() } else { 0.0 });
        let kept: Vec<f64> = kept.map(f64::from).collect();
        return Some(draw(kept.iter().copied().enumerate(), row.uniform) as u32);
    }
    let kept = likeliest(logits, min_logit, top_k, row.top_p);
    Some(draw(kept.iter().copied(), row.uniform) as u32)
}

/// The tokens that `min_p`, `top_k` and `top_p` leave, with their weights, likeliest first.
fn likeliest(logits: &[f32], min_logit: f32, top_k: usize, top_p: f32) -> Vec<(usize, f64)> {
    let is_left = |logit: &f32| *logit >= min_logit && logit.is_finite();
    let mut left: Vec<(usize, f32)> =
        logits.iter().copied().enumerate().filter(|(_, logit)| is_left(logit)).collect();
    left.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    left.truncate(top_k);
    let weighted: Vec<(usize, f64)> =
        left.into_iter().map(|(id, logit)| (id, f64::from(logit).exp())).collect();
    if top_p >= 1.0 {
        return weighted;
    }
    let enough = f64::from(top_p) * weighted.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let reached = weighted.iter().position(|(_, weight)| {
        sum += weight;
        sum >= enough
    });
    weighted[..reached.map_or(weighted.len(), |last| last + 1)].to_vec()
}

/// The first token at which the running sum of weights exceeds `uniform` times their total; the last one with a weight
/// if rounding leaves none.
fn draw(weighted: impl Iterator<Item = (usize, f64)> + Clone, uniform: f64) -> usize {
    let total: f64 = weighted.clone().map(|(_, weight)| weight).sum();
    let mut left = uniform * total;
    let mut last = 0;
    for (id, weight) in weighted.filter(|(_, weight)| *weight > 0.0) {
        left -= weight;
        last = id;
        if left < 0.0 {
            break;
        }
    }
    last
}
