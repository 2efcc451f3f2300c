#define LOWBIT_TABLE scalar_kernels
#define LOWBIT_PRODUCT scalar_product
#define LOWBIT_SIMD "simd_scalar.h"
#include "kernels.h"
