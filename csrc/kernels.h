// The kernels, written once over 16 lanes and compiled once per instruction set.
//
// The including file defines LOWBIT_TABLE (the name of its table), LOWBIT_PRODUCT (of its products, which a file of
// their own has) and LOWBIT_SIMD (the header with its lanes).
// Everything here has internal linkage and nothing of the standard library is instantiated: a shared inline function
// compiled with AVX-512 could otherwise be the copy that the linker keeps for all.
#include "ggml_grids.h"
#include "lowbit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lowbit {
namespace {

#include "lanes.h"

int64_t blocks_across(const Grid& grid) { return grid.cols == 0 ? 0 : (grid.cols - 1) / grid.block_cols + 1; }

I load_codes(const uint8_t* from, Full) { return load_u8(from); }
I load_codes(const uint8_t* from, int count) {
    uint8_t full[16] = {};
    __builtin_memcpy(full, from, count);
    return load_u8(full);
}
void store_codes(uint8_t* to, I value, Full) { store_u8(to, value); }
void store_codes(uint8_t* to, I value, int count) {
    uint8_t full[16];
    store_u8(full, value);
    __builtin_memcpy(to, full, count);
}
F first_lanes(F value, Full) { return value; }
F first_lanes(F value, int count) {
    float full[16];
    store_f32(full, value);
    for (int i = count; i < 16; i++) full[i] = 0;
    return load_f32(full);
}

// ---- walking over blocks ----

// The scale or zero of up to 16 columns of one row. A null pointer stands for a constant.
struct RowParameter {
    const float* of_block;
    float constant;
    F one(int64_t block) const { return set(of_block ? of_block[block] : constant); }
    F each_of(int64_t col, int count, int64_t block_cols) const {
        if (!of_block) return set(constant);
        if (block_cols == 1) return load_some<F32>(of_block + col, count);
        float full[16];
        if (block_cols == 8) {  // as of scales that are quantized: without a division
            float low = of_block[col / 8], high = of_block[(col + count - 1) / 8];
            for (int i = 0; i < 8; i++) full[i] = low, full[i + 8] = high;
            return load_f32(full);
        }
        int64_t block = col / block_cols, last = (col + count - 1) / block_cols, left = block_cols - col % block_cols;
        for (int64_t i = 0, end; i < 16; i = end, block++, left = block_cols) {
            end = i + smaller(left, 16 - i);
            for (int64_t k = i; k < end; k++) full[k] = of_block[smaller(block, last)];
        }
        return load_f32(full);
    }
};

// body(col, count, scale, zero) for each run of up to 16 columns of a row.
template <class Body>
void each_run(const Grid& grid, RowParameter scale, RowParameter zero, Body body) {
    bool aligned = grid.block_cols % 16 == 0 || grid.block_cols >= grid.cols;
    int64_t block = 0, end = 0;
    for (int64_t start = 0; aligned && start < grid.cols; start = end, block++) {
        end = start + smaller(grid.block_cols, grid.cols - start);
        F s = scale.one(block), z = zero.one(block);
        int64_t col = start;
        for (; col + 16 <= end; col += 16) body(col, Full{}, s, z);
        if (col < end) body(col, int(end - col), s, z);
    }
    for (int64_t col = 0; !aligned && col < grid.cols; col += 16) {
        int count = int(smaller(16, grid.cols - col));
        F s = scale.each_of(col, count, grid.block_cols), z = zero.each_of(col, count, grid.block_cols);
        count == 16 ? body(col, Full{}, s, z) : body(col, count, s, z);
    }
}

template <class T, class Body>
void each_weight(const Grid& grid, const void* data, const float* scale, const float* zero, float offset, Body body) {
    auto element = static_cast<const uint8_t*>(data);
    int64_t across = blocks_across(grid);
    for (int64_t row = 0; row < grid.rows; row++) {
        int64_t at = row * grid.cols, block = row / grid.block_rows * across;
        RowParameter scales{scale + block, 1}, zeros{zero ? zero + block : nullptr, offset};
        each_run(grid, scales, zeros, [&](int64_t col, auto count, F s, F z) {
            body(at + col, count, load_some<T>(element + (at + col) * T::size, count), s, z);
        });
    }
}

// ---- range ----

template <class T>
int64_t first_not_finite(const uint8_t* row, int64_t cols) {
    for (int64_t col = 0; col < cols; col++) {
        I magnitude = both(bits(load_some<T>(row + col * T::size, 1)), set(0x7fffffff));
        if (any(greater(magnitude, set(0x7f7fffff)))) return col;
    }
    return -1;
}

// Extends `low` and `high` by the values of one block's part of a row, `worst` by their magnitudes as bits.
template <class T>
void extend_range(const uint8_t* from, int64_t count, F& low, F& high, I& worst) {
    auto take = [&](F value) {
        low = min(value, low), high = max(value, high);
        worst = max(worst, both(bits(value), set(0x7fffffff)));
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) take(T::load(from + i * T::size));
    if (i < count) take(load_some<T>(from + i * T::size, int(count - i)));
}

template <class T>
int64_t range_of(const Grid& grid, const void* data, float* low_out, float* high_out) {
    auto element = static_cast<const uint8_t*>(data);
    int64_t across = blocks_across(grid), first_bad = -1;
    for (int64_t row = 0; row < grid.rows; row++) {
        const uint8_t* from = element + row * grid.cols * T::size;
        int64_t block = row / grid.block_rows * across;
        bool fresh = row % grid.block_rows == 0;
        I worst = set(0);
        for (int64_t col = 0, length; col < grid.cols; col += length, block++) {
            length = smaller(grid.block_cols, grid.cols - col);
            F low = set(fresh ? __builtin_inff() : low_out[block]);
            F high = set(fresh ? -__builtin_inff() : high_out[block]);
            extend_range<T>(from + col * T::size, length, low, high, worst);
            low_out[block] = least(low) + 0.0f, high_out[block] = greatest(high) + 0.0f;  // -0 + 0 is 0
        }
        if (first_bad < 0 && any(greater(worst, set(0x7f7fffff))))
            first_bad = row * grid.cols + first_not_finite<T>(from, grid.cols);
    }
    return first_bad;
}

int64_t block_range(const Grid& grid, Weight weight, float* low, float* high) {
    int64_t first_bad = -1;
    with_dtype(weight.dtype, [&](auto type) { first_bad = range_of<decltype(type)>(grid, weight.data, low, high); });
    return first_bad;
}

// ---- quantize ----

void quantize_affine(const Grid& grid, Weight weight, const float* scale, const float* zero, float offset,
                     float code_max, Rounding rounding, uint8_t* codes) {
    auto run = [&](auto type, auto round) {
        each_weight<decltype(type)>(grid, weight.data, scale, zero, offset, [&](int64_t at, auto n, F w, F s, F z) {
            F code = min(max(round(div(w, s), z), set(0.0f)), set(code_max));  // max(NaN, 0) is 0
            store_codes(codes + at, to_int(code), n);
        });
    };
    with_dtype(weight.dtype, [&](auto type) {
        if (rounding == Rounding::quotient) run(type, [](F x, F z) { return add(rint(x), z); });
        if (rounding == Rounding::sum) run(type, [](F x, F z) { return rint(add(x, z)); });
    });
}

// The number of thresholds at or below x, of the 15 from `rank` on: a binary search, bit by bit.
template <class Table>
I rank_of(const Table& table, I rank, F x) {
    for (int step = 8; step > 0; step /= 2) {
        M up = at_least(x, table.threshold_at(add(rank, set(step - 1))));
        rank = select(up, add(rank, set(step)), rank);
    }
    return rank;
}

struct Lookup16 {
    F threshold, code;
    explicit Lookup16(const Levels& levels) : threshold(load_f32(levels.threshold)), code(load_f32(levels.code)) {}
    F threshold_at(I rank) const { return lookup16(threshold, rank); }
    I operator()(F x) const { return bits(lookup16(code, rank_of(*this, set(0), x))); }
};

// Every sixteenth threshold first, in a register; then the sixteen that follow it, in memory.
struct Lookup256 {
    struct Fine {
        const float* threshold;
        F threshold_at(I rank) const { return lookup256(threshold, rank); }
    };
    const Levels& levels;
    Lookup16 coarse;
    explicit Lookup256(const Levels& all) : levels(all), coarse(every_sixteenth(all)) {}
    static Levels every_sixteenth(const Levels& all) {
        Levels some;
        for (int i = 0; i < 16; i++) some.threshold[i] = all.threshold[16 * i + 15], some.code[i] = 16 * i;
        return some;
    }
    I operator()(F x) const { return lookup256(levels.code, rank_of(Fine{levels.threshold}, coarse(x), x)); }
};

void quantize_levels(const Grid& grid, Weight weight, const float* scale, const Levels& levels, uint8_t* codes) {
    auto run = [&](auto type, auto code_of) {
        each_weight<decltype(type)>(grid, weight.data, scale, nullptr, 0, [&](int64_t at, auto n, F w, F s, F) {
            store_codes(codes + at, code_of(div(w, s)), n);
        });
    };
    with_dtype(weight.dtype, [&](auto type) {
        if (levels.count <= 16) run(type, Lookup16(levels));
        if (levels.count > 16) run(type, Lookup256(levels));
    });
}

// mantissa bits, exponent bias, greatest finite value as float bits
struct E4M3 {
    static constexpr int mantissa = 3, bias = 7, greatest = 0x43e00000;
};
struct E5M2 {
    static constexpr int mantissa = 2, bias = 15, greatest = 0x47600000;
};

template <class Format>
I fp8_byte(F x) {
    constexpr int drop = 23 - Format::mantissa;
    constexpr int least_normal = (128 - Format::bias) << 23;
    // adding 2**(drop + 1 - bias) leaves as last bit the step of subnormal numbers: float32 rounds for us
    constexpr int aligner = (128 - Format::bias + drop) << 23;
    I sign = both(shift_right<24>(bits(x)), set(0x80)), raw = both(bits(x), set(0x7fffffff));
    I magnitude = min(raw, set(Format::greatest)), odd = both(shift_right<drop>(magnitude), set(1));
    I rounded = shift_right<drop>(add(magnitude, add(odd, set((1 << (drop - 1)) - 1))));
    I normal = sub(rounded, set((127 - Format::bias) << Format::mantissa));
    I subnormal = sub(bits(add(floats(magnitude), floats(set(aligner)))), set(aligner));
    I code = select(greater(set(least_normal), magnitude), subnormal, normal);
    return either(sign, select(greater(raw, set(0x7f800000)), set(0x7f), code));
}

void quantize_fp8(const Grid& grid, Weight weight, const float* scale, Fp8 format, uint8_t* codes) {
    auto run = [&](auto type, auto byte_of) {
        each_weight<decltype(type)>(grid, weight.data, scale, nullptr, 0, [&](int64_t at, auto n, F w, F s, F) {
            store_codes(codes + at, byte_of(div(w, s)), n);
        });
    };
    with_dtype(weight.dtype, [&](auto type) {
        if (format == Fp8::e4m3fn) run(type, [](F x) { return fp8_byte<E4M3>(x); });
        if (format == Fp8::e5m2) run(type, [](F x) { return fp8_byte<E5M2>(x); });
    });
}

// ---- dequantize and error ----

// Levels first, first + 1, ... up to `count`, then NaN: what integer grids have. count is 0 where they do not.
struct Ramp {
    float first;
    int count;
};
Ramp ramp_of(const float* level) {
    Ramp ramp{level[0], 0};
    while (ramp.count < 256 && level[ramp.count] == level[0] + float(ramp.count)) ramp.count++;
    for (int i = ramp.count; i < 256; i++)
        if (level[i] == level[i]) return {0, 0};
    return ramp;
}

bool at_most_16(const float* level) {
    for (int i = 16; i < 256; i++)
        if (level[i] == level[i]) return false;
    return true;
}

// The zero kind that is no part of a product.
struct CodeMinus {};
F scaled(CodeMinus, I code, F zero, F scale) { return sub(mul(to_float(code), scale), zero); }
template <class Value>
F scaled(Value value, I code, F zero, F scale) {
    return mul(value(code, zero), scale);
}

// Calls body(value, offset): value(code, zero) gives the element in units of the scale.
template <class Body>
void with_values(const Quantized& quantized, Body body) {
    constexpr int nan = 0x7fc00000;
    const float* level = quantized.level;
    if (quantized.zero && quantized.minus) return body(CodeMinus{}, 0.0f);
    if (quantized.zero) return body([](I code, F zero) { return sub(to_float(code), zero); }, 0.0f);
    Ramp ramp = ramp_of(level);
    if (ramp.count == 256) return body([](I code, F zero) { return sub(to_float(code), zero); }, -ramp.first);
    if (ramp.count > 0) {
        I last = set(ramp.count - 1);
        auto value = [=](I code, F zero) {
            return floats(select(greater(code, last), set(nan), bits(sub(to_float(code), zero))));
        };
        return body(value, -ramp.first);
    }
    if (at_most_16(level)) {
        F table = load_f32(level);
        auto value = [=](I code, F) {
            return floats(select(greater(code, set(15)), set(nan), bits(lookup16(table, code))));
        };
        return body(value, 0.0f);
    }
    body([=](I code, F) { return lookup256(level, code); }, 0.0f);
}

// body(at, count, value) for each run of dequantized float32 values; row_done after each row.
template <class Value, class Body, class RowDone>
void each_value(const Grid& grid, const Quantized& q, float offset, Value value, Body body, RowDone row_done) {
    int64_t across = blocks_across(grid);
    for (int64_t row = 0; row < grid.rows; row++) {
        int64_t at = row * grid.cols, block = row / grid.block_rows * across;
        RowParameter scales{q.scale + block, 1}, zeros{q.zero ? q.zero + block : nullptr, offset};
        each_run(grid, scales, zeros, [&](int64_t col, auto count, F s, F z) {
            body(at + col, count, scaled(value, load_codes(q.codes + at + col, count), z, s));
        });
        row_done();
    }
}

void dequantize(const Grid& grid, const Quantized& quantized, Output output) {
    auto to = static_cast<uint8_t*>(output.data);
    with_values(quantized, [&](auto value, float offset) {
        with_dtype(output.dtype, [&](auto type) {
            using T = decltype(type);
            auto store = [&](int64_t at, auto count, F x) { store_some<T>(to + at * T::size, x, count); };
            each_value(grid, quantized, offset, value, store, [] {});
        });
    });
}

template <class T, class Count>
F rounded_as(F x, Count count) {
    alignas(64) uint8_t room[16 * T::size];
    store_some<T>(room, x, count);
    return load_some<T>(room, count);
}

ErrorSums error(const Grid& grid, Weight weight, const Quantized& quantized) {
    auto from = static_cast<const uint8_t*>(weight.data);
    ErrorSums sums;
    F worst = set(0.0f);
    D of_error, of_weight;
    auto row_done = [&] {
        sums.squared_error += total(of_error), sums.squared_weight += total(of_weight);
        of_error = D{}, of_weight = D{};
    };
    with_values(quantized, [&](auto value, float offset) {
        with_dtype(weight.dtype, [&](auto type) {
            using T = decltype(type);
            auto measure = [&](int64_t at, auto count, F x) {
                F w = from ? load_some<T>(from + at * T::size, count) : rounded_as<T>(x, count);
                F e = first_lanes(sub(w, x), count);
                add_square(of_error, e), add_square(of_weight, first_lanes(w, count));
                worst = max(floats(both(bits(e), set(0x7fffffff))), worst);
            };
            each_value(grid, quantized, offset, value, measure, row_done);
        });
    });
    sums.max_error = greatest(worst);
    return sums;
}

void to_floats(Weight weight, int64_t count, float* out) {
    auto from = static_cast<const uint8_t*>(weight.data);
    with_dtype(weight.dtype, [&](auto type) {
        using T = decltype(type);
        auto take = [&](int64_t at, auto n) {
            store_some<F32>(reinterpret_cast<uint8_t*>(out + at), load_some<T>(from + at * T::size, n), n);
        };
        int64_t at = 0;
        for (; at + 16 <= count; at += 16) take(at, Full{});
        if (at < count) take(at, int(count - at));
    });
}

// ---- sweep ----

struct CodeAndValue {
    I code;
    F value;
};

template <class Encode>
void sweep_lanes(const Sweep& of, const Coder& coder, int64_t lane, Encode encode) {
    I least = set(coder.keep_zeros ? 1 : 0);
    for (int64_t j = 0; j < of.cols; j++) {
        int64_t at = j * of.lanes + lane;
        F weight = load_f32(of.weight + at), scale = load_f32(of.scale + at);
        M gone = greater(least, both(bits(weight), set(0x7fffffff)));
        F exact = floats(select(gone, set(0), bits(div(load_f32(of.target + at), scale))));
        auto [code, value] = encode(exact, of.zero ? load_f32(of.zero + at) : set(coder.offset));
        store_u8(of.codes + at, code);
        F error = sub(weight, mul(value, scale)), change = sub(error, load_f32(of.error + at));
        store_f32(of.error + at, error);
        const float* coupling = of.coupling + j * of.cols;
        for (int64_t k = j + 1; k < of.cols; k++) {
            float* target = of.target + k * of.lanes + lane;
            store_f32(target, add(load_f32(target), mul(set(coupling[k]), change)));
        }
    }
}

// Calls body(encode): encode(x, zero) gives code and value, both as far as the scale is left out.
template <class Body>
void with_encoder(const Coder& coder, Body body) {
    auto affine = [&](auto round) {
        body([&](F x, F z) {
            F code = min(max(round(x, z), set(0.0f)), set(coder.code_max));
            return CodeAndValue{to_int(code), sub(code, z)};
        });
    };
    if (coder.levels && coder.levels->count <= 16 && at_most_16(coder.level)) {
        F value = load_f32(coder.level);
        body([code_of = Lookup16(*coder.levels), value](F x, F) {
            I code = code_of(x);
            return CodeAndValue{code, lookup16(value, code)};
        });
    } else if (coder.levels) {
        body([code_of = Lookup256(*coder.levels), value = coder.level](F x, F) {
            I code = code_of(x);
            return CodeAndValue{code, lookup256(value, code)};
        });
    } else if (coder.rounding == Rounding::quotient) {
        affine([](F x, F z) { return add(rint(x), z); });
    } else {
        affine([](F x, F z) { return rint(add(x, z)); });
    }
}

void sweep(const Sweep& of, const Coder& coder) {
    with_encoder(coder, [&](auto encode) {
        for (int64_t lane = 0; lane < of.lanes; lane += 16) sweep_lanes(of, coder, lane, encode);
    });
}

// ---- errors of blocks ----

template <class Encode>
float squared_errors(const float* weight, const float* importance, int64_t count, F scale, F zero, Encode encode) {
    F sum = set(0.0f);
    auto take = [&](int64_t i, auto n) {
        F w = load_some<F32>(weight + i, n);
        F error = first_lanes(sub(mul(encode(div(w, scale), zero).value, scale), w), n);
        sum = fma(importance ? mul(error, load_some<F32>(importance + i, n)) : error, error, sum);
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) take(i, Full{});
    if (i < count) take(i, int(count - i));
    return sum_of(sum);
}

void block_errors(const Grid& grid, const float* weight, const float* scale, const float* zero, const Coder& coder,
                  const float* importance, float* out) {
    int64_t across = blocks_across(grid);
    with_encoder(coder, [&](auto encode) {
        for (int64_t row = 0; row < grid.rows; row++) {
            int64_t at = row / grid.block_rows * across;
            bool fresh = row % grid.block_rows == 0;
            for (int64_t i = 0, first = 0; i < across; i++, first += grid.block_cols) {
                F s = set(scale[at + i]), z = set(zero ? zero[at + i] : coder.offset);
                float sum = squared_errors(weight + row * grid.cols + first, importance ? importance + first : nullptr,
                                           smaller(grid.block_cols, grid.cols - first), s, z, encode);
                out[at + i] = fresh ? sum : out[at + i] + sum;
            }
        }
    });
}

// ---- pack ----

// Bytes that pack32 and unpack32 may touch from their start, though only 4 * bits count.
constexpr int reach(int width) { return 2 * width + 16; }

template <int width>
void pack_row(const uint8_t* codes, int64_t cols, uint8_t* to, int64_t size) {
    int64_t col = 0, at = 0;
    for (; col + 32 <= cols && at + reach(width) <= size; col += 32, at += 4 * width)
        pack32<width>(codes + col, to + at);
    for (; at < size; col += 32, at += 4 * width) {
        uint8_t some[32] = {}, packed[32];
        if (col < cols) __builtin_memcpy(some, codes + col, smaller(32, cols - col));
        pack32<width>(some, packed);
        __builtin_memcpy(to + at, packed, smaller(4 * width, size - at));
    }
}

template <int width>
void unpack_row(const uint8_t* from, int64_t cols, uint8_t* codes, int64_t size) {
    int64_t col = 0, at = 0;
    for (; col + 32 <= cols && at + reach(width) <= size; col += 32, at += 4 * width)
        unpack32<width>(from + at, codes + col);
    for (; col < cols; col += 32, at += 4 * width) {
        uint8_t some[32], packed[32] = {};
        __builtin_memcpy(packed, from + at, smaller(4 * width, size - at));
        unpack32<width>(packed, some);
        __builtin_memcpy(codes + col, some, smaller(32, cols - col));
    }
}

template <int bits>
struct Width {
    static constexpr int value = bits;
};

template <class Body>
void with_width(int bits, Body body) {
    switch (bits) {
        case 1: return body(Width<1>{});
        case 2: return body(Width<2>{});
        case 3: return body(Width<3>{});
        case 4: return body(Width<4>{});
        case 5: return body(Width<5>{});
        case 6: return body(Width<6>{});
        case 7: return body(Width<7>{});
    }
}

// Rows that end on a word are one stream.
void join_rows(int64_t& rows, int64_t& cols, int bits) {
    if (cols * bits % 32 == 0) cols *= rows, rows = rows != 0;
}

void pack_bits(const uint8_t* codes, int64_t rows, int64_t cols, int bits, void* words) {
    join_rows(rows, cols, bits);
    auto to = static_cast<uint8_t*>(words);
    int64_t size = 4 * words_per_row(cols, bits);
    for (int64_t row = 0; row < rows; row++, codes += cols, to += size) {
        with_width(bits, [&](auto width) { pack_row<width.value>(codes, cols, to, size); });
        if (bits == 8 && size > 0) __builtin_memcpy(to, codes, cols), __builtin_memset(to + cols, 0, size - cols);
    }
}

void unpack_bits(const void* words, int64_t rows, int64_t cols, int bits, uint8_t* codes) {
    join_rows(rows, cols, bits);
    auto from = static_cast<const uint8_t*>(words);
    int64_t size = 4 * words_per_row(cols, bits);
    for (int64_t row = 0; row < rows; row++, codes += cols, from += size) {
        with_width(bits, [&](auto width) { unpack_row<width.value>(from, cols, codes, size); });
        if (bits == 8 && size > 0) __builtin_memcpy(codes, from, cols);
    }
}

void transpose_words(const void* from, int64_t from_stride, int64_t rows, int64_t cols, void* to, int64_t to_stride) {
    auto source = [&](int64_t row, int64_t col) {
        return static_cast<const uint8_t*>(from) + 4 * (row * from_stride + col);
    };
    auto target = [&](int64_t row, int64_t col) { return static_cast<uint8_t*>(to) + 4 * (col * to_stride + row); };
    auto block = [&](int64_t row, int64_t col) {
        if (row + 8 <= rows && col + 8 <= cols) {
            transpose8(source(row, col), 4 * from_stride, target(row, col), 4 * to_stride);
            return;
        }
        for (int64_t r = row; r < smaller(row + 8, rows); r++)
            for (int64_t c = col; c < smaller(col + 8, cols); c++) __builtin_memcpy(target(r, c), source(r, c), 4);
    };
    // along the axis that is short, so that the long one is walked once
    bool tall = rows > cols;
    for (int64_t i = 0; i < (tall ? rows : cols); i += 8)
        for (int64_t j = 0; j < (tall ? cols : rows); j += 8) tall ? block(i, j) : block(j, i);
}

// ---- softmax ----

#include "softmax.h"

#include "attend.h"

// ---- llama.cpp's encoders ----

#include "ggml_encode.h"
#include "ggml_fit.h"
#include "ggml_grid_encode.h"
#include "runs.h"

// ---- and its blocks, as products read them ----

#include "ggml_panels.h"

}  // namespace

void LOWBIT_PRODUCT(const Product& of, int64_t first, int64_t last);  // compiled apart: product.h
extern const Kernels LOWBIT_TABLE;
const Kernels LOWBIT_TABLE{isa_name,   block_range, quantize_affine, quantize_levels, quantize_fp8,
                           dequantize, error,       to_floats,       sweep,           sweep_runs, block_errors, pack_bits,       unpack_bits,     transpose_words,
                           softmax,    softmax_slopes, encode_any, fit_any, put_any,         true, false,     LOWBIT_PRODUCT,
                           round_inputs, widen,     round_wide,      widen_panels,    attend,    keep,
                           gate};

}  // namespace lowbit
