// What an encoder does between its matrix products, each in one pass over memory: sums of rows with their layer norm, bias
// and activation, and from a vector a token to one a sequence.
#include "activation.cuh"

namespace {

template <class T> constexpr int WIDE = 16 / sizeof(T);
constexpr int MAX_PARTS = 3;
// Pieces of a row that a lane keeps in registers: all of 1024 numbers of 16 bits. What is beyond is read again.
constexpr int HELD = 4;

}  // namespace

// Mirrored by `LayerNormArgs` in kernels/src/cuda/encoder.rs.
struct LayerNorm {
    // What is added up: row `ids[row]` of the part, or the row's own number where that is null; `strides` elements from row
    // to row. Parts that are null: none.
    const void* parts[MAX_PARTS];
    const unsigned* ids[MAX_PARTS];
    size_t strides[MAX_PARTS];
    const void* added;           // [width], added to every row; null: none
    const float *weight, *bias;  // [width]; `bias` null: none
    void *sum, *out;             // [rows, width], contiguous; `sum` null: not wanted
    unsigned rows, width;
    float eps;
};

namespace {

// Numbers `at` and on of the sum of a row's parts.
template <class T, int N>
__device__ __forceinline__ void add_up(const T* const (&parts)[MAX_PARTS], const T* added, unsigned at, float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = 0.0f;
    auto add = [&](const T* from) {
        if (from == nullptr) return;
        Pack<T, N> x = load_pack<N>(from + at);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += to_float(x.v[i]);
    };
#pragma unroll
    for (int part = 0; part < MAX_PARTS; ++part) add(parts[part]);
    add(added);
}

template <class T, int N>
__device__ __forceinline__ void layer_norm_row(const LayerNorm& p, const T* const (&parts)[MAX_PARTS], size_t row) {
    unsigned lane = threadIdx.x % 32;
    const T* added = static_cast<const T*>(p.added);
    float held[HELD][N];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        unsigned at = (i * 32 + lane) * N;
        if (at < p.width) add_up<T, N>(parts, added, at, held[i]);
    }
    auto each = [&](auto use) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            unsigned at = (i * 32 + lane) * N;
            if (at < p.width) use(at, held[i]);
        }
        for (unsigned at = (HELD * 32 + lane) * N; at < p.width; at += 32 * N) {
            float again[N];
            add_up<T, N>(parts, added, at, again);
            use(at, again);
        }
    };
    float total = 0.0f, squares = 0.0f;
    each([&](unsigned, const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) total += x[i];
    });
    float mean = warp_sum(total) / static_cast<float>(p.width);
    each([&](unsigned, const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (x[i] - mean) * (x[i] - mean);
    });
    float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);
    T* out = static_cast<T*>(p.out) + row * p.width;
    T* sum = p.sum != nullptr ? static_cast<T*>(p.sum) + row * p.width : nullptr;
    each([&](unsigned at, const float (&x)[N]) {
        Pack<T, N> y;
        if (sum != nullptr) {
#pragma unroll
            for (int i = 0; i < N; ++i) y.v[i] = from_float<T>(x[i]);
            store_pack<N>(sum + at, y);
        }
        constexpr int WIDTH = N < 4 ? N : 4;
#pragma unroll
        for (int i = 0; i < N; i += WIDTH) {
            Pack<float, WIDTH> weight = load_pack<WIDTH>(p.weight + at + i), bias = {};
            if (p.bias != nullptr) bias = load_pack<WIDTH>(p.bias + at + i);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                y.v[i + j] = from_float<T>((x[i + j] - mean) * factor * weight.v[j] + bias.v[j]);
            }
        }
        store_pack<N>(out + at, y);
    });
}

// out = (s - mean(s)) / sqrt(variance(s) + eps) * weight + bias for rows s, the sums of the parts in f32; `sum` is s rounded.
// A warp a row.
template <class T> __device__ __forceinline__ void layer_norm(const LayerNorm& p) {
    size_t row = static_cast<size_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    const T* parts[MAX_PARTS];
    size_t bits = reinterpret_cast<size_t>(p.added) | reinterpret_cast<size_t>(p.weight) |
                  reinterpret_cast<size_t>(p.bias) | reinterpret_cast<size_t>(p.sum) | reinterpret_cast<size_t>(p.out) |
                  p.width * sizeof(T);
#pragma unroll
    for (int part = 0; part < MAX_PARTS; ++part) {
        const T* from = static_cast<const T*>(p.parts[part]);
        size_t at = p.ids[part] != nullptr ? p.ids[part][row] : row;
        parts[part] = from != nullptr ? from + at * p.strides[part] : nullptr;
        bits |= reinterpret_cast<size_t>(parts[part]);
    }
    if (is_multiple_of_16(bits)) layer_norm_row<T, WIDE<T>>(p, parts, row);
    else layer_norm_row<T, 1>(p, parts, row);
}

constexpr unsigned NO_ACTIVATION = 4;

template <class T, int N>
__device__ __forceinline__ void bias_activate_rows(const T* x, size_t stride, const T* bias, T* out, unsigned width,
                                                   unsigned rows, unsigned activation) {
    for (unsigned at = (blockIdx.x * blockDim.x + threadIdx.x) * N; at < width; at += gridDim.x * blockDim.x * N) {
        float added[N];
#pragma unroll
        for (int i = 0; i < N; ++i) added[i] = bias != nullptr ? to_float(bias[at + i]) : 0.0f;
        for (size_t row = blockIdx.y; row < rows; row += gridDim.y) {
            Pack<T, N> y = load_pack<N>(x + row * stride + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float value = to_float(y.v[i]) + added[i];
                y.v[i] = from_float<T>(activation == NO_ACTIVATION ? value : activate(value, activation));
            }
            store_pack<N>(out + row * width + at, y);
        }
    }
}

// out = activation(x + bias), `bias` null: none. `out` may be `x` if rows of that are contiguous. Rows are blockIdx.y and
// every gridDim.y-th after it, so that a thread reads its part of the bias once.
template <class T>
__device__ __forceinline__ void bias_activate(const T* x, size_t stride, const T* bias, T* out, unsigned width,
                                              unsigned rows, unsigned activation) {
    size_t bits = reinterpret_cast<size_t>(x) | stride * sizeof(T) | reinterpret_cast<size_t>(out) | width * sizeof(T);
    if (is_multiple_of_16(bits)) bias_activate_rows<T, WIDE<T>>(x, stride, bias, out, width, rows, activation);
    else bias_activate_rows<T, 1>(x, stride, bias, out, width, rows, activation);
}

constexpr unsigned CLS = 0, LAST = 1, MAX = 2, MEAN = 3, MEAN_SQRT_LEN = 4, WEIGHTED_MEAN = 5;
constexpr unsigned POOL_WARPS = 8;
constexpr int POOL_COLUMNS = 4;

template <class T, int N>
__device__ __forceinline__ void pool_columns(const T* x, size_t stride, unsigned len, float* out, unsigned width,
                                             unsigned mode) {
    __shared__ float totals[POOL_WARPS][32 * POOL_COLUMNS];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned begin = mode == LAST ? len - 1 : 0, end = mode == CLS ? 1 : len;
    float divisor = 1.0f;
    if (mode == MEAN) divisor = static_cast<float>(len);
    if (mode == MEAN_SQRT_LEN) divisor = sqrtf(static_cast<float>(len));
    if (mode == WEIGHTED_MEAN) divisor = static_cast<float>(static_cast<uint64_t>(len) * (len + 1) / 2);
    for (unsigned first = blockIdx.x * 32 * N; first < width; first += gridDim.x * 32 * N) {
        unsigned at = first + lane * N;
        float total[N];
#pragma unroll
        for (int i = 0; i < N; ++i) total[i] = mode == MAX ? -INFINITY : 0.0f;
        for (unsigned token = begin + warp; at < width && token < end; token += POOL_WARPS) {
            Pack<T, N> row = load_pack<N>(x + token * stride + at);
            float weight = mode == WEIGHTED_MEAN ? static_cast<float>(token + 1) : 1.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float value = to_float(row.v[i]);
                total[i] = mode == MAX ? fmaxf(total[i], value) : total[i] + weight * value;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) totals[warp][lane * N + i] = total[i];
        __syncthreads();
        for (unsigned i = threadIdx.x; i < 32 * N && first + i < width; i += blockDim.x) {
            float joined = totals[0][i];
            for (unsigned w = 1; w < POOL_WARPS; ++w) {
                joined = mode == MAX ? fmaxf(joined, totals[w][i]) : joined + totals[w][i];
            }
            out[first + i] = joined / divisor;
        }
        __syncthreads();  // `totals` is written again
    }
}

// Row blockIdx.y of `out`, `out_stride` numbers apart: what `mode` makes of the rows of sequence blockIdx.y, which is not
// empty. Eight warps each take every eighth token; their totals are joined in order.
template <class T>
__device__ __forceinline__ void pool(const T* x, size_t stride, const unsigned* cu_seqlens, float* out, size_t out_stride,
                                     unsigned width, unsigned mode) {
    unsigned first = cu_seqlens[blockIdx.y], len = cu_seqlens[blockIdx.y + 1] - first;
    x += first * stride;
    out += blockIdx.y * out_stride;
    size_t bits = reinterpret_cast<size_t>(x) | stride * sizeof(T) | width * sizeof(T);
    // Four numbers at once take 8 bytes of 16-bit types; asking for 16 loses nothing that occurs.
    if (is_multiple_of_16(bits)) pool_columns<T, POOL_COLUMNS>(x, stride, len, out, width, mode);
    else pool_columns<T, 1>(x, stride, len, out, width, mode);
}

}  // namespace

#define ENCODER(suffix, T)                                                                                          \
    extern "C" __global__ void layer_norm_##suffix(const LayerNorm p) { layer_norm<T>(p); }                         \
    LAUNCHABLE(layer_norm_##suffix)                                                                                 \
    extern "C" __global__ void bias_activate_##suffix(const T* x, size_t stride, const T* bias, T* out,             \
                                                      unsigned width, unsigned rows, unsigned activation) {         \
        bias_activate<T>(x, stride, bias, out, width, rows, activation);                                            \
    }                                                                                                               \
    LAUNCHABLE(bias_activate_##suffix)                                                                              \
    extern "C" __global__ void pool_##suffix(const T* x, size_t stride, const unsigned* cu_seqlens, float* out,     \
                                             size_t out_stride, unsigned width, unsigned mode) {                    \
        pool<T>(x, stride, cu_seqlens, out, out_stride, width, mode);                                               \
    }                                                                                                               \
    LAUNCHABLE(pool_##suffix)

ENCODER(f32, float)
ENCODER(bf16, bf16)
ENCODER(f16, f16)
