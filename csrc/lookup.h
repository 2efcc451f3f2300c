// Rows of an embedding, as floats or in ggml's blocks.
#pragma once

#include "lowbit.h"

namespace lowbit {

// What codes stand for, and those of scales and minima where these are nested (else null): 256 levels each; and how many
// weights share a scale.
struct GgmlLevels {
    const float *codes, *scales;
    int64_t step;
};

// Rows of `cols` values, `row_bytes` each: floats, or blocks where `levels.codes` is set.
struct Table {
    const uint8_t* data;
    int64_t cols, row_bytes;
    Dtype dtype;
    GgmlType type;
    GgmlLevels levels;
};

// Some rows as float32 [count, cols], times `factor`. Returns whether all of them are finite.
bool look_up(const Table& of, const int64_t* ids, int64_t count, float factor, float* to);

}  // namespace lowbit
