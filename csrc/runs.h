// The loop of `sweep` for types with tables of runs of codes: eight columns at once. Lanes are rows, but in the search for
// a run, where they are entries of the table.
// Part of kernels.h.

// How the low bits of the codes of eight columns (signs, or the shift of IQ1) go together.
enum class LowBits { any, even, alike, kept };

LowBits low_bits_of(GgmlType type) {
    switch (type) {
    case GgmlType::iq2_s:
    case GgmlType::iq3_s: return LowBits::any;
    case GgmlType::iq1_m: return LowBits::alike;
    case GgmlType::iq1_s: return LowBits::kept;  // one for 32 weights
    default: return LowBits::even;
    }
}

// Eight columns of a row in units of their scale: where their error is least, and by how much it grows around that.
struct RunAim {
    float at[8];
    const float* metric;  // [8, 8]
};
struct RunFound {
    float error = __FLT_MAX__;
    int32_t code[8] = {};
};

template <int bits>
struct RunSearch {
    static constexpr int group = bits == 2 ? 8 : 4, digits = bits == 2 ? 3 : 8;
    const GgmlGrid& grid;
    const LowBits rule;
    const float* level;
    F table[2];  // what digits stand for with a low bit of 0 and of 1, again after four or eight lanes

    RunSearch(GgmlType type, const float* level) : grid(ggml_grid(type)), rule(low_bits_of(type)), level(level) {
        for (int low = 0; low < 2; low++) {
            float values[16] = {};
            for (int i = 0; i < 16; i++)
                if (i % (1 << bits) < digits) values[i] = level[2 * (i % (1 << bits)) + low];
            table[low] = load_f32(values);
        }
    }

    // Sixteen entries for a part of the run, less what is wanted; `turned` is the column whose low bit is another (-1: none).
    struct Near {
        I word, turned = set(-1);
        F away[group];
    };
    F cost(const RunAim& aim, int column, int low) const {
        F away = sub(table[low], set(aim.at[column]));
        return mul(mul(set(aim.metric[9 * column]), away), away);
    }
    // Of every sixteenth entry that with the least error, columns apart; with `turn` one low bit is another than said.
    Near near(const RunAim& aim, int part, const int* low, bool turn) const {
        F costs[group], turns[group], best = set(__FLT_MAX__);
        for (int i = 0; i < group; i++) {
            int column = group * part + i;
            costs[i] = cost(aim, column, low[i]), turns[i] = sub(cost(aim, column, 1 - low[i]), costs[i]);
        }
        Near found;
        found.word = set(0);
        for (int at = 0; at < grid.size; at += 16) {
            I word = load_u16(grid.words + at), rest = word;
            F sum = value_of<bits>(costs[0], rest);
            for (int i = 1; i < group; i++) rest = shift_right<bits>(rest), sum = add(sum, value_of<bits>(costs[i], rest));
            if (turn) sum = add(sum, cheapest(turns, word).cost);
            M better = above(best, sum);
            best = choose(better, sum, best), found.word = select(better, word, found.word);
        }
        if (turn) found.turned = cheapest(turns, found.word).column;
        I rest = found.word;
        for (int i = 0; i < group; i++, rest = shift_right<bits>(rest)) {
            M other = both(greater(found.turned, set(i - 1)), greater(set(i + 1), found.turned));
            F value = choose(other, value_of<bits>(table[1 - low[i]], rest), value_of<bits>(table[low[i]], rest));
            found.away[i] = sub(value, set(aim.at[group * part + i]));
        }
        return found;
    }
    struct Turn {
        F cost;
        I column;
    };
    Turn cheapest(const F* turns, I word) const {
        Turn best{value_of<bits>(turns[0], word), set(0)};
        for (int i = 1; i < group; i++) {
            word = shift_right<bits>(word);
            F other = value_of<bits>(turns[i], word);
            M less = above(best.cost, other);
            best = {choose(less, other, best.cost), select(less, set(i), best.column)};
        }
        return best;
    }
    // Of a part, or of two: rows and columns of the metric from `row` and `column` on.
    static F product(const RunAim& aim, int row, const F* one, int column, const F* other) {
        F sum = set(0.0f);
        for (int i = 0; i < group; i++) {
            F pulled = set(0.0f);
            for (int j = 0; j < group; j++)
                pulled = add(pulled, mul(set(aim.metric[8 * (row + i) + column + j]), other[j]));
            sum = add(sum, mul(pulled, one[i]));
        }
        return sum;
    }

    void put(const Near& from, int lane, const int* low, int32_t* code) const {
        int32_t words[16], turned[16];
        store_words(words, from.word), store_words(turned, from.turned);
        for (int i = 0; i < group; i++)
            code[i] = 2 * (words[lane] >> bits * i & ((1 << bits) - 1)) + (turned[lane] == i ? 1 - low[i] : low[i]);
    }
    void offer(const RunAim& aim, const int* low, const Near& all, RunFound& best) const {
        float errors[16];
        store_f32(errors, product(aim, 0, all.away, 0, all.away));
        for (int lane = 0; lane < 16; lane++)
            if (errors[lane] < best.error) best.error = errors[lane], put(all, lane, low, best.code);
    }
    // Two parts: each entry of one with each of the other.
    void offer(const RunAim& aim, const int* low, const Near& one, const Near& two, RunFound& best) const {
        float own[16], away[4][16], least[16];
        int32_t with[16];
        store_f32(own, product(aim, 0, one.away, 0, one.away));
        for (int i = 0; i < 4; i++) store_f32(away[i], one.away[i]);
        F other = product(aim, 4, two.away, 4, two.away), low_error = set(__FLT_MAX__);
        I place = set(0);
        for (int lane = 0; lane < 16; lane++) {
            F error = add(other, set(own[lane]));
            for (int j = 0; j < 4; j++) {
                float pulled = 0;
                for (int i = 0; i < 4; i++) pulled += aim.metric[8 * (4 + j) + i] * away[i][lane];
                error = add(error, mul(set(2 * pulled), two.away[j]));
            }
            M better = above(low_error, error);
            low_error = choose(better, error, low_error), place = select(better, set(lane), place);
        }
        store_f32(least, low_error), store_words(with, place);
        for (int lane = 0; lane < 16; lane++)
            if (least[lane] < best.error)
                best.error = least[lane], put(one, with[lane], low, best.code), put(two, lane, low + 4, best.code + 4);
    }
    // Under low bits, of which an odd number of the eight is turned, or none (or, of an even number, two).
    void take(const RunAim& aim, const int* low, bool odd, RunFound& best) const {
        if constexpr (group == 8) {
            offer(aim, low, near(aim, 0, low, odd), best);
        } else {
            for (int turn = 0; turn < (rule == LowBits::even ? 2 : 1); turn++)
                offer(aim, low, near(aim, 0, low, turn), near(aim, 1, low + 4, odd != bool(turn)), best);
        }
    }

    // Half of how the error changes with column i.
    float slope_of(const RunAim& aim, const int32_t* code, int i) const {
        float sum = 0;
        for (int j = 0; j < 8; j++) sum += aim.metric[8 * i + j] * (level[code[j]] - aim.at[j]);
        return sum;
    }
    float error_of(const RunAim& aim, const int32_t* code) const {
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += slope_of(aim, code, i) * (level[code[i]] - aim.at[i]);
        return sum;
    }
    // The run in place of `now`, which stays where none is better but for the first time.
    RunFound find(const RunAim& aim, const int32_t* now, bool first) const {
        RunFound best;
        int low[8], ones = 0;
        for (int i = 0; rule == LowBits::kept && i < 8; i++) best.code[i] = now[0] & 1;
        if (rule == LowBits::any || rule == LowBits::even) {
            for (int i = 0; i < 8; i++) ones += low[i] = aim.at[i] < 0;
            take(aim, low, rule == LowBits::even && ones % 2, best);
        } else {
            for (int bit = 0; bit < 2; bit++) {
                if (rule == LowBits::kept && bit != (now[0] & 1)) continue;
                for (int i = 0; i < 8; i++) low[i] = bit;
                take(aim, low, false, best);
            }
        }
        turn(aim, best);
        if (!first && !(best.error < error_of(aim, now))) __builtin_memcpy(best.code, now, sizeof best.code);
        return best;
    }
    // With one low bit turned, or two where their number is even, if the error is less.
    void turn(const RunAim& aim, RunFound& best) const {
        float change[8], step[8], most = 0;
        int one = -1, two = -1;
        for (int i = 0; i < 8; i++) {
            step[i] = level[best.code[i] ^ 1] - level[best.code[i]];
            change[i] = step[i] * (2 * slope_of(aim, best.code, i) + aim.metric[9 * i] * step[i]);
            if (rule == LowBits::any && change[i] < most) most = change[i], one = i;
        }
        for (int i = 0; rule == LowBits::even && i < 8; i++)
            for (int j = 0; j < i; j++) {
                float both = change[i] + change[j] + 2 * aim.metric[8 * i + j] * step[i] * step[j];
                if (both < most) most = both, one = i, two = j;
            }
        if (one >= 0) best.code[one] ^= 1;
        if (two >= 0) best.code[two] ^= 1;
        best.error += most;
    }
};

// Columns from j on, fewer than eight at the end: what is not there counts nothing.
template <int bits>
void sweep_run(const RunSweep& run, const RunSearch<bits>& search, int64_t j, int64_t lane) {
    const Sweep& of = run.of;
    int count = int(smaller(8, of.cols - j));
    F scale = load_f32(of.scale + j * of.lanes + lane), now[8], gap[8];
    float aims[8][16] = {};
    int32_t codes[8][16] = {};
    for (int i = 0; i < count; i++) {
        int64_t at = (j + i) * of.lanes + lane;
        now[i] = sub(load_f32(of.weight + at), load_f32(of.error + at)), gap[i] = sub(load_f32(of.target + at), now[i]);
        store_words(codes[i], load_u8(of.codes + at));
    }
    for (int i = 0; i < count; i++) {
        F aim = now[i];
        for (int k = 0; k < count; k++) aim = add(aim, mul(set(run.solve[8 * (j + i) + k]), gap[k]));
        store_f32(aims[i], div(aim, scale));
    }
    for (int row = 0; row < 16; row++) {
        RunAim aim{{}, run.metric + 8 * j};
        int32_t code[8];
        for (int i = 0; i < 8; i++) aim.at[i] = aims[i][row], code[i] = codes[i][row];
        RunFound found = search.find(aim, code, run.first);
        for (int i = 0; i < 8; i++) codes[i][row] = found.code[i];
    }
    for (int i = 0; i < count; i++) {
        int64_t at = (j + i) * of.lanes + lane;
        I code = load_words(codes[i]);
        F error = sub(load_f32(of.weight + at), mul(lookup256(run.level, code), scale));
        F change = sub(error, load_f32(of.error + at));
        store_u8(of.codes + at, code), store_f32(of.error + at, error);
        const float* coupling = of.coupling + (j + i) * of.cols;
        for (int64_t k = j + 8; k < of.cols; k++) {
            float* target = of.target + k * of.lanes + lane;
            store_f32(target, add(load_f32(target), mul(set(coupling[k]), change)));
        }
    }
}

template <int bits>
void sweep_all_runs(const RunSweep& run) {
    RunSearch<bits> search(run.type, run.level);
    for (int64_t lane = 0; lane < run.of.lanes; lane += 16)
        for (int64_t j = 0; j < run.of.cols; j += 8) sweep_run(run, search, j, lane);
}
void sweep_runs(const RunSweep& run) {
    ggml_grid(run.type).group == 4 ? sweep_all_runs<3>(run) : sweep_all_runs<2>(run);
}
