// Every instruction set against the scalar reference, bit for bit: odd and zero sizes, unaligned and exactly sized
// buffers (so that the address sanitizer sees a byte too many), values of every kind.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>

#include "decoder.h"
#include "lookup.h"
#include "lowbit.h"
#include "pool.h"

namespace lowbit {
void whole_dots_product(const Product& of, int64_t first, int64_t last);  // whole_dots.cpp
}

using namespace lowbit;

static std::mt19937 source(1);
static int failures = 0;

// `size` bytes at an odd address, ending where the allocation ends.
struct Buffer {
    std::vector<uint8_t> bytes;
    explicit Buffer(int64_t size, uint8_t fill = 0) : bytes(size_t(size) + 1, fill) {}
    uint8_t* at() { return bytes.data() + 1; }
};

static Buffer random_codes(int64_t count, int greatest) {
    Buffer codes(count);
    for (int64_t i = 0; i < count; i++) codes.at()[i] = uint8_t(source() % (greatest + 1));
    return codes;
}

static size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Half of the elements any bit pattern (NaN, Inf, subnormal), half ordinary numbers; `wild` false: ordinary only.
static Buffer random_weight(int64_t count, Dtype dtype, bool wild) {
    Buffer weight(count * int64_t(size_of(dtype)));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; i++) {
        auto any = uint32_t(source());
        float ordinary = normal(source);
        uint32_t bits;
        std::memcpy(&bits, &ordinary, 4);
        if (dtype == Dtype::bf16) bits >>= 16, any >>= 16;
        if (dtype == Dtype::f16) bits = (bits >> 16 & 0x8000) | 0x3800 | (bits & 0x3ff), any >>= 16;
        std::memcpy(weight.at() + i * int64_t(size_of(dtype)), wild && source() % 2 ? &any : &bits, size_of(dtype));
    }
    return weight;
}

// Aligned, as the bindings give them.
static std::vector<float> random_scales(int64_t count) {
    std::vector<float> scales(static_cast<size_t>(count));
    for (float& scale : scales) scale = std::ldexp(1.0f + float(source() % 1000) / 1000, int(source() % 20) - 12);
    return scales;
}

static void expect_same(const char* what, const Kernels& kernels, const Grid& grid, const void* got, const void* want,
                        size_t size) {
    if (size == 0 || std::memcmp(got, want, size) == 0) return;
    failures++;
    std::printf("%s on %s differs from scalar: %lld x %lld, blocks %lld x %lld\n", what, kernels.isa,
                (long long)grid.rows, (long long)grid.cols, (long long)grid.block_rows, (long long)grid.block_cols);
}

// The same call on both tables, each into its own buffer of `size` bytes.
template <class Call>
static void compare(const char* what, const Kernels& kernels, const Grid& grid, int64_t size, Call call) {
    Buffer got(size, 0xaa), want(size, 0xbb);
    call(kernels, got.at());
    call(*supported_kernels()[0], want.at());
    expect_same(what, kernels, grid, got.at(), want.at(), size_t(size));
}

static int64_t blocks(const Grid& grid) {
    int64_t down = (grid.rows + grid.block_rows - 1) / grid.block_rows;
    return down * ((grid.cols + grid.block_cols - 1) / grid.block_cols);
}

static void compare_quantize(const Kernels& kernels, const Grid& grid, Dtype dtype, bool wild) {
    int64_t count = grid.rows * grid.cols;
    Buffer data = random_weight(count, dtype, wild);
    Weight weight{data.at(), dtype};
    auto scale = random_scales(blocks(grid)), zero = random_scales(blocks(grid));
    for (const float* z : {static_cast<const float*>(nullptr), static_cast<const float*>(zero.data())})
        for (Rounding rounding : {Rounding::quotient, Rounding::sum})
            compare("quantize_affine", kernels, grid, count, [&](const Kernels& k, uint8_t* out) {
                k.quantize_affine(grid, weight, scale.data(), z, 8, 15, rounding, out);
            });
    for (Fp8 format : {Fp8::e4m3fn, Fp8::e5m2})
        compare("quantize_fp8", kernels, grid, count,
                [&](const Kernels& k, uint8_t* out) { k.quantize_fp8(grid, weight, scale.data(), format, out); });
    for (int levels : {1, 2, 5, 16, 17, 256}) {
        std::vector<float> sorted(static_cast<size_t>(levels));
        std::vector<uint8_t> codes(sorted.size());
        for (int i = 0; i < levels; i++) {
            sorted[size_t(i)] = std::sinh(float(i - levels / 2) / 16);
            codes[size_t(i)] = uint8_t(i * 7);
        }
        Levels table = nearest_level(sorted.data(), codes.data(), levels);
        compare("quantize_levels", kernels, grid, count,
                [&](const Kernels& k, uint8_t* out) { k.quantize_levels(grid, weight, scale.data(), table, out); });
    }
    compare("block_range", kernels, grid, 8 * blocks(grid) + 8, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> least(scale.size()), greatest(scale.size());
        int64_t first_bad = k.block_range(grid, weight, least.data(), greatest.data());
        std::memcpy(out, &first_bad, 8);
        if (scale.empty()) return;
        std::memcpy(out + 8, least.data(), 4 * least.size());
        std::memcpy(out + 8 + 4 * least.size(), greatest.data(), 4 * greatest.size());
    });
}

static std::vector<float> level_table(int ramp, int others) {
    std::vector<float> table(256, NAN);
    for (int i = 0; i < ramp; i++) table[size_t(i)] = float(i - ramp / 2);
    for (int i = 0; i < others; i++) table[size_t(i)] = std::sinh(float(i - others / 3) / 16);
    return table;
}

static void compare_dequantize(const Kernels& kernels, const Grid& grid, Dtype dtype) {
    int64_t count = grid.rows * grid.cols;
    Buffer data = random_weight(count, dtype, false), codes = random_codes(count, 255);
    for (bool wild : {false, true}) {
        Buffer any = random_weight(count, dtype, wild);
        compare("to_floats", kernels, grid, 4 * count, [&](const Kernels& k, uint8_t* out) {
            std::vector<float> floats(size_t(count), 0.0f);
            k.to_floats({any.at(), dtype}, count, floats.data());
            if (count) std::memcpy(out, floats.data(), size_t(4 * count));
        });
    }
    auto scale = random_scales(blocks(grid)), zero = random_scales(blocks(grid));
    for (auto& level : {level_table(16, 0), level_table(256, 0), level_table(0, 16), level_table(0, 200)})
        for (const float* z : {static_cast<const float*>(nullptr), static_cast<const float*>(zero.data())}) {
            Quantized quantized{codes.at(), scale.data(), z, level.data()};
            compare("dequantize", kernels, grid, count * int64_t(size_of(dtype)),
                    [&](const Kernels& k, uint8_t* out) { k.dequantize(grid, quantized, {out, dtype}); });
            for (const uint8_t* weight : {static_cast<const uint8_t*>(data.at()), static_cast<const uint8_t*>(nullptr)})
                compare("error", kernels, grid, 20, [&](const Kernels& k, uint8_t* out) {
                    ErrorSums sums = k.error(grid, {weight, dtype}, quantized);
                    std::memcpy(out, &sums.squared_error, 8), std::memcpy(out + 8, &sums.squared_weight, 8);
                    std::memcpy(out + 16, &sums.max_error, 4);
                });
        }
}

// body(coder, zero) for each way to find codes.
template <class Body>
static void each_coder(bool keep, const float* zero, Body body) {
    for (Rounding rounding : {Rounding::quotient, Rounding::sum})
        for (const float* z : {static_cast<const float*>(nullptr), zero})
            body(Coder{8, 15, rounding, nullptr, nullptr, keep}, z);
    for (int levels : {3, 16, 200}) {
        std::vector<float> sorted(static_cast<size_t>(levels)), table = level_table(0, levels);
        std::vector<uint8_t> codes(sorted.size());
        for (int i = 0; i < levels; i++) sorted[size_t(i)] = table[size_t(i)], codes[size_t(i)] = uint8_t(i);
        Levels found = nearest_level(sorted.data(), codes.data(), levels);
        body(Coder{0, 255, Rounding::quotient, &found, table.data(), keep}, nullptr);
    }
}

// All that a sweep changes, one after the other.
static void compare_sweep(const Kernels& kernels, int64_t cols, int64_t lanes) {
    Grid grid{cols, lanes, 1, 1};
    int64_t count = cols * lanes;
    auto weight = random_scales(count), target = random_scales(count), error = random_scales(count);
    auto scale = random_scales(count), zero = random_scales(count), coupling = random_scales(cols * cols);
    for (size_t i = 0; i < weight.size(); i += 5) weight[i] = 0, target[i] *= -1;
    auto run = [&](const Coder& coder, const float* z) {
        compare("sweep", kernels, grid, 9 * count, [&](const Kernels& k, uint8_t* out) {
            auto t = target, e = error;
            Sweep of{cols,     lanes,    weight.data(),  coupling.data(), scale.data(), z,
                     t.data(), e.data(), out + 8 * count};
            k.sweep(of, coder);
            if (count == 0) return;
            std::memcpy(out, t.data(), size_t(4 * count)), std::memcpy(out + 4 * count, e.data(), size_t(4 * count));
        });
    };
    for (bool keep : {false, true}) each_coder(keep, zero.data(), run);
}

// Codes and errors of runs under forms that are positive, and targets as they are left.
static void compare_runs(const Kernels& kernels, GgmlType type, int64_t cols, int64_t lanes) {
    Grid grid{cols, lanes, 1, 1};
    int64_t count = cols * lanes, across = (cols + 7) / 8 * 64;
    auto weight = random_scales(count), target = random_scales(count), scale = random_scales(count);
    auto coupling = random_scales(cols * cols), solve = random_scales(across), metric = random_scales(across);
    auto level = level_table(0, 16);
    for (size_t i = 0; i < weight.size(); i += 3) weight[i] *= -1, target[(7 * i) % weight.size()] *= -1;
    for (size_t i = 0; i < metric.size(); i++) metric[i] *= i % 9 == 0 ? 20 : i % 2 ? 0.1f : -0.1f;
    Buffer start = random_codes(count, 5);
    for (bool first : {false, true})
        compare("sweep_runs", kernels, grid, 9 * count, [&](const Kernels& k, uint8_t* out) {
            auto t = target;
            std::vector<float> e(size_t(count), 0.25f);
            if (count) std::memcpy(out + 8 * count, start.at(), size_t(count));
            Sweep of{cols, lanes, weight.data(), coupling.data(), scale.data(), nullptr, t.data(), e.data(), out + 8 * count};
            k.sweep_runs({of, type, solve.data(), metric.data(), level.data(), first});
            if (count == 0) return;
            std::memcpy(out, t.data(), size_t(4 * count)), std::memcpy(out + 4 * count, e.data(), size_t(4 * count));
        });
}

static void compare_block_errors(const Kernels& kernels, const Grid& grid) {
    auto weight = random_scales(grid.rows * grid.cols), scale = random_scales(blocks(grid)), zero = random_scales(blocks(grid));
    auto importance = random_scales(grid.cols);
    auto run = [&](const Coder& coder, const float* z) {
        for (const float* of_column : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())})
            compare("block_errors", kernels, grid, 4 * blocks(grid), [&](const Kernels& k, uint8_t* out) {
                std::vector<float> errors(scale.size());
                k.block_errors(grid, weight.data(), scale.data(), z, coder, of_column, errors.data());
                if (!errors.empty()) std::memcpy(out, errors.data(), 4 * errors.size());
            });
    };
    each_coder(false, zero.data(), run);
}

// In place, as attention calls it; of NaN there is one in bfloat16.
static void compare_softmax(const Kernels& kernels, int64_t rows, int64_t cols, int64_t first, Dtype dtype, bool wild) {
    Grid grid{rows, cols, 3, first};
    Causal of{rows, cols, 3, first, 0.3f};
    int64_t size = rows * cols * int64_t(size_of(dtype));
    Buffer scores = random_weight(rows * cols, dtype, wild), slopes = random_weight(rows * cols, dtype, wild);
    compare("softmax", kernels, grid, 2 * size, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> room(size_t(cols) + 16);
        if (size == 0) return;
        std::memcpy(out, scores.at(), size_t(size)), std::memcpy(out + size, slopes.at(), size_t(size));
        k.softmax(of, {out, dtype}, {out, dtype}, room.data());
        k.softmax_slopes(of, {out, dtype}, {out + size, dtype});
    });
}

static void compare_pack(const Kernels& kernels, int64_t rows, int64_t cols, int bits) {
    Grid grid{rows, cols, bits, 0};
    int64_t count = rows * cols, size = 4 * rows * words_per_row(cols, bits);
    Buffer codes = random_codes(count, 255), words = random_codes(size, 255);
    compare("pack_bits", kernels, grid, size,
            [&](const Kernels& k, uint8_t* out) { k.pack_bits(codes.at(), rows, cols, bits, out); });
    compare("unpack_bits", kernels, grid, count,
            [&](const Kernels& k, uint8_t* out) { k.unpack_bits(words.at(), rows, cols, bits, out); });
    compare("pack_bits_transposed", kernels, grid, size,
            [&](const Kernels& k, uint8_t* out) { pack_bits_transposed(k, codes.at(), rows, cols, bits, out, rows); });
    compare("unpack_bits_transposed", kernels, grid, count,
            [&](const Kernels& k, uint8_t* out) { unpack_bits_transposed(k, words.at(), rows, rows, cols, bits, out); });
    compare("pack_nibbles", kernels, grid, (count + 1) / 2,
            [&](const Kernels& k, uint8_t* out) { pack_nibbles_high_first(k, codes.at(), count, out); });
    Buffer longer = random_codes(4 * count, 255);
    int64_t lines = (rows + 7) / 8;
    Buffer eights = random_codes(8 * lines * cols, 255), packed = random_codes(4 * lines * cols, 255);
    compare("pack_awq", kernels, grid, 4 * lines * cols,
            [&](const Kernels& k, uint8_t* out) { pack_awq(k, eights.at(), 8 * lines, cols, out, lines); });
    compare("unpack_awq", kernels, grid, 8 * lines * cols,
            [&](const Kernels& k, uint8_t* out) { unpack_awq(k, packed.at(), lines, 8 * lines, cols, out); });
    compare("transpose_lines", kernels, grid, 4 * count,
            [&](const Kernels& k, uint8_t* out) { transpose_lines(k, longer.at(), cols, rows, cols, out, rows); });
    int64_t wide = (cols + 7) / 8, both_ways = 4 * 8 * lines * wide;
    Buffer dense = random_codes(both_ways, 255);
    compare("lines_to_awq", kernels, grid, both_ways,
            [&](const Kernels& k, uint8_t* out) { lines_to_awq(k, dense.at(), wide, lines, out, lines); });
    compare("awq_to_lines", kernels, grid, both_ways,
            [&](const Kernels& k, uint8_t* out) { awq_to_lines(k, dense.at(), lines, wide, lines, out); });
    compare("awq_to_rows", kernels, grid, both_ways,
            [&](const Kernels& k, uint8_t* out) { awq_to_rows(k, dense.at(), lines, 8 * lines, wide, out); });
    Buffer nibbles = random_codes((count + 1) / 2, 255);
    compare("unpack_nibbles", kernels, grid, count,
            [&](const Kernels& k, uint8_t* out) { unpack_nibbles_high_first(k, nibbles.at(), count, out); });
}

// Encoders on ordinary, odd and hostile values; packed blocks and back.
static void compare_ggml(const Kernels& kernels, GgmlType type, int64_t rows, int64_t blocks, int kind) {
    GgmlShape shape = ggml_shape(type);
    int64_t cols = blocks * shape.weights, all = rows * blocks, subs = all * shape.subs;
    Grid grid{rows, cols, int64_t(type), kind};
    std::normal_distribution<float> normal;
    std::vector<float> weight(size_t(rows * cols)), importance(size_t(cols), 0.0f);
    for (size_t i = 0; i < weight.size(); i++) {
        static constexpr float sizes[] = {1, 1e-39f, 1e30f, 1e-15f};
        weight[i] = kind == 4 ? 0.25f : kind == 5 ? std::ldexp(normal(source), int(source() % 80) - 40) : normal(source) * sizes[kind];
    }
    for (size_t i = 0; i < importance.size(); i++) importance[i] = source() % 4 ? std::fabs(normal(source)) : 0;
    for (auto encode : {&Kernels::ggml_encode, &Kernels::ggml_fit})
        for (const float* given : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())})
            compare(encode == &Kernels::ggml_fit ? "ggml_fit" : "ggml_encode", kernels, grid, rows * cols + 8 * all + 2 * subs, [&](const Kernels& k, uint8_t* out) {
                std::vector<float> scale(size_t(all), 0.0f), min(size_t(all), 0.0f);
                std::vector<uint8_t> scale_codes(size_t(subs), uint8_t(0)), min_codes(size_t(subs), uint8_t(0));
                GgmlEncoded to{out, scale.data(), shape.has_min ? min.data() : nullptr, subs ? scale_codes.data() : nullptr,
                               subs && shape.has_min ? min_codes.data() : nullptr};
                (k.*encode)(type, rows, cols, weight.data(), given, to);
                if (all == 0) return;
                uint8_t* at = out + rows * cols;
                for (auto values : {&scale, &min}) std::memcpy(at, values->data(), size_t(4 * all)), at += 4 * all;
                if (subs == 0) return;
                for (auto codes : {&scale_codes, &min_codes}) std::memcpy(at, codes->data(), size_t(subs)), at += subs;
            });
}

static void check_ggml_blocks(GgmlType type, int64_t blocks) {
    GgmlShape shape = ggml_shape(type);
    Buffer stored = random_codes(blocks * shape.bytes, 255), again(blocks * shape.bytes), codes(blocks * shape.weights);
    Buffer scale(blocks * shape.scale_bytes), min(2 * blocks), scale_codes(blocks * shape.subs), min_codes(blocks * shape.subs);
    uint8_t *m = shape.has_min ? min.at() : nullptr, *s = shape.subs ? scale_codes.at() : nullptr;
    uint8_t* ms = shape.subs && shape.has_min ? min_codes.at() : nullptr;
    ggml_unpack(type, blocks, stored.at(), {codes.at(), scale.at(), m, s, ms});
    ggml_pack(type, blocks, {codes.at(), scale.at(), m, s, ms}, again.at());
    if (shape.scale_bytes <= 2 && blocks) {  // for the sanitizers: what comes of it is tested elsewhere
        std::vector<float> levels(256, 1.0f), floats(size_t(2 * shape.weights), 0.0f);
        GgmlLevels meant{levels.data(), shape.subs ? levels.data() : nullptr, shape.weights / (shape.subs ? shape.subs : 1)};
        const int64_t ids[] = {blocks - 1, 0};
        look_up({stored.at(), shape.weights, shape.bytes, Dtype::f32, type, meant}, ids, 2, 2.0f, floats.data());
    }
    if (type == GgmlType::tq1_0) return;  // five codes in a byte: not every byte is one that is written
    expect_same("ggml_pack", *supported_kernels()[0], {blocks, shape.weights, int64_t(type), 0}, again.at(), stored.at(),
                size_t(blocks * shape.bytes));
}

// Codes as words, and blocks of these; against what goes over a byte for each.
static void check_ggml_words(GgmlType type, int bits, int64_t blocks) {
    GgmlShape shape = ggml_shape(type);
    int64_t count = blocks * shape.weights, size = count * bits / 8;
    Buffer stored = random_codes(blocks * shape.bytes, 255), again(blocks * shape.bytes, 0xaa), codes(count), words(size, 0xaa);
    Buffer scale(2 * blocks), min(2 * blocks), scale_codes(blocks * shape.subs), min_codes(blocks * shape.subs), wanted(size);
    uint8_t *m = shape.has_min ? min.at() : nullptr, *s = shape.subs ? scale_codes.at() : nullptr;
    uint8_t* ms = shape.subs && shape.has_min ? min_codes.at() : nullptr;
    ggml_unpack(type, blocks, stored.at(), {codes.at(), scale.at(), m, s, ms});
    for (const Kernels* kernels : supported_kernels()) {
        Grid grid{blocks, shape.weights, int64_t(type), bits};
        kernels->pack_bits(codes.at(), 1, count, bits, wanted.at());
        ggml_words(*kernels, type, blocks, stored.at(), bits, words.at());
        ggml_pack_words(*kernels, type, blocks, words.at(), bits, {nullptr, scale.at(), m, s, ms}, again.at());
        expect_same("ggml_words", *kernels, grid, words.at(), wanted.at(), size_t(size));
        expect_same("ggml_pack_words", *kernels, grid, again.at(), stored.at(), size_t(blocks * shape.bytes));
    }
}

// Blocks of any bytes as panels, rows in reverse; codes against what goes over a byte for each.
static void compare_ggml_panels(const Kernels& kernels, GgmlType type, int64_t rows, int64_t blocks) {
    int bits = ggml_panel_bits(type);
    GgmlShape shape = ggml_shape(type);
    int64_t cols = blocks * shape.weights, all = rows * blocks, panels = (rows + 15) / 16;
    int64_t sizes[] = {2 * panels * cols * bits, 32 * panels * blocks, 32 * panels * blocks, 16 * panels * blocks * shape.subs,
                       16 * panels * blocks * shape.subs};
    Buffer stored = random_codes(all * shape.bytes, 255), scale(2 * all), min(2 * all), subs(all * shape.subs);
    std::vector<int64_t> order(size_t(rows), 0);
    for (int64_t i = 0; i < rows; i++) order[size_t(i)] = rows - 1 - i;
    Grid grid{rows, cols, int64_t(type), bits};
    compare("ggml_panels", kernels, grid, sizes[0] + 2 * sizes[1] + 2 * sizes[3] + 2, [&](const Kernels& k, uint8_t* out) {
        std::deque<Buffer> parts;
        for (int64_t size : sizes) parts.emplace_back(size);
        auto at = [&](int i) { return parts[size_t(i)].at(); };
        GgmlFound found = k.ggml_panels(type, {stored.at(), rows, blocks, order.data()}, {at(0), at(1), at(2), at(3), at(4)}, 0, panels);
        *out++ = found.finite, *out++ = found.wide;
        for (int i = 0; i < 5; out += sizes[i++]) std::memcpy(out, at(i), size_t(sizes[i]));
    });
    if (cols == 0) return;
    Buffer codes(all * shape.weights), turned(all * shape.weights), wanted(sizes[0]), got(sizes[0], 0xaa);
    ggml_unpack(type, all, stored.at(), {codes.at(), scale.at(), min.at(), subs.at(), Buffer(all * shape.subs).at()});
    for (int64_t r = 0; r < rows; r++) std::memcpy(turned.at() + r * cols, codes.at() + order[size_t(r)] * cols, size_t(cols));
    interleave(turned.at(), rows, cols, nullptr, bits, cols, 1, wanted.at());
    Buffer rest(sizes[1]), zero(sizes[1]), fine(sizes[3]), fine_zero(sizes[3]);
    kernels.ggml_panels(type, {stored.at(), rows, blocks, order.data()},
                        {got.at(), rest.at(), zero.at(), fine.at(), fine_zero.at()}, 0, panels);
    expect_same("codes of ggml_panels", kernels, grid, got.at(), wanted.at(), size_t(sizes[0]));
}

static float small_float(int code, int mantissa) {
    int exponent = (code & 127) >> mantissa, least = mantissa == 3 ? -6 : -14;
    float part = float(code & ((1 << mantissa) - 1)) / float(1 << mantissa);
    float value = std::ldexp(exponent ? 1 + part : part, least + (exponent ? exponent - 1 : 0));
    return code & 128 ? -value : value;
}

// Inputs of all tokens as `Product::fours`.
static std::vector<uint8_t> in_fours(int64_t tokens, int64_t cols, int64_t run, const std::vector<int16_t>& words,
                                     const std::vector<float>& scale, const std::vector<int32_t>& crossed) {
    int64_t size = bytes_of_fours(cols, run), runs = (cols + run - 1) / run;
    std::vector<uint8_t> fours(size_t((tokens + 3) / 4 * size));
    for (int64_t t = 0; t < tokens; t++)
        put_in_fours(cols, run, words.data() + t * cols, scale.data() + t * runs, crossed.data() + t * runs, t % 4,
                     fours.data() + t / 4 * size);
    return fours;
}

// A weight of panels, and inputs, for one way; integers of scales are bytes, or from -few to below `few`.
static void compare_product(const Kernels& kernels, Way way, int bits, int64_t rows, int64_t cols, int64_t step, bool minus,
                            int64_t over = 0, int few = 0) {
    bool alone = (rows % 2 == 0) == (cols % 3 == 0);
    // Tokens: one, more than are taken at once, or some that fill no tile.
    int64_t panels = (rows + 15) / 16, tokens = alone ? 1 : cols > 700 ? 267 : 14;
    int64_t sub = over ? over : step % 32 ? 16 : bits == 2 && step == 256 ? 256 : 32;
    int64_t scales = panels * 16 * cols / (over ? over : step), steps = panels * 16 * cols / step;
    bool narrow = rows % 2, zeros = over ? minus : rows % 3 != 0, joined = over && rows % 5 == 0;
    Buffer codes = random_codes(panels * 16 * cols * bits / 8, 255), fine = random_codes(steps, 255);
    for (int64_t i = 0; few && i < steps; i++) fine.at()[i] = uint8_t(fine.at()[i] % (2 * few) - few);
    Buffer scale = random_weight(scales, narrow ? Dtype::f16 : Dtype::f32, false), fine_zero = random_codes(steps, 255);
    auto zero = random_weight(scales, narrow ? Dtype::f16 : Dtype::f32, false);
    auto level = random_scales(256), input = random_scales(tokens * cols);
    for (int i = 0; i < 256 && bits == 8 && !zeros; i++) level[size_t(i)] = small_float(i, minus ? 2 : 3);
    for (size_t i = 0; i < input.size(); i += 3) input[i] *= -1;
    std::vector<int8_t> table(16), rounded(input.size());
    for (int i = 0; i < 16; i++) table[size_t(i)] = int8_t(17 * i - 128);
    int64_t summed = over ? step : sub;
    std::vector<float> input_scale(input.size() / size_t(sub) + 15);
    std::vector<int16_t> step_sum(input.size() / size_t(summed) + 15);
    Rounded blocks{tokens * cols, sub, summed};
    kernels.round_inputs(blocks, input.data(), rounded.data(), input_scale.data(), step_sum.data());
    compare("round_inputs", kernels, {tokens, cols, 1, sub}, tokens * cols, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> scales(input_scale.size());
        std::vector<int16_t> of_steps(step_sum.size());
        auto bytes = reinterpret_cast<int8_t*>(out);
        k.round_inputs(blocks, input.data(), bytes, scales.data(), of_steps.data());
    });
    std::vector<int16_t> words(input.size());
    std::vector<int32_t> crossed(input_scale.size());
    kernels.widen(tokens * cols, sub, rounded.data(), words.data(), crossed.data());
    std::vector<uint8_t> fours = in_fours(tokens, cols, sub, words, input_scale, crossed);
    compare("widen", kernels, {tokens, cols, 1, sub}, 2 * tokens * cols, [&](const Kernels& k, uint8_t* out) {
        std::vector<int16_t> found(words.size());
        std::vector<int32_t> sums(crossed.size());
        k.widen(tokens * cols, sub, rounded.data(), found.data(), sums.data());
        if (sums != crossed) failures++, std::printf("%s: widen: other sums\n", k.isa);
        if (!found.empty()) std::memcpy(out, found.data(), 2 * found.size());
    });
    std::vector<int8_t> tiles(size_t((tokens + 3) / 4 * 4 * cols));
    for (int64_t t = 0; t < tokens; t++) put_in_fours(cols, rounded.data() + t * cols, t % 4, tiles.data() + t / 4 * 4 * cols);
    std::vector<int8_t> above = tiles;
    for (int8_t& each : above) each ^= int8_t(-128);
    const int64_t fours_of_tokens = (tokens + 3) / 4 * 4;
    std::vector<int16_t> sums(size_t(fours_of_tokens * cols / summed));
    std::vector<float> input_scales(size_t(fours_of_tokens * cols / sub));
    for (int64_t t = 0, four = 0; over && t < tokens; t++, four = t / 4 * 4) {
        put_in_fours(2 * cols / summed, step_sum.data() + t * cols / summed, t % 4, sums.data() + four * cols / summed);
        put_in_fours(4 * cols / sub, input_scale.data() + t * cols / sub, t % 4, input_scales.data() + four * cols / sub);
    }
    const bool in_fours_too = over && !alone;  // the sums of steps, and scales
    auto integers = [](Buffer& from) { return reinterpret_cast<const int8_t*>(from.at()); };
    Product of{way, rows, cols, bits, step, over ? over : step, codes.at(),
               {scale.at(), narrow ? Dtype::f16 : Dtype::f32}, zeros ? zero.at() : nullptr, minus, way == Way::table ? 0.0f : 3.0f,
               over ? integers(fine) : nullptr, over && zeros && !joined ? integers(fine_zero) : nullptr,
               joined, level.data(), table.data(), 0.5f, tokens, input.data(), sub,
               alone ? rounded.data() : tiles.data(), in_fours_too ? input_scales.data() : input_scale.data(),
               in_fours_too ? sums.data() : step_sum.data(),
               words.data(), fours.data(), nullptr};
    compare("product", kernels, {rows, cols, int64_t(way), bits}, 4 * tokens * rows, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> found(size_t(tokens * rows));
        Product mine = of;
        mine.out = found.data();
        if (!alone && k.lifts && lifts(of)) mine.rounded = above.data();
        k.product(mine, 0, panels);
        if (!found.empty()) std::memcpy(out, found.data(), 4 * found.size());
    });
}

static void compare_dense(const Kernels& kernels, Dtype dtype, int64_t rows, int64_t cols) {
    int64_t panels = (rows + 15) / 16, tokens = cols % 3 ? 1 : 11;
    Buffer weight = random_weight(panels * 16 * cols, dtype, false);
    auto input = random_scales(tokens * cols);
    compare("dense", kernels, {rows, cols, 1, 1}, 4 * tokens * rows, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> found(size_t(tokens * rows));
        Product of{};
        of.way = Way::dense, of.rows = rows, of.cols = cols, of.codes = weight.at(), of.scale.dtype = dtype;
        of.tokens = tokens, of.input = input.data(), of.out = found.data();
        k.product(of, 0, panels);
        if (!found.empty()) std::memcpy(out, found.data(), 4 * found.size());
    });
}

// Weights and inputs as integers of 16 bits, and their product.
static void compare_wide(const Kernels& kernels, Dtype dtype, int64_t rows, int64_t cols, int64_t tokens) {
    int64_t panels = (rows + 15) / 16, runs = (cols + wide_run - 1) / wide_run, size = panels * 16 * cols;
    Buffer weight = random_weight(size, dtype, false);
    if (size) std::memset(weight.at(), 0, 64);
    auto input = random_scales(tokens * cols);
    for (size_t i = 0; i < input.size(); i += 3) input[i] *= -100;
    std::vector<int16_t> words(static_cast<size_t>(size)), rounded(input.size());
    std::vector<float> scale(size_t(panels * runs * 16)), input_scale(size_t(tokens * runs));
    std::vector<int32_t> crossed(input_scale.size());
    auto copy = [](const auto& from, uint8_t* out) {
        if (!from.empty()) std::memcpy(out, from.data(), from.size() * sizeof from[0]);
        return out + from.size() * sizeof from[0];
    };
    compare("widen_panels", kernels, {rows, cols, 1, 1}, 2 * size + 64 * panels * runs, [&](const Kernels& k, uint8_t* out) {
        if (!k.widen_panels({weight.at(), dtype}, panels, cols, words.data(), scale.data())) failures++;
        copy(scale, copy(words, out));
    });
    compare("round_wide", kernels, {tokens, cols, 1, 1}, 2 * tokens * cols + 8 * tokens * runs, [&](const Kernels& k, uint8_t* out) {
        for (int64_t t = 0; t < tokens; t++)
            k.round_wide(cols, wide_run, input.data() + t * cols, rounded.data() + t * cols, input_scale.data() + t * runs,
                         crossed.data() + t * runs);
        copy(crossed, copy(input_scale, copy(rounded, out)));
    });
    std::vector<uint8_t> fours = in_fours(tokens, cols, wide_run, rounded, input_scale, crossed);
    compare("wide", kernels, {rows, cols, tokens, 1}, 4 * tokens * rows, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> found(size_t(tokens * rows));
        Product of{};
        of.way = Way::wide, of.rows = rows, of.cols = cols, of.bits = 16, of.step = of.over = of.sub = wide_run;
        of.codes = reinterpret_cast<const uint8_t*>(words.data()), of.scale = {scale.data(), Dtype::f32}, of.unit = 1;
        of.tokens = tokens, of.words = rounded.data(), of.input_scale = input_scale.data(), of.fours = fours.data();
        of.out = found.data();
        k.product(of, 0, panels);
        copy(found, out);
    });
}

// Keys and values as they are kept, beside the bytes of `keep`.
struct KeptRoom {
    std::vector<uint8_t> data;
    std::vector<float> scale;
    Kept of;
    KeptRoom(const Kernels& k, Keep as, int64_t dim, const std::vector<float>& from)
        : data(from.size() * 4), scale(from.size() / 16 + 1), of{as, data.data(), scale.data(), 16} {
        for (int64_t i = 0; i < int64_t(from.size()) / dim; i++) k.keep(i, dim, from.data() + i * dim, of);
    }
};

static void compare_attention(const Kernels& kernels, int64_t dim, int64_t first, int64_t last) {
    const int64_t queries = last % 7 + 1;
    auto query = random_scales(queries * dim), keys = random_scales(last * dim), values = random_scales(last * dim);
    for (Keep as : {Keep::f32, Keep::f16, Keep::int8})
        for (float cap : {0.0f, 5.0f})
            compare("attend", kernels, {last, dim, first, queries}, 4 * queries * dim, [&](const Kernels& k, uint8_t* out) {
                std::vector<float> found(query.size());
                KeptRoom kept(k, as, dim, keys), mixed(k, as, dim, values);
                Attention of{queries, dim, first, last, query.data(), kept.of, mixed.of, 0.1f, cap, nullptr, found.data()};
                std::vector<float> room(size_t(queries_at_once * wide_room(of)));
                of.room = room.data();
                k.attend(of);
                std::memcpy(out, found.data(), 4 * found.size());
            });
    for (bool gelu : {false, true})
        compare("gate", kernels, {1, last, 1, 1}, 4 * last, [&](const Kernels& k, uint8_t* out) {
            std::vector<float> x(keys.begin(), keys.begin() + last), up(values.begin(), values.begin() + last);
            for (size_t i = 0; i < x.size(); i += 2) x[i] *= -100;
            k.gate(last, gelu, x.data(), up.data());
            std::memcpy(out, x.data(), 4 * x.size());
        });
}

// Every number once, whatever the threads.
static void check_share(int64_t count, int64_t piece, int threads) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
    share(count, piece, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) seen[size_t(i)]++;
    });
    for (auto& each : seen)
        if (each != 1) failures++, std::printf("share: %d visits of one of %lld\n", each.load(), (long long)count);
}

// Some tokens through two blocks, for the sanitizers: what comes of it is tested elsewhere.
static void run_decoder(int threads, Keep as) {
    constexpr int64_t hidden = 32, heads = 2, size = 16, inner = 48, tokens = 5;
    auto norm = random_scales(hidden);
    std::deque<std::vector<float>> kept;
    auto matrix = [&](int64_t rows, int64_t cols) {
        int64_t full = (cols + 31) / 32 * 32;
        auto& weight = kept.emplace_back(random_scales((rows + 15) / 16 * 16 * full));
        for (float& each : weight) each /= 1024;  // keys and values must fit float16
        Product of{};
        of.way = Way::dense, of.rows = rows, of.cols = full, of.bits = 32;
        of.codes = reinterpret_cast<const uint8_t*>(weight.data());
        return Matrix{of, nullptr, cols, norm.data()};
    };
    DecoderShape shape{hidden, heads, 1, size, inner, size, 1e-5f, 0.25f, as == Keep::f16 ? 5.0f : 0.0f, as == Keep::f16};
    auto embedding = random_codes(8 * hidden, 60);  // as float16
    auto steps = random_scales(size);
    Table table{embedding.at(), hidden, 2 * hidden, Dtype::f16, {}, {}};
    DecoderEnds ends{table, 2.0f, norm.data(), matrix(4, hidden), 2, steps.data(), norm.data()};
    Decoder decoder(shape, ends, threads);
    for (int i = 0; i < 2; i++) {
        auto add_no_bias = [](Matrix of) { return of.bias = nullptr, of; };
        const float* own = i ? norm.data() : nullptr;
        decoder.add({matrix(heads * size, hidden), matrix(size, hidden), matrix(size, hidden), matrix(hidden, heads * size),
                     add_no_bias(matrix(inner, hidden)), add_no_bias(matrix(inner, hidden)), matrix(hidden, inner),
                     norm.data(), norm.data(), norm.data(), nullptr, own, own, i ? 3 : 0, i});
    }
    Cache cache(shape, 2, as), other(shape, 2, as);
    cache.reserve(tokens), other.reserve(tokens);
    const std::vector<int64_t> ids{0, 1, 2, 3, 3, 1, 0, 0, 2, 1};
    bool finite = decoder.read(ids, {{&cache, 0, tokens}, {&other, 0, tokens}});
    cache.reserve(2 * tokens);
    finite &= decoder.read({3, 2, 1, 0, 3}, {{&cache, tokens, tokens}});
    for (float value : decoder.logits()) finite &= std::isfinite(value);
    if (!finite || decoder.logits().size() != 4 || decoder.likeliest().size() != 1)
        failures++, std::printf("decoder: not finite, or not one text\n");
}

static constexpr GgmlType ggml_types[] = {
    GgmlType::q4_0, GgmlType::q4_1, GgmlType::q5_0,   GgmlType::q5_1,   GgmlType::q8_0,  GgmlType::q2_k,  GgmlType::q3_k,
    GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k,   GgmlType::iq4_nl, GgmlType::iq4_xs, GgmlType::tq1_0, GgmlType::tq2_0,
    GgmlType::mxfp4, GgmlType::iq2_xxs, GgmlType::iq2_xs, GgmlType::iq2_s, GgmlType::iq3_xxs, GgmlType::iq3_s,
    GgmlType::iq1_s, GgmlType::iq1_m};

// Small floats and inputs as integers of 16 bits, in runs that end with the steps or the rows.
static void compare_small(const Kernels& kernels, int mantissa, int64_t rows, int64_t cols, int64_t step, int64_t tokens) {
    int64_t panels = (rows + 15) / 16, run = std::min(step, wide_run), runs = (cols + run - 1) / run;
    Buffer codes = random_codes(panels * 16 * cols, 255), scale = random_weight(panels * 16 * cols / step, Dtype::f32, false);
    for (int64_t i = 0; i < panels * 16 * cols; i++)
        if (i % 3 == 0 || i < 1024) codes.at()[i] &= i < 1024 ? 0x80 : 0x9f;  // zeros, and small ones
    auto input = random_scales(tokens * cols);
    for (size_t i = 0; i < input.size(); i += 3) input[i] *= -100;
    std::vector<int16_t> words(input.size());
    std::vector<float> level(256), input_scale(size_t(tokens * runs));
    std::vector<int32_t> crossed(input_scale.size());
    for (int i = 0; i < 256; i++) level[size_t(i)] = small_float(i, mantissa);
    for (int64_t t = 0; t < tokens; t++)
        kernels.round_wide(cols, run, input.data() + t * cols, words.data() + t * cols, input_scale.data() + t * runs,
                           crossed.data() + t * runs);
    std::vector<uint8_t> fours = in_fours(tokens, cols, run, words, input_scale, crossed);
    compare("small", kernels, {rows, cols, tokens, step}, 4 * tokens * rows, [&](const Kernels& k, uint8_t* out) {
        std::vector<float> found(size_t(tokens * rows));
        Product of{};
        of.way = Way::small, of.rows = rows, of.cols = cols, of.bits = 8, of.step = of.over = step, of.sub = run;
        of.codes = codes.at(), of.scale = {scale.at(), Dtype::f32}, of.level = level.data(), of.unit = 1;
        of.tokens = tokens, of.input = input.data(), of.fours = fours.data(), of.out = found.data();
        k.product(of, 0, panels);
        if (!found.empty()) std::memcpy(out, found.data(), 4 * found.size());
    });
}

static void compare_products(const Kernels& kernels) {
    for (int64_t rows : {0, 1, 2, 15, 16, 33})
        for (int64_t cols : {32, 96}) {
            for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) compare_dense(kernels, dtype, rows, cols);
            for (Way way : {Way::floats, Way::codes, Way::table})
                for (int bits : {2, 3, 4, 5, 6, 8})
                    for (int64_t step : {int64_t(16), int64_t(32), cols})
                        if (way != Way::table || bits == 4)
                            for (bool minus : {false, true}) compare_product(kernels, way, bits, rows, cols, step, minus);
        }
    for (int64_t rows : {0, 1, 16, 33})
        for (int64_t cols : {32, 96, 544})
            for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
                for (int64_t tokens : {1, 3, 70}) compare_wide(kernels, dtype, rows, cols, tokens);
    for (int64_t rows : {1, 16, 33})
        for (int mantissa : {2, 3})
            for (int64_t tokens : {1, 3, 16, 267}) {
                for (int64_t step : {32, 64, 192}) compare_small(kernels, mantissa, rows, 192, step, tokens);
                for (int64_t step : {256, 512}) compare_small(kernels, mantissa, rows, 512, step, tokens);
                compare_small(kernels, mantissa, rows, 544, 544, tokens);
            }
    for (int64_t rows : {5, 16, 33})
        for (int bits = 2; bits <= 6; bits++)
            for (int64_t step : {16, 32})
                for (bool minus : {false, true}) {
                    for (int few : {0, 32}) compare_product(kernels, Way::codes, bits, rows, 512, step, minus, 256, few);
                    if (bits == 4) compare_product(kernels, Way::table, bits, rows, 192, step, minus, 64);
                }
    for (bool minus : {false, true}) {  // inputs of 256 rounded together, and scales of more columns than are unpacked at once
        compare_product(kernels, Way::codes, 2, 33, 1536, 256, minus);
        for (int64_t step : {48, 1536}) compare_product(kernels, Way::codes, 4, 33, 1536, step, minus);
        compare_product(kernels, Way::codes, 3, 33, 1280, 16, minus, 256, 32);
    }
}

// An argument N: of the encoders of GGUF's types, which take longest, every N-th case; 0: only what has threads.
int main(int count, char** arguments) {
    int every = count > 1 ? std::atoi(arguments[1]) : 1, number = 0;
    for (int threads : {1, 2, 5})
        for (int64_t count : {0, 1, 7, 100}) check_share(count, 3, threads);
    for (int threads : {1, 3})
        for (Keep as : {Keep::f32, Keep::f16, Keep::int8}) run_decoder(threads, as);
    if (every == 0) return failures != 0;
    for (GgmlType type : ggml_types)
        for (int64_t blocks : {0, 1, 5}) check_ggml_blocks(type, blocks);
    const std::pair<GgmlType, int> dense[] = {{GgmlType::q4_0, 4}, {GgmlType::q4_1, 4}, {GgmlType::q5_0, 5},
                                              {GgmlType::q5_1, 5}, {GgmlType::q8_0, 8}, {GgmlType::q2_k, 2},
                                              {GgmlType::q3_k, 3}, {GgmlType::q4_k, 4}, {GgmlType::q5_k, 5},
                                              {GgmlType::q6_k, 6}};
    for (auto [type, bits] : dense)
        for (int64_t blocks : {0, 1, 5, 67}) check_ggml_words(type, bits, blocks);

    auto all = supported_kernels();
    Kernels whole_dots = *all[0];
    whole_dots.isa = "whole dots", whole_dots.product = whole_dots_product, whole_dots.lifts = true;
    compare_products(whole_dots);
    for (size_t i = all.size() > 1 ? 1 : 0; i < all.size(); i++) {  // alone, scalar still meets the sanitizers
        const Kernels& kernels = *all[i];
        std::printf("%s\n", kernels.isa);
        compare_products(kernels);
        if (i > 0 && kernels.error == all[i - 1]->error) continue;  // only products are others than in the table before
        for (int64_t rows : {0, 1, 2, 5})
            for (int64_t cols : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 129, 300}) {
                for (int64_t block_cols : {1, 3, 8, 16, 24, 32, 64, 1000})
                    for (int64_t block_rows : {1, 2, 7}) {
                        Grid grid{rows, cols, block_rows, block_cols};
                        compare_block_errors(kernels, grid);
                        for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
                            for (bool wild : {false, true}) compare_quantize(kernels, grid, dtype, wild);
                            compare_dequantize(kernels, grid, dtype);
                        }
                    }
                for (int bits = 1; bits <= 8; bits++) compare_pack(kernels, rows, cols, bits);
            }
        for (int bits = 1; bits <= 8; bits++) compare_pack(kernels, 37, 5003, bits);
        for (int64_t cols : {0, 1, 5, 16, 31, 33, 64, 100})
            for (int64_t first : {0, 14, 90}) {
                compare_softmax(kernels, 7, cols, first, Dtype::f32, false);
                for (bool wild : {false, true}) compare_softmax(kernels, 7, cols, first, Dtype::bf16, wild);
            }
        for (int64_t cols : {0, 1, 2, 7, 33})
            for (int64_t lanes : {0, 16, 48}) compare_sweep(kernels, cols, lanes);
        for (GgmlType type : {GgmlType::iq1_s, GgmlType::iq1_m, GgmlType::iq2_xxs, GgmlType::iq2_xs, GgmlType::iq2_s,
                              GgmlType::iq3_xxs, GgmlType::iq3_s})
            for (int64_t cols : {0, 1, 8, 21})
                for (int64_t lanes : {0, 16, 48}) compare_runs(kernels, type, cols, lanes);
        for (GgmlType type : ggml_types)
            for (int64_t blocks : {0, 1, 3})
                for (int kind = 0; kind < 6; kind++)
                    if (number++ % every == 0) compare_ggml(kernels, type, 7, blocks, kind);
        for (GgmlType type : ggml_types)
            for (int64_t rows : {0, 1, 16, 37})
                for (int64_t blocks : {0, 1, 3})
                    if (ggml_panel_bits(type)) compare_ggml_panels(kernels, type, rows, blocks);
        for (int64_t last : {1, 2, 17, 40})
            for (int64_t first : {int64_t(0), last - 1}) compare_attention(kernels, 80, first, last);
    }
    return failures == 0 ? 0 : 1;
}
