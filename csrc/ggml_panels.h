// ggml's blocks of sixteen rows, a lane each, as panels (product.h): words of the rows change places once, and what they
// hold of four columns is moved to where products look for it. ggml_blocks.cpp is the definition of the layouts.
// Include inside an anonymous namespace.

// What is beside the codes of a block: halves, and integers of four steps to a word.
struct Beside {
    I scale, min, fine[4], fine_min[4];
};

// `width` bits of each byte of a word, from bit `shift` on; words of a block are 64 bytes apart, one for each row.
template <int byte, int shift, int width>
I field(const uint8_t* words) {
    return both(shift_right<shift>(load_words(words + 16 * byte)), set(int32_t(((1u << width) - 1) * 0x01010101u)));
}
// Of neighbours in neighbouring bytes, `shared` chunks of which have the same.
template <int byte, int shared, int width, int chunk, int quad>
I spread(const uint8_t* words) {
    return field<byte + 32 * (chunk / shared) + 4 * quad, width * (chunk % shared), width>(words);
}
// Of two columns to a byte that are 16 apart.
template <int byte, int quad>
I nibble(const uint8_t* words) {
    return field<byte + quad % 4 * 4, quad / 4 * 4, 4>(words);
}

I low_half(I word) { return both(word, set(0xffff)); }
I of_nibbles(I word) { return both(word, set(0x0f0f0f0f)); }
// Bytes of `low` with two bits of those of `high` above their four.
template <int shift>
I with_two(I low, I high) {
    return either(of_nibbles(low), shift_left<4>(both(shift_right<shift>(high), set(0x03030303))));
}
I minus_32(I below_64) { return differ(add(below_64, set(0x60606060)), set(int32_t(0x80808080))); }

// Each type: bits of a code, weights and bytes of a block, columns that share a scale; where codes begin, and how many
// sixteens of bytes from there are brought into lanes for `low` and `high`, the parts of codes of a quad of a chunk.

template <bool with_min, bool fifth>
struct Nibbles {
    static constexpr int bits = fifth ? 5 : 4, weights = 32, step = 32, pieces = 1;
    static constexpr int start = 2 + 2 * with_min + 4 * fifth, bytes = start + 16;
    static constexpr bool has_min = with_min, joined = false;
    template <int, int quad>
    static I low(const uint8_t* words) {
        return nibble<0, quad>(words);
    }
    template <int, int quad>
    static I high(const uint8_t* words) {  // a bit of each column, in order
        I four = both(shift_right<4 * quad>(load_words(words + 256)), set(15));
        return both(mul(four, set(0x00204081)), set(0x01010101));
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t* words, Beside& out) {
        Sixteen head = load_rows(rows, at);
        out.scale = low_half(head.a);
        if constexpr (with_min) out.min = differ(shift_right<16>(head.a), set(0x8000));  // added there, subtracted here
        if constexpr (fifth && with_min) store_words(words + 256, head.b);
        if constexpr (fifth && !with_min) store_words(words + 256, either(shift_right<16>(head.a), shift_left<16>(head.b)));
    }
};

struct Q8_0 {
    static constexpr int bits = 8, weights = 32, step = 32, bytes = 34, start = 2, pieces = 2;
    static constexpr bool has_min = false, joined = false;
    template <int, int quad>
    static I low(const uint8_t* words) {
        return differ(load_words(words + 64 * quad), set(int32_t(0x80808080)));
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        out.scale = low_half(load_rows(rows, at).a);
    }
};

struct Q2_K {
    static constexpr int bits = 2, weights = 256, step = 16, bytes = 84, start = 16, pieces = 4;
    static constexpr bool has_min = true, joined = true;
    template <int chunk, int quad>
    static I low(const uint8_t* words) {
        return spread<0, 4, 2, chunk, quad>(words);
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        Sixteen both_of_steps = load_rows(rows, at);
        I ends = load_rows(rows, at + 68).d;
        out.scale = low_half(ends), out.min = shift_right<16>(ends);
        out.fine[0] = both_of_steps.a, out.fine[1] = both_of_steps.b;
        out.fine[2] = both_of_steps.c, out.fine[3] = both_of_steps.d;
    }
};

struct Q3_K {
    static constexpr int bits = 3, weights = 256, step = 16, bytes = 110, start = 0, pieces = 6;
    static constexpr bool has_min = false, joined = false;
    template <int chunk, int quad>
    static I low(const uint8_t* words) {
        return spread<32, 4, 2, chunk, quad>(words);
    }
    template <int chunk, int quad>
    static I high(const uint8_t* words) {
        return spread<0, 8, 1, chunk, quad>(words);
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        Sixteen end = load_rows(rows, at + 94);  // two bytes, twelve of integers, the scale
        auto from = [](I below, I above) { return either(shift_right<16>(below), shift_left<16>(above)); };
        I first = from(end.a, end.b), second = from(end.b, end.c), high = from(end.c, end.d);
        out.scale = shift_right<16>(end.d);
        out.fine[0] = minus_32(with_two<0>(first, high)), out.fine[1] = minus_32(with_two<2>(second, high));
        out.fine[2] = minus_32(with_two<4>(shift_right<4>(first), high));
        out.fine[3] = minus_32(with_two<6>(shift_right<4>(second), high));
    }
};

template <bool fifth>
struct Nibbles_K {
    static constexpr int bits = fifth ? 5 : 4, weights = 256, step = 32, start = 16, pieces = fifth ? 10 : 8;
    static constexpr int bytes = start + 16 * pieces;
    static constexpr bool has_min = true, joined = false;
    template <int chunk, int quad>
    static I low(const uint8_t* words) {
        return spread<fifth ? 32 : 0, 2, 4, chunk, quad>(words);
    }
    template <int chunk, int quad>
    static I high(const uint8_t* words) {
        return spread<0, 8, 1, chunk, quad>(words);
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        Sixteen head = load_rows(rows, at);
        I six = set(0x3f3f3f3f);
        out.scale = low_half(head.a), out.min = shift_right<16>(head.a);
        out.fine[0] = both(head.b, six), out.fine[1] = with_two<6>(head.d, head.b);
        out.fine_min[0] = both(head.c, six), out.fine_min[1] = with_two<6>(shift_right<4>(head.d), head.c);
    }
};

struct Q6_K {
    static constexpr int bits = 6, weights = 256, step = 16, bytes = 210, start = 0, pieces = 12;
    static constexpr bool has_min = false, joined = false;
    template <int chunk, int quad>
    static I low(const uint8_t* words) {
        return field<64 * (chunk / 4) + 32 * (chunk % 2) + 4 * quad, chunk % 4 / 2 * 4, 4>(words);
    }
    template <int chunk, int quad>
    static I high(const uint8_t* words) {
        return spread<128, 4, 2, chunk, quad>(words);
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        Sixteen fine = load_rows(rows, at + 192);
        out.fine[0] = fine.a, out.fine[1] = fine.b, out.fine[2] = fine.c, out.fine[3] = fine.d;
        out.scale = shift_right<16>(load_rows(rows, at + 194).d);
    }
};

struct IQ4_XS {
    static constexpr int bits = 4, weights = 256, step = 32, bytes = 136, start = 8, pieces = 8;
    static constexpr bool has_min = false, joined = false;
    template <int chunk, int quad>
    static I low(const uint8_t* words) {
        return nibble<16 * chunk, quad>(words);
    }
    static void beside(const uint8_t* const* rows, int64_t at, uint8_t*, Beside& out) {
        Sixteen head = load_rows(rows, at);
        out.scale = low_half(head.a);
        out.fine[0] = integers(low_half(head.b), both(shift_right<16>(head.a), set(255)));
        out.fine[1] = integers(shift_right<16>(head.b), shift_right<24>(head.a));
    }
    static I integers(I low, I high) {  // four nibbles in two bytes, and four times two bits in one
        low = both(either(low, shift_left<8>(low)), set(0x00ff00ff)), high = either(high, shift_left<12>(high));
        low = either(low, shift_left<4>(low)), high = both(high, set(0x000f000f));
        return minus_32(with_two<0>(low, either(high, shift_left<6>(high))));
    }
};

template <class T, int chunk>
struct Low {
    const uint8_t* words;
    template <int quad>
    I at() const {
        return T::template low<chunk, quad>(words);
    }
};
template <class T, int chunk>
struct High {
    const uint8_t* words;
    template <int quad>
    I at() const {
        return T::template high<chunk, quad>(words);
    }
};

// Parts of as many quads as there is room for in a word, side by side in its bytes.
template <int width, int word, int at = 0, class Part>
I side_by_side(Part part) {
    constexpr int fields = 8 / width;
    I found = shift_left<width * at>(part.template at<word * fields + at>());
    if constexpr (at + 1 < fields) found = either(found, side_by_side<width, word, at + 1>(part));
    return found;
}
template <int width, int word = 0, class Part>
void put_words(Part part, I present, uint8_t* to) {
    store_words(to + 64 * word, both(side_by_side<width, word>(part), present));
    if constexpr (word + 1 < width) put_words<width, word + 1>(part, present, to);
}
template <class T, int chunk = 0>
void put_chunks(const uint8_t* words, I present, uint8_t* to) {
    constexpr int low = lower_bits(T::bits), high = T::bits - low;
    put_words<low>(Low<T, chunk>{words}, present, to);
    if constexpr (high > 0) put_words<high>(High<T, chunk>{words}, present, to + 64 * low);
    if constexpr (chunk + 1 < T::weights / 32) put_chunks<T, chunk + 1>(words, present, to + 64 * T::bits);
}

// Integers of steps, two of which are an element.
template <class T>
void put_fine(const I (&fine)[4], I present, uint8_t* to) {
    for (int i = 0; i < 256 / T::step / 4; i++) {
        I word = both(fine[i], present);
        store_u16(to + 64 * i, low_half(word)), store_u16(to + 64 * i + 32, shift_right<16>(word));
    }
}

template <class T>
void put_block(const uint8_t* const* rows, int64_t at, I present, const GgmlPanels& to, I& halves, I& integers) {
    alignas(64) uint8_t words[64 * 48];
    for (int piece = 0; piece < T::pieces; piece++) {
        Sixteen bytes = load_rows(rows, at + T::start + 16 * piece);
        uint8_t* here = words + 256 * piece;
        store_words(here, bytes.a), store_words(here + 64, bytes.b);
        store_words(here + 128, bytes.c), store_words(here + 192, bytes.d);
    }
    Beside beside;
    T::beside(rows, at, words, beside);
    put_chunks<T>(words, present, to.codes);
    auto put_half = [&](I half, uint8_t* to_half) {
        halves = max(halves, both(half, set(0x7fff)));
        store_u16(to_half, both(half, present));
    };
    put_half(beside.scale, to.scale);
    if constexpr (T::has_min) put_half(beside.min, to.zero);
    if constexpr (T::weights == 256) put_fine<T>(beside.fine, present, to.fine);
    if constexpr (T::weights == 256 && T::has_min && !T::joined) {
        put_fine<T>(beside.fine_min, present, to.fine_zero);
        for (int i = 0; i < 256 / T::step / 4; i++) integers = either(integers, either(beside.fine[i], beside.fine_min[i]));
    }
}

template <class T>
GgmlFound put_panels(const GgmlRows& of, const GgmlPanels& to, int64_t first, int64_t last) {
    constexpr int64_t codes = 2 * T::weights * T::bits, pairs = 32 * (256 / T::step / 2);
    I halves = set(0), integers = set(0);
    for (int64_t panel = first; panel < last; panel++) {
        const uint8_t* rows[16];
        int32_t present[16];
        for (int64_t r = 0; r < 16; r++) {
            int64_t row = 16 * panel + r;
            present[r] = row < of.rows ? -1 : 0;
            row = row < of.rows ? row : 16 * panel;
            rows[r] = of.stored + (of.order ? of.order[row] : row) * of.blocks * T::bytes;
        }
        for (int64_t i = 0; i < of.blocks; i++) {
            int64_t block = panel * of.blocks + i;
            GgmlPanels here{to.codes + codes * block, to.scale + 32 * block, to.zero + (T::has_min ? 32 * block : 0)};
            if constexpr (T::weights == 256) here.fine = to.fine + pairs * block;
            if constexpr (T::weights == 256 && T::has_min && !T::joined) here.fine_zero = to.fine_zero + pairs * block;
            put_block<T>(rows, T::bytes * i, load_words(present), here, halves, integers);
        }
    }
    return {!any(greater(halves, set(0x7bff))), any(greater(both(integers, set(0x30303030)), set(0)))};
}

GgmlFound put_any(GgmlType type, const GgmlRows& of, const GgmlPanels& to, int64_t first, int64_t last) {
    switch (type) {
        case GgmlType::q4_0:
        case GgmlType::iq4_nl: return put_panels<Nibbles<false, false>>(of, to, first, last);
        case GgmlType::q4_1: return put_panels<Nibbles<true, false>>(of, to, first, last);
        case GgmlType::q5_0: return put_panels<Nibbles<false, true>>(of, to, first, last);
        case GgmlType::q5_1: return put_panels<Nibbles<true, true>>(of, to, first, last);
        case GgmlType::q8_0: return put_panels<Q8_0>(of, to, first, last);
        case GgmlType::q2_k: return put_panels<Q2_K>(of, to, first, last);
        case GgmlType::q3_k: return put_panels<Q3_K>(of, to, first, last);
        case GgmlType::q4_k: return put_panels<Nibbles_K<false>>(of, to, first, last);
        case GgmlType::q5_k: return put_panels<Nibbles_K<true>>(of, to, first, last);
        case GgmlType::q6_k: return put_panels<Q6_K>(of, to, first, last);
        case GgmlType::iq4_xs: return put_panels<IQ4_XS>(of, to, first, last);
        default: return {};
    }
}
