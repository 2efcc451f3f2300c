#define LOWBIT_PRODUCT avx2_product
#define LOWBIT_SIMD "simd_avx2.h"
#include "product.h"
