// llama.cpp's encoders, to the bit: lane = block, so that each lane computes in the order of the scalar code.
// Part of kernels.h; the algorithms are those of ggml-quants.c (quantize_row_*_ref and _impl, make_*_quants).
//
// Where a scale would not be finite in float16 it is the greatest that is: the only deviation.

constexpr float group_max_eps = 1e-15f;  // below this a block counts as zero

F choose(M mask, F yes, F no) { return floats(select(mask, bits(yes), bits(no))); }
F magnitude(F x) { return floats(both(bits(x), set(0x7fffffff))); }
F negative(F x) { return mul(x, set(-1.0f)); }
M is_zero(F x) { return at_least(set(0.0f), magnitude(x)); }
F as_half(F x) {
    uint8_t stored[32];
    store_f16(stored, min(max(x, set(-65504.0f)), set(65504.0f)));
    return load_f16(stored);
}

// To the nearest integer, ties to even, by adding 1.5 * 2**23; beyond 2**22 whatever these bits then mean.
constexpr float shift = 12582912.0f;
constexpr int shift_bits = 0x4b400000;
I nearest(F x) { return sub(both(bits(add(x, set(shift))), set(0x007fffff)), set(0x00400000)); }
I nearest_within(F x, int low, int high) { return min(max(nearest(x), set(low)), set(high)); }

// The same as a float, in less operations where every x is known to be within 2**22: the sum's bits count as it does.
template <bool tame>
F level_within(F x, int low, int high) {
    if constexpr (!tame) return to_float(nearest_within(x, low, high));
    I code = min(max(bits(add(x, set(shift))), set(shift_bits + low)), set(shift_bits + high));
    return sub(floats(code), set(shift));
}
bool is_tame(F x) { return all(at_least(set(4e6f), magnitude(x))); }
template <bool is>
struct Tame {
    static constexpr bool value = is;
};
template <class Body>
void with_tame(bool tame, Body body) {
    if (tame)
        body(Tame<true>{});
    else
        body(Tame<false>{});
}

M positive(F x, F y) { return both(above(x, set(0.0f)), above(y, set(0.0f))); }
F where_positive(F x, F yes) { return choose(above(x, set(0.0f)), yes, set(0.0f)); }

// ---- fits of one block ----

// Codes of a fit: nearest(inverse * (x - base)), 0 in lanes that are `idle`.
struct Fit {
    F scale, least, inverse, base;
    M idle;
};

// Codes from 0 to `top`, value = scale * code - least (make_qkx2_quants, make_qkx3_quants).
template <bool absolute>
struct MinFit {
    int count, top;
    const F *x, *w;
    F lowest, low, high, sum_w, sum_x, least_error;
    F inverse, base, of_l, of_l2, of_xl, scale, least, determinant;  // of the attempt, sums over the block
    F levels[32];
    bool small;
    Fit best;

    MinFit(int count, int top, const F* x, const F* w) : count(count), top(top), x(x), w(w) {}

    F penalty(F difference) const { return absolute ? magnitude(difference) : mul(difference, difference); }

    template <bool tame>
    void round() {
        F by = inverse, from = base;
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) levels[i] = level_within<tame>(mul(by, sub(x[i], from)), 0, top);
    }
    // Apart from the rounding: operations that wait for it would keep the processor from those that do not.
    void measure() {
        with_tame(small, [&](auto is) { round<is.value>(); });
        F sum_l = set(0.0f), sum_l2 = sum_l, sum_xl = sum_l;
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            F l = levels[i], wl = mul(w[i], l);
            sum_l = add(sum_l, wl), sum_l2 = add(sum_l2, mul(wl, l)), sum_xl = add(sum_xl, mul(wl, x[i]));
        }
        of_l = sum_l, of_l2 = sum_l2, of_xl = sum_xl;
    }
    F error(F by, F from) const {
        F sum = set(0.0f);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            sum = add(sum, mul(w[i], penalty(sub(add(mul(by, levels[i]), from), x[i]))));
        return sum;
    }

    void begin() {
        low = high = x[0], sum_w = w[0], sum_x = mul(w[0], x[0]);
        for (int i = 1; i < count; i++) {
            low = min(x[i], low), high = max(x[i], high);
            sum_w = add(sum_w, w[i]), sum_x = add(sum_x, mul(w[i], x[i]));
        }
        lowest = low;
        low = min(low, set(0.0f));
        best.idle = at_least(low, high), best.least = low;
        aim(float(top));
        measure();
        best.scale = div(set(1.0f), inverse), best.inverse = inverse, best.base = low;
        least_error = error(best.scale, low);
    }
    void aim(float codes) {
        F spread = choose(best.idle, set(1.0f), sub(high, best.least));
        inverse = div(set(codes), spread), base = best.least;
        small = is_tame(mul(inverse, sub(lowest, base))) && is_tame(mul(inverse, sub(high, base)));
    }
    void solve() {
        determinant = sub(mul(sum_w, of_l2), mul(of_l, of_l));
        scale = div(sub(mul(sum_w, of_xl), mul(sum_x, of_l)), determinant);
        least = div(sub(mul(of_l2, sum_x), mul(of_l, of_xl)), determinant);
        M positive = above(least, set(0.0f));
        least = choose(positive, set(0.0f), least), scale = choose(positive, div(of_xl, of_l2), scale);
    }
    void judge() {
        F found = error(scale, least);
        M better = both(above(determinant, set(0.0f)), above(least_error, found));
        least_error = choose(better, found, least_error);
        best.scale = choose(better, scale, best.scale), best.least = choose(better, least, best.least);
        best.inverse = choose(better, inverse, best.inverse), best.base = choose(better, base, best.base);
    }
    Fit end() {
        best.scale = choose(best.idle, set(0.0f), best.scale);
        best.least = negative(choose(best.idle, low, best.least));
        return best;
    }

    // Several blocks at once: what waits for a division in one is done for all, and not while a loop waits behind it.
    template <int number>
    static void search(MinFit (&fits)[number], float first, float step, int steps) {
        for (MinFit& fit : fits) fit.begin();
        for (int i = 0; i <= steps; i++) {
            for (MinFit& fit : fits) fit.aim(first + step * float(i) + float(fit.top));
            for (MinFit& fit : fits) fit.measure();
            for (MinFit& fit : fits) fit.solve();
            for (MinFit& fit : fits) fit.judge();
        }
    }
};

I codes_of(const Fit& fit, F x, int top) {
    I code = nearest_within(mul(fit.inverse, sub(x, fit.base)), 0, top);
    return select(fit.idle, set(0), code);
}

// The value of greatest magnitude, the first of equals.
struct Peak {
    F size, value;
};
Peak first_peak_of(int count, const F* x) {
    Peak peak{set(0.0f), set(0.0f)};
    for (int i = 0; i < count; i++) {
        F size = magnitude(x[i]);
        M more = above(size, peak.size);
        peak.size = choose(more, size, peak.size), peak.value = choose(more, x[i], peak.value);
    }
    return peak;
}
// Which is first matters where signs differ, which is rare. NaN does not count.
Peak peak_of(int count, const F* x) {
    F low = set(0.0f), high = low;
    for (int i = 0; i < count; i++) low = min(x[i], low), high = max(x[i], high);
    if (any(is_zero(add(low, high)))) return first_peak_of(count, x);
    F value = choose(above(negative(low), high), low, high);
    return {magnitude(value), value};
}

// Codes from -half to half - 1, value = scale * code (make_qx_quants with weights).
Fit fit_signed(int count, int half, const F* x, const F* w) {
    Peak peak = peak_of(count, x);
    M idle = above(set(group_max_eps), peak.size);
    F extreme = choose(idle, set(1.0f), peak.value), wx[32], dot, norm;
    for (int i = 0; i < count; i++) wx[i] = mul(w[i], x[i]);
    auto measure = [&](F inverse) {
        dot = norm = set(0.0f);
        with_tame(is_tame(mul(inverse, peak.size)), [&](auto is) {
            for (int i = 0; i < count; i++) {
                F l = level_within<is.value>(mul(inverse, x[i]), -half, half - 1);
                dot = add(dot, mul(wx[i], l)), norm = add(norm, mul(mul(w[i], l), l));
            }
        });
    };
    Fit best{set(0.0f), set(0.0f), div(set(-float(half)), extreme), set(0.0f), idle};
    measure(best.inverse);
    best.scale = choose(is_zero(norm), set(0.0f), div(dot, norm));
    F most = mul(best.scale, dot);
    for (int step = -9; step <= 9; step++) {
        if (step == 0) continue;
        F inverse = div(set(-(float(half) + 0.1f * float(step))), extreme);
        measure(inverse);
        M better = both(above(norm, set(0.0f)), above(mul(dot, dot), mul(most, norm)));
        best.scale = choose(better, div(dot, norm), best.scale);
        most = choose(better, mul(best.scale, dot), most), best.inverse = choose(better, inverse, best.inverse);
    }
    best.scale = choose(idle, set(0.0f), best.scale);
    return best;
}
// From 0 upwards; 0 as well in idle lanes.
I signed_codes(const Fit& fit, F x, int half) {
    I code = add(nearest_within(mul(fit.inverse, x), -half, half - 1), set(half));
    return select(fit.idle, set(0), code);
}

// One code after the other to where the quotient of sums is best (the end of make_qp_quants). `codes` count from 0.
struct Descent {
    int count, top;
    const F *x, *w;
    F dot, norm;
    I* codes;

    bool change(int i) {
        F l = to_float(codes[i]), wx = mul(w[i], x[i]);
        F rest_dot = sub(dot, mul(wx, l)), rest_norm = sub(norm, mul(mul(w[i], l), l));
        I code = min(nearest(div(mul(x[i], rest_norm), rest_dot)), set(top));
        M other = either(greater(code, codes[i]), greater(codes[i], code));
        if (!any(other)) return false;
        F k = to_float(code), new_dot = add(rest_dot, mul(wx, k)), new_norm = add(rest_norm, mul(mul(w[i], k), k));
        M better = above(mul(mul(new_dot, new_dot), norm), mul(mul(dot, dot), new_norm));
        M change = both(both(positive(rest_dot, rest_norm), other), better);
        codes[i] = select(change, both(code, set(255)), codes[i]);
        dot = choose(change, new_dot, dot), norm = choose(change, new_norm, norm);
        return any(change);
    }
    void run() {
        for (int round = 0; round < 5; round++) {
            bool changed = false;
            for (int i = 0; i < count; i++) changed |= change(i);
            if (!changed) return;
        }
    }
};

// The same for Q3_K (make_q3_quants): weights x**2, codes from -4 to 3, here as floats. Few codes of few blocks change.
struct Walk {
    static constexpr int count = 16, half = 4;
    const F* x;
    F dot, norm, levels[count], dots[count];  // of each weight, what it adds to `dot`
    bool changed;

    F square(int i) const { return mul(x[i], x[i]); }
    F put(int i, F l) {
        levels[i] = l, dots[i] = mul(mul(square(i), x[i]), l);
        return mul(mul(square(i), l), l);
    }
    // `idle`: blocks that count as 0.
    void start(const F* values, const Peak& peak, M idle) {
        x = values, dot = norm = set(0.0f);
        F inverse = div(set(-float(half)), choose(idle, set(1.0f), peak.value));
        for (int i = 0; i < count; i++) {
            norm = add(norm, put(i, level_within<true>(mul(inverse, x[i]), -half, half - 1)));
            dot = add(dot, dots[i]);
        }
    }
    // Where no code can become another. The code wanted, x * (norm - norm_i) / (dot - dot_i), is farther from l than from
    // a tie where |x * norm - l * dot| < (dot - dot_i) / 2, since x * norm_i = l * dot_i; the difference, and a number with
    // enough digits, is more than rounding makes. Where products are infinite, no quotient is better than another.
    M settled(int i) const {
        F most = fma(dot, set(0.4999f), set(-1e-29f));
        F wanted = min(max(mul(x[i], norm), mul(dot, set(-float(half)))), mul(dot, set(float(half - 1))));
        F off = magnitude(fma(negative(levels[i]), dot, wanted));
        return at_least(fma(magnitude(dots[i]), set(-0.5f), most), off);
    }
    M settled() const {
        M all = settled(0);
        for (int i = 1; i < count; i++) all = both(all, settled(i));
        return all;
    }
    void change(int i) {
        F w = square(i), l = levels[i];
        F rest_dot = sub(dot, dots[i]), rest_norm = sub(norm, mul(mul(w, l), l));
        F k = to_float(nearest_within(div(mul(x[i], rest_norm), rest_dot), -half, half - 1));
        F new_dot = add(rest_dot, mul(mul(w, x[i]), k)), new_norm = add(rest_norm, mul(mul(w, k), k));
        M better = above(mul(mul(new_dot, new_dot), norm), mul(mul(dot, dot), new_norm));
        M change = both(both(positive(rest_dot, new_norm), either(above(k, l), above(l, k))), better);
        put(i, choose(change, k, l));
        dot = choose(change, new_dot, dot), norm = choose(change, new_norm, norm);
        changed |= any(change);
    }
    F scale() const { return where_positive(norm, div(dot, norm)); }

    // Several at once, since each step waits for the one before. Most codes are settled after the first round.
    static void run(Walk* walks, int number) {
        bool on[at_once], more = true;
        for (int k = 0; k < number; k++) on[k] = true;
        for (int round = 0; round < 5 && more; round++) {
            for (int k = 0; k < number; k++) walks[k].changed = false;
            for (int i = 0; i < count; i++)
                for (int k = 0; k < number; k++)
                    if (on[k] && (round == 0 || !all(walks[k].settled(i)))) walks[k].change(i);
            more = false;
            for (int k = 0; k < number; k++) more |= on[k] = walks[k].changed;
        }
    }
    static constexpr int at_once = 4;
};

// Codes from 0 of a block of 16.
void codes_q3(const F* x, I* codes) {
    Peak peak = peak_of(Walk::count, x);
    M idle = above(set(group_max_eps), peak.size);
    Walk walk;
    walk.start(x, peak, idle);
    Walk::run(&walk, 1);
    for (int i = 0; i < Walk::count; i++)
        codes[i] = select(idle, set(0), add(to_int(walk.levels[i]), set(Walk::half)));
}

// Scales (or minima) of a super-block as codes from 0 to `top` (make_qp_quants). Returns the scale above them.
F fit_positive(int count, int top, const F* x, const F* w, I* codes) {
    F most = set(0.0f);
    for (int i = 0; i < count; i++) most = choose(above(most, x[i]), most, x[i]);
    M idle = above(set(group_max_eps), most);
    F extreme = choose(idle, set(1.0f), most);
    auto error = [&](F inverse, auto code_of) {
        F scale = div(set(1.0f), inverse), sum = set(0.0f);
        for (int i = 0; i < count; i++) {
            F difference = sub(x[i], mul(scale, to_float(code_of(nearest(mul(inverse, x[i]))))));
            sum = add(sum, mul(mul(w[i], difference), difference));
        }
        return sum;
    };
    F inverse = div(set(float(top)), extreme);
    F least = error(inverse, [](I code) { return both(code, set(255)); });
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        F other = div(set(0.1f * float(step) + float(top)), extreme);
        F found = error(other, [&](I code) { return min(code, set(top)); });
        M better = above(least, found);
        least = choose(better, found, least), inverse = choose(better, other, inverse);
    }
    Descent walk{count, top, x, w, set(0.0f), set(0.0f), codes};
    for (int i = 0; i < count; i++) {
        I code = min(nearest(mul(inverse, x[i])), set(top));
        F l = to_float(code);
        codes[i] = both(code, set(255));
        walk.dot = add(walk.dot, mul(mul(w[i], x[i]), l)), walk.norm = add(walk.norm, mul(mul(w[i], l), l));
    }
    walk.run();
    for (int i = 0; i < count; i++) codes[i] = select(idle, set(0), codes[i]);
    return choose(idle, set(0.0f), where_positive(walk.norm, div(walk.dot, walk.norm)));
}

// ---- the levels of IQ4 ----

struct Iq4 {
    static constexpr float level[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    F levels = load_f32(level), thresholds;
    Iq4() {
        float middle[16];
        for (int i = 0; i < 15; i++) middle[i] = (level[i] + level[i + 1]) / 2;  // exact, and goes upwards
        middle[15] = __builtin_inff();
        thresholds = load_f32(middle);
    }
    // The nearest level's number, 15 for NaN. A curve gives it or the one below, a threshold decides.
    I operator()(F x) const {
        F slope = fma(min(magnitude(x), set(128.0f)), set(-0.00024f), set(0.0905f));
        F from = max(min(fma(x, slope, set(7 + shift)), set(14 + shift)), set(shift));  // the number is in the lowest bits
        I low = both(bits(from), set(15));
        return select(above(lookup16(thresholds, low), x), low, add(low, set(1)));
    }
    F value(I code) const { return lookup16(levels, code); }
};

// The scale of one block of 32 (quantize_row_iq4_nl_impl, ntry = 7).
F fit_iq4(const Iq4& grid, const F* x, const F* w) {
    Peak peak = peak_of(32, x);
    M idle = above(set(group_max_eps), peak.size);
    F extreme = choose(idle, set(1.0f), peak.value), dot, norm;
    auto measure = [&](F inverse) {
        dot = norm = set(0.0f);
        for (int i = 0; i < 32; i++) {
            F q = grid.value(grid(mul(inverse, x[i]))), wq = mul(w[i], q);
            dot = add(dot, mul(wq, x[i])), norm = add(norm, mul(wq, q));
        }
    };
    measure(div(set(1.0f), div(negative(extreme), set(Iq4::level[0]))));
    F scale = where_positive(norm, div(dot, norm)), most = mul(scale, dot);
    for (int step = -7; step <= 7; step++) {
        measure(div(set(float(step) + Iq4::level[0]), extreme));
        M better = both(above(norm, set(0.0f)), above(mul(dot, dot), mul(most, norm)));
        scale = choose(better, div(dot, norm), scale), most = choose(better, mul(scale, dot), most);
    }
    return choose(idle, set(0.0f), scale);
}

F inverse_or_zero(F x) { return choose(is_zero(x), set(0.0f), div(set(1.0f), x)); }

// ---- sixteen blocks ----

// to[i] has value i of each of 16 blocks that follow each other.
void as_columns(const float* from, int count, F* to) {
    auto source = reinterpret_cast<const uint8_t*>(from);
    auto target = reinterpret_cast<uint8_t*>(to);
    int64_t stride = 4 * count;
    for (int lane = 0; lane < 16; lane += 8)
        for (int i = 0; i < count; i += 8)
            transpose8(source + lane * stride + 4 * i, stride, target + 64 * i + 4 * lane, 64);
}

// Blocks as columns, and what is made of them: codes by weight, codes of scales and minima [16][16].
struct Tile {
    F x[256], importance[256], w[256];
    const float* rows;  // x block by block, where nothing is weighted
    F row_sigma;  // mean square of the row
    bool weighted;
    I codes[256];
    uint8_t scale_codes[16 * 16], min_codes[16 * 16];
    F scale, least;

    void code(int i, I value) { codes[i] = value; }
    void scale_code(int i, I value) { store_u8(scale_codes + 16 * i, value); }
    void min_code(int i, I value) { store_u8(min_codes + 16 * i, value); }
    F square_sum(int first, int count) const {
        F sum = set(0.0f);
        for (int i = first; i < first + count; i++) sum = add(sum, mul(x[i], x[i]));
        return sum;
    }
    // weights of a search: importance * sqrt(sigma2 + x**2)
    void weigh(int first, int count, F sigma2) {
        for (int i = first; i < first + count; i++) w[i] = mul(importance[i], sqrt(add(sigma2, mul(x[i], x[i]))));
    }
    F weight_sum(int first, int count) const {
        F sum = set(0.0f);
        for (int i = first; i < first + count; i++) sum = add(sum, w[i]);
        return sum;
    }
};

// Types whose value is scale * code - min in super-blocks: Q2_K, Q4_K, Q5_K.
struct MinKind {
    int size, top, scale_top;   // weights of a block, greatest code, greatest code of scales
    float first, step;          // of the search without importance
    int steps;
};

template <bool absolute>
void fit_two(const Tile& t, const MinKind& kind, int first, float start, float step, int steps, Fit* fits) {
    auto block = [&](int j) { return MinFit<absolute>(kind.size, kind.top, t.x + j * kind.size, t.w + j * kind.size); };
    MinFit<absolute> pair[]{block(first), block(first + 1)};
    MinFit<absolute>::search(pair, start, step, steps);
    fits[first] = pair[0].end(), fits[first + 1] = pair[1].end();
}

template <bool absolute>
void fit_blocks(Tile& t, const MinKind& kind, Fit* fits) {
    int subs = 256 / kind.size;
    F sigma2 = t.weighted ? div(kind.size == 16 ? t.square_sum(0, 256) : mul(set(2.0f), t.square_sum(0, 256)), set(256.0f))
                          : set(0.0f);
    for (int j = 0; j < subs; j++) {
        int at = j * kind.size;
        if (t.weighted) {
            t.weigh(at, kind.size, sigma2);
            continue;
        }
        F mean = absolute ? set(0.0f) : sqrt(div(t.square_sum(at, kind.size), set(float(kind.size))));
        for (int i = at; i < at + kind.size; i++)
            t.w[i] = absolute ? magnitude(t.x[i]) : add(mean, magnitude(t.x[i]));
    }
    for (int j = 0; j < subs; j += 2) {
        if (t.weighted)
            fit_two<false>(t, kind, j, -0.9f, 0.05f, 36, fits);
        else
            fit_two<absolute>(t, kind, j, kind.first, kind.step, kind.steps, fits);
    }
}

// Codes of scales without importance: the greatest becomes `top`, the others in proportion. Returns the scale above.
F proportional(int count, int top, const F* x, I* codes) {
    F most = set(0.0f);
    for (int i = 0; i < count; i++) most = choose(above(x[i], most), x[i], most);
    F inverse = where_positive(most, div(set(float(top)), most));
    for (int i = 0; i < count; i++) codes[i] = both(nearest(mul(inverse, x[i])), set(255));
    return where_positive(most, div(most, set(float(top))));
}

void encode_min_blocks(Tile& t, const MinKind& kind) {
    int subs = 256 / kind.size;
    Fit fits[16];
    if (kind.size == 16)
        fit_blocks<true>(t, kind, fits);
    else
        fit_blocks<false>(t, kind, fits);
    F scales[16], mins[16], weights[16];
    for (int j = 0; j < subs; j++) {
        scales[j] = fits[j].scale, mins[j] = fits[j].least;
        if (t.weighted) weights[j] = t.weight_sum(j * kind.size, kind.size);
    }
    I scale_codes[16], min_codes[16];
    auto above_them = [&](const F* x, I* codes) {
        return as_half(t.weighted ? fit_positive(subs, kind.scale_top, x, weights, codes)
                                  : proportional(subs, kind.scale_top, x, codes));
    };
    t.scale = above_them(scales, scale_codes), t.least = above_them(mins, min_codes);
    for (int j = 0; j < subs; j++) {
        I scale_code = min(scale_codes[j], set(kind.scale_top)), min_code = min(min_codes[j], set(kind.scale_top));
        t.scale_code(j, scale_code), t.min_code(j, min_code);
        F d = mul(t.scale, to_float(scale_code)), m = mul(t.least, to_float(min_code));
        M kept = is_zero(d);
        for (int i = j * kind.size; i < (j + 1) * kind.size; i++)
            t.code(i, nearest_within(div(add(t.x[i], m), d), 0, kind.top));
        for (int i = j * kind.size; any(kept) && i < (j + 1) * kind.size; i++)
            t.code(i, select(kept, codes_of(fits[j], t.x[i], kind.top), t.codes[i]));
    }
}

// Types whose value is scale * code in super-blocks with blocks of 16, codes from -half: Q3_K, Q6_K. `keep(j, codes)`
// gives those of a block's fit, which stay where its scale became 0.
template <class Keep>
void finish_signed_blocks(Tile& t, int half, const I* scale_codes, int scale_half, Keep keep) {
    for (int j = 0; j < 16; j++) {
        t.scale_code(j, add(scale_codes[j], set(scale_half)));
        F d = mul(t.scale, to_float(scale_codes[j]));
        for (int i = 0; i < 16; i++)
            t.code(16 * j + i, add(nearest_within(div(t.x[16 * j + i], d), -half, half - 1), set(half)));
        M kept = is_zero(d);
        if (!any(kept)) continue;
        I codes[16];
        keep(j, codes);
        for (int i = 0; i < 16; i++) t.code(16 * j + i, select(kept, codes[i], t.codes[16 * j + i]));
    }
}

// Walks of blocks (number of the block times 16, plus that of the super-block), sixteen in the lanes of one.
void walk_q3(const Tile& t, int count, const uint8_t* chosen, float* scales) {
    Walk walks[Walk::at_once];
    F x[Walk::at_once][16];
    for (int first = 0; first < count; first += 16 * Walk::at_once) {
        int number = int(smaller((count - first + 15) / 16, Walk::at_once));
        auto of = [&](int k) { return chosen[smaller(first + k, count - 1)]; };
        for (int k = 0; k < number; k++) {
            float room[16 * 16];
            for (int lane = 0; lane < 16; lane++)
                __builtin_memcpy(room + lane * 16, t.rows + of(16 * k + lane) % 16 * 256 + of(16 * k + lane) / 16 * 16, 64);
            as_columns(room, 16, x[k]);
            Peak peak = peak_of(Walk::count, x[k]);
            walks[k].start(x[k], peak, above(set(group_max_eps), peak.size));
        }
        Walk::run(walks, number);
        for (int k = 0; k < number; k++) {
            float found[16];
            store_f32(found, walks[k].scale());
            for (int lane = 0; lane < 16; lane++) scales[of(16 * k + lane)] = found[lane];
        }
    }
}

// Scales of blocks for weights x**2 (make_q3_quants). Where the value of greatest magnitude is above 0 codes have the other
// sign than weights: no sum is above 0, and no code is changed. Of the others most are settled as they are; what is left, a
// sixth of all, comes together for its walk.
void fit_q3(const Tile& t, F* scales) {
    float found[256];
    uint8_t chosen[256];
    int count = 0;
    for (int j = 0; j < 16; j++) {
        Peak peak = peak_of(Walk::count, t.x + 16 * j);
        M idle = above(set(group_max_eps), peak.size);
        Walk walk;
        walk.start(t.x + 16 * j, peak, idle);
        store_f32(found + 16 * j, choose(idle, set(0.0f), walk.scale()));
        float extreme[16];
        store_f32(extreme, choose(either(idle, walk.settled()), set(0.0f), peak.value));
        for (int lane = 0; lane < 16; lane++) chosen[count] = uint8_t(16 * j + lane), count += extreme[lane] < 0;
    }
    walk_q3(t, count, chosen, found);
    for (int j = 0; j < 16; j++) scales[j] = load_f32(found + 16 * j);
}

void encode_q3_k(Tile& t) {
    F scales[16], weights[16];
    Fit fits[16];
    I scale_codes[16];
    F sigma2 = t.weighted ? div(mul(set(2.0f), t.square_sum(0, 256)), set(256.0f)) : set(0.0f);
    if (!t.weighted) fit_q3(t, scales);
    for (int j = 0; t.weighted && j < 16; j++) {
        t.weigh(16 * j, 16, sigma2);
        weights[j] = t.weight_sum(16 * j, 16);
        fits[j] = fit_signed(16, 4, t.x + 16 * j, t.w + 16 * j);
        scales[j] = fits[j].scale;
    }
    if (t.weighted) {
        Fit fit = fit_signed(16, 32, scales, weights);
        t.scale = as_half(fit.scale);
        for (int j = 0; j < 16; j++) scale_codes[j] = sub(signed_codes(fit, scales[j], 32), set(32));
    } else {
        Peak peak = peak_of(16, scales);
        M nothing = is_zero(peak.value);
        F inverse = div(set(-32.0f), choose(nothing, set(1.0f), peak.value));
        t.scale = choose(nothing, set(0.0f), as_half(div(set(1.0f), inverse)));
        for (int j = 0; j < 16; j++)
            scale_codes[j] = select(nothing, set(-32), nearest_within(mul(inverse, scales[j]), -32, 31));
    }
    finish_signed_blocks(t, 4, scale_codes, 32, [&](int j, I* codes) {
        if (!t.weighted) return codes_q3(t.x + 16 * j, codes);
        for (int i = 0; i < 16; i++) codes[i] = signed_codes(fits[j], t.x[16 * j + i], 4);
    });
}

void encode_q6_k(Tile& t) {
    F scales[16];
    Fit fits[16];
    I scale_codes[16];
    for (int j = 0; j < 16; j++) {
        const F *x = t.x + 16 * j, *w = t.importance + 16 * j;
        if (!t.weighted) {
            for (int i = 16 * j; i < 16 * j + 16; i++) t.w[i] = mul(t.x[i], t.x[i]);
            w = t.w + 16 * j;
        }
        fits[j] = fit_signed(16, 32, x, w);
        scales[j] = fits[j].scale;
    }
    Peak peak = peak_of(16, scales);
    M nothing = above(set(group_max_eps), peak.size);
    F inverse = div(set(-128.0f), choose(nothing, set(1.0f), peak.value));
    t.scale = choose(nothing, set(0.0f), as_half(div(set(1.0f), inverse)));
    for (int j = 0; j < 16; j++) {
        I code = min(nearest(mul(inverse, scales[j])), set(127));
        scale_codes[j] = select(nothing, set(0), code);
    }
    finish_signed_blocks(t, 32, scale_codes, 128, [&](int j, I* codes) {
        for (int i = 0; i < 16; i++) codes[i] = select(nothing, set(0), signed_codes(fits[j], t.x[16 * j + i], 32));
    });
}

void weigh_iq4(Tile& t, int count) {
    F sigma2 = mul(t.square_sum(0, count), set(2.0f / float(count)));
    if (t.weighted) return t.weigh(0, count, sigma2);
    for (int i = 0; i < count; i++) t.w[i] = mul(t.x[i], t.x[i]);
}

void encode_iq4_nl(Tile& t) {
    Iq4 grid;
    weigh_iq4(t, 32);
    F scale = fit_iq4(grid, t.x, t.w), inverse = inverse_or_zero(scale);
    t.scale = as_half(scale);
    for (int i = 0; i < 32; i++) t.code(i, grid(mul(inverse, t.x[i])));
}

void encode_iq4_xs(Tile& t) {
    Iq4 grid;
    weigh_iq4(t, 256);
    F scales[8];
    for (int j = 0; j < 8; j++) scales[j] = fit_iq4(grid, t.x + 32 * j, t.w + 32 * j);
    F d = div(negative(peak_of(8, scales).value), set(32.0f)), inverse = inverse_or_zero(d);
    t.scale = as_half(d);
    for (int j = 0; j < 8; j++) {
        I code = nearest_within(mul(inverse, scales[j]), -32, 31);
        t.scale_code(j, add(code, set(32)));
        F by = inverse_or_zero(mul(d, to_float(code)));
        for (int i = 32 * j; i < 32 * j + 32; i++) t.code(i, grid(mul(by, t.x[i])));
    }
}

// ---- blocks of 32, and ternary ones of 256 ----

// Codes from -half to half - 1 (Q4_0, Q5_0): the value of greatest magnitude is -half.
void encode_symmetric(Tile& t, int half) {
    if (t.weighted) {
        t.weigh(0, 32, t.row_sigma);
        Fit fit = fit_signed(32, half, t.x, t.w);
        t.scale = as_half(fit.scale);
        for (int i = 0; i < 32; i++) t.code(i, signed_codes(fit, t.x[i], half));
        return;
    }
    F d = div(peak_of(32, t.x).value, set(-float(half))), inverse = inverse_or_zero(d);
    t.scale = as_half(d);
    for (int i = 0; i < 32; i++) {
        I code = to_int(add(mul(t.x[i], inverse), set(float(half) + 0.5f)));  // what is out of range is INT_MIN
        t.code(i, both(min(code, set(2 * half - 1)), set(255)));
    }
}

// Codes from 0 to top over the range of the block (Q4_1, Q5_1).
void encode_ranged(Tile& t, int top) {
    if (t.weighted) {
        t.weigh(0, 32, t.row_sigma);
        MinFit<false> search[]{{32, top, t.x, t.w}};
        MinFit<false>::search(search, -0.9f, 0.05f, 36);
        Fit fit = search[0].end();
        t.scale = as_half(fit.scale), t.least = as_half(fit.least);
        for (int i = 0; i < 32; i++) t.code(i, codes_of(fit, t.x[i], top));
        return;
    }
    F low = set(__FLT_MAX__), high = set(-__FLT_MAX__);
    for (int i = 0; i < 32; i++) low = min(t.x[i], low), high = max(t.x[i], high);
    F d = div(sub(high, low), set(float(top))), inverse = inverse_or_zero(d);
    t.scale = as_half(d), t.least = negative(as_half(low));
    for (int i = 0; i < 32; i++) {
        I code = to_int(add(mul(sub(t.x[i], low), inverse), set(0.5f)));
        t.code(i, both(min(code, set(top)), set(top)));
    }
}

// To the nearest integer, ties away from 0; INT_MIN where int32 has none.
I round_away(F x) {
    F whole = to_float(to_int(x));
    F rest = sub(x, whole);
    F up = choose(at_least(rest, set(0.5f)), set(1.0f), set(0.0f));
    F down = choose(at_least(set(-0.5f), rest), set(1.0f), set(0.0f));
    return to_int(sub(add(whole, up), down));
}

// Codes whose greatest magnitude is `top`: Q8_0 (127), TQ1_0 and TQ2_0 (1); `offset` is that of the codes.
void encode_rounded(Tile& t, int count, float top, int offset, int mask) {
    F d = peak_of(count, t.x).size;
    if (top != 1.0f) d = div(d, set(top));
    F inverse = inverse_or_zero(d);
    t.scale = as_half(d);
    for (int i = 0; i < count; i++) t.code(i, both(add(round_away(mul(t.x[i], inverse)), set(offset)), set(mask)));
}

void encode_mxfp4(Tile& t) {
    static constexpr float levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // twice E2M1's
    float size[16], scale[16];
    int32_t half[16];
    store_f32(size, peak_of(32, t.x).size);
    for (int i = 0; i < 16; i++) {
        int exponent = size[i] > 0 ? int(__builtin_floorf(__builtin_log2f(size[i])) - 2 + 127) & 255 : 0;
        int32_t whole = exponent == 0 ? 1 << 22 : exponent << 23;
        half[i] = exponent < 2 ? 0x00200000 << exponent : (exponent - 1) << 23;
        __builtin_memcpy(scale + i, &whole, 4);
    }
    t.scale = load_f32(scale);
    F d = load_f32(half);
    for (int i = 0; i < 32; i++) {
        F least = magnitude(sub(mul(set(levels[0]), d), t.x[i]));
        I code = set(0);
        for (int k = 1; k < 16; k++) {
            F error = magnitude(sub(mul(set(levels[k]), d), t.x[i]));
            M better = above(least, error);
            least = choose(better, error, least), code = select(better, set(k), code);
        }
        t.code(i, code);
    }
}

void encode_tile(GgmlType type, Tile& t) {
    switch (type) {
    case GgmlType::q4_0: return encode_symmetric(t, 8);
    case GgmlType::q5_0: return encode_symmetric(t, 16);
    case GgmlType::q4_1: return encode_ranged(t, 15);
    case GgmlType::q5_1: return encode_ranged(t, 31);
    case GgmlType::q8_0: return encode_rounded(t, 32, 127, 128, 255);
    case GgmlType::tq1_0:
    case GgmlType::tq2_0: return encode_rounded(t, 256, 1, 1, 3);
    case GgmlType::mxfp4: return encode_mxfp4(t);
    case GgmlType::q2_k: return encode_min_blocks(t, {16, 3, 15, -0.5f, 0.1f, 15});
    case GgmlType::q4_k: return encode_min_blocks(t, {32, 15, 63, -1.0f, 0.1f, 20});
    case GgmlType::q5_k: return encode_min_blocks(t, {32, 31, 63, -0.5f, 0.1f, 15});
    case GgmlType::q3_k: return encode_q3_k(t);
    case GgmlType::q6_k: return encode_q6_k(t);
    case GgmlType::iq4_nl: return encode_iq4_nl(t);
    case GgmlType::iq4_xs: return encode_iq4_xs(t);
    default: return;  // types with tables are in ggml_grid_encode.h
    }
}

// ---- tiles of a weight ----

// The codes of 16 blocks one after the other: four of a lane make a word, words are transposed.
void as_blocks(const I* codes, int count, uint8_t* to) {
    uint8_t words[256 / 4 * 64];
    auto put = [&](int i) {
        I low = either(codes[i], shift_left<8>(codes[i + 1]));
        I high = either(codes[i + 2], shift_left<8>(codes[i + 3]));
        store_f32(words + 16 * i, floats(either(low, shift_left<16>(high))));
    };
    for (int i = 0; i < count; i += 4) put(i);
    for (int lane = 0; lane < 16; lane += 8)
        for (int i = 0; i < count; i += 32) transpose8(words + 16 * i + 4 * lane, 64, to + lane * count + i, count);
}

bool looks_at_importance(GgmlType type) {
    return type != GgmlType::q8_0 && type != GgmlType::tq1_0 && type != GgmlType::tq2_0 && type != GgmlType::mxfp4;
}

float mean_square(const float* row, int64_t cols) {
    float sum = 0;
    for (int64_t i = 0; i < cols; i++) sum += row[i] * row[i];
    return sum / float(cols);
}

void store_columns(const uint8_t* from, int count, int lane, uint8_t* to) {
    for (int i = 0; i < count; i++) to[i] = from[16 * i + lane];
}

bool all_finite(const F* x, int count) {
    I most = set(0);
    for (int i = 0; i < count; i++) most = max(bits(magnitude(x[i])), most);
    return !any(greater(most, set(0x7f7fffff)));
}

// `encode` makes a tile of codes and scales; `weighted`: it reads the importance. Whether all weights are finite.
template <class Encode>
bool encode_tiles(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance, bool weighted,
                  const GgmlEncoded& out, Encode encode) {
    GgmlShape shape = ggml_shape(type);
    int64_t blocks = rows * (cols / shape.weights), across = cols / shape.weights, sigma_row = -1;
    bool by_row = importance && looks_at_importance(type) && shape.weights == 32 && type != GgmlType::iq4_nl;
    float sigmas[16] = {}, sigma = 0, scale[16], least[16];
    Tile tile;
    tile.least = set(0.0f);
    tile.weighted = weighted;
    float room[16 * 256];
    uint8_t codes[16 * 256];
    for (int64_t first = 0; first < blocks; first += 16) {
        int lanes = int(smaller(16, blocks - first));
        auto gather = [&](auto of, F* to) {  // lanes beyond the last block repeat the first
            for (int lane = 0; lane < 16; lane++)
                __builtin_memcpy(room + lane * shape.weights, of(first + (lane < lanes ? lane : 0)), 4 * shape.weights);
            as_columns(room, shape.weights, to);
        };
        auto weight_of = [&](int64_t block) { return weight + block * shape.weights; };
        tile.rows = lanes == 16 ? weight_of(first) : room;
        int64_t next = smaller(blocks - first, 32) - 16;  // blocks of the next tile are on their way while this one is done
        for (int64_t i = 0; i < next * shape.weights; i += 16) __builtin_prefetch(weight_of(first + 16) + i, 0, 2);
        if (lanes == 16)
            as_columns(tile.rows, shape.weights, tile.x);
        else
            gather(weight_of, tile.x);
        if (!all_finite(tile.x, shape.weights)) return false;
        if (tile.weighted) gather([&](int64_t block) { return importance + block % across * shape.weights; }, tile.importance);
        for (int lane = 0; by_row && lane < lanes; lane++) {
            int64_t row = (first + lane) / across;
            if (row > sigma_row) sigma = mean_square(weight + row * cols, cols), sigma_row = row;
            sigmas[lane] = sigma;
        }
        tile.row_sigma = load_f32(sigmas);
        encode(tile);
        as_blocks(tile.codes, shape.weights, lanes == 16 ? out.codes + first * shape.weights : codes);
        if (lanes < 16) __builtin_memcpy(out.codes + first * shape.weights, codes, lanes * shape.weights);
        store_f32(scale, tile.scale), store_f32(least, tile.least);
        __builtin_memcpy(out.scale + first, scale, 4 * lanes);
        if (out.min) __builtin_memcpy(out.min + first, least, 4 * lanes);
        for (int lane = 0; lane < lanes; lane++) {
            int64_t at = (first + lane) * shape.subs;
            if (out.scale_codes) store_columns(tile.scale_codes, shape.subs, lane, out.scale_codes + at);
            if (out.min_codes) store_columns(tile.min_codes, shape.subs, lane, out.min_codes + at);
        }
    }
    return true;
}

bool ggml_encode(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
                 const GgmlEncoded& out) {
    return encode_tiles(type, rows, cols, weight, importance, importance && looks_at_importance(type), out,
                        [&](Tile& tile) { encode_tile(type, tile); });
}
