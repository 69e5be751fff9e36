//! Operations row by row: normalisation, rotation, activation.

use super::simd::{LANES, Simd};
use super::{OutPtr, Rows, Unwritten, dispatch, pool};
use crate::ops::Activation;

/// Elements below which a parallel region costs more than it saves.
const PARALLEL_FROM: usize = 1 << 14;

/// Runs `rows(first, end)` over all rows, in parallel when there is enough to do.
pub(super) fn for_rows(num_rows: usize, width: usize, rows: impl Fn(usize, usize) + Sync) {
    if num_rows * width < PARALLEL_FROM {
        return rows(0, num_rows);
    }
    let pieces = num_rows.min(4 * pool::num_threads());
    pool::run(pieces, |piece| rows(num_rows * piece / pieces, num_rows * (piece + 1) / pieces));
}

/// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
pub(crate) fn rms_norm(x: Rows<'_>, weight: &[f32], eps: f32, y: &mut Unwritten) {
    assert!(weight.len() == x.width && y.len() == x.num_rows * x.width, "sizes");
    let out = OutPtr::new(y);
    for_rows(x.num_rows, x.width, |first, end| {
        dispatch!(
            rms_norm_rows(x, weight, eps, out, first, end) -> (),
            [x: Rows<'_>, weight: &[f32], eps: f32, out: OutPtr<f32>, first: usize, end: usize]
        );
    });
}

#[inline(always)]
unsafe fn rms_norm_rows<S: Simd>(
    x: Rows<'_>,
    weight: &[f32],
    eps: f32,
    out: OutPtr<f32>,
    first: usize,
    end: usize,
) {
    for row in first..end {
        let x_row = x.row(row);
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each; the vector loops stay
        // within the row and tails are done one by one.
        unsafe {
            let y = out.slice(row * x.width, x.width);
            let vectors = x.width / LANES * LANES;
            let mut sums = S::splat(0.0);
            for i in (0..vectors).step_by(LANES) {
                let v = S::load(x_row.as_ptr().add(i));
                sums = S::fma(v, v, sums);
            }
            let squares = x_row[vectors..].iter().fold(S::sum(sums), |sum, v| sum + v * v);
            normalise::<S>(x_row, squares, weight, eps, y);
        }
    }
}

/// `y = x / sqrt(squares / width + eps) * weight`
///
/// # Safety
/// All are of the same length; the instruction set of `S`.
#[inline(always)]
unsafe fn normalise<S: Simd>(x: &[f32], squares: f32, weight: &[f32], eps: f32, y: &mut [f32]) {
    let vectors = x.len() / LANES * LANES;
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    // SAFETY: the vectors lie in the rows, given by the caller; the tail is done one by one.
    unsafe {
        let scales = S::splat(scale);
        for i in (0..vectors).step_by(LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), scales);
            S::store(y.as_mut_ptr().add(i), S::mul(v, S::load(weight.as_ptr().add(i))));
        }
        for i in vectors..x.len() {
            y[i] = x[i] * scale * weight[i];
        }
    }
}

/// `a + scale * b`, row by row, and its [`rms_norm`] in the same pass.
pub(crate) fn add_rms_norm(
    (a, b): (Rows<'_>, Rows<'_>),
    scale: f32,
    (weight, eps): (&[f32], f32),
    sums: &mut Unwritten,
    y: &mut Unwritten,
) {
    let len = a.num_rows * a.width;
    assert!((a.num_rows, a.width) == (b.num_rows, b.width) && weight.len() == a.width, "sizes");
    assert!(sums.len() == len && y.len() == len, "sizes of outputs");
    let (sums, y) = (OutPtr::new(sums), OutPtr::new(y));
    for_rows(a.num_rows, a.width, |first, end| {
        dispatch!(
            add_rms_norm_rows((a, b), scale, (weight, eps), (sums, y), (first, end)) -> (),
            [
                ab: (Rows<'_>, Rows<'_>),
                scale: f32,
                norm: (&[f32], f32),
                out: (OutPtr<f32>, OutPtr<f32>),
                rows: (usize, usize),
            ]
        );
    });
}

#[inline(always)]
unsafe fn add_rms_norm_rows<S: Simd>(
    (a, b): (Rows<'_>, Rows<'_>),
    scale: f32,
    (weight, eps): (&[f32], f32),
    (sums, y): (OutPtr<f32>, OutPtr<f32>),
    (first, end): (usize, usize),
) {
    for row in first..end {
        // SAFETY: rows are disjoint parts of both outputs, which have `width` elements for each.
        unsafe {
            let sum = sums.slice(row * a.width, a.width);
            let squares = sum_of_rows::<S>(a.row(row), b.row(row), scale, sum);
            normalise::<S>(sum, squares, weight, eps, y.slice(row * a.width, a.width));
        }
    }
}

/// `a + b`, row by row.
pub(crate) fn add(a: Rows<'_>, b: Rows<'_>, y: &mut Unwritten) {
    assert!((a.num_rows, a.width) == (b.num_rows, b.width) && y.len() == a.num_rows * a.width, "sizes");
    let out = OutPtr::new(y);
    for_rows(a.num_rows, a.width, |first, end| {
        dispatch!(
            add_rows(a, b, out, first, end) -> (),
            [a: Rows<'_>, b: Rows<'_>, out: OutPtr<f32>, first: usize, end: usize]
        );
    });
}

#[inline(always)]
unsafe fn add_rows<S: Simd>(a: Rows<'_>, b: Rows<'_>, out: OutPtr<f32>, first: usize, end: usize) {
    for row in first..end {
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each.
        unsafe {
            let y = out.slice(row * a.width, a.width);
            sum_of_rows::<S>(a.row(row), b.row(row), 1.0, y);
        }
    }
}

/// `y = a + scale * b`; returns the sum of the squares, in the order of [`rms_norm`].
///
/// # Safety
/// All are of the same length; the instruction set of `S`.
#[inline(always)]
unsafe fn sum_of_rows<S: Simd>(a: &[f32], b: &[f32], scale: f32, y: &mut [f32]) -> f32 {
    let vectors = a.len() / LANES * LANES;
    // SAFETY: the vectors lie in the rows, given by the caller; the tail is done one by one.
    unsafe {
        let scales = S::splat(scale);
        let mut squares = S::splat(0.0);
        for i in (0..vectors).step_by(LANES) {
            let part = S::mul(S::load(b.as_ptr().add(i)), scales);
            let v = S::add(S::load(a.as_ptr().add(i)), part);
            S::store(y.as_mut_ptr().add(i), v);
            squares = S::fma(v, v, squares);
        }
        let mut total = S::sum(squares);
        for i in vectors..a.len() {
            y[i] = a[i] + scale * b[i];
            total += y[i] * y[i];
        }
        total
    }
}

/// Rotates the first `2 * half` of every head, half against half; `cos`, `sin` are `[num_tokens, half]`.
pub(crate) fn rope(x: Rows<'_>, head_dim: usize, cos: Rows<'_>, sin: Rows<'_>, y: &mut Unwritten) {
    let half = cos.width;
    assert!(
        2 * half <= head_dim && x.width.is_multiple_of(head_dim) && y.len() == x.num_rows * x.width,
        "sizes"
    );
    assert!(cos.num_rows == x.num_rows && sin.num_rows == x.num_rows && sin.width == half, "table sizes");
    let out = OutPtr::new(y);
    for_rows(x.num_rows, x.width, |first, end| {
        dispatch!(
            rope_rows(x, head_dim, (cos, sin), out, first, end) -> (),
            [
                x: Rows<'_>,
                head_dim: usize,
                tables: (Rows<'_>, Rows<'_>),
                out: OutPtr<f32>,
                first: usize,
                end: usize,
            ]
        );
    });
}

#[inline(always)]
unsafe fn rope_rows<S: Simd>(
    x: Rows<'_>,
    head_dim: usize,
    (cos, sin): (Rows<'_>, Rows<'_>),
    out: OutPtr<f32>,
    first: usize,
    end: usize,
) {
    for row in first..end {
        let (cos, sin) = (cos.row(row), sin.row(row));
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each.
        let y_row = unsafe { out.slice(row * x.width, x.width) };
        for (x, y) in x.row(row).chunks_exact(head_dim).zip(y_row.chunks_exact_mut(head_dim)) {
            // SAFETY: the instruction set is given.
            unsafe { rotate::<S>(x, (cos, sin), y) };
        }
    }
}

/// One head of [`rope`].
pub(super) fn rotate_head(x: &[f32], tables: (&[f32], &[f32]), y: &mut [f32]) {
    dispatch!(rotate(x, tables, y) -> (), [x: &[f32], tables: (&[f32], &[f32]), y: &mut [f32]]);
}

/// # Safety
/// The instruction set of `S`.
#[inline(always)]
unsafe fn rotate<S: Simd>(x: &[f32], (cos, sin): (&[f32], &[f32]), y: &mut [f32]) {
    let half = cos.len();
    let vectors = half / LANES * LANES;
    let (a, rest) = x.split_at(half);
    let (b, pass) = rest.split_at(half);
    let (first, rest) = y.split_at_mut(half);
    let (second, passed) = rest.split_at_mut(half);
    assert!(sin.len() == half, "table sizes");
    passed.copy_from_slice(pass);
    for i in (0..vectors).step_by(LANES) {
        // SAFETY: whole vectors of halves; the instruction set is given.
        unsafe {
            let (a, b) = (S::load(a.as_ptr().add(i)), S::load(b.as_ptr().add(i)));
            let (cos, sin) = (S::load(cos.as_ptr().add(i)), S::load(sin.as_ptr().add(i)));
            S::store(first.as_mut_ptr().add(i), S::sub(S::mul(a, cos), S::mul(b, sin)));
            S::store(second.as_mut_ptr().add(i), S::add(S::mul(b, cos), S::mul(a, sin)));
        }
    }
    for i in vectors..half {
        first[i] = a[i] * cos[i] - b[i] * sin[i];
        second[i] = b[i] * cos[i] + a[i] * sin[i];
    }
}

/// `act(gate) * up` for rows of `[gate, up]`.
pub(crate) fn gated_activation(x: Rows<'_>, activation: Activation, y: &mut Unwritten) {
    let width = x.width / 2;
    assert!(x.width == 2 * width && y.len() == x.num_rows * width, "sizes");
    let out = OutPtr::new(y);
    for_rows(x.num_rows, x.width, |first, end| {
        dispatch!(
            gated_rows(x, activation, out, first, end) -> (),
            [x: Rows<'_>, activation: Activation, out: OutPtr<f32>, first: usize, end: usize]
        );
    });
}

#[inline(always)]
unsafe fn gated_rows<S: Simd>(
    x: Rows<'_>,
    activation: Activation,
    out: OutPtr<f32>,
    first: usize,
    end: usize,
) {
    let width = x.width / 2;
    for row in first..end {
        let (gate, up) = x.row(row).split_at(width);
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each; the tail goes through a
        // full vector of its own.
        unsafe {
            let y = out.slice(row * width, width);
            let vectors = width / LANES * LANES;
            for i in (0..vectors).step_by(LANES) {
                let v = activated::<S>(S::load(gate.as_ptr().add(i)), activation);
                S::store(y.as_mut_ptr().add(i), S::mul(v, S::load(up.as_ptr().add(i))));
            }
            if vectors < width {
                let mut tail = [0.0; LANES];
                tail[..width - vectors].copy_from_slice(&gate[vectors..]);
                let tail = S::to_array(activated::<S>(S::load(tail.as_ptr()), activation));
                for i in vectors..width {
                    y[i] = tail[i - vectors] * up[i];
                }
            }
        }
    }
}

/// `act(x)`, element by element.
pub(crate) fn activate(x: Rows<'_>, activation: Activation, y: &mut Unwritten) {
    assert!(y.len() == x.num_rows * x.width, "sizes");
    let out = OutPtr::new(y);
    for_rows(x.num_rows, x.width, |first, end| {
        dispatch!(
            activate_rows(x, activation, out, first, end) -> (),
            [x: Rows<'_>, activation: Activation, out: OutPtr<f32>, first: usize, end: usize]
        );
    });
}

#[inline(always)]
unsafe fn activate_rows<S: Simd>(
    x: Rows<'_>,
    activation: Activation,
    out: OutPtr<f32>,
    first: usize,
    end: usize,
) {
    let vectors = x.width / LANES * LANES;
    for row in first..end {
        let source = x.row(row);
        // SAFETY: rows are disjoint parts of the output, which has `width` elements for each; the tail goes through a
        // full vector of its own.
        unsafe {
            let y = out.slice(row * x.width, x.width);
            for i in (0..vectors).step_by(LANES) {
                S::store(y.as_mut_ptr().add(i), activated::<S>(S::load(source.as_ptr().add(i)), activation));
            }
            if vectors < x.width {
                let mut tail = [0.0; LANES];
                tail[..x.width - vectors].copy_from_slice(&source[vectors..]);
                let tail = S::to_array(activated::<S>(S::load(tail.as_ptr()), activation));
                y[vectors..].copy_from_slice(&tail[..x.width - vectors]);
            }
        }
    }
}

#[inline(always)]
unsafe fn activated<S: Simd>(x: S::V, activation: Activation) -> S::V {
    // SAFETY: the instruction set is given.
    unsafe {
        match activation {
            Activation::Silu => S::mul(x, sigmoid::<S>(x)),
            Activation::GeluTanh => {
                // 0.5 (1 + tanh z) = sigmoid(2z)
                const C: f32 = 0.797_884_6; // sqrt(2 / pi)
                let cube = S::mul(S::mul(x, x), x);
                let z = S::mul(S::splat(2.0 * C), S::fma(S::splat(0.044_715), cube, x));
                S::mul(x, sigmoid::<S>(z))
            }
            Activation::Relu => S::max(x, S::splat(0.0)),
            Activation::Gelu => {
                let t = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
                S::mul(S::mul(x, S::splat(0.5)), S::add(erf::<S>(t), S::splat(1.0)))
            }
        }
    }
}

#[inline(always)]
unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the instruction set is given.
    unsafe {
        let one = S::splat(1.0);
        S::div(one, S::add(one, S::exp(S::sub(S::splat(0.0), x))))
    }
}

/// Error function, absolute error below 1e-6: the rational approximation 7.1.26 of Abramowitz and Stegun, odd in x.
#[inline(always)]
unsafe fn erf<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the instruction set is given.
    unsafe {
        let zero = S::splat(0.0);
        let abs = S::max(x, S::sub(zero, x));
        // 7.1.26: erf(a) = 1 - (a1 t + .. + a5 t^5) e^(-a^2), t = 1 / (1 + p a); absolute error 1.5e-7
        let one = S::splat(1.0);
        let t = S::div(one, S::fma(S::splat(0.327_591_1), abs, one));
        let mut p = S::splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            p = S::fma(p, t, S::splat(c));
        }
        let tail = S::mul(S::mul(p, t), S::exp(S::sub(zero, S::mul(abs, abs))));
        let positive = S::sub(one, tail);
        // The sign of x: erf is odd. x / |x| would be 0/0 at 0, so clamp a huge multiple instead.
        let sign = S::max(S::splat(-1.0), S::min(one, S::mul(x, S::splat(1e30))));
        S::mul(positive, sign)
    }
}
