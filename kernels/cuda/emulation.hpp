// The names of device.cuh on the host: a block's threads are fibres of one thread, switched at barriers and at what a
// warp does together. Blocks run one after another.
//
// What it catches besides wrong arithmetic:
// - a missing barrier: fibres run from barrier to barrier in an order that the launch chooses, and results must not
//   depend on it;
// - threads that do not all reach a barrier, or lanes that do different things where a warp acts together;
// - misaligned wide accesses; copies that are not waited for; dynamic shared memory read before it is written (it begins
//   as NaN).
// It does not show how memory is ordered between blocks, nor speed.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr size_t STACK = 256 << 10;

// What each lane brings to an action of its warp; two, used in turn, so that one barrier an action is enough.
struct Exchange {
    alignas(16) unsigned char lanes[2][32][64];
    const char* actions[2][32];
};

enum class Wait { No, Warp, Block };

struct Fibre {
    ucontext_t start;
    jmp_buf where;
    dim3 thread;
    unsigned number, phase;
    bool started, done;
    Wait wait;
    struct Copy {
        void* to;
        const void* from;
        bool valid;
    };
    std::vector<std::vector<Copy>> copies;
};

struct State {
    std::vector<Fibre> fibres;
    std::vector<Exchange> warps;
    std::vector<unsigned> order;
    std::vector<unsigned char*> stacks;
    std::vector<unsigned char> shared;
    Fibre* current = nullptr;
    jmp_buf scheduler;
    dim3 block, block_dim, grid_dim;
    void (*body)(void*) = nullptr;
    void* body_arg = nullptr;
    char error[512] = {0};
    unsigned live = 0;
};

inline thread_local State state;

inline Fibre& self() { return *state.current; }

[[noreturn]] inline void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    int used = snprintf(state.error, sizeof state.error, "block (%u, %u, %u), thread (%u, %u, %u): ", state.block.x,
                        state.block.y, state.block.z, self().thread.x, self().thread.y, self().thread.z);
    vsnprintf(state.error + used, sizeof state.error - used, format, args);
    va_end(args);
    _longjmp(state.scheduler, 2);
}

inline void pause(Wait wait) {
    self().wait = wait;
    if (_setjmp(self().where) == 0) _longjmp(state.scheduler, 1);
}

inline void enter() {
    state.body(state.body_arg);
    for (auto& group : self().copies)
        if (!group.empty()) fail("ends with copies that it has not waited for");
    self().done = true;
    _longjmp(state.scheduler, 1);
}

// Runs a fibre until it pauses or ends; false after an error.
inline bool resume(Fibre& fibre) {
    state.current = &fibre;
    int how = _setjmp(state.scheduler);
    if (how == 0) {
        if (fibre.started) _longjmp(fibre.where, 1);
        fibre.started = true;
        setcontext(&fibre.start);
    }
    return how != 2;
}

inline bool run_block(unsigned seed) {
    State& s = state;
    unsigned threads = s.block_dim.x * s.block_dim.y * s.block_dim.z;
    // Forwards, backwards, or shuffled.
    s.order.resize(threads);
    for (unsigned i = 0; i < threads; ++i) s.order[i] = seed == 1 ? threads - 1 - i : i;
    unsigned random = seed * 2654435761u + s.block.x * 97 + s.block.y * 31 + 1;
    for (unsigned i = threads; seed > 1 && i > 1; --i) {
        random = random * 1664525u + 1013904223u;
        std::swap(s.order[i - 1], s.order[(random >> 8) % i]);
    }
    std::fill(s.shared.begin(), s.shared.end(), 0xff);
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& f = s.fibres[i];
        f.number = i;
        f.phase = 0;
        f.thread = {i % s.block_dim.x, i / s.block_dim.x % s.block_dim.y, i / (s.block_dim.x * s.block_dim.y)};
        f.started = f.done = false;
        f.wait = Wait::No;
        f.copies.assign(1, {});
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = s.stacks[i];
        f.start.uc_stack.ss_size = STACK;
        f.start.uc_link = nullptr;
        makecontext(&f.start, enter, 0);
    }
    for (unsigned done = 0; done < threads;) {
        bool moved = false;
        for (unsigned i : s.order) {
            Fibre& f = s.fibres[i];
            if (f.done || f.wait != Wait::No) continue;
            moved = true;
            if (!resume(f)) return false;
            done += f.done;
        }
        for (unsigned warp = 0; warp * 32 < threads; ++warp) {
            auto first = s.fibres.begin() + warp * 32, last = s.fibres.begin() + std::min(threads, warp * 32 + 32);
            if (std::all_of(first, last, [](Fibre& f) { return !f.done && f.wait == Wait::Warp; })) {
                std::for_each(first, last, [](Fibre& f) { f.wait = Wait::No; });
                moved = true;
            }
        }
        auto last = s.fibres.begin() + threads;
        if (std::all_of(s.fibres.begin(), last, [](Fibre& f) { return !f.done && f.wait == Wait::Block; })) {
            std::for_each(s.fibres.begin(), last, [](Fibre& f) { f.wait = Wait::No; });
            moved = true;
        }
        if (!moved && done < threads) {
            auto stuck = std::find_if(s.fibres.begin(), last, [](Fibre& f) { return !f.done; });
            snprintf(s.error, sizeof s.error, "block (%u, %u, %u): thread %u waits at a barrier of its %s for ever",
                     s.block.x, s.block.y, s.block.z, stuck->number, stuck->wait == Wait::Warp ? "warp" : "block");
            return false;
        }
    }
    return true;
}

struct Launch {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    // 0: threads in order; 1: backwards; others: shuffled.
    unsigned seed;
};

// Null, or what went wrong.
inline const char* launch(const Launch& l, void (*body)(void*), void* arg) {
    State& s = state;
    s.body = body;
    s.body_arg = arg;
    s.grid_dim = {l.grid[0], l.grid[1], l.grid[2]};
    s.block_dim = {l.block[0], l.block[1], l.block[2]};
    size_t threads = size_t(l.block[0]) * l.block[1] * l.block[2];
    s.error[0] = 0;
    if (threads == 0 || threads > 1024 || l.shared_bytes > (227u << 10)) {
        snprintf(s.error, sizeof s.error, "%zu threads and %u bytes of shared memory", threads, l.shared_bytes);
        return s.error;
    }
    s.fibres.resize(std::max(s.fibres.size(), threads));
    s.warps.resize((threads + 31) / 32);
    s.shared.resize(l.shared_bytes + 16);
    while (s.stacks.size() < threads) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            snprintf(s.error, sizeof s.error, "no memory for stacks");
            return s.error;
        }
        s.stacks.push_back(static_cast<unsigned char*>(stack));
    }
    for (unsigned z = 0; z < l.grid[2]; ++z)
        for (unsigned y = 0; y < l.grid[1]; ++y)
            for (unsigned x = 0; x < l.grid[0]; ++x) {
                s.block = {x, y, z};
                if (!run_block(l.seed)) return s.error;
            }
    return nullptr;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

inline unsigned char* dynamic_shared() {
    auto at = reinterpret_cast<uintptr_t>(state.shared.data());
    return reinterpret_cast<unsigned char*>((at + 15) & ~uintptr_t(15));
}

inline unsigned lane() { return self().number % 32; }

// What all lanes gave.
template <class T> struct Given {
    const unsigned char (*lanes)[64];
    const T& operator[](unsigned lane) const { return *reinterpret_cast<const T*>(lanes[lane]); }
};

// Gives `mine` to the warp. What comes back holds until this lane's next exchange but one.
template <class T> Given<T> exchange(const char* action, const T& mine) {
    static_assert(sizeof(T) <= 64, "an exchange holds 64 bytes a lane");
    Exchange& warp = state.warps[self().number / 32];
    unsigned phase = self().phase++ % 2;
    memcpy(warp.lanes[phase][lane()], &mine, sizeof(T));
    warp.actions[phase][lane()] = action;
    pause(Wait::Warp);
    unsigned threads = state.block_dim.x * state.block_dim.y * state.block_dim.z;
    unsigned lanes = std::min(32u, threads - self().number / 32 * 32);
    for (unsigned l = 0; l < lanes; ++l) {
        const char* other = warp.actions[phase][l];
        if (other != action && strcmp(other, action) != 0) fail("%s, while lane %u does %s", action, l, other);
    }
    return {warp.lanes[phase]};
}

inline void whole_warp(unsigned mask) {
    if (mask != 0xffffffffu) fail("acts with the mask %08x; only whole warps are emulated", mask);
}

}  // namespace emulation

#define threadIdx (emulation::self().thread)
#define blockIdx (emulation::state.block)
#define blockDim (emulation::state.block_dim)
#define gridDim (emulation::state.grid_dim)
#define warpSize 32
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared()
#define LAUNCHABLE(name)                                                                                    \
    extern "C" const char* emulated_##name(const emulation::Launch* launch, void** args) {                  \
        return emulation::launch(                                                                           \
            *launch, [](void* args) { emulation::call(name, static_cast<void**>(args)); }, args);          \
    }

inline void __syncthreads() { emulation::pause(emulation::Wait::Block); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::whole_warp(mask);
    emulation::exchange("syncwarp", mask);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    emulation::whole_warp(mask);
    unsigned lane = emulation::lane();
    return emulation::exchange("shfl", x)[lane / width * width + from % width];
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int distance, int width = 32) {
    emulation::whole_warp(mask);
    unsigned lane = emulation::lane(), from = lane ^ distance;
    return emulation::exchange("shfl_xor", x)[from / width <= lane / width ? from : lane];
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = 32) {
    emulation::whole_warp(mask);
    unsigned lane = emulation::lane();
    return emulation::exchange("shfl_down", x)[lane % width + distance < unsigned(width) ? lane + distance : lane];
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = 32) {
    emulation::whole_warp(mask);
    unsigned lane = emulation::lane();
    return emulation::exchange("shfl_up", x)[lane % width >= distance ? lane - distance : lane];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emulation::whole_warp(mask);
    int vote = predicate != 0;
    auto votes = emulation::exchange("ballot", vote);
    unsigned ballot = 0;
    for (unsigned l = 0; l < 32; ++l) ballot |= unsigned(votes[l] != 0) << l;
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __syncthreads_or(int predicate) {
    static thread_local int any;
    static thread_local unsigned arrived;
    if (arrived++ == 0) any = 0;
    any |= predicate != 0;
    __syncthreads();
    int result = any;
    arrived = 0;
    __syncthreads();
    return result;
}

template <class T> T atomicAdd(T* at, T x) {
    T old = *at;
    *at = old + x;
    return old;
}
template <class T> T atomicMax(T* at, T x) {
    T old = *at;
    *at = std::max(old, x);
    return old;
}
template <class T> T atomicMin(T* at, T x) {
    T old = *at;
    *at = std::min(old, x);
    return old;
}
template <class T> T atomicExch(T* at, T x) {
    T old = *at;
    *at = x;
    return old;
}
template <class T> T atomicCAS(T* at, T expected, T x) {
    T old = *at;
    if (old == expected) *at = x;
    return old;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
    unsigned old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}

template <class T> T __ldg(const T* at) { return *at; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float fast_exp2(float x) { return exp2f(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class To, class From> To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulation_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulation_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation_bits<float>(x); }
inline float __int_as_float(int x) { return emulation_bits<float>(x); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
    return c;
}
inline uint32_t byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t both = uint64_t(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) { return byte_perm(low, high, selector); }

// Number formats, bit by bit.

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct fp8 {
    uint8_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emulation_bits<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? ldexpf(float(mantissa), -24)
                                      : ldexpf(float(mantissa + 1024), exponent - 25);
    return x.bits >> 15 ? -magnitude : magnitude;
}
inline float to_float(fp8 x) {
    int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
    float magnitude = (x.bits & 127) == 127 ? NAN
                      : exponent == 0       ? ldexpf(float(mantissa), -9)
                                            : ldexpf(float(mantissa + 8), exponent - 10);
    return x.bits >> 7 ? -magnitude : magnitude;
}

namespace emulation {
// |x| as a number of `mantissa` bits with exponents from `min_exponent`, rounded to nearest, ties to even: its bits
// without the sign, where the next larger number has the next larger bits, so that rounding up may carry.
inline uint32_t rounded(float x, int mantissa, int min_exponent) {
    int exponent;
    float fraction = frexpf(fabsf(x), &exponent);  // [0.5, 1)
    if (fraction == 0) return 0;
    int unit = std::max(exponent - 1, min_exponent) - mantissa;  // of the last place
    float units = ldexpf(fraction, exponent - unit);             // exact
    float whole = floorf(units), rest = units - whole;
    uint32_t count = uint32_t(whole) + (rest > 0.5f || (rest == 0.5f && uint32_t(whole) % 2 == 1));
    return count + (uint32_t(unit + mantissa - min_exponent) << mantissa);
}
}  // namespace emulation

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    uint32_t bits = emulation_bits<uint32_t>(x);
    if (x != x) return bf16{0x7fff};
    return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
    uint16_t sign = uint16_t(emulation_bits<uint32_t>(x) >> 16 & 0x8000);
    if (x != x) return f16{0x7fff};
    if (fabsf(x) >= 65520.0f) return f16{uint16_t(sign | 0x7c00)};
    return f16{uint16_t(sign | emulation::rounded(x, 10, -14))};
}
template <> inline fp8 from_float<fp8>(float x) {
    uint8_t sign = uint8_t(emulation_bits<uint32_t>(x) >> 24 & 0x80);
    if (x != x) return fp8{0x7f};
    if (fabsf(x) >= 448.0f) return fp8{uint8_t(sign | 0x7e)};
    return fp8{uint8_t(sign | emulation::rounded(x, 3, -6))};
}

template <class T> uint32_t pack2(float low, float high) {
    return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}
inline uint32_t fp8x2_to_f16x2(uint32_t pair) {
    return pack2<f16>(to_float(fp8{uint8_t(pair)}), to_float(fp8{uint8_t(pair >> 8)}));
}

template <class P> void check_aligned(const P* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) emulation::fail("an access of %zu bytes is not aligned", bytes);
}

template <class T> uint32_t sub2(uint32_t a, uint32_t b) {
    auto part = [&](int shift) { return to_float(T{uint16_t(a >> shift)}) - to_float(T{uint16_t(b >> shift)}); };
    return pack2<T>(part(0), part(16));
}
template <class T> uint32_t mul2(uint32_t a, uint32_t b) {
    auto part = [&](int shift) { return to_float(T{uint16_t(a >> shift)}) * to_float(T{uint16_t(b >> shift)}); };
    return pack2<T>(part(0), part(16));
}
inline float f16_bits_to_float(uint32_t bits) { return to_float(f16{uint16_t(bits)}); }
inline uint4 load_stream(const void* from) {
    check_aligned(static_cast<const unsigned char*>(from), 16);
    uint4 x;
    memcpy(&x, from, 16);
    return x;
}

// Tensor cores.

template <class T> void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragment {
        float a[4][2], b[2][2];
    } mine;
    uint32_t b[2] = {b0, b1};
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) mine.a[i][half] = to_float(T{uint16_t(a[i] >> 16 * half)});
        for (int i = 0; i < 2; ++i) mine.b[i][half] = to_float(T{uint16_t(b[i] >> 16 * half)});
    }
    auto all = emulation::exchange("mma_16816", mine);
    unsigned group = emulation::lane() / 4, in_group = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        unsigned column = in_group * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            unsigned holder = k % 8 / 2;
            d[i] += all[group * 4 + holder].a[i / 2 + k / 8 * 2][k % 2] * all[column * 4 + holder].b[k / 8][k % 2];
        }
    }
}

inline void mma_16832_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragment {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto all = emulation::exchange("mma_16832_s8", mine);
    unsigned group = emulation::lane() / 4, in_group = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        unsigned column = in_group * 2 + i % 2;
        for (int holder = 0; holder < 4; ++holder)
            for (int half = 0; half < 2; ++half)
                d[i] = __dp4a(int(all[group * 4 + holder].a[i / 2 + half * 2]), int(all[column * 4 + holder].b[half]), d[i]);
    }
}

inline void mma_16832_fp8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragment {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto all = emulation::exchange("mma_16832_fp8", mine);
    unsigned group = emulation::lane() / 4, in_group = emulation::lane() % 4;
    auto number = [](uint32_t word, int byte) { return to_float(fp8{uint8_t(word >> 8 * byte)}); };
    for (int i = 0; i < 4; ++i) {
        unsigned column = in_group * 2 + i % 2;
        for (int half = 0; half < 2; ++half)
            for (int holder = 0; holder < 4; ++holder)
                for (int byte = 0; byte < 4; ++byte)
                    d[i] += number(all[group * 4 + holder].a[i / 2 + half * 2], byte) *
                            number(all[column * 4 + holder].b[half], byte);
    }
}

inline void emulation_ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
    check_aligned(static_cast<const unsigned char*>(row), 16);
    auto rows = emulation::exchange("ldmatrix", row);
    unsigned group = emulation::lane() / 4, pair = emulation::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        uint16_t two[2];
        for (unsigned half = 0; half < 2; ++half) {
            unsigned from = transposed ? pair + half : group, column = transposed ? group : pair + half;
            memcpy(&two[half], static_cast<const unsigned char*>(rows[i * 8 + from]) + column * 2, 2);
        }
        r[i] = uint32_t(two[0]) | uint32_t(two[1]) << 16;
    }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulation_ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulation_ldmatrix(r, row, true); }

// Copies happen when they are waited for: as late as they may.

inline void cp_async16(void* shared, const void* global, bool valid) {
    check_aligned(static_cast<unsigned char*>(shared), 16);
    if (valid) check_aligned(static_cast<const unsigned char*>(global), 16);
    emulation::self().copies.back().push_back({shared, global, valid});
}
inline void cp_async_commit() { emulation::self().copies.emplace_back(); }
template <int PENDING> void cp_async_wait() {
    auto& copies = emulation::self().copies;  // The last group is open.
    while (copies.size() > PENDING + 1) {
        for (auto& copy : copies.front()) {
            if (copy.valid) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
        copies.erase(copies.begin());
    }
}
