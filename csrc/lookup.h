// Rows of an embedding that lies in ggml's blocks.
#pragma once

#include "lowbit.h"

namespace lowbit {

// What codes stand for, and those of scales and minima where these are nested (else null): 256 levels each; and how many
// weights share a scale.
struct GgmlLevels {
    const float *codes, *scales;
    int64_t step;
};

// Whole blocks of a type whose scales are float16 as floats [rows, cols]; NaN where a scale is not finite.
void ggml_floats(GgmlType type, const GgmlLevels& levels, const uint8_t* stored, int64_t rows, int64_t cols, float* to);

}  // namespace lowbit
