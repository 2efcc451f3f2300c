// Products of a repacked weight with activations. Included by kernels.h. Sixteen rows are a panel, a lane each, so that
// a sum over columns stays in its lane and scales are loaded as they lie. A word of a lane holds four columns a byte
// apart, which is what one byte product with a broadcast of four inputs takes; narrower codes share the bytes, field by
// field. Thirty-two columns are a chunk: their words stand together, those of codes of 3, 5 and 6 bits as the lower 2 or
// 4 bits of all and then the bits above. What inner loops call is inlined, so that sums stay in registers.
#if defined(__AVX2__)
#define LOWBIT_INLINE [[gnu::always_inline]] inline
#else
#define LOWBIT_INLINE inline
#endif
template <int bits>
constexpr int lower = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;

// The bytes of a word that hold `bits` bits in field `field`, moved to bit `to` of their byte.
template <int bits, int field, int to = 0>
LOWBIT_INLINE I field_of(I word) {
    if constexpr (bits == 8) return word;
    constexpr int32_t mask = int32_t((((1u << bits) - 1) << to) * 0x01010101u);
    constexpr int right = bits * field - to;
    if constexpr (right > 0) return both(shift_right<right>(word), set(mask));
    else if constexpr (right < 0) return both(shift_left<-right>(word), set(mask));
    else return both(word, set(mask));
}

// The codes of columns 4 * quad to 4 * quad + 3 of a chunk.
template <int bits, int quad>
LOWBIT_INLINE I codes_of(const uint8_t* chunk) {
    constexpr int low = lower<bits>, high = bits - low;
    I code = field_of<low, quad % (8 / low)>(load_words(chunk + 64 * (quad / (8 / low))));
    if constexpr (high > 0) {
        I word = load_words(chunk + 64 * (low + quad / (8 / high)));
        code = either(code, field_of<high, quad % (8 / high), low>(word));
    }
    return code;
}

const uint8_t* codes_of_panel(const Product& of, int64_t panel) { return of.codes + panel * of.cols * of.bits * 2; }

// The scales of a panel, or its zero points; null has 0.
template <class T>
F scales_at(const Product& of, const void* scale, int64_t panel, int64_t group) {
    if (!scale) return set(0.0f);
    return T::load(static_cast<const uint8_t*>(scale) + (panel * (of.cols / of.over) + group) * 16 * T::size);
}

template <int n>
struct Count {
    static constexpr int value = n;
};

// body(token, Count) for `wide` tokens at a time, then for the rest one by one.
template <int wide, class Body>
void each_tile(int64_t first, int64_t last, Body body) {
    for (; first + wide <= last; first += wide) body(first, Count<wide>{});
    for (; first < last; first++) body(first, Count<1>{});
}

void store_rows(const Product& of, int64_t panel, int64_t token, F value) {
    store_some<F32>(of.out + token * of.rows + panel * 16, value, int(smaller(16, of.rows - panel * 16)));
}

int32_t four_bytes(const void* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return word;
}

// ---- integers: codes times inputs rounded to int8, exact but for the inputs' rounding ----

// Where bytes to multiply by come from: `at` gives those of a quad of a chunk, which are `most` at most.
template <int width>
struct Codes {
    static constexpr int bits = width, most = (1 << width) - 1;
    static constexpr bool is_signed = false;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return codes_of<bits, quad>(chunk);
    }
};
struct OffsetCodes {  // code - 128, for codes of 8 bits
    static constexpr int bits = 8, most = 128;
    static constexpr bool is_signed = true;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return differ(load_words(chunk + 64 * quad), set(int32_t(0x80808080)));
    }
};
template <int width>
struct TableCodes {
    static constexpr int bits = width, most = 128;
    static constexpr bool is_signed = true;
    I table;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return lookup_bytes(table, codes_of<bits, quad>(chunk));
    }
};
// What another source gave, written down a byte each.
template <class Source>
struct Unpacked {
    static constexpr int bits = 8, most = Source::most;
    static constexpr bool is_signed = Source::is_signed;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return load_words(chunk + 64 * quad);
    }
};

template <int quad, class Source>
LOWBIT_INLINE void unpack_quads(const Source& source, const uint8_t* chunk, uint8_t* bytes) {
    store_words(bytes + 64 * quad, source.template at<quad>(chunk));
    if constexpr (quad < 7) unpack_quads<quad + 1>(source, chunk, bytes);
}

// Inputs of some tokens at a column.
struct Row {
    const int8_t* first;
    int64_t stride;
    LOWBIT_INLINE I four(int token, int at) const { return set(four_bytes(first + token * stride + at)); }
};

template <int quad, int last, bool begins, class Source, int tokens>
LOWBIT_INLINE void sum_pairs(const Source& source, const uint8_t* chunk, const Row& input, I (&pairs)[tokens]) {
    I codes = source.template at<quad>(chunk);
    for (int t = 0; t < tokens; t++) {
        I inputs = input.four(t, 4 * quad);
        I found = Source::is_signed ? dot_signed(codes, inputs) : dot_bytes(codes, inputs);
        pairs[t] = begins ? found : add_pairs(pairs[t], found);
    }
    if constexpr (quad + 1 < last) sum_pairs<quad + 1, last, false>(source, chunk, input, pairs);
}

// Adds the quads from `quad` to before `last` of a chunk, times `factor` (its halves), to sums. Sums of pairs are added up
// in 16 bits as long as the greatest code lets them.
template <int quad, int last, class Source, int tokens>
LOWBIT_INLINE void add_quads(const Source& source, const uint8_t* chunk, const Row& input, I factor, I (&sum)[tokens]) {
    constexpr int fit = 32767 / (254 * Source::most), until = quad + fit < last ? quad + fit : last;
    I pairs[tokens];
    sum_pairs<quad, until, true>(source, chunk, input, pairs);
    for (int t = 0; t < tokens; t++) sum[t] = add(sum[t], dot_pairs(pairs[t], factor));
    if constexpr (until < last) add_quads<until, last>(source, chunk, input, factor, sum);
}

// Columns from `first` to before `last`, whole groups, of a panel; `codes` are those of the columns.
struct Span {
    int64_t panel, first, last;
    const uint8_t* codes;
};

// Scales as they are: each block of inputs that were rounded together is a sum of its own.
template <class T>
struct Plain {
    static int64_t least(const Product& of) { return of.step; }

    template <class Source, int tokens>
    LOWBIT_INLINE static void add_span(const Product& of, const Source& source, const Span& span, int64_t token, F (&total)[tokens]) {
        int64_t blocks = of.cols / of.sub;
        for (int64_t col = span.first; col < span.last; col += of.step) {
            F sum[tokens], all[tokens];
            for (int t = 0; t < tokens; t++) sum[t] = all[t] = set(0.0f);
            for (int64_t at = col; at < col + of.step; at += of.sub) {
                I dots[tokens];
                block(of, source, span, token, at, dots);
                for (int t = 0; t < tokens; t++) {
                    int64_t input = (token + t) * blocks + at / of.sub;
                    sum[t] = fma(to_float(dots[t]), set(of.input_scale[input]), sum[t]);
                    all[t] = add(all[t], set(of.input_sum[input]));
                }
            }
            group(of, span.panel, col / of.step, sum, all, total);
        }
    }

  private:
    template <class Source, int tokens>
    LOWBIT_INLINE static void block(const Product& of, const Source& source, const Span& span, int64_t token, int64_t col,
                      I (&dots)[tokens]) {
        int64_t chunk = col / 32 - span.first / 32;
        const uint8_t* codes = span.codes + chunk * 64 * Source::bits;
        Row input{of.rounded + token * of.cols + col / 32 * 32, of.cols};
        I one = set(0x00010001);
        for (int t = 0; t < tokens; t++) dots[t] = set(0);
        if (of.sub == 32) add_quads<0, 8>(source, codes, input, one, dots);
        else if (col % 32) add_quads<4, 8>(source, codes, input, one, dots);
        else add_quads<0, 4>(source, codes, input, one, dots);
    }

    template <int tokens>
    LOWBIT_INLINE static void group(const Product& of, int64_t panel, int64_t group, const F (&sum)[tokens], const F (&all)[tokens],
                      F (&total)[tokens]) {
        F s = scales_at<T>(of, of.scale.data, panel, group), z = scales_at<T>(of, of.zero, panel, group);
        F none = set(0.0f), shift = sub(none, of.minus ? set(of.offset) : add(z, set(of.offset)));
        for (int t = 0; t < tokens; t++) {
            total[t] = fma(fma(shift, all[t], sum[t]), s, total[t]);
            if (of.minus) total[t] = fma(sub(none, z), all[t], total[t]);
        }
    }
};

// Scales that are small integers times one of a longer run, which inputs are rounded by as well: integers up to its end.
template <class T>
struct Nested {
    static int64_t least(const Product& of) { return of.over; }

    template <class Source, int tokens>
    LOWBIT_INLINE static void add_span(const Product& of, const Source& source, const Span& span, int64_t token, F (&total)[tokens]) {
        int64_t runs = of.cols / of.over;
        for (int64_t col = span.first; col < span.last; col += of.over) {
            I sum[tokens], shift[tokens];
            for (int t = 0; t < tokens; t++) sum[t] = shift[t] = set(0);
            for (int64_t at = col; at < col + of.over; at += 2 * of.step) two_steps(of, source, span, token, at, sum, shift);
            int64_t run = col / of.over;
            F s = scales_at<T>(of, of.scale.data, span.panel, run), z = scales_at<T>(of, of.zero, span.panel, run);
            for (int t = 0; t < tokens; t++) {
                if (!of.zero) sum[t] = sub(sum[t], mul(shift[t], set(int32_t(of.offset))));
                F part = mul(to_float(sum[t]), s);
                if (of.zero) part = sub(part, mul(to_float(shift[t]), z));
                total[t] = fma(part, set(of.input_scale[(token + t) * runs + run]), total[t]);
            }
        }
    }

  private:
    template <class Source, int tokens>
    LOWBIT_INLINE static void two_steps(const Product& of, const Source& source, const Span& span, int64_t token, int64_t col,
                          I (&sum)[tokens], I (&shift)[tokens]) {
        int64_t steps = of.cols / of.step, pair = (span.panel * steps + col / of.step) * 16;
        I factor = load_pairs(of.fine + pair), low = factor;
        if (of.joined) {
            factor = both(low, set(0x000f000f)), low = both(shift_right<4>(low), set(0x000f000f));
        } else if (of.fine_zero) {
            low = load_pairs(of.fine_zero + pair);
        }
        const uint8_t* chunk = span.codes + (col / 32 - span.first / 32) * 64 * Source::bits;
        Row input{of.rounded + token * of.cols + col, of.cols};
        if (of.step == 32) {
            add_quads<0, 8>(source, chunk, input, twice<0>(factor), sum);
            input.first += 32;
            add_quads<0, 8>(source, chunk + 64 * Source::bits, input, twice<1>(factor), sum);
        } else {
            add_quads<0, 4>(source, chunk, input, twice<0>(factor), sum);
            add_quads<4, 8>(source, chunk, input, twice<1>(factor), sum);
        }
        if (!of.zero && of.offset == 0) return;
        for (int t = 0; t < tokens; t++)
            shift[t] = add(shift[t], dot_pairs(low, set(four_bytes(of.step_sum + (token + t) * steps + col / of.step))));
    }
};

// One token, or few: codes are unpacked on the way to each.
template <class Scales, class Source>
void few_tokens(const Product& of, const Source& source, int64_t panel) {
    each_tile<tile>(0, of.tokens, [&](int64_t token, auto count) {
        F total[count.value];
        for (F& each : total) each = set(0.0f);
        Scales::add_span(of, source, Span{panel, 0, of.cols, codes_of_panel(of, panel)}, token, total);
        for (int t = 0; t < count.value; t++) store_rows(of, panel, token + t, mul(total[t], set(of.unit)));
    });
}

// Many: some columns are unpacked for as many tokens as keep their sums in the nearest memory.
constexpr int64_t columns_at_once = 512, tokens_at_once = 64;

template <class Scales, class Source>
void many_tokens(const Product& of, const Source& source, int64_t panel, int64_t wide) {
    uint8_t bytes[16 * columns_at_once];
    float totals[tokens_at_once][16];
    for (int64_t token = 0; token < of.tokens; token += tokens_at_once) {
        int64_t count = smaller(tokens_at_once, of.tokens - token);
        for (int64_t t = 0; t < count; t++) store_f32(totals[t], set(0.0f));
        for (int64_t col = 0; col < of.cols; col += wide) {
            int64_t last = smaller(col + wide, of.cols);
            const uint8_t* codes = codes_of_panel(of, panel) + col / 32 * 64 * Source::bits;
            for (int64_t chunk = 0; chunk < (last - col) / 32; chunk++)
                unpack_quads<0>(source, codes + chunk * 64 * Source::bits, bytes + chunk * 512);
            each_tile<tile>(0, count, [&](int64_t t, auto some) {
                F total[some.value];
                for (int i = 0; i < some.value; i++) total[i] = load_f32(totals[t + i]);
                Scales::add_span(of, Unpacked<Source>{}, Span{panel, col, last, bytes}, token + t, total);
                for (int i = 0; i < some.value; i++) store_f32(totals[t + i], total[i]);
            });
        }
        for (int64_t t = 0; t < count; t++) store_rows(of, panel, token + t, mul(load_f32(totals[t]), set(of.unit)));
    }
}

template <class Scales, class Source>
void integer_panels(const Product& of, int64_t first, int64_t last, const Source& source) {
    int64_t least = Scales::least(of) % 32 ? 2 * Scales::least(of) : Scales::least(of);
    int64_t wide = columns_at_once / least * least;
    for (int64_t panel = first; panel < last; panel++) {
        if (of.tokens < 2 * tile || wide == 0) few_tokens<Scales>(of, source, panel);
        else many_tokens<Scales>(of, source, panel, wide);
    }
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
void each_byte(I codes, Level level, int column, Take take) {
    take(level(both(shift_right<8 * byte>(codes), set((1 << bits) - 1))), column + byte);
    if constexpr (byte < 3) each_byte<bits, byte + 1>(codes, level, column, take);
}

template <int bits, int quad, int last, class Level, class Take>
void each_column(const uint8_t* chunk, Level level, Take take) {
    each_byte<bits, 0>(codes_of<bits, quad>(chunk), level, 4 * quad, take);
    if constexpr (quad + 1 < last) each_column<bits, quad + 1, last>(chunk, level, take);
}

template <int bits, class T, int tokens, class Level>
void float_panel(const Product& of, int64_t panel, int64_t token, Level level) {
    F total[tokens];
    for (int t = 0; t < tokens; t++) total[t] = set(0.0f);
    for (int64_t group = 0; group < of.cols / of.step; group++) {
        F s = scales_at<T>(of, of.scale.data, panel, group), z = scales_at<T>(of, of.zero, panel, group);
        F sum[tokens], all[tokens];
        for (int t = 0; t < tokens; t++) sum[t] = all[t] = set(0.0f);
        for (int64_t col = group * of.step; col < (group + 1) * of.step; col += 16) {
            const float* input = of.input + token * of.cols + col / 32 * 32;
            auto take = [&](F value, int column) {
                F shifted = of.minus ? value : sub(value, z);
                for (int t = 0; t < tokens; t++) {
                    F each = set(input[t * of.cols + column]);
                    sum[t] = fma(shifted, each, sum[t]);
                    if (of.minus) all[t] = add(all[t], each);
                }
            };
            const uint8_t* chunk = codes_of_panel(of, panel) + col / 32 * 64 * bits;
            if (col % 32) each_column<bits, 4, 8>(chunk, level, take);
            else each_column<bits, 0, 4>(chunk, level, take);
        }
        for (int t = 0; t < tokens; t++) {
            total[t] = fma(sum[t], s, total[t]);
            if (of.minus) total[t] = fma(sub(set(0.0f), z), all[t], total[t]);
        }
    }
    for (int t = 0; t < tokens; t++) store_rows(of, panel, token + t, total[t]);
}

template <int bits, class T, class Level>
void float_panels(const Product& of, int64_t first, int64_t last, Level level) {
    for (int64_t panel = first; panel < last; panel++)
        each_tile<4>(0, of.tokens, [&](int64_t token, auto count) {
            float_panel<bits, T, count.value>(of, panel, token, level);
        });
}

// ---- weights that are floats themselves ----

template <class T, int tokens>
void dense_panel(const Product& of, int64_t panel, int64_t token) {
    const uint8_t* weight = of.codes + panel * of.cols * 16 * T::size;
    F total[2][tokens];  // two sums, so that an addition need not wait for the one before
    for (int t = 0; t < tokens; t++) total[0][t] = total[1][t] = set(0.0f);
    for (int64_t col = 0; col < of.cols; col += 2, weight += 32 * T::size) {
        F value[2] = {T::load(weight), T::load(weight + 16 * T::size)};
        for (int t = 0; t < tokens; t++) {
            const float* input = of.input + (token + t) * of.cols + col;
            for (int i = 0; i < 2; i++) total[i][t] = fma(value[i], set(input[i]), total[i][t]);
        }
    }
    for (int t = 0; t < tokens; t++) store_rows(of, panel, token + t, add(total[0][t], total[1][t]));
}

template <class T>
void dense_panels(const Product& of, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
        each_tile<tile - 1>(0, of.tokens, [&](int64_t token, auto count) {
            dense_panel<T, count.value>(of, panel, token);
        });
}

// ---- which of these ----

template <int bits, class T>
void code_panels(const Product& of, int64_t first, int64_t last) {
    auto integers = [&](const auto& source) {
        of.fine ? integer_panels<Nested<T>>(of, first, last, source) : integer_panels<Plain<T>>(of, first, last, source);
    };
    if constexpr (bits <= 4) {
        if (of.way == Way::floats) return float_panels<bits, T>(of, first, last, Level16{load_f32(of.level)});
        if (of.way == Way::table) return integers(TableCodes<bits>{table_of_bytes(of.table)});
    }
    if (of.way == Way::floats) return float_panels<bits, T>(of, first, last, Level256{of.level});
    if constexpr (bits < 8) {
        integers(Codes<bits>{});
    } else {
        Product centred = of;
        centred.offset -= 128;
        integer_panels<Plain<T>>(centred, first, last, OffsetCodes{});
    }
}

template <class Body>
void with_bits(int bits, Body body) {
    if (bits == 2) body(Count<2>{});
    if (bits == 3) body(Count<3>{});
    if (bits == 4) body(Count<4>{});
    if (bits == 5) body(Count<5>{});
    if (bits == 6) body(Count<6>{});
    if (bits == 8) body(Count<8>{});
}

void product(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::dense) {
        with_dtype(of.scale.dtype, [&](auto type) { dense_panels<decltype(type)>(of, first, last); });
        return;
    }
    with_bits(of.bits, [&](auto bits) {
        if (of.scale.dtype == Dtype::f16) code_panels<bits.value, F16>(of, first, last);
        else code_panels<bits.value, F32>(of, first, last);
    });
}

// ---- inputs as int8 ----

// A block of `sub` inputs; what a step of its integers is.
float round_block(int64_t sub, const float* input, int8_t* rounded) {
    F most = set(0.0f);
    for (int64_t i = 0; i < sub; i += 16) most = max(most, floats(both(bits(load_f32(input + i)), set(0x7fffffff))));
    float largest = greatest(most), up = largest > 1e-30f ? 127 / largest : 0;
    for (int64_t i = 0; i < sub; i += 16)
        store_u8(rounded + i, both(to_int(rint(mul(load_f32(input + i), set(up)))), set(0xff)));
    return largest / 127;
}

int32_t sum_of_bytes(int64_t count, const int8_t* bytes) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += bytes[i];
    return sum;
}

void round_inputs(const Rounded& of, const float* input, int8_t* rounded, float* scale, float* sum, int16_t* step_sum) {
    for (int64_t block = 0; block < of.count / of.sub; block++, input += of.sub, rounded += of.sub) {
        scale[block] = round_block(of.sub, input, rounded);
        if (!of.step) sum[block] = scale[block] * float(sum_of_bytes(of.sub, rounded));
        for (int64_t i = 0; of.step && i < of.sub / of.step; i++)
            *step_sum++ = int16_t(sum_of_bytes(of.step, rounded + i * of.step));
    }
}
