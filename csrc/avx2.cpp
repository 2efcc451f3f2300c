#define LOWBIT_TABLE avx2_kernels
#define LOWBIT_PRODUCT avx2_product
#define LOWBIT_SIMD "simd_avx2.h"
#include "kernels.h"
