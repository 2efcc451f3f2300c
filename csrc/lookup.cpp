#include "lookup.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace lowbit {
namespace {

using Bytes = std::vector<uint8_t>;

float half(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    if ((bits & 0x7c00) == 0x7c00) return NAN;
    float value = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;  // exponents begin at 15, not 127
    return bits & 0x8000 ? -value : value;
}

// Scales or minima, those of the blocks within blocks where there are levels.
std::vector<float> meant(const Bytes& halves, const Bytes& codes, const float* level, float sign) {
    std::vector<float> upper(halves.size() / 2), lower(level ? codes.size() : 0);
    for (size_t i = 0; i < upper.size(); i++) upper[i] = sign * half(halves.data() + 2 * i);
    if (!level) return upper;
    const size_t each = upper.empty() ? 1 : codes.size() / upper.size();
    for (size_t i = 0; i < lower.size(); i++) lower[i] = level[codes[i]] * upper[i / each];
    return lower;
}

uint8_t* data_or_null(Bytes& of) { return of.empty() ? nullptr : of.data(); }

}  // namespace

void ggml_floats(GgmlType type, const GgmlLevels& levels, const uint8_t* stored, int64_t rows, int64_t cols, float* to) {
    const GgmlShape shape = ggml_shape(type);
    const int64_t blocks = rows * cols / shape.weights;
    if (blocks == 0) return;
    auto room = [&](int64_t each) { return Bytes(size_t(blocks * each)); };
    Bytes codes = room(shape.weights), scale = room(2), min = room(2 * shape.has_min);
    Bytes scale_codes = room(shape.subs), min_codes = room(shape.subs * shape.has_min);
    ggml_unpack(type, blocks, stored,
                {codes.data(), scale.data(), data_or_null(min), data_or_null(scale_codes), data_or_null(min_codes)});
    const float sign = shape.subs ? 1 : -1;  // minima that are not nested are stored as what is added
    std::vector<float> scales = meant(scale, scale_codes, levels.scales, 1), minima = meant(min, min_codes, levels.scales, sign);
    const Quantized of{codes.data(), scales.data(), shape.has_min ? minima.data() : nullptr, levels.codes, shape.has_min};
    kernels().dequantize({rows, cols, 1, levels.step}, of, {to, Dtype::f32});
}

}  // namespace lowbit
