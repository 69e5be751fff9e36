//! Whole-number weights on byte tiles, with the very bits of the byte dot products of vectors.
//!
//! A group of 32 columns has a scale of its own, so a tile product is one group: 16 rows by 16 outputs by 32 columns, half
//! the depth of a tile. Its sums are whole numbers and exact; from there on each output goes through the same f32
//! operations in the same order as in [`super::super::quant_gemm`], so it does not matter which of the two computed a
//! row. That lets a few rows, and the few that are left over of many, stay with vectors.
//!
//! The codes of some panels are first spread to signed bytes counted from their zero, which are tiles as they lie and
//! serve all rows.

use std::arch::asm;
use std::ops::Range;

use super::super::quant::{CodeWidth, GROUP, QuantMatrix, STEP_COLS};
use super::super::quant_gemm::weights_of;
use super::super::rounding::Largest;
use super::super::scratch::{Line, Scratch};
use super::super::simd::{LANES, Simd};
use super::super::{OutPtr, dispatch, store_outputs};
use super::{TILE_BYTES, TILE_ROWS, TileConfig, load_config, release};

/// Rows from which a tile is expected to be faster than vectors: what it costs does not depend on how many it has.
const MIN_ROWS: usize = 8;
/// Bytes of a group's codes of a panel: a tile of half the depth.
const CODE_BYTES: usize = GROUP * LANES;
/// Panels spread at once, so that the activations of a block of rows are read from near.
const PANELS: usize = 4;
/// What may be read beyond the last row of activations: up to two groups, less the eight columns that a row has.
pub(in crate::cpu) const SLACK: usize = 2 * GROUP;

/// Tiles 0 and 1 are sums, 2 and 3 activations, 4 and 5 codes.
static CONFIG: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let shapes = [(16, 64), (16, 64), (16, 32), (16, 32), (8, 64), (8, 64)];
    let mut tile = 0;
    while tile < shapes.len() {
        let (rows, row_bytes) = shapes[tile];
        bytes[16 + 2 * tile] = row_bytes;
        bytes[48 + tile] = rows;
        tile += 1;
    }
    TileConfig(bytes)
};

/// How many of `num_rows` rows, from the first on, are for tiles.
pub(in crate::cpu) fn tiled_rows(num_rows: usize) -> usize {
    let rest = num_rows % TILE_ROWS;
    if rest >= MIN_ROWS { num_rows } else { num_rows - rest }
}

/// Activations as signed bytes, and what their groups are multiplied by.
pub(in crate::cpu) struct TiledRows<'a> {
    num_rows: usize,
    /// `[num_rows, padded][depth]` and [`SLACK`].
    codes: &'a [i8],
    /// `[block of rows][group][16 rows]`
    scales: Scratch<f32>,
    /// As the scales, if there are minima.
    totals: Scratch<f32>,
    /// `[num_rows]`: the element that is not among the codes.
    largest: &'a [Largest],
}

impl<'a> TiledRows<'a> {
    /// The first `num_rows` of the rows with these `codes`, scales and totals `[row][group]`, and largest elements.
    pub(in crate::cpu) fn new(
        num_rows: usize,
        codes: &'a [i8],
        scales: &[f32],
        totals: &[f32],
        largest: &'a [Largest],
        w: &QuantMatrix,
    ) -> Self {
        assert!(codes.len() >= num_rows.next_multiple_of(TILE_ROWS) * w.depth + SLACK, "room for tiles");
        let groups = w.num_groups();
        let by_group = |rows: &[f32]| {
            let mut tiles = Scratch::filled(num_rows.next_multiple_of(TILE_ROWS) * groups, 0.0);
            for (row, values) in rows.chunks_exact(groups.max(1)).take(num_rows).enumerate() {
                let tile = &mut tiles[row / TILE_ROWS * TILE_ROWS * groups..][..TILE_ROWS * groups];
                for (group, value) in values.iter().enumerate() {
                    tile[group * TILE_ROWS + row % TILE_ROWS] = *value;
                }
            }
            tiles
        };
        let totals = if w.mins.is_some() { by_group(totals) } else { Scratch::any(0) };
        Self { num_rows, codes, scales: by_group(scales), totals, largest }
    }
}

/// A product, all of whose rows are for tiles.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Job<'a> {
    pub(in crate::cpu) x: &'a TiledRows<'a>,
    pub(in crate::cpu) w: &'a QuantMatrix,
    pub(in crate::cpu) bias: Option<&'a [f32]>,
    pub(in crate::cpu) y: OutPtr<f32>,
}

/// Computes the columns of `panels` for all rows of the job.
///
/// # Safety
/// Tiles may be used; `y` is at least `[x.num_rows, w.rows]` and the columns of `panels` are nobody else's.
pub(in crate::cpu) unsafe fn panels_of(job: &Job<'_>, panels: Range<usize>) {
    dispatch!(run(job, panels) -> (), [job: &Job<'_>, panels: Range<usize>]);
}

/// The sums of two groups, twice: one half is filled while the other is used.
#[repr(C, align(64))]
struct Sums([[[i32; TILE_ROWS * LANES]; 2]; 2]);

/// # Safety
/// As [`panels_of`], and the instruction set of `S`.
#[inline(always)]
unsafe fn run<S: Simd>(job: &Job<'_>, panels: Range<usize>) {
    // An even number of groups; what no column fills stays zero.
    let panel_lines = job.w.num_groups().next_multiple_of(2) * CODE_BYTES / size_of::<Line>();
    let mut codes = Scratch::filled(PANELS.min(panels.len()) * panel_lines, Line([0; 64]));
    // SAFETY: tiles may be used; every block is given whole tiles: of rows by the padding of `TiledRows`, of codes by
    // that of `codes`.
    unsafe {
        load_config(&CONFIG);
        let mut first = panels.start;
        while first < panels.end {
            let count = PANELS.min(panels.end - first);
            for n in 0..count {
                spread(job.w, first + n, &mut codes[n * panel_lines..][..panel_lines]);
            }
            for row in (0..job.x.num_rows).step_by(TILE_ROWS) {
                for n in 0..count {
                    block::<S>(job, &codes[n * panel_lines..][..panel_lines], first + n, row);
                }
            }
            first += count;
        }
        release();
    }
}

/// The codes of a panel as the bits of signed bytes, counted from their zero; a line is a row of a tile.
#[inline(always)]
fn spread(w: &QuantMatrix, panel: usize, out: &mut [Line]) {
    let panel_bytes = w.width.panel_bytes(w.depth);
    let codes = &w.codes[panel * panel_bytes..][..panel_bytes];
    // Bytes count from 128, half bytes from 8 or 0: the difference is a signed byte.
    let zero = w.zero as u8;
    match w.width {
        CodeWidth::Byte => {
            for (out, codes) in out.iter_mut().zip(codes.chunks_exact(size_of::<Line>())) {
                for (out, code) in out.0.iter_mut().zip(codes) {
                    *out = code.wrapping_sub(zero);
                }
            }
        }
        CodeWidth::Half => {
            const { assert!(STEP_COLS * LANES == 2 * size_of::<Line>()) };
            for (out, codes) in out.chunks_exact_mut(2).zip(codes.chunks_exact(size_of::<Line>())) {
                for (i, code) in codes.iter().enumerate() {
                    out[0].0[i] = (code & 15).wrapping_sub(zero);
                    out[1].0[i] = (code >> 4).wrapping_sub(zero);
                }
            }
        }
    }
}

/// Sixteen rows from `row` on by one panel, all outputs in registers.
///
/// # Safety
/// As [`run`]; tiles are configured; `codes` are those of the panel.
#[inline(always)]
unsafe fn block<S: Simd>(job: &Job<'_>, codes: &[Line], panel: usize, row: usize) {
    let Job { x, w, bias, y } = *job;
    let (groups, depth) = (w.num_groups(), w.depth);
    let at = panel * groups * LANES;
    let scales = w.scales[at..][..groups * LANES].as_ptr();
    let mins = w.mins.as_ref().map(|mins| mins[at..][..groups * LANES].as_ptr());
    let x_scales = x.scales[row * groups..][..TILE_ROWS * groups].as_ptr();
    let x_totals = mins.map(|_| x.totals[row * groups..][..TILE_ROWS * groups].as_ptr());
    let x_codes = x.codes[row * depth..][..TILE_ROWS * depth].as_ptr();
    let codes: *const i8 = codes.as_ptr().cast();
    let mut sums = Sums([[[0; TILE_ROWS * LANES]; 2]; 2]);
    let pairs = groups.div_ceil(2);
    // SAFETY: the groups of a pair lie in the codes, which are padded to pairs; a pair of the last row of activations
    // may reach beyond it, into the slack; scales and totals are cut to size above; the stores are this piece's.
    unsafe {
        let mut outputs = [S::splat(0.0); TILE_ROWS];
        if pairs > 0 {
            products(x_codes, depth, codes, &mut sums.0[0]);
        }
        for pair in 0..pairs {
            // The next sums are on their way while these are used.
            if pair + 1 < pairs {
                let next = pair + 1;
                let (x, codes) = (x_codes.add(next * 2 * GROUP), codes.add(next * 2 * CODE_BYTES));
                products(x, depth, codes, &mut sums.0[next % 2]);
            }
            for group in 2 * pair..groups.min(2 * pair + 2) {
                let sums = sums.0[pair % 2][group % 2].as_ptr();
                let scale = S::load_f16(scales.add(group * LANES));
                for m in 0..TILE_ROWS {
                    let both = S::mul(scale, S::splat(*x_scales.add(group * TILE_ROWS + m)));
                    outputs[m] = S::fma(both, S::load_i32(sums.add(m * LANES)), outputs[m]);
                }
                if let (Some(mins), Some(totals)) = (mins, x_totals) {
                    let min = S::load_f16(mins.add(group * LANES));
                    for m in 0..TILE_ROWS {
                        let total = S::splat(*totals.add(group * TILE_ROWS + m));
                        outputs[m] = S::fma(min, total, outputs[m]);
                    }
                }
            }
        }
        let column = panel * LANES;
        let rows = TILE_ROWS.min(x.num_rows - row);
        for (m, output) in outputs.iter().enumerate().take(rows) {
            let Largest { column: column_of_largest, value } = x.largest[row + m];
            let weights = weights_of::<S>(w, panel, column_of_largest as usize);
            let output = S::mul(S::fma(S::splat(value), weights, *output), S::splat(w.unit));
            store_outputs::<S>(output, bias, y, (row + m) * w.rows, (column, w.rows));
        }
    }
}

/// `sums[i] = x[.., 32 i..32 i + 32] * codes[32 i..]` for two groups.
///
/// # Safety
/// Tiles are configured as [`CONFIG`]. `x`: 16 rows of 64 bytes, `stride` apart; `codes`: 1024 bytes.
#[inline(always)]
unsafe fn products(x: *const i8, stride: usize, codes: *const i8, sums: &mut [[i32; TILE_ROWS * LANES]; 2]) {
    // SAFETY: the loads stay in what the caller gives, the stores in `sums`; tile registers belong to nobody between
    // blocks, and are declared as changed.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm2, [{x} + {x_row} * 1]",
            "tileloadd tmm4, [{codes} + {row} * 1]",
            "tdpbssd tmm0, tmm2, tmm4",
            "tileloadd tmm3, [{x} + {x_row} * 1 + 32]",
            "tileloadd tmm5, [{codes} + {row} * 1 + 512]",
            "tdpbssd tmm1, tmm3, tmm5",
            "tilestored [{out} + {row} * 1], tmm0",
            "tilestored [{out} + {row} * 1 + 1024], tmm1",
            x = in(reg) x,
            x_row = in(reg) stride,
            codes = in(reg) codes,
            row = in(reg) TILE_BYTES / TILE_ROWS,
            out = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            options(nostack),
        );
    }
}

/// As [`super::first_product_is_right`], for bytes of all magnitudes and both signs.
pub(super) fn first_product_is_right() -> bool {
    let byte = |i: usize| (i * 37 % 256) as u8 as i8;
    let x: Vec<i8> = (0..TILE_ROWS * 2 * GROUP).map(byte).collect();
    let codes: Vec<i8> = (0..2 * CODE_BYTES).map(|i| byte(i + i / 7)).collect();
    let mut sums = Sums([[[0; TILE_ROWS * LANES]; 2]; 2]);
    // SAFETY: tiles may be used; sixteen rows of 64 bytes and 1024 bytes of codes.
    unsafe {
        load_config(&CONFIG);
        products(x.as_ptr(), 2 * GROUP, codes.as_ptr(), &mut sums.0[0]);
        release();
    }
    (0..2 * TILE_ROWS * LANES).all(|i| {
        let (group, row, column) = (i / (TILE_ROWS * LANES), i / LANES % TILE_ROWS, i % LANES);
        let product = |k: usize| {
            let code = codes[group * CODE_BYTES + k / 4 * 4 * LANES + column * 4 + k % 4];
            i32::from(x[row * 2 * GROUP + group * GROUP + k]) * i32::from(code)
        };
        sums.0[0][group][row * LANES + column] == (0..GROUP).map(product).sum::<i32>()
    })
}
