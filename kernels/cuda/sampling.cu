// From rows of logits to one token a row; the formula is in src/ops/sampling/reference.rs.
//
// 1. `scan`: the largest logit of each part of each row, and whether all are finite; rows that need more than their
//    largest logit are copied as f32 into the work area.
// 2. `edit`: bans, biases and penalties, applied to the copies.
// 3. `choose`: one block a row.
//
// Nothing is sorted. A weight is a whole number, exp(logit) * 2^42, so sums are exact and do not depend on their order.
// Tokens are counted and weighed in 1024 bins of logits, 1/32 wide; whatever is asked for (the k-th likeliest token, the
// one that completes `top_p`, the drawn one) is the end of a shortest prefix, in order of likelihood, that holds a count or
// a weight: its bin follows from running sums, its logit from halving the range of logits in that bin, and among equal
// logits the token follows from its number in order of ids.
#include "device.cuh"

namespace {

constexpr unsigned THREADS = 1024;
constexpr unsigned BINS = THREADS;  // a thread a bin in running sums
constexpr float BINS_PER_UNIT = 32.0f;
constexpr float SCALE = 4398046511104.0f;  // 2^42; below 2^-46 a weight is nothing
constexpr unsigned LIST = 4096;
constexpr unsigned NONE = 0xffffffffu;
constexpr float LARGEST = 3.402823466e38f;

using u64 = unsigned long long;

// What `choose` needs to know of a row; words as the host writes them.
struct Row {
    unsigned greedy;  // the largest logit wins
    unsigned slot;    // of the row's copy in the work area, or NONE: nothing but the largest of its logits is wanted
    unsigned top_k;   // 0: all
    unsigned first_edit, num_edits;
    float temperature, min_logit, top_p;
    unsigned uniform[2];  // the random number times 2^64, lower half first
};

struct Edit {
    unsigned id, op;
    float value;
};

struct Best {
    float logit;
    unsigned id;
    unsigned bad;
};

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ bool better(float logit, unsigned id, const Best& other) {
    return logit > other.logit || (logit == other.logit && id < other.id);
}

__device__ __forceinline__ Best warp_best(Best best) {
    for (int distance = 16; distance > 0; distance /= 2) {
        float logit = __shfl_xor_sync(FULL_WARP, best.logit, distance);
        unsigned id = __shfl_xor_sync(FULL_WARP, best.id, distance);
        best.bad |= __shfl_xor_sync(FULL_WARP, best.bad, distance);
        if (better(logit, id, best)) {
            best.logit = logit;
            best.id = id;
        }
    }
    return best;
}

// The best of a block, for every thread.
__device__ Best block_best(Best best) {
    __shared__ Best warps[32];
    best = warp_best(best);
    __syncthreads();  // Whoever reads `warps` from a call before is done.
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    unsigned lane = threadIdx.x % 32;
    best = lane < blockDim.x / 32 ? warps[lane] : Best{-INFINITY, NONE, 0};
    return warp_best(best);
}

// The sum over a block, for every thread.
__device__ u64 block_total(u64 x) {
    __shared__ u64 warps[32];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    unsigned lane = threadIdx.x % 32;
    x = lane < blockDim.x / 32 ? warps[lane] : 0;
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

// The sum over this thread and those before it.
__device__ u64 running_total(u64 x) {
    __shared__ u64 warps[32];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        u64 before = __shfl_up_sync(FULL_WARP, x, distance);
        if (lane >= distance) x += before;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = x;
    __syncthreads();
    u64 offset = 0;
    for (unsigned w = 0; w < warp; ++w) offset += warps[w];
    return x + offset;
}

// Larger logits have larger keys.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Of a logit from which the largest was taken off.
__device__ __forceinline__ u64 weight_of(float logit) {
    return logit > -32.0f ? static_cast<u64>(expf(logit) * SCALE) : 0;
}
__device__ __forceinline__ unsigned bin_of(float logit) {
    return static_cast<unsigned>(fminf(-logit * BINS_PER_UNIT, BINS - 1.0f));
}

template <class T>
__device__ void scan(const T* logits, float* work, const Row* rows, Best* parts, unsigned vocab) {
    unsigned row = blockIdx.y, part = blockIdx.x;
    const T* from = logits + static_cast<size_t>(row) * vocab;
    unsigned slot = rows[row].slot;
    float* to = slot == NONE ? nullptr : work + static_cast<size_t>(slot) * vocab;
    Best best = {-INFINITY, NONE, 0};
    // In order of ids, so that the first of equal logits stays.
#pragma unroll 4
    for (unsigned id = part * blockDim.x + threadIdx.x; id < vocab; id += gridDim.x * blockDim.x) {
        float logit = to_float(from[id]);
        if (to != nullptr) to[id] = logit;
        best.bad |= !finite(logit);
        if (logit > best.logit) {
            best.logit = logit;
            best.id = id;
        }
    }
    best = block_best(best);
    if (threadIdx.x == 0) parts[row * gridDim.x + part] = best;
}

// A row of which one token is to be drawn.
struct Draw {
    const float* logits;
    unsigned vocab;
    float max, temperature, min_logit;

    __device__ __forceinline__ float logit(unsigned id) const { return __fdiv_rn(logits[id] - max, temperature); }
    // Banned tokens are minus infinity.
    __device__ __forceinline__ bool is_left(float logit) const { return logit >= min_logit && finite(logit); }
};

// The first id at which the running sum of `weight(id)` in order of ids exceeds `share` (2^64ths) of their total, or with
// `share` null, exceeds `target`.
template <class F> __device__ unsigned pick_in_order(unsigned vocab, F weight, const u64* share, u64 target) {
    __shared__ u64 sums[32];
    __shared__ unsigned picked;
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    // Each warp has its own part of the row, a multiple of 32 tokens.
    unsigned part = (vocab + 32 * warps - 1) / (32 * warps) * 32;
    unsigned first = min(warp * part, vocab), last = min(first + part, vocab);
    u64 sum = 0;
#pragma unroll 8
    for (unsigned id = first + lane; id < last; id += 32) sum += weight(id);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
    __syncthreads();
    if (lane == 0) sums[warp] = sum;
    if (threadIdx.x == 0) picked = 0;
    __syncthreads();
    u64 before = 0, total = 0;
    for (unsigned w = 0; w < warps; ++w) {
        if (w == warp) before = total;
        total += sums[w];
    }
    if (share != nullptr) target = __umul64hi(*share, total);
    if (before <= target && target < before + sum) {
        for (unsigned start = first; start < last; start += 32) {
            unsigned id = start + lane;
            u64 mine = id < last ? weight(id) : 0, running = mine;
            for (unsigned distance = 1; distance < 32; distance *= 2) {
                u64 other = __shfl_up_sync(FULL_WARP, running, distance);
                if (lane >= distance) running += other;
            }
            unsigned reached = __ballot_sync(FULL_WARP, before + running > target);
            if (reached != 0) {
                if (lane == 0) picked = start + __ffs(reached) - 1;
                break;
            }
            before += __shfl_sync(FULL_WARP, running, 31);
        }
    }
    __syncthreads();
    return picked;
}

// The end of a prefix of the tokens in order of likelihood: `ties` tokens of the logit `key`, and all above.
struct Prefix {
    unsigned key, ties;
    u64 count, weight;  // of the whole prefix
};

// Tokens by bin; each thread holds one bin and the running sums up to it.
struct Bins {
    u64 count, weight, running_count, running_weight;
};

__device__ Bins fill_bins(const Draw& draw) {
    // 64-bit additions in shared memory are slow: halves, with the carry added to the upper one.
    __shared__ unsigned counts[BINS], low[BINS], high[BINS];
    counts[threadIdx.x] = low[threadIdx.x] = high[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 8
    for (unsigned id = threadIdx.x; id < draw.vocab; id += THREADS) {
        float logit = draw.logit(id);
        if (!draw.is_left(logit)) continue;
        unsigned bin = bin_of(logit);
        atomicAdd(&counts[bin], 1u);
        u64 weight = weight_of(logit);
        if (weight == 0) continue;
        unsigned lower = static_cast<unsigned>(weight), upper = static_cast<unsigned>(weight >> 32);
        unsigned old = atomicAdd(&low[bin], lower);
        upper += old + lower < old;
        if (upper != 0) atomicAdd(&high[bin], upper);
    }
    __syncthreads();
    Bins bins;
    bins.count = counts[threadIdx.x];
    bins.weight = static_cast<u64>(high[threadIdx.x]) << 32 | low[threadIdx.x];
    bins.running_count = running_total(bins.count);
    bins.running_weight = running_total(bins.weight);
    return bins;
}

// The shortest prefix whose count (or weight, if `weigh`) is at least `need`, which must be from 1 to that of all.
__device__ Prefix shortest_prefix(const Draw& draw, const Bins& bins, bool weigh, u64 need) {
    __shared__ unsigned found, listed, list[LIST];
    __shared__ u64 above_count, above_weight, in_bin;
    u64 running = weigh ? bins.running_weight : bins.running_count, mine = weigh ? bins.weight : bins.count;
    if (threadIdx.x == 0) listed = 0;
    if (running >= need && running - mine < need) {
        found = threadIdx.x;
        above_count = bins.running_count - bins.count;
        above_weight = bins.running_weight - bins.weight;
        in_bin = bins.count;
    }
    __syncthreads();
    unsigned bin = found;
    bool fits = in_bin <= LIST;
    Prefix prefix = {0, 0, above_count, above_weight};
    if (fits) {
#pragma unroll 8
        for (unsigned id = threadIdx.x; id < draw.vocab; id += THREADS) {
            float logit = draw.logit(id);
            if (draw.is_left(logit) && bin_of(logit) == bin) list[atomicAdd(&listed, 1u)] = key_of(logit);
        }
    }
    __syncthreads();
    // Calls `f` with the keys of this bin that are this thread's.
    auto each = [&](auto f) {
        if (fits) {
            for (unsigned i = threadIdx.x; i < listed; i += THREADS) f(list[i]);
        } else {
            for (unsigned id = threadIdx.x; id < draw.vocab; id += THREADS) {
                float logit = draw.logit(id);
                if (draw.is_left(logit) && bin_of(logit) == bin) f(key_of(logit));
            }
        }
    };
    unsigned lowest = NONE, highest = 0;
    each([&](unsigned key) {
        lowest = min(lowest, key);
        highest = max(highest, key);
    });
    for (int distance = 16; distance > 0; distance /= 2) {
        lowest = min(lowest, __shfl_xor_sync(FULL_WARP, lowest, distance));
        highest = max(highest, __shfl_xor_sync(FULL_WARP, highest, distance));
    }
    __shared__ unsigned lows[32], highs[32];
    if (threadIdx.x % 32 == 0) {
        lows[threadIdx.x / 32] = lowest;
        highs[threadIdx.x / 32] = highest;
    }
    __syncthreads();
    for (unsigned w = 0; w < THREADS / 32; ++w) {
        lowest = min(lowest, lows[w]);
        highest = max(highest, highs[w]);
    }
    // Count or weight of the keys from `from` on.
    auto measure = [&](unsigned from, bool weights) {
        u64 sum = 0;
        each([&](unsigned key) {
            if (key >= from) sum += weights ? weight_of(logit_of(key)) : 1;
        });
        return block_total(sum);
    };
    u64 left = need - (weigh ? prefix.weight : prefix.count);
    // The largest key from which on there is enough: it is some token's.
    while (lowest < highest) {
        unsigned middle = lowest + (highest - lowest + 1) / 2;
        if (measure(middle, weigh) >= left) {
            lowest = middle;
        } else {
            highest = middle - 1;
        }
    }
    // No finite logit has the largest key.
    u64 count = measure(lowest + 1, false), weight = measure(lowest + 1, true), one = weight_of(logit_of(lowest));
    u64 ties = weigh ? (left - weight + one - 1) / one : left - count;
    prefix.key = lowest;
    prefix.ties = static_cast<unsigned>(ties);
    prefix.count += count + ties;
    prefix.weight += weight + ties * one;
    __syncthreads();
    return prefix;
}

__device__ unsigned draw_token(const Draw& draw, const Row& row) {
    u64 share = static_cast<u64>(row.uniform[1]) << 32 | row.uniform[0];
    bool all_ranks = row.top_k == 0 || row.top_k >= draw.vocab;
    if (all_ranks && row.top_p >= 1.0f) {
        auto weight = [&](unsigned id) {
            float logit = draw.logit(id);
            return draw.is_left(logit) ? weight_of(logit) : 0;
        };
        return pick_in_order(draw.vocab, weight, &share, 0);
    }
    Bins bins = fill_bins(draw);
    __shared__ u64 all_count, all_weight;
    if (threadIdx.x == BINS - 1) {
        all_count = bins.running_count;
        all_weight = bins.running_weight;
    }
    __syncthreads();
    u64 total = all_weight;
    if (!all_ranks && row.top_k < all_count) total = shortest_prefix(draw, bins, false, row.top_k).weight;
    if (row.top_p < 1.0f) {
        double enough = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
        u64 need = static_cast<u64>(enough);
        need = need < 1 ? 1 : need > total ? total : need;
        total = shortest_prefix(draw, bins, true, need).weight;
    }
    Prefix drawn = shortest_prefix(draw, bins, true, __umul64hi(share, total) + 1);
    auto is_tie = [&](unsigned id) { return static_cast<u64>(key_of(draw.logit(id)) == drawn.key); };
    return pick_in_order(draw.vocab, is_tie, nullptr, drawn.ties - 1);
}

}  // namespace

// grid: parts, rows. `parts`: [rows, parts]
extern "C" __global__ void __launch_bounds__(256) sample_scan_f32(const float* logits, float* work, const Row* rows,
                                                                  Best* parts, unsigned vocab) {
    scan(logits, work, rows, parts, vocab);
}
LAUNCHABLE(sample_scan_f32)

extern "C" __global__ void __launch_bounds__(256) sample_scan_bf16(const bf16* logits, float* work, const Row* rows,
                                                                   Best* parts, unsigned vocab) {
    scan(logits, work, rows, parts, vocab);
}
LAUNCHABLE(sample_scan_bf16)

extern "C" __global__ void __launch_bounds__(256) sample_scan_f16(const f16* logits, float* work, const Row* rows,
                                                                  Best* parts, unsigned vocab) {
    scan(logits, work, rows, parts, vocab);
}
LAUNCHABLE(sample_scan_f16)

// grid: rows. Edits of one token stand side by side and are applied by one thread.
extern "C" __global__ void __launch_bounds__(256) sample_edit(float* work, const Row* rows, const Edit* edits,
                                                              unsigned vocab) {
    Row row = rows[blockIdx.x];
    if (row.slot == NONE) return;
    float* logits = work + static_cast<size_t>(row.slot) * vocab;
    const Edit* first = edits + row.first_edit;
    for (unsigned i = threadIdx.x; i < row.num_edits; i += blockDim.x) {
        unsigned id = first[i].id;
        if (i > 0 && first[i - 1].id == id) continue;
        float logit = logits[id];
        for (unsigned j = i; j < row.num_edits && first[j].id == id; ++j) {
            float value = first[j].value, next;
            switch (first[j].op) {
                case 0: next = -INFINITY; break;
                case 1: next = logit + value; break;
                case 2: next = logit > 0.0f ? __fdiv_rn(logit, value) : logit * value; break;
                default: next = logit - value; break;
            }
            if (first[j].op >= 2) next = finite(logit) ? fminf(fmaxf(next, -LARGEST), LARGEST) : logit;
            logit = next;
        }
        logits[id] = logit;
    }
}
LAUNCHABLE(sample_edit)

// grid: rows. `tokens`: [rows]; NONE where a logit is NaN or infinite.
extern "C" __global__ void __launch_bounds__(1024) sample_choose(const float* work, const Row* rows, const Best* parts,
                                                                 unsigned* tokens, unsigned num_parts,
                                                                 unsigned vocab) {
    Row row = rows[blockIdx.x];
    Best best = {-INFINITY, NONE, 0};
    for (unsigned part = threadIdx.x; part < num_parts; part += THREADS) {
        Best other = parts[blockIdx.x * num_parts + part];
        other.bad |= best.bad;
        if (better(other.logit, other.id, best)) best = other;
        best.bad = other.bad;
    }
    best = block_best(best);
    if (best.bad != 0) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = NONE;
        return;
    }
    const float* logits = work + static_cast<size_t>(row.slot == NONE ? 0 : row.slot) * vocab;
    if (row.num_edits != 0) {
        best = Best{-INFINITY, NONE, 0};
#pragma unroll 8
        for (unsigned id = threadIdx.x; id < vocab; id += THREADS) {
            if (logits[id] > best.logit) best = Best{logits[id], id, 0};
        }
        best = block_best(best);
    }
    unsigned token = best.id;
    if (row.greedy == 0) {
        token = draw_token(Draw{logits, vocab, best.logit, row.temperature, row.min_logit}, row);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}
LAUNCHABLE(sample_choose)
