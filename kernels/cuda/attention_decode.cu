// Attention of sequences that bring one query: the context in parts of SPLIT keys, and a pass that joins the parts.
//
// A block of four warps computes parts of one sequence and one group of at most 16 heads; a warp takes 32 keys of a part. Keys and values go
// from memory into the fragments of the tensor cores without a detour: a sum over features does not mind their order, so
// a lane loads 16 consecutive bytes of a key and calls them the features that the instruction wants of it; likewise the
// columns of the result are any features. Parts begin at fixed positions and are joined in order, so that a
// result depends neither on batch mates nor on the size of the grid.
#include "attention.cuh"

namespace {

constexpr unsigned SPLIT = 128;
constexpr unsigned WARPS = 4;
constexpr unsigned ROWS = 16;

template <class T, class KV, int DIM> __device__ __forceinline__ void attention_decode(const Attention& p) {
    using C = typename Products<T, KV>::type;
    constexpr int K_CHUNKS = (DIM + 31) / 32, V_CHUNKS = (DIM + 63) / 64;
    constexpr int Q_STRIDE = K_CHUNKS * 32 + 8;  // rows 16 bytes apart in their banks
    __shared__ __align__(16) uint16_t queries[ROWS * Q_STRIDE];
    __shared__ float sums[ROWS * V_CHUNKS * 64];
    __shared__ float warp_max_of[WARPS][ROWS], warp_sum_of[WARPS][ROWS];

    unsigned group_size = p.heads / p.kv_heads, tiles = (group_size + ROWS - 1) / ROWS;
    unsigned kv_head = blockIdx.y / tiles, first_row = blockIdx.y % tiles * ROWS;
    unsigned rows = min(group_size - first_row, ROWS), first_head = kv_head * group_size + first_row;
    unsigned seq = p.seqs[blockIdx.z], len = p.seq_lens[seq];
    // The query is the last token: of the keys up to `len` it sees those from `first`.
    unsigned first = static_cast<int>(len) > p.left ? len - p.left : 0;
    unsigned first_part = first / SPLIT, parts = (len + SPLIT - 1) / SPLIT;
    if (first_part + blockIdx.x >= parts) return;

    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    size_t token = p.cu_seqlens_q[seq];
    const T* q = static_cast<const T*>(p.q) + token * p.q_stride + first_head * p.head_dim;
    for (unsigned i = threadIdx.x; i < ROWS * K_CHUNKS * 4; i += WARPS * 32) {
        unsigned row = i / (K_CHUNKS * 4), feature = i % (K_CHUNKS * 4) * 8;
        Pack<uint32_t, 4> x = {{0, 0, 0, 0}};
        if (row < rows && feature < p.head_dim) x = query_pairs<T, C>(q + row * p.head_dim + feature);
        store_pack<4>(reinterpret_cast<uint32_t*>(queries + row * Q_STRIDE + feature), x);
    }
    __syncthreads();

    const KV* k = static_cast<const KV*>(p.k) + kv_head * p.head_dim;
    const KV* v = static_cast<const KV*>(p.v) + kv_head * p.head_dim;
    for (unsigned part = first_part + blockIdx.x; part < parts; part += gridDim.x) {
        float acc[V_CHUNKS * 8][4];
#pragma unroll
        for (int t = 0; t < V_CHUNKS * 8; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0.0f;
        RowStats stats;

        // Each lane looks up one of the warp's keys.
        unsigned mine = part * SPLIT + warp * 32 + lane;
        bool seen = mine >= first && mine < len;
        long long row_of_mine = seen ? static_cast<long long>(key_row(p, seq, mine)) : -1;
        for (unsigned step = 0; step < 2; ++step) {
            unsigned base = part * SPLIT + warp * 32 + step * 16;
            if (base >= len || base + 16 <= first) continue;

            // Keys base + g and 8 more, features 8c of each 32.
            Pack<uint32_t, 4> keys[2][K_CHUNKS];
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                long long row = __shfl_sync(FULL_WARP, row_of_mine, step * 16 + t * 8 + g);
#pragma unroll
                for (int i = 0; i < K_CHUNKS; ++i) {
                    unsigned feature = i * 32 + c * 8;
                    keys[t][i] = {{0, 0, 0, 0}};
                    if (row >= 0 && feature < p.head_dim) keys[t][i] = load_pairs<KV>(k + row * p.k_stride + feature);
                }
            }
            // Values of keys 2c, 2c + 1, 2c + 8, 2c + 9; features 8g of each 64.
            Pack<uint32_t, 4> values[4][V_CHUNKS];
            auto load_values = [&]() {
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    long long row = __shfl_sync(FULL_WARP, row_of_mine, step * 16 + 2 * c + t % 2 + t / 2 * 8);
#pragma unroll
                    for (int i = 0; i < V_CHUNKS; ++i) {
                        unsigned feature = i * 64 + g * 8;
                        values[t][i] = {{0, 0, 0, 0}};
                        if (row >= 0 && feature < p.head_dim)
                            values[t][i] = load_pairs<KV>(v + row * p.v_stride + feature);
                    }
                }
            };
            // Under way beside the keys, where the registers suffice.
            if (DIM <= 128) load_values();

            float s[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
            for (int i = 0; i < K_CHUNKS; ++i) {
                const uint16_t* at = queries + g * Q_STRIDE + i * 32 + c * 8;
                Pack<uint32_t, 4> upper = load_pack<4>(reinterpret_cast<const uint32_t*>(at));
                Pack<uint32_t, 4> lower = load_pack<4>(reinterpret_cast<const uint32_t*>(at + 8 * Q_STRIDE));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t a[4] = {upper.v[2 * half], lower.v[2 * half], upper.v[2 * half + 1], lower.v[2 * half + 1]};
#pragma unroll
                    for (int t = 0; t < 2; ++t)
                        mma_16816<C>(s[t], a, keys[t][i].v[2 * half], keys[t][i].v[2 * half + 1]);
                }
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    unsigned key = base + t * 8 + 2 * c + i % 2;
                    s[t][i] = key >= first && key < len ? score(p, s[t][i]) : MINUS_INFINITY;
                }
            }
            float factor[2];
            soften<2>(s, stats, factor);
            uint32_t weights[4] = {pack2<C>(s[0][0], s[0][1]), pack2<C>(s[0][2], s[0][3]), pack2<C>(s[1][0], s[1][1]),
                                   pack2<C>(s[1][2], s[1][3])};
            if (DIM > 128) load_values();
#pragma unroll
            for (int i = 0; i < V_CHUNKS; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    float(&to)[4] = acc[i * 8 + j];
                    to[0] *= factor[0];
                    to[1] *= factor[0];
                    to[2] *= factor[1];
                    to[3] *= factor[1];
                    // Feature 8g + j of two keys side by side.
                    uint32_t which = j % 2 ? 0x7632 : 0x5410;
                    mma_16816<C>(to, weights, byte_perm(values[0][i].v[j / 2], values[1][i].v[j / 2], which),
                                 byte_perm(values[2][i].v[j / 2], values[3][i].v[j / 2], which));
                }
            }
        }

        // Join the warps, in order.
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float sum = quad_sum(stats.sum[row]);
            if (c == 0) {
                warp_max_of[warp][g + 8 * row] = stats.max[row];
                warp_sum_of[warp][g + 8 * row] = sum;
            }
        }
        __syncthreads();
        auto joined = [&](unsigned row, float& max, float& sum) {
            max = MINUS_INFINITY;
            for (unsigned w = 0; w < WARPS; ++w) max = fmaxf(max, warp_max_of[w][row]);
            sum = 0.0f;
            for (unsigned w = 0; w < WARPS; ++w) sum += warp_sum_of[w][row] * fast_exp2(warp_max_of[w][row] - max);
        };
        for (unsigned turn = 0; turn < WARPS; ++turn) {
            if (warp == turn) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    unsigned row = g + 8 * half;
                    if (row >= rows) continue;
                    float max, sum;
                    joined(row, max, sum);
                    float weight = fast_exp2(stats.max[half] - max);
#pragma unroll
                    for (int t = 0; t < V_CHUNKS * 8; ++t) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            // Lanes side by side, each in a bank of its own.
                            float& to = sums[((t * 2 + i) * ROWS + row) * 4 + c];
                            to = (turn == 0 ? 0.0f : to) + acc[t][2 * half + i] * weight;
                        }
                    }
                }
            }
            __syncthreads();
        }
        size_t slot = p.cu_parts[blockIdx.z] + part;
        for (unsigned i = threadIdx.x; i < rows * p.head_dim; i += WARPS * 32) {
            unsigned row = i / p.head_dim, feature = i % p.head_dim;
            // Feature 64 t / 8 + 8 (2 c + i) + t % 8.
            unsigned t = feature / 64 * 8 + feature % 8, eighth = feature % 64 / 8;
            float max, sum, x = sums[((t * 2 + eighth % 2) * ROWS + row) * 4 + eighth / 2];
            joined(row, max, sum);
            if (parts - first_part == 1) {
                T* out = static_cast<T*>(p.out) + (token * p.heads + first_head + row) * p.head_dim;
                out[feature] = from_float<T>(x / sum);
            } else {
                size_t at = slot * p.heads + first_head + row;
                p.part_out[at * p.head_dim + feature] = x;
                if (feature == 0) {
                    p.part_stats[at * 2] = max;
                    p.part_stats[at * 2 + 1] = sum;
                }
            }
        }
        __syncthreads();  // the next part writes there
    }
}

// Joins the parts of each sequence in order. A block a head (x) and sequence (y).
template <class T> __device__ __forceinline__ void attention_join(const Attention& p) {
    __shared__ float factors[SPLIT], shares[SPLIT], maxima[32];
    unsigned head = blockIdx.x, seq = p.seqs[blockIdx.y], len = p.seq_lens[seq];
    unsigned first = static_cast<int>(len) > p.left ? len - p.left : 0;
    unsigned first_part = first / SPLIT, parts = (len + SPLIT - 1) / SPLIT;
    T* out = static_cast<T*>(p.out) + (static_cast<size_t>(p.cu_seqlens_q[seq]) * p.heads + head) * p.head_dim;
    if (parts - first_part == 1) return;  // written already
    if (parts == 0) {
        // A row of a padded batch.
        for (unsigned i = threadIdx.x; i < p.head_dim; i += blockDim.x) out[i] = from_float<T>(0.0f);
        return;
    }
    size_t from = p.cu_parts[blockIdx.y];
    auto stats = [&](unsigned part, unsigned which) { return p.part_stats[((from + part) * p.heads + head) * 2 + which]; };

    float max = MINUS_INFINITY;
    for (unsigned part = first_part + threadIdx.x; part < parts; part += blockDim.x) max = fmaxf(max, stats(part, 0));
    max = warp_max(max);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = max;
    __syncthreads();
    max = maxima[0];
    for (unsigned w = 1; w < blockDim.x / 32; ++w) max = fmaxf(max, maxima[w]);

    // Each thread has its features; two at most (head_dim <= 256, 128 threads).
    float acc[2] = {0.0f, 0.0f}, sum = 0.0f;
    for (unsigned start = first_part; start < parts; start += SPLIT) {
        unsigned count = min(parts - start, SPLIT);
        __syncthreads();
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
            factors[i] = fast_exp2(stats(start + i, 0) - max);
            shares[i] = factors[i] * stats(start + i, 1);
        }
        __syncthreads();
#pragma unroll 8
        for (unsigned i = 0; i < count; ++i) {
            const float* part = p.part_out + ((from + start + i) * p.heads + head) * p.head_dim;
            sum += shares[i];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                unsigned feature = threadIdx.x + j * blockDim.x;
                if (feature < p.head_dim) acc[j] += factors[i] * part[feature];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        unsigned feature = threadIdx.x + j * blockDim.x;
        if (feature < p.head_dim) out[feature] = from_float<T>(acc[j] / sum);
    }
}

}  // namespace

#define DECODE(name, T, KV, DIM)                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const Attention p) { \
        attention_decode<T, KV, DIM>(p);                                              \
    }                                                                                 \
    LAUNCHABLE(name)
#define DECODE_ALL(T, KV, suffix)                      \
    DECODE(attention_decode_##suffix##_64, T, KV, 64)   \
    DECODE(attention_decode_##suffix##_96, T, KV, 96)   \
    DECODE(attention_decode_##suffix##_128, T, KV, 128) \
    DECODE(attention_decode_##suffix##_256, T, KV, 256)

DECODE_ALL(bf16, bf16, bf16)
DECODE_ALL(f16, f16, f16)
DECODE_ALL(bf16, fp8, bf16_fp8)
DECODE_ALL(f16, fp8, f16_fp8)

#define JOIN(name, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) name(const Attention p) { attention_join<T>(p); } \
    LAUNCHABLE(name)

JOIN(attention_join_bf16, bf16)
JOIN(attention_join_f16, f16)
