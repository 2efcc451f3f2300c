#define LOWBIT_TABLE scalar_kernels
#define LOWBIT_SIMD "simd_scalar.h"
#include "kernels.h"
