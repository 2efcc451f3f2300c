// llama.cpp's encoders of the types with tables, to the bit: one block after the other, lanes are weights or neighbours.
// Part of kernels.h; the algorithms are those of ggml-quants.c (quantize_row_iq1_*_impl to quantize_row_iq3_*_impl).
//
// Sums are in the order of the scalar code. Where llama.cpp would stop (a scale that is NaN) the block is 0.

int nearest_whole(float x) { return int(__builtin_bit_cast(uint32_t, x + 12582912.0f) & 0x007fffff) - 0x00400000; }
float half_value(float x) {
    float out[16];
    store_f32(out, as_half(set(x)));
    return out[0];
}
float larger(float a, float b) { return a > b ? a : b; }
int within(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// What one super-block becomes.
struct GridBlock {
    uint8_t* codes;
    float* scale;
    uint8_t* scale_codes;
};

// The table of a type and the words near to those that it has not.
struct GridSearch {
    const GgmlGrid& grid;
    const GgmlNeighbours& near;
    explicit GridSearch(GgmlType type) : grid(ggml_grid(type)), near(ggml_neighbours(type)) {}

    bool has(int word) const { return grid.place[size_t(word)] >= 0; }

    int word_of(const uint8_t* digits) const {
        int word = 0;
        for (int i = 0; i < grid.group; i++) word |= digits[i] << grid.bits * i;
        return word;
    }
    int digit(int word, int i) const { return word >> grid.bits * i & ((1 << grid.bits) - 1); }

    // Of the neighbours of a word that has some, the one with the least error; the first of equals.
    template <int bits>
    int best(int word, const float* x, const float* w, float scale, F levels) const {
        GgmlNeighbours::Range range = near.of[size_t(word)];
        const uint16_t* words = near.words.data() + range.first;
        float least = __FLT_MAX__, errors[16];
        int found = words[0];
        for (int at = 0; at < range.count; at += 16) {
            I rest = load_u16(words + at);
            F sum = set(0.0f);
            for (int i = 0; i < grid.group; i++, rest = shift_right<bits>(rest)) {
                F level = lookup16(levels, both(rest, set((1 << bits) - 1)));
                F difference = sub(mul(set(scale), level), set(x[i]));
                sum = add(sum, mul(mul(set(w[i]), difference), difference));
            }
            store_f32(errors, sum);
            for (int k = 0; k < 16 && at + k < range.count; k++)
                if (errors[k] < least) least = errors[k], found = words[at + k];
        }
        return found;
    }
    int fitting(int word, const float* x, const float* w, float scale, F levels) const {
        if (has(word)) return word;
        return grid.bits == 2 ? best<2>(word, x, w, scale, levels) : best<3>(word, x, w, scale, levels);
    }
};

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

// A block of 32 or 16 weights without their signs.
struct SignedPart {
    float x[32], w[32], root[32];
    uint8_t signs[4] = {};
    float peak;

    void take(const SignedKind& kind, const float* from) {
        for (int i = 0; i < kind.size; i++) {
            bool down = !(from[i] >= 0);
            x[i] = down ? -from[i] : from[i];
            signs[i / 8] = uint8_t(signs[i / 8] | down << i % 8);
        }
        for (int k = 0; kind.even && k < kind.size / 8; k++)
            if (__builtin_popcount(signs[k]) % 2) flip_least(from + 8 * k, k);
        peak = x[0];
        for (int i = 1; i < kind.size; i++) peak = larger(peak, x[i]);
        for (int i = 0; i < kind.size; i += 16) store_f32(root + i, sqrt(load_f32(w + i)));
    }
    void flip_least(const float* from, int k) {
        int at = 0;
        auto cost = [&](int i) { return w[8 * k + i] * from[i] * from[i]; };
        for (int i = 1; i < 8; i++)
            if (cost(i) < cost(at)) at = i;
        x[8 * k + at] = -x[8 * k + at];
        signs[k] = uint8_t(signs[k] ^ 1 << at);
    }
};

struct SignedFit {
    const SignedKind& kind;
    const GridSearch& search;
    const SignedPart& part;
    F levels;
    int words[8] = {};
    float scale = 0;

    int groups() const { return kind.size / search.grid.group; }

    void digits_of(float inverse, uint8_t* digits) const {
        for (int i = 0; i < kind.size; i += 16) {
            F at = mul(set(0.5f), sub(mul(set(inverse), load_f32(part.x + i)), set(1.0f)));
            store_u8(digits + i, nearest_within(at, 0, kind.top - 1));
        }
    }
    // Words under a scale; `was` says which groups need no neighbour. Groups that `kept` has stay.
    void choose_words(float inverse, float by, int* out, bool* was, const bool* kept) const {
        uint8_t digits[32];
        digits_of(inverse, digits);
        for (int k = 0, group = search.grid.group; k < groups(); k++) {
            if (kept && kept[k]) continue;
            int word = search.word_of(digits + group * k);
            if (was) was[k] = search.has(word);
            out[k] = search.fitting(word, part.x + group * k, part.root + group * k, by, levels);
        }
    }
    void sums(const int* of, float& dot, float& norm) const {
        dot = norm = 0;
        for (int i = 0, group = search.grid.group; i < kind.size; i++) {
            float q = float(2 * search.digit(of[i / group], i % group) + 1), w = part.w[i];
            dot += w * part.x[i] * q, norm += w * q * q;
        }
    }
    void run(float start, float most) {
        float best = 0, dot, norm, highest = float(2 * kind.top - 1);
        bool on[8], found_on[8];
        int found[8];
        scale = start;
        for (int k = 0; k < 8; k++) on[k] = !kind.again;
        for (int i = -kind.steps; i <= kind.steps; i++) {
            float inverse = (highest + float(i) * kind.step) / most;
            choose_words(inverse, 1 / inverse, found, found_on, nullptr);
            sums(found, dot, norm);
            if (!(norm > 0 && dot * dot > best * norm)) continue;
            scale = dot / norm, best = scale * dot;
            for (int k = 0; k < groups(); k++) words[k] = found[k], on[k] = found_on[k];
        }
        bool all_on = true;
        for (int k = 0; k < groups(); k++) all_on = all_on && on[k];
        if ((all_on && !kind.first_fit) || !(scale > 0)) return;
        choose_words(1 / scale, scale, words, nullptr, kind.again ? nullptr : on);
        sums(words, dot, norm);
        if (norm > 0) scale = dot / norm;
    }
};

// The scales that IQ2_XXS starts from, those of its eight blocks side by side.
void first_scales(const SignedPart* parts, float* scales) {
    float room[16 * 32] = {};
    F x[32], w[32];
    I codes[32];
    for (int j = 0; j < 8; j++) __builtin_memcpy(room + 32 * j, parts[j].x, sizeof parts[j].x);
    as_columns(room, 32, x);
    for (int j = 0; j < 8; j++) __builtin_memcpy(room + 32 * j, parts[j].w, sizeof parts[j].w);
    as_columns(room, 32, w);
    store_f32(scales, fit_positive(32, 4, x, w, codes));
}

void weigh_signed(GgmlType type, const SignedKind& kind, float sigma2, const float* x, const float* importance, float* w) {
    for (int i = 0; i < kind.size; i++) {
        float square = x[i] * x[i];
        if (importance)
            w[i] = importance[i] * __builtin_sqrtf(sigma2 + square);
        else
            w[i] = type == GgmlType::iq2_s ? 0.25f * sigma2 + square : square;
    }
}

float square_mean(const float* x, float times) {
    float sum = 0;
    for (int i = 0; i < 256; i++) sum += x[i] * x[i];
    return times * sum / 256;
}

void encode_signed(GgmlType type, const GridSearch& search, const float* x, const float* importance, const GridBlock& out) {
    static constexpr float odd[16] = {1, 3, 5, 7, 9, 11, 13, 15};
    SignedKind kind = signed_kind(type);
    int subs = 256 / kind.size, group = search.grid.group;
    float sigma2 = square_mean(x, kind.sigma), scales[16] = {}, starts[16], most = 0;
    SignedPart parts[16];
    for (int j = 0; j < subs; j++) {
        weigh_signed(type, kind, sigma2, x + kind.size * j, importance ? importance + kind.size * j : nullptr, parts[j].w);
        parts[j].take(kind, x + kind.size * j);
    }
    if (kind.first_fit) first_scales(parts, starts);
    __builtin_memset(out.codes, 0, 256);
    for (int j = 0; j < subs; j++) {
        SignedPart& part = parts[j];
        float highest = float(2 * kind.top - 1), extreme = kind.first_fit ? starts[j] * float(kind.top) : part.peak;
        if (part.peak < kind.least || (kind.first_fit && !(extreme > 0))) continue;
        SignedFit fit{kind, search, part, load_f32(odd)};
        fit.run(kind.first_fit ? starts[j] : part.peak / highest, extreme);
        bool turned = fit.scale < 0;
        scales[j] = turned ? -fit.scale : fit.scale >= 0 ? fit.scale : 0;
        most = larger(most, scales[j]);
        for (int i = 0; i < kind.size; i++) {
            int sign = (part.signs[i / 8] >> i % 8 & 1) ^ int(turned);
            out.codes[kind.size * j + i] = uint8_t(2 * search.digit(fit.words[i / group], i % group) + sign);
        }
    }
    bool nothing = !(most > 0);
    if (nothing && type != GgmlType::iq2_s && type != GgmlType::iq3_s) __builtin_memset(out.codes, 0, 256);
    float d = most / 31, inverse = 1 / d;
    *out.scale = nothing ? 0 : half_value(d * kind.factor);
    for (int j = 0; j < subs; j++)
        out.scale_codes[j] = nothing ? 0 : uint8_t(within(nearest_whole(0.5f * (inverse * scales[j] - 1)), 0, 15));
}

// ---- IQ1: -1, 0, 1, shifted by an eighth up or down ----

// Levels of digits under a shift up (0) or down (1).
constexpr float third[2][16] = {{-0.875f, 0.125f, 1.125f}, {-1.125f, -0.125f, 0.875f}};

// A block's weights in order of size, and which of them get which digit.
struct ThirdFit {
    int order[32], low = -1, high = -1, shift = -1;  // below `low` digit 0, below `high` 1; shifts of halves: 2 bits
    float scale = 0, best = -__FLT_MAX__;

    void sort(const float* x, int count) {
        for (int i = 0; i < count; i++) {
            int at = i;
            for (; at > 0 && x[i] < x[order[at - 1]]; at--) order[at] = order[at - 1];
            order[at] = i;
        }
    }
    void offer(float dot, float norm, int from, int to, int kind) {
        if (!(norm > 0 && dot * dot > best * norm)) return;
        scale = dot / norm, best = scale * dot;
        low = from, high = to, shift = kind;
    }
    // One shift for the block (IQ1_S).
    void split(const float* x, const float* w, int count) {
        float sx[33] = {}, sw[33] = {};
        for (int i = 0; i < count; i++) sx[i + 1] = sx[i] + w[order[i]] * x[order[i]], sw[i + 1] = sw[i] + w[order[i]];
        for (int a = 0; a <= count; a++)
            for (int b = a; b <= count; b++)
                for (int k = 0; k < 2; k++) {
                    const float* q = third[k];
                    float dot = (sx[a] - sx[0]) * q[0] + (sx[b] - sx[a]) * q[1] + (sx[count] - sx[b]) * q[2];
                    float norm = (sw[a] - sw[0]) * q[0] * q[0] + (sw[b] - sw[a]) * q[1] * q[1] +
                                 (sw[count] - sw[b]) * q[2] * q[2];
                    offer(dot, norm, a, b, 3 * k);
                }
    }
    // A shift for each half (IQ1_M): the sums of the halves are apart.
    void split_halves(const float* x, const float* w, int count) {
        float px[2][17] = {}, pw[2][17] = {};
        for (int j = 0; j < count; j++) {
            int i = order[j], h = i < count / 2 ? 0 : 1;
            px[h][j + 1] = px[h][j] + w[i] * x[i], px[1 - h][j + 1] = px[1 - h][j];
            pw[h][j + 1] = pw[h][j] + w[i], pw[1 - h][j + 1] = pw[1 - h][j];
        }
        for (int a = 0; a <= count; a++)
            for (int b = a; b <= count; b++) {
                float dot[2][2], norm[2][2];
                for (int h = 0; h < 2; h++)
                    for (int k = 0; k < 2; k++) {
                        const float* q = third[k];
                        float first = q[0] * q[0] - q[1] * q[1], second = q[1] * q[1] - q[2] * q[2];
                        dot[h][k] = px[h][count] * q[2] - (px[h][a] + px[h][b]);
                        norm[h][k] = pw[h][count] * q[2] * q[2] + pw[h][a] * first + pw[h][b] * second;
                    }
                for (int k = 0; k < 4; k++) offer(dot[0][k / 2] + dot[1][k % 2], norm[0][k / 2] + norm[1][k % 2], a, b, k);
            }
    }
    void digits(int count, uint8_t* out) {
        for (int j = 0; j < count; j++) out[order[j]] = uint8_t(j < low ? 0 : j < high ? 1 : 2);
        if (!(scale < 0)) return;
        for (int j = 0; j < count; j++) out[j] = uint8_t(2 - out[j]);
        scale = -scale, shift = 3 - shift;
    }
};

struct ThirdPart {
    int words[4] = {}, shift = 0;
    float scale = 0;

    // the shift of a group: of IQ1_S all are the same
    int down(int group) const { return group == 0 ? shift >> 1 : shift & 1; }
};

ThirdPart encode_part(const GridSearch& search, const float* x, const float* w, int count, float least) {
    ThirdPart part;
    float peak = 0;
    for (int i = 0; i < count; i++) peak = larger(peak, __builtin_fabsf(x[i]));
    if (peak < least) return part;
    ThirdFit fit;
    fit.sort(x, count);
    count == 32 ? fit.split(x, w, count) : fit.split_halves(x, w, count);
    if (fit.shift < 0) return part;
    uint8_t digits[32];
    fit.digits(count, digits);
    part.shift = fit.shift, part.scale = fit.scale;
    bool all_on = true;
    for (int k = 0; k < count / 8; k++) {
        int word = search.word_of(digits + 8 * k);
        all_on = all_on && search.has(word);
        part.words[k] = search.fitting(word, x + 8 * k, w + 8 * k, fit.scale, load_f32(third[part.down(k)]));
    }
    float dot = 0, norm = 0;
    for (int i = 0; i < count && !all_on; i++) {
        float q = third[part.down(i / 8)][search.digit(part.words[i / 8], i % 8)];
        dot += w[i] * q * x[i], norm += w[i] * q * q;
    }
    if (dot > 0 && norm > 0) part.scale = dot / norm;
    if (!(part.scale >= 0)) part.scale = 0;
    return part;
}

void encode_thirds(GgmlType type, const GridSearch& search, const float* x, const float* importance, const GridBlock& out) {
    bool small = type == GgmlType::iq1_s;
    int size = small ? 32 : 16, subs = 256 / size;
    float sigma2 = square_mean(x, 2), w[256], most = 0;
    for (int i = 0; i < 256; i++)
        w[i] = importance ? importance[i] * __builtin_sqrtf(sigma2 + x[i] * x[i]) : x[i] * x[i];
    ThirdPart parts[16];
    for (int j = 0; j < subs; j++) {
        parts[j] = encode_part(search, x + size * j, w + size * j, size, small ? 1e-12f : 1e-7f);
        most = larger(most, parts[j].scale);
    }
    bool nothing = !(most > 0);
    float d = most / 15, inverse = 1 / d, dot = 0, norm = 0;
    for (int j = 0; j < subs; j++) {
        int code = nothing ? 0 : within(nearest_whole(0.5f * (inverse * parts[j].scale - 1)), 0, 7);
        out.scale_codes[j] = uint8_t(code);
        for (int i = 0; i < size; i++) {
            int down = nothing ? 0 : parts[j].down(i / 8), digit = search.digit(parts[j].words[i / 8], i % 8);
            out.codes[size * j + i] = uint8_t(2 * digit + down);
            float q = third[down][digit] * float(2 * code + 1);
            dot += w[size * j + i] * q * x[size * j + i], norm += w[size * j + i] * q * q;
        }
    }
    if (!small && norm > 0) d = dot / norm;
    *out.scale = nothing ? 0 : half_value(d * (small ? 1.125f : 1.1125f));
}

void encode_any(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
                const GgmlEncoded& out) {
    if (!has_grid(type)) return ggml_encode(type, rows, cols, weight, importance, out);
    GridSearch search(type);
    GgmlShape shape = ggml_shape(type);
    bool thirds = type == GgmlType::iq1_s || type == GgmlType::iq1_m;
    for (int64_t i = 0, across = cols / 256; i < rows * across; i++) {
        GridBlock block{out.codes + 256 * i, out.scale + i, out.scale_codes + shape.subs * i};
        const float* given = importance ? importance + i % across * 256 : nullptr;
        (thirds ? encode_thirds : encode_signed)(type, search, weight + 256 * i, given, block);
    }
}

// These search all runs of codes already: there is nothing more to fit.
void fit_any(GgmlType type, int64_t rows, int64_t cols, const float* weight, const float* importance,
             const GgmlEncoded& out) {
    (has_grid(type) ? encode_any : ggml_fit)(type, rows, cols, weight, importance, out);
}
