// Rows of coded matrices as plain numbers: embeddings, and panels of weights for a library's matrix product.
#include "linear.cuh"

#define UNPACK(name, type, halves, fp8)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        name(const unsigned char* codes, const uint16_t* scales, const uint16_t* mins, const float* row_scales,      \
             unsigned rows, unsigned cols, const unsigned* ids, unsigned first_row, float unit, type* out) {         \
        unpack_rows<type, halves, fp8>(Matrix{codes, scales, mins, row_scales, rows, cols, false}, ids, first_row,   \
                                       unit, out);                                                                   \
    }                                                                                                                \
    LAUNCHABLE(name)

#define UNPACK_TO(type)                           \
    UNPACK(unpack_bytes_##type, type, false, false) \
    UNPACK(unpack_halves_##type, type, true, false) \
    UNPACK(unpack_fp8_##type, type, false, true)

UNPACK_TO(float)
UNPACK_TO(bf16)
UNPACK_TO(f16)
