#include "lookup.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace lowbit {
namespace {

using Bytes = std::vector<uint8_t>;

float half(uint16_t bits) {
    if ((bits & 0x7c00) == 0x7c00) return NAN;
    float value = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;  // exponents begin at 15, not 127
    return bits & 0x8000 ? -value : value;
}
float half_at(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return half(bits);
}
float power(uint8_t byte) {
    if (byte == 255) return NAN;
    return std::bit_cast<float>(byte ? uint32_t(byte) << 23 : 1u << 22);
}

// Scales or minima, those of the blocks within blocks where there are levels.
std::vector<float> meant(const GgmlShape& shape, const Bytes& stored, const Bytes& codes, const float* level, float sign) {
    std::vector<float> upper(stored.size() / size_t(shape.scale_bytes)), lower(level ? codes.size() : 0);
    for (size_t i = 0; i < upper.size(); i++)
        upper[i] = shape.scale_bytes == 1 ? power(stored[i]) : sign * half_at(stored.data() + 2 * i);
    if (!level) return upper;
    const size_t each = upper.empty() ? 1 : codes.size() / upper.size();
    for (size_t i = 0; i < lower.size(); i++) lower[i] = level[codes[i]] * upper[i / each];
    return lower;
}

uint8_t* data_or_null(Bytes& of) { return of.empty() ? nullptr : of.data(); }

// Whole blocks as floats; NaN where a scale is not finite.
void ggml_floats(GgmlType type, const GgmlLevels& levels, const uint8_t* stored, int64_t cols, float* to) {
    const GgmlShape shape = ggml_shape(type);
    const int64_t blocks = cols / shape.weights;
    auto room = [&](int64_t each) { return Bytes(size_t(blocks * each)); };
    Bytes codes = room(shape.weights), scale = room(shape.scale_bytes), min = room(2 * shape.has_min);
    Bytes scale_codes = room(shape.subs), min_codes = room(shape.subs * shape.has_min);
    ggml_unpack(type, blocks, stored,
                {codes.data(), scale.data(), data_or_null(min), data_or_null(scale_codes), data_or_null(min_codes)});
    const float sign = shape.subs ? 1 : -1;  // minima that are not nested are stored as what is added
    std::vector<float> scales = meant(shape, scale, scale_codes, levels.scales, 1);
    std::vector<float> minima = meant(shape, min, min_codes, levels.scales, sign);
    const Quantized of{codes.data(), scales.data(), shape.has_min ? minima.data() : nullptr, levels.codes, shape.has_min};
    kernels().dequantize({1, cols, 1, levels.step}, of, {to, Dtype::f32});
}

void floats(Dtype dtype, const uint8_t* stored, int64_t cols, float* to) {
    if (dtype == Dtype::f32) return void(std::memcpy(to, stored, size_t(4 * cols)));
    for (int64_t i = 0; i < cols; i++) {
        uint16_t bits;
        std::memcpy(&bits, stored + 2 * i, 2);
        to[i] = dtype == Dtype::bf16 ? std::bit_cast<float>(uint32_t(bits) << 16) : half(bits);
    }
}

}  // namespace

bool look_up(const Table& of, const int64_t* ids, int64_t count, float factor, float* to) {
    int64_t wrong = 0;
    for (int64_t t = 0; t < count; t++, to += of.cols) {
        const uint8_t* stored = of.data + ids[t] * of.row_bytes;
        if (of.levels.codes) ggml_floats(of.type, of.levels, stored, of.cols, to);
        else floats(of.dtype, stored, of.cols, to);
        for (int64_t i = 0; i < of.cols; i++) {
            wrong += !(std::abs(to[i]) <= std::numeric_limits<float>::max());
            to[i] *= factor;
        }
    }
    return wrong == 0;
}

}  // namespace lowbit
