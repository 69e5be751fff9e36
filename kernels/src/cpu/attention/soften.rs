//! The online softmax between products of bf16 pairs, for sixteen rows at a time.
//!
//! Weights are rounded to bf16, so `2^x` needs only some more bits than these, and what is normal stays in registers: a
//! chunk that is seen as a whole, and rises little above a row's greatest so far, is what most are.

use std::arch::x86_64::*;
use std::ops::Range;

use super::pairs::{Scores, Weights};
use super::softmax::Softmax;
use super::{CHUNK, TILES};
use crate::cpu::amx::TILE_ROWS;
use crate::cpu::exp2::exp2;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{LANES, Simd};
use crate::ops::AttnParams;

/// How far scores may rise above those that weights are relative to before what came before is rescaled: floats have as many
/// bits there, and after the first chunk of a segment nearly none has to be, which spares the branch a wrong guess.
const HEADROOM: f32 = 8.0;

/// Scales of the keys and values of a chunk of bytes.
pub(super) type Scales<'a> = (&'a [f32; CHUNK], &'a [f32; CHUNK]);

/// The softmax of a segment on its way. Scores count in powers of two here.
pub(super) struct Segment {
    /// What is asked for last, `row_max` times `log2(e)` until then.
    softmax: Softmax,
    /// `[rows][16]`: each row's sum of weights, still in sixteen parts.
    lanes: Scratch<f32>,
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
        Self { softmax: Softmax::new(num_rows, padded), lanes: Scratch::filled(num_rows * LANES, 0.0) }
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
        let Softmax { row_max, row_sum, .. } = &mut self.softmax;
        for ((max, sum), lanes) in
            row_max.iter_mut().zip(row_sum.iter_mut()).zip(self.lanes.as_chunks::<LANES>().0)
        {
            *max *= std::f32::consts::LN_2;
            // SAFETY: sixteen lanes; the instruction set is given.
            *sum = unsafe { S::sum(S::load(lanes.as_ptr())) };
        }
        &self.softmax
    }

    pub(super) fn clear(&mut self) {
        self.softmax.clear();
        self.lanes.fill(0.0);
    }
}

/// Turns scores of one chunk into unnormalised weights, 0 outside of what each row has `seen`, and rescales what came before.
/// `weights` are 0 where a row sees nothing of the chunk. No `seen`: all rows see all.
///
/// # Safety
/// AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn soften(
    scores: &Scores,
    seen: Option<&[Range<usize>; TILE_ROWS]>,
    (params, scales): (&AttnParams, Option<Scales<'_>>),
    rows: &mut SegmentRows<'_>,
    weights: &mut Weights,
) {
    let factor = params.scale * std::f32::consts::LOG2_E;
    let plain = scales.is_none() && params.softcap.is_none() && factor > 0.0;
    for (row, weights) in weights.0.iter_mut().enumerate() {
        let seen = seen.map_or(0..CHUNK, |seen| seen[row].clone());
        if seen.is_empty() {
            *weights = [0; CHUNK];
            continue;
        }
        let scores = &scores.0[row];
        let (mut x, factor) =
            if plain { (load(scores), factor) } else { (powers(scores, (params, scales)), 1.0) };
        if seen != (0..CHUNK) {
            hide(&mut x, seen);
        }
        let factor = _mm512_set1_ps(factor);
        let reference = rows.reference(row, _mm512_mul_ps(greatest(&x), factor));
        let exact = x.map(|x| exp2(_mm512_fmsub_ps(x, factor, reference)));
        // What is rounded here is a weight times a scale, which says little about the weight.
        let scaled = match scales {
            // SAFETY: a scale for each key of the chunk.
            Some((_, scales)) => std::array::from_fn(|i| unsafe {
                _mm512_mul_ps(exact[i], _mm512_loadu_ps(scales.as_ptr().add(i * LANES)))
            }),
            None => exact,
        };
        let halves = scaled.map(|x| _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
        let upper = |half| _mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(!0xffff)));
        let counted = if scales.is_some() { exact } else { halves.map(upper) };
        let lanes = rows.lanes[row * LANES..][..LANES].as_mut_ptr();
        // SAFETY: sixteen numbers, and the weights of a chunk.
        unsafe {
            let total = counted.iter().fold(_mm512_loadu_ps(lanes), |total, x| _mm512_add_ps(total, *x));
            _mm512_storeu_ps(lanes, total);
            for (i, pair) in halves.as_chunks::<2>().0.iter().enumerate() {
                let both = _mm512_permutex2var_epi16(pair[0], upper_halves(), pair[1]);
                _mm512_storeu_si512(weights.as_mut_ptr().add(2 * i * LANES).cast(), both);
            }
        }
    }
}

impl SegmentRows<'_> {
    /// What the row's scores are relative to from now on, where the greatest of those to come is in `max`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn reference(&mut self, row: usize, max: __m512) -> __m512 {
        let old = self.row_max[row];
        if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, _mm512_set1_ps(old + HEADROOM)) != 0 {
            let new = _mm512_reduce_max_ps(max);
            if old != f32::NEG_INFINITY {
                self.rescale(row, exp2(_mm512_set1_ps(old - new)));
            }
            self.row_max[row] = new;
        }
        _mm512_set1_ps(self.row_max[row])
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn rescale(&mut self, row: usize, factor: __m512) {
        let padded = self.sums.len() / TILE_ROWS;
        let sums = &mut self.sums[row * padded..][..padded];
        let lanes = &mut self.lanes[row * LANES..][..LANES];
        for values in sums.chunks_exact_mut(LANES).chain([lanes]) {
            // SAFETY: sixteen numbers.
            unsafe {
                let scaled = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), factor);
                _mm512_storeu_ps(values.as_mut_ptr(), scaled);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(scores: &[f32; CHUNK]) -> [__m512; TILES] {
    // SAFETY: sixteen scores each.
    std::array::from_fn(|i| unsafe { _mm512_loadu_ps(scores.as_ptr().add(i * LANES)) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn greatest(x: &[__m512; TILES]) -> __m512 {
    _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]))
}

/// Makes what is outside of `seen`, which is not empty, less than anything.
#[inline]
#[target_feature(enable = "avx512f")]
fn hide(x: &mut [__m512; TILES], seen: Range<usize>) {
    let bits = u64::MAX >> (64 - seen.len()) << seen.start;
    for (i, x) in x.iter_mut().enumerate() {
        let unseen = !(bits >> (i * LANES)) as u16;
        *x = _mm512_mask_mov_ps(*x, unseen, _mm512_set1_ps(f32::NEG_INFINITY));
    }
}

/// Of two neighbours each the upper half: bf16 of sixteen f32 and of sixteen more.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn upper_halves() -> __m512i {
    const INDICES: [u16; 2 * LANES] = {
        let mut indices = [0; 2 * LANES];
        let mut i = 0;
        while i < indices.len() {
            indices[i] = 2 * i as u16 + 1;
            i += 1;
        }
        indices
    };
    // SAFETY: a vector of indices.
    unsafe { _mm512_loadu_si512(INDICES.as_ptr().cast()) }
}

/// What two is raised to for each score of a row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn powers(scores: &[f32; CHUNK], (params, scales): (&AttnParams, Option<Scales<'_>>)) -> [__m512; TILES] {
    let scale = match params.softcap {
        Some(_) => params.scale,
        None => params.scale * std::f32::consts::LOG2_E,
    };
    let mut x = load(scores);
    for (i, x) in x.iter_mut().enumerate() {
        if let Some((scales, _)) = scales {
            // SAFETY: scales of a chunk's keys.
            *x = unsafe { _mm512_mul_ps(*x, _mm512_loadu_ps(scales.as_ptr().add(i * LANES))) };
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
