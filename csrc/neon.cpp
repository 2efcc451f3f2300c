#define LOWBIT_TABLE neon_kernels
#define LOWBIT_PRODUCT neon_product
#define LOWBIT_SIMD "simd_neon.h"
#include "kernels.h"
