#define LOWBIT_PRODUCT avx512_vnni_product
#define LOWBIT_SIMD "simd_avx512.h"
#include "product.h"
