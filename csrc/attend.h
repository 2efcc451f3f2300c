// What a decoder computes beside products: inputs of these as int8, attention of one query with keys and values as they
// are kept, and the gate of a feed-forward layer. Included by kernels.h.

// ---- inputs as int8 ----

I bare_bits(F value) { return both(bits(value), set(0x7fffffff)); }

constexpr float no_number = __builtin_nanf("");

// Whether one of some magnitudes is no finite number: their integers then have no scale, and products are no number either.
bool has_none(I magnitudes) { return any(greater(magnitudes, set(0x7f7fffff))); }

// How a block of values becomes integers of 8 bits: what each is multiplied by, and what a step of them is.
struct Step {
    float up, size;
};
Step step_of(int64_t count, const float* values) {
    I most = set(0);
    for (int64_t i = 0; i < count; i += 16) most = max(most, bare_bits(load_f32(values + i)));
    float largest = has_none(most) ? no_number : greatest(floats(most));
    return {largest > 1e-30f ? 127 / largest : 0, largest / 127};
}

// A block of `sub` inputs; what a step of its integers is.
float round_block(int64_t sub, const float* input, int8_t* rounded) {
    Step step = step_of(sub, input);
    for (int64_t i = 0; i < sub; i += 16)
        store_u8(rounded + i, both(to_int(rint(mul(load_f32(input + i), set(step.up)))), set(0xff)));
    return step.size;
}

int32_t sum_of_bytes(int64_t count, const int8_t* bytes) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += bytes[i];
    return sum;
}

void round_inputs(const Rounded& of, const float* input, int8_t* rounded, float* scale, int16_t* step_sum) {
    for (int64_t block = 0; block < of.count / of.sub; block++, input += of.sub, rounded += of.sub) {
        scale[block] = round_block(of.sub, input, rounded);
        for (int64_t i = 0; i < of.sub; i += of.step) *step_sum++ = int16_t(sum_of_bytes(of.step, rounded + i));
    }
}

// ---- inputs and weights as 16 bits ----

int32_t crossed_sum(int64_t count, const int16_t* words) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < count; i += 4)
        sum += uint32_t(words[i] * words[i + 2]) + uint32_t(words[i + 1] * words[i + 3]);
    return int32_t(sum);
}

void widen(int64_t count, int64_t run, const int8_t* rounded, int16_t* words, int32_t* crossed) {
    for (int64_t i = 0; i < count; i += 4) {
        words[i] = rounded[i], words[i + 1] = rounded[i + 2];
        words[i + 2] = rounded[i + 1], words[i + 3] = rounded[i + 3];
    }
    for (int64_t i = 0; i < count; i += run) *crossed++ = crossed_sum(run, words + i);
}

// How integers of a run are made.
struct Wide {
    F up, scale;  // of a value to its integer, and back
};

// From the greatest magnitudes and the sums of the squares of the values over these, lane by lane; magnitudes that are so
// small that their inverse is not finite count as 0.
Wide wide_of(F largest, F squares, float most) {
    M there = above(largest, set(1e-30f));
    F limit = min(set(most), div(set(wide_norm), sqrt(max(squares, set(1.0f)))));
    F unit = floats(select(there, bits(largest), bits(set(1.0f))));
    return {floats(select(there, bits(div(limit, unit)), set(0))), div(unit, limit)};
}
F inverse(F largest) { return div(set(1.0f), max(largest, set(1e-30f))); }

void round_wide(int64_t cols, int64_t run, const float* input, int16_t* words, float* scale, int32_t* crossed) {
    for (int64_t col = 0; col < cols; col += run, input += run, words += run) {
        int64_t count = smaller(run, cols - col);
        I most = set(0);
        for (int64_t i = 0; i < count; i += 16) most = max(most, bare_bits(load_f32(input + i)));
        F largest = set(greatest(floats(most))), over = inverse(largest), squares = set(0.0f);
        for (int64_t i = 0; i < count; i += 16) {
            F part = mul(load_f32(input + i), over);
            squares = add(squares, mul(part, part));
        }
        Wide as = wide_of(largest, set(sum_of(squares)), most_input);
        for (int64_t i = 0; i < count; i += 16)
            store_u16(words + i, both(to_int(rint(mul(load_f32(input + i), as.up))), set(0xffff)));
        *scale++ = has_none(most) ? no_number : least(as.scale), *crossed++ = crossed_sum(count, words);
    }
}

// One run of a panel.
template <class T>
bool widen_run(const uint8_t* from, int64_t count, uint8_t* words, float* scale) {
    auto value = [&](int64_t col) { return T::load(from + col * 16 * T::size); };
    I most = set(0);
    for (int64_t i = 0; i < count; i++) most = max(most, bare_bits(value(i)));
    if (has_none(most)) return false;
    F over = inverse(floats(most)), squares = set(0.0f);
    for (int64_t i = 0; i < count; i++) {
        F part = mul(value(i), over);
        squares = add(squares, mul(part, part));
    }
    Wide as = wide_of(floats(most), squares, most_weight);
    auto integer = [&](int64_t col) { return to_int(rint(mul(value(col), as.up))); };
    for (int64_t i = 0; i < count; i += 2)
        store_words(words + 32 * i, either(both(integer(i), set(0xffff)), shift_left<16>(integer(i + 1))));
    store_f32(scale, as.scale);
    return true;
}

bool widen_panels(Weight of, int64_t panels, int64_t cols, void* words, float* scale) {
    bool finite = true;
    with_dtype(of.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t col = 0; finite && col < cols; col += wide_run, scale += 16) {
                int64_t at = (panel * cols + col) * 16;
                finite = widen_run<T>(static_cast<const uint8_t*>(of.data) + at * T::size, smaller(wide_run, cols - col),
                                      static_cast<uint8_t*>(words) + 2 * at, scale);
            }
    });
    return finite;
}

// ---- attention ----

template <class T>
struct KeptFloats {
    const uint8_t* data;
    explicit KeptFloats(const Kept& of) : data(static_cast<const uint8_t*>(of.data)) {}
    F operator()(int64_t at) const { return T::load(data + at * T::size); }
};
struct KeptBytes {
    const uint8_t* data;
    const float* scale;
    int64_t block;
    explicit KeptBytes(const Kept& of) : data(static_cast<const uint8_t*>(of.data)), scale(of.scale), block(of.block) {}
    F operator()(int64_t at) const {
        return mul(sub(to_float(load_u8(data + at)), set(128.0f)), set(scale[at / block]));
    }
};

// Writes one position.
void keep(int64_t position, int64_t dim, const float* from, const Kept& to) {
    auto data = static_cast<uint8_t*>(to.data);
    int64_t at = position * dim;
    if (to.as == Keep::f32) __builtin_memcpy(data + 4 * at, from, size_t(4 * dim));
    for (int64_t i = 0; to.as == Keep::f16 && i < dim; i += 16) store_f16(data + 2 * (at + i), load_f32(from + i));
    for (int64_t i = 0; to.as == Keep::int8 && i < dim; i += to.block) {
        Step step = step_of(to.block, from + i);
        to.scale[(at + i) / to.block] = step.size;
        for (int64_t j = i; j < i + to.block; j += 16)
            store_u8(data + at + j, add(to_int(rint(mul(load_f32(from + j), set(step.up)))), set(128)));
    }
}

// tanh(x) to about 2**-18.
F tanh_of(F x) {
    F size = floats(bare_bits(x)), power = exp_negative(mul(size, set(-2.0f)));
    F share = div(sub(set(1.0f), power), add(set(1.0f), power));
    return floats(either(bits(share), both(bits(x), set(int32_t(0x80000000)))));
}

// Scores of sixteen positions at a time, for some queries; a row of `room` is as long as `wide_room` says.
template <int queries, class Key>
void score(const Attention& of, Key key) {
    F sums[queries][16];  // beyond the last position: those of another
    for (auto& row : sums)
        for (F& each : row) each = set(0.0f);
    for (int64_t i = of.first; i < of.last; i += 16) {
        for (int64_t j = 0; j < smaller(16, of.last - i); j++) {
            F sum[queries];
            for (F& each : sum) each = set(0.0f);
            for (int64_t col = 0; col < of.dim; col += 16) {
                F part = key((i + j) * of.dim + col);
                for (int q = 0; q < queries; q++) sum[q] = fma(load_f32(of.query + q * of.dim + col), part, sum[q]);
            }
            for (int q = 0; q < queries; q++) sums[q][j] = sum[q];
        }
        for (int q = 0; q < queries; q++)
            store_f32(of.room + q * wide_room(of) + i - of.first, mul(sums_of(sums[q]), set(of.scale)));
    }
}

// A query's scores to their share of the sum; returns 1 over the sum.
float weigh(const Attention& of, float* room) {
    int64_t seen = of.last - of.first;
    for (int64_t i = 0; of.cap > 0 && i < seen; i += 16)
        store_f32(room + i, mul(tanh_of(mul(load_f32(room + i), set(1 / of.cap))), set(of.cap)));
    F top = set(-__builtin_inff()), sum = set(0.0f);
    each_16(seen, seen, [&](int64_t at, auto count) { top = max(load_some<F32>(room + at, count), top); });
    float most = greatest(top);
    each_16(seen, seen, [&](int64_t at, auto count) {
        F power = exp_negative(sub(load_some<F32>(room + at, count), set(most)));
        store_some<F32>(room + at, power, count);
        sum = add(sum, first_lanes(power, count));
    });
    return 1 / sum_of(sum);
}

// `wide` times sixteen columns from `col` on, so that no addition waits for the one before.
template <int queries, int wide, class Value>
void mix_columns(const Attention& of, const float* share, int64_t col, Value value) {
    F total[queries][wide];
    for (auto& row : total)
        for (F& each : row) each = set(0.0f);
    for (int64_t i = of.first; i < of.last; i++) {
        F part[wide];
        for (int k = 0; k < wide; k++) part[k] = value(i * of.dim + col + 16 * k);
        for (int q = 0; q < queries; q++)
            for (int k = 0; k < wide; k++) total[q][k] = fma(set(of.room[q * wide_room(of) + i - of.first]), part[k], total[q][k]);
    }
    for (int q = 0; q < queries; q++)
        for (int k = 0; k < wide; k++) store_f32(of.out + q * of.dim + col + 16 * k, mul(total[q][k], set(share[q])));
}

template <int queries, class Value>
void mix(const Attention& of, const float* share, Value value) {
    constexpr int wide = tile == 12 ? 4 : 4 / queries;  // as many sums as registers hold
    int64_t col = 0;
    for (; col + 16 * wide <= of.dim; col += 16 * wide) mix_columns<queries, wide>(of, share, col, value);
    for (; col < of.dim; col += 16) mix_columns<queries, 1>(of, share, col, value);
}

template <class Body>
void as_kept(const Kept& of, Body body) {
    if (of.as == Keep::f32) body(KeptFloats<F32>(of));
    if (of.as == Keep::f16) body(KeptFloats<F16>(of));
    if (of.as == Keep::int8) body(KeptBytes(of));
}

// The first of the queries; returns what is left.
template <int queries>
Attention attend_some(Attention of) {
    as_kept(of.keys, [&](auto key) { score<queries>(of, key); });
    float share[queries];
    for (int q = 0; q < queries; q++) share[q] = weigh(of, of.room + q * wide_room(of));
    as_kept(of.values, [&](auto value) { mix<queries>(of, share, value); });
    of.queries -= queries, of.query += queries * of.dim, of.out += queries * of.dim;
    return of;
}

void attend(const Attention& of) {
    Attention left = of;
    while (left.queries >= queries_at_once) left = attend_some<queries_at_once>(left);
    if (left.queries >= 2) left = attend_some<2>(left);
    if (left.queries == 1) attend_some<1>(left);
}

// x times the logistic function of x; or of 2 sqrt(2 / pi) (x + 0.044715 x**3), which is GELU with tanh.
void gate(int64_t count, bool gelu, float* x, const float* up) {
    each_16(count, count, [&](int64_t at, auto lanes) {
        F value = load_some<F32>(x + at, lanes), turned = value;
        if (gelu) {
            F cube = mul(mul(value, value), mul(value, set(0.044715f)));
            turned = mul(add(value, cube), set(1.5957691216f));
        }
        F power = exp_negative(min(turned, sub(set(0.0f), turned)));  // of -|turned|
        M positive = at_least(turned, set(0.0f));
        F above = floats(select(positive, bits(set(1.0f)), bits(power)));
        F share = div(above, add(set(1.0f), power));
        store_some<F32>(x + at, mul(mul(value, share), load_some<F32>(up + at, lanes)), lanes);
    });
}
