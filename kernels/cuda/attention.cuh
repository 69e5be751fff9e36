// What both attention kernels share: their arguments, where keys lie, and fragments of rows of scores.
//
// A group is the query heads that share one key head; its rows are (query, head of the group) pairs, query after query,
// so that keys are read once for a group. Sums over features and over keys run in an order that depends on the position
// of a key in its sequence alone.
#pragma once

#include "device.cuh"

// Mirrored by `AttentionArgs` in kernels/src/cuda/attention.rs.
struct Attention {
    // [tokens, heads, head_dim], `q_stride` elements from token to token.
    const void* q;
    // [slots, kv_heads, head_dim], strides in elements from slot to slot; 16-byte aligned, as every head is.
    const void *k, *v;
    // [tokens, heads, head_dim], contiguous.
    void* out;
    // Block ids of the sequences, cut by `cu_blocks`; null: the keys of sequence s are rows `cu_seqlens_q[s]` and on.
    const unsigned *block_tables, *cu_blocks;
    const unsigned *seq_lens, *cu_seqlens_q;
    // Sequences that this launch computes.
    const unsigned* seqs;
    // Decode only. Where the parts of each of `seqs` begin, and the parts: [parts, heads, head_dim] and [parts, heads, 2].
    const unsigned* cu_parts;
    float *part_out, *part_stats;
    // Kernels named `attention_biased_` only: added to scores. [heads, bias_stride]; a query at i and a key at j of a
    // sequence have number i - j + bias_reach - 1.
    const float* bias;
    size_t q_stride, k_stride, v_stride;
    unsigned heads, kv_heads, head_dim, block_size, num_seqs;
    // A query sees keys from `left` - 1 before it to `right` after it.
    int left, right;
    float scale, softcap;  // `softcap` 0: none
    unsigned bias_stride, bias_reach;
};

namespace {

constexpr float LOG2_E = 1.44269504089f;
constexpr float MINUS_INFINITY = -INFINITY;

// The type of products: the cache's, or f16 where the cache is fp8 (which it holds exactly).
template <class T, class KV> struct Products {
    using type = T;
};
template <class T> struct Products<T, fp8> {
    using type = f16;
};

// Eight numbers of a cache as four registers of pairs.
template <class KV> __device__ __forceinline__ Pack<uint32_t, 4> load_pairs(const KV* from) {
    return load_pack<4>(reinterpret_cast<const uint32_t*>(from));
}
template <> __device__ __forceinline__ Pack<uint32_t, 4> load_pairs<fp8>(const fp8* from) {
    Pack<uint32_t, 2> bytes = load_pack<2>(reinterpret_cast<const uint32_t*>(from));
    return {{fp8x2_to_f16x2(bytes.v[0] & 0xffff), fp8x2_to_f16x2(bytes.v[0] >> 16),
             fp8x2_to_f16x2(bytes.v[1] & 0xffff), fp8x2_to_f16x2(bytes.v[1] >> 16)}};
}

// Eight numbers of a query. f16 has fewer exponents than bf16: what is out of its range becomes its largest number.
template <class T, class C> __device__ __forceinline__ Pack<uint32_t, 4> query_pairs(const T* from) {
    return load_pack<4>(reinterpret_cast<const uint32_t*>(from));
}
template <> __device__ __forceinline__ Pack<uint32_t, 4> query_pairs<bf16, f16>(const bf16* from) {
    Pack<uint32_t, 4> pairs;
    Pack<bf16, 8> x = load_pack<8>(from);
    constexpr float LARGEST = 65504.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low = fminf(fmaxf(to_float(x.v[2 * i]), -LARGEST), LARGEST);
        float high = fminf(fmaxf(to_float(x.v[2 * i + 1]), -LARGEST), LARGEST);
        pairs.v[i] = pack2<f16>(low, high);
    }
    return pairs;
}

// Row of the cache that holds key `token` of `seq`.
__device__ __forceinline__ size_t key_row(const Attention& p, unsigned seq, unsigned token) {
    if (p.block_tables == nullptr) return static_cast<size_t>(p.cu_seqlens_q[seq]) + token;
    unsigned block = p.block_tables[p.cu_blocks[seq] + token / p.block_size];
    return static_cast<size_t>(block) * p.block_size + token % p.block_size;
}

// A product as a score in powers of two.
__device__ __forceinline__ float score(const Attention& p, float product, float bias = 0.0f) {
    float s = product * p.scale + bias;
    if (p.softcap > 0.0f) s = p.softcap * tanhf(s / p.softcap);
    return s * LOG2_E;
}

// Over the four lanes that share a row of a fragment.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// The online softmax of two rows (lane / 4 and 8 more) of a fragment.
struct RowStats {
    float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
    // This lane's share.
    float sum[2] = {0.0f, 0.0f};
};

// Turns the scores of a tile of `TILES` x 8 keys into weights and the stats into those with this tile; `factor` is what
// earlier sums are multiplied by.
template <int TILES>
__device__ __forceinline__ void soften(float (&s)[TILES][4], RowStats& stats, float (&factor)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float max = MINUS_INFINITY;
#pragma unroll
        for (int t = 0; t < TILES; ++t) max = fmaxf(max, fmaxf(s[t][2 * row], s[t][2 * row + 1]));
        max = fmaxf(stats.max[row], quad_max(max));
        // A row that has seen no key yet.
        float base = max == MINUS_INFINITY ? 0.0f : max;
        factor[row] = fast_exp2(stats.max[row] - base);
        stats.max[row] = max;
        float sum = 0.0f;
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                s[t][2 * row + i] = fast_exp2(s[t][2 * row + i] - base);
                sum += s[t][2 * row + i];
            }
        }
        stats.sum[row] = stats.sum[row] * factor[row] + sum;
    }
}

}  // namespace
