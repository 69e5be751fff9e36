// Attention of sequences that bring several queries: chunks of prompts through their block tables, or whole sequences
// without a cache, both ways or causal.
//
// A block of four warps computes 64 rows of one group, 16 a warp, and goes over the keys in tiles that begin at fixed
// positions. Tiles are copied into shared memory while the one before is computed with. A bias by distance is read where
// it lies: 127 numbers serve a tile, which the first-level cache holds.
#include "attention.cuh"

namespace {

constexpr unsigned WARPS = 4;
constexpr unsigned ROWS = WARPS * 16;

template <class T, class KV, int DIM, int KEYS> struct Tiles {
    using C = typename Products<T, KV>::type;
    static constexpr int STRIDE = DIM + 8;  // rows 16 bytes apart in their banks
    uint16_t queries[ROWS * STRIDE];
    uint16_t keys[2][KEYS * STRIDE];
    uint16_t values[2][KEYS * STRIDE];
};

// Starts to copy eight numbers, or copies them where they must be widened.
template <class KV> __device__ __forceinline__ void stage(uint16_t* to, const KV* from, bool valid) {
    cp_async16(to, from, valid);
}
template <> __device__ __forceinline__ void stage<fp8>(uint16_t* to, const fp8* from, bool valid) {
    Pack<uint32_t, 4> x = {{0, 0, 0, 0}};
    if (valid) x = load_pairs<fp8>(from);
    store_pack<4>(reinterpret_cast<uint32_t*>(to), x);
}

template <class T, class KV, int DIM, int KEYS, bool BIASED>
__device__ __forceinline__ void attention_prefill(const Attention& p) {
    using C = typename Products<T, KV>::type;
    using Shared = Tiles<T, KV, DIM, KEYS>;
    constexpr int STRIDE = Shared::STRIDE, EIGHTS = DIM / 8;
    DYNAMIC_SHARED(bytes);
    Shared& shared = *reinterpret_cast<Shared*>(bytes);

    unsigned seq = p.seqs[blockIdx.z], len = p.seq_lens[seq];
    unsigned first_query = p.cu_seqlens_q[seq], num_queries = p.cu_seqlens_q[seq + 1] - first_query;
    unsigned group_size = p.heads / p.kv_heads, kv_head = blockIdx.y;
    unsigned num_rows = num_queries * group_size, first_row = blockIdx.x * ROWS;
    if (first_row >= num_rows) return;
    unsigned last_row = min(first_row + ROWS, num_rows) - 1;

    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    auto element = [&](unsigned row) {
        unsigned query = row / group_size, head = kv_head * group_size + row % group_size;
        return static_cast<size_t>(first_query + query) * p.heads * p.head_dim + head * p.head_dim;
    };
    for (unsigned i = threadIdx.x; i < ROWS * EIGHTS; i += WARPS * 32) {
        unsigned row = first_row + i / EIGHTS, feature = i % EIGHTS * 8;
        Pack<uint32_t, 4> x = {{0, 0, 0, 0}};
        if (row <= last_row && feature < p.head_dim) {
            const T* from = static_cast<const T*>(p.q) + (first_query + row / group_size) * p.q_stride;
            x = query_pairs<T, C>(from + (kv_head * group_size + row % group_size) * p.head_dim + feature);
        }
        store_pack<4>(reinterpret_cast<uint32_t*>(shared.queries + i / EIGHTS * STRIDE + feature), x);
    }

    // Positions of the rows, and the keys that any of them sees: [begin, end).
    int before = static_cast<int>(len - num_queries);
    auto position = [&](unsigned row) { return before + static_cast<int>(min(row, last_row) / group_size); };
    auto clamp = [&](long long key) { return static_cast<int>(key < 0 ? 0 : key > len ? len : key); };
    int begin = clamp(static_cast<long long>(position(first_row)) - p.left + 1);
    int end = clamp(static_cast<long long>(position(last_row)) + p.right + 1);
    int first_tile = begin / KEYS, tiles = (end + KEYS - 1) / KEYS;

    const KV* k = static_cast<const KV*>(p.k) + kv_head * p.head_dim;
    const KV* v = static_cast<const KV*>(p.v) + kv_head * p.head_dim;
    auto copy_tile = [&](int tile) {
        for (unsigned i = threadIdx.x; i < KEYS * EIGHTS; i += WARPS * 32) {
            unsigned row = i / EIGHTS, feature = i % EIGHTS * 8, key = tile * KEYS + row;
            bool valid = key >= static_cast<unsigned>(begin) && key < static_cast<unsigned>(end) && feature < p.head_dim;
            size_t at = valid ? key_row(p, seq, key) : 0, place = row * STRIDE + feature;
            feature = valid ? feature : 0;
            stage<KV>(shared.keys[tile % 2] + place, k + at * p.k_stride + feature, valid);
            stage<KV>(shared.values[tile % 2] + place, v + at * p.v_stride + feature, valid);
        }
    };

    float acc[DIM / 8][4];
#pragma unroll
    for (int t = 0; t < DIM / 8; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0.0f;
    RowStats stats;
    unsigned my_row = first_row + warp * 16 + g;
    int positions[2] = {position(my_row), position(my_row + 8)};
    int lowest = position(first_row + warp * 16), highest = position(first_row + warp * 16 + 15);
    // Of each of this lane's rows, the bias of a key at 0; that of others lies before it.
    const float* biases[2] = {nullptr, nullptr};
    if (BIASED) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            size_t head = kv_head * group_size + min(my_row + 8 * half, last_row) % group_size;
            biases[half] = p.bias + head * p.bias_stride + p.bias_reach - 1 + positions[half];
        }
    }
    // Warps without rows, of short sequences, only help to copy.
    bool busy = first_row + warp * 16 <= last_row;

    if (first_tile < tiles) copy_tile(first_tile);
    cp_async_commit();
    for (int tile = first_tile; tile < tiles; ++tile) {
        if (tile + 1 < tiles) copy_tile(tile + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const uint16_t *keys = shared.keys[tile % 2], *values = shared.values[tile % 2];

        if (busy) {
            float s[KEYS / 8][4];
#pragma unroll
            for (int t = 0; t < KEYS / 8; ++t) s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0.0f;
#pragma unroll
            for (int d = 0; d < DIM; d += 16) {
                uint32_t a[4];
                ldmatrix_x4(a, shared.queries + (warp * 16 + lane % 16) * STRIDE + d + lane / 16 * 8);
#pragma unroll
                for (int t = 0; t < KEYS / 8; t += 2) {
                    uint32_t b[4];
                    ldmatrix_x4(b, keys + (t * 8 + lane / 16 * 8 + lane % 8) * STRIDE + d + lane / 8 % 2 * 8);
                    mma_16816<C>(s[t], a, b[0], b[1]);
                    mma_16816<C>(s[t + 1], a, b[2], b[3]);
                }
            }

            int start = tile * KEYS;
            bool all_seen = start >= begin && start + KEYS <= end &&
                            static_cast<long long>(start) + KEYS - 1 <= static_cast<long long>(lowest) + p.right &&
                            static_cast<long long>(start) > static_cast<long long>(highest) - p.left;
#pragma unroll
            for (int t = 0; t < KEYS / 8; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int key = start + t * 8 + 2 * static_cast<int>(c) + i % 2, distance = key - positions[i / 2];
                    bool seen = all_seen || (key < end && distance <= p.right && -distance < p.left);
                    float bias = BIASED && seen ? biases[i / 2][-key] : 0.0f;
                    s[t][i] = seen ? score(p, s[t][i], bias) : MINUS_INFINITY;
                }
            }
            float factor[2];
            soften<KEYS / 8>(s, stats, factor);
#pragma unroll
            for (int t = 0; t < DIM / 8; ++t) {
                acc[t][0] *= factor[0];
                acc[t][1] *= factor[0];
                acc[t][2] *= factor[1];
                acc[t][3] *= factor[1];
            }
#pragma unroll
            for (int t = 0; t < KEYS / 8; t += 2) {
                uint32_t weights[4] = {pack2<C>(s[t][0], s[t][1]), pack2<C>(s[t][2], s[t][3]),
                                       pack2<C>(s[t + 1][0], s[t + 1][1]), pack2<C>(s[t + 1][2], s[t + 1][3])};
#pragma unroll
                for (int d = 0; d < DIM; d += 16) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, values + (t * 8 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + d + lane / 16 * 8);
                    mma_16816<C>(acc[d / 8], weights, b[0], b[1]);
                    mma_16816<C>(acc[d / 8 + 1], weights, b[2], b[3]);
                }
            }
        }
        __syncthreads();  // the tile after the next goes where this one lies
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = quad_sum(stats.sum[half]);
        unsigned row = my_row + 8 * half;
        if (row > last_row) continue;
        T* out = static_cast<T*>(p.out) + element(row);
        float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int t = 0; t < DIM / 8; ++t) {
            unsigned feature = t * 8 + 2 * c;
            if (feature >= p.head_dim) continue;
            Pack<T, 2> x = {{from_float<T>(acc[t][2 * half] * inverse), from_float<T>(acc[t][2 * half + 1] * inverse)}};
            store_pack<2>(out + feature, x);
        }
    }
}

}  // namespace

#define PREFILL(name, T, KV, DIM, KEYS, BIASED)                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const Attention p) { \
        attention_prefill<T, KV, DIM, KEYS, BIASED>(p);                               \
    }                                                                                 \
    LAUNCHABLE(name)
// Tiles of 64 keys; 32 where heads are so wide that both tiles would not fit into the memory of a small GPU.
#define PREFILL_ALL(T, KV, suffix)                                  \
    PREFILL(attention_prefill_##suffix##_64, T, KV, 64, 64, false)   \
    PREFILL(attention_prefill_##suffix##_96, T, KV, 96, 64, false)   \
    PREFILL(attention_prefill_##suffix##_128, T, KV, 128, 64, false) \
    PREFILL(attention_prefill_##suffix##_256, T, KV, 256, 32, false)
// Of encoders: narrow heads, and a bias by distance.
#define ENCODER_ALL(T, suffix)                                    \
    PREFILL(attention_prefill_##suffix##_32, T, T, 32, 64, false) \
    PREFILL(attention_biased_##suffix##_32, T, T, 32, 64, true)   \
    PREFILL(attention_biased_##suffix##_64, T, T, 64, 64, true)   \
    PREFILL(attention_biased_##suffix##_96, T, T, 96, 64, true)   \
    PREFILL(attention_biased_##suffix##_128, T, T, 128, 64, true)

PREFILL_ALL(bf16, bf16, bf16)
PREFILL_ALL(f16, f16, f16)
PREFILL_ALL(bf16, fp8, bf16_fp8)
PREFILL_ALL(f16, fp8, f16_fp8)
ENCODER_ALL(bf16, bf16)
ENCODER_ALL(f16, f16)
