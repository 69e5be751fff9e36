//! The online softmax.

use super::{CHUNK, TILES};
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{LANES, Simd};
use crate::ops::AttnParams;

/// A softmax on its way: of some keys, for each row of a piece.
pub(super) struct Softmax {
    /// `[rows]`: the score that weights are relative to, the largest or near it.
    pub(super) row_max: Scratch<f32>,
    /// `[rows]`: the sum of the weights; 0 if the row sees none of the keys.
    pub(super) row_sum: Scratch<f32>,
    /// `[rows][padded features]`: the sum of the weighted values.
    pub(super) sums: Scratch<f32>,
}

impl Softmax {
    pub(super) fn new(num_rows: usize, padded: usize) -> Self {
        Self {
            row_max: Scratch::filled(num_rows, f32::NEG_INFINITY),
            row_sum: Scratch::filled(num_rows, 0.0),
            sums: Scratch::filled(num_rows * padded, 0.0),
        }
    }

    /// Features of a row of sums.
    pub(super) fn padded(&self) -> usize {
        self.sums.len() / self.row_max.len().max(1)
    }

    pub(super) fn clear(&mut self) {
        self.row_max.fill(f32::NEG_INFINITY);
        self.row_sum.fill(0.0);
        self.sums.fill(0.0);
    }
}

/// Adds the keys of `part`, which come after those of `total`.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn join<S: Simd>(total: &mut Softmax, part: &Softmax) {
    let (num_rows, padded) = (total.row_max.len(), total.padded());
    for first in (0..num_rows).step_by(LANES) {
        let rows = first..num_rows.min(first + LANES);
        // SAFETY: the instruction set is given.
        let [max, old, new] =
            unsafe { factors::<S>(&total.row_max[rows.clone()], &part.row_max[rows.clone()]) };
        for (row, ((max, old), new)) in rows.zip(max.into_iter().zip(old).zip(new)) {
            let (part_sums, sums) =
                (&part.sums[row * padded..][..padded], &mut total.sums[row * padded..][..padded]);
            // NaN is not zero: it is joined, and so seen.
            if part.row_sum[row] == 0.0 {
                continue;
            }
            if total.row_sum[row] == 0.0 {
                (total.row_max[row], total.row_sum[row]) = (part.row_max[row], part.row_sum[row]);
                sums.copy_from_slice(part_sums);
                continue;
            }
            total.row_max[row] = max;
            total.row_sum[row] = old * total.row_sum[row] + new * part.row_sum[row];
            // SAFETY: both are whole vectors; the instruction set is given.
            unsafe {
                let (old, new) = (S::splat(old), S::splat(new));
                for i in (0..padded).step_by(LANES) {
                    let p = sums.as_mut_ptr().add(i);
                    let added = S::mul(new, S::load(part_sums.as_ptr().add(i)));
                    S::store(p, S::fma(old, S::load(p), added));
                }
            }
        }
    }
}

/// For up to sixteen rows the greater of `total` and `part`, and what sums that are relative to each are multiplied by.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn factors<S: Simd>(total: &[f32], part: &[f32]) -> [[f32; LANES]; 3] {
    let (mut old, mut new) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    old[..total.len()].copy_from_slice(total);
    new[..part.len()].copy_from_slice(part);
    let max: [f32; LANES] = std::array::from_fn(|row| old[row].max(new[row]));
    // SAFETY: sixteen numbers each; the instruction set is given.
    unsafe {
        for from in [&mut old, &mut new] {
            let difference = S::sub(S::load(from.as_ptr()), S::load(max.as_ptr()));
            *from = S::to_array(S::exp(difference));
        }
    }
    [max, old, new]
}

/// Turns -0 into 0: which of the two a sum is may depend on how many zeros were added.
///
/// # Safety
/// `sums` is whole vectors; the instruction set of `S`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[inline(always)]
pub(super) unsafe fn positive_zeros<S: Simd>(sums: &mut [f32]) {
    for sums in sums.chunks_exact_mut(LANES) {
        // SAFETY: sixteen elements; the instruction set is given.
        unsafe { S::store(sums.as_mut_ptr(), S::add(S::load(sums.as_ptr()), S::splat(0.0))) };
    }
}

/// `scores[key] *= scales[key]`
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd>(scores: &mut [f32], scales: &[f32; CHUNK]) {
    let scores = &mut scores[..CHUNK];
    for i in (0..CHUNK).step_by(LANES) {
        // SAFETY: both are CHUNK long; the instruction set is given.
        unsafe {
            let p = scores.as_mut_ptr().add(i);
            S::store(p, S::mul(S::load(p), S::load(scales.as_ptr().add(i))));
        }
    }
}

/// Turns a row's scores of one chunk into unnormalised weights (0 outside of `seen`) and rescales what came before.
#[inline(always)]
pub(super) unsafe fn soften<S: Simd>(
    scores: &mut [f32],
    seen: std::ops::Range<usize>,
    params: &AttnParams,
    row_max: &mut f32,
    row_sum: &mut f32,
    sums: &mut [f32],
) {
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    for score in &mut scores[seen] {
        *score *= params.scale;
        if let Some(cap) = params.softcap {
            *score = cap * (*score / cap).tanh();
        }
    }
    // SAFETY: `scores` is CHUNK long, `sums` whole vectors; the instruction set is given.
    unsafe {
        let mut max = S::load(scores.as_ptr());
        for t in 1..TILES {
            max = S::max(max, S::load(scores.as_ptr().add(t * LANES)));
        }
        let max = S::max_lane(max).max(*row_max);
        if *row_max != max && *row_sum > 0.0 {
            let factor = S::to_array(S::exp(S::splat(*row_max - max)))[0];
            *row_sum *= factor;
            for i in (0..sums.len()).step_by(LANES) {
                let p = sums.as_mut_ptr().add(i);
                S::store(p, S::mul(S::load(p), S::splat(factor)));
            }
        }
        *row_max = max;
        let mut total = S::splat(0.0);
        for t in 0..TILES {
            let p = scores.as_mut_ptr().add(t * LANES);
            let weight = S::exp(S::sub(S::load(p), S::splat(max)));
            S::store(p, weight);
            total = S::add(total, weight);
        }
        *row_sum += S::sum(total);
    }
}
