//! AMX where there is none: a handler of the illegal-instruction signal that carries out the tile instructions.
//!
//! It decodes the very bytes that the assembler made, so the tests see wrong operands, strides and configurations. What
//! an instruction does is written from Intel's manual (volume 2, the chapter on AMX instructions).

use std::cell::UnsafeCell;
use std::sync::Once;

#[derive(Clone, Copy)]
struct Tiles {
    configured: bool,
    rows: [u8; 8],
    row_bytes: [u16; 8],
    data: [[[u8; 64]; 16]; 8],
}

const EMPTY: Tiles = Tiles { configured: false, rows: [0; 8], row_bytes: [0; 8], data: [[[0; 64]; 16]; 8] };

thread_local! {
    // Needs neither construction nor destruction, so that a signal handler may touch it.
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(EMPTY) };
}

/// From now on tile instructions work in this process. A processor that has them does not trap and is not disturbed.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid; the handler touches only this thread's state and the memory that the
        // instruction names.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                handle as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        }
    });
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes the interrupted thread's context, whose instruction pointer names readable code.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let code = registers[libc::REG_RIP as usize] as *const u8;
        let length = TILES.with(|tiles| execute(code, registers, &mut *tiles.get()));
        match length {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            None => libc::abort(),
        }
    }
}

/// General registers as instructions number them.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Operand in memory: its address without the index, the index register's value, and the operand's length in code.
struct Memory {
    base: u64,
    index: u64,
    length: usize,
}

unsafe fn memory(code: *const u8, extend: (usize, usize), registers: &[i64; 23]) -> Memory {
    let register = |number: usize| registers[REGISTERS[number] as usize] as u64;
    // SAFETY: the bytes of the instruction.
    unsafe {
        let modrm = *code;
        let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
        let mut length = 1;
        let (base, index) = if rm == 4 {
            let sib = *code.add(1);
            length += 1;
            let (index, base) = (usize::from((sib >> 3) & 7) + extend.0, usize::from(sib & 7) + extend.1);
            assert!(!(mode == 0 && sib & 7 == 5), "no base register");
            // Register 4 as an index means none.
            (register(base), if index == 4 { 0 } else { register(index) << (sib >> 6) })
        } else {
            assert!(!(mode == 0 && rm == 5), "relative to the instruction pointer");
            (register(rm + extend.1), 0)
        };
        let displacement = match mode {
            0 => 0,
            1 => i64::from(*code.add(length).cast::<i8>()),
            2 => i64::from(code.add(length).cast::<i32>().read_unaligned()),
            _ => unreachable!("a register"),
        };
        length += [0, 1, 4][usize::from(mode)];
        Memory { base: base.wrapping_add_signed(displacement), index, length }
    }
}

/// Carries out the instruction at `code`; its length, `None` if it is no tile instruction.
unsafe fn execute(code: *const u8, registers: &[i64; 23], tiles: &mut Tiles) -> Option<usize> {
    // SAFETY: the bytes of the instruction; memory operands are what the tested code names.
    unsafe {
        let (vex, first, second, opcode) = (*code, *code.add(1), *code.add(2), *code.add(3));
        // Three-byte VEX, map 0F38, W = 0, 128 bits.
        if vex != 0xc4 || first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        let extend = (usize::from(first & 0x40 == 0) * 8, usize::from(first & 0x20 == 0) * 8);
        let (prefix, third) = (second & 3, usize::from(!(second >> 3) & 15));
        let modrm = *code.add(4);
        let (register_form, reg, rm) =
            (modrm >> 6 == 3, usize::from((modrm >> 3) & 7), usize::from(modrm & 7));
        match (opcode, prefix, register_form) {
            // ldtilecfg
            (0x49, 0, false) => {
                let operand = memory(code.add(4), extend, registers);
                let config = (operand.base.wrapping_add(operand.index) as *const [u8; 64]).read_unaligned();
                assert!(config[0] == 1 && config[1..16].iter().all(|b| *b == 0), "palette");
                *tiles = EMPTY;
                tiles.configured = true;
                for tile in 0..8 {
                    tiles.row_bytes[tile] =
                        u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]);
                    tiles.rows[tile] = config[48 + tile];
                    assert!(tiles.row_bytes[tile] <= 64 && tiles.rows[tile] <= 16, "tile {tile}");
                }
                Some(4 + operand.length)
            }
            // tilerelease
            (0x49, 0, true) => {
                *tiles = EMPTY;
                Some(5)
            }
            // tilezero
            (0x49, 3, true) => {
                assert!(tiles.configured);
                tiles.data[reg] = [[0; 64]; 16];
                Some(5)
            }
            // tileloadd, tilestored
            (0x4b, 3 | 2, false) => {
                assert!(tiles.configured);
                let operand = memory(code.add(4), extend, registers);
                let bytes = usize::from(tiles.row_bytes[reg]);
                if prefix == 3 {
                    tiles.data[reg] = [[0; 64]; 16];
                }
                for row in 0..usize::from(tiles.rows[reg]) {
                    let address = operand.base.wrapping_add(operand.index.wrapping_mul(row as u64));
                    let data = tiles.data[reg][row].as_mut_ptr();
                    if prefix == 3 {
                        std::ptr::copy_nonoverlapping(address as *const u8, data, bytes);
                    } else {
                        std::ptr::copy_nonoverlapping(data, address as *mut u8, bytes);
                    }
                }
                Some(4 + operand.length)
            }
            // tdpbf16ps
            (0x5c, 2, true) => {
                assert!(tiles.configured);
                multiply(tiles, reg, rm, third);
                Some(5)
            }
            // tdpbssd
            (0x5e, 3, true) => {
                assert!(tiles.configured);
                multiply_bytes(tiles, reg, rm, third);
                Some(5)
            }
            _ => None,
        }
    }
}

/// Rows and columns of `tile[out] += tile[a] * tile[b]`, and how many groups of four bytes each is summed over.
fn shape(tiles: &Tiles, out: usize, a: usize, b: usize) -> (usize, usize, usize) {
    assert!(out != a && out != b && a != b, "the manual forbids equal operands");
    let (rows, columns) = (usize::from(tiles.rows[out]), usize::from(tiles.row_bytes[out]) / 4);
    let depth = usize::from(tiles.row_bytes[a]) / 4;
    assert_eq!(usize::from(tiles.rows[a]), rows);
    assert!(usize::from(tiles.rows[b]) == depth && usize::from(tiles.row_bytes[b]) / 4 == columns);
    (rows, columns, depth)
}

/// `tile[out] += tile[a] * tile[b]`, fours of signed bytes.
fn multiply_bytes(tiles: &mut Tiles, out: usize, a: usize, b: usize) {
    let (rows, columns, fours) = shape(tiles, out, a, b);
    for row in 0..rows {
        for column in 0..columns {
            let byte = |tile: usize, row: usize, i: usize| i32::from(tiles.data[tile][row][i].cast_signed());
            let product = |i: usize| byte(a, row, i) * byte(b, i / 4, 4 * column + i % 4);
            let sum: i32 = (0..4 * fours).map(product).sum();
            let cell = &mut tiles.data[out][row][4 * column..][..4];
            let before = i32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]);
            cell.copy_from_slice(&before.wrapping_add(sum).to_le_bytes());
        }
    }
}

/// A number too small to be normal counts as zero, as an operand and as a result.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}

/// `tile[out] += tile[a] * tile[b]`, pairs of bf16.
fn multiply(tiles: &mut Tiles, out: usize, a: usize, b: usize) {
    let (rows, columns, pairs) = shape(tiles, out, a, b);
    let number =
        |row: &[u8; 64], i: usize| flushed(half::bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32());
    for row in 0..rows {
        for column in 0..columns {
            let mut sums = [0.0_f32; 2];
            for pair in 0..pairs {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let (x, y) = (
                        number(&tiles.data[a][row], 2 * pair + i),
                        number(&tiles.data[b][pair], 2 * column + i),
                    );
                    *sum = flushed(x.mul_add(y, *sum));
                }
            }
            let cell = &mut tiles.data[out][row][4 * column..][..4];
            let before = flushed(f32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]));
            let after = flushed(before + flushed(sums[0] + sums[1]));
            cell.copy_from_slice(&after.to_le_bytes());
        }
    }
}
