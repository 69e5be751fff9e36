// x [tokens, cols] times a matrix [rows, cols] transposed, for up to some hundreds of tokens. The weights are fragment A
// (they are read once, straight into registers), tokens the eight columns of fragment B, sums f32.
//
// `skinny` (up to 16 tokens): a block has one or two rows of tiles; its eight warps each take an eighth of the columns, and
// their sums are added in order. `tiled`: a block has eight rows of tiles and up to 64 tokens, whose activations go through
// shared memory; where that makes too few blocks, the columns are split among several, which leave their sums in
// `partial` for `finish_linear`, and how often depends on the matrix alone. In both, a result's order of summation does not
// depend on how many tokens there are.
#pragma once

#include "activation.cuh"
#include "matrix.cuh"

// As the host writes it.
struct LinearArgs {
    const void* x;
    const unsigned char* codes;
    const uint16_t* scales;
    const uint16_t* mins;
    const float* row_scales;
    const float* token_scales;  // [tokens] of rounded activations, else null
    const void* bias;           // [rows] or null
    void* y;                    // [tokens, rows], or [tokens, rows / 2] if gated
    float* partial;             // [gridDim.z, tokens, rows]; null if the columns are not split
    unsigned tokens, rows, cols;
    unsigned x_stride;
    float unit;           // on all scales
    unsigned activation;  // NOT_GATED, or of the gate, which is in the first half of the rows
    unsigned flags;
};

constexpr unsigned WIDE_X = 1, WIDE_WEIGHTS = 2;
constexpr unsigned NOT_GATED = 4;

__device__ __forceinline__ Matrix matrix_of(const LinearArgs& a) {
    return Matrix{a.codes, a.scales, a.mins, a.row_scales, a.rows, a.cols, (a.flags & WIDE_WEIGHTS) != 0};
}

// A sum as a number: scales and bias.
template <class T> __device__ __forceinline__ float scaled(const LinearArgs& a, float sum, unsigned row) {
    float scale = a.row_scales != nullptr ? a.unit * a.row_scales[row] : a.unit;
    float bias = a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[row]) : 0.0f;
    return fmaf(sum, scale, bias);
}

template <class T>
__device__ __forceinline__ void store_sum(const LinearArgs& a, float sum, unsigned token, unsigned row) {
    if (token >= a.tokens || row >= a.rows) return;
    float y = scaled<T>(a, sum, row);
    static_cast<T*>(a.y)[static_cast<size_t>(token) * a.rows + row] = from_float<T>(y);
}

// `row` is the gate's.
template <class T>
__device__ __forceinline__ void store_gated(const LinearArgs& a, float gate, float up, unsigned token, unsigned row) {
    unsigned half = a.rows / 2;
    if (token >= a.tokens || row >= half) return;
    float y = activate(scaled<T>(a, gate, row), a.activation) * scaled<T>(a, up, row + half);
    static_cast<T*>(a.y)[static_cast<size_t>(token) * half + row] = from_float<T>(y);
}

// The row of tiles that is number `r` of the `R` of group `group`: neighbours, or a gate and its up.
template <int R> __device__ __forceinline__ unsigned tile_row_of(const LinearArgs& a, unsigned group, unsigned r) {
    if (R == 2 && a.activation != NOT_GATED) return group + r * (a.rows / 2 / TILE_ROWS);
    return group * R + r;
}

__device__ __forceinline__ unsigned num_tile_rows(const LinearArgs& a) { return (a.rows + TILE_ROWS - 1) / TILE_ROWS; }

constexpr unsigned SKINNY_WARPS = 8;

// grid: groups of R rows of tiles, groups of 8 * N tokens
template <class T, class F, int N, int R> __device__ void skinny(const LinearArgs& a) {
    __shared__ float sums[SKINNY_WARPS][R * N * 4][32];
    const Matrix m = matrix_of(a);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned first_token = blockIdx.y * 8 * N;
    const bool wide = (a.flags & WIDE_X) != 0;
    unsigned tile_rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        tile_rows[r] = min(tile_row_of<R>(a, blockIdx.x, r), num_tile_rows(a) - 1);
    }
    const unsigned steps = (a.cols + TILE_COLS - 1) / TILE_COLS;
    const unsigned share = (steps + SKINNY_WARPS - 1) / SKINNY_WARPS;
    const unsigned first = min(warp * share, steps), last = min(first + share, steps);

    constexpr unsigned AHEAD = N * R > 1 ? F::PREFETCH_PAIR : F::PREFETCH;
    typename F::Raw raw[AHEAD][R];
    uint4 x[AHEAD][N][2];
    auto load = [&](unsigned at, unsigned step) {
#pragma unroll
        for (int r = 0; r < R; ++r) F::load(raw[at][r], m, tile_rows[r], step);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            unsigned token = first_token + n * 8 + lane / 4;
            const T* row = static_cast<const T*>(a.x) + static_cast<size_t>(token) * a.x_stride;
#pragma unroll
            for (unsigned block = 0; block < 2; ++block) {
                unsigned col = step * TILE_COLS + block * BLOCK_COLS + lane % 4 * 8;
                x[at][n][block] = token < a.tokens ? load_row8(row, col, a.cols, wide) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    float acc[R][N][4] = {};
#pragma unroll
    for (unsigned i = 0; i < AHEAD; ++i) {
        if (first + i < last) load(i, first + i);
    }
    for (unsigned start = first; start < last; start += AHEAD) {
#pragma unroll
        for (unsigned i = 0; i < AHEAD; ++i) {
            if (start + i >= last) break;
            typename F::Raw weights[R];
            uint4 tokens[N][2];
#pragma unroll
            for (int r = 0; r < R; ++r) weights[r] = raw[i][r];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                tokens[n][0] = x[i][n][0];
                tokens[n][1] = x[i][n][1];
            }
            if (start + i + AHEAD < last) load(i, start + i + AHEAD);
#pragma unroll
            for (unsigned block = 0; block < 2; ++block) {
                Fragment f[R];
#pragma unroll
                for (int r = 0; r < R; ++r) F::unpack(f[r], weights[r], block);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float x_sums[4];
                    if constexpr (F::MINIMA) block_sums<T>(x_sums, tokens[n][block]);
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        multiply_block<T, F>(acc[r][n], f[r], weights[r], block, tokens[n][block], x_sums);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][(r * N + n) * 4 + i][lane] = acc[r][n][i];
    __syncthreads();
    auto total = [&](unsigned number, unsigned of_lane) {
        float sum = sums[0][number][of_lane];
#pragma unroll
        for (unsigned w = 1; w < SKINNY_WARPS; ++w) sum += sums[w][number][of_lane];
        return sum;
    };
    const bool gated = R == 2 && a.activation != NOT_GATED;
    for (unsigned e = threadIdx.x; e < (gated ? 1 : R) * N * 4 * 32; e += blockDim.x) {
        unsigned of_lane = e % 32, number = e / 32, i = number % 4, n = number / 4 % N, r = number / 4 / N;
        unsigned token = first_token + n * 8 + of_lane % 4 * 2 + i % 2;
        unsigned row = tile_row_of<R>(a, blockIdx.x, r) * TILE_ROWS + of_lane / 4 + i / 2 * 8;
        if (gated) {
            store_gated<T>(a, total(number, of_lane), total(number + N * 4, of_lane), token, row);
        } else {
            store_sum<T>(a, total(number, of_lane), token, row);
        }
    }
}

constexpr unsigned TILED_WARPS = 4, TILED_STAGES = 4;

// What a warp of `tiled` has summed: two rows of tiles, 8 * N tokens.
template <class T, int N>
__device__ __forceinline__ void store_tiles(const LinearArgs& a, const float (&acc)[2][N][4], unsigned group,
                                            unsigned first_token) {
    constexpr unsigned R = 2;
    const unsigned lane = threadIdx.x % 32;
    const bool gated = a.activation != NOT_GATED;
#pragma unroll
    for (unsigned n = 0; n < N; ++n) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            unsigned token = first_token + n * 8 + lane % 4 * 2 + i % 2;
            unsigned in_tile = lane / 4 + i / 2 * 8;
            if (a.partial != nullptr) {
#pragma unroll
                for (unsigned r = 0; r < R; ++r) {
                    unsigned row = tile_row_of<R>(a, group, r) * TILE_ROWS + in_tile;
                    // A gate's rows end where those of up begin.
                    bool mine = row < a.rows && (!gated || group < a.rows / 2 / TILE_ROWS);
                    size_t at = (static_cast<size_t>(blockIdx.z) * a.tokens + token) * a.rows + row;
                    if (token < a.tokens && mine) a.partial[at] = acc[r][n][i];
                }
            } else if (gated) {
                store_gated<T>(a, acc[0][n][i], acc[1][n][i], token, group * TILE_ROWS + in_tile);
            } else {
#pragma unroll
                for (unsigned r = 0; r < R; ++r) {
                    store_sum<T>(a, acc[r][n][i], token, (group * R + r) * TILE_ROWS + in_tile);
                }
            }
        }
    }
}

// Shared memory of `tiled` for 8 * N tokens: TILED_STAGES * 8 * N * TILE_COLS numbers.
// grid: groups of 8 * N tokens, groups of 2 * TILED_WARPS rows of tiles, parts of the columns
template <class T, class F, int N> __device__ void tiled(const LinearArgs& a) {
    constexpr unsigned TOKENS = 8 * N, R = 2, CHUNKS = TILE_COLS / 8;
    DYNAMIC_SHARED(shared);
    T* stages = reinterpret_cast<T*>(shared);
    const Matrix m = matrix_of(a);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned first_token = blockIdx.x * TOKENS;
    const bool wide = (a.flags & WIDE_X) != 0;
    const unsigned group = blockIdx.y * TILED_WARPS + warp;
    unsigned tile_rows[R];
#pragma unroll
    for (unsigned r = 0; r < R; ++r) tile_rows[r] = min(tile_row_of<R>(a, group, r), num_tile_rows(a) - 1);
    const unsigned steps = (a.cols + TILE_COLS - 1) / TILE_COLS, share = (steps + gridDim.z - 1) / gridDim.z;
    const unsigned first = min(blockIdx.z * share, steps), last = min(first + share, steps);

    // Eight columns of a token are a chunk. Odd tokens have the halves of their chunks swapped, so that the eight lanes
    // that read at once (two tokens, four chunks) find their chunks in different banks.
    auto chunk_at = [&](unsigned stage, unsigned token, unsigned chunk) {
        return stages + ((stage * TOKENS + token) * CHUNKS + (chunk ^ (token % 2 * 4))) * 8;
    };
    auto fetch = [&](unsigned step) {
        if (step < last) {
            for (unsigned i = threadIdx.x; i < TOKENS * CHUNKS; i += TILED_WARPS * 32) {
                unsigned token = i / CHUNKS, chunk = i % CHUNKS, col = step * TILE_COLS + chunk * 8;
                bool valid = first_token + token < a.tokens;
                const T* x = static_cast<const T*>(a.x);
                const T* row = x + (valid ? static_cast<size_t>(first_token + token) * a.x_stride : 0);
                T* to = chunk_at(step % TILED_STAGES, token, chunk);
                if (wide) {
                    valid = valid && col < a.cols;
                    cp_async16(to, valid ? row + col : x, valid);
                } else {
                    *reinterpret_cast<uint4*>(to) = load_row8(row, col, valid ? a.cols : 0, false);
                }
            }
        }
        cp_async_commit();
    };
    typename F::Raw raw[2][R];
    auto load = [&](unsigned at, unsigned step) {
#pragma unroll
        for (unsigned r = 0; r < R; ++r) F::load(raw[at][r], m, tile_rows[r], step);
    };
    float acc[R][N][4] = {};
    auto multiply = [&](const typename F::Raw (&weights)[R], unsigned step) {
#pragma unroll
        for (unsigned block = 0; block < 2; ++block) {
            Fragment f[R];
#pragma unroll
            for (unsigned r = 0; r < R; ++r) F::unpack(f[r], weights[r], block);
#pragma unroll
            for (unsigned n = 0; n < N; ++n) {
                const T* chunk = chunk_at(step % TILED_STAGES, n * 8 + lane / 4, block * 4 + lane % 4);
                uint4 x = *reinterpret_cast<const uint4*>(chunk);
                float x_sums[4];
                if constexpr (F::MINIMA) block_sums<T>(x_sums, x);
#pragma unroll
                for (unsigned r = 0; r < R; ++r) multiply_block<T, F>(acc[r][n], f[r], weights[r], block, x, x_sums);
            }
        }
    };
    if (first < last) load(0, first);
    if (first + 1 < last) load(1, first + 1);
    for (unsigned i = 0; i + 1 < TILED_STAGES; ++i) fetch(first + i);
    for (unsigned start = first; start < last; start += 2) {
#pragma unroll
        for (unsigned i = 0; i < 2; ++i) {
            unsigned step = start + i;
            if (step >= last) break;
            cp_async_wait<TILED_STAGES - 2>();
            // This step's activations are there for all; the stage that `fetch` overwrites was read before.
            __syncthreads();
            fetch(step + TILED_STAGES - 1);
            typename F::Raw weights[R];
#pragma unroll
            for (unsigned r = 0; r < R; ++r) weights[r] = raw[i][r];
            if (step + 2 < last) load(i, step + 2);
            multiply(weights, step);
        }
    }
    cp_async_wait<0>();

    store_tiles<T, N>(a, acc, group, first_token);
}

// Adds what the parts of split columns left, in order. grid: rows by 256, tokens
template <class T> __device__ void finish(const LinearArgs& a, unsigned parts) {
    const bool gated = a.activation != NOT_GATED;
    unsigned row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (row >= (gated ? a.rows / 2 : a.rows)) return;
    auto total = [&](unsigned of_row) {
        const float* from = a.partial + static_cast<size_t>(token) * a.rows + of_row;
        size_t stride = static_cast<size_t>(a.tokens) * a.rows;
        float sum = from[0];
        for (unsigned part = 1; part < parts; ++part) sum += from[part * stride];
        return sum;
    };
    if (gated) {
        store_gated<T>(a, total(row), total(row + a.rows / 2), token, row);
    } else {
        store_sum<T>(a, total(row), token, row);
    }
}

// Rows of a matrix as plain numbers: `ids` or, if null, `first_row` on. A thread has eight columns.
// grid: columns by 8 * 256, rows
template <class Out, bool HALVES, bool FP8>
__device__ void unpack_rows(const Matrix& m, const unsigned* ids, unsigned first_row, float unit, Out* out) {
    unsigned col = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (col >= m.cols) return;
    unsigned row = ids != nullptr ? ids[blockIdx.y] : first_row + blockIdx.y;
    unsigned block = col / BLOCK_COLS % 2, half = row % TILE_ROWS / 8, g = row % 8;
    unsigned lane = g * 4 + col % BLOCK_COLS / 8;
    size_t tile = tile_number(m, row / TILE_ROWS, col / TILE_COLS);
    float scale = unit, minimum = 0.0f;
    if (m.row_scales != nullptr) scale *= m.row_scales[row];
    if (m.scales != nullptr) {
        size_t at = tile * 32 + g * 4 + block * 2 + half;
        scale *= f16_bits_to_float(m.scales[at]);
        // Of code 8, as codes are counted from there.
        if (m.mins != nullptr) minimum = unit * f16_bits_to_float(m.mins[at]) + 8.0f * scale;
    }
    Out* to = out + static_cast<size_t>(blockIdx.y) * m.cols + col;
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
        if (col + i >= m.cols) break;
        float value;
        if (HALVES) {
            uint32_t word = reinterpret_cast<const uint32_t*>(m.codes + tile * 512 + lane * 16)[block * 2 + half];
            value = static_cast<float>(static_cast<int>(word >> (i / 2 * 4 + i % 2 * 16) & 15u) - 8);
        } else {
            const unsigned char* word = m.codes + tile * 1024 + block * 512 + lane * 16 + half * 8 + i / 4 * 4;
            unsigned char code = word[i % 4 / 2 + i % 2 * 2];
            value = FP8 ? to_float(fp8{code}) : static_cast<float>(static_cast<signed char>(code));
        }
        to[i] = from_float<Out>(fmaf(value, scale, minimum));
    }
}
