// Rows of coded matrices as plain numbers: embeddings, and panels of weights for a library's matrix product.
#include "linear.cuh"

#define UNPACK(name, type, halves, fp8)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        name(const unsigned char* codes, const uint16_t* scales, const uint16_t* mins, const float* row_scales,      \
             unsigned rows, unsigned cols, const unsigned* ids, unsigned first_row, float unit, type* out) {         \
        unpack_rows<type, halves, fp8>(Matrix{codes, scales, mins, row_scales, rows, cols, false}, ids, first_row,   \
                                       unit, out);                                                                   \
    }                                                                                                                \
    LAUNCHABLE(name)

#define UNPACK_TO(type)                           \
    UNPACK(unpack_bytes_##type, type, false, false) \
    UNPACK(unpack_halves_##type, type, true, false) \
    UNPACK(unpack_fp8_##type, type, false, true)

UNPACK_TO(float)
UNPACK_TO(bf16)
UNPACK_TO(f16)

// Codes of an fp8 matrix, row after row from `first_row` on, which begins a row of tiles. Columns are padded with zeros to whole
// tiles, and four codes a word stay in the order of the tiles, 0 2 1 3, which rounded activations have too. A thread has what
// a lane loads of a tile: eight columns of two rows.
// grid: lanes of a row of tiles by 256, rows of tiles
extern "C" __global__ void __launch_bounds__(256)
    fp8_by_rows(const unsigned char* codes, unsigned cols, unsigned first_row, unsigned rows, unsigned char* out) {
    const unsigned steps = (cols + TILE_COLS - 1) / TILE_COLS, lanes = steps * 64;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lanes) return;
    size_t tile_row = first_row / TILE_ROWS + blockIdx.y;
    uint4 both = load_stream(codes + (tile_row * lanes + i) * 16);
    unsigned col = i / 32 * BLOCK_COLS + i % 4 * 8, row = blockIdx.y * TILE_ROWS + i % 32 / 4;
    unsigned char* to = out + static_cast<size_t>(row) * steps * TILE_COLS + col;
    if (row < rows) *reinterpret_cast<uint2*>(to) = make_uint2(both.x, both.y);
    if (row + 8 < rows) *reinterpret_cast<uint2*>(to + static_cast<size_t>(8) * steps * TILE_COLS) = make_uint2(both.z, both.w);
}
LAUNCHABLE(fp8_by_rows)
