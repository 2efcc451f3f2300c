// Products as they are made where four products of bytes are added at once, on any machine.
#define LOWBIT_WHOLE_DOTS
#define LOWBIT_PRODUCT whole_dots_product
#define LOWBIT_SIMD "simd_scalar.h"
#include "product.h"
