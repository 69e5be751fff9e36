//! `x [m, k] * w [n, k]^T -> y [m, n]` by instructions that multiply 16-bit numbers, over the lines of packed weights.
//!
//! A *line* is 64 bytes of a panel: what one instruction multiplies with one number of 32 bits of a row of x. What the numbers
//! are is told by [`Lines`]: f16 (`half_gemm.rs`: 32 rows of w by one column, x twice) or pairs of bf16 (`bf16_gemm.rs`: 16
//! rows of w by two columns).
//!
//! All blocks of rows go through a run of lines of some panels before the next run, so what is read of a panel stays in the
//! first-level cache until all rows have seen it, and each block asks for its share of the next run.
//!
//! Every output element is summed in one order, whatever m is: its bits depend on its own row alone.

use std::arch::x86_64::{__m512, _MM_HINT_T0, _mm_prefetch};
use std::ops::Range;

use super::scratch::Scratch;
use super::simd::{Avx512, LANES};
use super::{OutPtr, Rows, Unwritten, pool, store_outputs};

/// Rows of a block at most: more would not leave registers for the operands.
pub(super) const MAX_BLOCK_ROWS: usize = 12;
/// Lines that are multiplied before other rows have their turn.
pub(super) const RUN: usize = 128;
/// Elements of a line.
pub(super) const LINE: usize = 32;
/// Sums that stay in registers beside their operands.
const ACCUMULATORS: usize = 24;
/// Panels that one group of accumulators spans at most.
const PANEL_GROUP: usize = 8;
/// How far ahead of the loads weights are asked for, in bytes of each panel.
const PREFETCH_BYTES: usize = 1024;
/// Blocks of rows from which they are shared, too.
const SPLIT_BLOCKS: usize = 8;
/// Numbers of x from which packing it is worth a parallel region.
const PARALLEL_NUMBERS: usize = 1 << 13;

/// Weights in lines, and how lines are multiplied.
///
/// # Safety
/// All methods need the instructions of the implementation. `sums` are `[M rows][N panels][PANEL_ROWS]`, or those of one row.
pub(super) trait Lines: Sync {
    /// Rows of w in a panel.
    const PANEL_ROWS: usize;

    /// All panels, one after another.
    fn panels(&self) -> &[u16];

    /// Lines of a panel.
    fn depth(&self) -> usize;

    /// Rounds and transposes rows of x; writes all of `out`, `[depth][rows]`, and what the sums of each row are to be
    /// multiplied by.
    unsafe fn pack(&self, rows: &[&[f32]], out: &mut [u32], scales: &mut [f32]);

    /// Multiplies `M` rows by `N` panels; see [`Tile`].
    unsafe fn multiply<const M: usize, const N: usize>(tile: &Tile);

    /// The outputs that sixteen `sums` of a row come to, from `column` on; `scale` is the row's. Inlined: AVX-512 F is all it may
    /// use.
    unsafe fn finish(&self, sums: *const f32, scale: f32, column: usize) -> __m512;
}

/// Where outputs go.
struct Outputs<'a> {
    /// Rows of w.
    num_rows: usize,
    bias: Option<&'a [f32]>,
    y: OutPtr<f32>,
}

/// A run of lines of some panels, and a block of rows that meets them.
pub(super) struct Tile {
    /// The first panel; the next ones follow, `panel_len` elements apart.
    pub(super) weights: *const u16,
    pub(super) panel_len: usize,
    /// `[depth][M]`
    pub(super) x: *const u32,
    /// Lines of this run.
    pub(super) lines: Range<usize>,
    /// Stored if the run is the first, else added to.
    pub(super) sums: *mut f32,
    ahead: Ahead,
}

impl Tile {
    /// Asks for what comes next, while line `k` of panel `n` is multiplied.
    #[inline(always)]
    pub(super) fn ask(&self, k: usize, n: usize) {
        let Ahead { from, share } = self.ahead;
        let at = from.wrapping_add((k - self.lines.start) * share / Ahead::ALL * LINE + n * self.panel_len);
        // SAFETY: a prefetch may name memory that is not ours; every x86-64 processor has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
}

/// Lines to ask for on the way.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u16,
    /// Lines of each panel for [`Ahead::ALL`] lines.
    share: usize,
}

impl Ahead {
    const ALL: usize = 1 << 16;
}

/// Computes `y = x * w^T (+ bias)`; `y` is `[x.num_rows, num_rows of w]`, contiguous, and need not be initialised to values.
///
/// # Safety
/// The instructions of `L`; `w` has panels for `num_rows` rows.
pub(super) unsafe fn matmul<L: Lines>(
    x: Rows<'_>,
    w: &L,
    num_rows: usize,
    bias: Option<&[f32]>,
    y: &mut Unwritten,
) {
    let blocks = Blocks::new(x, w);
    let num_panels = num_rows.div_ceil(L::PANEL_ROWS);
    let job = Job { blocks: &blocks, w, outputs: Outputs { num_rows, bias, y: OutPtr::new(y) } };
    let pieces = pool::cut(num_panels, 2, PANEL_GROUP);
    // Few panels make uneven shares; with many rows it costs little to read each panel once more.
    let parts = if blocks.blocks.len() >= SPLIT_BLOCKS { 2 } else { 1 };
    pool::run(pieces.len() * parts, |idx| {
        let (panels, part) = (pieces[idx / parts].clone(), idx % parts);
        let count = blocks.blocks.len();
        let rows = &blocks.blocks[count * part / parts..count * (part + 1) / parts];
        // SAFETY: the instructions are given; these columns of these rows are this piece's alone.
        unsafe { job.run(panels, rows) };
    });
}

/// The rows of x in blocks, each block transposed to `[depth][rows]`.
struct Blocks {
    blocks: Vec<Block>,
    data: Scratch<u32>,
    /// `[num_rows]`: what the sums of a row are multiplied by.
    scales: Scratch<f32>,
}

struct Block {
    first: usize,
    rows: usize,
    /// In the data.
    offset: usize,
}

impl Blocks {
    fn new(x: Rows<'_>, w: &impl Lines) -> Self {
        let depth = w.depth();
        let num_blocks = x.num_rows.div_ceil(MAX_BLOCK_ROWS);
        let mut blocks = Vec::with_capacity(num_blocks);
        let mut first = 0;
        for block in 0..num_blocks {
            // Blocks of nearly equal size: a last block of one row would waste a pass over the weights.
            let rows = (x.num_rows - first).div_ceil(num_blocks - block);
            blocks.push(Block { first, rows, offset: first * depth });
            first += rows;
        }
        let mut data = Scratch::<u32>::any(x.num_rows * depth);
        let mut scales = Scratch::filled(x.num_rows, 1.0);
        let out = OutPtr(data.as_mut_ptr());
        let scales_out = OutPtr(scales.as_mut_ptr());
        let pack = |idx: usize| {
            let Block { first, rows, offset } = blocks[idx];
            let mut sources: [&[f32]; MAX_BLOCK_ROWS] = [&[]; MAX_BLOCK_ROWS];
            for (row, source) in sources[..rows].iter_mut().enumerate() {
                *source = x.row(first + row);
            }
            // SAFETY: one piece a block; blocks do not overlap and lie in the buffers by their offsets. The instructions
            // are given.
            unsafe {
                let (out, scales) = (out.slice(offset, rows * depth), scales_out.slice(first, rows));
                w.pack(&sources[..rows], out, scales);
            };
        };
        if x.num_rows * depth < PARALLEL_NUMBERS {
            (0..num_blocks).for_each(pack);
        } else {
            pool::run(num_blocks, pack);
        }
        Self { blocks, data, scales }
    }
}

struct Job<'a, L> {
    blocks: &'a Blocks,
    w: &'a L,
    outputs: Outputs<'a>,
}

impl<L: Lines> Job<'_, L> {
    /// `blocks` by `panels`, a run at a time.
    ///
    /// # Safety
    /// The instructions of `L`; the columns of `panels` in these rows are nobody else's.
    unsafe fn run(&self, panels: Range<usize>, blocks: &[Block]) {
        let depth = self.w.depth();
        let most_rows = blocks.iter().map(|block| block.rows).max().unwrap_or(1);
        let group = (ACCUMULATORS / most_rows).clamp(1, PANEL_GROUP);
        let first_row = blocks.first().map_or(0, |block| block.first);
        let num_rows: usize = blocks.iter().map(|block| block.rows).sum();
        let mut sums = Scratch::<f32>::any(num_rows * group * L::PANEL_ROWS);
        let mut panel = panels.start;
        while panel < panels.end {
            let count = 1 << group.min(panels.end - panel).ilog2();
            let width = count * L::PANEL_ROWS;
            // One also if there is nothing to sum: outputs are written by the last.
            for start in (0..depth.max(1)).step_by(RUN) {
                for (idx, block) in blocks.iter().enumerate() {
                    let sums = &mut sums[(block.first - first_row) * width..][..block.rows * width];
                    let ahead = self.ahead((panel, count), start, (idx, blocks.len()));
                    // SAFETY: given by the caller; `sums` has a place for each row and panel.
                    unsafe {
                        self.tile(block, (panel, count), start, ahead, sums);
                        if depth <= start + RUN {
                            self.finish(block, panel, sums);
                        }
                    }
                }
            }
            panel += count;
        }
    }

    /// What block `idx` of `blocks` asks for while it goes through the run from `start` on: its share of the next run; a block
    /// that is alone, what comes soon.
    fn ahead(&self, (panel, count): (usize, usize), start: usize, (idx, blocks): (usize, usize)) -> Ahead {
        let depth = self.w.depth();
        let at = |panel: usize, k: usize| self.w.panels().as_ptr().wrapping_add((panel * depth + k) * LINE);
        if blocks == 1 {
            return Ahead { from: at(panel, start).wrapping_byte_add(PREFETCH_BYTES), share: Ahead::ALL };
        }
        let next = if start + RUN < depth { at(panel, start + RUN) } else { at(panel + count, 0) };
        Ahead { from: next.wrapping_add(RUN * idx / blocks * LINE), share: Ahead::ALL / blocks }
    }

    /// Stores what the sums of a block's rows by the panels from `panel` on come to, while they are in the nearest cache.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn finish(&self, block: &Block, panel: usize, sums: &[f32]) {
        let Outputs { num_rows, bias, y } = self.outputs;
        for (row, sums) in (block.first..).zip(sums.chunks_exact(sums.len() / block.rows)) {
            let scale = self.blocks.scales[row];
            for (sums, column) in
                sums.chunks_exact(LANES).zip((panel * L::PANEL_ROWS..num_rows).step_by(LANES))
            {
                // SAFETY: sixteen sums; this row's columns of these panels are this piece's.
                unsafe {
                    let outputs = self.w.finish(sums.as_ptr(), scale, column);
                    store_outputs::<Avx512>(outputs, bias, y, row * num_rows, (column, num_rows));
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::run`]; `sums` are the block's by these panels.
    unsafe fn tile(
        &self,
        block: &Block,
        (panel, panels): (usize, usize),
        start: usize,
        ahead: Ahead,
        sums: &mut [f32],
    ) {
        let depth = self.w.depth();
        let panel_len = depth * LINE;
        assert_eq!(sums.len(), block.rows * panels * L::PANEL_ROWS, "sums");
        let tile = Tile {
            weights: self.w.panels()[panel * panel_len..][..panels * panel_len].as_ptr(),
            panel_len,
            x: self.blocks.data[block.offset..][..block.rows * depth].as_ptr(),
            lines: start..depth.min(start + RUN),
            sums: sums.as_mut_ptr(),
            ahead,
        };
        macro_rules! cases {
            ($(($m:literal, $n:literal)),* $(,)?) => {
                match (block.rows, panels) {
                    // SAFETY: the instructions are given; the sizes are those of the block and of the panels.
                    $(($m, $n) => unsafe { L::multiply::<$m, $n>(&tile) },)*
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
}
