// Kernels that only the tests run: conversions of number formats, and mistakes that the emulation must find.
#include "device.cuh"

namespace {
template <class T> __device__ __forceinline__ void convert(const float* from, T* to, unsigned count) {
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) to[i] = from_float<T>(from[i]);
}
}  // namespace

#define CONVERT(suffix, T)                                                                           \
    extern "C" __global__ void convert_##suffix(const float* from, T* to, unsigned count) {         \
        convert<T>(from, to, count);                                                                 \
    }                                                                                                \
    LAUNCHABLE(convert_##suffix)

CONVERT(bf16, bf16)
CONVERT(f16, f16)
CONVERT(fp8, fp8)

#ifdef INGLE_EMULATE
// Two warps; `mistake` 0 is right.
extern "C" __global__ void planted_bugs(float* out, unsigned mistake) {
    DYNAMIC_SHARED(shared);
    float* numbers = reinterpret_cast<float*>(shared);
    unsigned i = threadIdx.x;
    numbers[i] = static_cast<float>(i);
    if (mistake != 1) __syncthreads();
    out[i] = numbers[63 - i];
    if (mistake == 2 && i == 5) return;
    __syncthreads();
    if (mistake == 3) load_pack<4>(out + 1);
    if (mistake == 4) cp_async16(shared, out, true);
    if (mistake == 5) {
        if (i % 2) __syncwarp();
        else warp_sum(0.0f);
    }
}
LAUNCHABLE(planted_bugs)
#endif
