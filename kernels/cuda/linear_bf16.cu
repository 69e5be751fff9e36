// Linear layers on bf16 activations.
#include "linear.cuh"

#define TYPE bf16
#include "linear_kernels.inc"
