#define LOWBIT_NEON
#define LOWBIT_PRODUCT neon_dotprod_product
#define LOWBIT_SIMD "simd_neon.h"
#include "product.h"
