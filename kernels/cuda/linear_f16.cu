// Linear layers on f16 activations.
#include "linear.cuh"

#define TYPE f16
#include "linear_kernels.inc"
