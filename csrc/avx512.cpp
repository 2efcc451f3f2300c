#define LOWBIT_TABLE avx512_kernels
#define LOWBIT_SIMD "simd_avx512.h"
#include "kernels.h"
