// llama.cpp's types with less error than its own encoders: lane = block, as in ggml_encode.h. Part of kernels.h.
//
// The error is sum w (x - value)**2 with w the importance, or 1. Each block gets its scale (and minimum) by least
// squares under many roundings; super-blocks choose the scale above these, then move the codes of scales and minima
// one by one, each with its weights rounded anew, and fit the scales above again. What the exact encoder found is kept
// where it is better.

// ---- grids ----

constexpr float e2m1_level[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// Levels from `low` to `high`; codes count from 0.
struct Whole {
    int low, high, base;  // base: level of code 0
    F level(F x) const { return level_within<true>(x, low, high); }
    F value(I code) const { return to_float(add(code, set(base))); }
    I code(F x) const { return sub(to_int(level(x)), set(base)); }
};

struct Uneven {
    Iq4 grid;
    F level(F x) const { return grid.value(grid(x)); }
    F value(I code) const { return grid.value(code); }
    I code(F x) const { return grid(x); }
};

// Where the value of greatest magnitude may come to lie while a scale is searched: levels from `near` to `far`, and on
// the other side of 0 likewise. With minima: how many levels the range may span.
struct Trials {
    int steps;
    float near, far, other_near = 0.0f, other_far = 0.0f;
};

// ---- one block ----

// Sums over a block under value = scale * l - least, r = x - value.
struct Pass {
    F error, of_l, of_l2, of_r, of_rl;
};

template <bool with_min, class G>
Pass pass_over(const G& grid, int count, const F* x, const F* w, F scale, F least) {
    F zero = set(0.0f), inverse = inverse_or_zero(scale);
    Pass p{zero, zero, zero, zero, zero};
    for (int i = 0; i < count; i++) {
        F from = with_min ? add(x[i], least) : x[i];
        F l = grid.level(mul(from, inverse)), r = sub(from, mul(scale, l)), wr = mul(w[i], r), wl = mul(w[i], l);
        p.error = add(p.error, mul(wr, r)), p.of_rl = add(p.of_rl, mul(wr, l)), p.of_l2 = add(p.of_l2, mul(wl, l));
        if constexpr (with_min) p.of_l = add(p.of_l, wl), p.of_r = add(p.of_r, wr);
    }
    return p;
}

struct Line {
    F scale, least;
};

F ratio_or(F above_it, F below, F otherwise) { return choose(above(below, set(0.0f)), div(above_it, below), otherwise); }

// The scale for which the least squares of some rounding explain most; `otherwise` where nothing counts.
template <class G>
F fit_scale(const G& grid, const Trials& trials, int count, const F* x, const F* w, F otherwise) {
    F peak = peak_of(count, x).value, unit = inverse_or_zero(peak), best = otherwise, most = set(0.0f), wx[256];
    for (int i = 0; i < count; i++) wx[i] = mul(w[i], x[i]);
    auto attempt = [&](float level) {
        F inverse = mul(unit, set(level)), dot = set(0.0f), norm = set(0.0f);
        for (int i = 0; i < count; i++) {
            F l = grid.level(mul(inverse, x[i]));
            dot = add(dot, mul(wx[i], l)), norm = add(norm, mul(mul(w[i], l), l));
        }
        F scale = ratio_or(dot, norm, set(0.0f)), gain = mul(scale, dot);
        M better = above(gain, most);
        best = choose(better, scale, best), most = choose(better, gain, most);
    };
    for (int i = 0; i < trials.steps; i++) {
        float share = float(i) / float(trials.steps - 1);
        attempt(trials.near + share * (trials.far - trials.near));
        if (trials.other_near != 0.0f) attempt(trials.other_near + share * (trials.other_far - trials.other_near));
    }
    return best;
}

// Scale and minimum; the minimum is at least 0 unless `free`.
struct LineFit {
    int count, top;
    const F *x, *w;
    bool free;

    Line solve(F of_w, F of_x, F of_l, F of_l2, F of_xl, Line otherwise) const {
        F determinant = sub(mul(of_w, of_l2), mul(of_l, of_l));
        M sound = above(determinant, mul(set(1e-6f), mul(of_w, of_l2)));
        Line line{div(sub(mul(of_w, of_xl), mul(of_x, of_l)), determinant),
                  div(sub(mul(of_l, of_xl), mul(of_l2, of_x)), determinant)};
        if (!free) {
            M negative_min = above(set(0.0f), line.least);
            line.scale = choose(negative_min, ratio_or(of_xl, of_l2, otherwise.scale), line.scale);
            line.least = choose(negative_min, set(0.0f), line.least);
        }
        return {choose(sound, line.scale, otherwise.scale), choose(sound, line.least, otherwise.least)};
    }

    Line operator()(const Trials& trials, int rounds) const {
        F low = x[0], high = x[0], of_w = set(0.0f), of_x = set(0.0f), wx[32];
        for (int i = 0; i < count; i++) {
            low = min(x[i], low), high = max(x[i], high);
            wx[i] = mul(w[i], x[i]), of_w = add(of_w, w[i]), of_x = add(of_x, wx[i]);
        }
        if (!free) low = min(low, set(0.0f)), high = max(high, set(0.0f));
        F unit = inverse_or_zero(sub(high, low));
        Line best{mul(sub(high, low), set(1.0f / float(top))), negative(low)};
        F most = set(-__FLT_MAX__);
        auto attempt = [&](F inverse, F least, Line otherwise) {
            F of_l = set(0.0f), of_l2 = of_l, of_xl = of_l;
            for (int i = 0; i < count; i++) {
                F l = level_within<true>(mul(inverse, add(x[i], least)), 0, top), wl = mul(w[i], l);
                of_l = add(of_l, wl), of_l2 = add(of_l2, mul(wl, l)), of_xl = add(of_xl, mul(wx[i], l));
            }
            Line line = solve(of_w, of_x, of_l, of_l2, of_xl, otherwise);
            // what is explained: 2 x v - v**2
            F s = line.scale, m = line.least;
            F cross = sub(mul(s, of_xl), mul(m, of_x));
            F square = add(sub(mul(mul(s, s), of_l2), mul(mul(mul(set(2.0f), s), m), of_l)), mul(mul(m, m), of_w));
            F gain = sub(mul(set(2.0f), cross), square);
            M better = above(gain, most);
            best = {choose(better, s, best.scale), choose(better, m, best.least)};
            most = choose(better, gain, most);
        };
        for (int i = 0; i < trials.steps; i++) {
            float span = trials.near + float(i) / float(trials.steps - 1) * (trials.far - trials.near);
            F inverse = mul(unit, set(span));
            F step = ratio_or(set(1.0f), inverse, set(0.0f));
            for (float shift : {0.0f, 0.5f, -0.5f}) attempt(inverse, sub(mul(set(shift), step), low), best);
        }
        for (int i = 0; i < rounds; i++) attempt(inverse_or_zero(best.scale), best.least, best);
        return best;
    }
};

// ---- a tile ----

struct FitKind {
    int size, subs;           // weights of a block, blocks
    int scale_low, scale_top; // codes of scales; both 0 where there are none
    Trials trials, upper;     // of the scales of blocks, and of the scale above
    int reach, rounds;        // how far codes of scales are moved, and how often
};

template <bool with_min, class G>
struct TileFit {
    const G& grid;
    const FitKind& kind;
    const F *x, *w;
    F scale = set(0.0f), least = set(0.0f), c[16], k[16], error = set(0.0f);

    TileFit(const G& grid, const FitKind& kind, const F* x, const F* w) : grid(grid), kind(kind), x(x), w(w) {}

    const F* block(const F* of, int j) const { return of + j * kind.size; }
    Pass look(int j, F of_scale, F of_least) const {
        return pass_over<with_min>(grid, kind.size, block(x, j), block(w, j), of_scale, of_least);
    }

    // Scales and minima without their codes, then the scales above these.
    void start() {
        F s[16], m[16], curve[16], weight[16], slope[16];
        for (int j = 0; j < kind.subs; j++) {
            m[j] = set(0.0f);
            if constexpr (with_min) {
                Line line = LineFit{kind.size, grid.high, block(x, j), block(w, j), kind.scale_top == 0}(kind.trials, 2);
                s[j] = line.scale, m[j] = line.least;
            } else {
                F peak = peak_of(kind.size, block(x, j)).value;
                F plain = mul(peak, set(1.0f / kind.trials.near));
                s[j] = fit_scale(grid, kind.trials, kind.size, block(x, j), block(w, j), plain);
            }
            Pass p = look(j, s[j], m[j]);
            weight[j] = set(0.0f);
            for (int i = 0; i < kind.size; i++) weight[j] = add(weight[j], block(w, j)[i]);
            slope[j] = ratio_or(p.of_l, weight[j], set(0.0f));
            curve[j] = max(sub(p.of_l2, mul(p.of_l, slope[j])), mul(p.of_l2, set(1e-3f)));
        }
        if (kind.scale_top == 0) {
            scale = as_half(s[0]), least = as_half(m[0]), c[0] = k[0] = set(1.0f);
            return;
        }
        scale = upper(s, curve, kind.scale_low, kind.scale_top, c);
        if constexpr (with_min) {
            for (int j = 0; j < kind.subs; j++) m[j] = max(add(m[j], mul(slope[j], sub(mul(scale, c[j]), s[j]))), set(0.0f));
            least = upper(m, weight, 0, kind.scale_top, k);
        }
    }
    F upper(const F* values, const F* weights, int low, int top, F* codes) const {
        F peak = peak_of(kind.subs, values).value;
        Whole whole{low, top, low};
        F found = as_half(fit_scale(whole, kind.upper, kind.subs, values, weights, mul(peak, set(1.0f / kind.upper.near))));
        F inverse = inverse_or_zero(found);
        for (int j = 0; j < kind.subs; j++) codes[j] = whole.level(mul(values[j], inverse));
        return found;
    }

    // Codes of scales and minima of one block, with its weights rounded anew.
    void move(int j, F of_w) {
        Pass now = look(j, mul(scale, c[j]), mul(least, k[j]));
        F best = now.error, best_c = c[j], best_k = k[j], c0 = c[j], m0 = mul(least, k[j]);
        F inverse = inverse_or_zero(least);
        for (int step = -kind.reach; step <= kind.reach; step++) {
            F other = min(max(add(c0, set(float(step))), set(float(kind.scale_low))), set(float(kind.scale_top)));
            F other_k = k[j];
            if constexpr (with_min) {
                // where sum w r is 0 with codes as they are
                F change = sub(mul(mul(scale, sub(other, c0)), now.of_l), now.of_r);
                F wanted = mul(add(m0, ratio_or(change, of_w, set(0.0f))), inverse);
                other_k = level_within<true>(wanted, 0, kind.scale_top);
            } else if (step == 0)
                continue;
            F found = look(j, mul(scale, other), mul(least, other_k)).error;
            M better = above(best, found);
            best = choose(better, found, best), best_c = choose(better, other, best_c);
            best_k = choose(better, other_k, best_k);
        }
        c[j] = best_c, k[j] = best_k;
    }

    // Least squares of the scales above, with all else as it is; then codes anew. Kept where it is better.
    void refit() {
        F zero = set(0.0f), aa = zero, ab = zero, bb = zero, ra = zero, rb = zero, before = zero, after = zero;
        for (int j = 0; j < kind.subs; j++) {
            Pass p = look(j, mul(scale, c[j]), mul(least, k[j]));
            before = add(before, p.error);
            aa = add(aa, mul(mul(c[j], c[j]), p.of_l2)), ra = add(ra, mul(c[j], p.of_rl));
            if constexpr (with_min) {
                ab = sub(ab, mul(mul(c[j], k[j]), p.of_l)), rb = sub(rb, mul(k[j], p.of_r));
                bb = add(bb, mul(mul(k[j], k[j]), weights[j]));
            }
        }
        F determinant = sub(mul(aa, bb), mul(ab, ab));
        M both_of_them = above(determinant, mul(set(1e-5f), mul(aa, bb)));
        F alone = ratio_or(ra, aa, zero);
        F up = choose(both_of_them, div(sub(mul(ra, bb), mul(rb, ab)), determinant), alone);
        F down = choose(both_of_them, div(sub(mul(rb, aa), mul(ra, ab)), determinant), zero);
        F new_scale = as_half(add(scale, up)), new_least = as_half(add(least, down));
        for (int j = 0; j < kind.subs; j++) after = add(after, look(j, mul(new_scale, c[j]), mul(new_least, k[j])).error);
        M better = above(before, after);
        scale = choose(better, new_scale, scale), least = choose(better, new_least, least);
        error = choose(better, after, before);
    }

    F weights[16];
    void run() {
        start();
        for (int j = 0; j < kind.subs; j++) {
            weights[j] = set(0.0f);
            for (int i = 0; i < kind.size; i++) weights[j] = add(weights[j], block(w, j)[i]);
        }
        for (int round = 0; round < kind.rounds; round++) {
            if (kind.scale_top)
                for (int j = 0; j < kind.subs; j++) move(j, weights[j]);
            refit();
        }
    }
};

template <bool with_min, class G>
void fit_tile(Tile& t, const G& grid, const FitKind& kind) {
    TileFit<with_min, G> fit(grid, kind, t.x, t.w);
    fit.run();
    F exact = set(0.0f);
    for (int j = 0; j < kind.subs; j++) {
        F s = t.scale, m = t.least;
        if (kind.scale_top) {
            s = mul(s, to_float(sub(load_u8(t.scale_codes + 16 * j), set(-kind.scale_low))));
            if constexpr (with_min) m = mul(m, to_float(load_u8(t.min_codes + 16 * j)));
        }
        for (int i = j * kind.size; i < (j + 1) * kind.size; i++) {
            F from = with_min ? add(t.x[i], m) : t.x[i], r = sub(from, mul(s, grid.value(t.codes[i])));
            exact = add(exact, mul(mul(t.w[i], r), r));
        }
    }
    M better = above(exact, fit.error);
    if (!any(better)) return;
    for (int j = 0; j < kind.subs; j++) {
        F s = mul(fit.scale, fit.c[j]), m = mul(fit.least, fit.k[j]), inverse = inverse_or_zero(s);
        if (kind.scale_top) {
            I code = sub(to_int(fit.c[j]), set(kind.scale_low));
            t.scale_code(j, select(better, code, load_u8(t.scale_codes + 16 * j)));
            if constexpr (with_min) t.min_code(j, select(better, to_int(fit.k[j]), load_u8(t.min_codes + 16 * j)));
        }
        for (int i = j * kind.size; i < (j + 1) * kind.size; i++) {
            F from = with_min ? add(t.x[i], m) : t.x[i];
            t.codes[i] = select(better, grid.code(mul(from, inverse)), t.codes[i]);
        }
    }
    t.scale = choose(better, fit.scale, t.scale), t.least = choose(better, fit.least, t.least);
}

// Scales twice and half as large as the greatest magnitude asks for.
void fit_mxfp4(Tile& t) {
    F exact = t.scale, least;
    for (float factor : {1.0f, 0.5f, 2.0f}) {
        F scale = mul(exact, set(factor)), error = set(0.0f);
        I codes[32];
        for (int i = 0; i < 32; i++) {
            F off = mul(t.x[i], t.x[i]);
            codes[i] = set(0);
            for (int k = 1; k < 16; k++) {
                F r = sub(t.x[i], mul(scale, set(e2m1_level[k]))), other = mul(r, r);
                M better = above(off, other);
                off = choose(better, other, off), codes[i] = select(better, set(k), codes[i]);
            }
            error = add(error, mul(t.w[i], off));
        }
        M better = both(above(least, error), both(at_least(scale, set(0x1p-126f)), at_least(set(0x1p126f), scale)));
        if (factor == 1.0f)
            least = error;
        else
            least = choose(better, error, least), t.scale = choose(better, scale, t.scale);
        for (int i = 0; factor != 1.0f && i < 32; i++) t.codes[i] = select(better, codes[i], t.codes[i]);
    }
}

void fit_tile(GgmlType type, Tile& t) {
    encode_tile(type, t);
    int count = ggml_shape(type).weights;
    for (int i = 0; i < count; i++) t.w[i] = t.weighted ? t.importance[i] : set(1.0f);
    auto whole = [&](int low, int high, int base, const FitKind& kind) { fit_tile<false>(t, Whole{low, high, base}, kind); };
    auto line = [&](int top, const FitKind& kind) { fit_tile<true>(t, Whole{0, top, 0}, kind); };
    switch (type) {
    case GgmlType::q4_0: return whole(-8, 7, -8, {32, 1, 0, 0, {20, -8.6f, -5.4f, 7.6f, 5.0f}, {}, 0, 2});
    case GgmlType::q5_0: return whole(-16, 15, -16, {32, 1, 0, 0, {20, -16.6f, -12.0f, 15.6f, 12.0f}, {}, 0, 2});
    case GgmlType::q8_0: return whole(-127, 127, -128, {32, 1, 0, 0, {12, 127.4f, 124.0f}, {}, 0, 1});
    case GgmlType::tq1_0:
    case GgmlType::tq2_0: return whole(-1, 1, -1, {256, 1, 0, 0, {20, 0.8f, 4.0f}, {}, 0, 2});
    case GgmlType::q4_1: return line(15, {32, 1, 0, 0, {16, 13.0f, 17.0f}, {}, 0, 2});
    case GgmlType::q5_1: return line(31, {32, 1, 0, 0, {16, 28.0f, 33.0f}, {}, 0, 2});
    case GgmlType::q2_k: return line(3, {16, 16, 0, 15, {16, 2.0f, 4.4f}, {16, 15.6f, 9.0f}, 1, 3});
    case GgmlType::q4_k: return line(15, {32, 8, 0, 63, {12, 13.0f, 17.0f}, {16, 63.5f, 50.0f}, 1, 3});
    case GgmlType::q5_k: return line(31, {32, 8, 0, 63, {12, 28.0f, 33.0f}, {16, 63.5f, 50.0f}, 1, 3});
    case GgmlType::q3_k:
        return whole(-4, 3, -4, {16, 16, -32, 31, {16, -5.0f, -2.6f, 4.0f, 2.2f}, {12, -32.5f, -24.0f, 31.5f, 24.0f}, 1, 3});
    case GgmlType::q6_k:
        return whole(-32, 31, -32, {16, 16, -128, 127, {16, -32.6f, -27.0f, 31.6f, 26.0f}, {12, -128, -110, 127, 110}, 1, 3});
    case GgmlType::iq4_nl:
        return fit_tile<false>(t, Uneven{}, {32, 1, 0, 0, {20, -135, -85, 120, 80}, {}, 0, 2});
    case GgmlType::iq4_xs:
        return fit_tile<false>(t, Uneven{}, {32, 8, -32, 31, {16, -135, -85, 120, 80}, {12, -32.5f, -24.0f, 31.5f, 24.0f}, 1, 3});
    case GgmlType::mxfp4: return fit_mxfp4(t);
    default: return;  // types with tables are in ggml_grid_encode.h
    }
}

void ggml_fit(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
              const GgmlEncoded& out) {
    encode_tiles(type, rows, cols, weight, importance, importance, out, [&](Tile& tile) { fit_tile(type, tile); });
}
