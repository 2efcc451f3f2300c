// llama.cpp's types with less error than its own encoders: lane = block, as in ggml_encode.h. Part of kernels.h.
//
// The error is sum w (x - value)**2 with w the importance, or 1. Each block gets its scale (and minimum) by least
// squares under some roundings; super-blocks choose the scale above these, then move the codes of scales and minima,
// each with its weights rounded anew, and fit the scales above again. Sums here may be fused (fma): nothing has to equal
// another program's. Where blocks are small or unusual, what the exact encoder found is kept if it is better.

// ---- grids ----

constexpr float e2m1_level[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// Levels from `low` to `high`; codes count from 0. `level(x, inverse)` is the one nearest to x * inverse.
struct Whole {
    int low, high, base;  // base: level of code 0
    F shifted(F x, F inverse) const {
        return min(max(fma(x, inverse, set(shift)), set(shift + float(low))), set(shift + float(high)));
    }
    F level(F x, F inverse) const { return sub(shifted(x, inverse), set(shift)); }
    // The same where what is greatest comes to lie at a level that `covers` knows: none can fall below the lowest.
    bool covers(float greatest) const { return __builtin_fabsf(greatest) <= 0.49f - float(low); }
    F covered(F x, F inverse) const {
        return sub(min(fma(x, inverse, set(shift)), set(shift + float(high))), set(shift));
    }
    // The same where none can fall above the highest either.
    bool inside(float greatest) const { return greatest <= float(high) + 0.49f; }
    F unclamped(F x, F inverse) const { return sub(fma(x, inverse, set(shift)), set(shift)); }
    F value(I code) const { return to_float(add(code, set(base))); }
    I code(F x, F inverse) const { return sub(bits(shifted(x, inverse)), set(shift_bits + base)); }
};

struct Uneven {
    Iq4 grid;
    F level(F x, F inverse) const { return grid.value(grid(mul(x, inverse))); }
    static bool inside(float) { return false; }
    static bool covers(float) { return false; }
    F unclamped(F x, F inverse) const { return level(x, inverse); }
    F covered(F x, F inverse) const { return level(x, inverse); }
    F value(I code) const { return grid.value(code); }
    I code(F x, F inverse) const { return grid(mul(x, inverse)); }
};

// Where the value of greatest magnitude may come to lie while a scale is searched: levels from `near` to `far`, and on
// the other side of 0 likewise. With minima: how many levels the range may span, and where its lowest value may lie: at
// `places` between two levels, half a level apart from `lowest` on; where that is one, its spans take turns of two. The
// best is then rounded `anew`.
struct Trials {
    int steps;
    float near, far, other_near = 0.0f, other_far = 0.0f;
    int places = 3, anew = 3;
    float lowest = -0.5f;
};

// ---- one block ----

F ratio_or(F above_it, F below, F otherwise) { return choose(above(below, set(0.0f)), div(above_it, below), otherwise); }

// Weights of a block and how much each counts.
template <bool weighted>
struct Part {
    int count;
    const F *x, *w;
    F of(int i, F value) const {
        if constexpr (weighted) return mul(w[i], value);
        return value;
    }
    F total() const {
        if constexpr (!weighted) return set(float(count));
        F sum = set(0.0f);
        for (int i = 0; i < count; i++) sum = add(sum, w[i]);
        return sum;
    }
};

// Least and greatest value of a block, and of both the one of greater magnitude.
struct Range {
    F low, high;
    F extreme() const { return choose(above(negative(low), high), low, high); }
};
Range range_of(int count, const F* x) {
    Range range{x[0], x[0]};
    for (int i = 1; i < count; i++) range = {min(x[i], range.low), max(x[i], range.high)};
    return range;
}

// Sums over a block under value = scale * l - least, r = x - value.
struct Pass {
    F error, of_l, of_l2, of_r, of_rl;
};

template <bool with_min, bool weighted, class G>
Pass pass_over(const G& grid, const Part<weighted>& part, F scale, F least) {
    F zero = set(0.0f), inverse = inverse_or_zero(scale), minus = negative(scale);
    Pass p{zero, zero, zero, zero, zero};
    for (int i = 0; i < part.count; i++) {
        F from = with_min ? add(part.x[i], least) : part.x[i];
        F l = grid.level(from, inverse), r = fma(minus, l, from), wr = part.of(i, r), wl = part.of(i, l);
        p.error = fma(wr, r, p.error), p.of_rl = fma(wr, l, p.of_rl), p.of_l2 = fma(wl, l, p.of_l2);
        if constexpr (with_min) p.of_l = add(p.of_l, wl), p.of_r = add(p.of_r, wr);
    }
    return p;
}

// The error alone.
template <bool with_min, bool weighted, class G>
F error_over(const G& grid, const Part<weighted>& part, F scale, F least) {
    F error = set(0.0f), inverse = inverse_or_zero(scale), minus = negative(scale);
#pragma GCC unroll 4
    for (int i = 0; i < part.count; i++) {
        F from = with_min ? add(part.x[i], least) : part.x[i], r = fma(minus, grid.level(from, inverse), from);
        error = fma(part.of(i, r), r, error);
    }
    return error;
}

// Scale and minimum of a block, and what the minimum and the error are worth where the scale is another, codes being
// as they are: the minimum goes with `slope`, the error with the square times `curve`.
struct Line {
    F scale, least, slope, curve;
};

// The scale for which the least squares of some rounding explain most; the first that is tried where nothing counts.
template <bool weighted, class G>
Line fit_scale(const G& grid, const Trials& trials, const Part<weighted>& part, F extreme) {
    F zero = set(0.0f), unit = inverse_or_zero(extreme), otherwise = mul(extreme, set(1.0f / trials.near));
    F best_dot = zero, best_norm = set(1.0f);
    auto attempt = [&](float level) {
        F inverse = mul(unit, set(level)), dot = zero, norm = zero;
        auto sum = [&](auto level_of) {
#pragma GCC unroll 4
            for (int i = 0; i < part.count; i++) {
                F l = level_of(part.x[i]), wl = part.of(i, l);
                dot = fma(part.x[i], wl, dot), norm = fma(wl, l, norm);
            }
        };
        if (grid.inside(__builtin_fabsf(level)))
            sum([&](F x) { return grid.unclamped(x, inverse); });
        else if (grid.covers(level))
            sum([&](F x) { return grid.covered(x, inverse); });
        else
            sum([&](F x) { return grid.level(x, inverse); });
        M better = above(mul(mul(dot, dot), best_norm), mul(mul(best_dot, best_dot), norm));
        best_dot = choose(better, dot, best_dot), best_norm = choose(better, norm, best_norm);
    };
    for (int i = 0; i < trials.steps; i++) {
        float share = float(i) / float(trials.steps - 1);
        attempt(trials.near + share * (trials.far - trials.near));
        if (trials.other_near != 0.0f) attempt(trials.other_near + share * (trials.other_far - trials.other_near));
    }
    M found = above(magnitude(best_dot), zero);
    return {choose(found, div(best_dot, best_norm), otherwise), zero, zero, choose(found, best_norm, zero)};
}

// Sums over a block under some codes, and what their least squares explain of its squares, as a fraction.
struct Explained {
    F of_l, of_l2, of_xl, above_it, below;
};

// Scale and minimum; the minimum is at least 0 unless `free`. Values count from their mean, so that the little that one
// attempt explains more than another is not lost in the digits of sums.
template <bool weighted>
struct LineFit {
    Whole grid;
    bool free;
    Part<weighted> part;
    F x[32], of_w, each, mean, of_mean;  // each: 1 / of_w
    Explained best;

    LineFit(const Whole& grid, bool free, const Part<weighted>& values)
        : grid(grid), free(free), part{values.count, x, values.w}, of_w(values.total()), each(inverse_or_zero(of_w)) {
        F zero = set(0.0f), sum = zero;
        for (int i = 0; i < part.count; i++) sum = add(sum, part.of(i, values.x[i]));
        mean = mul(sum, each), of_mean = mul(sum, mean);
        for (int i = 0; i < part.count; i++) x[i] = sub(values.x[i], mean);
        best = {zero, zero, zero, zero, set(1.0f)};
    }

    // Where codes do not differ, or the least squares would have a minimum below 0, there is none.
    M without(F of_l, F of_l2, F of_xl, F below) const {
        M alike = at_least(mul(set(1e-6f), of_l2), below);
        return free ? alike : either(alike, above(mul(mean, below), mul(mul(of_l, each), of_xl)));
    }
    template <class Level>
    void attempt(F least, Level level_of) {
        F zero = set(0.0f), of_l = zero, of_l2 = zero, of_xl = zero, from = add(least, mean);
#pragma GCC unroll 4
        for (int i = 0; i < part.count; i++) {
            F l = level_of(add(x[i], from)), wl = part.of(i, l);
            of_l = add(of_l, wl), of_l2 = fma(wl, l, of_l2), of_xl = fma(x[i], wl, of_xl);
        }
        F below = sub(of_l2, mul(of_l, mul(of_l, each))), whole = fma(mean, of_l, of_xl);
        M alone = without(of_l, of_l2, of_xl, below);
        F above_it = choose(alone, sub(mul(whole, whole), mul(of_mean, of_l2)), mul(of_xl, of_xl));
        below = choose(alone, of_l2, below);
        M better = above(mul(above_it, best.below), mul(best.above_it, below));
        best = {choose(better, of_l, best.of_l), choose(better, of_l2, best.of_l2), choose(better, of_xl, best.of_xl),
                choose(better, above_it, best.above_it), choose(better, below, best.below)};
    }
    // The range spans so many levels, and its lowest value comes to lie at `place`: no more is clamped than has to be.
    void attempt_at(F least, F inverse, float place, float span) {
        if (place < -0.49f) return attempt(least, [&](F x) { return grid.level(x, inverse); });
        if (grid.inside(span + place)) return attempt(least, [&](F x) { return grid.unclamped(x, inverse); });
        attempt(least, [&](F x) { return grid.covered(x, inverse); });
    }
    // Scale and minimum of the best codes, what `otherwise` has where none explain anything.
    Line line(const Line& otherwise) const {
        M some = above(best.above_it, set(0.0f));
        F below = sub(best.of_l2, mul(best.of_l, mul(best.of_l, each)));
        M alone = without(best.of_l, best.of_l2, best.of_xl, below);
        F scale = div(choose(alone, fma(mean, best.of_l, best.of_xl), best.of_xl), best.below);
        F least = choose(alone, set(0.0f), sub(mul(scale, mul(best.of_l, each)), mean));
        F slope = mul(best.of_l, each);
        F curve = max(sub(best.of_l2, mul(best.of_l, slope)), mul(best.of_l2, set(1e-3f)));
        return {choose(some, scale, otherwise.scale), choose(some, least, otherwise.least), slope, curve};
    }

    Line operator()(const Trials& trials, const Range& range) {
        F low = range.low, high = range.high;
        if (!free) low = min(low, set(0.0f)), high = max(high, set(0.0f));
        F wide = sub(high, low), unit = inverse_or_zero(wide);
        for (int i = 0; i < trials.steps; i++) {
            float span = trials.near + float(i) / float(trials.steps - 1) * (trials.far - trials.near);
            for (int k = 0; k < trials.places; k++) {
                float place = trials.lowest + 0.5f * float(trials.places == 1 ? i % 2 : k);
                attempt_at(sub(mul(wide, set(place / span)), low), mul(unit, set(span)), place, span);
            }
        }
        Line found = line({mul(wide, set(1.0f / float(grid.high))), negative(low), set(0.0f), set(0.0f)});
        for (int i = 0; i < trials.anew; i++) {
            F inverse = inverse_or_zero(found.scale);
            attempt(found.least, [&](F x) { return grid.level(x, inverse); });
            found = line(found);
        }
        return found;
    }
};

// ---- a tile ----

struct FitKind {
    int size, subs;           // weights of a block, blocks
    int scale_low, scale_top; // codes of scales; both 0 where there are none
    Trials trials, upper;     // of the scales of blocks, and of the scale above
    int rounds;               // how often codes of scales are moved
    bool both_ways = true;    // up and down, else to where the best scale lies
};

template <bool with_min, bool weighted, class G>
struct TileFit {
    const G& grid;
    const FitKind& kind;
    const F *x, *w;
    F scale = set(0.0f), least = set(0.0f), c[16], k[16], error = set(0.0f);
    Line line[16];
    F weights[16];
    M usual = at_least(set(0.0f), set(0.0f));  // all blocks have values on both sides of 0, and not all are as great

    TileFit(const G& grid, const FitKind& kind, const F* x, const F* w) : grid(grid), kind(kind), x(x), w(w) {}

    Part<weighted> part(int j) const { return {kind.size, x + j * kind.size, w + j * kind.size}; }
    Pass look(int j, F of_scale, F of_least) const { return pass_over<with_min>(grid, part(j), of_scale, of_least); }

    F error_under(int j, F of_scale, F of_least) const {
        return error_over<with_min>(grid, part(j), of_scale, of_least);
    }

    // Scales and minima without their codes, then the scales above these.
    void start() {
        F s[16], m[16], curve[16], peak = set(0.0f), square = peak;
        for (int j = 0; j < kind.subs; j++) {
            Range range = range_of(kind.size, part(j).x);
            peak = max(peak, max(range.high, negative(range.low)));
            for (int i = 0; i < kind.size; i++) square = fma(part(j).x[i], part(j).x[i], square);
            usual = both(usual, both(above(range.high, set(0.0f)), above(set(0.0f), range.low)));
            if constexpr (with_min) {
                LineFit<weighted> fit(grid, kind.scale_top == 0, part(j));
                line[j] = fit(kind.trials, range);
                weights[j] = fit.of_w;
            } else {
                line[j] = fit_scale(grid, kind.trials, part(j), range.extreme());
            }
            s[j] = line[j].scale, m[j] = line[j].least, curve[j] = line[j].curve;
        }
        if (kind.scale_top == 0) {
            scale = as_half(s[0]), least = as_half(m[0]), c[0] = k[0] = set(1.0f);
            return;
        }
        usual = both(usual, above(mul(mul(peak, peak), set(0.4f * float(kind.size * kind.subs))), square));
        scale = upper(s, curve, kind.scale_low, kind.scale_top, c);
        if constexpr (with_min) {
            for (int j = 0; j < kind.subs; j++) m[j] = least_under(j, mul(scale, c[j]));
            least = upper(m, weights, 0, kind.scale_top, k);
        }
    }
    // the best minimum under another scale, codes being as they are
    F least_under(int j, F of_scale) const {
        return max(fma(line[j].slope, sub(of_scale, line[j].scale), line[j].least), set(0.0f));
    }
    F upper(const F* values, const F* counts, int low, int top, F* codes) const {
        Whole whole{low, top, low};
        Part<true> all{kind.subs, values, counts};
        F found = as_half(fit_scale(whole, kind.upper, all, range_of(kind.subs, values).extreme()).scale);
        F inverse = inverse_or_zero(found);
        for (int j = 0; j < kind.subs; j++) codes[j] = whole.level(values[j], inverse);
        return found;
    }

    // Codes of scale and minimum of one block, with its weights rounded anew.
    void move(int j) {
        F best = set(__FLT_MAX__), best_c = c[j], best_k = k[j], c0 = c[j], inverse = inverse_or_zero(least);
        F towards = choose(above(mul(line[j].scale, inverse_or_zero(scale)), c0), set(1.0f), set(-1.0f));
        auto attempt = [&](F other) {
            F other_k = k[j];
            if constexpr (with_min)
                other_k = Whole{0, kind.scale_top, 0}.level(least_under(j, mul(scale, other)), inverse);
            F found = error_under(j, mul(scale, other), mul(least, other_k));
            M better = above(best, found);
            best = choose(better, found, best), best_c = choose(better, other, best_c);
            best_k = choose(better, other_k, best_k);
        };
        attempt(c0);
        auto within = [&](F code) { return min(max(code, set(float(kind.scale_low))), set(float(kind.scale_top))); };
        attempt(within(add(c0, towards)));
        if (kind.both_ways) attempt(within(sub(c0, towards)));
        c[j] = best_c, k[j] = best_k;
    }

    // Least squares of the scales above, with all else as it is, where that leaves less error.
    void refit() {
        F zero = set(0.0f), aa = zero, ab = zero, bb = zero, ra = zero, rb = zero;
        error = zero;
        for (int j = 0; j < kind.subs; j++) {
            F s = mul(scale, c[j]), m = mul(least, k[j]);
            Pass p = look(j, s, m);
            error = add(error, p.error);
            aa = add(aa, mul(mul(c[j], c[j]), p.of_l2)), ra = add(ra, mul(c[j], p.of_rl));
            if constexpr (with_min) {
                ab = sub(ab, mul(mul(c[j], k[j]), p.of_l)), rb = sub(rb, mul(k[j], p.of_r));
                bb = add(bb, mul(mul(k[j], k[j]), weights[j]));
                F slope = ratio_or(p.of_l, weights[j], zero), change = ratio_or(p.of_r, weights[j], zero);
                F up = ratio_or(sub(p.of_rl, mul(slope, p.of_r)), sub(p.of_l2, mul(slope, p.of_l)), zero);
                line[j] = {add(s, up), sub(add(m, mul(slope, up)), change), slope, zero};
            } else {
                line[j].scale = add(s, ratio_or(p.of_rl, p.of_l2, zero));
            }
        }
        F determinant = sub(mul(aa, bb), mul(ab, ab));
        M both_of_them = above(determinant, mul(set(1e-5f), mul(aa, bb)));
        F alone = ratio_or(ra, aa, zero);
        F up = choose(both_of_them, div(sub(mul(ra, bb), mul(rb, ab)), determinant), alone);
        F down = choose(both_of_them, div(sub(mul(rb, aa), mul(ra, ab)), determinant), zero);
        F new_scale = as_half(add(scale, up)), new_least = as_half(add(least, down));
        F change = sub(new_scale, scale), after = sub(error, mul(change, sub(mul(set(2.0f), ra), mul(change, aa))));
        if (with_min || !kind.scale_top) {  // else rounding anew leaves next to nothing less
            after = zero;
            for (int j = 0; j < kind.subs; j++)
                after = add(after, error_under(j, mul(new_scale, c[j]), mul(new_least, k[j])));
        }
        M better = above(error, after);
        scale = choose(better, new_scale, scale), least = choose(better, new_least, least);
        error = choose(better, after, error);
    }

    void run() {
        start();
        for (int round = 0; round < kind.rounds; round++) {
            if (kind.scale_top)
                for (int j = 0; j < kind.subs; j++) move(j);
            refit();
        }
    }
};

// What the fit found where `better`; the tile keeps the others.
template <bool with_min, bool weighted, class G>
void take(Tile& t, const TileFit<with_min, weighted, G>& fit, M better) {
    const FitKind& kind = fit.kind;
    bool whole = all(better);
    for (int j = 0; j < kind.subs; j++) {
        F s = mul(fit.scale, fit.c[j]), m = mul(fit.least, fit.k[j]), inverse = inverse_or_zero(s);
        if (kind.scale_top) {
            I code = sub(to_int(fit.c[j]), set(kind.scale_low));
            t.scale_code(j, select(better, code, load_u8(t.scale_codes + 16 * j)));
            if constexpr (with_min) t.min_code(j, select(better, to_int(fit.k[j]), load_u8(t.min_codes + 16 * j)));
        }
        for (int i = j * kind.size; i < (j + 1) * kind.size; i++) {
            I code = fit.grid.code(with_min ? add(t.x[i], m) : t.x[i], inverse);
            t.codes[i] = whole ? code : select(better, code, t.codes[i]);
        }
    }
    t.scale = choose(better, fit.scale, t.scale), t.least = choose(better, fit.least, t.least);
}

template <bool with_min, class G>
F error_of(const Tile& t, const G& grid, const FitKind& kind) {
    F error = set(0.0f);
    for (int j = 0; j < kind.subs; j++) {
        F s = t.scale, m = t.least;
        if (kind.scale_top) {
            s = mul(s, to_float(sub(load_u8(t.scale_codes + 16 * j), set(-kind.scale_low))));
            if constexpr (with_min) m = mul(m, to_float(load_u8(t.min_codes + 16 * j)));
        }
        for (int i = j * kind.size; i < (j + 1) * kind.size; i++) {
            F from = with_min ? add(t.x[i], m) : t.x[i], r = sub(from, mul(s, grid.value(t.codes[i])));
            error = add(error, t.weighted ? mul(mul(t.importance[i], r), r) : mul(r, r));
        }
    }
    return error;
}

template <bool with_min, bool weighted, class G>
void fit_tile(GgmlType type, Tile& t, const G& grid, const FitKind& kind) {
    TileFit<with_min, weighted, G> fit(grid, kind, t.x, t.importance);
    fit.run();
    // the search does better than the exact encoder where float16 has digits for its scale, and values are like weights
    M usual = both(fit.usual, at_least(magnitude(fit.scale), set(0x1p-18f)));
    if (kind.scale_top && all(usual)) return take(t, fit, usual);
    encode_tile(type, t);
    M better = above(error_of<with_min>(t, grid, kind), fit.error);
    if (any(better)) take(t, fit, better);
}

// Scales twice and half as large as the greatest magnitude asks for.
void fit_mxfp4(Tile& t) {
    encode_mxfp4(t);
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
            error = add(error, t.weighted ? mul(t.importance[i], off) : off);
        }
        M better = both(above(least, error), both(at_least(scale, set(0x1p-126f)), at_least(set(0x1p126f), scale)));
        if (factor == 1.0f)
            least = error;
        else
            least = choose(better, error, least), t.scale = choose(better, scale, t.scale);
        for (int i = 0; factor != 1.0f && i < 32; i++) t.codes[i] = select(better, codes[i], t.codes[i]);
    }
}

template <bool with_min, class G>
void fit_grid(GgmlType type, Tile& t, const G& grid, const FitKind& kind) {
    t.weighted ? fit_tile<with_min, true>(type, t, grid, kind) : fit_tile<with_min, false>(type, t, grid, kind);
}

// How much is tried is what leaves both kinds of encoding several times as fast as llama.cpp, which takes less time
// without importance.
void fit_tile(GgmlType type, Tile& t) {
    auto whole = [&](int low, int high, const FitKind& kind) { fit_grid<false>(type, t, Whole{low, high, low}, kind); };
    auto line = [&](int top, const FitKind& kind) { fit_grid<true>(type, t, Whole{0, top, 0}, kind); };
    auto uneven = [&](const FitKind& kind) { fit_grid<false>(type, t, Uneven{}, kind); };
    auto either_of = [&](int weighted, int plain) { return t.weighted ? weighted : plain; };
    Trials six_bits{either_of(12, 6), -32.5f, -24.0f, 31.5f, 24.0f};
    int rounds = either_of(3, 1);
    auto alternating = [](int steps, float near, float far, float lowest) {
        return Trials{steps, near, far, 0.0f, 0.0f, 1, 1, lowest};
    };
    switch (type) {
    case GgmlType::q4_0: return whole(-8, 7, {32, 1, 0, 0, {20, -8.6f, -5.4f, 7.6f, 5.0f}, {}, 2});
    case GgmlType::q5_0: return whole(-16, 15, {32, 1, 0, 0, {20, -16.6f, -12.0f, 15.6f, 12.0f}, {}, 2});
    case GgmlType::q8_0:
        return fit_grid<false>(type, t, Whole{-127, 127, -128}, {32, 1, 0, 0, {12, 127.4f, 124.0f}, {}, 1});
    case GgmlType::tq1_0:
    case GgmlType::tq2_0: return whole(-1, 1, {256, 1, 0, 0, {20, 0.8f, 4.0f}, {}, 2});
    case GgmlType::q4_1: return line(15, {32, 1, 0, 0, {16, 13.0f, 16.8f}, {}, 2});
    case GgmlType::q5_1: return line(31, {32, 1, 0, 0, {16, 28.0f, 32.7f}, {}, 2});
    case GgmlType::q2_k:
        return line(3, {16, 16, 0, 15, {either_of(16, 8), t.weighted ? 2.1f : 2.0f, 4.4f}, {16, 15.6f, 9.0f},
                        either_of(3, 2)});
    case GgmlType::q4_k:
        return line(15, {32, 8, 0, 63, t.weighted ? Trials{12, 13.0f, 16.8f} : alternating(13, 13.6f, 15.74f, -0.404f),
                         {16, 63.5f, 50.0f}, rounds});
    case GgmlType::q5_k:
        return line(31, {32, 8, 0, 63, t.weighted ? Trials{12, 27.2f, 32.7f} : alternating(24, 27.61f, 31.89f, -0.24f),
                         {16, 63.5f, 50.0f}, rounds});
    case GgmlType::q3_k:
        if (t.weighted) return whole(-4, 3, {16, 16, -32, 31, {8, -5.0f, -2.6f, 4.0f, 2.2f}, six_bits, 2});
        return whole(-4, 3, {16, 16, -32, 31, {3, -4.49f, -3.2f, 3.6f, 2.6f}, {4, -32, -26, 31, 26}, 1, false});
    case GgmlType::q6_k:
        if (t.weighted)
            return whole(-32, 31, {16, 16, -128, 127, {8, -32.6f, -27.0f, 31.6f, 26.0f}, {12, -128, -110, 127, 110}, 2});
        return whole(-32, 31, {16, 16, -128, 127, {9, -32.6f, -26.5f, 31.6f, 25.5f}, {12, -128, -110, 127, 110}, 1});
    case GgmlType::iq4_nl: return uneven({32, 1, 0, 0, {20, -135, -85, 120, 80}, {}, 2});
    case GgmlType::iq4_xs: return uneven({32, 8, -32, 31, {12, -135, -85, 120, 80}, six_bits, 2});
    case GgmlType::mxfp4: return fit_mxfp4(t);
    default: return;  // types with tables are in ggml_grid_encode.h
    }
}

bool ggml_fit(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
              const GgmlEncoded& out) {
    return encode_tiles(type, rows, cols, weight, importance, importance, out, [&](Tile& tile) { fit_tile(type, tile); });
}
