// Linear layers where weights and activations are e4m3 numbers: tensor cores multiply them as they are, at twice the rate
// of 16-bit numbers. A row of weights and a token's activations have a scale each.
#include "linear.cuh"

namespace {

// Rounds rows of activations: each by its own scale, its largest number becomes 448. Words hold four codes in the order of
// the weights' tiles, 0 2 1 3; columns are padded with zeros to whole tiles.
// grid: tokens. `codes`: [tokens, padded columns]
template <class T>
__device__ void round_rows(const T* x, unsigned x_stride, unsigned cols, unsigned char* codes, float* scales) {
    __shared__ float warps[32];
    const T* row = x + static_cast<size_t>(blockIdx.x) * x_stride;
    const unsigned padded = (cols + TILE_COLS - 1) / TILE_COLS * TILE_COLS;
    float largest = 0.0f;
    for (unsigned col = threadIdx.x; col < cols; col += blockDim.x) largest = fmaxf(largest, fabsf(to_float(row[col])));
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; ++w) largest = fmaxf(largest, warps[w]);
    // A row of zeros has some scale.
    const float scale = fmaxf(largest * (1.0f / 448.0f), 1e-30f), inverse = 1.0f / scale;
    uint32_t* to = reinterpret_cast<uint32_t*>(codes + static_cast<size_t>(blockIdx.x) * padded);
    for (unsigned word = threadIdx.x; word < padded / 4; word += blockDim.x) {
        auto code = [&](unsigned i) -> uint32_t {
            unsigned col = word * 4 + i;
            return col < cols ? from_float<fp8>(to_float(row[col]) * inverse).bits : 0;
        };
        to[word] = code(0) | code(2) << 8 | code(1) << 16 | code(3) << 24;
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// As `tiled`. Shared memory: TILED_STAGES * 8 * N * TILE_COLS bytes.
template <class T, int N> __device__ void tiled_fp8(const LinearArgs& a) {
    constexpr unsigned TOKENS = 8 * N, R = 2, CHUNKS = TILE_COLS / 16;
    DYNAMIC_SHARED(stages);
    const Matrix m = matrix_of(a);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned first_token = blockIdx.x * TOKENS;
    const unsigned group = blockIdx.y * TILED_WARPS + warp;
    unsigned tile_rows[R];
#pragma unroll
    for (unsigned r = 0; r < R; ++r) tile_rows[r] = min(tile_row_of<R>(a, group, r), num_tile_rows(a) - 1);
    const unsigned steps = (a.cols + TILE_COLS - 1) / TILE_COLS, share = (steps + gridDim.z - 1) / gridDim.z;
    const unsigned first = min(blockIdx.z * share, steps), last = min(first + share, steps);

    // Sixteen columns of a token are a chunk. Of four tokens the last two have the halves of their chunks swapped, so that
    // the sixteen lanes that read at once (four tokens, eight bytes of each of two chunks) read different banks.
    auto chunk_at = [&](unsigned stage, unsigned token, unsigned chunk) {
        return stages + ((stage * TOKENS + token) * CHUNKS + (chunk ^ (token / 2 % 2 * 2))) * 16;
    };
    auto fetch = [&](unsigned step) {
        if (step < last) {
            for (unsigned i = threadIdx.x; i < TOKENS * CHUNKS; i += TILED_WARPS * 32) {
                unsigned token = i / CHUNKS, chunk = i % CHUNKS;
                bool valid = first_token + token < a.tokens;
                const unsigned char* x = static_cast<const unsigned char*>(a.x);
                size_t at = static_cast<size_t>(first_token + token) * a.x_stride + step * TILE_COLS + chunk * 16;
                cp_async16(chunk_at(step % TILED_STAGES, token, chunk), valid ? x + at : x, valid);
            }
        }
        cp_async_commit();
    };
    ByteCodes raw[2][R];
    auto load = [&](unsigned at, unsigned step) {
#pragma unroll
        for (unsigned r = 0; r < R; ++r) raw[at][r].load(m, tile_number(m, tile_rows[r], step));
    };
    float acc[R][N][4] = {};
    if (first < last) load(0, first);
    if (first + 1 < last) load(1, first + 1);
    for (unsigned i = 0; i + 1 < TILED_STAGES; ++i) fetch(first + i);
    for (unsigned start = first; start < last; start += 2) {
#pragma unroll
        for (unsigned i = 0; i < 2; ++i) {
            unsigned step = start + i;
            if (step >= last) break;
            cp_async_wait<TILED_STAGES - 2>();
            __syncthreads();
            fetch(step + TILED_STAGES - 1);
            ByteCodes weights[R];
#pragma unroll
            for (unsigned r = 0; r < R; ++r) weights[r] = raw[i][r];
            if (step + 2 < last) load(i, step + 2);
#pragma unroll
            for (unsigned n = 0; n < N; ++n) {
                uint2 x[2];
#pragma unroll
                for (unsigned block = 0; block < 2; ++block) {
                    unsigned byte = block * BLOCK_COLS + lane % 4 * 8;
                    unsigned char* chunk = chunk_at(step % TILED_STAGES, n * 8 + lane / 4, byte / 16);
                    x[block] = *reinterpret_cast<const uint2*>(chunk + byte % 16);
                }
#pragma unroll
                for (unsigned r = 0; r < R; ++r) {
                    // Tensor cores keep fewer bits of sums of such numbers than f32 has: sums of 64 columns are added here.
                    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (unsigned block = 0; block < 2; ++block) {
                        const uint4& w = weights[r].blocks[block];
                        const uint32_t codes[4] = {w.x, w.z, w.y, w.w};
                        mma_16832_fp8(part, codes, x[block].x, x[block].y);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[r][n][i] += part[i];
                }
            }
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (unsigned n = 0; n < N; ++n) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            unsigned token = first_token + n * 8 + lane % 4 * 2 + i % 2;
            float scale = token < a.tokens ? a.token_scales[token] : 0.0f;
#pragma unroll
            for (unsigned r = 0; r < R; ++r) acc[r][n][i] *= scale;
        }
    }
    store_tiles<T, N>(a, acc, group, first_token);
}

// Sums of codes `[tokens, rows]`, as a library leaves them, as numbers: with the scales of their row and token, and the bias of
// the row if there is one. `rows` and the rows of `y` begin at multiples of four; a thread has four of a token.
// grid: rows by 4 * 256, tokens or fewer
template <class T>
__device__ void scale_sums(const float* sums, const float* row_scales, const float* token_scales, const T* bias,
                           unsigned rows, unsigned tokens, float unit, T* y, unsigned y_stride) {
    unsigned row = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (row >= rows) return;
    float scales[4], biases[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        scales[i] = unit * row_scales[row + i];
        biases[i] = bias != nullptr ? to_float(bias[row + i]) : 0.0f;
    }
    for (unsigned token = blockIdx.y; token < tokens; token += gridDim.y) {
        Pack<float, 4> of_token = load_pack<4>(sums + static_cast<size_t>(token) * rows + row);
        Pack<T, 4> scaled;
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            scaled.v[i] = from_float<T>(fmaf(of_token.v[i] * token_scales[token], scales[i], biases[i]));
        }
        store_pack<4>(y + static_cast<size_t>(token) * y_stride + row, scaled);
    }
}

}  // namespace

#define ROUND_ROWS(type)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        round_rows_##type(const type* x, unsigned x_stride, unsigned cols, unsigned char* codes, float* scales) { \
        round_rows(x, x_stride, cols, codes, scales);                                                           \
    }                                                                                                           \
    LAUNCHABLE(round_rows_##type)

#define SCALE_SUMS(type)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                             \
        scale_sums_##type(const float* sums, const float* row_scales, const float* token_scales, const type* bias, \
                          unsigned rows, unsigned tokens, float unit, type* y, unsigned y_stride) {               \
        scale_sums(sums, row_scales, token_scales, bias, rows, tokens, unit, y, y_stride);                        \
    }                                                                                                             \
    LAUNCHABLE(scale_sums_##type)

#define TILED(type, tokens)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) linear_tiled_##type##_fp8x8_##tokens(const LinearArgs a) {     \
        tiled_fp8<type, tokens>(a);                                                                                  \
    }                                                                                                                \
    LAUNCHABLE(linear_tiled_##type##_fp8x8_##tokens)

ROUND_ROWS(bf16)
ROUND_ROWS(f16)
SCALE_SUMS(bf16)
SCALE_SUMS(f16)
TILED(bf16, 4)
TILED(bf16, 8)
TILED(f16, 4)
TILED(f16, 8)
