// Attention of one query, and the gate of a feed-forward layer. Included by kernels.h.

F dot_of(const float* a, const float* b, int64_t count) {
    F sum = set(0.0f);
    for (int64_t i = 0; i < count; i += 16) sum = add(sum, mul(load_f32(a + i), load_f32(b + i)));
    return sum;
}

void attend(const Attention& of) {
    int64_t seen = of.last - of.first;
    const float* keys = of.keys + of.first * of.dim;
    const float* values = of.values + of.first * of.dim;
    float most = -__builtin_inff();
    for (int64_t i = 0; i < seen; i++) {
        float score = of.scale * sum_of(dot_of(of.query, keys + i * of.dim, of.dim));
        of.room[i] = score, most = score > most ? score : most;
    }
    F sum = set(0.0f);
    each_16(seen, seen, [&](int64_t at, auto count) {
        F power = exp_negative(sub(load_some<F32>(of.room + at, count), set(most)));
        store_some<F32>(of.room + at, power, count);
        sum = add(sum, first_lanes(power, count));
    });
    float share = 1 / sum_of(sum);
    for (int64_t col = 0; col < of.dim; col += 16) {
        F total = set(0.0f);
        for (int64_t i = 0; i < seen; i++) total = add(total, mul(set(of.room[i]), load_f32(values + i * of.dim + col)));
        store_f32(of.out + col, mul(total, set(share)));
    }
}

// x / (1 + exp(-x)) * up, in place of x.
void gate(int64_t count, float* x, const float* up) {
    each_16(count, count, [&](int64_t at, auto lanes) {
        F value = load_some<F32>(x + at, lanes);
        F power = exp_negative(min(value, sub(set(0.0f), value)));  // of -|x|
        M positive = at_least(value, set(0.0f));
        F above = floats(select(positive, bits(set(1.0f)), bits(power)));
        F share = div(above, add(set(1.0f), power));
        store_some<F32>(x + at, mul(mul(value, share), load_some<F32>(up + at, lanes)), lanes);
    });
}
