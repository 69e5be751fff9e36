//! `x [m, k] * w [n, k]^T -> y [m, n]` by multiply-adds of 16-bit floats (AVX512-FP16): twice the rate of f32.
//!
//! f16 has eleven significant bits, three more than bf16, but a narrow range. So each row of x and each row of w is
//! brought into it by a power of two of its own, which is exact; what is smaller than `2^-25` of the largest element of a
//! weight's row is lost. Products are summed in three levels, so that an f16 never sums many of them: [`CHAIN`] products in
//! one chain, the chains of [`RUN`] products in f16 again, runs in f32. The error of a sum is that of rounding the
//! activations to bf16 or less, which is what matrix units do (`benches/NOTES.md` has the figures).
//!
//! Every output element is summed in one order, whatever m is, and the scales belong to rows: its bits depend on its own
//! row alone.

use std::arch::x86_64::*;

use super::halves::{MAX_BLOCK_ROWS, pack_block, widen};
use super::matrix::{HALF_LANES, HalfPanels};
use super::simd::{Avx512, LANES};
use super::{OutPtr, Rows, Unwritten, pool, store_outputs};

/// Products that are summed one after another.
const CHAIN: usize = 16;
/// Products that are summed in f16.
const RUN: usize = 8 * CHAIN;
/// Sums that stay in registers beside their operands.
const ACCUMULATORS: usize = 24;
/// Panels that one group of accumulators spans at most.
const PANEL_GROUP: usize = 8;
/// How far ahead of the loads weights are asked for, in bytes of each panel.
const PREFETCH_BYTES: usize = 1024;
/// Blocks of rows from which they are shared, too.
const SPLIT_BLOCKS: usize = 8;
/// Elements of x from which packing it is worth a parallel region.
const PARALLEL_ELEMENTS: usize = 1 << 13;

/// Computes `y = x * w^T (+ bias)`; `y` is `[x.num_rows, num_rows of w]`, contiguous, and need not be initialised to values.
pub(super) fn matmul(x: Rows<'_>, w: &HalfPanels, num_rows: usize, bias: Option<&[f32]>, y: &mut Unwritten) {
    let depth = x.width;
    let blocks = Blocks::new(x);
    let num_panels = num_rows.div_ceil(HALF_LANES);
    let job = Job { blocks: &blocks, w, num_rows, depth, bias, y: OutPtr::new(y) };
    let pieces = pool::cut(num_panels, 2, PANEL_GROUP);
    // Few panels make uneven shares; with many rows it costs little to read each panel once more.
    let parts = if blocks.blocks.len() >= SPLIT_BLOCKS { 2 } else { 1 };
    pool::run(pieces.len() * parts, |idx| {
        let (panels, part) = (pieces[idx / parts].clone(), idx % parts);
        let count = blocks.blocks.len();
        let rows = &blocks.blocks[count * part / parts..count * (part + 1) / parts];
        // SAFETY: weights are packed so only where the instructions were detected; these columns of these rows are this
        // piece's alone.
        unsafe { job.run(panels, rows) };
    });
}

/// The rows of x in blocks, each block transposed to `[k][rows]`.
struct Blocks {
    blocks: Vec<Block>,
    /// Each element twice, so that one load of 32 bits fills a vector with it: there is none for 16 bits.
    data: Vec<u32>,
    /// `[num_rows]`: what the sums of a row are multiplied by.
    scales: Vec<f32>,
}

struct Block {
    first: usize,
    rows: usize,
    /// In the data.
    offset: usize,
}

impl Blocks {
    fn new(x: Rows<'_>) -> Self {
        let depth = x.width;
        let num_blocks = x.num_rows.div_ceil(MAX_BLOCK_ROWS);
        let mut blocks = Vec::with_capacity(num_blocks);
        let mut first = 0;
        for block in 0..num_blocks {
            // Blocks of nearly equal size: a last block of one row would waste a pass over the weights.
            let rows = (x.num_rows - first).div_ceil(num_blocks - block);
            blocks.push(Block { first, rows, offset: first * depth });
            first += rows;
        }
        let mut data: Vec<u32> = Vec::with_capacity(x.num_rows * depth);
        let mut scales = vec![0.0; x.num_rows];
        let out = OutPtr(data.spare_capacity_mut().as_mut_ptr());
        let scales_out = OutPtr(scales.as_mut_ptr());
        let pack = |idx: usize| {
            let Block { first, rows, offset } = blocks[idx];
            let mut sources: [&[f32]; MAX_BLOCK_ROWS] = [&[]; MAX_BLOCK_ROWS];
            for (row, source) in sources[..rows].iter_mut().enumerate() {
                *source = x.row(first + row);
            }
            // SAFETY: one piece a block; blocks do not overlap and lie in the buffers by their offsets. The instructions
            // were detected.
            unsafe {
                let (out, scales) = (out.slice(offset, rows * depth), scales_out.slice(first, rows));
                pack_block(&sources[..rows], depth, out, scales);
            };
        };
        if x.num_rows * depth < PARALLEL_ELEMENTS {
            (0..num_blocks).for_each(pack);
        } else {
            pool::run(num_blocks, pack);
        }
        // SAFETY: every block wrote its `rows * depth` elements.
        unsafe { data.set_len(x.num_rows * depth) };
        Self { blocks, data, scales }
    }
}

struct Job<'a> {
    blocks: &'a Blocks,
    w: &'a HalfPanels,
    num_rows: usize,
    depth: usize,
    bias: Option<&'a [f32]>,
    y: OutPtr<f32>,
}

impl Job<'_> {
    /// `blocks` by `panels`, a run of the depth at a time: what is read of a panel stays in the first-level cache until all
    /// rows have seen it.
    ///
    /// # Safety
    /// AVX512-FP16; the columns of `panels` in these rows are nobody else's.
    unsafe fn run(&self, panels: std::ops::Range<usize>, blocks: &[Block]) {
        let most_rows = blocks.iter().map(|block| block.rows).max().unwrap_or(1);
        let group = (ACCUMULATORS / most_rows).clamp(1, PANEL_GROUP);
        let first_row = blocks.first().map_or(0, |block| block.first);
        let num_rows: usize = blocks.iter().map(|block| block.rows).sum();
        let mut sums = vec![0.0_f32; num_rows * group * HALF_LANES];
        let mut panel = panels.start;
        while panel < panels.end {
            let count = 1 << group.min(panels.end - panel).ilog2();
            let width = count * HALF_LANES;
            for start in (0..self.depth).step_by(RUN) {
                for (idx, block) in blocks.iter().enumerate() {
                    let ask = self.ahead((panel, count), start, (idx, blocks.len()));
                    let sums = &mut sums[(block.first - first_row) * width..][..block.rows * width];
                    // SAFETY: given by the caller.
                    unsafe { self.tile(block, (panel, count), start, ask, sums) };
                }
            }
            for (row, sums) in (first_row..).zip(sums.chunks_exact(width).take(num_rows)) {
                // SAFETY: given by the caller.
                unsafe { self.finish(row, panel, sums) };
            }
            panel += count;
        }
    }

    /// What block `idx` of `blocks` asks for while it goes through the run from `start` on: its share of the next run; a block
    /// that is alone, what comes soon.
    fn ahead(&self, (panel, count): (usize, usize), start: usize, (idx, blocks): (usize, usize)) -> Ahead {
        let panel_len = HALF_LANES * self.depth;
        let at =
            |panel: usize, k: usize| self.w.data.as_ptr().wrapping_add(panel * panel_len + k * HALF_LANES);
        if blocks == 1 {
            return Ahead { from: at(panel, start).wrapping_byte_add(PREFETCH_BYTES), share: Ahead::ALL };
        }
        let next = if start + RUN < self.depth { at(panel, start + RUN) } else { at(panel + count, 0) };
        Ahead { from: next.wrapping_add(RUN * idx / blocks * HALF_LANES), share: Ahead::ALL / blocks }
    }

    /// # Safety
    /// As [`Self::run`].
    unsafe fn tile(
        &self,
        block: &Block,
        (panel, panels): (usize, usize),
        start: usize,
        ask: Ahead,
        sums: &mut [f32],
    ) {
        macro_rules! cases {
            ($(($m:literal, $n:literal)),* $(,)?) => {
                match (block.rows, panels) {
                    // SAFETY: given by the caller; the sizes are those of the block and of the panels.
                    $(($m, $n) => unsafe { self.kernel::<$m, $n>(block, panel, start, ask, sums) },)*
                    (rows, panels) => unreachable!("no kernel for {rows} rows and {panels} panels"),
                }
            };
        }
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

    /// `M` rows by `N` panels from `panel` on, the run from `start` on: stored to `sums`, `[M][N * 32]`, if it is the first, else
    /// added. The chains are in registers.
    ///
    /// # Safety
    /// As [`Self::run`]; the block has `M` rows, and there are `N` panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16")]
    unsafe fn kernel<const M: usize, const N: usize>(
        &self,
        block: &Block,
        panel: usize,
        start: usize,
        ask: Ahead,
        sums: &mut [f32],
    ) {
        let depth = self.depth;
        let panel_len = HALF_LANES * depth;
        let weights = self.w.data[panel * panel_len..][..N * panel_len].as_ptr();
        let x = self.blocks.data[block.offset..][..M * depth].as_ptr();
        let sums = sums[..M * N * HALF_LANES].as_mut_ptr();
        let mut k = start;
        let run_end = depth.min(k + RUN);
        let mut run = [[_mm512_setzero_ph(); N]; M];
        while k < run_end {
            let end = run_end.min(k + CHAIN);
            let mut chain = [[_mm512_setzero_ph(); N]; M];
            while k < end {
                let asked = ask.from.wrapping_add((k - start) * ask.share / Ahead::ALL * HALF_LANES);
                let mut w = [_mm512_setzero_ph(); N];
                for n in 0..N {
                    // SAFETY: column `k` of a panel; a prefetch may name memory that is not ours.
                    unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(asked.wrapping_add(n * panel_len).cast());
                        let p = weights.add(n * panel_len + k * HALF_LANES);
                        w[n] = _mm512_castsi512_ph(_mm512_loadu_si512(p.cast()));
                    }
                }
                for m in 0..M {
                    // SAFETY: column `k` of the block.
                    let x = unsafe { *x.add(k * M + m) };
                    let x = _mm512_castsi512_ph(_mm512_set1_epi32(x.cast_signed()));
                    for n in 0..N {
                        chain[m][n] = _mm512_fmadd_ph(x, w[n], chain[m][n]);
                    }
                }
                k += 1;
            }
            for m in 0..M {
                for n in 0..N {
                    run[m][n] = _mm512_add_ph(run[m][n], chain[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                for (half, mut sum) in widen(run[m][n]).into_iter().enumerate() {
                    // SAFETY: there are so many sums.
                    unsafe {
                        let p = sums.add((m * N + n) * HALF_LANES + half * LANES);
                        if start > 0 {
                            sum = _mm512_add_ps(_mm512_loadu_ps(p), sum);
                        }
                        _mm512_storeu_ps(p, sum);
                    }
                }
            }
        }
    }

    /// Stores what the `sums` of a row by the panels from `panel` on come to.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512fp16")]
    unsafe fn finish(&self, row: usize, panel: usize, sums: &[f32]) {
        let scale = _mm512_set1_ps(self.blocks.scales[row]);
        for (sums, column) in sums.chunks_exact(LANES).zip((panel * HALF_LANES..).step_by(LANES)) {
            if column >= self.num_rows {
                break;
            }
            // SAFETY: sixteen sums; scales are padded to whole panels; this row's columns of these panels are this piece's.
            unsafe {
                let scales = _mm512_loadu_ps(self.w.scales[column..][..LANES].as_ptr());
                // One after the other: their product may be out of range where the result is not.
                let y = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(sums.as_ptr()), scales), scale);
                let place = (column, self.num_rows);
                store_outputs::<Avx512>(y, self.bias, self.y, row * self.num_rows, place);
            }
        }
    }
}

/// Lines to ask for on the way.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u16,
    /// Lines of each panel for [`Ahead::ALL`] columns.
    share: usize,
}

impl Ahead {
    const ALL: usize = 1 << 16;
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use half::f16;
    use rand::{Rng, SeedableRng};

    use super::super::halves::{FACTOR_EXPONENT, scale_to};
    use super::super::{Isa, PackedMatrix, isa, written};
    use super::*;

    fn product(x: &[f32], rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
        let x = Rows::new(x, rows, w.cols, w.cols).expect("as long as its shape");
        let compute = |y: &mut Unwritten| {
            super::super::matmul(x, w, bias, y);
            Ok::<_, ()>(())
        };
        // SAFETY: `matmul` writes all of `y`.
        unsafe { written(rows * w.rows, compute) }.expect("computes")
    }

    /// The nearest f16, ties to even. (The conversion at hand goes by way of f32, and so rounds twice.)
    fn nearest(x: f64) -> f16 {
        let near = f16::from_f32(x as f32).to_bits();
        let candidates = [near, near.wrapping_sub(1), near.wrapping_add(1)].map(f16::from_bits);
        let distance = |y: &f16| (y.to_f64() - x).abs();
        let closer = |a: f16, b: f16| match distance(&a).total_cmp(&distance(&b)) {
            std::cmp::Ordering::Equal if b.to_bits().is_multiple_of(2) => b,
            std::cmp::Ordering::Greater => b,
            _ => a,
        };
        candidates.into_iter().filter(|y| y.is_finite()).reduce(closer).expect("a finite sum")
    }

    /// The three levels in plain numbers: f64 holds a product of f16 exactly, and a sum of it with another but for what is
    /// far below the last place of an f16; it is then rounded once.
    fn by_the_book(x: &[f32], w: &[f32], bias: f32) -> f32 {
        let largest = |row: &[f32]| row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let ((x_factor, x_scale), (w_factor, w_scale)) =
            (scale_to(largest(x), FACTOR_EXPONENT), scale_to(largest(w), 0));
        let mut sum = 0.0_f32;
        for (x, w) in x.chunks(RUN).zip(w.chunks(RUN)) {
            let mut run = f16::ZERO;
            for (x, w) in x.chunks(CHAIN).zip(w.chunks(CHAIN)) {
                let mut chain = f16::ZERO;
                for (x, w) in x.iter().zip(w) {
                    let (x, w) = (f16::from_f32(x * x_factor), f16::from_f32(w * w_factor));
                    chain = nearest(x.to_f64() * w.to_f64() + chain.to_f64());
                }
                run = nearest(run.to_f64() + chain.to_f64());
            }
            sum += run.to_f32();
        }
        sum * w_scale * x_scale + bias
    }

    fn used() -> bool {
        let used = isa() == Isa::Avx512Fp16;
        if !used {
            eprintln!("not the instruction set in use: nothing to test");
        }
        used
    }

    #[test]
    fn every_bit_is_as_defined() {
        if !used() {
            return;
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (n, k) in [(1, 1), (17, 15), (32, 16), (33, 17), (70, 129), (130, 300)] {
            for dtype in [DType::BF16, DType::F16] {
                // Rows of all sizes, and outliers, as weights and activations have them.
                let mut numbers = |rows: usize, sizes: &[f32]| -> Vec<f32> {
                    (0..rows * k)
                        .map(|i| {
                            let x: f32 = rng.random_range(-1.0..1.0);
                            x * sizes[i / k % sizes.len()] * if i % 97 == 5 { 300.0 } else { 1.0 }
                        })
                        .collect()
                };
                let w = numbers(n, &[0.02, 1.0, 3.0, 0.0]);
                let w = Tensor::from_vec(w, (n, k), &Device::Cpu)
                    .and_then(|w| w.to_dtype(dtype))
                    .expect("a matrix");
                let packed = PackedMatrix::pack_halves(std::slice::from_ref(&w), dtype).expect("packs");
                let w = w.to_dtype(DType::F32).and_then(|w| w.to_vec2::<f32>()).expect("numbers");
                let bias = numbers(n, &[1.0])[..n].to_vec();
                for m in [1, 2, 3, 5, 8, 13, 25, 40] {
                    let x = numbers(m, &[1.0, 1e-3, 0.0, 700.0, 1e30, 1e-30, 1e-42]);
                    let found = product(&x, m, &packed, Some(&bias));
                    for (x, found) in x.chunks(k).zip(found.chunks(n)) {
                        for ((w, bias), found) in w.iter().zip(&bias).zip(found) {
                            let wanted = by_the_book(x, w, *bias);
                            assert_eq!(
                                found.to_bits(),
                                wanted.to_bits(),
                                "{m} x {n} x {k}: {found} {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        if !used() {
            return;
        }
        let (n, k) = (40, 33);
        let w = Tensor::ones((n, k), DType::BF16, &Device::Cpu).expect("a matrix");
        let packed = PackedMatrix::pack_halves(&[w], DType::BF16).expect("packs");
        let mut x = vec![1.0_f32; 5 * k];
        (x[k + 2], x[3 * k + 32]) = (f32::NAN, f32::INFINITY);
        let y = product(&x, 5, &packed, None);
        for (row, y) in y.chunks(n).enumerate() {
            match row {
                1 => assert!(y.iter().all(|y| y.is_nan())),
                3 => assert!(y.iter().all(|y| !y.is_finite())),
                _ => assert_eq!(y, vec![k as f32; n]),
            }
        }
    }
}
