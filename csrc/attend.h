// What a decoder computes beside products: inputs of these as int8, attention of one query with keys and values as they
// are kept, and the gate of a feed-forward layer. Included by kernels.h.

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

void round_inputs(const Rounded& of, const float* input, int8_t* rounded, float* scale, int16_t* step_sum) {
    for (int64_t block = 0; block < of.count / of.sub; block++, input += of.sub, rounded += of.sub) {
        scale[block] = round_block(of.sub, input, rounded);
        for (int64_t i = 0; i < of.sub; i += of.step) *step_sum++ = int16_t(sum_of_bytes(of.step, rounded + i));
    }
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
        F most = set(0.0f);
        for (int64_t j = i; j < i + to.block; j += 16)
            most = max(most, floats(both(bits(load_f32(from + j)), set(0x7fffffff))));
        float largest = greatest(most), up = largest > 1e-30f ? 127 / largest : 0;
        to.scale[(at + i) / to.block] = largest / 127;
        for (int64_t j = i; j < i + to.block; j += 16)
            store_u8(data + at + j, add(to_int(rint(mul(load_f32(from + j), set(up)))), set(128)));
    }
}

// tanh(x) to about 2**-18.
F tanh_of(F x) {
    F size = floats(both(bits(x), set(0x7fffffff))), power = exp_negative(mul(size, set(-2.0f)));
    F share = div(sub(set(1.0f), power), add(set(1.0f), power));
    return floats(either(bits(share), both(bits(x), set(int32_t(0x80000000)))));
}

template <class Key>
void score(const Attention& of, Key key) {
    for (int64_t i = of.first; i < of.last; i++) {
        F sum = set(0.0f);
        for (int64_t col = 0; col < of.dim; col += 16)
            sum = add(sum, mul(load_f32(of.query + col), key(i * of.dim + col)));
        of.room[i - of.first] = of.scale * sum_of(sum);
    }
}

// Scores to their share of the sum; returns 1 over the sum.
float weigh(const Attention& of) {
    int64_t seen = of.last - of.first;
    for (int64_t i = 0; of.cap > 0 && i < seen; i += 16) {
        F part = load_some<F32>(of.room + i, int(smaller(16, seen - i)));
        store_some<F32>(of.room + i, mul(tanh_of(mul(part, set(1 / of.cap))), set(of.cap)), int(smaller(16, seen - i)));
    }
    F top = set(-__builtin_inff()), sum = set(0.0f);
    each_16(seen, seen, [&](int64_t at, auto count) { top = max(load_some<F32>(of.room + at, count), top); });
    float most = greatest(top);
    each_16(seen, seen, [&](int64_t at, auto count) {
        F power = exp_negative(sub(load_some<F32>(of.room + at, count), set(most)));
        store_some<F32>(of.room + at, power, count);
        sum = add(sum, first_lanes(power, count));
    });
    return 1 / sum_of(sum);
}

// `wide` times sixteen columns from `col` on, so that no addition waits for the one before.
template <int wide, class Value>
void mix_columns(const Attention& of, float share, int64_t col, Value value) {
    F total[wide];
    for (F& each : total) each = set(0.0f);
    for (int64_t i = of.first; i < of.last; i++) {
        F part = set(of.room[i - of.first]);
        for (int k = 0; k < wide; k++) total[k] = add(total[k], mul(part, value(i * of.dim + col + 16 * k)));
    }
    for (int k = 0; k < wide; k++) store_f32(of.out + col + 16 * k, mul(total[k], set(share)));
}

template <class Value>
void mix(const Attention& of, float share, Value value) {
    int64_t col = 0;
    for (; col + 64 <= of.dim; col += 64) mix_columns<4>(of, share, col, value);
    for (; col < of.dim; col += 16) mix_columns<1>(of, share, col, value);
}

template <class Body>
void as_kept(const Kept& of, Body body) {
    if (of.as == Keep::f32) body(KeptFloats<F32>(of));
    if (of.as == Keep::f16) body(KeptFloats<F16>(of));
    if (of.as == Keep::int8) body(KeptBytes(of));
}

void attend(const Attention& of) {
    as_kept(of.keys, [&](auto key) { score(of, key); });
    float share = weigh(of);
    as_kept(of.values, [&](auto value) { mix(of, share, value); });
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
