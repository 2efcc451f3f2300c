// llama.cpp's encoders of the types with tables, to the bit: lane = super-block as in ggml_encode.h, but where a run of
// codes is not in its table: lanes are then the entries near to it.
// Part of kernels.h; the algorithms are those of ggml-quants.c (quantize_row_iq1_*_impl to quantize_row_iq3_*_impl).
//
// Where llama.cpp would stop (a scale that is NaN) the block is 0.

// Values as columns in memory: of weight i, that of each lane.
struct Columns {
    float at[32][16];

    void take(const F* from, int count) {
        for (int i = 0; i < count; i++) store_f32(at[i], from[i]);
    }
};

// A run of weights in a lane, in columns, and how its digits are to be read. Errors that differ by no more than `slack` may
// change places between scales, as sums are rounded.
struct GridRun {
    const float *x, *w, *levels;
    float slack;
};

// What a digit of two bits stands for comes again after four lanes, of three bits after eight.
template <int bits>
F value_of(F levels, I digit) {
    return bits == 2 ? lookup4(levels, digit) : lookup8(levels, digit);
}

// The words near to those that a table has not. A word that was chosen among these is marked; also, where another was too
// close to it.
template <int bits>
struct GridSearch {
    static constexpr int group = bits == 2 ? 8 : 4, mark = 1 << 16, close = 1 << 17, same = 1 << 18;
    const GgmlNeighbours& near;
    explicit GridSearch(GgmlType type) : near(ggml_neighbours(type)) {}

    bool lacks(int word) const { return near.of[size_t(word)].count > 0; }

    // In place of a word, that with the least error under each of two scales, the first of equals.
    void best(int word, const GridRun& run, const float (&scales)[2], int32_t (&found)[2]) const {
        static constexpr float number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
        GgmlNeighbours::Range range = near.of[size_t(word)];
        const uint16_t* words = near.words.data() + range.first;
        F errors[group], values = mul(halves(scales[0], scales[1]), load_f32(run.levels));
        for (int i = 0; i < group; i++) {
            F difference = sub(values, set(run.x[16 * i]));
            errors[i] = mul(mul(set(run.w[16 * i]), difference), difference);
        }
        F low = set(__FLT_MAX__), next = low, place = sub(load_f32(number), set(float(range.count))), first = place;
        for (int at = 0; at < range.count; at += 8, place = add(place, set(8.0f))) {  // places count up to the end
            I rest = load_u16_twice(words + at);
            F sum = value_of<bits>(errors[0], rest);
            for (int i = 1; i < group; i++) rest = shift_right<bits>(rest), sum = add(sum, value_of<bits>(errors[i], rest));
            sum = choose(above(set(0.0f), place), sum, set(__FLT_MAX__));
            first = choose(above(low, sum), place, first);
            next = min(max(low, sum), next), low = min(sum, low);
        }
        F lowest = least8(low);
        F at = least8(choose(at_least(lowest, low), first, set(0.0f)));
        M winner = both(at_least(lowest, low), at_least(at, first));
        float places[16], gaps[16];
        store_f32(places, at), store_f32(gaps, sub(least8(choose(winner, next, low)), lowest));
        for (int k = 0; k < 2; k++)
            found[k] = words[range.count + int(places[8 * k])] | mark | (gaps[8 * k] > run.slack ? 0 : close);
    }
    // Words under one scale a lane, where lanes are on; in the others they stay. `of` gives a lane's run.
    template <class Run>
    I fitting(I words, M on, F scales, Run of) const {
        int32_t at[16], wanted[16], chosen[16], count = 0;
        float scale[16];
        store_words(at, words), store_words(wanted, select(on, set(1), set(0))), store_f32(scale, scales);
        for (int lane = 0; lane < 16; lane++) {
            chosen[count] = lane;
            count += wanted[lane] && lacks(at[lane]);
        }
        for (int k = 0; k < count; k++) {
            int32_t lane = chosen[k], found[2];
            best(at[lane], of(lane), {scale[lane], scale[lane]}, found);
            at[lane] = found[0] & ~close;
        }
        return load_words(at);
    }
};

// Words of a run of weights in sixteen lanes under many scales, each less than the one before.
template <int bits>
struct GridSeries {
    static constexpr int most = 31, group = GridSearch<bits>::group;
    using Search = GridSearch<bits>;
    struct Span {  // scales under which a lane rounds to the same word, of which the first and the last are done
        uint16_t word;
        uint8_t lane, from, to;
    };
    const Search& search;
    const float (&scales)[most][16];
    int count;

    // Words off the table, by the scales that have them. `changes` has a bit where lanes round to another word than before.
    int spans_of(const int32_t (&words)[most][16], const int32_t* on, const int32_t* changes, Span* spans) const {
        int size = 0;
        for (int lane = 0; lane < 16; lane++) {
            if (!on[lane]) continue;
            for (int from = 0, to; from < count; from = to) {
                uint32_t later = (uint32_t(changes[lane]) | 1u << 31) >> from & ~1u;
                to = int(smaller(from + __builtin_ctz(later), count));
                spans[size] = {uint16_t(words[from][lane]), uint8_t(lane), uint8_t(from), uint8_t(to - 1)};
                size += search.lacks(words[from][lane]);
            }
        }
        return size;
    }
    // In place of what lanes round to, what is near to that, but where it is the same as under the scale before. What comes
    // of a search is looked at after all of a round, so that none waits for another.
    template <class Run>
    void fit(int32_t (&words)[most][16], const int32_t* on, const int32_t* changes, Run of) const {
        Span room[2][16 * most], *now = room[0], *next = room[1];
        int size = spans_of(words, on, changes, now), more;
        for (int i = 0; i < size; i++) search_at(words, now[i], now[i].from, now[i].to, of);
        for (; size > 0; size = more) {
            more = 0;
            for (int i = 0; i < size; i++) {
                Span span = now[i];
                if (span.to - span.from < 2 || settled(words, span)) continue;
                int middle = before_change(words, span, of(span.lane)), after = int(smaller(middle + 1, span.to - 1));
                search_at(words, span, middle, after, of);
                next[more++] = {span.word, span.lane, span.from, uint8_t(middle)};
                next[more++] = {span.word, span.lane, uint8_t(after), span.to};
            }
            Span* last = now;
            now = next, next = last;
        }
    }
    template <class Run>
    void search_at(int32_t (&words)[most][16], const Span& span, int from, int to, Run of) const {
        int32_t found[2], lane = span.lane;
        search.best(span.word, of(lane), {scales[from][lane], scales[to][lane]}, found);
        words[from][lane] = found[0], words[to][lane] = found[1];
    }
    // The difference of two words' errors, over the scale, is linear in it: what is best at both ends is best between.
    bool settled(const int32_t (&words)[most][16], const Span& span) const {
        int32_t found = words[span.from][span.lane];
        return found == words[span.to][span.lane] && !(found & Search::close);
    }
    // Where to look next between the ends of a span: about where the word at one end becomes worse than that at the other.
    int before_change(const int32_t (&words)[most][16], const Span& span, const GridRun& run) const {
        int one = words[span.from][span.lane], other = words[span.to][span.lane], last = span.to - span.from - 2;
        float dot = 0, norm = 0, start = scales[span.from][span.lane];
        for (int i = 0; i < 16 * group; i += 16, one >>= bits, other >>= bits) {
            float a = run.levels[one & ((1 << bits) - 1)], b = run.levels[other & ((1 << bits) - 1)];
            dot += 2 * run.w[i] * run.x[i] * (a - b), norm += run.w[i] * (a - b) * (a + b);
        }
        float part = (start * norm / dot - 1) / (start / scales[span.to][span.lane] - 1) * float(last + 2);
        return span.from + (part > 1 ? part < float(last) ? int(part) : last > 1 ? last : 1 : 1);
    }
};

// A run of digits as a word, and back.
template <int bits>
I word_of(const I* digits) {
    I word = digits[GridSearch<bits>::group - 1];
    for (int i = GridSearch<bits>::group - 2; i >= 0; i--) word = either(shift_left<bits>(word), digits[i]);
    return word;
}
template <int bits>
void digits_of(I word, I* digits) {
    for (int i = 0; i < GridSearch<bits>::group; i++, word = shift_right<bits>(word))
        digits[i] = both(word, set((1 << bits) - 1));
}
M marked(I words) { return greater(both(words, set(GridSearch<2>::mark)), set(0)); }

// ---- IQ2 and IQ3: magnitudes 1, 3, 5 .. and signs ----

// Weights of a block, digits, the search: factors around the greatest magnitude, `again` where all groups are fitted again.
struct SignedKind {
    int size, top, steps;
    float step, sigma, least, factor;
    bool even, first_fit, again;
};

SignedKind signed_kind(GgmlType type) {
    switch (type) {
    case GgmlType::iq2_xxs: return {32, 3, 6, 0.1f, 1, 1e-15f, 1, true, true, true};
    case GgmlType::iq2_xs: return {16, 3, 9, 0.1f, 1, 1e-15f, 1, true, false, false};
    case GgmlType::iq2_s: return {16, 3, 9, 0.1f, 2, 1e-8f, 0.9875f, false, false, false};
    case GgmlType::iq3_xxs: return {32, 8, 15, 0.2f, 2, 1e-8f, 1.0125f, true, false, false};
    default: return {32, 8, 9, 0.2f, 2, 1e-45f, 1.033f, false, false, true};
    }
}

// Block j of sixteen super-blocks.
template <int bits>
struct SignedFit {
    static constexpr int group = GridSearch<bits>::group;
    static constexpr float odd[2][16] = {{1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7},
                                         {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15}};
    const SignedKind& kind;
    const GridSearch<bits>& search;
    const F* w;
    F levels = load_f32(odd[bits - 2]), peak, scale, x[32], wx[32];
    I signs[32], words[8];
    Columns sizes, roots;
    float slack[8][16];

    SignedFit(const SignedKind& kind, const GridSearch<bits>& search, const F* w) : kind(kind), search(search), w(w) {}

    int groups() const { return kind.size / group; }

    void take(const F* from) {
        for (int i = 0; i < kind.size; i++) {
            M up = at_least(from[i], set(0.0f));
            x[i] = choose(up, from[i], negative(from[i])), signs[i] = select(up, set(0), set(1));
        }
        for (int k = 0; kind.even && k < kind.size; k += 8) flip_least(k);
        peak = set(-__FLT_MAX__);
        F root[32];
        for (int i = 0; i < kind.size; i++) peak = max(peak, x[i]), root[i] = sqrt(w[i]), wx[i] = mul(w[i], x[i]);
        sizes.take(x, kind.size), roots.take(root, kind.size);
    }
    GridRun of(int k, int lane) const {
        return {sizes.at[group * k] + lane, roots.at[group * k] + lane, odd[bits - 2], slack[k][lane]};
    }
    // Where the number of signs is odd, another for the weight where it costs least.
    void flip_least(int first) {
        I parity = signs[first], at = set(first);
        F cost = mul(mul(w[first], x[first]), x[first]);
        for (int i = first + 1; i < first + 8; i++) {
            F other = mul(mul(w[i], x[i]), x[i]);
            M less = above(cost, other);
            cost = choose(less, other, cost), at = select(less, set(i), at), parity = differ(parity, signs[i]);
        }
        at = select(greater(parity, set(0)), at, set(-1));
        for (int i = first; i < first + 8; i++) {
            M here = both(greater(at, set(i - 1)), greater(set(i + 1), at));
            x[i] = choose(here, negative(x[i]), x[i]), signs[i] = select(here, differ(signs[i], set(1)), signs[i]);
        }
    }

    I rounded(int k, F inverse) const {
        I digits[group];
        for (int i = 0; i < group; i++) {
            F at = mul(set(0.5f), sub(mul(inverse, x[group * k + i]), set(1.0f)));
            digits[i] = nearest_within(at, 0, kind.top - 1);
        }
        return word_of<bits>(digits);
    }
    // Run k under a scale; in lanes that are not on it may be any word.
    I fitted(int k, F inverse, F by, M on) const {
        return search.fitting(rounded(k, inverse), on, by, [&](int lane) { return of(k, lane); });
    }
    void sums(const I* of, F& dot, F& norm) const {
        dot = norm = set(0.0f);
        for (int k = 0; k < groups(); k++) {
            I rest = of[k];
            for (int i = group * k; i < group * (k + 1); i++, rest = shift_right<bits>(rest)) {
                F q = value_of<bits>(levels, rest);
                dot = add(dot, mul(wx[i], q)), norm = add(norm, mul(mul(w[i], q), q));
            }
        }
    }
    float codes_at(int step) const { return float(2 * kind.top - 1) + float(step - kind.steps) * kind.step; }

    // More than rounding can change between two errors. Operations change w * (d * q - x)**2 and their sum by no more than
    // 14 * 2**-24 of w * (d * q + |x|)**2; an error that is less by three times that, twice, at both ends of some scales, of
    // which the greatest is at most 1.5 times the least, is less between them. What is subnormal adds less than 1e-31.
    void set_slack(int k, F scale) {
        F sum = set(0.0f), greatest = mul(scale, set(float(2 * kind.top - 1)));
        for (int i = group * k; i < group * (k + 1); i++) {
            F size = add(greatest, magnitude(x[i]));
            sum = add(sum, mul(mul(load_f32(roots.at[i]), size), size));
        }
        store_f32(slack[k], add(mul(sum, set(80 * 0x1p-24f)), set(1e-30f)));
    }
    // Words under all scales of the search.
    void choose_all(F most, M on, int32_t (*words)[GridSeries<bits>::most][16]) {
        float scales[GridSeries<bits>::most][16];
        int32_t wanted[16], changes[8][16];
        store_words(wanted, select(on, set(1), set(0)));
        GridSeries<bits> series{search, scales, 2 * kind.steps + 1};
        I last[8];
        for (int k = 0; k < groups(); k++) store_words(changes[k], set(0)), last[k] = set(search.mark);
        for (int step = 0; step < series.count; step++) {
            F inverse = div(set(codes_at(step)), most);
            store_f32(scales[step], div(set(1.0f), inverse));
            for (int k = 0; k < groups(); k++) {
                I word = rounded(k, inverse);
                M other = greater(differ(word, last[k]), set(0));
                store_words(words[k][step], select(other, word, set(search.same)));
                store_words(changes[k], either(load_words(changes[k]), select(other, set(1 << step), set(0))));
                last[k] = word;
            }
        }
        for (int k = 0; k < groups(); k++) {
            set_slack(k, load_f32(scales[0]));
            series.fit(words[k], wanted, changes[k], [&](int lane) { return of(k, lane); });
        }
    }
    void run(F start, F most, M on) {
        F best = set(0.0f), dot, norm;
        I found[8];
        int32_t all[8][GridSeries<bits>::most][16];
        choose_all(most, on, all);
        scale = start;
        for (int k = 0; k < groups(); k++) words[k] = set(kind.again ? search.mark : 0), found[k] = set(0);
        for (int step = 0; step <= 2 * kind.steps; step++) {
            for (int k = 0; k < groups(); k++) {
                I word = load_words(all[k][step]);
                found[k] = select(greater(both(word, set(search.same)), set(0)), found[k], word);
            }
            sums(found, dot, norm);
            M better = both(above(norm, set(0.0f)), above(mul(dot, dot), mul(best, norm)));
            scale = choose(better, div(dot, norm), scale), best = choose(better, mul(scale, dot), best);
            for (int k = 0; k < groups(); k++) words[k] = select(better, found[k], words[k]);
        }
        finish(both(on, above(scale, set(0.0f))));
    }
    // Runs off the table, or all of them, once more under the scale that was found.
    void finish(M on) {
        I all = words[0];
        for (int k = 1; k < groups(); k++) all = either(all, words[k]);
        if (!kind.first_fit) on = both(on, marked(all));
        F inverse = div(set(1.0f), scale), dot, norm;
        for (int k = 0; k < groups(); k++) {
            M here = kind.again ? on : both(on, marked(words[k]));
            words[k] = select(here, fitted(k, inverse, scale, here), words[k]);
        }
        sums(words, dot, norm);
        scale = choose(both(on, above(norm, set(0.0f))), div(dot, norm), scale);
    }
    // Which lanes have codes: twice the digit, and the sign.
    M fit(const F* from) {
        take(from);
        float most = float(2 * kind.top - 1);
        M on = at_least(peak, set(kind.least));
        if (!kind.first_fit) return run(div(peak, set(most)), peak, on), on;
        I codes[32];
        F start = fit_positive(32, 4, x, w, codes), extreme = mul(start, set(float(kind.top)));
        on = both(on, above(extreme, set(0.0f)));
        return run(start, extreme, on), on;
    }
    void codes(M on, I* out) const {
        M turned = above(set(0.0f), scale);
        for (int k = 0; k < groups(); k++) digits_of<bits>(words[k], out + group * k);
        for (int i = 0; i < kind.size; i++) {
            I sign = select(turned, differ(signs[i], set(1)), signs[i]);
            out[i] = select(on, either(shift_left<1>(out[i]), sign), set(0));
        }
    }
    F size(M on) const {
        F size = choose(above(set(0.0f), scale), negative(scale), scale);
        return choose(both(on, at_least(size, set(0.0f))), size, set(0.0f));
    }
};

// Of the mean square, `times` is added under the root beside importances; `part` of that to squares where there are none.
void weigh_grid(Tile& t, float times, float part) {
    F sigma2 = div(mul(set(times), t.square_sum(0, 256)), set(256.0f));
    if (t.weighted) return t.weigh(0, 256, sigma2);
    F more = part > 0 ? mul(set(part), sigma2) : set(0.0f);
    for (int i = 0; i < 256; i++) t.w[i] = add(more, mul(t.x[i], t.x[i]));
}

template <int bits>
void encode_signed(GgmlType type, const GridSearch<bits>& search, Tile& t) {
    SignedKind kind = signed_kind(type);
    F scales[16], most = set(0.0f);
    weigh_grid(t, kind.sigma, type == GgmlType::iq2_s ? 0.25f : 0.0f);
    for (int j = 0; j < 256 / kind.size; j++) {
        SignedFit<bits> fit(kind, search, t.w + kind.size * j);
        M on = fit.fit(t.x + kind.size * j);
        fit.codes(on, t.codes + kind.size * j);
        scales[j] = fit.size(on), most = max(most, scales[j]);
    }
    M some = above(most, set(0.0f));
    for (int i = 0; kind.even && i < 256; i++)  // the others keep signs where all is 0
        t.codes[i] = select(some, t.codes[i], set(0));
    F d = div(most, set(31.0f)), inverse = div(set(1.0f), d);
    t.scale = choose(some, as_half(mul(d, set(kind.factor))), set(0.0f));
    for (int j = 0; j < 256 / kind.size; j++) {
        I code = nearest_within(mul(set(0.5f), sub(mul(inverse, scales[j]), set(1.0f))), 0, 15);
        t.scale_code(j, select(some, code, set(0)));
    }
}

// ---- IQ1: -1, 0, 1, shifted by an eighth up or down ----

// Levels of digits under a shift up (0) or down (1).
constexpr float third[2][16] = {{-0.875f, 0.125f, 1.125f, 0, -0.875f, 0.125f, 1.125f, 0,
                                 -0.875f, 0.125f, 1.125f, 0, -0.875f, 0.125f, 1.125f, 0},
                                {-1.125f, -0.125f, 0.875f, 0, -1.125f, -0.125f, 0.875f, 0,
                                 -1.125f, -0.125f, 0.875f, 0, -1.125f, -0.125f, 0.875f, 0}};

// The weights of a block in order of size; of equals the first comes first.
struct Ordered {
    F x[32], w[32];
    I number[32];

    Ordered(const F* from, const F* weights, int count) {
        for (int i = 0; i < count; i++) x[i] = from[i], w[i] = weights[i], number[i] = set(i);
        for (int run = 1; run < count; run *= 2)  // Batcher's network of merges of odd and even places
            for (int step = run; step > 0; step /= 2)
                for (int first = step % run; first + step < count; first += 2 * step)
                    for (int i = first; i < first + step && i + step < count; i++)
                        if (i / (2 * run) == (i + step) / (2 * run)) arrange(i, i + step);
    }
    void arrange(int a, int b) {
        M equal = both(at_least(x[a], x[b]), greater(number[a], number[b])), swap = either(above(x[a], x[b]), equal);
        exchange(swap, x[a], x[b]), exchange(swap, w[a], w[b]);
        I low = select(swap, number[b], number[a]);
        number[b] = select(swap, number[a], number[b]), number[a] = low;
    }
    static void exchange(M swap, F& a, F& b) {
        F low = choose(swap, b, a);
        b = choose(swap, a, b), a = low;
    }
};

// Which of the ordered weights get which digit: below `low` 0, below `high` 1. The shifts of halves are two bits.
struct ThirdFit {
    F scale = set(0.0f), best = set(-__FLT_MAX__);
    I low = set(-1), high = set(-1), shift = set(-1);

    void offer(F dot, F norm, int from, int to, int kind) {
        M better = both(above(norm, set(0.0f)), above(mul(dot, dot), mul(best, norm)));
        if (!any(better)) return;
        scale = choose(better, div(dot, norm), scale), best = choose(better, mul(scale, dot), best);
        low = select(better, set(from), low), high = select(better, set(to), high);
        shift = select(better, set(kind), shift);
    }
    // One shift for the block (IQ1_S).
    void split(const Ordered& of, int count) {
        F sx[33], sw[33], last_dot[2][33], last_norm[2][33];
        sx[0] = sw[0] = set(0.0f);
        for (int i = 0; i < count; i++) sx[i + 1] = add(sx[i], mul(of.w[i], of.x[i])), sw[i + 1] = add(sw[i], of.w[i]);
        auto dot_of = [](F sum, float q) { return mul(sum, set(q)); };
        auto norm_of = [](F sum, float q) { return mul(mul(sum, set(q)), set(q)); };
        for (int b = 0; b <= count; b++)
            for (int k = 0; k < 2; k++) {
                last_dot[k][b] = dot_of(sub(sx[count], sx[b]), third[k][2]);
                last_norm[k][b] = norm_of(sub(sw[count], sw[b]), third[k][2]);
            }
        for (int a = 0; a <= count; a++)
            for (int b = a; b <= count; b++)
                for (int k = 0; k < 2; k++) {
                    F dot = add(dot_of(sub(sx[a], sx[0]), third[k][0]), dot_of(sub(sx[b], sx[a]), third[k][1]));
                    F norm = add(norm_of(sub(sw[a], sw[0]), third[k][0]), norm_of(sub(sw[b], sw[a]), third[k][1]));
                    offer(add(dot, last_dot[k][b]), add(norm, last_norm[k][b]), a, b, 3 * k);
                }
    }
    // A shift for each half (IQ1_M): the sums of the halves are apart.
    void split_halves(const Ordered& of, int count) {
        F px[2][17], pw[2][17];
        px[0][0] = px[1][0] = pw[0][0] = pw[1][0] = set(0.0f);
        for (int j = 0; j < count; j++)
            for (int h = 0; h < 2; h++) {
                M here = h == 0 ? greater(set(count / 2), of.number[j]) : greater(of.number[j], set(count / 2 - 1));
                px[h][j + 1] = choose(here, add(px[h][j], mul(of.w[j], of.x[j])), px[h][j]);
                pw[h][j + 1] = choose(here, add(pw[h][j], of.w[j]), pw[h][j]);
            }
        F whole_dot[2][2], whole_norm[2][2], last[2][2][17], start[2][2];
        for (int h = 0; h < 2; h++)
            for (int k = 0; k < 2; k++) {
                F q = set(third[k][2]);
                whole_dot[h][k] = mul(px[h][count], q), whole_norm[h][k] = mul(mul(pw[h][count], q), q);
                float change = third[k][1] * third[k][1] - third[k][2] * third[k][2];
                for (int b = 0; b <= count; b++) last[h][k][b] = mul(pw[h][b], set(change));
            }
        for (int a = 0; a <= count; a++) {
            for (int k = 0; k < 2; k++) {
                float change = third[k][0] * third[k][0] - third[k][1] * third[k][1];
                for (int h = 0; h < 2; h++) start[h][k] = add(whole_norm[h][k], mul(pw[h][a], set(change)));
            }
            for (int b = a; b <= count; b++) {
                F less[2] = {add(px[0][a], px[0][b]), add(px[1][a], px[1][b])};
                auto dot = [&](int h, int k) { return sub(whole_dot[h][k], less[h]); };
                auto norm = [&](int h, int k) { return add(start[h][k], last[h][k][b]); };
                for (int k = 0; k < 4; k++)
                    offer(add(dot(0, k / 2), dot(1, k % 2)), add(norm(0, k / 2), norm(1, k % 2)), a, b, k);
            }
        }
    }
    // Digits in the order of the block, of a scale that is not negative.
    void digits(const Ordered& of, int count, I* out) {
        int32_t places[16], digits[32][16];
        for (int j = 0; j < count; j++) {
            int32_t found[16];
            I digit = select(greater(low, set(j)), set(0), select(greater(high, set(j)), set(1), set(2)));
            store_words(places, of.number[j]);
            store_words(found, select(above(set(0.0f), scale), sub(set(2), digit), digit));
            for (int lane = 0; lane < 16; lane++) digits[places[lane]][lane] = found[lane];
        }
        M turned = above(set(0.0f), scale);
        scale = choose(turned, negative(scale), scale), shift = select(turned, sub(set(3), shift), shift);
        for (int i = 0; i < count; i++) out[i] = load_words(digits[i]);
    }
};

// Block j of sixteen super-blocks.
struct ThirdPart {
    I digits[32], shift;
    F scale;

    // where the shift of weight i is down: of IQ1_S all are the same
    M down(int i) const { return greater(both(shift, set(i < 8 ? 2 : 1)), set(0)); }
    F value(int i) const {
        return choose(down(i), lookup4(load_f32(third[1]), digits[i]), lookup4(load_f32(third[0]), digits[i]));
    }
    I code(int i) const { return either(shift_left<1>(digits[i]), select(down(i), set(1), set(0))); }

    // Runs of digits become such as are in the table. Where some were not.
    M fit_runs(const GridSearch<2>& search, const F* x, const F* w, int count, M on) {
        Columns values, weights;
        values.take(x, count), weights.take(w, count);
        I all = set(0);
        for (int i = 0; i < count; i += 8) {
            I word = word_of<2>(digits + i), lower = select(down(i), set(1), set(0));
            auto fitting = [&](int k, M where) {
                return search.fitting(word, both(on, where), scale, [&](int lane) {
                    return GridRun{values.at[i] + lane, weights.at[i] + lane, third[k], 0};
                });
            };
            word = select(down(i), fitting(1, down(i)), fitting(0, greater(set(1), lower)));
            word = select(on, word, set(0)), all = either(all, word);
            digits_of<2>(word, digits + i);
        }
        return marked(all);
    }
    void fit(const GridSearch<2>& search, const F* x, const F* w, int count, float least) {
        F peak = set(0.0f), dot = set(0.0f), norm = set(0.0f);
        for (int i = 0; i < count; i++) peak = max(peak, magnitude(x[i]));
        ThirdFit fit;
        Ordered ordered(x, w, count);
        count == 32 ? fit.split(ordered, count) : fit.split_halves(ordered, count);
        fit.digits(ordered, count, digits);
        M on = both(at_least(peak, set(least)), greater(fit.shift, set(-1)));
        shift = select(on, fit.shift, set(0)), scale = choose(on, fit.scale, set(0.0f));
        M changed = fit_runs(search, x, w, count, on);
        for (int i = 0; i < count; i++) {
            F q = value(i), wq = mul(w[i], q);
            dot = add(dot, mul(wq, x[i])), norm = add(norm, mul(wq, q));
        }
        scale = choose(both(changed, positive(dot, norm)), div(dot, norm), scale);
        scale = choose(at_least(scale, set(0.0f)), scale, set(0.0f));
    }
};

void encode_thirds(bool small, const GridSearch<2>& search, Tile& t) {
    int size = small ? 32 : 16, subs = 256 / size;
    F most = set(0.0f), dot = set(0.0f), norm = set(0.0f);
    weigh_grid(t, 2, 0);
    ThirdPart parts[16];
    for (int j = 0; j < subs; j++) {
        parts[j].fit(search, t.x + size * j, t.w + size * j, size, small ? 1e-12f : 1e-7f);
        most = max(most, parts[j].scale);
    }
    M some = above(most, set(0.0f));
    F d = div(most, set(15.0f)), inverse = div(set(1.0f), d);
    for (int j = 0; j < subs; j++) {
        ThirdPart& part = parts[j];
        I code = nearest_within(mul(set(0.5f), sub(mul(inverse, part.scale), set(1.0f))), 0, 7);
        code = select(some, code, set(0)), part.shift = select(some, part.shift, set(0));
        t.scale_code(j, code);
        F by = to_float(add(shift_left<1>(code), set(1)));
        for (int i = 0; i < size; i++) {
            int at = size * j + i;
            t.code(at, part.code(i));
            F q = mul(part.value(i), by), wq = mul(t.w[at], q);
            dot = add(dot, mul(wq, t.x[at])), norm = add(norm, mul(wq, q));
        }
    }
    if (!small) d = choose(above(norm, set(0.0f)), div(dot, norm), d);
    t.scale = choose(some, as_half(mul(d, set(small ? 1.125f : 1.1125f))), set(0.0f));
}

// ---- all of them ----

void encode_grid(GgmlType type, Tile& t) {
    switch (type) {
    case GgmlType::iq1_s: return encode_thirds(true, GridSearch<2>(type), t);
    case GgmlType::iq1_m: return encode_thirds(false, GridSearch<2>(type), t);
    case GgmlType::iq3_xxs:
    case GgmlType::iq3_s: return encode_signed(type, GridSearch<3>(type), t);
    default: return encode_signed(type, GridSearch<2>(type), t);
    }
}

bool encode_any(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
                const GgmlEncoded& out) {
    if (!has_grid(type)) return ggml_encode(type, rows, cols, weight, importance, out);
    return encode_tiles(type, rows, cols, weight, importance, importance, out, [&](Tile& tile) { encode_grid(type, tile); });
}

// ---- scales under which the runs that were found are as large as the weights ----

// What codes stand for, and by what an odd scale is multiplied.
struct GridValues {
    float level[16], unit;
};

GridValues grid_values(GgmlType type) {
    auto of = [](float unit, int count, auto size) {
        GridValues out{{}, unit};
        for (int i = 0; i < count; i++) out.level[2 * i] = size(i), out.level[2 * i + 1] = -size(i);
        return out;
    };
    static constexpr float two[] = {8, 25, 43}, three[] = {4, 12, 20, 28, 36, 44, 52, 62};
    switch (type) {
    case GgmlType::iq1_s:
    case GgmlType::iq1_m: {
        GridValues out{{}, 1};
        for (int i = 0; i < 6; i++) out.level[i] = third[i % 2][i / 2];
        return out;
    }
    case GgmlType::iq3_xxs: return of(0.25f, 8, [](int i) { return three[i]; });
    case GgmlType::iq3_s: return of(1, 8, [](int i) { return float(2 * i + 1); });
    default: return of(0.125f, 3, [](int i) { return two[i]; });
    }
}

// By turns the scales of blocks and that above them, so that sums of squares are those of the weights. Those of the least
// error would be smaller: all weights of a row then are, and such errors add up in a product (llama.cpp multiplies its
// rounded scales by a constant for it).
void refit_scales(GgmlType type, Tile& t) {
    const GridValues values = grid_values(type);
    const bool thirds = type == GgmlType::iq1_s || type == GgmlType::iq1_m;
    const int subs = ggml_shape(type).subs, size = 256 / subs, top = thirds ? 7 : 15;
    const F level = load_f32(values.level);
    F alike[16], norm[16];
    I codes[16];
    for (int j = 0; j < subs; j++) {
        F square = set(0.0f);
        norm[j] = set(0.0f), codes[j] = load_u8(t.scale_codes + 16 * j);
        for (int i = size * j; i < size * (j + 1); i++) {
            F value = lookup16(level, t.codes[i]), weight = t.weighted ? t.importance[i] : set(1.0f);
            square = add(square, mul(weight, mul(t.x[i], t.x[i]))), norm[j] = add(norm[j], mul(weight, mul(value, value)));
        }
        alike[j] = mul(sqrt(square), sqrt(norm[j]));  // what their product would be, were they alike
    }
    for (int round = 0; round < 3; round++) {
        F all_alike = set(0.0f), all_norm = set(0.0f);
        for (int j = 0; j < subs; j++) {
            M on = both(above(norm[j], set(0.0f)), above(t.scale, set(0.0f)));
            F wanted = min(div(alike[j], mul(norm[j], mul(t.scale, set(values.unit)))), set(1e6f));
            codes[j] = select(on, nearest_within(mul(set(0.5f), sub(wanted, set(1.0f))), 0, top), codes[j]);
            F by = mul(set(values.unit), to_float(add(shift_left<1>(codes[j]), set(1))));
            all_alike = add(all_alike, mul(by, alike[j])), all_norm = add(all_norm, mul(mul(by, by), norm[j]));
        }
        F scale = as_half(div(all_alike, all_norm));
        auto error = [&](F d) { return mul(d, sub(mul(d, all_norm), add(all_alike, all_alike))); };
        M better = both(both(above(t.scale, set(0.0f)), above(scale, set(0.0f))), above(error(t.scale), error(scale)));
        t.scale = choose(better, scale, t.scale);
    }
    for (int j = 0; j < subs; j++) t.scale_code(j, codes[j]);
}

bool fit_any(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
             const GgmlEncoded& out) {
    if (!has_grid(type)) return ggml_fit(type, rows, cols, weight, importance, out);
    return encode_tiles(type, rows, cols, weight, importance, importance, out,
                        [&](Tile& tile) { encode_grid(type, tile), refit_scales(type, tile); });
}
