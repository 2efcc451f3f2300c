#define LOWBIT_NEON  // the compiler's own name for it is there for scalar_product.cpp as well
#define LOWBIT_PRODUCT neon_product
#define LOWBIT_SIMD "simd_neon.h"
#include "product.h"
