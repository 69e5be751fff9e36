//! `x [m, k] * w [n, k]^T -> y [m, n]`, f32 activations, packed weights widened to f32 in registers.
//!
//! Each output element is one chain of fused multiply-adds over k in ascending order, so its bits do not depend on m.
//! Weights are streamed once a step: a group of panels is applied to all rows before the next group is read.

use super::matrix::{PackedMatrix, Panels};
use super::scratch::Scratch;
use super::simd::{LANES, Simd};
#[cfg(target_arch = "x86_64")]
use super::{Isa, amx, bf16_gemm, half_gemm, isa};
use super::{OutPtr, Rows, Unwritten, dispatch, pool, store_outputs};

/// Rows of a block at most; more would not leave registers for the operands.
const MAX_BLOCK_ROWS: usize = 12;
/// How far ahead of the loads weights are asked for, in bytes of each panel.
const PREFETCH_BYTES: usize = 1024;

/// Computes `y = x * w^T (+ bias)`; `y` is `[x.num_rows, w.rows]`, contiguous, and need not be initialised to values.
pub(crate) fn matmul(x: Rows<'_>, w: &PackedMatrix, bias: Option<&[f32]>, y: &mut Unwritten) {
    assert_eq!(x.width, w.cols, "inner dimensions");
    assert_eq!(y.len(), x.num_rows * w.rows, "output size");
    assert!(bias.is_none_or(|bias| bias.len() == w.rows), "bias size");
    if y.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Amx, Panels::Bf16(data)) = (isa(), &w.panels) {
        return amx::matmul(x, w, data, bias, y);
    }
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512Bf16, Panels::Bf16(data)) = (isa(), &w.panels) {
        // SAFETY: `isa()` returns a set only after detecting its features on this processor.
        return unsafe { bf16_gemm::matmul(x, w, data, bias, y) };
    }
    #[cfg(target_arch = "x86_64")]
    if let Panels::Half(panels) = &w.panels {
        return half_gemm::matmul(x, panels, w.rows, bias, y);
    }
    let blocks = Blocks::new(x, w.depth);
    let y_ptr = OutPtr::new(y);
    let pieces = pool::cut(w.num_panels(), 2, PANEL_GROUP);
    pool::run(pieces.len(), |piece| run_piece(&blocks, w, bias, y_ptr, pieces[piece].clone()));
}

/// Panels that one group of accumulators spans at most.
const PANEL_GROUP: usize = 8;

/// The rows of x in blocks, each block transposed to `[k][rows]` so that the kernel reads one stream.
struct Blocks {
    /// `(first row, rows, offset in data)`
    blocks: Vec<(usize, usize, usize)>,
    data: Scratch<f32>,
    /// k, padded with zeros as the weights are.
    depth: usize,
}

impl Blocks {
    fn new(x: Rows<'_>, depth: usize) -> Self {
        let num_blocks = x.num_rows.div_ceil(max_block_rows());
        let mut blocks = Vec::with_capacity(num_blocks);
        let mut first = 0;
        for block in 0..num_blocks {
            // Blocks of nearly equal size: a last block of one row would waste a pass over the weights.
            let rows = (x.num_rows - first).div_ceil(num_blocks - block);
            blocks.push((first, rows, first * depth));
            first += rows;
        }
        let mut data = Scratch::filled(x.num_rows * depth, 0.0_f32);
        let out = OutPtr(data.as_mut_ptr());
        let pack = |idx: usize| {
            let (first, rows, offset) = blocks[idx];
            // SAFETY: one piece a block; blocks do not overlap and lie in the buffer by their offsets.
            let out = unsafe { out.slice(offset, rows * depth) };
            // One pass that writes in order and reads each row in order.
            let sources: Vec<&[f32]> = (first..first + rows).map(|row| x.row(row)).collect();
            for (k, out) in out.chunks_exact_mut(rows).take(x.width).enumerate() {
                for (out, source) in out.iter_mut().zip(&sources) {
                    *out = source[k];
                }
            }
        };
        if x.num_rows <= 64 {
            (0..num_blocks).for_each(pack)
        } else {
            pool::run(num_blocks, pack)
        }
        Self { blocks, data, depth }
    }
}

fn max_block_rows() -> usize {
    #[inline(always)]
    unsafe fn accumulators<S: Simd>() -> usize {
        S::ACCUMULATORS
    }
    dispatch!(accumulators() -> usize, []).min(MAX_BLOCK_ROWS)
}

fn run_piece(
    blocks: &Blocks,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    y: OutPtr<f32>,
    panels: std::ops::Range<usize>,
) {
    dispatch!(
        piece(blocks, w, bias, y, panels) -> (),
        [blocks: &Blocks, w: &PackedMatrix, bias: Option<&[f32]>, y: OutPtr<f32>, panels: std::ops::Range<usize>]
    );
}

#[inline(always)]
unsafe fn piece<S: Simd>(
    blocks: &Blocks,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    y: OutPtr<f32>,
    panels: std::ops::Range<usize>,
) {
    // SAFETY: the element type matches the buffer; the rest is the contract of `groups`.
    unsafe {
        match &w.panels {
            Panels::F32(data) => groups::<S, F32>(blocks, w, data, bias, y, panels),
            Panels::Bf16(data) => groups::<S, Bf16>(blocks, w, data, bias, y, panels),
            Panels::F16(data) => groups::<S, F16>(blocks, w, data, bias, y, panels),
            #[cfg(target_arch = "x86_64")]
            Panels::Half(_) => unreachable!("has a kernel of its own"),
        }
    }
}

/// How an element type is read: two columns of sixteen rows at a time.
trait Element {
    type Raw: Copy;

    /// # Safety
    /// Thirty-two readable elements at `p`; the instruction set of `S`.
    unsafe fn load_pair<S: Simd>(p: *const Self::Raw) -> (S::V, S::V);
}

struct F32;
struct Bf16;
struct F16;

impl Element for F32 {
    type Raw = f32;

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const f32) -> (S::V, S::V) {
        // SAFETY: given by the caller.
        unsafe { (S::load(p), S::load(p.add(LANES))) }
    }
}

impl Element for Bf16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const u16) -> (S::V, S::V) {
        // SAFETY: given by the caller.
        unsafe { S::load_bf16_pair(p) }
    }
}

impl Element for F16 {
    type Raw = u16;

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const u16) -> (S::V, S::V) {
        // The pairs are interleaved as for bf16: widen all thirty-two, then take them apart.
        // SAFETY: given by the caller.
        unsafe {
            let (low, high) = (S::to_array(S::load_f16(p)), S::to_array(S::load_f16(p.add(LANES))));
            let at = |i: usize| if i < LANES { low[i] } else { high[i - LANES] };
            let first: [f32; LANES] = std::array::from_fn(|i| at(2 * i));
            let second: [f32; LANES] = std::array::from_fn(|i| at(2 * i + 1));
            (S::load(first.as_ptr()), S::load(second.as_ptr()))
        }
    }
}

/// # Safety
/// `data` are the panels of `w`; `y` is `[rows of blocks, w.rows]` and the columns of `panels` are nobody else's; the
/// instruction set of `S`.
#[inline(always)]
unsafe fn groups<S: Simd, E: Element>(
    blocks: &Blocks,
    w: &PackedMatrix,
    data: &[E::Raw],
    bias: Option<&[f32]>,
    y: OutPtr<f32>,
    panels: std::ops::Range<usize>,
) {
    let depth = blocks.depth;
    let most_rows = blocks.blocks.iter().map(|(_, rows, _)| *rows).max().unwrap_or(1);
    let group = (S::ACCUMULATORS / most_rows).clamp(1, PANEL_GROUP);
    let mut panel = panels.start;
    while panel < panels.end {
        let count = floor_power(group.min(panels.end - panel));
        for &(first, rows, offset) in &blocks.blocks {
            let x = blocks.data[offset..][..rows * depth].as_ptr();
            let weights = data[panel * LANES * depth..][..count * LANES * depth].as_ptr();
            let tile = Tile { x, weights, depth, first, panel, num_rows: w.rows, bias, y };
            // SAFETY: `x` and `weights` were just sliced to their sizes.
            unsafe { tile.run::<S, E>(rows, count) };
        }
        panel += count;
    }
}

/// Group sizes that kernels exist for: 1, 2, 4, 8.
#[inline(always)]
fn floor_power(n: usize) -> usize {
    1 << n.ilog2()
}

struct Tile<'a, R> {
    /// `[depth][rows]`
    x: *const f32,
    /// Panels of `[depth / 2][16][2]` (or `[depth][16]`).
    weights: *const R,
    depth: usize,
    first: usize,
    panel: usize,
    num_rows: usize,
    bias: Option<&'a [f32]>,
    y: OutPtr<f32>,
}

impl<R: Copy> Tile<'_, R> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element<Raw = R>>(&self, rows: usize, panels: usize) {
        macro_rules! cases {
            ($(($m:literal, $n:literal)),* $(,)?) => {
                match (rows, panels) {
                    // SAFETY: the sizes of the tile are those of its pointers.
                    $(($m, $n) if $m * $n <= S::ACCUMULATORS => unsafe {
                        self.kernel::<S, E, $m, $n>()
                    },)*
                    _ => unreachable!("no kernel for {rows} rows and {panels} panels"),
                }
            };
        }
        // What does not fit the accumulators of the instruction set is never asked for (see `group` and
        // `max_block_rows`); saying so keeps it out of the binary.
        cases!(
            (1, 8),
            (2, 8),
            (3, 8),
            (1, 4),
            (2, 4),
            (3, 4),
            (4, 4),
            (5, 4),
            (6, 4),
            (1, 2),
            (2, 2),
            (3, 2),
            (4, 2),
            (5, 2),
            (6, 2),
            (7, 2),
            (8, 2),
            (9, 2),
            (10, 2),
            (11, 2),
            (12, 2),
            (1, 1),
            (2, 1),
            (3, 1),
            (4, 1),
            (5, 1),
            (6, 1),
            (7, 1),
            (8, 1),
            (9, 1),
            (10, 1),
            (11, 1),
            (12, 1),
        );
    }

    /// `M` rows by `N` panels, all sums in registers.
    #[inline(always)]
    unsafe fn kernel<S: Simd, E: Element<Raw = R>, const M: usize, const N: usize>(&self) {
        let Self { x, weights, depth, first, panel, num_rows, bias, y } = *self;
        // SAFETY: `weights` has N panels of 16 * depth elements, `x` M * depth; the stores stay in row `first + m`,
        // columns of these panels.
        unsafe {
            let mut sums = [[S::splat(0.0); N]; M];
            let mut k = 0;
            while k < depth {
                let mut w0 = [S::splat(0.0); N];
                let mut w1 = [S::splat(0.0); N];
                for n in 0..N {
                    let p = weights.add(n * LANES * depth + k * LANES);
                    // Beyond the end this names memory that is not ours, which a prefetch may.
                    S::prefetch(p.wrapping_byte_add(PREFETCH_BYTES).cast());
                    (w0[n], w1[n]) = E::load_pair::<S>(p);
                }
                for m in 0..M {
                    let x0 = S::splat(*x.add(k * M + m));
                    for n in 0..N {
                        sums[m][n] = S::fma(x0, w0[n], sums[m][n]);
                    }
                }
                for m in 0..M {
                    let x1 = S::splat(*x.add((k + 1) * M + m));
                    for n in 0..N {
                        sums[m][n] = S::fma(x1, w1[n], sums[m][n]);
                    }
                }
                k += 2;
            }
            for (m, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    let column = (panel + n) * LANES;
                    store_outputs::<S>(*sum, bias, y, (first + m) * num_rows, (column, num_rows));
                }
            }
        }
    }
}
