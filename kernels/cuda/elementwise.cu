// What a layer does between its matrix products, each in one pass over memory: RMSNorm with the residual addition before
// it, the gated activation, rows of an embedding, ids put in their places, and queries and keys normed, rotated and stored.
#include "activation.cuh"

namespace {

// `values` of a row, `N` at a time; unaligned rows go one by one.
template <class T> constexpr int WIDE = 16 / sizeof(T);

template <class T, int N>
__device__ __forceinline__ void rms_norm_row(const T* a, const T* b, T* sum, const float* weight, T* out,
                                             unsigned width, float eps, float b_scale) {
    float squares = 0.0f;
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        Pack<T, N> x = load_pack<N>(a + at);
        if (b != nullptr) {
            Pack<T, N> y = load_pack<N>(b + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float part = b_scale == 1.0f ? to_float(y.v[i]) : to_float(from_float<T>(to_float(y.v[i]) * b_scale));
                x.v[i] = from_float<T>(to_float(x.v[i]) + part);
            }
            store_pack<N>(sum + at, x);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) squares += to_float(x.v[i]) * to_float(x.v[i]);
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + eps);
    // Each thread reads what it has itself written.
    const T* from = b != nullptr ? sum : a;
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        Pack<T, N> x = load_pack<N>(from + at);
#pragma unroll
        for (int i = 0; i < N; ++i) x.v[i] = from_float<T>(to_float(x.v[i]) * factor * weight[at + i]);
        store_pack<N>(out + at, x);
    }
}

// out = norm(a + b_scale b) * weight and sum = a + b_scale b, rounded as T, which is what is normed; without `b` the norm
// of `a`. One block of whole warps a row; `out` and `sum` are contiguous.
template <class T>
__device__ __forceinline__ void rms_norm(const T* a, size_t a_stride, const T* b, size_t b_stride, T* sum,
                                         const float* weight, T* out, unsigned width, float eps, float b_scale) {
    size_t row = blockIdx.x;
    a += row * a_stride;
    if (b != nullptr) {
        b += row * b_stride;
        sum += row * width;
    }
    out += row * width;
    size_t bits = reinterpret_cast<size_t>(a) | reinterpret_cast<size_t>(b) | reinterpret_cast<size_t>(sum) |
                  reinterpret_cast<size_t>(out) | width * sizeof(T);
    if (is_multiple_of_16(bits)) rms_norm_row<T, WIDE<T>>(a, b, sum, weight, out, width, eps, b_scale);
    else rms_norm_row<T, 1>(a, b, sum, weight, out, width, eps, b_scale);
}

template <class T, int N>
__device__ __forceinline__ void gated_row(const T* gate, const T* bias, T* out, unsigned width, unsigned activation) {
    for (unsigned at = (blockIdx.x * blockDim.x + threadIdx.x) * N; at < width; at += gridDim.x * blockDim.x * N) {
        Pack<T, N> g = load_pack<N>(gate + at), u = load_pack<N>(gate + width + at);
        Pack<T, N> g_bias = {}, u_bias = {};
        if (bias != nullptr) {
            g_bias = load_pack<N>(bias + at);
            u_bias = load_pack<N>(bias + width + at);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float gate_value = to_float(g.v[i]), up_value = to_float(u.v[i]);
            if (bias != nullptr) {
                gate_value += to_float(g_bias.v[i]);
                up_value += to_float(u_bias.v[i]);
            }
            g.v[i] = from_float<T>(to_float(from_float<T>(activate(gate_value, activation))) * up_value);
        }
        store_pack<N>(out + at, g);
    }
}

// out = activation(gate) * up for rows of gate and up side by side, to which `bias` [2 * width] is added first unless it
// is null. Rows are blockIdx.y.
template <class T>
__device__ __forceinline__ void gated(const T* gate_up, size_t stride, const T* bias, T* out, unsigned width,
                                      unsigned rows, unsigned activation) {
    for (size_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const T* gate = gate_up + row * stride;
        T* to = out + row * width;
        size_t bits = reinterpret_cast<size_t>(gate) | reinterpret_cast<size_t>(bias) | reinterpret_cast<size_t>(to) |
                      width * sizeof(T);
        if (is_multiple_of_16(bits)) gated_row<T, WIDE<T>>(gate, bias, to, width, activation);
        else gated_row<T, 1>(gate, bias, to, width, activation);
    }
}

template <class T, int N> __device__ __forceinline__ void copy_row(const T* from, T* to, unsigned width, float scale) {
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        Pack<T, N> x = load_pack<N>(from + at);
        if (scale != 1.0f) {
#pragma unroll
            for (int i = 0; i < N; ++i) x.v[i] = from_float<T>(to_float(x.v[i]) * scale);
        }
        store_pack<N>(to + at, x);
    }
}

// Rows `ids` of a table of `num_rows`, times `scale`; zeros for an id that is none. One block a row.
template <class T>
__device__ __forceinline__ void gather(const T* table, size_t stride, const unsigned* ids, T* out, unsigned width,
                                       unsigned num_rows, float scale) {
    unsigned id = ids[blockIdx.x];
    T* to = out + static_cast<size_t>(blockIdx.x) * width;
    if (id >= num_rows) {
        for (unsigned at = threadIdx.x; at < width; at += blockDim.x) to[at] = from_float<T>(0.0f);
        return;
    }
    const T* from = table + static_cast<size_t>(id) * stride;
    size_t bits = reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to) | width * sizeof(T);
    if (is_multiple_of_16(bits)) copy_row<T, WIDE<T>>(from, to, width, scale);
    else copy_row<T, 1>(from, to, width, scale);
}

}  // namespace

// Mirrored by `RotateStoreArgs` in kernels/src/cuda/elementwise.rs.
struct RotateStore {
    // Rows of tokens, heads side by side; strides in elements.
    const void *q, *k, *v;
    size_t q_stride, k_stride, v_stride;
    // Norm of each head before it is rotated, [head_dim] f32; null: none.
    const float *q_norm, *k_norm;
    // [positions, half] f32; row `positions[token]`, or the token's own number where that is null.
    const float *cos, *sin;
    const unsigned* positions;
    // Slot of each token, or the token's own number where that is null. A slot past `num_slots` is not written.
    const unsigned* slots;
    // [tokens, heads, head_dim]; [num_slots, kv_heads, head_dim] twice.
    void *q_out, *k_cache, *v_cache;
    unsigned tokens, heads, kv_heads, head_dim, half, num_slots;
    float eps;
};

namespace {

// One head: normed, its first 2 half numbers rotated half against half, rounded to T in between as single steps would.
template <class T, class To>
__device__ __forceinline__ void rotate_head(const T* from, To* to, const float* norm, const float* cos,
                                            const float* sin, unsigned head_dim, unsigned half, float eps) {
    unsigned lane = threadIdx.x % 32;
    float factor = 1.0f;
    if (norm != nullptr) {
        float squares = 0.0f;
        for (unsigned i = lane; i < head_dim; i += 32) squares += to_float(from[i]) * to_float(from[i]);
        factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(head_dim) + eps);
    }
    auto value = [&](unsigned i) {
        float x = to_float(from[i]);
        return norm == nullptr ? x : to_float(from_float<T>(x * factor * norm[i]));
    };
    if (to == nullptr) return;
    for (unsigned i = lane; i < half; i += 32) {
        float a = value(i), b = value(i + half), c = cos[i], s = sin[i];
        to[i] = from_float<To>(to_float(from_float<T>(a * c - b * s)));
        to[i + half] = from_float<To>(to_float(from_float<T>(b * c + a * s)));
    }
    for (unsigned i = 2 * half + lane; i < head_dim; i += 32) to[i] = from_float<To>(value(i));
}

// A warp a head of a token: first those of the queries, then of keys, then of values.
template <class T, class KV> __device__ __forceinline__ void rotate_store(const RotateStore& p) {
    unsigned token = blockIdx.x;
    unsigned head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= p.heads + 2 * p.kv_heads) return;
    size_t row = p.positions != nullptr ? p.positions[token] : token;
    const float *cos = p.cos + row * p.half, *sin = p.sin + row * p.half;
    if (head < p.heads) {
        const T* from = static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
        T* to = static_cast<T*>(p.q_out) + (static_cast<size_t>(token) * p.heads + head) * p.head_dim;
        rotate_head<T, T>(from, to, p.q_norm, cos, sin, p.head_dim, p.half, p.eps);
        return;
    }
    head -= p.heads;
    unsigned slot = p.slots != nullptr ? p.slots[token] : token;
    bool written = slot < p.num_slots;
    bool is_key = head < p.kv_heads;
    head = is_key ? head : head - p.kv_heads;
    size_t at = (static_cast<size_t>(slot) * p.kv_heads + head) * p.head_dim;
    if (is_key) {
        const T* from = static_cast<const T*>(p.k) + token * p.k_stride + head * p.head_dim;
        KV* to = written ? static_cast<KV*>(p.k_cache) + at : nullptr;
        rotate_head<T, KV>(from, to, p.k_norm, cos, sin, p.head_dim, p.half, p.eps);
    } else if (written) {
        const T* from = static_cast<const T*>(p.v) + token * p.v_stride + head * p.head_dim;
        KV* to = static_cast<KV*>(p.v_cache) + at;
        for (unsigned i = threadIdx.x % 32; i < p.head_dim; i += 32) to[i] = from_float<KV>(to_float(from[i]));
    }
}

}  // namespace

#define ELEMENTWISE(suffix, T)                                                                                    \
    extern "C" __global__ void rms_norm_##suffix(const T* a, size_t a_stride, const T* b, size_t b_stride,        \
                                                 T* sum, const float* weight, T* out, unsigned width, float eps, \
                                                 float b_scale) {                                                 \
        rms_norm<T>(a, a_stride, b, b_stride, sum, weight, out, width, eps, b_scale);                             \
    }                                                                                                             \
    LAUNCHABLE(rms_norm_##suffix)                                                                                 \
    extern "C" __global__ void gated_##suffix(const T* gate_up, size_t stride, const T* bias, T* out,            \
                                              unsigned width, unsigned rows, unsigned activation) {              \
        gated<T>(gate_up, stride, bias, out, width, rows, activation);                                            \
    }                                                                                                             \
    LAUNCHABLE(gated_##suffix)                                                                                    \
    extern "C" __global__ void gather_##suffix(const T* table, size_t stride, const unsigned* ids, T* out,       \
                                               unsigned width, unsigned num_rows, float scale) {                 \
        gather<T>(table, stride, ids, out, width, num_rows, scale);                                               \
    }                                                                                                             \
    LAUNCHABLE(gather_##suffix)

ELEMENTWISE(f32, float)
ELEMENTWISE(bf16, bf16)
ELEMENTWISE(f16, f16)

// Ids that an earlier step has chosen, put among those of a step: ids[rows[i]] = chosen[places[i]], or 0 where that is not
// below `limit`. All rows are different.
extern "C" __global__ void __launch_bounds__(256) place_ids(unsigned* ids, const unsigned* rows, const unsigned* places,
                                                            const unsigned* chosen, unsigned count, unsigned limit) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned id = chosen[places[i]];
    ids[rows[i]] = id < limit ? id : 0;
}
LAUNCHABLE(place_ids)

#define ROTATE_STORE(name, T, KV)                                                     \
    extern "C" __global__ void name(const RotateStore p) { rotate_store<T, KV>(p); } \
    LAUNCHABLE(name)

ROTATE_STORE(rotate_store_f32, float, float)
ROTATE_STORE(rotate_store_bf16, bf16, bf16)
ROTATE_STORE(rotate_store_f16, f16, f16)
ROTATE_STORE(rotate_store_bf16_fp8, bf16, fp8)
ROTATE_STORE(rotate_store_f16_fp8, f16, fp8)
