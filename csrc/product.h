// Products of a repacked weight with activations. Included by kernels.h.
//
// Sixteen rows are a panel, a lane each, so that a sum over columns stays in its lane and scales are loaded as they lie.
// A word of a lane holds four columns a byte apart, which is what one byte product with a broadcast of four inputs takes;
// narrower codes share the bytes, field by field.

// The words of four consecutive columns in field `field` of `bits` bits.
template <int bits, int field>
I field_of(I word) {
    if constexpr (bits == 8) return word;
    constexpr int32_t mask = int32_t(((1u << bits) - 1) * 0x01010101u);
    if constexpr (field == 0) return both(word, set(mask));
    else return both(shift_right<bits * field>(word), set(mask));
}

template <int bits, int field = 0, class Body>
void each_field(I word, Body body) {
    body(field_of<bits, field>(word), field);
    if constexpr ((field + 1) * bits < 8) each_field<bits, field + 1>(word, body);
}

template <int bits>
constexpr int columns_of_word = 32 / bits;

// Where the codes, scales and zero points of a panel are.
template <int bits, class T>
struct Panel {
    const uint8_t *codes, *scale, *zero;
    Panel(const Product& of, int64_t panel) {
        int64_t first = panel * (of.cols / of.step) * 16 * T::size;
        codes = of.codes + panel * (of.cols / columns_of_word<bits>) * 64;
        scale = static_cast<const uint8_t*>(of.scale.data) + first;
        zero = of.zero ? static_cast<const uint8_t*>(of.zero) + first : nullptr;
    }
    F scale_of(int64_t group) const { return T::load(scale + group * 16 * T::size); }
    F zero_of(int64_t group) const { return zero ? T::load(zero + group * 16 * T::size) : set(0.0f); }
};

template <int n>
struct Count {
    static constexpr int value = n;
};

// body(panel, token, Count) for `wide` tokens at a time, then for the rest one by one.
template <int wide, class Body>
void each_tile(const Product& of, int64_t first, int64_t last, Body body) {
    for (int64_t panel = first; panel < last; panel++) {
        int64_t token = 0;
        for (; token + wide <= of.tokens; token += wide) body(panel, token, Count<wide>{});
        for (; token < of.tokens; token++) body(panel, token, Count<1>{});
    }
}

void store_rows(const Product& of, int64_t panel, int64_t token, F value) {
    store_some<F32>(of.out + token * of.rows + panel * 16, value, int(smaller(16, of.rows - panel * 16)));
}

int32_t four_inputs(const int8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return word;
}

// ---- integers: codes times inputs rounded to int8, exact but for the inputs' rounding ----

struct UnsignedBytes {
    I operator()(I codes, I inputs) const { return dot_unsigned(codes, inputs); }
};
struct OffsetBytes {  // code - 128, for codes of 8 bits
    I operator()(I codes, I inputs) const { return dot_signed(differ(codes, set(int32_t(0x80808080))), inputs); }
};
struct TableBytes {
    I table;
    I operator()(I codes, I inputs) const { return dot_signed(lookup_bytes(table, codes), inputs); }
};

template <int bits, class T, int tokens, class Dot>
void integer_panel(const Product& of, int64_t panel, int64_t token, Dot dot, float offset) {
    constexpr int width = columns_of_word<bits>;
    int64_t blocks = of.cols / of.sub, per_scale = of.step / of.sub;
    Panel<bits, T> at_panel(of, panel);
    const uint8_t* codes = at_panel.codes;
    F total[tokens];
    for (int t = 0; t < tokens; t++) total[t] = set(0.0f);
    for (int64_t block = 0; block < blocks; block++) {
        I sum[tokens];
        for (int t = 0; t < tokens; t++) sum[t] = set(0);
        for (int64_t col = block * of.sub; col < (block + 1) * of.sub; col += width, codes += 64)
            each_field<bits>(load_words(codes), [&](I field, int at) {
                for (int t = 0; t < tokens; t++) {
                    const int8_t* input = of.rounded + (token + t) * of.cols + col + 4 * at;
                    sum[t] = add(sum[t], dot(field, set(four_inputs(input))));
                }
            });
        F s = at_panel.scale_of(block / per_scale), z = at_panel.zero_of(block / per_scale);
        for (int t = 0; t < tokens; t++) {
            int64_t at = (token + t) * blocks + block;
            F part = mul(to_float(sum[t]), set(of.input_scale[at])), all = set(of.input_sum[at]);
            F shift = of.minus ? set(offset) : add(z, set(offset));
            part = mul(sub(part, mul(shift, all)), s);
            total[t] = add(total[t], of.minus ? sub(part, mul(z, all)) : part);
        }
    }
    for (int t = 0; t < tokens; t++) store_rows(of, panel, token + t, mul(total[t], set(of.unit)));
}

template <int bits, class T, class Dot>
void integer_panels(const Product& of, int64_t first, int64_t last, Dot dot, float offset) {
    each_tile<4>(of, first, last, [&](int64_t panel, int64_t token, auto count) {
        integer_panel<bits, T, count.value>(of, panel, token, dot, offset);
    });
}

// ---- floats: what codes stand for times the inputs as they are ----

struct Level16 {
    F table;
    F operator()(I code) const { return lookup16(table, code); }
};
struct Level256 {
    const float* table;
    F operator()(I code) const { return lookup256(table, code); }
};

template <int bits, int byte, class Level, class Take>
void each_byte(I field, Level level, Take take) {
    take(level(both(shift_right<8 * byte>(field), set((1 << bits) - 1))), byte);
    if constexpr (byte < 3) each_byte<bits, byte + 1>(field, level, take);
}

template <int bits, class T, int tokens, class Level>
void float_panel(const Product& of, int64_t panel, int64_t token, Level level) {
    constexpr int width = columns_of_word<bits>;
    int64_t groups = of.cols / of.step;
    Panel<bits, T> at_panel(of, panel);
    const uint8_t* codes = at_panel.codes;
    F total[tokens];
    for (int t = 0; t < tokens; t++) total[t] = set(0.0f);
    for (int64_t group = 0; group < groups; group++) {
        F s = at_panel.scale_of(group), z = at_panel.zero_of(group);
        F sum[tokens], all[tokens];
        for (int t = 0; t < tokens; t++) sum[t] = all[t] = set(0.0f);
        for (int64_t col = group * of.step; col < (group + 1) * of.step; col += width, codes += 64)
            each_field<bits>(load_words(codes), [&](I field, int at) {
                each_byte<bits, 0>(field, level, [&](F value, int byte) {
                    F shifted = of.minus ? value : sub(value, z);
                    for (int t = 0; t < tokens; t++) {
                        F input = set(of.input[(token + t) * of.cols + col + 4 * at + byte]);
                        sum[t] = add(sum[t], mul(shifted, input));
                        if (of.minus) all[t] = add(all[t], input);
                    }
                });
            });
        for (int t = 0; t < tokens; t++) {
            F part = mul(sum[t], s);
            total[t] = add(total[t], of.minus ? sub(part, mul(z, all[t])) : part);
        }
    }
    for (int t = 0; t < tokens; t++) store_rows(of, panel, token + t, total[t]);
}

template <int bits, class T, class Level>
void float_panels(const Product& of, int64_t first, int64_t last, Level level) {
    each_tile<4>(of, first, last, [&](int64_t panel, int64_t token, auto count) {
        float_panel<bits, T, count.value>(of, panel, token, level);
    });
}

template <int bits, class T>
void code_panels(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::floats && bits < 8)
        float_panels<bits, T>(of, first, last, Level16{load_f32(of.level)});
    else if (of.way == Way::floats)
        float_panels<bits, T>(of, first, last, Level256{of.level});
    else if (of.way == Way::table && bits < 8)
        integer_panels<bits, T>(of, first, last, TableBytes{table_of_bytes(of.table)}, of.offset);
    else if (bits < 8)
        integer_panels<bits, T>(of, first, last, UnsignedBytes{}, of.offset);
    else
        integer_panels<bits, T>(of, first, last, OffsetBytes{}, of.offset - 128);
}

// ---- weights that are floats themselves ----

template <class T, int tokens>
void dense_panel(const Product& of, int64_t panel, int64_t token) {
    const uint8_t* weight = of.codes + panel * of.cols * 16 * T::size;
    F total[2][tokens];  // two sums, so that an addition need not wait for the one before
    for (int t = 0; t < tokens; t++) total[0][t] = total[1][t] = set(0.0f);
    for (int64_t col = 0; col < of.cols; col++, weight += 16 * T::size) {
        F value = T::load(weight);
        for (int t = 0; t < tokens; t++) {
            F& sum = total[col % 2][t];
            sum = add(sum, mul(value, set(of.input[(token + t) * of.cols + col])));
        }
    }
    for (int t = 0; t < tokens; t++) store_rows(of, panel, token + t, add(total[0][t], total[1][t]));
}

template <class T>
void dense_panels(const Product& of, int64_t first, int64_t last) {
    each_tile<2>(of, first, last, [&](int64_t panel, int64_t token, auto count) {
        dense_panel<T, count.value>(of, panel, token);
    });
}

void product(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::dense) {
        with_dtype(of.scale.dtype, [&](auto type) { dense_panels<decltype(type)>(of, first, last); });
        return;
    }
    auto run = [&](auto type) {
        using T = decltype(type);
        if (of.bits == 2) code_panels<2, T>(of, first, last);
        if (of.bits == 4) code_panels<4, T>(of, first, last);
        if (of.bits == 8) code_panels<8, T>(of, first, last);
    };
    of.scale.dtype == Dtype::f16 ? run(F16{}) : run(F32{});
}

// Inputs as int8 in blocks of `sub`: rounded, the scale of each block, and scale times the sum of a block.
void round_inputs(int64_t count, int64_t sub, const float* input, int8_t* rounded, float* scale, float* sum) {
    for (int64_t block = 0; block < count / sub; block++, input += sub, rounded += sub) {
        F most = set(0.0f);
        for (int64_t i = 0; i < sub; i += 16)
            most = max(most, floats(both(bits(load_f32(input + i)), set(0x7fffffff))));
        float largest = greatest(most), up = largest > 1e-30f ? 127 / largest : 0;
        I total = set(0);
        for (int64_t i = 0; i < sub; i += 16) {
            I value = to_int(rint(mul(load_f32(input + i), set(up))));
            total = add(total, value);
            store_u8(rounded + i, both(value, set(0xff)));
        }
        scale[block] = largest / 127;
        sum[block] = largest / 127 * sum_of(to_float(total));
    }
}
