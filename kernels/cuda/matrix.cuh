// Weight matrices `[rows, cols]` as fragments of tensor cores.
//
// A tile is 16 rows by 64 columns, two blocks of 32 columns. A lane of a warp is (g, t) = (lane / 4, lane % 4); of each
// block it has columns 8t..8t+8 of rows g and g + 8, in pairs: a pair is what one register of a fragment holds. Which
// columns a fragment calls neighbours does not matter, as they are summed, as long as activations come in the same
// order: eight columns side by side, one 16-byte load.
//
// Tiles are stored one after another along a row of tiles, then the next row of tiles; rows and columns are padded with
// zeros:
//
//   bytes (int8, fp8)  1024 bytes a tile: for each block, for each lane: row g's eight codes, row g + 8's eight codes;
//                      four codes a word, in the order 0 2 1 3
//   half bytes          512 bytes a tile: for each lane: block 0 row g, row g + 8, block 1 row g, row g + 8;
//                      eight codes a word, in the order 0 2 4 6 1 3 5 7
//   scales, minima     f16, for each tile, for each g: block 0 row g, row g + 8, block 1 row g, row g + 8
//
// Dense matrices stay row-major, as libraries want them.
#pragma once

#include "device.cuh"

constexpr unsigned TILE_ROWS = 16, TILE_COLS = 64, BLOCK_COLS = 32;

struct Matrix {
    const unsigned char* codes;
    const uint16_t* scales;
    const uint16_t* mins;
    const float* row_scales;
    unsigned rows, cols;
    bool wide;  // rows of a dense matrix may be read 16 bytes at a time
};

// One block of a row of tiles: operands of two products of 16 x 16 tiles.
struct Fragment {
    uint32_t a[2][4];
};

// A lane's columns of rows g (`low`) and g + 8 (`high`), in pairs.
__device__ __forceinline__ void set_pair(Fragment& f, int pair, uint32_t low, uint32_t high) {
    f.a[pair / 2][pair % 2 * 2] = low;
    f.a[pair / 2][pair % 2 * 2 + 1] = high;
}

// Eight numbers from column `col` of a row that begins at `row`; zeros from `cols` on.
template <class T> __device__ __forceinline__ uint4 load_row8(const T* row, unsigned col, unsigned cols, bool wide) {
    if (wide) return col < cols ? *reinterpret_cast<const uint4*>(row + col) : make_uint4(0, 0, 0, 0);
    uint32_t words[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        unsigned k = col + 2 * i;
        uint32_t low = k < cols ? *reinterpret_cast<const uint16_t*>(row + k) : 0;
        uint32_t high = k + 1 < cols ? *reinterpret_cast<const uint16_t*>(row + k + 1) : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T> struct Constants;
template <> struct Constants<bf16> {
    static constexpr uint32_t ONES = 0x3f803f80u;
    // 128 + code has the code in its last bits.
    static constexpr uint32_t HALF_BYTE = 0x43004300u, HALF_BYTE_ZERO = 0x43084308u;
    // An fp8 number's exponent and mantissa, moved to where this format has them, are 2^-120 of the value.
    static constexpr uint32_t FP8_UNIT = 0x7b807b80u;
    static constexpr unsigned FP8_SHIFT = 4;
};
template <> struct Constants<f16> {
    static constexpr uint32_t ONES = 0x3c003c00u;
    // 1024 + code
    static constexpr uint32_t HALF_BYTE = 0x64006400u, HALF_BYTE_ZERO = 0x64086408u;
    // 2^-8
    static constexpr uint32_t FP8_UNIT = 0x5c005c00u;
    static constexpr unsigned FP8_SHIFT = 7;
};

// Two signed bytes, each in the lower half of a half word: exact.
template <class T> __device__ __forceinline__ uint32_t bytes_to_pair(uint32_t x);
template <> __device__ __forceinline__ uint32_t bytes_to_pair<bf16>(uint32_t x) {
    // (128 + the seven lower bits) - (128, or 256 if the sign bit is set)
    return sub2<bf16>((x & 0x007f007fu) | 0x43004300u, (x & 0x00800080u) | 0x43004300u);
}
template <> __device__ __forceinline__ uint32_t bytes_to_pair<f16>(uint32_t x) {
    return sub2<f16>(((x & 0x00ff00ffu) ^ 0x00800080u) | 0x64006400u, 0x64806480u);
}

template <class T> __device__ __forceinline__ uint32_t fp8_to_pair(uint32_t x) {
    uint32_t moved = (x & 0x00800080u) << 8 | (x & 0x007f007fu) << Constants<T>::FP8_SHIFT;
    return mul2<T>(moved, Constants<T>::FP8_UNIT);
}

// Formats. `Raw` is what a lane loads of one tile; `PREFETCH` is how many tiles ahead (`PREFETCH_PAIR`
// if there are several rows of tiles or groups of tokens), so that enough bytes are under way. GROUPED: a scale for each row and block of columns. MINIMA: also a minimum.

template <class T> struct Dense {
    static constexpr bool GROUPED = false, MINIMA = false;
    static constexpr unsigned PREFETCH = 2, PREFETCH_PAIR = 1;
    struct Raw {
        uint4 rows[2][2];
    };
    static __device__ __forceinline__ void load(Raw& raw, const Matrix& m, unsigned tile_row, unsigned step) {
        unsigned lane = threadIdx.x % 32;
        const T* weights = reinterpret_cast<const T*>(m.codes);
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            // Rows past the end repeat the last one; what they give is not stored.
            unsigned row = min(tile_row * TILE_ROWS + lane / 4 + 8 * half, m.rows - 1);
            const T* from = weights + static_cast<size_t>(row) * m.cols;
#pragma unroll
            for (unsigned block = 0; block < 2; ++block) {
                unsigned col = step * TILE_COLS + block * BLOCK_COLS + lane % 4 * 8;
                if (m.wide && col < m.cols) {
                    raw.rows[block][half] = load_stream(from + col);
                } else {
                    raw.rows[block][half] = load_row8(from, col, m.cols, m.wide);
                }
            }
        }
    }
    static __device__ __forceinline__ void unpack(Fragment& f, const Raw& raw, unsigned block) {
        const uint4 &low = raw.rows[block][0], &high = raw.rows[block][1];
        set_pair(f, 0, low.x, high.x);
        set_pair(f, 1, low.y, high.y);
        set_pair(f, 2, low.z, high.z);
        set_pair(f, 3, low.w, high.w);
    }
};

// Where the tile `step` of row of tiles `tile_row` begins, in tiles.
__device__ __forceinline__ size_t tile_number(const Matrix& m, unsigned tile_row, unsigned step) {
    unsigned steps = (m.cols + TILE_COLS - 1) / TILE_COLS;
    return static_cast<size_t>(tile_row) * steps + step;
}

struct ByteCodes {
    uint4 blocks[2];
    __device__ __forceinline__ void load(const Matrix& m, size_t tile) {
        const unsigned char* from = m.codes + tile * 1024 + threadIdx.x % 32 * 16;
        blocks[0] = load_stream(from);
        blocks[1] = load_stream(from + 512);
    }
};

template <class T> __device__ __forceinline__ void unpack_fp8(Fragment& f, const ByteCodes& codes, unsigned block) {
    const uint4& w = codes.blocks[block];
    set_pair(f, 0, fp8_to_pair<T>(w.x), fp8_to_pair<T>(w.z));
    set_pair(f, 1, fp8_to_pair<T>(w.x >> 8), fp8_to_pair<T>(w.z >> 8));
    set_pair(f, 2, fp8_to_pair<T>(w.y), fp8_to_pair<T>(w.w));
    set_pair(f, 3, fp8_to_pair<T>(w.y >> 8), fp8_to_pair<T>(w.w >> 8));
}

template <class T> struct Fp8 {
    static constexpr bool GROUPED = false, MINIMA = false;
    static constexpr unsigned PREFETCH = 4, PREFETCH_PAIR = 2;
    struct Raw {
        ByteCodes codes;
    };
    static __device__ __forceinline__ void load(Raw& raw, const Matrix& m, unsigned tile_row, unsigned step) {
        raw.codes.load(m, tile_number(m, tile_row, step));
    }
    static __device__ __forceinline__ void unpack(Fragment& f, const Raw& raw, unsigned block) {
        unpack_fp8<T>(f, raw.codes, block);
    }
};

__device__ __forceinline__ uint2 load_group_scales(const uint16_t* scales, size_t tile) {
    return *reinterpret_cast<const uint2*>(scales + tile * 32 + threadIdx.x % 32 / 4 * 4);
}

// Scale (or minimum) of row g (`half` 0) or g + 8 in `block`.
__device__ __forceinline__ float group_scale(uint2 scales, unsigned block, unsigned half) {
    return f16_bits_to_float((block == 0 ? scales.x : scales.y) >> 16 * half & 0xffffu);
}

// Scales of blocks are factors beside those of rows.
template <class T> struct Fp8Grouped {
    static constexpr bool GROUPED = true, MINIMA = false;
    static constexpr unsigned PREFETCH = 3, PREFETCH_PAIR = 2;
    struct Raw {
        ByteCodes codes;
        uint2 scales;
    };
    static __device__ __forceinline__ void load(Raw& raw, const Matrix& m, unsigned tile_row, unsigned step) {
        size_t tile = tile_number(m, tile_row, step);
        raw.codes.load(m, tile);
        raw.scales = load_group_scales(m.scales, tile);
    }
    static __device__ __forceinline__ void unpack(Fragment& f, const Raw& raw, unsigned block) {
        unpack_fp8<T>(f, raw.codes, block);
    }
    static __device__ __forceinline__ float scale(const Raw& raw, unsigned block, unsigned half) {
        return group_scale(raw.scales, block, half);
    }
};

template <class T> struct Int8 {
    static constexpr bool GROUPED = true, MINIMA = false;
    static constexpr unsigned PREFETCH = 3, PREFETCH_PAIR = 2;
    struct Raw {
        ByteCodes codes;
        uint2 scales;
    };
    static __device__ __forceinline__ void load(Raw& raw, const Matrix& m, unsigned tile_row, unsigned step) {
        size_t tile = tile_number(m, tile_row, step);
        raw.codes.load(m, tile);
        raw.scales = load_group_scales(m.scales, tile);
    }
    static __device__ __forceinline__ void unpack(Fragment& f, const Raw& raw, unsigned block) {
        const uint4& w = raw.codes.blocks[block];
        set_pair(f, 0, bytes_to_pair<T>(w.x), bytes_to_pair<T>(w.z));
        set_pair(f, 1, bytes_to_pair<T>(w.x >> 8), bytes_to_pair<T>(w.z >> 8));
        set_pair(f, 2, bytes_to_pair<T>(w.y), bytes_to_pair<T>(w.w));
        set_pair(f, 3, bytes_to_pair<T>(w.y >> 8), bytes_to_pair<T>(w.w >> 8));
    }
    static __device__ __forceinline__ float scale(const Raw& raw, unsigned block, unsigned half) {
        return group_scale(raw.scales, block, half);
    }
};

// Codes count from 8 in both kinds; a minimum is then that of code 8.
template <class T, bool WITH_MINIMA> struct Int4 {
    static constexpr bool GROUPED = true, MINIMA = WITH_MINIMA;
    static constexpr unsigned PREFETCH = 4, PREFETCH_PAIR = 2;
    struct Raw {
        uint4 codes;
        uint2 scales, mins;
    };
    static __device__ __forceinline__ void load(Raw& raw, const Matrix& m, unsigned tile_row, unsigned step) {
        size_t tile = tile_number(m, tile_row, step);
        raw.codes = load_stream(m.codes + tile * 512 + threadIdx.x % 32 * 16);
        raw.scales = load_group_scales(m.scales, tile);
        if constexpr (WITH_MINIMA) raw.mins = load_group_scales(m.mins, tile);
    }
    static __device__ __forceinline__ uint32_t pair(uint32_t word, unsigned number) {
        uint32_t codes = word >> 4 * number & 0x000f000fu;
        return sub2<T>(codes | Constants<T>::HALF_BYTE, Constants<T>::HALF_BYTE_ZERO);
    }
    static __device__ __forceinline__ void unpack(Fragment& f, const Raw& raw, unsigned block) {
        uint32_t low = block == 0 ? raw.codes.x : raw.codes.z, high = block == 0 ? raw.codes.y : raw.codes.w;
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) set_pair(f, i, pair(low, i), pair(high, i));
    }
    static __device__ __forceinline__ float scale(const Raw& raw, unsigned block, unsigned half) {
        return group_scale(raw.scales, block, half);
    }
    static __device__ __forceinline__ float minimum(const Raw& raw, unsigned block, unsigned half) {
        return group_scale(raw.mins, block, half) + 8.0f * group_scale(raw.scales, block, half);
    }
};

// acc += tile block times activations; `x` holds eight columns of one token a lane.
template <class T, class F>
__device__ __forceinline__ void multiply_block(float (&acc)[4], const Fragment& f, const typename F::Raw& raw,
                                               unsigned block, const uint4& x, const float (&x_sums)[4]) {
    if constexpr (!F::GROUPED) {
        mma_16816<T>(acc, f.a[0], x.x, x.y);
        mma_16816<T>(acc, f.a[1], x.z, x.w);
    } else {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16816<T>(part, f.a[0], x.x, x.y);
        mma_16816<T>(part, f.a[1], x.z, x.w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            acc[i] = fmaf(F::scale(raw, block, i / 2), part[i], acc[i]);
            if constexpr (F::MINIMA) acc[i] = fmaf(F::minimum(raw, block, i / 2), x_sums[i % 2], acc[i]);
        }
    }
}

// Sums of a block of each token's activations, in every row of the result.
template <class T> __device__ __forceinline__ void block_sums(float (&sums)[4], const uint4& x) {
    constexpr uint32_t ONE = Constants<T>::ONES;
    const uint32_t ones[4] = {ONE, ONE, ONE, ONE};
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
    mma_16816<T>(sums, ones, x.x, x.y);
    mma_16816<T>(sums, ones, x.z, x.w);
}
