// Softmax of causal attention scores and its derivative, a row at a time. Included by kernels.h.

// exp(x) for x <= 0 to 2**-18 of itself, as 2**n times a polynomial; below -87 exp(-87). NaN stays NaN.
F exp_negative(F x) {
    x = max(set(-87.0f), x);
    F n = max(rint(mul(x, set(1.442695041f))), set(-126.0f));  // -126 for NaN, which has no integer
    // ln 2 in two parts: n times the first is exact
    F rest = sub(sub(x, mul(n, set(0.693359375f))), mul(n, set(-0.00021219444f)));
    F sum = set(1.0f / 120);
    for (float factor : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = add(mul(sum, rest), set(factor));
    return mul(sum, floats(shift_left<23>(add(to_int(n), set(127)))));
}

// The first `count` of 16 lanes that are all there: what is stored beyond them is made 0 later.
struct First {
    int count;
};
F or_else(F value, First first, float other) {
    static const uint8_t index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return floats(select(greater(set(first.count), load_u8(index)), bits(value), bits(set(other))));
}
F or_else(F value, int, float) { return value; }  // they repeat the first lane
F or_else(F value, Full, float) { return value; }
F first_lanes(F value, First first) { return or_else(value, first, 0.0f); }
template <class T>
F load_some(const void* from, First) {
    return T::load(from);
}
template <class T>
void store_some(void* to, F value, First) {
    T::store(to, value);
}

// body(at, count) for each run of 16 of the columns that are seen.
template <class Body>
void each_16(int64_t seen, int64_t cols, Body body) {
    int64_t at = 0;
    for (; at + 16 <= seen; at += 16) body(at, Full{});
    if (at < seen && at + 16 <= cols) return body(at, First{int(seen - at)});
    if (at < seen) body(at, int(seen - at));
}

int64_t columns_seen(const Causal& of, int64_t row) { return smaller(of.first + row % of.period + 1, of.cols); }

template <class From, class To>
void softmax_row(const uint8_t* from, uint8_t* to, int64_t seen, int64_t cols, float scale, float* room) {
    constexpr float least = -__builtin_inff();
    F most = set(least), sum = set(0.0f);
    each_16(seen, cols, [&](int64_t at, auto count) {
        most = max(most, or_else(load_some<From>(from + at * From::size, count), count, least));
    });
    most = set(greatest(most));
    each_16(seen, cols, [&](int64_t at, auto count) {
        F power = exp_negative(mul(sub(load_some<From>(from + at * From::size, count), most), set(scale)));
        store_f32(room + at, power);
        sum = add(sum, first_lanes(power, count));
    });
    F share = set(1 / sum_of(sum));
    each_16(seen, cols, [&](int64_t at, auto count) {
        store_some<To>(to + at * To::size, mul(load_f32(room + at), share), count);
    });
}

void softmax(const Causal& of, Weight scores, Output out, float* room) {
    with_dtype(scores.dtype, [&](auto from_type) {
        with_dtype(out.dtype, [&](auto to_type) {
            using From = decltype(from_type);
            using To = decltype(to_type);
            auto from = static_cast<const uint8_t*>(scores.data);
            auto to = static_cast<uint8_t*>(out.data);
            for (int64_t row = 0; row < of.rows; row++, from += of.cols * From::size, to += of.cols * To::size) {
                int64_t seen = columns_seen(of, row);
                softmax_row<From, To>(from, to, seen, of.cols, of.scale, room);
                __builtin_memset(to + seen * To::size, 0, (of.cols - seen) * To::size);
            }
        });
    });
}

void softmax_slopes(const Causal& of, Weight shares, Output slopes) {
    with_dtype(shares.dtype, [&](auto type) {
        using T = decltype(type);
        auto share = static_cast<const uint8_t*>(shares.data);
        auto slope = static_cast<uint8_t*>(slopes.data);
        for (int64_t row = 0; row < of.rows; row++, share += of.cols * T::size, slope += of.cols * T::size) {
            int64_t seen = columns_seen(of, row);
            F sum = set(0.0f), scale = set(of.scale);
            each_16(seen, of.cols, [&](int64_t at, auto count) {
                F p = load_some<T>(share + at * T::size, count), g = load_some<T>(slope + at * T::size, count);
                sum = add(sum, first_lanes(mul(p, g), count));
            });
            F mean = set(sum_of(sum));
            each_16(seen, of.cols, [&](int64_t at, auto count) {
                F p = load_some<T>(share + at * T::size, count), g = load_some<T>(slope + at * T::size, count);
                store_some<T>(slope + at * T::size, mul(mul(p, sub(g, mean)), scale), count);
            });
            __builtin_memset(slope + seen * T::size, 0, (of.cols - seen) * T::size);
        }
    });
}
