//! `x [m, k] * w [n, k]^T -> y [m, n]` on the matrix unit of AMX: bf16 by bf16, summed in f32. Whole-number weights are in
//! [`bytes`].
//!
//! The packed panels of a bf16 weight are tiles as they lie: 32 columns of a panel are 16 rows of 64 bytes. Activations
//! are rounded to bf16 and padded to whole tiles of sixteen rows, so that one tile shape serves every call. Each output
//! element is summed over k in one fixed order within its own row: its bits do not depend on m.
//!
//! The whole inner loop is one `asm!` block: the compiler knows nothing of tile registers, so nothing may live in them
//! from one block to the next but their configuration.

use std::arch::asm;

pub(super) use super::matrix::BF16_TILE_COLS as TILE_COLS;
use super::matrix::PackedMatrix;
use super::scratch::Scratch;
use super::simd::{LANES, Simd};
use super::{OutPtr, Rows, Unwritten, dispatch, pool};

pub(super) mod bytes;
#[cfg(test)]
mod emulator;
#[cfg(test)]
pub(super) mod tests;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes of a tile.
pub(super) const TILE_BYTES: usize = 1024;
/// Panels that are multiplied at once.
const PANELS: usize = 2;

/// What `ldtilecfg` reads: palette 1, all eight tiles of 16 rows of 64 bytes. Read by address; as a constant of a
/// function it might be built on the stack in part only.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static CONFIG: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = TILE_ROWS as u8;
        tile += 1;
    }
    TileConfig(bytes)
};

/// Whether this processor and system have tiles of bf16 and bytes and let this process use them, and one product of each
/// comes out right.
pub(super) fn is_available() -> bool {
    has_tiles() && may_use_tiles() && first_product_is_right() && bytes::first_product_is_right()
}

fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the feature is enabled on this function; register 0 always exists.
        unsafe { _xgetbv(0) }
    }
    const OSXSAVE: u32 = 1 << 27;
    const BF16_TILE_AND_INT8: u32 = (1 << 22) | (1 << 24) | (1 << 25);
    const TILE_STATE: u64 = (1 << 17) | (1 << 18);
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: `OSXSAVE` says that the instruction may be used.
    let state = unsafe { enabled_state() };
    __cpuid_count(7, 0).edx & BF16_TILE_AND_INT8 == BF16_TILE_AND_INT8 && state & TILE_STATE == TILE_STATE
}

/// Linux saves tile registers only for processes that have asked.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call takes two numbers and changes nothing but the permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// How other systems grant it is not known to us.
#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// Rather one product at start than wrong answers on hardware (or an emulation of it) that differs from the manual.
fn first_product_is_right() -> bool {
    let bf16 = |i: usize| half::bf16::from_f32((i % 7) as f32 - 3.0).to_bits();
    let x: Vec<u16> = (0..2 * TILE_ROWS * TILE_COLS).map(bf16).collect();
    let w: Vec<u16> = (0..PANELS * LANES * TILE_COLS).map(|i| bf16(i + i / 5)).collect();
    let mut sums = [0.0; 4 * TILE_ROWS * LANES];
    // SAFETY: tiles may be used; x has two tiles, w one tile for each panel, sums room for four.
    unsafe {
        configure();
        multiply::<true>(x.as_ptr(), TILE_COLS, w.as_ptr(), TILE_COLS, &mut sums);
        release();
    }
    let value = |bits: u16| half::bf16::from_bits(bits).to_f32();
    (0..2 * TILE_ROWS).all(|row| {
        (0..PANELS * LANES).all(|column| {
            let (panel, lane) = (column / LANES, column % LANES);
            let product = |k: usize| {
                let at = panel * LANES * TILE_COLS + (k / 2) * 2 * LANES + lane * 2 + k % 2;
                value(x[row * TILE_COLS + k]) * value(w[at])
            };
            let wanted: f32 = (0..TILE_COLS).map(product).sum();
            let tile = (row / TILE_ROWS) * PANELS + panel;
            // Small whole numbers: exact in any order.
            sums[(tile * TILE_ROWS + row % TILE_ROWS) * LANES + lane] == wanted
        })
    })
}

/// Computes `y = x * w^T (+ bias)` for a bf16 weight with panels `data`; `y` is `[x.num_rows, w.rows]`, contiguous, and
/// need not be initialised to values.
pub(super) fn matmul(x: Rows<'_>, w: &PackedMatrix, data: &[u16], bias: Option<&[f32]>, y: &mut Unwritten) {
    let x = &RoundedRows::new(x, w.depth);
    let num_panels = w.num_panels();
    // Enough pieces for all threads to end together, each long enough to be worth claiming.
    let pieces = num_panels.div_ceil(4 * PANELS).min(8 * pool::num_threads()).max(1);
    let per_piece = num_panels.div_ceil(pieces).next_multiple_of(PANELS);
    let y = OutPtr::new(y);
    pool::run(num_panels.div_ceil(per_piece), |piece| {
        let panels = piece * per_piece..((piece + 1) * per_piece).min(num_panels);
        // SAFETY: the matrix unit is in use only where it is available; the columns of these panels are this piece's
        // alone.
        unsafe {
            configure();
            for panel in panels.clone().step_by(PANELS) {
                run_panels(x, w, data, bias, y, panel, (panels.end - panel).min(PANELS));
            }
            release();
        }
    });
}

/// Activations as bf16, `[num_rows, padded][depth]`.
struct RoundedRows {
    num_rows: usize,
    data: Scratch<u16>,
}

impl RoundedRows {
    fn new(x: Rows<'_>, depth: usize) -> Self {
        let padded_rows = x.num_rows.next_multiple_of(TILE_ROWS);
        let mut data = Scratch::filled(padded_rows * depth, 0_u16);
        let out = OutPtr(data.as_mut_ptr());
        let row = |idx: usize| {
            // SAFETY: one piece a row; rows do not overlap.
            let out = unsafe { out.slice(idx * depth, depth) };
            let x = x.row(idx);
            dispatch!(round(x, out) -> (), [x: &[f32], out: &mut [u16]]);
        };
        if x.num_rows * depth < 1 << 15 {
            (0..x.num_rows).for_each(row);
        } else {
            pool::run(x.num_rows, row);
        }
        Self { num_rows: x.num_rows, data }
    }
}

/// Rounds `x` to bf16.
///
/// # Safety
/// `out` is at least as long as `x`; the instruction set of `S`.
#[inline(always)]
unsafe fn round<S: Simd>(x: &[f32], out: &mut [u16]) {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let (out, rest_out) = out.split_at_mut(vectors.len() * LANES);
    for (x, out) in vectors.iter().zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: both have sixteen elements; the instruction set is given.
        unsafe { S::store_bf16(out.as_mut_ptr(), S::load(x.as_ptr())) };
    }
    for (x, out) in rest.iter().zip(rest_out) {
        *out = half::bf16::from_f32(*x).to_bits();
    }
}

/// All rows by `count` panels from `panel` on.
///
/// # Safety
/// Tiles are configured; `data` are the panels of `w`; `y` is `[x.num_rows, w.rows]` and the columns of these panels are
/// nobody else's.
unsafe fn run_panels(
    x: &RoundedRows,
    w: &PackedMatrix,
    data: &[u16],
    bias: Option<&[f32]>,
    y: OutPtr<f32>,
    panel: usize,
    count: usize,
) {
    let depth = w.depth;
    let panels = data[panel * LANES * depth..][..count * LANES * depth].as_ptr();
    // A single last panel is multiplied twice over: its second half goes nowhere.
    let panel_stride = if count == PANELS { LANES * depth } else { 0 };
    let mut sums = [0.0_f32; 4 * TILE_ROWS * LANES];
    let mut first = 0;
    while first < x.num_rows {
        let two = x.num_rows - first > TILE_ROWS;
        let rows = (x.num_rows - first).min(if two { 2 * TILE_ROWS } else { TILE_ROWS });
        let tiles = x.data[first * depth..][..rows.next_multiple_of(TILE_ROWS) * depth].as_ptr();
        // SAFETY: `tiles` has whole tiles of rows, `panels` whole tiles of columns: the depth is padded to them.
        unsafe {
            if two {
                multiply_strided::<true>(tiles, depth, panels, panel_stride, depth, &mut sums);
            } else {
                multiply_strided::<false>(tiles, depth, panels, panel_stride, depth, &mut sums);
            }
        }
        for row in 0..rows {
            for n in 0..count {
                let column = (panel + n) * LANES;
                let width = LANES.min(w.rows - column);
                let tile = (row / TILE_ROWS) * PANELS + n;
                let sums = &sums[(tile * TILE_ROWS + row % TILE_ROWS) * LANES..][..width];
                // SAFETY: this row's columns of this panel are this piece's alone.
                let out = unsafe { y.slice((first + row) * w.rows + column, width) };
                match bias {
                    Some(bias) => {
                        for ((out, sum), bias) in out.iter_mut().zip(sums).zip(&bias[column..]) {
                            *out = sum + bias;
                        }
                    }
                    None => out.copy_from_slice(sums),
                }
            }
        }
        first += rows;
    }
}

/// As [`multiply_strided`] for panels that follow each other.
unsafe fn multiply<const TWO: bool>(
    x: *const u16,
    x_stride: usize,
    panels: *const u16,
    depth: usize,
    sums: &mut [f32; 4 * TILE_ROWS * LANES],
) {
    // SAFETY: given by the caller.
    unsafe { multiply_strided::<TWO>(x, x_stride, panels, LANES * depth, depth, sums) }
}

/// `sums[i][j] = x tile i * panel j` for one or two tiles of rows and two panels, over `depth` columns.
///
/// # Safety
/// Tiles are configured. `x`: 16 rows (32 if `TWO`) of `depth` elements, `x_stride` apart; `panels`: two panels of
/// `16 * depth` elements, `panel_stride` apart; `depth` a multiple of 32, not 0.
unsafe fn multiply_strided<const TWO: bool>(
    x: *const u16,
    x_stride: usize,
    panels: *const u16,
    panel_stride: usize,
    depth: usize,
    sums: &mut [f32; 4 * TILE_ROWS * LANES],
) {
    let steps = depth / TILE_COLS;
    // SAFETY: the loads stay in `x` and `panels` as the caller gives them, the stores in `sums`; tile registers belong
    // to nobody between blocks, and are declared as changed.
    unsafe {
        if TWO {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{w0} + {row} * 1]",
                "tileloadd tmm7, [{w1} + {row} * 1]",
                "tileloadd tmm4, [{x0} + {x_row} * 1]",
                "tileloadd tmm5, [{x1} + {x_row} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "add {x0}, 64",
                "add {x1}, 64",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {row} * 1], tmm0",
                "tilestored [{out} + {row} * 1 + 1024], tmm1",
                "tilestored [{out} + {row} * 1 + 2048], tmm2",
                "tilestored [{out} + {row} * 1 + 3072], tmm3",
                w0 = inout(reg) panels => _,
                w1 = inout(reg) panels.add(panel_stride) => _,
                x0 = inout(reg) x => _,
                x1 = inout(reg) x.add(TILE_ROWS * x_stride) => _,
                x_row = in(reg) 2 * x_stride,
                row = in(reg) TILE_BYTES / TILE_ROWS,
                steps = inout(reg) steps => _,
                out = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm6, [{w0} + {row} * 1]",
                "tileloadd tmm7, [{w1} + {row} * 1]",
                "tileloadd tmm4, [{x0} + {x_row} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht0 [{w0} + 8192]",
                "prefetcht0 [{w1} + 8192]",
                "add {w0}, 1024",
                "add {w1}, 1024",
                "add {x0}, 64",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {row} * 1], tmm0",
                "tilestored [{out} + {row} * 1 + 1024], tmm1",
                w0 = inout(reg) panels => _,
                w1 = inout(reg) panels.add(panel_stride) => _,
                x0 = inout(reg) x => _,
                x_row = in(reg) 2 * x_stride,
                row = in(reg) TILE_BYTES / TILE_ROWS,
                steps = inout(reg) steps => _,
                out = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Gives this thread's tiles their shape.
///
/// # Safety
/// Tiles may be used.
pub(super) unsafe fn configure() {
    // SAFETY: given by the caller.
    unsafe { load_config(&CONFIG) };
}

/// # Safety
/// Tiles may be used.
unsafe fn load_config(config: &'static TileConfig) {
    // SAFETY: the configuration is 64 bytes and static.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config.0, options(nostack, readonly)) };
}

/// Leaves the tiles empty: a thread in that state is switched without saving eight KiB.
///
/// # Safety
/// Tiles may be used.
pub(super) unsafe fn release() {
    // SAFETY: touches no memory.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
