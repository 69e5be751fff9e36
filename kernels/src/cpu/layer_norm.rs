//! Layer norm, with the residual connection in the same pass.

use super::elementwise::for_rows;
use super::simd::{LANES, Simd};
use super::{OutPtr, Rows, Unwritten, dispatch};

/// `(x - mean) / sqrt(variance + eps) * weight (+ bias)`, row by row, of `x + residual` if there is one.
pub(crate) fn layer_norm(
    x: Rows<'_>,
    residual: Option<Rows<'_>>,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut Unwritten,
) {
    assert!(weight.len() == x.width && y.len() == x.num_rows * x.width, "sizes");
    assert!(bias.is_none_or(|bias| bias.len() == x.width), "bias size");
    assert!(residual.is_none_or(|r| (r.num_rows, r.width) == (x.num_rows, x.width)), "residual size");
    let job = Job { x, residual, weight, bias, eps, out: OutPtr::new(y) };
    for_rows(x.num_rows, x.width, |first, end| {
        let job = &job;
        dispatch!(rows(job, first, end) -> (), [job: &Job<'_>, first: usize, end: usize]);
    });
}

struct Job<'a> {
    x: Rows<'a>,
    residual: Option<Rows<'a>>,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: OutPtr<f32>,
}

#[inline(always)]
unsafe fn rows<S: Simd>(job: &Job<'_>, first: usize, end: usize) {
    let width = job.x.width;
    let vectors = width / LANES * LANES;
    for row in first..end {
        let x = job.x.row(row);
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each; the vector loops stay
        // within the row and tails are done one by one. The sum is kept in the output's row, written before it is read.
        unsafe {
            let y = job.out.slice(row * width, width);
            let mut sums = S::splat(0.0);
            let mut tail_sum = 0.0;
            match job.residual.map(|residual| residual.row(row)) {
                Some(residual) => {
                    for i in (0..vectors).step_by(LANES) {
                        let v = S::add(S::load(x.as_ptr().add(i)), S::load(residual.as_ptr().add(i)));
                        S::store(y.as_mut_ptr().add(i), v);
                        sums = S::add(sums, v);
                    }
                    for i in vectors..width {
                        y[i] = x[i] + residual[i];
                        tail_sum += y[i];
                    }
                }
                None => {
                    for i in (0..vectors).step_by(LANES) {
                        let v = S::load(x.as_ptr().add(i));
                        S::store(y.as_mut_ptr().add(i), v);
                        sums = S::add(sums, v);
                    }
                    for i in vectors..width {
                        y[i] = x[i];
                        tail_sum += y[i];
                    }
                }
            }
            let mean = (S::sum(sums) + tail_sum) / width as f32;
            let means = S::splat(mean);
            let mut squares = S::splat(0.0);
            for i in (0..vectors).step_by(LANES) {
                let v = S::sub(S::load(y.as_ptr().add(i)), means);
                squares = S::fma(v, v, squares);
            }
            let tail = y[vectors..].iter().fold(0.0, |sum, v| sum + (v - mean) * (v - mean));
            let scale = 1.0 / ((S::sum(squares) + tail) / width as f32 + job.eps).sqrt();
            let scales = S::splat(scale);
            for i in (0..vectors).step_by(LANES) {
                let v = S::mul(S::sub(S::load(y.as_ptr().add(i)), means), scales);
                let weight = S::load(job.weight.as_ptr().add(i));
                let v = match job.bias {
                    Some(bias) => S::fma(v, weight, S::load(bias.as_ptr().add(i))),
                    None => S::mul(v, weight),
                };
                S::store(y.as_mut_ptr().add(i), v);
            }
            for i in vectors..width {
                y[i] = (y[i] - mean) * scale * job.weight[i] + job.bias.map_or(0.0, |bias| bias[i]);
            }
        }
    }
}
