//! `x [m, k] * w [n, k]^T -> y [m, n]` with weights of whole-number codes.
//!
//! Activations are rounded to signed bytes first, each group of columns that shares a weight scale with a scale of its
//! own; only the largest element of a row is kept as it is, so that it does not coarsen its group (transformers have
//! such outliers). A group's sum of products is a whole number and exact; the groups' sums are added in ascending order
//! as f32, then the product of the largest element. So an element's bits depend neither on m nor on the instruction
//! set's width.

use super::dot::{Dot, STEP_BYTES};
use super::quant::{CodeWidth, GROUP, QuantMatrix, STEP_COLS};
use super::rounding::{Largest, round_but_largest};
use super::scratch::Scratch;
use super::simd::{LANES, Simd};
#[cfg(target_arch = "x86_64")]
use super::{Isa, amx::bytes, isa};
use super::{OutPtr, Rows, Unwritten, dispatch_dot, pool, store_outputs};

/// Panels that one group of accumulators spans at most.
const PANEL_GROUP: usize = 8;
/// How far ahead of the loads a block of rows that is alone asks for weights, in bytes of each panel.
const PREFETCH_BYTES: usize = 1024;
/// Bytes that a prefetch brings.
const LINE_BYTES: usize = 64;
/// Elements of x from which rounding it is worth a parallel region.
const PARALLEL_ELEMENTS: usize = 1 << 13;

/// Computes `y = x * w^T (+ bias)`; `y` is `[x.num_rows, w.rows]`, contiguous, and need not be initialised to values.
pub(crate) fn matmul(x: Rows<'_>, w: &QuantMatrix, bias: Option<&[f32]>, y: &mut Unwritten) {
    assert_eq!(x.width, w.cols, "inner dimensions");
    assert_eq!(y.len(), x.num_rows * w.rows, "output size");
    assert!(bias.is_none_or(|bias| bias.len() == w.rows), "bias size");
    if y.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    let tiled = if isa() == Isa::Amx { bytes::tiled_rows(x.num_rows) } else { 0 };
    #[cfg(not(target_arch = "x86_64"))]
    let tiled = 0;
    product(x, w, bias, y, tiled);
}

/// As [`matmul`], the first `tiled` rows on byte tiles.
pub(super) fn product(x: Rows<'_>, w: &QuantMatrix, bias: Option<&[f32]>, y: &mut Unwritten, tiled: usize) {
    let x = RoundedRows::new(x, w, tiled > 0);
    #[cfg(target_arch = "x86_64")]
    let tiled_rows =
        (tiled > 0).then(|| bytes::TiledRows::new(tiled, &x.codes, &x.scales, &x.totals, &x.largest, w));
    let pieces = pool::cut(w.num_panels(), 2, PANEL_GROUP);
    let job = Job { x: &x, first_row: tiled, w, bias, y: OutPtr::new(y) };
    pool::run(pieces.len(), |piece| {
        let panels = pieces[piece].clone();
        let job = &job;
        #[cfg(target_arch = "x86_64")]
        if let Some(x) = &tiled_rows {
            let job = bytes::Job { x, w, bias, y: job.y };
            // SAFETY: rows are for tiles only where these may be used; the columns of these panels are this piece's.
            unsafe { bytes::panels_of(&job, panels.clone()) };
        }
        if job.first_row == job.x.num_rows {
            return;
        }
        dispatch_dot!(panels_of(job, panels), [job: &Job<'_>, panels: std::ops::Range<usize>]);
    });
}

/// Activations as signed bytes.
struct RoundedRows {
    num_rows: usize,
    /// `[num_rows][depth]`, for tiles padded to whole ones.
    codes: Scratch<i8>,
    /// `[num_rows][groups]`
    scales: Scratch<f32>,
    /// `[num_rows][groups]`: what the sum of products starts with, so that weight codes count from their zero.
    starts: Scratch<i32>,
    /// `[num_rows][groups]`: the sum of the rounded activations, which the weights' minima multiply.
    totals: Scratch<f32>,
    /// `[num_rows]`: the largest element, which is zero among the codes.
    largest: Scratch<Largest>,
}

impl RoundedRows {
    fn new(x: Rows<'_>, w: &QuantMatrix, tiles: bool) -> Self {
        let (num_rows, groups) = (x.num_rows, w.num_groups());
        #[cfg(target_arch = "x86_64")]
        let padded = if tiles { num_rows.next_multiple_of(LANES) * w.depth + bytes::SLACK } else { 0 };
        #[cfg(not(target_arch = "x86_64"))]
        let padded = usize::from(tiles);
        let mut codes = Scratch::any(padded.max(num_rows * w.depth));
        let mut scales = Scratch::any(num_rows * groups);
        let mut starts = Scratch::any(num_rows * groups);
        let mut totals = Scratch::any(if w.mins.is_some() { num_rows * groups } else { 0 });
        let mut largest = Scratch::any(num_rows);
        let largest_out = OutPtr(largest.as_mut_ptr());
        let (codes_out, scales_out) = (OutPtr(codes.as_mut_ptr()), OutPtr(scales.as_mut_ptr()));
        let (starts_out, totals_out) = (OutPtr(starts.as_mut_ptr()), OutPtr(totals.as_mut_ptr()));
        let row = |idx: usize| {
            // SAFETY: one piece a row; rows do not overlap and lie in the buffers by their sizes.
            let (codes, scales, starts, largest) = unsafe {
                (
                    codes_out.slice(idx * w.depth, w.depth),
                    scales_out.slice(idx * groups, groups),
                    starts_out.slice(idx * groups, groups),
                    largest_out.slice(idx, 1),
                )
            };
            codes[w.cols..].fill(0);
            largest[0] = round_but_largest(x.row(idx), codes, scales, starts);
            if w.mins.is_some() {
                // SAFETY: as above; the buffer has this size where there are minima.
                let totals = unsafe { totals_out.slice(idx * groups, groups) };
                for ((total, scale), sum) in totals.iter_mut().zip(&*scales).zip(&*starts) {
                    *total = scale * *sum as f32;
                }
            }
            for start in starts {
                *start *= -w.zero;
            }
        };
        if num_rows * w.cols < PARALLEL_ELEMENTS {
            (0..num_rows).for_each(row);
        } else {
            pool::run(num_rows, row);
        }
        Self { num_rows, codes, scales, starts, totals, largest }
    }
}

struct Job<'a> {
    x: &'a RoundedRows,
    /// Rows before this one are somebody else's.
    first_row: usize,
    w: &'a QuantMatrix,
    bias: Option<&'a [f32]>,
    y: OutPtr<f32>,
}

/// # Safety
/// The columns of `panels` are nobody else's; the instruction set of `S` and `D`.
#[inline(always)]
unsafe fn panels_of<S: Simd, D: Dot<S>>(job: &Job<'_>, panels: std::ops::Range<usize>) {
    // SAFETY: given by the caller.
    unsafe {
        match job.w.width {
            CodeWidth::Byte => groups_of::<S, D, Bytes, false>(job, panels),
            CodeWidth::Half if job.w.mins.is_some() => groups_of::<S, D, Halves, true>(job, panels),
            CodeWidth::Half => groups_of::<S, D, Halves, false>(job, panels),
        }
    }
}

/// How eight columns of a panel are read.
trait Codes {
    /// Bytes of eight columns of a panel.
    const STEP: usize;

    /// # Safety
    /// [`Codes::STEP`] readable bytes at `p`; the instruction set of `D`.
    unsafe fn load<S: Simd, D: Dot<S>>(p: *const u8) -> (D::Codes, D::Codes);
}

struct Bytes;
struct Halves;

impl Codes for Bytes {
    const STEP: usize = 2 * STEP_BYTES;

    #[inline(always)]
    unsafe fn load<S: Simd, D: Dot<S>>(p: *const u8) -> (D::Codes, D::Codes) {
        // SAFETY: given by the caller.
        unsafe { (D::load(p), D::load(p.add(STEP_BYTES))) }
    }
}

impl Codes for Halves {
    const STEP: usize = STEP_BYTES;

    #[inline(always)]
    unsafe fn load<S: Simd, D: Dot<S>>(p: *const u8) -> (D::Codes, D::Codes) {
        // SAFETY: given by the caller.
        unsafe { D::load_halves(p) }
    }
}

/// # Safety
/// As [`panels_of`]; `C` is the width of the codes, `MINIMA` says whether they have these.
#[inline(always)]
unsafe fn groups_of<S: Simd, D: Dot<S>, C: Codes, const MINIMA: bool>(
    job: &Job<'_>,
    panels: std::ops::Range<usize>,
) {
    let num_rows = job.x.num_rows - job.first_row;
    let num_blocks = num_rows.div_ceil((D::ACCUMULATORS / 2).max(1));
    let most_rows = num_rows.div_ceil(num_blocks);
    let count = (D::ACCUMULATORS / most_rows).clamp(1, PANEL_GROUP);
    let mut panel = panels.start;
    while panel < panels.end {
        // Kernels exist for 1, 2, 4 and 8 panels.
        let count = 1_usize << count.min(panels.end - panel).ilog2();
        let mut first = 0;
        for block in 0..num_blocks {
            // Blocks of nearly equal size: a last block of one row would waste a pass over the weights.
            let rows = (num_rows - first).div_ceil(num_blocks - block);
            let ahead = Ahead::new(job.w, panel, count, (block, num_blocks));
            let tile = Tile { job, first: job.first_row + first, panel, ahead };
            // SAFETY: rows and panels are those of the job.
            unsafe {
                if num_blocks == 1 {
                    tile.run::<S, D, C, true, MINIMA>(rows, count);
                } else {
                    tile.run::<S, D, C, false, MINIMA>(rows, count);
                }
            }
            first += rows;
        }
        panel += count;
    }
}

/// Column `column` of the sixteen rows of `panel`, without the matrix's unit.
///
/// # Safety
/// The instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn weights_of<S: Simd>(w: &QuantMatrix, panel: usize, column: usize) -> S::V {
    let at = (panel * w.num_groups() + column / GROUP) * LANES;
    let codes = &w.codes[panel * w.width.panel_bytes(w.depth)..];
    // SAFETY: the slices have sixteen scales and four bytes for each of the sixteen rows; the instruction set is given.
    unsafe {
        let scales = S::load_f16(w.scales[at..][..LANES].as_ptr());
        let (step, shift, mask) = match w.width {
            CodeWidth::Byte => (column / 4, column % 4 * 8, 0xff),
            CodeWidth::Half => (column / 8, column % 4 * 8 + column % 8 / 4 * 4, 0xf),
        };
        let codes = S::load_bits(codes[step * STEP_BYTES..][..STEP_BYTES].as_ptr(), shift as u32, mask);
        match &w.mins {
            Some(mins) => S::fma(scales, codes, S::load_f16(mins[at..][..LANES].as_ptr())),
            None => S::mul(scales, S::sub(codes, S::splat(w.zero as f32))),
        }
    }
}

/// What a block of rows asks for on its way through some panels: its share of the panels that come next. The processor
/// itself brings what is read again from the second-level cache in time, and asking for every line of it costs a fifth of
/// the product.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u8,
    /// Lines for each group of columns.
    lines: usize,
}

impl Ahead {
    /// For block `idx` of `blocks`.
    fn new(w: &QuantMatrix, panel: usize, count: usize, (idx, blocks): (usize, usize)) -> Self {
        let bytes = count * w.width.panel_bytes(w.depth);
        let share = bytes.div_ceil(blocks).next_multiple_of(LINE_BYTES);
        // Behind the last panel this names memory that is not ours, which a prefetch may.
        let next = w.codes.as_ptr().wrapping_add((panel + count) * w.width.panel_bytes(w.depth));
        let lines = (share / LINE_BYTES).div_ceil(w.num_groups().max(1));
        Self { from: next.wrapping_add(share * idx), lines }
    }

    /// Asks for the share of a group.
    #[inline(always)]
    unsafe fn ask<S: Simd>(self, group: usize) {
        for line in group * self.lines..(group + 1) * self.lines {
            // SAFETY: the instruction set is given.
            unsafe { S::prefetch(self.from.wrapping_add(line * LINE_BYTES)) };
        }
    }
}

struct Tile<'a> {
    job: &'a Job<'a>,
    first: usize,
    panel: usize,
    ahead: Ahead,
}

impl Tile<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot<S>, C: Codes, const ALONE: bool, const MINIMA: bool>(
        &self,
        rows: usize,
        panels: usize,
    ) {
        macro_rules! cases {
            ($(($m:literal, $n:literal)),* $(,)?) => {
                match (rows, panels) {
                    // SAFETY: given by the caller.
                    $(($m, $n) if $m * $n <= D::ACCUMULATORS => unsafe {
                        self.kernel::<S, D, C, ALONE, MINIMA, $m, $n>()
                    },)*
                    _ => unreachable!("no kernel for {rows} rows and {panels} panels"),
                }
            };
        }
        // What does not fit the accumulators is never asked for; saying so keeps it out of the binary.
        cases!(
            (1, 8),
            (1, 4),
            (2, 4),
            (3, 4),
            (1, 2),
            (2, 2),
            (3, 2),
            (4, 2),
            (5, 2),
            (6, 2),
            (1, 1),
            (2, 1),
            (3, 1),
            (4, 1),
            (5, 1),
            (6, 1),
        );
    }

    /// `M` rows by `N` panels: whole-number sums of a group and f32 sums of the groups, all in registers. A block of rows that is
    /// `ALONE` asks for every line of its own panels in time.
    #[inline(always)]
    unsafe fn kernel<
        S: Simd,
        D: Dot<S>,
        C: Codes,
        const ALONE: bool,
        const MINIMA: bool,
        const M: usize,
        const N: usize,
    >(
        &self,
    ) {
        let Job { x, w, .. } = *self.job;
        let (groups, depth) = (w.num_groups(), w.depth);
        let panel_bytes = w.width.panel_bytes(depth);
        let codes = w.codes[self.panel * panel_bytes..][..N * panel_bytes].as_ptr();
        let scales = w.scales[self.panel * groups * LANES..][..N * groups * LANES].as_ptr();
        let mins = match &w.mins {
            Some(mins) if MINIMA => mins[self.panel * groups * LANES..][..N * groups * LANES].as_ptr(),
            _ => scales,
        };
        let x_codes = x.codes[self.first * depth..][..M * depth].as_ptr();
        let x_scales = x.scales[self.first * groups..][..M * groups].as_ptr();
        let x_starts = x.starts[self.first * groups..][..M * groups].as_ptr();
        let x_totals = match MINIMA {
            true => x.totals[self.first * groups..][..M * groups].as_ptr(),
            false => x_scales,
        };
        let from = if C::STEP > STEP_BYTES { D::BYTES_FROM } else { 0 };
        assert!(from == 0 || from == w.zero, "bytes count from 128");
        // SAFETY: all reads lie in the slices just cut.
        unsafe {
            let mut outputs = [[S::splat(0.0); N]; M];
            for group in 0..groups {
                let begin = group * GROUP;
                let end = (begin + GROUP).min(depth);
                let mut sums: [[D::Sums; N]; M] = std::array::from_fn(|m| {
                    let start = *x_starts.add(m * groups + group);
                    // Codes that count from their zero already need no start.
                    [D::start(if from == 0 { start } else { 0 }); N]
                });
                if !ALONE {
                    self.ahead.ask::<S>(group);
                }
                let mut k = begin;
                while k < end {
                    let load = |n: usize| {
                        let p = codes.add(n * panel_bytes + k / STEP_COLS * C::STEP);
                        if ALONE {
                            // Beyond the end this names memory that is not ours, which a prefetch may.
                            S::prefetch(p.wrapping_byte_add(PREFETCH_BYTES));
                            if C::STEP > STEP_BYTES {
                                S::prefetch(p.wrapping_byte_add(PREFETCH_BYTES + STEP_BYTES));
                            }
                        }
                        C::load::<S, D>(p)
                    };
                    let quads = |m: usize| {
                        let p = x_codes.add(m * depth + k);
                        (D::quad(p), D::quad(p.add(4)))
                    };
                    // What there is less of stays in registers: with all of the other it would not fit beside the sums.
                    if N <= M {
                        let codes: [(D::Codes, D::Codes); N] = std::array::from_fn(load);
                        for m in 0..M {
                            let quads = quads(m);
                            for n in 0..N {
                                sums[m][n] = D::add(sums[m][n], codes[n].0, quads.0);
                            }
                            for n in 0..N {
                                sums[m][n] = D::add(sums[m][n], codes[n].1, quads.1);
                            }
                        }
                    } else {
                        let quads: [(D::Quad, D::Quad); M] = std::array::from_fn(quads);
                        for n in 0..N {
                            let codes = load(n);
                            for m in 0..M {
                                sums[m][n] = D::add(sums[m][n], codes.0, quads[m].0);
                            }
                            for m in 0..M {
                                sums[m][n] = D::add(sums[m][n], codes.1, quads[m].1);
                            }
                        }
                    }
                    k += STEP_COLS;
                }
                for n in 0..N {
                    let at = (n * groups + group) * LANES;
                    let scale = S::load_f16(scales.add(at));
                    for m in 0..M {
                        let both = S::mul(scale, S::splat(*x_scales.add(m * groups + group)));
                        outputs[m][n] = S::fma(both, D::to_float(sums[m][n]), outputs[m][n]);
                    }
                    if MINIMA {
                        let min = S::load_f16(mins.add(at));
                        for m in 0..M {
                            let total = *x_totals.add(m * groups + group);
                            outputs[m][n] = S::fma(min, S::splat(total), outputs[m][n]);
                        }
                    }
                }
            }
            for (m, outputs) in outputs.iter().enumerate() {
                self.finish::<S, N>(self.first + m, outputs);
            }
        }
    }

    /// Adds the product of the largest element of `row` to `N` panels' outputs, and stores them.
    ///
    /// # Safety
    /// The row and the panels are the job's; the instruction set of `S`.
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(&self, row: usize, outputs: &[S::V; N]) {
        let Job { x, w, bias, y, .. } = *self.job;
        let Largest { column, value } = x.largest[row];
        for (n, output) in outputs.iter().enumerate() {
            // SAFETY: given by the caller; the stores stay in the row, columns of these panels.
            unsafe {
                let weights = weights_of::<S>(w, self.panel + n, column as usize);
                let output = S::mul(S::fma(S::splat(value), weights, *output), S::splat(w.unit));
                let column = (self.panel + n) * LANES;
                store_outputs::<S>(output, bias, y, row * w.rows, (column, w.rows));
            }
        }
    }
}
