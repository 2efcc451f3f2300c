// Products of a repacked weight with activations, for one instruction set: LOWBIT_SIMD is the header with its lanes, and
// LOWBIT_PRODUCT the name. Sixteen rows are a panel, a lane each, so that a sum over columns stays in its lane and scales
// are loaded as they lie. A word of a lane holds four columns a byte apart, which is what one byte product with a
// broadcast of four inputs takes; narrower codes share the bytes, field by field. Thirty-two columns are a chunk: their
// words stand together, those of codes of 3, 5 and 6 bits as the lower 2 or 4 bits of all and then the bits above.
//
// Templates are what the innermost loop differs in: where codes come from, and how many tokens it takes. What there is
// once per block of columns (types, steps, kinds of zero) is asked there. What inner loops call is inlined, so that sums
// stay in registers.
#include "lowbit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if (defined(__AVX2__) || defined(LOWBIT_NEON)) && !defined(__SANITIZE_ADDRESS__)
#define LOWBIT_INLINE [[gnu::always_inline]] inline
#else
#define LOWBIT_INLINE inline
#endif

// Before a loop over the tokens of a tile, so that what it keeps of each is a register.
#define LOWBIT_EACH_TOKEN _Pragma("GCC unroll 16")

namespace lowbit {
namespace {

#include "lanes.h"

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
    constexpr int low = lower_bits(bits), high = bits - low;
    I code = field_of<low, quad % (8 / low)>(load_words(chunk + 64 * (quad / (8 / low))));
    if constexpr (high > 0) {
        I word = load_words(chunk + 64 * (low + quad / (8 / high)));
        code = either(code, field_of<high, quad % (8 / high), low>(word));
    }
    return code;
}

// Scales, or zero points, of a group; groups of all panels are counted. Null has 0.
LOWBIT_INLINE F scales_at(const Product& of, const void* scale, int64_t group) {
    if (!scale) return set(0.0f);
    if (of.scale.dtype == Dtype::f16) return load_f16(static_cast<const uint8_t*>(scale) + 32 * group);
    return load_f32(static_cast<const uint8_t*>(scale) + 64 * group);
}

void store_rows(const Product& of, int64_t panel, int64_t token, F value) {
    float* to = of.out + token * of.rows + panel * 16;
    int64_t there = of.rows - panel * 16;
    there < 16 ? store_some<F32>(to, value, int(there)) : store_f32(to, value);
}

// While there is something else to do: rows of tokens are far apart.
void store_tokens(const Product& of, int64_t panel, int64_t first, int64_t count, const F* total) {
    for (int64_t t = 0; t < count; t++) store_rows(of, panel, first + t, mul(total[t], set(of.unit)));
}

constexpr int64_t ahead = 4096;  // bytes before they are needed, at which codes are asked for

const Word& word_at(const void* from) { return *static_cast<const Word*>(from); }
int32_t four_bytes(const void* from) { return word_at(from).all; }

// `add_dot` with the same word in all lanes, which some instruction sets take from memory.
template <class Lanes>
LOWBIT_INLINE Lanes add_dot_word(Lanes sum, Lanes codes, const Word& inputs) {
    if constexpr (requires { add_dot(sum, codes, inputs); }) return add_dot(sum, codes, inputs);
    else return add_dot(sum, codes, set(inputs.all));
}

// ---- integers: codes times inputs rounded to int8, exact but for the inputs' rounding ----

// Where bytes to multiply by come from: `at` gives those of a quad of a chunk, which are `most` at most and `above` what
// they stand for. Where four products of unsigned bytes are added at once (`unsigned_dots`) none is signed.
template <int width>
struct Codes {
    static constexpr int bits = width, most = (1 << width) - 1, above = 0;
    static constexpr bool is_signed = false, near = false;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return codes_of<bits, quad>(chunk);
    }
};
struct OffsetCodes {  // code - 128, for codes of 8 bits
    static constexpr int bits = 8, most = 128, above = -128;
    static constexpr bool is_signed = true, near = false;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return differ(load_words(chunk + 64 * quad), set(int32_t(0x80808080)));
    }
};
struct TableCodes {
    static constexpr int bits = 4, most = unsigned_dots ? 255 : 128, above = unsigned_dots ? 128 : 0;
    static constexpr bool is_signed = !unsigned_dots, near = false;
    I table;
    explicit TableCodes(const int8_t* from) : table(table_of_bytes(from)) {
        if constexpr (unsigned_dots) table = differ(table, set(int32_t(0x80808080)));
    }
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return lookup_bytes(table, codes_of<bits, quad>(chunk));
    }
};
// What another source gave, written down a byte each.
template <int greatest, int too_much, bool negative>
struct Unpacked {
    static constexpr int bits = 8, most = greatest, above = too_much;
    static constexpr bool is_signed = negative, near = true;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return load_words(chunk + 64 * quad);
    }
};

// What the weight itself is of nested scales, less a code's offset, so that nothing is to be taken out of sums but what
// inputs are above (`lifts`), which is known of the weight alone. Where all products with the integers of steps fit a byte,
// these are in it, times -1 (`products`).
template <bool products>
struct Signed {
    static constexpr int bits = 8, most = 255, above = 0;
    static constexpr bool is_signed = true, near = true;
    template <int quad>
    LOWBIT_INLINE I at(const uint8_t* chunk) const {
        return load_words(chunk + 64 * quad);
    }
};
template <class Source>
constexpr bool lifted = false;
template <bool products>
constexpr bool lifted<Signed<products>> = true;
template <class Source>
constexpr bool folded = false;
template <>
constexpr bool folded<Signed<true>> = true;

// How many quads fit into sums of 16 bits.
template <class Source>
constexpr int fit = 32767 / (254 * Source::most);

// Inputs of a token, or of a tile of tokens that lie four beside each other.
template <int tokens>
struct Row {
    static constexpr int beside = tokens == 1 ? 1 : 4;
    const int8_t* at[tokens / beside];
    Row(const Product& of, const int64_t (&token)[tokens]) {
        for (int i = 0; i < tokens; i += beside) at[i / beside] = of.rounded + token[i] / beside * beside * of.cols;
    }
    LOWBIT_INLINE const Word& word(int token, int64_t column) const {
        return word_at(at[token / beside] + beside * column + 4 * (token % beside));
    }
    LOWBIT_INLINE I four(int token, int64_t column) const { return set(word(token, column).all); }
};

template <int tokens>
LOWBIT_INLINE void clear(I (&sums)[tokens]) {
    LOWBIT_EACH_TOKEN
    for (int t = 0; t < tokens; t++) sums[t] = set(0);
}

template <class Source>
LOWBIT_INLINE I product(I codes, I inputs) {
    return Source::is_signed ? dot_signed(codes, inputs) : dot_bytes(codes, inputs);
}

// Adds the products of the quads from `quad` to before `last`, two sums of 16 bits in each lane.
template <int quad, int last, class Source, int tokens>
LOWBIT_INLINE void add_products(const Source& source, const uint8_t* chunk, const Row<tokens>& input, int64_t col,
                                I (&pairs)[tokens]) {
    I codes = source.template at<quad>(chunk);
    LOWBIT_EACH_TOKEN
    for (int t = 0; t < tokens; t++) {
        pairs[t] = add_pairs(pairs[t], product<Source>(codes, input.four(t, col + 4 * quad)));
        keep(pairs[t]);
    }
    if constexpr (quad + 1 < last) add_products<quad + 1, last>(source, chunk, input, col, pairs);
}

// Adds these to sums of 32 bits, times `factor` (both halves of it). Where one or two quads fit, token by token.
template <int quad, int last, class Source, int tokens>
LOWBIT_INLINE void add_paired(const Source& source, const uint8_t* chunk, const Row<tokens>& input, int64_t col, I factor,
                              I (&sum)[tokens]) {
    constexpr int until = quad + fit<Source> < last ? quad + fit<Source> : last;
    if constexpr (fit<Source> <= 2) {
        I first = source.template at<quad>(chunk), second = source.template at<until - 1>(chunk);
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            I pairs = product<Source>(first, input.four(t, col + 4 * quad));
            if constexpr (until - quad == 2) pairs = add_pairs(pairs, product<Source>(second, input.four(t, col + 4 * quad + 4)));
            sum[t] = add_dot_pairs(sum[t], pairs, factor);
            keep(sum[t]);
        }
    } else {
        I pairs[tokens];
        clear(pairs);
        add_products<quad, until>(source, chunk, input, col, pairs);
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) sum[t] = add_dot_pairs(sum[t], pairs[t], factor);
    }
    if constexpr (until < last) add_paired<until, last>(source, chunk, input, col, factor, sum);
}

// The same as sums of 32 bits.
template <int quad, int last, class Source, int tokens>
LOWBIT_INLINE void add_dots(const Source& source, const uint8_t* chunk, const Row<tokens>& input, int64_t col,
                            I (&sum)[tokens]) {
    I codes = source.template at<quad>(chunk);
    LOWBIT_EACH_TOKEN
    for (int t = 0; t < tokens; t++) {
        if constexpr (lifted<Source> && unsigned_dots) sum[t] = add_dot(sum[t], input.four(t, col + 4 * quad), codes);
        else sum[t] = add_dot_word(sum[t], codes, input.word(t, col + 4 * quad));
        if constexpr (tokens > 1) keep(sum[t]);
    }
    if constexpr (quad + 1 < last) add_dots<quad + 1, last>(source, chunk, input, col, sum);
}

// Whether sums of four quads are 16 bits long, and multiplied and added at once (VNNI, whose byte products are unsigned too).
template <class Source>
constexpr bool joins = unsigned_dots && 4 * 508 * Source::most <= 32767;

// Adds the quads from `quad` to before `last` to sums of 32 bits, times `factor`, which is 1 where `plain` is set.
template <int quad, int last, bool plain, class Source, int tokens>
LOWBIT_INLINE void add_quads(const Source& source, const uint8_t* chunk, const Row<tokens>& input, int64_t col, I factor,
                             I (&sum)[tokens]) {
    constexpr int until = quad + 4;  // of a part that `joins`
    if constexpr (!whole_dots) {
        add_paired<quad, last>(source, chunk, input, col, factor, sum);
    } else if constexpr (plain && tokens > 1) {
        add_dots<quad, last>(source, chunk, input, col, sum);
    } else if constexpr (!plain && joins<Source> && until < last) {
        add_quads<quad, until, plain>(source, chunk, input, col, factor, sum);
        add_quads<until, last, plain>(source, chunk, input, col, factor, sum);
    } else {  // a sum of one token would wait for itself all along
        I part[tokens];
        clear(part);
        add_dots<quad, last>(source, chunk, input, col, part);
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            if constexpr (plain) sum[t] = add(sum[t], part[t]);
            else if constexpr (joins<Source>) sum[t] = add_dot_pairs(sum[t], part[t], factor);
            else sum[t] = add(sum[t], mul(part[t], factor));
        }
    }
}

// One of the two factors in each lane, as `add_quads` takes it.
template <class Source>
LOWBIT_INLINE I factor_of(I pairs, int which) {
    if constexpr (joins<Source>) return which ? shift_right<16>(pairs) : both(pairs, set(0xffff));
    else if constexpr (whole_dots) return dot_pairs(pairs, set(which ? 0x00010000 : 1));
    else return twice(pairs, which);
}

// Asks for lines of 64 bytes which are read soon; by itself a processor looks ahead within a page of 4 KiB.
template <int lines>
LOWBIT_INLINE void ask_for(const uint8_t* from) {
    for (int i = 0; i < lines; i++) __builtin_prefetch(from + ahead + 64 * i);
}

// Columns from `first` to before `last` of a panel; `codes` are those of the columns. Of lifted ones `begin` [runs, 16] is
// what sums start with.
struct Span {
    int64_t panel, first, last;
    const uint8_t* codes;
    const int32_t* begin = nullptr;
};

// Sums of some tokens: of what is done, and of the group that is open, without its scale; and the sum of its inputs.
struct Sums {
    F *total, *open, *inputs;
};

// Scales as they are: each block of inputs that were rounded together is a sum of its own.
template <int tokens>
struct Plain {
    const Product& of;
    const int64_t (&token)[tokens];
    const Sums& sums;

    template <class Source>
    LOWBIT_INLINE void add_span(const Source& source, const Span& span, const Row<tokens>& input) {
        Place at(*this, span, int32_t(of.offset) + Source::above);
        const int64_t sub = of.sub;
        const uint8_t* chunk = span.codes;
        I dots[tokens], one = set(0x00010001);
        clear(dots);
        for (int64_t col = span.first; col < span.last; col += 32, chunk += 64 * Source::bits) {
            if constexpr (!Source::near) ask_for<Source::bits>(chunk);
            if (sub < 32) {
                add_quads<0, 4, true>(source, chunk, input, col, one, dots);
                end_block(at, dots);
                add_quads<4, 8, true>(source, chunk, input, col, one, dots);
            } else {
                add_quads<0, 8, true>(source, chunk, input, col, one, dots);
            }
            if (!((col + 32) & (sub - 1))) end_block(at, dots);
        }
    }

  private:
    // Where a span has come to. What `of` says is kept here, since it would be read again after each sum that is stored.
    struct Place {
        const float* scale[tokens];
        const int16_t* sum[tokens];
        int64_t block, group, left, sub, step;
        int32_t offset;  // of bytes above what they stand for
        const void* zero;

        LOWBIT_INLINE Place(const Plain& all, const Span& span, int32_t above)
            : block(0), group((span.panel * all.of.cols + span.first) / all.of.step),
              left(all.of.step - span.first % all.of.step), sub(all.of.sub), step(all.of.step), offset(above),
              zero(all.of.zero) {
            for (int t = 0; t < tokens; t++) {
                int64_t first = (all.token[t] * all.of.cols + span.first) / sub;
                scale[t] = all.of.input_scale + first, sum[t] = all.of.step_sum + first;
            }
        }
    };

    // A code's offset is taken out while sums are integers.
    LOWBIT_INLINE void end_block(Place& at, I (&dots)[tokens]) const {
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            if (at.offset) dots[t] = sub(dots[t], set(at.offset * at.sum[t][at.block]));
            sums.open[t] = fma(to_float(dots[t]), set(at.scale[t][at.block]), sums.open[t]);
            dots[t] = set(0);
            if (at.zero) sums.inputs[t] = add(sums.inputs[t], set(at.scale[t][at.block] * float(at.sum[t][at.block])));
        }
        at.block++, at.left -= at.sub;
        if (at.left == 0) end_group(at);
    }
    LOWBIT_INLINE void end_group(Place& at) const {
        F scale = scales_at(of, of.scale.data, at.group), none = set(0.0f);
        F zero = at.zero ? sub(none, scales_at(of, at.zero, at.group)) : none;
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            F open = sums.open[t], total = sums.total[t];
            if (at.zero && !of.minus) open = fma(zero, sums.inputs[t], open);
            total = fma(open, scale, total);
            if (at.zero && of.minus) total = fma(zero, sums.inputs[t], total);
            sums.total[t] = total;
            sums.open[t] = none;
            sums.inputs[t] = none;
        }
        at.group++, at.left = at.step;
    }
};

// Inputs rounded in blocks of 32, as most are: what `Plain` does for a chunk at a time, and nothing stays open.
template <int tokens>
struct Chunks {
    const Product& of;
    const int64_t (&token)[tokens];
    const Sums& sums;

    static bool fits(const Product& of) { return of.sub == 32 && of.step % 32 == 0; }

    template <class Source>
    LOWBIT_INLINE void add_span(const Source& source, const Span& span, const Row<tokens>& input) {
        const int64_t step = of.step, at = span.panel * of.cols + span.first;
        int64_t group = at / step, left = step - at % step;
        const uint8_t* chunk = span.codes;
        F total[tokens];
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) total[t] = sums.total[t];
        for (int64_t first = span.first; first < span.last; first += 32 * most) {
            const int64_t count = smaller(span.last - first, 32 * most) / 32;
            Beside beside[tokens];
            for (int t = 0; t < tokens; t++) fill(beside[t], token[t], first / 32, int32_t(of.offset) + Source::above);
            for (int64_t i = 0; i < count; i++, chunk += 64 * Source::bits) {
                if constexpr (!Source::near) ask_for<Source::bits>(chunk);
                I dots[tokens];
                LOWBIT_EACH_TOKEN
                for (int t = 0; t < tokens; t++) dots[t] = set(beside[t].less[i]);
                add_quads<0, 8, true>(source, chunk, input, first + 32 * i, set(0x00010001), dots);
                end_chunk(group, i, beside, dots, total);
                if ((left -= 32) == 0) group++, left = step;
            }
        }
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) sums.total[t] = total[t];
    }

  private:
    static constexpr int64_t most = 16;  // chunks for which this is made ready at once, a lane each

    // What there is of an input's block beside its integers: its scale, its sum (where zeros need it), and the integer
    // at which a sum of products starts, so that a code's offset is out of it.
    struct Beside {
        float scale[most], inputs[most];
        int32_t less[most];
    };
    LOWBIT_INLINE void fill(Beside& to, int64_t token, int64_t block, int32_t offset) const {
        block += token * (of.cols / 32);
        const F scale = load_f32(of.input_scale + block);
        const I sum = shift_right_signed<16>(shift_left<16>(load_u16(of.step_sum + block)));
        store_f32(to.scale, scale);
        store_words(to.less, mul(sum, set(-offset)));
        if (of.zero) store_f32(to.inputs, mul(scale, to_float(sum)));
    }
    LOWBIT_INLINE void end_chunk(int64_t group, int64_t i, const Beside (&beside)[tokens], const I (&dots)[tokens],
                                F (&total)[tokens]) const {
        F scale = scales_at(of, of.scale.data, group);
        if (!of.zero) {
            LOWBIT_EACH_TOKEN
            for (int t = 0; t < tokens; t++)
                total[t] = fma(mul(to_float(dots[t]), set(beside[t].scale[i])), scale, total[t]);
            return;
        }
        F zero = scales_at(of, of.zero, group);
        const bool minus = of.minus;
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            F part = mul(to_float(dots[t]), set(beside[t].scale[i])), less = mul(zero, set(beside[t].inputs[i]));
            if (!minus) part = sub(part, less);
            total[t] = fma(part, scale, total[t]);
            if (minus) total[t] = sub(total[t], less);
        }
    }
};

// The integers of two steps.
LOWBIT_INLINE I factors_at(const Product& of, const int8_t* fine) {
    return of.joined ? both(load_pairs(fine), set(0x000f000f)) : load_pairs(fine);
}

// Scales that are small integers times one of a longer run, which inputs are rounded by as well: integers up to its end.
template <int tokens>
struct Nested {
    const Product& of;
    const int64_t (&token)[tokens];
    const Sums& sums;

    template <class Source>
    LOWBIT_INLINE void add_span(const Source& source, const Span& span, const Row<tokens>& input) {
        of.zero ? add_runs<true>(source, span, input) : add_runs<false>(source, span, input);
    }

  private:
    static constexpr int beside = Row<tokens>::beside;

    // Where a span has come to; of the inputs, the sums of their steps and the scales of their runs.
    struct Place {
        int64_t run, step, steps, done = 0;  // of all panels; steps of a run; and runs of the span
        const int16_t* sum[tokens / beside];
        const float* scale[tokens / beside];

        LOWBIT_INLINE Place(const Nested& all, const Span& span) {
            const Product& of = all.of;
            const int wide = of.step == 32 ? 5 : 4;
            const int64_t runs = of.cols / of.over, first_run = span.first / of.over;
            steps = of.over >> wide, run = span.panel * runs + first_run, step = run * steps;
            for (int i = 0; i < tokens; i += beside) {
                const int64_t at = all.token[i] / beside * runs + first_run;
                sum[i / beside] = of.step_sum + beside * at * steps, scale[i / beside] = of.input_scale + beside * at;
            }
        }
        LOWBIT_INLINE void next() {
            run++, step += steps, done++;
            for (int i = 0; i < tokens / beside; i++) sum[i] += beside * steps, scale[i] += beside;
        }
    };

    template <bool zeros, class Source>
    LOWBIT_INLINE void add_runs(const Source& source, const Span& span, const Row<tokens>& input) {
        const int64_t over = of.over, wide = 2 * of.step;
        const uint8_t* chunk = span.codes;
        Place at(*this, span);
        const int8_t* fine = of.fine + at.step * 16;
        I dots[tokens], shift[tokens];
        for (int64_t col = span.first; col < span.last; at.next()) {
            begin_run<zeros, Source>(at, span, dots, shift);
            if constexpr (folded<Source>) {
                for (int64_t end = col + over; col < end; col += 32, chunk += 512)
                    add_dots<0, 8>(source, chunk, input, col, dots);
                end_run<zeros, true>(at, dots, shift);
                continue;
            }
            for (int64_t end = col + over; col < end; col += wide, fine += 32) {
                I factor = factors_at(of, fine);
                if (wide == 32) {
                    if constexpr (!Source::near) ask_for<Source::bits>(chunk);
                    add_quads<0, 4, false>(source, chunk, input, col, factor_of<Source>(factor, 0), dots);
                    add_quads<4, 8, false>(source, chunk, input, col, factor_of<Source>(factor, 1), dots);
                    chunk += 64 * Source::bits;
                    continue;
                }
                for (int64_t half = 0; half < 64; half += 32, chunk += 64 * Source::bits, factor = shift_right<16>(factor)) {
                    if constexpr (!Source::near) ask_for<Source::bits>(chunk);
                    add_quads<0, 8, false>(source, chunk, input, col + half, factor_of<Source>(factor, 0), dots);
                }
            }
            end_run<zeros, false>(at, dots, shift);
        }
    }

    LOWBIT_INLINE I zeros_at(int64_t step) const {
        if (of.joined) return both(shift_right<4>(load_pairs(of.fine + 16 * step)), set(0x000f000f));
        return load_pairs(of.fine_zero + 16 * step);
    }

    // What zeros make of the steps of a run (`shift`), and what sums begin with, so that offsets are out of them.
    template <bool zeros, class Source>
    LOWBIT_INLINE void begin_run(const Place& at, const Span& span, I (&dots)[tokens], I (&shift)[tokens]) const {
        const int32_t offset = lifted<Source> ? 0 : zeros ? Source::above : Source::above + int32_t(of.offset);
        const I begin = lifted<Source> ? load_words(span.begin + 16 * at.done) : set(0);
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) dots[t] = begin;
        if (offset != 0) {
            const I less = twice(set(-offset), 0);  // 16 bits hold its products with bytes
            add_steps(at, [&](int64_t step) { return mul_pairs(factors_at(of, of.fine + 16 * step), less); }, dots);
        }
        if constexpr (!zeros) return;
        clear(shift);
        add_steps(at, [&](int64_t step) { return zeros_at(step); }, shift);
    }
    // Adds the sums of the inputs of a run's steps times integers, of which `pairs` gives two steps.
    template <class Pairs>
    LOWBIT_INLINE void add_steps(const Place& at, const Pairs& pairs, I (&sum)[tokens]) const {
        for (int64_t i = 0; i < at.steps; i += 2) {
            const I two = pairs(at.step + i);
            LOWBIT_EACH_TOKEN
            for (int t = 0; t < tokens; t++)
                sum[t] = add_dot_pairs(sum[t], two, set(four_bytes(at.sum[t / beside] + beside * i + 2 * (t % beside))));
        }
    }
    template <bool zeros, bool turned>
    LOWBIT_INLINE void end_run(const Place& at, const I (&dots)[tokens], const I (&shift)[tokens]) const {
        F scale = scales_at(of, of.scale.data, at.run), zero = scale, part[tokens];
        if constexpr (turned) scale = sub(set(0.0f), scale);
        if constexpr (zeros) zero = scales_at(of, of.zero, at.run);
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) {
            part[t] = mul(to_float(dots[t]), scale);
            if constexpr (zeros) part[t] = sub(part[t], mul(to_float(shift[t]), zero));
            part[t] = fma(part[t], set(at.scale[t / beside][t % beside]), sums.total[t]);
        }
        LOWBIT_EACH_TOKEN
        for (int t = 0; t < tokens; t++) sums.total[t] = part[t];
        if constexpr (!turned) asm volatile("" : : : "memory");  // else they take registers that are missed until the next end
    }
};

template <template <int> class Scales, class Source, int tokens>
LOWBIT_INLINE void add_span(const Product& of, const Source& source, const Span& span, const int64_t (&token)[tokens],
                            const Sums& sums) {
    Scales<tokens>{of, token, sums}.add_span(source, span, Row<tokens>(of, token));
}

const uint8_t* codes_of_panel(const Product& of, int64_t panel) { return of.codes + panel * of.cols * of.bits * 2; }

// One token: codes are unpacked on the way.
template <template <int> class Scales, class Source>
void one_token(const Product& of, const Source& source, int64_t first, int64_t last) {
    constexpr int64_t token[1] = {0};
    for (int64_t panel = first; panel < last; panel++) {
        F total = set(0.0f), open = total, inputs = total;
        add_span<Scales>(of, source, Span{panel, 0, of.cols, codes_of_panel(of, panel)}, token, {&total, &open, &inputs});
        store_rows(of, panel, 0, mul(total, set(of.unit)));
    }
}

// Many: some columns are unpacked for as many tokens as keep their sums near. Tokens that fill no tile are a smaller one.
constexpr int few = smaller(tile, 4);
constexpr int64_t columns_at_once = 1024, tokens_at_once = tile * ((256 + tile - 1) / tile);

struct Near {
    F total[tokens_at_once], open[tokens_at_once], inputs[tokens_at_once];

    // Those of a tile from `token` on.
    Sums from(int64_t token) { return {total + token, open + token, inputs + token}; }
};
LOWBIT_INLINE void clear(const Sums& sums) {
    F none = set(0.0f);
    LOWBIT_EACH_TOKEN
    for (int t = 0; t < tile; t++) sums.total[t] = sums.open[t] = sums.inputs[t] = none;
}

template <int quad = 0, class Source>
LOWBIT_INLINE void unpack_quads(const Source& source, const uint8_t* chunk, uint8_t* bytes) {
    store_words(bytes + 64 * quad, source.template at<quad>(chunk));
    if constexpr (quad < 7) unpack_quads<quad + 1>(source, chunk, bytes);
}
template <class Source>
void unpack(const Source& source, const uint8_t* codes, int64_t chunks, uint8_t* bytes) {
    for (int64_t i = 0; i < chunks; i++) unpack_quads(source, codes + i * 64 * Source::bits, bytes + i * 512);
}

// A tile of tokens, of which `count` are there: others repeat the last.
template <template <int> class Scales, class Source, int tokens>
void add_tile(const Product& of, const Span& span, int64_t first, int64_t count, const Sums& sums) {
    int64_t token[tokens];
    for (int t = 0; t < tokens; t++) token[t] = first + smaller(t, count - 1);
    add_span<Scales>(of, Source{}, span, token, sums);
}

using Tile = void (*)(const Product&, const Span&, int64_t, int64_t, const Sums&);

template <class Source, int tokens>
Tile tile_of(const Product& of) {
    constexpr int most = Source::most <= 15 ? 15 : whole_dots ? 255 : Source::is_signed ? 128 : Source::most;
    using Written = Unpacked<most, Source::above, Source::is_signed>;
    if (of.fine) return add_tile<Nested, Written, tokens>;
    return Chunks<1>::fits(of) ? add_tile<Chunks, Written, tokens> : add_tile<Plain, Written, tokens>;
}

// Asks for a part of what lies behind, with each tile, so that it is near (3: nearest) when it is read. Where tiles are
// few there is more than a tile has time for: a processor looks ahead by itself.
template <int near>
LOWBIT_INLINE void ask_for_next(const uint8_t* from, int64_t bytes, int64_t token, int64_t tokens) {
    const int64_t tiles = (tokens + tile - 1) / tile, part = smaller((bytes / 64 + tiles - 1) / tiles, 2 * tile);
    for (int64_t i = 0; i < part; i++) __builtin_prefetch(from + 64 * (token / tile * part + i), 0, near);
}

// Codes of a span as signed bytes.
template <class Source>
struct Lifting {
    const Product& of;
    const Source& source;

    // Written to `bytes`, with what sums begin with. False, if products with the integers of steps were wanted and one of
    // them fits no byte.
    template <bool products>
    bool write(const Span& span, const uint8_t* chunk, uint8_t* bytes, int32_t* begin) const {
        const I less = set((of.zero ? 0 : int32_t(of.offset)) * 0x01010101);
        const int64_t first = span.panel * of.cols + span.first;
        const bool wide = of.step == 32;
        I outside = set(0);
        for (int64_t col = span.first; col < span.last; begin += 16) {
            I sum = set(0);
            for (int64_t end = col + of.over; col < end; col += 32, chunk += 64 * Source::bits, bytes += 512) {
                const int64_t step = (first + col - span.first) >> (wide ? 5 : 4);
                const I pairs = factors_at(of, of.fine + (step & ~int64_t(1)) * 16);
                const bool odd = wide && (step & 1);
                sum = put<products, 0, 4>(chunk, less, odd ? twice(pairs, 1) : twice(pairs, 0), bytes, sum, outside);
                sum = put<products, 4, 8>(chunk, less, odd || !wide ? twice(pairs, 1) : twice(pairs, 0), bytes, sum, outside);
            }
            store_words(begin, unsigned_dots ? sub(set(0), shift_left<7>(sum)) : set(0));
        }
        return all(greater(set(1), shift_right<8>(both(outside, set(int32_t(0xff00ff00))))));
    }

  private:
    // Four quads of a step; their sum added to `all`.
    template <bool products, int quad, int last>
    LOWBIT_INLINE I put(const uint8_t* chunk, I less, I factor, uint8_t* bytes, I all, I& outside) const {
        const I sum = put_quads<products, quad, last>(chunk, less, factor, bytes, set(0), outside);
        return add(all, products ? sum : mul(sum, dot_pairs(factor, set(1))));
    }
    template <bool products, int quad, int last>
    LOWBIT_INLINE I put_quads(const uint8_t* chunk, I less, I factor, uint8_t* bytes, I sum, I& outside) const {
        const I ones = set(0x01010101), high = set(int32_t(0x80808080)), mask = set(0x00ff00ff), room = set(0x00800080);
        I word = source.template at<quad>(chunk);  // as 128 above its value next, then without
        if constexpr (Source::is_signed) word = differ(word, high);
        else if constexpr (Source::above == 0) word = sub(add(word, high), less);
        if constexpr (products) {
            const I minus = mul_pairs(factor, set(-1)), center = set(int32_t(0xff80ff80));
            const I even = mul_pairs(add_pairs(both(word, mask), center), minus);
            const I odd = mul_pairs(add_pairs(both(shift_right<8>(word), mask), center), minus);
            outside = either(outside, either(add_pairs(even, room), add_pairs(odd, room)));
            word = either(both(even, mask), shift_left<8>(both(odd, mask)));
        } else {
            word = differ(word, high);
        }
        store_words(bytes + 64 * quad, word);
        sum = add_dot(sum, ones, word);
        if constexpr (quad + 1 < last) return put_quads<products, quad + 1, last>(chunk, less, factor, bytes, sum, outside);
        else return sum;
    }
};

// What adds tiles of tokens, and smaller ones.
struct Tiles {
    Tile whole, few;
};
template <bool products>
constexpr Tiles lifted_tiles{add_tile<Nested, Signed<products>, tile>, add_tile<Nested, Signed<products>, few>};

// Makes the bytes of a span, and says what takes them.
template <class Source>
Tiles unpack_span(const Product& of, const Source& source, const uint8_t* codes, const Span& span, uint8_t* bytes, int32_t* begin) {
    if constexpr (whole_dots && Source::bits < 8)
        if (lifts(of)) {
            const Lifting<Source> lifting{of, source};
            if constexpr (Source::bits <= 3)
                if (lifting.template write<true>(span, codes, bytes, begin)) return lifted_tiles<true>;
            lifting.template write<false>(span, codes, bytes, begin);
            return lifted_tiles<false>;
        }
    unpack(source, codes, (span.last - span.first) / 32, bytes);
    return {tile_of<Source, tile>(of), tile_of<Source, few>(of)};
}

template <class Source>
void many_tokens(const Product& of, int64_t panel, const Source& source) {
    const int64_t wide = of.fine ? columns_at_once / of.over * of.over : columns_at_once;
    alignas(64) uint8_t bytes[16 * columns_at_once];
    alignas(64) int32_t begin[columns_at_once / 2];
    for (int64_t token = 0; token < of.tokens; token += tokens_at_once) {
        int64_t count = smaller(tokens_at_once, of.tokens - token);
        alignas(64) Near kept;
        for (int64_t col = 0; col < of.cols; col += wide) {
            const int64_t bytes_wide = 2 * wide * Source::bits;
            const Span span{panel, col, smaller(col + wide, of.cols), bytes, begin};
            const uint8_t* codes = codes_of_panel(of, panel) + col / wide * bytes_wide;
            const Tiles add = unpack_span(of, source, codes, span, bytes, begin);
            for (int64_t t = 0; t < count; t += tile) {
                const int64_t some = smaller(tile, count - t);
                const Sums sums = kept.from(t);
                if (col == 0) clear(sums);
                ask_for_next<2>(codes + bytes_wide, bytes_wide, t, count);
                (some <= few ? add.few : add.whole)(of, span, token + t, some, sums);
                if (span.last == of.cols) store_tokens(of, panel, token + t, some, sums.total);
            }
        }
    }
}

// ---- 16 bits: runs of columns whose sums are integers all along ----

// Sums of products of 16 bits from `quad` to before `last`: words of a weight [columns / 2, 16, 2] times inputs. For many
// tokens (w + y) * (v + x) stands for w * x + v * y, which is half as many products; it has w * v and x * y too, which are
// known beforehand, of the weight and of the inputs alone (Winograd, "A new algorithm for inner product", 1968). All of it
// is modulo 2**32, which the sum itself fits.
constexpr bool crossing = !whole_dots;

// Inputs of a tile of tokens in a run, four at a time.
template <int tokens>
using Fours = const uint8_t* [tokens / 4];

template <int t, int tokens>
LOWBIT_INLINE void add_pair(I first, I second, const Fours<tokens>& input, int64_t at, I (&sum)[tokens]) {
    const uint8_t* here = input[t / 4] + at + 8 * (t % 4);
    I x = set(four_bytes(here)), y = set(four_bytes(here + 4));
    if constexpr (crossing) sum[t] = add_dot_pairs(sum[t], add_pairs(first, y), add_pairs(second, x));
    else sum[t] = add_dot_pairs(add_dot_pairs(sum[t], first, x), second, y);
    keep(sum[t]);
    if constexpr (t + 1 < tokens) add_pair<t + 1>(first, second, input, at, sum);
}

template <int quad, int last, int tokens>
LOWBIT_INLINE void add_crossed(const uint8_t* weight, const Fours<tokens>& input, int64_t at, I (&sum)[tokens]) {
    I first = load_words(weight + 128 * quad), second = load_words(weight + 128 * quad + 64);
    add_pair<0>(first, second, input, at + 32 * quad, sum);
    if constexpr (quad + 1 < last) add_crossed<quad + 1, last>(weight, input, at, sum);
}

// What `add_pair` adds that is of the weight alone.
template <int quad, int last>
LOWBIT_INLINE I crossed_quads(const uint8_t* weight) {
    I part = dot_pairs(load_words(weight + 128 * quad), load_words(weight + 128 * quad + 64));
    if constexpr (quad + 1 < last) return add(part, crossed_quads<quad + 1, last>(weight));
    else return part;
}

// `count` columns of a panel from `first` on, as 16 bits, with what there is once for all tokens.
struct Run {
    const uint8_t* words;
    int64_t first, count, index;
    F scale;

    // What sums begin with, so that this is out of them.
    I crossed() const {
        I sum = set(0);
        for (int64_t i = 0; crossing && i < count; i += 32) sum = sub(sum, crossed_quads<0, 8>(words + 32 * i));
        return sum;
    }
};

// What is of the weight and of the inputs alone, out of the sums before they begin.
template <int t, int tokens>
LOWBIT_INLINE void begin(I crossed, const Fours<tokens>& input, I (&sum)[tokens]) {
    sum[t] = crossing ? sub(crossed, set(four_bytes(input[t / 4] + 16 + 4 * (t % 4)))) : set(0);
    if constexpr (t + 1 < tokens) begin<t + 1>(crossed, input, sum);
}
template <int t, int tokens>
LOWBIT_INLINE void end(const I (&sum)[tokens], F scale, const Fours<tokens>& input, F* total) {
    F of_inputs = floats(set(four_bytes(input[t / 4] + 4 * (t % 4))));
    total[t] = fma(mul(to_float(sum[t]), scale), of_inputs, total[t]);
    if constexpr (t + 1 < tokens) end<t + 1>(sum, scale, input, total);
}

// For a tile of tokens from `token` on, of which `there` are there: after the fours that these are in the last is repeated.
template <int tokens>
void add_run(const Product& of, const Run& run, I crossed, int64_t token, int64_t there, F* total) {
    const int64_t size = bytes_of_fours(of.cols, of.sub), before = run.index * 32 + 8 * run.first;
    Fours<tokens> input;
    for (int i = 0; i < tokens / 4; i++) input[i] = of.fours + (token / 4 + smaller(i, (there - 1) / 4)) * size + before;
    I sum[tokens];
    begin<0>(crossed, input, sum);
    for (int64_t col = 0; col < run.count; col += 16) add_crossed<0, 4>(run.words + 32 * col, input, 32 + 8 * col, sum);
    end<0>(sum, run.scale, input, total);
}

// Words of a run, and their scale.
struct Scaled {
    const uint8_t* words;
    F scale;
};

// Words as they are stored.
struct Words {
    static constexpr int64_t near = 0, at_once = few < tile ? tokens_at_once : 64;  // more were slower with AVX2
    const Product& of;
    Scaled columns(int64_t panel, int64_t first, int64_t, uint8_t*) const {
        const int64_t runs = (of.cols + of.sub - 1) / of.sub;
        return {of.codes + (panel * of.cols + first) * 32, scales_at(of, of.scale.data, panel * runs + first / of.sub)};
    }
    // Of the run behind this one.
    void ask(const Run& run, int64_t token, int64_t tokens) const {
        ask_for_next<3>(run.words + 32 * wide_run, 32 * wide_run, token, tokens);
    }
};

// Codes that stand for signed bytes, each times the integer of its step: words of columns 0 and 2 of four, then 1 and 3.
template <class Source>
struct Stepped {
    static constexpr int64_t near = 512, at_once = tokens_at_once;  // columns of a run at most
    const Product& of;
    const Source& source;

    Scaled columns(int64_t panel, int64_t first, int64_t count, uint8_t* to) const {
        const uint8_t* chunk = codes_of_panel(of, panel) + first / 32 * 64 * Source::bits;
        for (int64_t at = 0; at < count; at += 32, chunk += 64 * Source::bits) {
            int64_t step = (panel * of.cols + first + at) / of.step, odd = step & 1;
            I pairs = load_pairs(of.fine + (step - odd) * 16);
            put<0, 4>(chunk, twice(pairs, int(odd)), to + 32 * at);
            put<4, 8>(chunk, twice(pairs, int(of.step == 16 ? 1 : odd)), to + 32 * at);
        }
        return {to, scales_at(of, of.scale.data, (panel * of.cols + first) / of.over)};
    }
    void ask(const Run&, int64_t, int64_t) const {}

  private:
    template <int quad, int last>
    LOWBIT_INLINE void put(const uint8_t* chunk, I factor, uint8_t* to) const {
        I above = differ(source.template at<quad>(chunk), set(int32_t(0x80808080))), mask = set(0x00ff00ff);  // by 128
        I less = set(int32_t(0xff80ff80));
        store_words(to + 128 * quad, mul_pairs(add_pairs(both(above, mask), less), factor));
        store_words(to + 128 * quad + 64, mul_pairs(add_pairs(both(shift_right<8>(above), mask), less), factor));
        if constexpr (quad + 1 < last) put<quad + 1, last>(chunk, factor, to);
    }
};

template <class Weight>
void many_words(const Product& of, int64_t panel, const Weight& weight) {
    alignas(64) uint8_t near[Weight::near ? 32 * Weight::near : 1];
    const int64_t runs = (of.cols + of.sub - 1) / of.sub;
    for (int64_t token = 0; token < of.tokens; token += Weight::at_once) {
        int64_t there = smaller(Weight::at_once, of.tokens - token);
        alignas(64) F total[Weight::at_once];
        for (int64_t t = 0; t < there; t += tile)
            for (int64_t i = t; i < t + tile; i++) total[i] = set(0.0f);
        for (int64_t i = 0; i < runs; i++) {
            int64_t first = i * of.sub, count = smaller(of.sub, of.cols - first);
            Scaled found = weight.columns(panel, first, count, near);
            Run run{found.words, first, count, i, found.scale};
            I crossed = run.crossed();
            for (int64_t t = 0; t < there; t += tile) {
                weight.ask(run, t, there);
                const int64_t some = smaller(tile, there - t);
                (some <= few ? add_run<few> : add_run<tile>)(of, run, crossed, token + t, some, total + t);
                if (i + 1 == runs) store_tokens(of, panel, token + t, some, total + t);
            }
        }
    }
}

// Nothing is asked for ahead: so little is done for a line that the processor's own looking ahead suffices, and lines that
// are asked for too take the places of those that are waited for.
void one_wide(const Product& of, int64_t panel) {
    const int64_t runs = (of.cols + of.over - 1) / of.over;
    const uint8_t* words = of.codes + panel * of.cols * 32;
    F total = set(0.0f);
    for (int64_t i = 0; i < runs; i++) {
        I even = set(0), odd = even;
        for (int64_t col = i * of.over; col < smaller((i + 1) * of.over, of.cols); col += 4, words += 128) {
            even = add_dot_pairs(even, load_words(words), set(four_bytes(of.words + col)));
            odd = add_dot_pairs(odd, load_words(words + 64), set(four_bytes(of.words + col + 2)));
        }
        F scale = scales_at(of, of.scale.data, panel * runs + i);
        total = fma(mul(to_float(add(even, odd)), scale), set(of.input_scale[i]), total);
    }
    store_rows(of, panel, 0, mul(total, set(of.unit)));
}

void wide_panels(const Product& of, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
        of.tokens == 1 ? one_wide(of, panel) : many_words(of, panel, Words{of});
}

// What the code stands for that begins at bit `low` of a word.
struct Level16 {
    static constexpr bool narrow = true, shifted = true;  // only the lower four bits of a code count; there may be zeros
    F table;
    template <int low>
    F at(I word) const {
        return lookup16(table, shift_right<low>(word));
    }
};
struct Level256 {
    static constexpr bool narrow = false, shifted = true;
    const float* table;
    template <int low>
    F at(I word) const {
        return lookup256(table, both(shift_right<low>(word), set(255)));
    }
};
// Small floats of 8 bits from their bits, where the table says the same: looking up takes several times as long. They
// become no subnormal float32 on the way: some processors take a hundred cycles for an operation that meets one.
template <int mantissa>
struct SmallFloat {
    static constexpr bool narrow = false, shifted = false;

    // What the bytes of a word stand for.
    struct Four {
        F at[4];
    };
    LOWBIT_INLINE static Four four(I word) {
        Four found{{normal<0>(word), normal<8>(word), normal<16>(word), normal<24>(word)}};
        if (has_zero_byte(both(word, set((0x80 - (1 << mantissa)) * 0x01010101)))) [[unlikely]]
            for (F& each : found.at) each = mended(each);
        return found;
    }
    // At least what a byte stands for without its sign, and no more than that of codes that are not subnormal.
    template <int low>
    LOWBIT_INLINE static F magnitude(I word) {
        constexpr int left = 23 - mantissa - low;
        if constexpr (left > 0) word = shift_left<left>(word);
        else word = shift_right<-left>(word);
        return floats(add(both(word, set(127 << (23 - mantissa))), set(bias)));
    }
    static bool is(const float* level) {
        alignas(64) int32_t codes[16];
        for (int first = 0; first < 256; first += 16) {
            for (int i = 0; i < 16; i++) codes[i] = first + i;
            F own = four(load_words(codes)).at[0], wanted = load_f32(level + first);
            if (!all(both(at_least(own, wanted), at_least(wanted, own)))) return false;
        }
        return true;
    }

  private:
    static constexpr int32_t bias = (mantissa == 3 ? 120 : 112) << 23;  // exponents begin elsewhere

    // As if an exponent of 0 were one like the others.
    template <int low>
    LOWBIT_INLINE static F normal(I word) {
        if constexpr (low < 24) word = shift_left<24 - low>(word);
        I there = both(shift_right_signed<mantissa + 1>(word), set(int32_t(mantissa == 3 ? 0x87f00000 : 0x8fe00000)));
        return floats(add(there, set(bias)));
    }
    // With an exponent of 0, 2^e * (1 + f) stands for 2^e * 2 * f, which is less; with others it is less than the like.
    LOWBIT_INLINE static F mended(F value) {
        I sign = both(bits(value), set(INT32_MIN));
        F size = floats(differ(bits(value), sign));
        F without_one = sub(add(size, size), set(mantissa == 3 ? 0x1p-6f : 0x1p-14f));
        return floats(either(bits(min(size, without_one)), sign));
    }
};

template <class Body>
void with_codes(int bits, Body body) {
    if (bits == 2) body(Codes<2>{});
    if (bits == 3) body(Codes<3>{});
    if (bits == 4) body(Codes<4>{});
    if (bits == 5) body(Codes<5>{});
    if (bits == 6) body(Codes<6>{});
    if (bits == 8) body(Codes<8>{});
}

// ---- floats: weights as float32, times the inputs as they are ----

// Codes as what they stand for, each value rounded as where the weight is dequantized.
template <class Level>
struct Leveled {
    using Element = F32;
    static constexpr bool near = true;
    static constexpr int64_t at_once = 256;  // columns
    const Product& of;
    Level level;

    // `count` columns of a panel from `first` on, written to `to`.
    const void* columns(int64_t panel, int64_t first, int64_t count, float* to) const {
        for (int64_t i = 0; i < count; i += 32) fill(panel, first + i, to + 16 * i);
        return to;
    }

  private:
    void fill(int64_t panel, int64_t col, float* to) const {
        uint8_t chunk[512];
        const uint8_t* codes = codes_of_panel(of, panel) + col / 32 * 64 * of.bits;
        const bool nibbles = Level::narrow && of.bits == 4, bytes = of.bits == 8;
        const Put put{level, of.zero && !of.minus, of.zero && of.minus};  // not read again after each value
        if (!nibbles && !bytes) with_codes(of.bits, [&](auto source) { unpack(source, codes, 1, chunk); });
        for (int64_t at = 0; at < 32; at += 16) {
            int64_t group = (panel * of.cols + col + at) / of.step;
            F scale = scales_at(of, of.scale.data, group), zero = scales_at(of, of.zero, group);
            for (int64_t i = at; i < at + 16; i += nibbles ? 8 : 4) {
                if (nibbles) put.template words<4>(load_words(codes + 8 * i), scale, zero, to + 16 * i);
                else put.template words<8>(load_words((bytes ? codes : chunk) + 16 * i), scale, zero, to + 16 * i);
            }
        }
    }

    struct Put {
        Level level;
        bool before, after;  // whether a zero is subtracted, and when

        // What stands in a word, where a lookup leaves out what is above its field (`narrow`).
        template <int bits, int byte = 0, int field = 0>
        LOWBIT_INLINE void words(I from, F scale, F zero, float* to) const {
            if constexpr (!Level::shifted) {
                auto value = level.four(from);
                for (int i = 0; i < 4; i++) store_f32(to + 16 * i, mul(value.at[i], scale));
                return;
            } else {
                F value = level.template at<8 * byte + bits * field>(from);
                if (before) value = sub(value, zero);
                value = mul(value, scale);
                store_f32(to + 16 * (4 * field + byte), after ? sub(value, zero) : value);
                if constexpr (byte < 3) words<bits, byte + 1, field>(from, scale, zero, to);
                else if constexpr (bits == 4 && field == 0) words<bits, 0, 1>(from, scale, zero, to);
            }
        }
    };
};

// Weights that are floats themselves.
template <class T>
struct Stored {
    using Element = T;
    static constexpr bool near = false;
    static constexpr int64_t at_once = 1024 / T::size;
    const Product& of;

    const void* columns(int64_t panel, int64_t first, int64_t, float*) const {
        return of.codes + (panel * of.cols + first) * 16 * T::size;
    }
};

constexpr int float_tile = tile < 12 ? 6 : 12;  // tokens: what registers hold beside a weight and an input
constexpr int64_t floats_at_once = 60;          // tokens whose sums stay near: whole tiles

// Sums of even and of odd columns are apart, so that an addition need not wait for the one before.
template <class Weight>
void one_float(const Product& of, int64_t panel, const Weight& weight) {
    using T = typename Weight::Element;
    alignas(64) float near[Weight::near ? Weight::at_once * 16 : 1];
    F even = set(0.0f), odd = even;
    for (int64_t first = 0, last; first < of.cols; first = last) {
        last = smaller(first + Weight::at_once, of.cols);
        auto from = static_cast<const uint8_t*>(weight.columns(panel, first, last - first, near));
        for (int64_t col = first; col < last; col += 2, from += 32 * T::size) {
            if constexpr (!Weight::near) ask_for<T::size / 2>(from);
            even = fma(T::load(from), set(of.input[col]), even);
            odd = fma(T::load(from + 16 * T::size), set(of.input[col + 1]), odd);
        }
    }
    store_rows(of, panel, 0, add(even, odd));
}

struct FloatSums {
    float at[2][floats_at_once][16];
};

// `count` columns in steps of two, whose weights are at `weight`, for a tile of tokens whose inputs are at `first_input`,
// of which `there` are there: others repeat the last.
template <class T>
void add_floats(const uint8_t* weight, const float* first_input, int64_t cols, int64_t count, int64_t there,
                float (*kept)[16]) {
    const float* input[float_tile];
    F sum[float_tile];
    for (int t = 0; t < float_tile; t++) {
        input[t] = first_input + smaller(t, there - 1) * cols;
        sum[t] = load_f32(kept[smaller(t, there - 1)]);
    }
    for (int64_t i = 0; i < count; i += 2, weight += 32 * T::size) {
        F value = T::load(weight);
        for (int t = 0; t < float_tile; t++) sum[t] = fma(value, set(input[t][i]), sum[t]);
    }
    for (int t = 0; t < float_tile; t++) store_f32(kept[smaller(t, there - 1)], sum[t]);
}

// Some columns for as many tokens as keep their sums near.
template <class Weight>
void many_floats(const Product& of, int64_t panel, const Weight& weight) {
    using T = typename Weight::Element;
    alignas(64) float near[Weight::near ? Weight::at_once * 16 : 1];
    for (int64_t token = 0; token < of.tokens; token += floats_at_once) {
        int64_t there = smaller(floats_at_once, of.tokens - token);
        alignas(64) FloatSums kept;
        for (int64_t t = 0; t < there; t++)
            for (auto& half : kept.at) store_f32(half[t], set(0.0f));
        for (int64_t first = 0; first < of.cols; first += Weight::at_once) {
            int64_t count = smaller(Weight::at_once, of.cols - first);
            auto from = static_cast<const uint8_t*>(weight.columns(panel, first, count, near));
            const float* input = of.input + token * of.cols + first;
            for (int64_t t = 0; t < there; t += float_tile)
                for (int odd = 0; odd < 2; odd++)
                    add_floats<T>(from + odd * 16 * T::size, input + t * of.cols + odd, of.cols, count,
                                  smaller(float_tile, there - t), kept.at[odd] + t);
        }
        for (int64_t t = 0; t < there; t++)
            store_rows(of, panel, token + t, add(load_f32(kept.at[0][t]), load_f32(kept.at[1][t])));
    }
}

// Of small floats in the order of `one_float`, without a place in between.
template <int mantissa>
void one_float(const Product& of, int64_t panel, const Leveled<SmallFloat<mantissa>>& weight) {
    F even = set(0.0f), odd = even;
    const uint8_t* codes = codes_of_panel(of, panel);
    int64_t group = panel * of.cols / of.step;
    for (int64_t first = 0; first < of.cols; first += of.step, group++) {
        F scale = scales_at(of, of.scale.data, group);
        for (int64_t col = first; col < first + of.step; col += 4, codes += 64) {
            auto value = SmallFloat<mantissa>::four(load_words(codes));
            ask_for<1>(codes);
            even = fma(mul(value.at[0], scale), set(of.input[col]), even);
            odd = fma(mul(value.at[1], scale), set(of.input[col + 1]), odd);
            even = fma(mul(value.at[2], scale), set(of.input[col + 2]), even);
            odd = fma(mul(value.at[3], scale), set(of.input[col + 3]), odd);
        }
    }
    store_rows(of, panel, 0, add(even, odd));
}

// Small floats as words: times a power of two of each run and row. Of the at most four bits that count none is lost but
// those of integers below 8.
template <int mantissa>
struct Powers {
    static constexpr int64_t near = wide_run, at_once = tokens_at_once;
    const Product& of;

    Scaled columns(int64_t panel, int64_t first, int64_t count, uint8_t* to) const {
        const uint8_t* codes = codes_of_panel(of, panel) + 16 * first;
        F up = power(codes, count);
        for (int64_t i = 0; i < count; i += 4) {
            auto value = SmallFloat<mantissa>::four(load_words(codes + 16 * i));
            store_words(to + 32 * i, pair(integer(value.at[0], up), integer(value.at[1], up)));
            store_words(to + 32 * i + 64, pair(integer(value.at[2], up), integer(value.at[3], up)));
        }
        return {to, div(scales_at(of, of.scale.data, (panel * of.cols + first) / of.step), up)};
    }
    void ask(const Run&, int64_t, int64_t) const {}

  private:
    struct Size {
        F most, squares[4];
    };

    // The greatest with which integers keep the limits of `wide_run`.
    F power(const uint8_t* codes, int64_t count) const {
        F none = set(0.0f);
        Size size{none, {none, none, none, none}};
        for (int64_t i = 0; i < count; i += 4) see<0>(load_words(codes + 16 * i), size);
        F squares = add(add(size.squares[0], size.squares[1]), add(size.squares[2], size.squares[3]));
        F up = min(div(set(most_weight), size.most), div(set(wide_norm), sqrt(squares)));
        return floats(both(bits(up), set(0x7f800000)));
    }
    template <int field>
    LOWBIT_INLINE void see(I word, Size& size) const {
        F value = SmallFloat<mantissa>::template magnitude<8 * field>(word);
        size.most = max(size.most, value);
        size.squares[field] = fma(value, value, size.squares[field]);
        if constexpr (field < 3) see<field + 1>(word, size);
    }
    // In the lower 16 bits: a float as large as this one ends with ones.
    LOWBIT_INLINE static I integer(F value, F up) { return bits(fma(value, up, set(0x1.8p23f))); }
    LOWBIT_INLINE static I pair(I first, I second) { return either(both(first, set(0xffff)), shift_left<16>(second)); }
};

template <class Weight>
void float_panels(const Product& of, int64_t first, int64_t last, const Weight& weight) {
    for (int64_t panel = first; panel < last; panel++)
        of.tokens == 1 ? one_float(of, panel, weight) : many_floats(of, panel, weight);
}

template <int mantissa>
void small_panels(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::floats || of.tokens < small_many) return float_panels(of, first, last, Leveled<SmallFloat<mantissa>>{of, {}});
    for (int64_t panel = first; panel < last; panel++) many_words(of, panel, Powers<mantissa>{of});
}

// ---- which of these ----

template <class Source>
void integer_panels(const Product& of, int64_t first, int64_t last, const Source& source) {
    if (of.tokens == 1) {
        if (of.fine) return one_token<Nested>(of, source, first, last);
        if (Chunks<1>::fits(of)) return one_token<Chunks>(of, source, first, last);
        return one_token<Plain>(of, source, first, last);
    }
    for (int64_t panel = first; panel < last; panel++) {
        if constexpr (crossing && Source::is_signed && Source::bits < 8)
            if (crosses(of)) {
                many_words(of, panel, Stepped<Source>{of, source});
                continue;
            }
        many_tokens(of, panel, source);
    }
}

void code_panels(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::table) return integer_panels(of, first, last, TableCodes(of.table));
    with_codes(of.bits, [&](auto source) {
        if constexpr (source.bits < 8 || unsigned_dots) integer_panels(of, first, last, source);
        else integer_panels(of, first, last, OffsetCodes{});
    });
}

}  // namespace

void LOWBIT_PRODUCT(const Product& of, int64_t first, int64_t last);
void LOWBIT_PRODUCT(const Product& of, int64_t first, int64_t last) {
    if (of.way == Way::dense) with_dtype(of.scale.dtype, [&](auto type) { float_panels(of, first, last, Stored<decltype(type)>{of}); });
    else if (of.way == Way::wide) wide_panels(of, first, last);
    else if (of.way == Way::codes || of.way == Way::table) code_panels(of, first, last);
    else if (of.bits <= 4) float_panels(of, first, last, Leveled<Level16>{of, {load_f32(of.level)}});
    else if (!of.zero && SmallFloat<3>::is(of.level)) small_panels<3>(of, first, last);
    else if (!of.zero && SmallFloat<2>::is(of.level)) small_panels<2>(of, first, last);
    else float_panels(of, first, last, Leveled<Level256>{of, {of.level}});
}

}  // namespace lowbit
