// Activations of an MLP, by the numbers that the host gives them.
#pragma once

#include "device.cuh"

constexpr unsigned SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3;

__device__ __forceinline__ float activate(float x, unsigned activation) {
    switch (activation) {
        case SILU: return x / (1.0f + expf(-x));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
        default: return fmaxf(x, 0.0f);
    }
}
