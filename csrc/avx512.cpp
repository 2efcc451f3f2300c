#define LOWBIT_TABLE avx512_kernels
#define LOWBIT_PRODUCT avx512_product
#define LOWBIT_SIMD "simd_avx512.h"
#include "kernels.h"
