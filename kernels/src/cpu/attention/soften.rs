//! The online softmax between products of bf16 pairs, for sixteen rows at a time.
//!
//! Weights are rounded to bf16, so `2^x` needs only some more bits than these, and what is normal stays in registers: a
//! chunk whose scores are all below a row's greatest so far, and seen as a whole, is what most are.

use std::arch::x86_64::*;
use std::ops::Range;

use super::pairs::{Scores, Weights};
use super::softmax::{Softmax, positive_zeros};
use super::{CHUNK, TILES};
use crate::cpu::amx::TILE_ROWS;
use crate::cpu::exp2::exp2;
use crate::cpu::simd::{LANES, Simd};
use crate::ops::AttnParams;

/// Scales of the keys and values of a chunk of bytes.
pub(super) type Scales<'a> = (&'a [f32; CHUNK], &'a [f32; CHUNK]);

/// The softmax of a segment on its way. Scores count in powers of two here.
pub(super) struct Segment {
    /// What is asked for last, `row_max` times `log2(e)` until then.
    softmax: Softmax,
    /// `[rows][16]`: each row's sum of weights, still in sixteen parts.
    lanes: Vec<f32>,
}

/// Sixteen rows of a segment.
pub(super) struct SegmentRows<'a> {
    /// `[16]`
    row_max: &'a mut [f32],
    /// `[16][16]`
    lanes: &'a mut [f32],
    /// `[16][features]`
    pub(super) sums: &'a mut [f32],
}

impl Segment {
    pub(super) fn new(num_rows: usize, padded: usize) -> Self {
        Self { softmax: Softmax::new(num_rows, padded), lanes: vec![0.0; num_rows * LANES] }
    }

    pub(super) fn rows_from(&mut self, first: usize) -> SegmentRows<'_> {
        let padded = self.softmax.padded();
        SegmentRows {
            row_max: &mut self.softmax.row_max[first..][..TILE_ROWS],
            lanes: &mut self.lanes[first * LANES..][..TILE_ROWS * LANES],
            sums: &mut self.softmax.sums[first * padded..][..TILE_ROWS * padded],
        }
    }

    /// The segment's softmax; complete, so nothing may be added until it is cleared.
    ///
    /// # Safety
    /// The instruction set of `S`.
    #[inline(always)]
    pub(super) unsafe fn softmax<S: Simd>(&mut self) -> &Softmax {
        let Softmax { row_max, row_sum, sums } = &mut self.softmax;
        for ((max, sum), lanes) in row_max.iter_mut().zip(row_sum).zip(self.lanes.as_chunks::<LANES>().0) {
            *max *= std::f32::consts::LN_2;
            // SAFETY: sixteen lanes; the instruction set is given.
            *sum = unsafe { S::sum(S::load(lanes.as_ptr())) };
        }
        // SAFETY: whole vectors; the instruction set is given.
        unsafe { positive_zeros::<S>(sums) };
        &self.softmax
    }

    pub(super) fn clear(&mut self) {
        self.softmax.clear();
        self.lanes.fill(0.0);
    }
}

/// Turns scores of one chunk into unnormalised weights, 0 outside of what each row has `seen`, and rescales what came before.
/// `weights` are 0 where a row sees nothing of the chunk.
///
/// # Safety
/// AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn soften(
    scores: &Scores,
    seen: &[Range<usize>; TILE_ROWS],
    (params, scales): (&AttnParams, Option<Scales<'_>>),
    rows: &mut SegmentRows<'_>,
    weights: &mut Weights,
) {
    let padded = rows.sums.len() / TILE_ROWS;
    // Of two neighbours each the upper half: bf16 of sixteen f32 and of sixteen more.
    let upper = _mm512_add_epi16(
        _mm512_slli_epi16::<1>(_mm512_set_epi16(
            31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
            6, 5, 4, 3, 2, 1, 0,
        )),
        _mm512_set1_epi16(1),
    );
    for (row, seen) in seen.iter().enumerate().filter(|(_, seen)| !seen.is_empty()) {
        let mut x = powers(&scores.0[row], (params, scales));
        if *seen != (0..CHUNK) {
            let bits = u64::MAX >> (64 - seen.len()) << seen.start;
            for (i, x) in x.iter_mut().enumerate() {
                let unseen = !(bits >> (i * LANES)) as u16;
                *x = _mm512_mask_mov_ps(*x, unseen, _mm512_set1_ps(f32::NEG_INFINITY));
            }
        }
        let old = rows.row_max[row];
        let max = x[1..].iter().fold(x[0], |max, x| _mm512_max_ps(max, *x));
        if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, _mm512_set1_ps(old)) != 0 {
            let new = _mm512_reduce_max_ps(max);
            if old != f32::NEG_INFINITY {
                let factor = exp2(_mm512_set1_ps(old - new));
                let sums = &mut rows.sums[row * padded..][..padded];
                let lanes = &mut rows.lanes[row * LANES..][..LANES];
                for values in sums.chunks_exact_mut(LANES).chain([lanes]) {
                    // SAFETY: sixteen numbers.
                    unsafe {
                        let scaled = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), factor);
                        _mm512_storeu_ps(values.as_mut_ptr(), scaled);
                    }
                }
            }
            rows.row_max[row] = new;
        }
        let max = _mm512_set1_ps(rows.row_max[row]);
        let lanes = rows.lanes[row * LANES..][..LANES].as_mut_ptr();
        // SAFETY: sixteen numbers.
        let mut total = unsafe { _mm512_loadu_ps(lanes) };
        let mut halves = [_mm512_setzero_si512(); TILES];
        for (i, (x, half)) in x.iter().zip(&mut halves).enumerate() {
            let weight = exp2(_mm512_sub_ps(*x, max));
            // What is rounded here is a weight times a scale, which says little about the weight.
            let scaled = match scales {
                // SAFETY: a scale for each key of the chunk.
                Some((_, scales)) => unsafe {
                    _mm512_mul_ps(weight, _mm512_loadu_ps(scales.as_ptr().add(i * LANES)))
                },
                None => weight,
            };
            *half = _mm512_add_epi32(_mm512_castps_si512(scaled), _mm512_set1_epi32(0x8000));
            let rounded = _mm512_and_si512(*half, _mm512_set1_epi32(!0xffff));
            let counted = if scales.is_some() { weight } else { _mm512_castsi512_ps(rounded) };
            total = _mm512_add_ps(total, counted);
        }
        // SAFETY: sixteen numbers, and the weights of a chunk.
        unsafe {
            _mm512_storeu_ps(lanes, total);
            for (i, pair) in halves.as_chunks::<2>().0.iter().enumerate() {
                let both = _mm512_permutex2var_epi16(pair[0], upper, pair[1]);
                _mm512_storeu_si512(weights.0[row].as_mut_ptr().add(2 * i * LANES).cast(), both);
            }
        }
    }
}

/// What two is raised to for each score of a row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn powers(scores: &[f32; CHUNK], (params, scales): (&AttnParams, Option<Scales<'_>>)) -> [__m512; TILES] {
    let scale = match params.softcap {
        Some(_) => params.scale,
        None => params.scale * std::f32::consts::LOG2_E,
    };
    let mut x = [_mm512_setzero_ps(); TILES];
    for (i, x) in x.iter_mut().enumerate() {
        // SAFETY: sixteen scores of a row, and scales of their keys.
        unsafe {
            *x = _mm512_loadu_ps(scores.as_ptr().add(i * LANES));
            if let Some((scales, _)) = scales {
                *x = _mm512_mul_ps(*x, _mm512_loadu_ps(scales.as_ptr().add(i * LANES)));
            }
        }
        *x = _mm512_mul_ps(*x, _mm512_set1_ps(scale));
        if let Some(cap) = params.softcap {
            let mut capped = [0.0_f32; LANES];
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(capped.as_mut_ptr(), *x) };
            let capped = capped.map(|x| cap * (x / cap).tanh() * std::f32::consts::LOG2_E);
            // SAFETY: as above.
            *x = unsafe { _mm512_loadu_ps(capped.as_ptr()) };
        }
    }
    x
}
