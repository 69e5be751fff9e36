//! Products of bf16 pairs on the matrix unit of AMX.

use std::arch::asm;

use super::pairs::{Extent, Scores, TILE_PAIRS, Unit, Weights};
use super::{CHUNK, TILES};
use crate::cpu::amx::{TILE_BYTES, TILE_COLS, TILE_ROWS, configure, release};
use crate::cpu::simd::LANES;

/// Needs tiles that may be used.
pub(super) struct Tiles;

impl Unit for Tiles {
    unsafe fn begin() {
        // SAFETY: given by the caller.
        unsafe { configure() };
    }

    unsafe fn end() {
        // SAFETY: given by the caller.
        unsafe { release() };
    }

    unsafe fn score(queries: &[u16], keys: &[u32], Extent { depth, .. }: Extent, scores: &mut Scores) {
        assert!(depth.is_multiple_of(TILE_COLS) && depth > 0, "whole tiles");
        assert!(queries.len() == TILE_ROWS * depth && keys.len() == CHUNK * depth / 2, "sizes");
        let tile_len = depth / 2 * LANES;
        let keys = keys.as_ptr();
        // SAFETY: `depth / 32` tiles of queries and for each of the four tiles of keys, by the sizes above; the stores stay
        // in `scores`; tile registers belong to nobody between blocks, and are declared as changed.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{q} + {q_row} * 1]",
                "tileloadd tmm5, [{k0} + {row} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{k1} + {row} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{k2} + {row} * 1]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{k3} + {row} * 1]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {k0}, 1024",
                "add {k1}, 1024",
                "add {k2}, 1024",
                "add {k3}, 1024",
                "add {q}, 64",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {out_row} * 1], tmm0",
                "tilestored [{out} + {out_row} * 1 + 64], tmm1",
                "tilestored [{out} + {out_row} * 1 + 128], tmm2",
                "tilestored [{out} + {out_row} * 1 + 192], tmm3",
                q = inout(reg) queries.as_ptr() => _,
                q_row = in(reg) size_of::<u16>() * depth,
                k0 = inout(reg) keys => _,
                k1 = inout(reg) keys.add(tile_len) => _,
                k2 = inout(reg) keys.add(2 * tile_len) => _,
                k3 = inout(reg) keys.add(3 * tile_len) => _,
                row = in(reg) TILE_BYTES / TILE_ROWS,
                steps = inout(reg) depth / TILE_COLS => _,
                out = in(reg) scores.0.as_mut_ptr(),
                out_row = in(reg) size_of::<[f32; CHUNK]>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        const { assert!(TILES == 4) };
    }

    /// Two tiles of features at a time.
    unsafe fn add_values(weights: &Weights, values: &[u32], Extent { depth, .. }: Extent, sums: &mut [f32]) {
        assert!(depth.is_multiple_of(TILE_COLS) && depth > 0, "whole tiles");
        assert!(sums.len() == TILE_ROWS * depth && values.len() == CHUNK / 2 * depth, "sizes");
        let values = values.as_ptr();
        // SAFETY: two tiles of weights, `depth / 16` tiles of values for each half of the chunk and of sums, by the sizes
        // above; tile registers belong to nobody between blocks, and are declared as changed.
        unsafe {
            asm!(
                "tileloadd tmm4, [{w} + {w_row} * 1]",
                "tileloadd tmm5, [{w} + {w_row} * 1 + 64]",
                "2:",
                "tileloadd tmm0, [{sums} + {sums_row} * 1]",
                "tileloadd tmm6, [{v0} + {row} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm1, [{sums} + {sums_row} * 1 + 64]",
                "tileloadd tmm7, [{v0} + {row} * 1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm2, [{v1} + {row} * 1]",
                "tdpbf16ps tmm0, tmm5, tmm2",
                "tileloadd tmm3, [{v1} + {row} * 1 + 1024]",
                "tdpbf16ps tmm1, tmm5, tmm3",
                "tilestored [{sums} + {sums_row} * 1], tmm0",
                "tilestored [{sums} + {sums_row} * 1 + 64], tmm1",
                "add {v0}, 2048",
                "add {v1}, 2048",
                "add {sums}, 128",
                "dec {steps}",
                "jnz 2b",
                w = in(reg) weights.0.as_ptr(),
                w_row = in(reg) size_of::<[u16; CHUNK]>(),
                sums = inout(reg) sums.as_mut_ptr() => _,
                sums_row = in(reg) size_of::<f32>() * depth,
                v0 = inout(reg) values => _,
                v1 = inout(reg) values.add(depth / LANES * TILE_PAIRS) => _,
                row = in(reg) TILE_BYTES / TILE_ROWS,
                steps = inout(reg) depth / TILE_COLS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
